// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The responses of a report: held-out problems before and after, and samples of the training token by token.
"use strict";

/**
 * @typedef {{step: number, problem_id: string, sample: number | null, prompt: string, response: string,
 *            correct: boolean, length: number, truncated: boolean}} Answer
 * @typedef {[string, number | null, number | null, number | null, string | null]} Token text, teacher minus student in
 *   nats, loss, k, status
 * @typedef {{step: number, problem_id: string, prompt: string, solution: string, teacher: string,
 *            truncated: boolean, tokens: Token[], episode?: number, turn?: number, reward?: number, hint?: string,
 *            reply?: string | null}} TrainingSample the optional fields are those of a turn of an episode
 */

const PAGE_LENGTH = 20;

/** A filter's name -> whether a pair of answers passes. */
const OUTCOMES = /** @type {Record<string, (before: Answer | null, after: Answer | null) => boolean>} */ ({
  "all outcomes": () => true,
  "wrong, then right": (before, after) => before !== null && after !== null && !before.correct && after.correct,
  "right, then wrong": (before, after) => before !== null && after !== null && before.correct && !after.correct,
  "right in both": (before, after) => before !== null && after !== null && before.correct && after.correct,
  "wrong in both": (before, after) => before !== null && after !== null && !before.correct && !after.correct,
  "cut in one of them": (before, after) => [before, after].some((answer) => answer !== null && answer.truncated),
});

/** @param {Run[]} runs */
function showResponses(runs) {
  const parts = [];
  if (hasBlock("evaluations")) parts.push(foldedPart("Held-out problems, before and after", "evaluations", evaluationsPart));
  if (hasBlock("samples")) parts.push(foldedPart("Samples of the training, token by token", "samples", samplesPart));
  byId("responses").hidden = parts.length === 0;
  byId("responses-body").append(...parts.map((make) => make(runs)));
}

/**
 * Return a function that makes a folded part of the page, whose data block is read when the part is first opened.
 * @param {string} title
 * @param {string} block
 * @param {(runs: Run[], data: any) => HTMLElement} make
 */
function foldedPart(title, block, make) {
  return (/** @type {Run[]} */ runs) => {
    const part = element("details", { id: `part-${block}` }, element("summary", {}, title));
    part.addEventListener("toggle", async () => {
      if (part.childElementCount > 1) return;
      part.append(make(runs, await openBlock(block)));
    });
    return part;
  };
}

/**
 * Return a labelled select.
 * @param {string} label
 * @param {string[]} options
 * @param {number} chosen
 */
function choice(label, options, chosen = 0) {
  const select = /** @type {HTMLSelectElement} */ (element("select", {}));
  options.forEach((name, i) => select.append(element("option", { value: i, selected: i === chosen }, name)));
  return { select, label: element("label", {}, label, select) };
}

/**
 * Return the part that shows answers to the same problems side by side.
 * @param {Run[]} runs
 * @param {Answer[][]} answers of each run
 */
function evaluationsPart(runs, answers) {
  const places = answers.flatMap((ofRun, run) => [...new Set(ofRun.map(({ step }) => step))].map((step) => ({ run, step })));
  const names = places.map(({ run, step }) => (runs.length > 1 ? `${runs[run].label}, step ${step}` : `step ${step}`));
  const left = choice("Left", names);
  const right = choice("Right", names, names.length - 1);
  const samples = [...new Set(answers.flat().map(({ sample }) => sample))];
  const kind = choice("Response", samples.map((sample) => (sample === null ? "greedy" : `sample ${sample + 1}`)));
  const outcome = choice("Outcome", Object.keys(OUTCOMES));
  const count = element("output", { class: "soft small", "aria-live": "polite" });
  const list = element("div", { id: "pairs" });
  const more = element("button", { type: "button" }, "Show more");
  let limit = PAGE_LENGTH;

  const pairs = () => {
    const sample = samples[Number(kind.select.value)];
    const sides = [left, right].map(({ select }) => {
      const place = places[Number(select.value)];
      const found = answers[place.run].filter((answer) => answer.step === place.step && answer.sample === sample);
      return new Map(found.map((answer) => [answer.problem_id, answer]));
    });
    const ids = new Set([...sides[0].keys(), ...sides[1].keys()]);
    return [...ids].map((id) => ({ id, before: sides[0].get(id) || null, after: sides[1].get(id) || null }));
  };
  const show = () => {
    const passes = OUTCOMES[Object.keys(OUTCOMES)[Number(outcome.select.value)]];
    const all = pairs();
    const found = all.filter(({ before, after }) => passes(before, after));
    count.textContent = `${found.length} of ${all.length} problems`;
    const titles = [left, right].map(({ select }) => names[Number(select.value)]);
    list.replaceChildren(...found.slice(0, limit).map((pair) => pairElement(pair, titles)));
    more.hidden = found.length <= limit;
  };
  const restart = () => {
    limit = PAGE_LENGTH;
    show();
  };
  for (const { select } of [left, right, kind, outcome]) select.addEventListener("change", restart);
  more.addEventListener("click", () => {
    limit += PAGE_LENGTH;
    show();
  });
  show();
  const controls = [left.label, right.label, kind.label, outcome.label, count];
  return element("div", {}, element("div", { class: "toolbar panel" }, ...controls), list, more);
}

/**
 * @param {{id: string, before: Answer | null, after: Answer | null}} pair
 * @param {string[]} titles
 */
function pairElement({ id, before, after }, titles) {
  const known = after || before;
  const prompt = known === null ? "" : known.prompt;
  const sides = [before, after].map((answer, i) => {
    const heading = element("h4", { class: "small soft" }, titles[i]);
    if (answer === null) return element("div", { class: "answer" }, heading, element("p", { class: "soft" }, "no response"));
    const name = answer.truncated ? "cut" : answer.correct ? "right" : "wrong";
    const badge = element("span", { class: `badge ${name}` }, name);
    const length = element("span", { class: "soft small" }, `${answer.length} tokens`);
    return element("div", { class: "answer" }, heading, badge, length, element("pre", {}, answer.response));
  });
  return element(
    "article",
    { class: "panel pair" },
    element("h3", { class: "small" }, id),
    element("pre", { class: "prompt" }, prompt),
    element("div", { class: "sides" }, ...sides),
  );
}

/**
 * Return the part that shows samples of the training, with each token in the colour of the teacher's disagreement.
 * @param {Run[]} runs
 * @param {TrainingSample[][]} samples of each run
 */
function samplesPart(runs, samples) {
  const shown = samples.map(conversations);
  const places = samples.flatMap((ofRun, run) => [...new Set(ofRun.map(({ step }) => step))].map((step) => ({ run, step })));
  const names = places.map(({ run, step }) => (runs.length > 1 ? `${runs[run].label}, step ${step}` : `step ${step}`));
  const place = choice("Samples of", names);
  const list = element("div", { id: "samples" });
  const show = () => {
    const { run, step } = places[Number(place.select.value)];
    const found = shown[run].filter((turns) => turns[0].step === step).slice(0, PAGE_LENGTH);
    list.replaceChildren(...found.map((turns) => sampleElement(turns, names[Number(place.select.value)])));
  };
  place.select.addEventListener("change", show);
  show();
  const key = element(
    "span",
    { class: "small" },
    tokenElement(["red, solid line", -2, null, null, null]),
    ": less likely for the teacher than for the student; ",
    tokenElement(["green, dotted line", 2, null, null, null]),
    ": more likely.",
  );
  return element("div", {}, element("div", { class: "toolbar panel" }, place.label, key), list);
}

/**
 * Return the turns of each episode in their order, and every other sample by itself.
 * @param {TrainingSample[]} samples
 */
function conversations(samples) {
  const found = /** @type {Map<TrainingSample | string, TrainingSample[]>} */ (new Map());
  for (const sample of samples) {
    const { step, problem_id, episode } = sample;
    const key = episode === undefined ? sample : JSON.stringify([step, problem_id, episode]);
    found.set(key, [...(found.get(key) || []), sample]);
  }
  return [...found.values()].map((turns) => turns.sort((a, b) => Number(a.turn) - Number(b.turn)));
}

/**
 * Return a sample, or the turns of an episode as one conversation.
 * @param {TrainingSample[]} turns
 * @param {string} name of its run and step
 */
function sampleElement(turns, name) {
  const [first] = turns;
  const isSingle = first.turn === undefined;
  const { prompt, solution, teacher } = first;
  const by = teacher === "" ? "" : `, teacher: ${teacher}`;
  const about = isSingle ? (first.truncated ? " (cut)" : "") : `, episode ${Number(first.episode) + 1}`;
  const single = () => [
    element("pre", { class: "prompt" }, prompt),
    solution === "" ? "" : element("details", { class: "small" }, element("summary", {}, "Hint"), element("pre", {}, solution)),
    ...responseParts(first),
  ];
  return element(
    "article",
    { class: "panel pair" },
    element("h3", { class: "small" }, first.problem_id, `, ${name}`, about, by),
    ...(isSingle ? single() : turns.flatMap((turn, i) => turnParts(turn, turns[i - 1]))),
  );
}

/**
 * Return a turn of an episode: its prompt, folded behind the turn before it, the response beside the reward and the hint
 * of the turn, and the reply.
 * @param {TrainingSample} sample
 * @param {TrainingSample | undefined} before the turn that is shown before this one
 */
function turnParts({ prompt, turn, reward, hint, reply, truncated, ...sample }, before) {
  const number = Number(turn) + 1;
  const shown = element("pre", { class: "prompt" }, prompt);
  const folded = element("details", { class: "small" }, element("summary", {}, `Prompt of turn ${number}`), shown);
  const beside = element(
    "aside",
    { class: "small" },
    element("h4", {}, `Turn ${number}${truncated ? " (cut)" : ""}`),
    element("p", {}, `reward ${numberText(reward)}`),
    hint ? element("p", { class: "soft" }, "hint of the teacher") : "",
    hint ? element("pre", { class: "prompt" }, hint) : "",
  );
  const said = element("div", {}, ...responseParts(sample));
  const replied = typeof reply === "string" ? element("pre", { class: "reply" }, reply) : "";
  const follows = before !== undefined && Number(before.turn) + 1 === turn;
  return [follows ? folded : shown, element("div", { class: "turn" }, said, beside), replied];
}

/**
 * Return the tokens of a response, and a table of those at which teacher and student differ most.
 * @param {{tokens: Token[]}} sample
 */
function responseParts(sample) {
  const disagreed = sample.tokens
    .filter(([, difference]) => difference !== null && Math.abs(difference) >= 0.3)
    .sort((a, b) => Math.abs(Number(b[1])) - Math.abs(Number(a[1])))
    .slice(0, 10);
  const rows = disagreed.map(([text, difference, loss, k, status]) =>
    element(
      "tr",
      {},
      element("td", {}, element("code", {}, JSON.stringify(text))),
      ...[difference, loss, k].map((value) => element("td", { class: "number" }, numberText(value))),
      element("td", {}, status || ""),
    ),
  );
  const head = ["token", "teacher - student", "loss", "k", "status"].map((name, i) =>
    element("th", { scope: "col", class: i > 0 && i < 4 ? "number" : "" }, name),
  );
  const table = element(
    "table",
    {},
    element("caption", { class: "small" }, "The tokens at which teacher and student differ most, in nats"),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows),
  );
  return [
    element("pre", { class: "token-text" }, ...sample.tokens.map(tokenElement)),
    rows.length > 0 ? element("div", { class: "scroll" }, table) : "",
  ];
}

/**
 * Return a token in the colour of the difference between teacher and student.
 * @param {Token} token
 */
function tokenElement([text, difference, loss, k, status]) {
  if (difference === null || Math.abs(difference) < 0.3) return element("span", { class: "token" }, text);
  const made = element("span", { class: `token ${difference < 0 ? "less" : "more"}` }, text);
  made.style.setProperty("--strength", `${Math.round(Math.min(1, Math.abs(difference) / 4) * 45 + 10)}%`);
  if (loss !== null) {
    made.title = `teacher - student ${numberText(difference)} nats, loss ${numberText(loss)}, k ${numberText(k)}, ${status}`;
  }
  return made;
}

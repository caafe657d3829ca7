// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The parts of the explorer's page that are made once: the tokens, the controls, keys and pointer.
"use strict";

const PAGE_TOKENS = 50;
const SHORT_TEXT = 200;
const SHORT_RESPONSE = 6; // lines of 80 characters

/**
 * Fill the page with the tokens of the response.
 * @param {Explorer} explorer
 */
function showTokens(explorer) {
  const { tokens } = explorer;
  const all = document.createDocumentFragment();
  for (let token = 0; token < explorer.numTokens; token++) {
    const text = tokens.text[token];
    const span = document.createElement("span");
    span.id = `t${token}`;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.textContent = text === "" ? "∅" : text.replaceAll("\n", "↵\n");
    explorer.spans.push(span);
    explorer.paint(token);
    all.append(span);
  }
  byId("tokens").append(all);
}

/**
 * Return whether a response takes so few lines that it needs no column of its own.
 * @param {string} response
 */
function isShort(response) {
  const lines = response.split("\n").map((line) => Math.max(1, Math.ceil(line.length / 80)));
  return lines.reduce((sum, count) => sum + count, 0) <= SHORT_RESPONSE;
}

/**
 * Show what the response answers.
 * @param {any} overview
 */
function showContext(overview) {
  const { hint = overview.solution, reply = null } = overview; // a turn of an episode has both
  for (const [name, text] of [["prompt", overview.prompt], ["solution", hint]]) {
    byId(name).textContent = text;
    byId(name).parentElement?.toggleAttribute("open", text.length <= SHORT_TEXT);
  }
  if (reply !== null) {
    const shown = element("pre", { id: "reply" }, reply);
    const summary = element("summary", {}, "Reply of the environment");
    byId("tokens").after(element("details", { open: reply.length <= SHORT_TEXT }, summary, shown));
  }
  const model = overview.model === undefined ? "" : `${overview.model}, `;
  const where = overview.step === undefined ? model : `step ${overview.step}, problem ${overview.problem_id}, `;
  byId("about").textContent =
    where +
    (overview.turn === undefined
      ? ""
      : `episode ${overview.episode + 1}, turn ${overview.turn + 1}, reward ${numberText(overview.reward)}, `) +
    `${overview.tokens.id.length} tokens` +
    (overview.truncated ? ", cut at rollout.max_new_tokens" : "") +
    `, vocabulary of ${overview.vocab_size}`;
}

/**
 * Make the controls of the settings.
 * @param {Explorer} explorer
 */
function showControls(explorer) {
  const { saved } = explorer;
  const weight = element("input", { type: "range", id: "weight", min: 0, max: 4, step: 0.05 });
  const shown = element("output", { for: "weight", id: "weight-value" });
  const rules = Object.entries(RULES).map(([name, rule]) => option(name, rule.text));
  const own = ruleName(saved);
  if (own === "saved") rules.unshift(option("saved", ruleText(saved)));
  const rule = select("rule", rules);
  const anchors = [option("student", "the student")];
  if (explorer.overview.models.includes("reference")) anchors.push(option("reference", "the reference"));
  const anchor = select("anchor", anchors);
  const match = select("match", anchors.map((one) => /** @type {HTMLElement} */ (one.cloneNode(true))));
  const divergences = Object.entries(DIVERGENCES).map(([name, { text }]) => option(name, text));
  if (divergenceName(saved) === "saved") divergences.unshift(option("saved", divergenceText(saved)));
  const divergence = select("divergence", divergences);
  const contrast = select("contrast", [option("other", "other hints"), option("none", "nothing")]);
  const reset = element("button", { type: "button", id: "reset" }, "As saved");

  const show = () => {
    const now = explorer.settings;
    input(weight).value = String(now.teacher_weight);
    shown.textContent = numberText(now.teacher_weight);
    input(rule).value = ruleName(now);
    input(anchor).value = now.anchor;
    input(match).value = now.match;
    input(divergence).value = divergenceName(now);
    input(contrast).value = now.num_controls ? "other" : "none";
    for (const one of rules) one.textContent = ruleText({ ...now, ...rulesValues(saved, input(one).value) });
    const mixes = now.rule !== "teacher_alone";
    input(weight).disabled = !mixes;
    input(anchor).disabled = !mixes || anchors.length === 1;
    input(contrast).disabled = !mixes;
    input(match).disabled = now.rule !== "entropy_matched" || now.anchor === "student";
    input(reset).disabled = explorer.isAsSaved;
  };
  /** @type {(changes: Partial<Settings>) => void} */
  const change = (changes) => {
    explorer.change(changes);
    show();
  };
  weight.addEventListener("input", () => change({ teacher_weight: Number(input(weight).value) }));
  rule.addEventListener("change", () => {
    const values = rulesValues(saved, input(rule).value);
    change(values.rule === "teacher_alone" ? { ...values, anchor: "student", match: "student" } : values);
  });
  anchor.addEventListener("change", () => change({ anchor: input(anchor).value, match: input(anchor).value }));
  contrast.addEventListener("change", () =>
    change({ num_controls: input(contrast).value === "other" ? saved.num_controls : 0 }),
  );
  match.addEventListener("change", () => change({ match: input(match).value }));
  divergence.addEventListener("change", () => {
    const { divergence: kind, order, forward_above } = saved;
    change(DIVERGENCES[input(divergence).value]?.values ?? { divergence: kind, order, forward_above });
  });
  reset.addEventListener("click", () => change({ ...saved }));
  show();
  byId("controls").append(
    labelled("teacher's weight w", weight, shown),
    labelled("rule", rule),
    labelled("mixed with", anchor),
    ...(saved.num_controls ? [labelled("compared with", contrast)] : []),
    labelled("entropy of", match),
    labelled("divergence", divergence),
    reset,
  );
  byId("title").append(themeSwitch());
}

/**
 * Return the settings of a rule; those of the run for another name than those of RULES.
 * @param {Settings} saved
 * @param {string} name
 * @returns {Partial<Settings>}
 */
function rulesValues(saved, name) {
  return RULES[name]?.values ?? { rule: saved.rule, k_max: saved.k_max, k: saved.k };
}

/** @param {HTMLElement} made an input, a select or a button */
function input(made) {
  return /** @type {HTMLInputElement} */ (made);
}

/**
 * @param {string} value
 * @param {string} text
 */
function option(value, text) {
  return element("option", { value }, text);
}

/**
 * @param {string} id
 * @param {HTMLElement[]} options
 */
function select(id, options) {
  return element("select", { id }, ...options);
}

/**
 * @param {string} text
 * @param {...HTMLElement} parts
 */
function labelled(text, ...parts) {
  return element("label", {}, element("span", { class: "soft" }, text), ...parts);
}

/** Fold the settings where they would leave no room for the response. */
function foldSettings() {
  if (matchMedia("(max-width: 60rem)").matches) byId("settings").removeAttribute("open");
}

/** Make the legend of the colours and marks. */
function showLegend() {
  const limits = ["below " + LEVELS[0], ...LEVELS.map((limit) => `from ${limit}`)];
  byId("legend").append(
    ...limits.map((text, level) => element("span", { class: `t l${level}` }, text)),
    element("span", { class: "t l0 differs" }, "first choice differs"),
  );
}

/**
 * Let keys and the pointer choose tokens.
 * @param {Explorer} explorer
 */
function listen(explorer) {
  const holder = byId("tokens");
  const tokenAt = (/** @type {EventTarget | null} */ target) =>
    target instanceof HTMLElement && /^t\d+$/.test(target.id) ? Number(target.id.slice(1)) : -1;
  holder.addEventListener("mouseover", (event) => {
    if (!explorer.pinned) void explorer.choose(tokenAt(event.target));
  });
  holder.addEventListener("click", (event) => {
    const token = tokenAt(event.target);
    if (token < 0) return;
    pin(explorer, !explorer.pinned || token !== explorer.chosen);
    void explorer.choose(token);
  });
  holder.addEventListener("keydown", (event) => {
    const to = wantedToken(explorer, event.key);
    if (event.key === "Escape") pin(explorer, false);
    if (to === null || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pin(explorer, true);
    void explorer.choose(to, { scroll: true });
  });
  byId("all-candidates").addEventListener("click", () => {
    explorer.showsAll = !explorer.showsAll;
    void explorer.choose(explorer.chosen);
  });
}

/**
 * @param {Explorer} explorer
 * @param {boolean} pinned whether the pointer no longer chooses tokens
 */
function pin(explorer, pinned) {
  explorer.pinned = pinned;
  byId("pinned").hidden = !pinned;
}

/**
 * Return the token that a key chooses, or null for another key.
 * @param {Explorer} explorer
 * @param {string} key
 */
function wantedToken(explorer, key) {
  const last = explorer.numTokens - 1;
  const now = explorer.chosen;
  const within = (/** @type {number} */ token) => Math.min(last, Math.max(0, token));
  switch (key) {
    case "ArrowRight":
      return within(now + 1);
    case "ArrowLeft":
      return within(now - 1);
    case "ArrowDown":
      return nextDiffering(explorer, 1);
    case "ArrowUp":
      return nextDiffering(explorer, -1);
    case "PageDown":
      return within(now + PAGE_TOKENS);
    case "PageUp":
      return within(now - PAGE_TOKENS);
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

/**
 * Return the next token, in a direction, at which the target's first choice differs; the chosen one if there is none.
 * @param {Explorer} explorer
 * @param {number} direction
 */
function nextDiffering(explorer, direction) {
  for (let token = explorer.chosen + direction; token >= 0 && token < explorer.numTokens; token += direction) {
    if (explorer.differs[token]) return token;
  }
  return Math.max(0, explorer.chosen);
}

startPage(async () => {
  const [overview, texts] = await Promise.all([openBlock("overview"), openBlock("texts")]);
  const explorer = new Explorer(overview, texts);
  Object.assign(window, { explorer });
  showContext(overview);
  showLegend();
  showTokens(explorer);
  byId("explorer").classList.toggle("short", isShort(overview.tokens.text.join("")));
  showControls(explorer);
  foldSettings();
  listen(explorer);
  if (explorer.numTokens) await explorer.choose(explorer.hardest, { scroll: true });
  setTimeout(() => void explorer.recompute(), 0);
});

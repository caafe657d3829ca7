// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The target explorer: the tokens of a response, coloured by their loss, and the distributions at the chosen token.
"use strict";

const LEVELS = [0.003, 0.01, 0.03, 0.1, 0.3, 1];
const SHOWN_CANDIDATES = 12;
const SMALL_SHARE = 1e-4; // candidates below it are folded
const SLICE_MS = 12;
const COLOURS = /** @type {Record<string, string>} */ ({
  student: "--series-1",
  teacher: "--series-2",
  reference: "--series-4",
  "other hints": "--series-5",
  "t - c": "--series-6",
  target: "--series-3",
});
const CONTROL_ROWS = [
  ["general: KL(c ‖ anchor), what any hint does", "general_kl"],
  ["specific: KL(t ‖ c), what only this hint says", "specific_kl"],
];
const CONTRAST_TEXT =
  ". The other hints (c) are those of other problems. What any hint does is in the teacher (t) and in c, and cancels in " +
  "t - c, in nats: what only this hint says remains, and the target adds it to the anchor.";
const CONTRAST_RANGE = 8; // the |t - c| in nats of a full bar
const STATUS_TEXTS = /** @type {Record<string, string>} */ ({
  matched: "matched: the target has the wanted entropy",
  capped: "capped: k is at its bound, and the matching k is larger",
  out_of_range: "out of range: k is at the end of the range of the solver",
  undetermined: "undetermined: the entropy to match is almost 0",
  given: "given: the rule fixes k",
  unconverged: "unconverged: the solver has not reached the entropy to match",
});
const RULES = /** @type {Record<string, {text: string, values: Partial<Settings>}>} */ ({
  bounded: { text: "entropy matched, k ≤ 1 + w", values: { rule: "entropy_matched", k_max: "1 + w", k: null } },
  matched: { text: "entropy matched, no bound on k", values: { rule: "entropy_matched", k_max: null, k: null } },
  fixed: { text: "fixed k = 1 + w", values: { rule: "fixed", k_max: "1 + w", k: null } },
  teacher: { text: "teacher alone", values: { rule: "teacher_alone", k_max: "1 + w", k: null } },
});
const DIVERGENCES = /** @type {Record<string, {text: string, values: Partial<Settings>}>} */ ({
  reverse_kl: { text: "reverse KL(p ‖ q)", values: { divergence: "reverse_kl", order: 1, forward_above: null } },
  forward_kl: { text: "forward KL(q ‖ p)", values: { divergence: "forward_kl", order: 1, forward_above: null } },
  jsd: { text: "Jensen-Shannon", values: { divergence: "jsd", order: 1, forward_above: null } },
});

/** The whole page in one object: data, settings, and the choice of a token. */
class Explorer {
  /**
   * @param {any} overview the record of the response without blocks and texts
   * @param {Record<string, string>} texts the text of each candidate by its id
   */
  constructor(overview, texts) {
    this.overview = overview;
    this.texts = texts;
    this.tokens = overview.tokens;
    this.numTokens = overview.tokens.id.length;
    /** @type {Settings} */
    this.saved = overview.settings;
    this.settings = { ...this.saved };
    /** @type {Map<number, Promise<Summary[]>>} */
    this.blocks = new Map();
    /** @type {HTMLElement[]} */
    this.spans = [];
    this.values = Float64Array.from(this.tokens.loss, (value) => value ?? NaN);
    this.differs = new Uint8Array(this.numTokens);
    this.errors = new Float64Array(this.numTokens).fill(NaN);
    this.chosen = -1;
    this.pinned = false;
    this.generation = 0;
    this.showsAll = false;
    /** @type {string[]} */
    this.statuses = [...this.tokens.status];
  }

  /**
   * Return the summary of a token, decoded when its block is first needed.
   * @param {number} token
   */
  async summary(token) {
    const size = this.overview.block_tokens;
    const block = Math.floor(token / size);
    if (!this.blocks.has(block)) {
      const decoded = openBlock(`block-${block}`).then((value) => decodeBlock(value, this.overview.models.length));
      this.blocks.set(block, decoded);
    }
    return (await /** @type {Promise<Summary[]>} */ (this.blocks.get(block)))[token % size];
  }

  /**
   * Return the stored entropies that the target of a token needs.
   * @param {number} token
   */
  entropies(token) {
    return { student: this.tokens.student_entropy[token], reference: this.tokens.reference_entropy[token] };
  }

  /** The token with the largest loss of the run; the first one if no token has a loss. */
  get hardest() {
    return this.values.reduce((best, value, token) => (value > (this.values[best] || 0) ? token : best), 0);
  }

  get isAsSaved() {
    return Object.entries(this.saved).every(([name, value]) => Object(this.settings)[name] === value);
  }

  /** Compute the target of every token with the present settings, in slices that leave the page responsive. */
  async recompute() {
    const generation = ++this.generation;
    const asSaved = this.isAsSaved;
    byId("progress").textContent = "computing …";
    let until = performance.now() + SLICE_MS;
    for (const token of this.order()) {
      const summary = await this.summary(token);
      if (generation !== this.generation) return;
      this.take(token, targetOf(summary, this.settings, this.entropies(token)), asSaved);
      if (performance.now() > until) {
        await new Promise((resolve) => setTimeout(resolve, 0));
        if (generation !== this.generation) return;
        until = performance.now() + SLICE_MS;
      }
    }
    this.showTotals();
    document.documentElement.dataset.computed = String(generation);
  }

  /** Return the tokens in the order in which they are computed: those that can be seen come first. */
  order() {
    const middle = this.spans.findIndex((span) => span.getBoundingClientRect().bottom > 0);
    const first = Math.max(0, middle);
    return Array.from({ length: this.numTokens }, (_, i) => (i + first) % this.numTokens);
  }

  /**
   * Keep what is shown of a token's target.
   * @param {number} token
   * @param {TokenTarget} target
   * @param {boolean} asSaved
   */
  take(token, target, asSaved) {
    this.values[token] = target.loss;
    this.differs[token] = target.best === target.studentBest ? 0 : 1;
    this.statuses[token] = target.status;
    const stored = this.tokens.k[token];
    const isSolved = this.tokens.status[token] === "matched" || target.status === "matched";
    if (asSaved && stored !== null && isSolved) this.errors[token] = Math.abs(target.k / stored - 1);
    this.paint(token);
  }

  /** @param {number} token */
  paint(token) {
    const span = this.spans[token];
    const level = LEVELS.filter((limit) => this.values[token] >= limit).length;
    span.className = `t l${level}${this.differs[token] ? " differs" : ""}`;
  }

  showTotals() {
    const values = Array.from(this.values).filter(Number.isFinite);
    const mean = values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
    const unknown = this.values.filter(Number.isNaN).length;
    const differing = this.differs.reduce((sum, value) => sum + value, 0);
    const capped = this.statuses.filter((status) => status === "capped").length;
    const ofAll = (/** @type {number} */ count) => `at ${count} of ${this.numTokens} tokens`;
    byId("progress").textContent =
      `${settingsText(this.settings)}. Mean ${divergenceText(this.settings)}: ${numberText(mean)} nats per token; ` +
      `k is at its bound ${ofAll(capped)}; the target's first choice differs from the student's ${ofAll(differing)}.` +
      (unknown ? ` The stored logits do not determine the divergence ${ofAll(unknown)}, which the mean leaves out.` : "");
    const errors = Array.from(this.errors).filter(Number.isFinite).sort((a, b) => a - b);
    if (errors.length) {
      byId("accuracy").textContent =
        `At the ${errors.length} tokens whose k is solved for, the k of this page differs from the k of the run by ` +
        `${errorText(errors[errors.length >> 1])} (median) and at most ${errorText(errors[errors.length - 1])}, as a ` +
        "share of k and with the saved settings.";
    }
  }

  /**
   * Choose a token and show its distributions.
   * @param {number} token
   * @param {{scroll?: boolean}} [options]
   */
  async choose(token, options = {}) {
    if (token < 0 || token >= this.numTokens) return;
    this.spans[this.chosen]?.setAttribute("aria-selected", "false");
    this.spans[this.chosen]?.removeAttribute("data-chosen");
    this.chosen = token;
    const span = this.spans[token];
    span.setAttribute("aria-selected", "true");
    span.setAttribute("data-chosen", "");
    byId("tokens").setAttribute("aria-activedescendant", span.id);
    if (options.scroll) span.scrollIntoView({ block: "nearest" });
    const summary = await this.summary(token);
    if (token !== this.chosen) return;
    showToken(this, token, summary, targetOf(summary, this.settings, this.entropies(token)));
  }

  /**
   * Change the settings, and show everything with them.
   * @param {Partial<Settings>} changes
   */
  change(changes) {
    this.settings = { ...this.settings, ...changes };
    if (this.chosen >= 0) void this.choose(this.chosen);
    void this.recompute();
  }
}

/**
 * Return the target of the settings in words.
 * @param {Settings} settings
 */
function settingsText(settings) {
  const text = ruleText(settings);
  if (settings.rule === "teacher_alone") return `Target: ${text}`;
  const entropy = settings.match === settings.anchor ? "" : `, with the entropy of the ${settings.match}`;
  const contrast = settings.num_controls ? `the teacher less ${settings.num_controls} other hints, ` : "";
  return `Target: ${contrast}w = ${numberText(settings.teacher_weight)}, mixed with the ${settings.anchor}, ${text}${entropy}`;
}

/**
 * Return the name in RULES of the rule of these settings; "saved" for another one.
 * @param {Settings} settings
 */
function ruleName(settings) {
  if (settings.rule === "teacher_alone") return "teacher";
  if (settings.rule === "entropy_matched") {
    return settings.k_max === null ? "matched" : settings.k_max === "1 + w" ? "bounded" : "saved";
  }
  return settings.rule === "fixed" && settings.k === null ? "fixed" : "saved";
}

/**
 * Return the rule of these settings in words.
 * @param {Settings} settings
 */
function ruleText(settings) {
  const name = ruleName(settings);
  if (name !== "saved") return settings.num_controls ? RULES[name].text.replace("1 + w", "1") : RULES[name].text;
  if (settings.rule === "entropy_matched") return `entropy matched, k ≤ ${numberText(Number(settings.k_max))}`;
  const k = numberText(settings.k ?? geometricK(settings));
  return `${settings.rule === "batch" ? "one k per step" : "fixed k"} = ${k}`;
}

/**
 * Return the name in DIVERGENCES of the divergence of these settings; "saved" for another one.
 * @param {Settings} settings
 */
function divergenceName(settings) {
  return settings.order === 1 && settings.forward_above === null ? settings.divergence : "saved";
}

/**
 * Return the divergence of these settings in words.
 * @param {Settings} settings
 */
function divergenceText(settings) {
  const { forward_above: threshold, order } = settings;
  if (threshold !== null) {
    return `reverse KL(p ‖ q), and also forward KL(q ‖ p) if H(q) is above ${numberText(threshold)} nats`;
  }
  if (order === 1) return DIVERGENCES[settings.divergence].text;
  return `Renyi D(${settings.divergence === "reverse_kl" ? "p ‖ q" : "q ‖ p"}) of order ${numberText(order)}`;
}

/**
 * Return a divergence as text.
 * @param {number} value NaN if the summary does not determine it
 */
function lossText(value) {
  return Number.isNaN(value) ? "not determined by the stored logits" : `${numberText(value)} nats`;
}

/**
 * Return a relative error as text.
 * @param {number} error
 */
function errorText(error) {
  return error < 1e-12 ? "less than 1e-12" : error.toExponential(1);
}

/**
 * Return the text of a token in which white space can be seen.
 * @param {string} text
 */
function visibleText(text) {
  const shown = text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  // Marks of text direction and other control characters could rearrange the page.
  return shown === "" ? "∅" : shown.replace(/[\p{Cc}\p{Cf}]/gu, (c) => `\\u${(c.codePointAt(0) ?? 0).toString(16)}`);
}

/**
 * Show the numbers and the candidates of a token.
 * @param {Explorer} explorer
 * @param {number} token
 * @param {Summary} summary
 * @param {TokenTarget} target
 */
function showToken(explorer, token, summary, target) {
  const { tokens, settings } = explorer;
  const text = visibleText(tokens.text[token]);
  byId("chosen-title").textContent = `Token ${token + 1} of ${explorer.numTokens}: `;
  byId("chosen-text").textContent = text;
  byId("announcement").textContent =
    `Token ${token + 1}, ${text}: ${divergenceText(settings)}: ${lossText(target.loss)}, ` +
    `k ${numberText(target.k)}, ${target.status.replaceAll("_", " ")}` +
    (target.best === target.studentBest ? "" : ", the target's first choice differs from the student's");
  byId("numbers").replaceChildren(...numberRows(explorer, token, target));
  showCandidates(explorer, token, summary, target);
}

/**
 * Return the rows of the table of numbers of a token.
 * @param {Explorer} explorer
 * @param {number} token
 * @param {TokenTarget} target
 */
function numberRows(explorer, token, target) {
  const { tokens } = explorer;
  const stored = tokens.k[token];
  const error = explorer.isAsSaved && stored !== null ? ` (stored: ${numberText(stored)}, ` +
    `differs by ${errorText(Math.abs(target.k / stored - 1))})` : "";
  const loss = explorer.isAsSaved ? tokens.loss[token] : null;
  const storedLoss = loss === null ? "" : ` (stored: ${numberText(loss)})`;
  const storedMass = explorer.isAsSaved ? tokens.mass_on_rare_student?.[token] : null;
  /** @type {[string, string, string][]} */
  const rows = [
    [divergenceText(explorer.settings), `${lossText(target.loss)}${storedLoss}`, "loss"],
    ["k", `${numberText(target.k)}${error}`, "k"],
    ["status", STATUS_TEXTS[target.status], "status"],
    ["mass on tokens that the student did not consider (below 1e-3)", numberText(storedMass ?? target.rareMass), "rare"],
  ];
  for (const [name, key] of CONTROL_ROWS) {
    if (tokens[key]) rows.push([name, `${numberText(tokens[key][token])} nats`, key]);
  }
  const made = rows.map(([name, value, key]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", { "data-number": key }, value)),
  );
  /** @type {[string, number | null][]} */
  const entropies = explorer.overview.models
    .filter((/** @type {string} */ name) => tokens[`${name}_entropy`])
    .map((/** @type {string} */ name) => [name, tokens[`${name}_entropy`][token]]);
  const cell = element("td");
  for (const [name, value] of [...entropies, /** @type {[string, number]} */ (["target", target.entropy])]) {
    if (cell.childNodes.length) cell.append(", ");
    cell.append(`${name} `, element("span", { "data-number": `${name}-entropy` }, numberText(value)));
  }
  made.push(element("tr", {}, element("th", { scope: "row" }, "entropies in nats"), cell));
  return made;
}

/**
 * A column of the table of candidates: a probability, or a difference in nats.
 * @typedef {{name: string, of: (slot: number) => number, inNats?: boolean}} Column
 */

/**
 * Show a table of the likeliest candidates with a bar per distribution, and a button for the others.
 * @param {Explorer} explorer
 * @param {number} token
 * @param {Summary} summary
 * @param {TokenTarget} target
 */
function showCandidates(explorer, token, summary, target) {
  const models = /** @type {string[]} */ (explorer.overview.models);
  const columns = /** @type {Column[]} */ (
    models.map((name, model) => ({
      name,
      of: (/** @type {number} */ slot) => Math.exp(summary.logits[model][slot] - summary.logNormalisers[model]),
    }))
  );
  const control = models.indexOf("other hints");
  if (control > 0) {
    const logProb = (/** @type {number} */ model, /** @type {number} */ slot) =>
      summary.logits[model][slot] - summary.logNormalisers[model];
    columns.push({ name: "t - c", inNats: true, of: (slot) => logProb(1, slot) - logProb(control, slot) });
  }
  columns.push({ name: "target", of: (slot) => target.q[slot] });
  const sampled = explorer.tokens.id[token];
  /** @type {{slot: number, id: number, shares: number[], largest: number}[]} */
  const rows = [];
  for (let slot = 0; slot < summary.ids.length; slot++) {
    if (summary.ids[slot] < 0) continue;
    const shares = columns.map((column) => column.of(slot));
    rows.push({ slot, id: summary.ids[slot], shares, largest: Math.max(...shares.filter((_, i) => !columns[i].inNats)) });
  }
  rows.sort((a, b) => b.largest - a.largest);
  const likely = rows.filter((row, i) => (i < SHOWN_CANDIDATES && row.largest >= SMALL_SHARE) || row.id === sampled);
  const shown = explorer.showsAll ? rows : likely;
  const firsts = columns.map(({ inNats }, i) => Math.max(...(inNats ? likely : rows).map((row) => row.shares[i])));
  const folded = rows.length - likely.length;
  byId("all-candidates").hidden = folded === 0;
  byId("all-candidates").textContent = explorer.showsAll ? "Show the likeliest only" : `Show ${folded} less likely tokens`;
  const head = columns.map(({ name }) =>
    element("th", { scope: "col", class: "number" }, swatch(COLOURS[name]), name),
  );
  const table = element(
    "table",
    { class: "candidates" },
    element("caption", {}, "Probabilities of the likeliest tokens", control > 0 ? CONTRAST_TEXT : ""),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "token"), ...head)),
    element("tbody", {}, ...shown.map((row) => candidateRow(explorer, row, columns, row.id === sampled, firsts))),
  );
  byId("candidates").replaceChildren(table);
}

/**
 * Return the row of a candidate.
 * @param {Explorer} explorer
 * @param {{slot: number, id: number, shares: number[]}} row
 * @param {Column[]} columns
 * @param {boolean} isSampled whether the candidate is the token of the response
 * @param {number[]} firsts the largest probability of each column
 */
function candidateRow(explorer, row, columns, isSampled, firsts) {
  const text = visibleText(explorer.texts[row.id] ?? "");
  const name = element("th", { scope: "row", title: `id ${row.id}` }, element("code", {}, text));
  if (isSampled) name.append(" ", element("span", { class: "soft" }, "sampled"));
  const cells = columns.map((column, i) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    const value = row.shares[i];
    const length = column.inNats ? Math.min(1, Math.abs(value) / CONTRAST_RANGE) : value;
    bar.style.width = `${100 * length}%`;
    bar.style.background = `var(${column.inNats && value < 0 ? "--line" : COLOURS[column.name]})`;
    const isFirst = value === firsts[i];
    const number = isFirst ? element("strong", { title: `first choice of the ${column.name}` }) : element("span");
    number.textContent = column.inNats ? contrastText(value) : shareText(value);
    return element("td", { class: "number" }, number, element("span", { class: "rail" }, bar));
  });
  return element("tr", { "data-id": row.id }, name, ...cells);
}

/** @param {string} colour */
function swatch(colour) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  made.style.background = `var(${colour})`;
  return made;
}

/**
 * Return a probability as text.
 * @param {number} share
 */
function shareText(share) {
  if (share >= 0.0005) return share.toFixed(3);
  return share > 0 ? share.toExponential(0) : "0";
}

/**
 * Return a difference of log-probabilities as text, with its sign.
 * @param {number} nats
 */
function contrastText(nats) {
  return `${nats < 0 ? "" : "+"}${nats.toFixed(2)}`;
}

// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The page of a report: the main curve with an answer before and after, figures, differences between runs, and events.
"use strict";

startPage(async () => {
  const source = pageSource();
  const overview = await openBlock("overview");
  const curves = unpackAll(await openBlock("curves"));
  /** @type {Run[]} */
  const runs = overview.runs;
  const title = headline(runs);
  document.title = `${title} · report`;
  byId("title").textContent = title;
  byId("theme").append(shareControl(source), themeSwitch());
  showSummaries(runs);
  showFacts(runs);
  showTables(overview.differences);
  if (runs.length > 1) {
    byId("top").classList.add("several");
    byId("groups").classList.add("several");
    byId("main").prepend(byId("results")); // also the order for the keyboard and for screen readers
  }
  byId("results-title").textContent = runs.length > 1 ? "Differences between the runs" : "Results";
  showFigures(overview.groups, runs, curves);
  await showOpening(overview.groups, runs, curves);
  showShares(runs);
  showResponses(runs);
  showExplored(runs, overview.explored);
  showEvents(runs);
  showSections();
});

/**
 * Return every curve of the data block, unpacked, and remember the first and the last step.
 * @param {Record<string, any[]>} packed
 * @returns {Record<string, (Curve | null)[]>}
 */
function unpackAll(packed) {
  /** @type {Record<string, (Curve | null)[]>} */
  const curves = {};
  let first = Infinity;
  let last = -Infinity;
  for (const [key, ofRuns] of Object.entries(packed)) {
    curves[key] = ofRuns.map((curve) => (curve === null ? null : unpackCurve(curve)));
    for (const curve of curves[key]) {
      if (curve === null) continue;
      first = Math.min(first, curve.steps[0]);
      last = Math.max(last, curve.steps[curve.steps.length - 1]);
    }
  }
  if (first <= last) [view.first, view.last] = [first, Math.max(last, first + 1)];
  return curves;
}

/**
 * Return the title of the page: model, task and name of one run, or the names of several.
 * @param {Run[]} runs
 */
function headline(runs) {
  const labels = runs.map((run) => run.label).join(" · ");
  const { start, data } = Object.fromEntries(runs[0].facts);
  if (runs.length > 1 || !start || !data) return labels;
  /** @param {string} place */
  const name = (place) => place.split(/[/\\]/).filter((part) => !["", "checkpoints"].includes(part)).pop() || place;
  return `${name(start).replace(/-[0-9a-f]{8}-megatron$/, "")} on ${name(data.split(";")[0])}: ${labels}`;
}

/**
 * Show first of all whether each run learns, whether it is healthy, and what has changed.
 * @param {Run[]} runs
 */
function showSummaries(runs) {
  byId("summaries").append(
    ...runs.map((run, i) => {
      const list = element("dl", { class: "facts summary" });
      for (const [label, text, state] of run.summary) {
        list.append(element("dt", { class: state }, label), element("dd", {}, text));
      }
      const heading = runs.length > 1 ? [element("h3", {}, runSwatch(i), run.label)] : [];
      return element("div", { class: "panel" }, ...heading, list);
    }),
  );
}

/** @param {Run[]} runs */
function showFacts(runs) {
  byId("statuses").append(
    ...runs.map((run) => element("li", {}, runs.length > 1 ? `${run.label}: ${run.status}` : run.status)),
  );
  byId("facts").append(
    ...runs.map((run, i) => {
      const list = element("dl", { class: "facts" });
      for (const [name, text] of run.facts) {
        list.append(element("dt", {}, name), element("dd", { class: name === "command" ? "command" : "" }, text));
      }
      const heading = element("h3", {}, ...(runs.length > 1 ? [runSwatch(i)] : []), run.label);
      return element("div", { class: "panel" }, heading, list);
    }),
  );
}

/**
 * Return a short line in the colour of a run.
 * @param {number} run
 */
function runSwatch(run) {
  const swatch = element("span", { class: "swatch" });
  swatch.style.borderTopColor = `var(--series-${(run % NUM_COLOURS) + 1})`;
  return swatch;
}

/** @param {{title: string, columns: string[], rows: string[][]}[]} tables */
function showTables(tables) {
  const shown = tables.map(({ title, columns, rows }) => {
    if (rows.length === 0) return element("p", { class: "soft" }, `${title}: none.`);
    const numeric = title !== "Facts that differ" && title !== "Keys of the configuration that differ";
    const cell = numeric ? { class: "number" } : {};
    const head = ["", ...columns].map((name) => element("th", { scope: "col", ...(name ? cell : {}) }, name));
    const aligned = numeric ? columns.map((_, i) => atPoint(rows.map((row) => row[i + 1]))) : null;
    const body = rows.map(([name, ...given], row) => {
      const texts = aligned === null ? given : aligned.map((column) => column[row]);
      const cells = texts.map((text, i) => element("td", { ...cell, "data-column": columns[i] }, text));
      return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
    });
    return element(
      "table",
      { class: "compared" },
      element("caption", {}, title),
      element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...body),
    );
  });
  byId("differences").append(element("div", { class: "tables" }, ...shown));
}

/**
 * Return numbers with spaces behind them, so that the points of a right-aligned column are below each other.
 * @param {string[]} texts
 */
function atPoint(texts) {
  const behind = texts.map((text) => (/^-?\d*\.\d+$/.test(text) ? text.length - text.indexOf(".") : 0));
  const most = Math.max(...behind);
  return texts.map((text, i) => {
    if (!/^-?[\d.]+$/.test(text)) return text;
    const point = behind[i] === 0 && most > 0 ? "\u2008" : ""; // as wide as a point
    return text + point + "\u2007".repeat(most - behind[i] - point.length); // each as wide as a digit
  });
}

/**
 * @param {{title: string, figures: FigureData[]}[]} groups
 * @param {Run[]} runs
 * @param {Record<string, (Curve | null)[]>} curves
 */
function showFigures(groups, runs, curves) {
  const seen = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const figure = figures.find(({ holder }) => holder === entry.target);
        if (entry.isIntersecting && figure !== undefined && figure.plot === null) figure.draw();
      }
    },
    { rootMargin: "600px" },
  );
  for (const group of groups) {
    const made = group.figures.map((data) => new ReportFigure(data, runs, curves));
    figures.push(...made);
    const grid = element("div", { class: "figures" }, ...made.map((figure) => figure.element));
    byId("groups").append(element("section", { class: "group" }, element("h3", {}, group.title), grid));
  }
  for (const figure of figures) seen.observe(figure.holder);
  if (figures.length === 0) byId("groups").append(element("p", { class: "soft" }, "No step is logged yet."));
  onThemeChange(redrawFigures);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    redrawFigures();
  });
  addEventListener("beforeprint", drawForPaper);
  connectSmoothing();
  byId("all-steps").addEventListener("click", () => zoomTo(null));
}

/**
 * Show first of all the first figure, and what the run answered before and after: a problem that it has learnt, if any.
 * @param {{title: string, figures: FigureData[]}[]} groups
 * @param {Run[]} runs
 * @param {Record<string, (Curve | null)[]>} curves
 */
async function showOpening(groups, runs, curves) {
  const shown = groups.slice(0, 1).map(({ figures: [data] }) => new ReportFigure(data, runs, curves));
  figures.push(...shown);
  byId("opening").append(...shown.map((figure) => figure.element));
  if (runs.length === 1 && hasBlock("evaluations")) {
    /** @type {Answer[][]} */
    const [answers] = await openBlock("evaluations");
    const [first, last] = [answers[0].step, answers[answers.length - 1].step];
    const of = (/** @type {number} */ step) => answers.filter((answer) => answer.step === step && answer.sample === null);
    const pairs = of(first).map((before) => {
      const after = of(last).find(({ problem_id }) => problem_id === before.problem_id) || null;
      return { id: before.problem_id, before, after };
    });
    const pair = pairs.find(({ before, after }) => !before.correct && after?.correct) || pairs[0];
    if (first < last && pair !== undefined) byId("opening").append(pairElement(pair, [`step ${first}`, `step ${last}`]));
  }
  for (const figure of shown) figure.draw(); // in the width that the answers leave
}

/** Draw all figures in the light theme, until the page is printed. */
function drawForPaper() {
  const root = document.documentElement;
  const theme = root.dataset.theme;
  root.dataset.theme = "light";
  figures.forEach((figure) => figure.draw());
  const restore = () => {
    root.dataset.theme = theme;
    redrawFigures();
  };
  addEventListener("afterprint", restore, { once: true });
}

/** Draw those figures anew that have been drawn. */
function redrawFigures() {
  for (const figure of figures) if (figure.plot !== null) figure.draw();
}

function connectSmoothing() {
  const slider = /** @type {HTMLInputElement} */ (byId("smoothing"));
  const show = () => {
    const share = Number(slider.value) / 100;
    view.smoothing = Math.round(share * share * Math.max(20, (view.last - view.first) / 4) * 10) / 10;
    const text = view.smoothing === 0 ? "none" : `mean over about ${numberText(view.smoothing)} steps`;
    byId("smoothing-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    redrawFigures();
  };
  slider.addEventListener("input", show);
  show();
}

const PHASE_NAMES = {
  rollout: "sampling",
  sync: "sending weights",
  solutions: "own solutions",
  read: "reading turns",
  pack: "packing",
  train: "training",
  optimizer: "optimizer",
  evaluation: "evaluation",
  checkpoint: "saving",
  other: "the rest",
};

/** @param {Run[]} runs */
function showShares(runs) {
  const cards = runs.flatMap((run) => {
    const total = Object.values(run.shares).reduce((sum, seconds) => sum + seconds, 0);
    if (total === 0) return [];
    const bar = element("div", { class: "share-bar", "aria-hidden": "true" });
    const list = element("div", { class: "share-list", role: "list" });
    Object.entries(PHASE_NAMES).forEach(([phase, name], i) => {
      const seconds = run.shares[phase];
      if (seconds === undefined) return;
      const colour = phase === "other" ? "var(--line)" : `var(--series-${(i % NUM_COLOURS) + 1})`;
      const opacity = i < NUM_COLOURS ? "1" : "0.55";
      const part = element("span", { title: name });
      Object.assign(part.style, { flexGrow: String(seconds / total), background: colour, opacity });
      bar.append(part);
      const box = element("span", { class: "box" });
      Object.assign(box.style, { background: colour, opacity });
      const text = `${name}: ${numberText(seconds)} s, ${((100 * seconds) / total).toFixed(1)} %`;
      list.append(element("div", { role: "listitem" }, box, text));
    });
    const heading = element("h3", {}, `${run.label}: ${numberText(total)} s per step`);
    return [element("div", { class: "panel" }, heading, bar, list)];
  });
  byId("shares").append(...cards);
  byId("time-of-a-step").hidden = cards.length === 0;
}

/** @param {Run[]} runs */
function showEvents(runs) {
  for (const run of runs) {
    if (runs.length > 1) byId("event-tables").append(element("h3", {}, run.label));
    if (run.events.length === 0) {
      byId("event-tables").append(element("p", { class: "soft" }, "The run directory has no events.jsonl."));
      continue;
    }
    const head = ["time (UTC)", "step", "event", ""].map((name) => element("th", { scope: "col" }, name));
    const rows = run.events.map(([time, step, event, details]) =>
      element(
        "tr",
        {},
        element("td", {}, time.replace("T", " ").replace("+00:00", "")),
        element("td", { class: "number" }, step),
        element("td", {}, event),
        element("td", { class: "long" }, details),
      ),
    );
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)));
    table.append(element("tbody", {}, ...rows));
    byId("event-tables").append(element("div", { class: "scroll" }, table));
  }
}

/**
 * Link the pages of the target explorer.
 * @param {Run[]} runs
 * @param {{href: string, step: number, sample: number, turn?: number}[][] | null} explored the pages of each run
 */
function showExplored(runs, explored) {
  if (explored === null) return;
  byId("explored").hidden = false;
  explored.forEach((pages, run) => {
    if (pages.length === 0) return;
    if (runs.length > 1) byId("explored-links").append(element("h3", {}, runs[run].label));
    const links = pages.map(({ href, step, sample, turn }) =>
      element("li", {}, element("a", { href }, `step ${step}, sample ${sample}`, turn === undefined ? "" : `, turn ${turn}`)),
    );
    byId("explored-links").append(element("ul", { class: "plain toolbar" }, ...links));
    const first = element("a", { href: pages[0].href }, `What the target wants of a response, token by token: step ${pages[0].step}`);
    byId("summaries").children[run].append(element("p", { class: "small" }, first)); // the first pages are the story
  });
}

/** List the visible sections above the page. */
function showSections() {
  for (const section of document.querySelectorAll("main section[id]")) {
    const heading = section.querySelector("h2");
    if (heading === null || /** @type {HTMLElement} */ (section).hidden) continue;
    byId("sections").append(element("li", {}, element("a", { href: `#${section.id}` }, heading.textContent || "")));
  }
}

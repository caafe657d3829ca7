// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// One figure of a report: some metrics of some runs over the steps, with its legend.
"use strict";

/**
 * @typedef {{steps: number[], values: (number | null)[], meanSteps: number[], means: (number | null)[]}} Curve
 * @typedef {{name: string, colour: string, dash: number[], curve: Curve, shown: boolean}} Line
 * @typedef {{title: string, unit: string, healthy: string, sick: string, judged: boolean, guarded: string | null,
 *            lines: [string, string][]}} FigureData
 * @typedef {{label: string, status: string, summary: [string, string, string][],
 *            facts: [string, string][], events: string[][], resumed: number[],
 *            shares: Record<string, number>, sick: string[], limits: Record<string, Record<string, number>>}} Run
 */

const NUM_COLOURS = 6;
const DIGITS = 3; // of the numbers in a legend
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [4, 2], [1, 5]];

/** The steps that all figures show, null for all steps; and the time constant of smoothing, in steps, 0 for none. */
const view = { zoom: /** @type {[number, number] | null} */ (null), smoothing: 0, first: 0, last: 1 };

/** @type {ReportFigure[]} */
const figures = [];

/**
 * Return a curve from its form in the data block, where steps are differences from the last step.
 * @param {[number[], (number | null)[], number[], (number | null)[]]} packed
 * @returns {Curve}
 */
function unpackCurve([steps, values, meanSteps, means]) {
  /** @param {number[]} differences */
  const sums = (differences) => {
    let sum = 0;
    return differences.map((difference) => (sum += difference));
  };
  return { steps: sums(steps), values, meanSteps: sums(meanSteps), means };
}

/**
 * Return exponential means: each weighs an earlier value by exp(-distance / scale), and the weights sum to 1.
 * @param {number[]} steps
 * @param {(number | null)[]} values
 * @param {number} scale in steps
 * @returns {(number | null)[]}
 */
function smoothed(steps, values, scale) {
  let sum = 0;
  let weight = 0;
  let before = steps[0];
  return steps.map((step, i) => {
    const value = values[i];
    const decay = Math.exp((before - step) / scale);
    before = step;
    sum *= decay;
    weight *= decay;
    if (value === null) return weight > 0 ? sum / weight : null;
    sum += value;
    weight += 1;
    return sum / weight;
  });
}

/**
 * Return the index of the step nearest to ``wanted``; steps ascend.
 * @param {number[]} steps
 * @param {number} wanted
 */
function nearest(steps, wanted) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle;
    else high = middle;
  }
  return Math.abs(steps[high] - wanted) < Math.abs(steps[low] - wanted) ? high : low;
}

/**
 * Let all figures show these steps; null for all steps.
 * @param {[number, number] | null} zoom
 */
function zoomTo(zoom) {
  view.zoom = zoom;
  for (const figure of figures) figure.zoom();
  /** @type {HTMLButtonElement} */ (byId("all-steps")).disabled = zoom === null;
}

class ReportFigure {
  /**
   * @param {FigureData} data
   * @param {Run[]} runs
   * @param {Record<string, (Curve | null)[]>} curves
   */
  constructor(data, runs, curves) {
    this.data = data;
    this.runs = runs;
    /** @type {Line[]} */
    this.lines = [];
    data.lines.forEach(([key, label], i) => {
      runs.forEach((run, r) => {
        const curve = curves[key][r];
        if (curve === null) return;
        const colour = `--series-${((runs.length > 1 ? r : i) % NUM_COLOURS) + 1}`;
        const name = runs.length === 1 ? label : data.lines.length === 1 ? run.label : `${label}, ${run.label}`;
        const dash = DASHES[(runs.length > 1 ? i : Math.floor(i / NUM_COLOURS)) % DASHES.length];
        this.lines.push({ name, colour, dash, curve, shown: true });
      });
    });
    /** @type {[string, number][]} */
    this.limits = [];
    const guarded = data.guarded;
    if (guarded !== null) {
      for (const run of runs) {
        for (const [name, value] of Object.entries(run.limits[guarded] || {})) {
          this.limits.push([runs.length === 1 ? name : `${run.label}: ${name}`, value]);
        }
      }
    }
    /** @type {any} */
    this.plot = null;
    this.holder = element("div", {
      class: "plot",
      role: "slider",
      tabindex: 0,
      "aria-label": `${data.title}: step`,
      onkeydown: (/** @type {KeyboardEvent} */ event) => this.key(event),
      onblur: () => this.leave(),
    });
    const isSick = runs.some((run) => run.sick.includes(data.title));
    const canTell = runs.every((run) => run.summary[1][2] !== "open"); // enough steps
    const holds = isSick ? "sick" : canTell && data.judged ? "healthy" : "";
    this.at = element("li", { class: "soft" });
    /** @type {HTMLElement[]} */
    this.cells = this.lines.map(() => element("span", { class: "value" }));
    const limits = this.limits.map(([name, value]) =>
      element("li", { class: "soft" }, name, element("span", { class: "value" }, numberText(value, DIGITS))),
    );
    const rows = this.lines.map((line, i) => element("li", {}, this.button(line), this.cells[i]));
    this.element = element(
      "figure",
      { class: "panel" },
      element("h4", {}, data.title, " ", element("span", { class: "soft small" }, `(${data.unit})`)),
      this.holder,
      element("ul", { class: "legend plain", "aria-label": `Values of ${data.title}` }, this.at, ...rows, ...limits),
      element(
        "figcaption",
        {},
        element("p", { class: holds === "healthy" ? "healthy holds" : "healthy" }, element("b", {}, "Healthy: "), data.healthy),
        element("p", { class: holds === "sick" ? "sick holds" : "sick" }, element("b", {}, "Sick: "), data.sick),
      ),
    );
    this.moveTo(null);
  }

  /**
   * Return the button that hides a line and shows it again.
   * @param {Line} line
   */
  button(line) {
    const swatch = element("span", { class: "swatch" });
    swatch.style.borderTopColor = `var(${line.colour})`;
    swatch.style.borderTopStyle = line.dash.length === 0 ? "solid" : line.dash[0] > 3 ? "dashed" : "dotted";
    const made = element("button", { type: "button", "aria-pressed": "true" }, swatch, line.name);
    made.addEventListener("click", () => {
      line.shown = !line.shown;
      made.setAttribute("aria-pressed", String(line.shown));
      this.draw();
    });
    return made;
  }

  lastStep() {
    return Math.max(...this.lines.map(({ curve }) => curve.steps[curve.steps.length - 1]));
  }

  /**
   * Show the values at the step in the legend; for a screen reader, as the value of the slider.
   * @param {number | null} step null while no step is pointed at: the last one
   */
  moveTo(step) {
    this.step = step;
    const at = step ?? this.lastStep();
    const found = this.lines.map(({ curve: { steps, values } }) => {
      const place = nearest(steps, at);
      const far = Math.abs(steps[place] - at) > Math.max(1, (view.last - view.first) / 20);
      return far ? undefined : values[place];
    });
    this.at.textContent = step === null ? "last values" : `step ${step}`;
    this.at.classList.toggle("pointed", step !== null);
    const texts = this.lines.map(({ curve: { values } }, i) => {
      const value = step === null ? values[values.length - 1] : found[i];
      return value === null ? "not finite" : value === undefined ? "" : numberText(value, DIGITS);
    });
    alike(texts).forEach((text, i) => {
      this.cells[i].textContent = text;
    });
    const known = this.lines.flatMap(({ name }, i) =>
      found[i] === undefined ? [] : [`${name} ${numberText(found[i], DIGITS)}`],
    );
    this.holder.setAttribute("aria-valuenow", String(at));
    this.holder.setAttribute("aria-valuemin", String(view.first));
    this.holder.setAttribute("aria-valuemax", String(view.last));
    this.holder.setAttribute("aria-valuetext", `step ${at}: ${known.join(", ")}`);
  }

  /** Point at no step any more. */
  leave() {
    this.moveTo(null);
    if (this.plot !== null) this.plot.setCursor({ left: -10, top: -10 }, false);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const [low, high] = view.zoom || [view.first, view.last];
    const step = this.step ?? high;
    const stride = Math.max(1, Math.round((high - low) / (event.shiftKey ? 10 : 100)));
    const quarter = (high - low) / 4;
    const centre = Math.min(Math.max(step, low + quarter), high - quarter);
    /** @type {Record<string, () => void>} */
    const actions = {
      ArrowLeft: () => this.point(Math.max(low, step - stride)),
      ArrowRight: () => this.point(Math.min(high, step + stride)),
      Home: () => this.point(low),
      End: () => this.point(high),
      "+": () => high - low > 4 && zoomTo([Math.round(centre - quarter), Math.round(centre + quarter)]),
      "-": () => zoomTo(widened(low, high)),
      0: () => zoomTo(null),
      Escape: () => zoomTo(null),
    };
    const action = actions[event.key];
    if (action === undefined) return;
    event.preventDefault();
    action();
  }

  /**
   * Move the cursor of the plot, and the legend, to a step.
   * @param {number} step
   */
  point(step) {
    this.moveTo(Math.round(step));
    if (this.plot !== null) this.plot.setCursor({ left: this.plot.valToPos(step, "x"), top: 20 }, false);
  }

  zoom() {
    if (this.plot === null) return;
    const [min, max] = view.zoom || [view.first, view.last];
    this.plot.setScale("x", { min, max });
  }

  /** Draw the plot anew, with the present theme, smoothing, size and zoom. */
  draw() {
    if (this.plot !== null) this.plot.destroy();
    this.plot = new uPlot(this.options(), this.columns(), this.holder);
    this.zoom();
  }

  /** Return the columns for uPlot: one column of steps, then the values of each drawn line, with gaps of undefined. */
  columns() {
    const tables = this.drawn().map(({ steps, values }) => [steps, values]);
    return tables.length > 0 ? uPlot.join(tables) : [[view.first, view.last]];
  }

  /** Return what is drawn: a line each, or with smoothing a faint line and its smoothed line each. */
  drawn() {
    return this.lines
      .filter((line) => line.shown)
      .flatMap((line) => {
        const { steps, values, meanSteps, means } = line.curve;
        const raw = { line, steps, values, faint: view.smoothing > 0 };
        if (view.smoothing === 0) return [raw];
        const [at, of] = meanSteps.length > 0 ? [meanSteps, means] : [steps, values];
        return [raw, { line, steps: at, values: smoothed(at, of, view.smoothing), faint: false }];
      });
  }

  options() {
    const soft = themeColour("--soft");
    const grid = { stroke: themeColour("--line"), width: 1 };
    const axis = { stroke: soft, grid, ticks: grid, font: "11px system-ui, sans-serif" };
    const width = Math.max(200, this.holder.clientWidth);
    return {
      width,
      height: this.holder.clientHeight,
      legend: { show: false },
      padding: [8, 18, 0, 0],
      scales: { x: { time: false }, y: { range: (/** @type {any} */ _, /** @type {any} */ low, /** @type {any} */ high) => this.range(low, high) } },
      axes: [
        {
          ...axis,
          size: 24,
          label: "step",
          labelSize: 16,
          labelGap: 2,
          labelFont: axis.font,
          values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map(stepText),
        },
        { ...axis, size: 56, values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map((value) => numberText(value)) },
      ],
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => (zoomTo(null), null) },
      },
      series: [{}, ...this.drawn().map((drawn) => this.series(drawn))],
      hooks: {
        setCursor: [
          (/** @type {any} */ plot) => {
            const { left, event } = plot.cursor;
            if (event) this.moveTo(left < 0 ? null : Math.round(plot.posToVal(left, "x")));
          },
        ],
        setSelect: [
          (/** @type {any} */ plot) => {
            const { left, width: wide } = plot.select;
            if (wide < 4) return;
            const zoom = [left, left + wide].map((x) => Math.round(plot.posToVal(x, "x")));
            plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
            if (zoom[1] > zoom[0]) zoomTo([zoom[0], zoom[1]]);
          },
        ],
        draw: [(/** @type {any} */ plot) => this.marks(plot)],
      },
    };
  }

  /** @param {{line: Line, steps: number[], faint: boolean}} drawn */
  series({ line, steps, faint }) {
    return {
      stroke: themeColour(line.colour),
      alpha: faint ? 0.28 : 1,
      width: faint ? 1 : 1.7,
      dash: line.dash,
      spanGaps: true,
      points: { show: isSparse(steps) && !faint, size: 5, fill: themeColour(line.colour) },
    };
  }

  /**
   * Return the range of the vertical axis: the values and the limits, and 0 where the values come near to it.
   * @param {number | null} low
   * @param {number | null} high
   * @returns {[number, number]}
   */
  range(low, high) {
    const limits = this.limits.map(([, value]) => value);
    const ends = [low, high].filter((value) => value !== null && value !== undefined);
    let least = Math.min(...ends, ...limits);
    let most = Math.max(...ends, ...limits);
    if (!Number.isFinite(least)) return [0, 1];
    if (least > 0 && least < most / 2) least = 0;
    const isFlat = most - least <= 1e-9 * Math.max(Math.abs(least), Math.abs(most)); // up to the rounding of means
    const margin = isFlat ? Math.abs(most) * 0.1 || 0.1 : (most - least) * 0.06;
    return [least === 0 ? 0 : least - margin, most + margin];
  }

  /**
   * Draw the limits of guards, dotted, and a thin line at each step at which a run was resumed.
   * @param {any} plot
   */
  marks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.strokeStyle = themeColour("--bad");
    for (const [, value] of this.limits) {
      const y = plot.valToPos(value, "y", true);
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
    }
    ctx.strokeStyle = themeColour("--soft");
    for (const step of this.runs.flatMap((run) => run.resumed)) {
      const x = plot.valToPos(step, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }
}

/**
 * Return a range of steps twice as wide, or null where all steps fit.
 * @param {number} low
 * @param {number} high
 * @returns {[number, number] | null}
 */
function widened(low, high) {
  const half = (high - low) / 2;
  const wider = [Math.max(view.first, Math.round(low - half)), Math.min(view.last, Math.round(high + half))];
  return wider[0] === view.first && wider[1] === view.last ? null : [wider[0], wider[1]];
}

/**
 * Return whether a line has so few points that each one is worth a mark.
 * @param {number[]} steps
 */
function isSparse(steps) {
  return steps.length * (view.last - view.first) <= 40 * Math.max(1, steps[steps.length - 1] - steps[0]);
}

/** @param {number} step */
function stepText(step) {
  return Number.isInteger(step) ? String(step) : "";
}

/**
 * Return numbers with equally many digits after the point, if one of them has a point and none an exponent.
 * @param {string[]} texts
 */
function alike(texts) {
  const numbers = texts.filter((text) => /^-?\d+(\.\d+)?$/.test(text));
  const digits = Math.max(0, ...numbers.map((text) => (text.split(".")[1] || "").length));
  if (texts.some((text) => text.includes("e-"))) return texts;
  return texts.map((text) => (numbers.includes(text) ? Number(text).toFixed(digits) : text));
}

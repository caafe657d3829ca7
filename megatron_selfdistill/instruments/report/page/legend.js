// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// The legend of a figure, which is also its table of values.
"use strict";

const DIGITS = 3; // of the numbers in a legend

/**
 * The names of a figure's lines with their last, smallest and largest values.  While a step is pointed at, its values
 * stand in place of the last ones.
 *
 * Rows are flexible boxes with the roles of a table: a name that leaves no room for its numbers gets a line of its own,
 * which a cell of a table cannot.
 */
class FigureLegend {
  /**
   * @param {string} title
   * @param {string} named what the lines are: "run" or "curve"
   * @param {Line[]} lines
   * @param {[string, number][]} limits
   * @param {() => void} redraw called when a line is hidden or shown
   */
  constructor(title, named, lines, limits, redraw) {
    this.at = element("span", { role: "columnheader" });
    /** @type {HTMLElement[]} */
    this.cells = lines.map(() => element("span", { role: "cell" }));
    this.lasts = lines.map(({ curve }) => valueText(curve.values[curve.values.length - 1]));
    this.redraw = redraw;
    /** @type {Map<Line, HTMLElement>} */
    this.buttons = new Map(lines.map((line) => [line, this.button(line)]));
    const heads = ["smallest", "largest"].map((name) => element("span", { role: "columnheader" }, name));
    const rows = lines.map((line, i) => {
      const finite = /** @type {number[]} */ (line.curve.values.filter((value) => value !== null));
      const ends = finite.length > 0 ? [Math.min(...finite), Math.max(...finite)] : [null, null];
      const cells = ends.map((value) => element("span", { role: "cell" }, valueText(value)));
      return legendRow("rowheader", this.buttons.get(line) ?? "", [this.cells[i], ...cells]);
    });
    this.element = element(
      "div",
      { class: "legend", role: "table", "aria-label": `Values of ${title}` },
      legendRow("columnheader", named, [this.at, ...heads], "head"),
      ...rows,
      ...limits.map(([name, value]) =>
        legendRow("rowheader", name, [element("span", { role: "cell" }, valueText(value))], "limit"),
      ),
    );
  }

  /**
   * Return the button that hides a line and shows it again.
   * @param {Line} line
   */
  button(line) {
    const swatch = element("span", { class: "swatch" });
    swatch.style.borderTopColor = `var(${line.colour})`;
    swatch.style.borderTopStyle = line.dash.length === 0 ? "solid" : line.dash[0] > 3 ? "dashed" : "dotted";
    const press = () => {
      this.toggle(line);
      this.redraw();
    };
    return element("button", { type: "button", "aria-pressed": "true", onclick: press }, swatch, line.name);
  }

  /**
   * Hide a line that is shown, or show it again, when the figure is next drawn.
   * @param {Line} line
   */
  toggle(line) {
    line.shown = !line.shown;
    this.buttons.get(line)?.setAttribute("aria-pressed", String(line.shown));
  }

  /**
   * Show the values at a step, or the last values.
   * @param {number | null} step
   * @param {(number | null | undefined)[]} values of each line; undefined for a line without a value near the step
   */
  show(step, values) {
    this.at.textContent = step === null ? "last" : `step ${step}`;
    this.at.classList.toggle("pointed", step !== null);
    this.cells.forEach((cell, i) => {
      const value = values[i];
      cell.textContent = step === null ? this.lasts[i] : value === undefined ? "" : numberText(value, DIGITS);
    });
  }
}

/**
 * Return a row: a name, and its numbers side by side.
 * @param {string} role of the name
 * @param {Node | string} name
 * @param {HTMLElement[]} numbers
 * @param {string} [kind]
 */
function legendRow(role, name, numbers, kind = "") {
  const values = element("span", { class: "numbers" }, ...numbers);
  return element("div", { class: `row ${kind}`, role: "row" }, element("span", { class: "name", role }, name), values);
}

/** @param {number | null} value */
function valueText(value) {
  return value === null ? "not finite" : numberText(value, DIGITS);
}

// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// A report that its run writes again is loaded again while it is open, and stays as the reader has left it.
"use strict";

const SHORTEST_WAIT_MS = 15_000;
const LONGEST_WAIT_MS = 600_000;
const LONGEST_AGE_MS = 86_400_000;
const QUIET_MS = 5_000;

/**
 * @typedef {{scroll: number, zoom: [number, number] | null, smoothing: string, theme: string | undefined,
 *            hidden: string[], open: string[], choices: [string, string][]}} ReaderState
 */

/**
 * Return the milliseconds until a report is loaded again, a tenth of its age; null for one whose run has died.
 * @param {number} age in milliseconds
 */
function waitOfAge(age) {
  if (age > LONGEST_AGE_MS) return null;
  return Math.min(LONGEST_WAIT_MS, Math.max(SHORTEST_WAIT_MS, age / 10));
}

/**
 * Load the page again from time to time, while it can be seen and its reader does nothing with it.
 * @param {number | null} written when the run wrote this report, in seconds since 1970; null if no run writes it again
 */
function stayLive(written) {
  const wait = written === null ? null : waitOfAge(Date.now() - 1000 * written);
  if (wait === null) return;
  const button = byId("live");
  let isOn = true;
  let due = Date.now() + wait;
  let timer = 0;
  const show = () => {
    button.textContent = `Live: ${isOn ? "on" : "off"}`;
    button.setAttribute("aria-pressed", String(isOn));
  };
  const postpone = () => {
    due = Math.max(due, Date.now() + QUIET_MS);
  };
  const look = () => {
    clearTimeout(timer);
    if (!isOn || document.hidden) return;
    if (Date.now() < due || isInUse()) timer = setTimeout(look, Math.max(1000, due - Date.now()));
    else reload();
  };
  for (const name of ["pointermove", "pointerdown", "keydown", "wheel", "scroll"]) {
    addEventListener(name, postpone, { passive: true, capture: true });
  }
  document.addEventListener("visibilitychange", look);
  button.addEventListener("click", () => {
    isOn = !isOn;
    show();
    look();
  });
  button.hidden = false;
  show();
  look();
}

/** Return whether the reader has marked text or writes into a field, which a reload would end. */
function isInUse() {
  return getSelection()?.isCollapsed === false || document.activeElement?.matches("input[type=search]") === true;
}

function reload() {
  history.scrollRestoration = "manual";
  history.replaceState({ reader: readerState() }, "");
  location.reload();
}

/** Return the state that `reload` has kept, once. */
function takeReaderState() {
  /** @type {ReaderState | null} */
  const kept = history.state?.reader ?? null;
  if (kept !== null) {
    history.replaceState(null, "");
    history.scrollRestoration = "auto";
  }
  return kept;
}

/**
 * Return what the reader has done to the page.
 * @returns {ReaderState}
 */
function readerState() {
  const open = document.querySelectorAll("details[open][id]");
  return {
    scroll: scrollY,
    zoom: view.zoom,
    smoothing: smoothingSlider().value,
    theme: document.documentElement.dataset.theme,
    hidden: figures.flatMap((figure) => figure.lines.filter((line) => !line.shown).map((line) => lineKey(figure, line))),
    open: [...open].map((part) => part.id),
    choices: [...fields()].filter(([, field]) => !isDefault(field)).map(([key, field]) => [key, shownValue(field)]),
  };
}

/**
 * Bring the page into the state that its reader has left.
 * @param {ReaderState} state
 */
async function restoreReaderState(state) {
  smoothingSlider().value = state.smoothing;
  smoothingSlider().dispatchEvent(new Event("input"));
  if (state.zoom !== null) zoomTo(state.zoom);
  for (const figure of figures) {
    for (const line of figure.lines) {
      if (state.hidden.includes(lineKey(figure, line))) figure.legend.toggle(line);
    }
  }
  for (const id of state.open) {
    const part = /** @type {HTMLDetailsElement | null} */ (document.getElementById(id));
    if (part !== null) await opened(part);
  }
  const found = fields();
  for (const [key, text] of state.choices) {
    const field = found.get(key);
    if (field === undefined) continue;
    if (field instanceof HTMLInputElement) field.value = text;
    else field.selectedIndex = Math.max(0, [...field.options].findIndex((option) => option.text === text));
    field.dispatchEvent(new Event(field instanceof HTMLInputElement ? "input" : "change"));
  }
  scrollTo(0, state.scroll);
}

/**
 * Return the fields of the open parts by the names of part and field.
 * @returns {Map<string, HTMLInputElement | HTMLSelectElement>}
 */
function fields() {
  const found = new Map();
  for (const label of document.querySelectorAll("details[open][id] label")) {
    const key = `${label.closest("details")?.id}: ${label.firstChild?.textContent}`;
    found.set(key, label.querySelector("input, select"));
  }
  return found;
}

/** @param {HTMLInputElement | HTMLSelectElement} field */
function isDefault(field) {
  return field instanceof HTMLInputElement ? field.value === "" : field.selectedOptions[0]?.defaultSelected === true;
}

/** @param {HTMLInputElement | HTMLSelectElement} field */
function shownValue(field) {
  return field instanceof HTMLInputElement ? field.value : field.selectedOptions[0]?.text ?? "";
}

/**
 * Return what names a line of a figure in every version of the report.
 * @param {ReportFigure} figure
 * @param {Line} line
 */
function lineKey(figure, line) {
  return `${figure.data.title}: ${line.name}`;
}

function smoothingSlider() {
  return /** @type {HTMLInputElement} */ (byId("smoothing"));
}

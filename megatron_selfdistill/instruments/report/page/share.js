// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// A copy of a report for others: one file without what the reader marks as private.
"use strict";

const TEXT_BLOCKS = ["samples", "evaluations"];
const FACTS_WITH_PLACES = ["start", "data", "command", "hardware"];

/** Return this page as it was written.  A script calls this before it changes the page. */
function pageSource() {
  return `<!doctype html>\n${document.documentElement.outerHTML}\n`;
}

/**
 * Return a control that saves a copy of the page; its reader chooses what the copy leaves out.
 * @param {string} source the page as it was written
 */
function shareControl(source) {
  /** @param {string} id @param {string} text */
  const choice = (id, text) => element("label", {}, element("input", { type: "checkbox", id, checked: true }), ` ${text}`);
  const save = async () => {
    const chosen = ["private-texts", "private-places"].map((id) => /** @type {HTMLInputElement} */ (byId(id)).checked);
    const address = URL.createObjectURL(new Blob([await sharedCopy(source, chosen[0], chosen[1])], { type: "text/html" }));
    element("a", { href: address, download: "report_to_share.html" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
  };
  const panel = element(
    "div",
    { class: "panel share-choices" },
    element("p", {}, "Save one file without"),
    choice("private-texts", "prompts and responses"),
    choice("private-places", "paths, names of runs and machines, commands, and keys whose values differ"),
    element("button", { type: "button", id: "save-copy", onclick: save }, "Save a copy"),
  );
  return element("details", { class: "share" }, element("summary", {}, "Share"), panel);
}

/**
 * Return the markup of a copy, which has no links to other pages.
 * @param {string} source the page as it was written
 * @param {boolean} withoutTexts whether the copy leaves out prompts and responses
 * @param {boolean} withoutPlaces whether the copy leaves out what `hidePlaces` hides
 */
async function sharedCopy(source, withoutTexts, withoutPlaces) {
  const copy = new DOMParser().parseFromString(source, "text/html");
  const overview = await openBlock("overview");
  overview.explored = null;
  if (withoutTexts) for (const name of TEXT_BLOCKS) copy.getElementById(`data-${name}`)?.remove();
  if (withoutPlaces) {
    hidePlaces(overview);
    copy.title = "Report";
  }
  const holder = copy.getElementById("data-overview");
  if (holder !== null) holder.textContent = await packed(overview);
  return `<!doctype html>\n${copy.documentElement.outerHTML}\n`;
}

/**
 * Take out of the data of a report what says where runs have run, and under which names.
 * @param {{runs: Run[], differences: {title: string, columns: string[], rows: string[][]}[]}} overview
 */
function hidePlaces(overview) {
  overview.runs.forEach((run, i) => {
    run.label = `run ${i + 1}`;
    run.facts = run.facts.filter(([name]) => !FACTS_WITH_PLACES.includes(name));
    run.events = run.events.map(([time, step, event]) => [time, step, event, ""]);
  });
  if (overview.runs.length === 1) return;
  overview.differences = overview.differences.filter(({ title }) => title === "Last values");
  for (const table of overview.differences) table.columns = overview.runs.map(({ label }) => label);
}

/**
 * Return a JSON value as a data block holds it (html_page.py).
 * @param {any} value
 */
async function packed(value) {
  const stream = new Blob([JSON.stringify(value)]).stream().pipeThrough(new CompressionStream("deflate"));
  let text = "";
  for (const byte of new Uint8Array(await new Response(stream).arrayBuffer())) text += String.fromCharCode(byte);
  return btoa(text);
}

// Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
// What every page has: data blocks, elements from plain text, the switch between dark and light, numbers as text.
"use strict";

/**
 * Return the value of a data block of the page.
 * @param {string} name the name that html_page was given
 * @returns {Promise<any>} the value; the promise fails if the page has no such block
 */
async function openBlock(name) {
  const holder = document.getElementById(`data-${name}`);
  if (holder === null) throw new Error(`expected a data block "${name}" in this page, found none`);
  const packed = Uint8Array.from(atob(holder.textContent || ""), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/**
 * Return whether the page has a data block of this name.
 * @param {string} name
 */
function hasBlock(name) {
  return document.getElementById(`data-${name}`) !== null;
}

/**
 * Return a new element.  Strings among the children become text, never markup.
 * @param {string} tag
 * @param {Record<string, string | number | boolean | undefined | ((event: any) => void)>} [attributes] true stands for an
 *   attribute without a value, false and undefined leave the attribute out; a function under "onclick" listens to "click"
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children);
  return made;
}

/**
 * Return the element of the page with this id.
 * @param {string} id
 * @returns {HTMLElement}
 */
function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`expected an element with the id "${id}" in this page, found none`);
  return found;
}

/**
 * Return a number as short text with these significant digits, "–" for null.
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
function numberText(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 2).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

/**
 * Return the colour that a variable of page.css has in the present theme, as a canvas understands it.
 * @param {string} variable such as "--ink"
 */
function themeColour(variable) {
  const probe = document.createElement("span");
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

/** @type {Array<() => void>} */
const themeListeners = [];

/**
 * Call a function whenever the colours of the page change.
 * @param {() => void} listener
 */
function onThemeChange(listener) {
  themeListeners.push(listener);
}

function themeChanged() {
  for (const listener of themeListeners) listener();
}

const THEMES = /** @type {const} */ (["auto", "light", "dark"]);

/** Return a button that switches the page between the browser's theme, light and dark. */
function themeSwitch() {
  const button = element("button", { type: "button", class: "theme-switch" });
  const show = () => {
    const theme = document.documentElement.dataset.theme || "auto";
    button.textContent = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}. Switch between automatic, light and dark.`);
  };
  button.addEventListener("click", () => {
    const now = THEMES.findIndex((theme) => theme === document.documentElement.dataset.theme);
    document.documentElement.dataset.theme = THEMES[(now + 1) % THEMES.length];
    show();
    themeChanged();
  });
  show();
  return button;
}

/**
 * Run the script of a page, and show its error on the page.
 * @param {() => Promise<void>} main
 */
function startPage(main) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeChanged);
  main().then(
    () => document.documentElement.setAttribute("data-ready", ""),
    (error) => {
      const problem = byId("problem");
      problem.hidden = false;
      problem.textContent = `This page could not be shown completely: ${error}`;
      console.error(error);
    },
  );
}

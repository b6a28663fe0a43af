"use strict";
// Elements, numbers and words. Text enters the page as text nodes only: whatever a model wrote stays text.

const byId = (id) => document.getElementById(id);

function build(create, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) create.addEventListener(name.slice(2), value);
    else create.setAttribute(name, value === true ? "" : value);
  }
  create.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return create;
}

const element = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);
const drawing = (name, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// Three significant digits, without an exponent where people would write none.
function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en");
  if (size && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace("-", "−").replace("e+", "e");
  return value.toFixed(size < 0.1 ? 4 : size < 10 ? 3 : size < 100 ? 1 : 0).replace("-", "−");
}

const signed = (value) => (value > 0 ? "+" : "") + short(value);

function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.round(seconds)} s`;
}

const known = (values) => (values || []).filter((value) => value !== null && value !== undefined);
const sum = (values) => values.reduce((a, b) => a + b, 0);
const say = (text) => {
  byId("said").textContent = text;
};

const TYPING = new Set(["INPUT", "SELECT", "TEXTAREA"]);

// ── the state of the page ──────────────────────────────────────────────────────────────────────────────────────

const DATA = JSON.parse(byId("data").textContent);
const state = { hidden: new Set(), smoothing: 0.5, cursor: null };
const COLOURS = 8;

const training = () => DATA.runs.filter((run) => run.kind !== "evaluation");
const colour = (run) => `var(--run-${training().indexOf(run) % COLOURS})`;
const dash = (run) => (Math.floor(training().indexOf(run) / COLOURS) ? "5 3" : null);

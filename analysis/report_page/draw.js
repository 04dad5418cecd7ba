"use strict";
// Elements, numbers, and pictures. Whatever was said or named is inserted as text.

/** An HTML element with some properties (`class`, `data-…` and ARIA are attributes) and children. */
function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.entries(value).forEach((pair) => element.style.setProperty(...pair));
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "style") Object.entries(value).forEach((pair) => element.style.setProperty(...pair));
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (/^(class|role|for|tabindex|colspan)$|^(data|aria)-/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Characters that a reader would not see, or that would change how others are seen.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/u;
const UNSEEN_KEPT = new RegExp(`(${UNSEEN.source})`, "u"); // which a split keeps
const UNSEEN_NAMES = {
  "\u200e": "LRM",
  "\u200f": "RLM",
  "\u061c": "ALM",
  "\u202a": "LRE",
  "\u202b": "RLE",
  "\u202c": "PDF",
  "\u202d": "LRO",
  "\u202e": "RLO",
  "\u2066": "LRI",
  "\u2067": "RLI",
  "\u2068": "FSI",
  "\u2069": "PDI",
  "\u200b": "ZWSP",
  "\u2060": "WJ",
  "\ufeff": "BOM",
  "\u00ad": "SHY",
  "\r": "CR",
};

/** A text as nodes: what `mark` (a global RegExp or null) finds is marked, and unseen characters are named. */
function textNodes(text, mark = null) {
  const nodes = [];
  const plain = (part) => {
    for (const piece of part.split(UNSEEN_KEPT)) {
      if (UNSEEN.test(piece)) {
        const code = piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        nodes.push(el("span", { class: "unseen", title: `U+${code}` }, UNSEEN_NAMES[piece] ?? `U+${code}`));
      } else if (piece) nodes.push(document.createTextNode(piece));
    }
  };
  let at = 0;
  for (const found of mark ? text.matchAll(mark) : []) {
    if (!found[0]) continue;
    plain(text.slice(at, found.index));
    const before = nodes.length;
    plain(found[0]);
    nodes.push(el("mark", {}, nodes.splice(before)));
    at = found.index + found[0].length;
  }
  plain(text.slice(at));
  return nodes;
}

// Numbers

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
const whole = (number) => (Math.round(number) || 0).toLocaleString("en"); // and never -0
const signed = (number, digits = 3) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(digits)}`;

/** A number with as many digits as tell something. */
function figure(number) {
  const size = Math.abs(number);
  if (number === 0) return "0";
  if (size >= 1000) return whole(number);
  if (size < 0.001) return number.toExponential(1).replaceAll("-", "−");
  return String(Number(number.toPrecision(size >= 100 ? 4 : 3))).replace("-", "−");
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}

const colour = (number) => `var(--c${number % 8})`;

/** A dot in a colour of the palette. */
const dot = (number) => el("span", { class: "dot", style: { "--own": colour(number) } });

// Plots

const PLOT = { width: 320, height: 170, left: 44, right: 12, top: 10, bottom: 24 };

/**
 * Axes with a grid, as [the SVG, x of a value, y of a value]. Values on the axes are written by `xs.text`, `ys.text`;
 * `title` is what a screen reader calls the plot.
 */
function axes(title, xs, ys, size = PLOT) {
  const { width, height, left, right, top, bottom } = size;
  const scale =
    ({ low, high }, from, to) =>
    (value) =>
      from + ((value - low) / (high - low || 1)) * (to - from);
  const x = scale(xs, left, width - right),
    y = scale(ys, height - bottom, top);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "plot", role: "img", "aria-label": title });
  for (const value of ticks(ys.low, ys.high)) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    picture.append(svg("text", { x: left - 6, y: y(value) + 3.5, class: "tick end" }, (ys.text ?? figure)(value)));
  }
  for (const value of ticks(xs.low, xs.high, 6)) {
    picture.append(svg("text", { x: x(value), y: height - 7, class: "tick middle" }, (xs.text ?? figure)(value)));
  }
  return [picture, x, y];
}

/** The range of some values with some room around them, but none below `from` where they go down to that. */
function range(values, { from = null, room = 0.06 } = {}) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (from !== null) low = Math.min(low, from);
  const wide = high - low || Math.abs(high) || 1;
  if (high === low) return low === 0 ? { low: 0, high: 1 } : { low: low - wide / 2, high: high + wide / 2 };
  return { low: from !== null && low === from ? low : low - room * wide, high: high + room * wide };
}

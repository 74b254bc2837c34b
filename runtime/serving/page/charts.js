// SPDX-License-Identifier: Apache-2.0
// Small charts of inline SVG. A chart is made once and drawn anew each second; pointing at it shows the values there.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240, HEIGHT = 60;
const SECONDS = 119; // as many as the server keeps

/** An element with attributes and children; text is only ever set as text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key === "value") made.value = value; // a textarea has no such attribute
    else if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** The next of 1, 2, 5, 10, 20, ... at or above a value: axes keep still while values move. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999999);
}

/** One or two lines over time. `format` writes a value for people. */
export class Lines {
  constructor(title, names, format) {
    this.names = names;
    this.format = format;
    this.series = [];
    this.at = null;
    this.now = element("span", { class: "now" });
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.top = element("span");
    const legend = names.length > 1
      ? [element("div", { class: "legend" }, ...names.map((name, i) => element("span", { class: "ab"[i] }, name)))]
      : [];
    this.figure = element("figure", { class: "chart" },
      element("figcaption", {}, element("h3", {}, title), this.now), this.svg,
      element("div", { class: "ends" }, element("span", {}, "2 min ago"), this.top, element("span", {}, "now")), ...legend);
    this.title = title;
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      this.at = (event.clientX - box.left) / box.width;
      this.draw(this.series);
    });
    this.svg.addEventListener("pointerleave", () => { this.at = null; this.draw(this.series); });
  }

  draw(series) {
    this.series = series;
    const length = SECONDS;
    const most = roundUp(Math.max(...series.flat().filter((value) => value !== null), 0));
    const x = (i, values) => (WIDTH * (i + length - values.length)) / (length - 1);
    const y = (value) => HEIGHT - (HEIGHT * value) / most;
    const shapes = [0, 0.5, 1].map((part) =>
      shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT * part, y2: HEIGHT * part, class: "axis" }));
    series.forEach((values, number) => shapes.push(...this.line(values, number, x, y)));
    const place = this.at === null ? length - 1 : Math.round(Math.min(Math.max(this.at, 0), 1) * (length - 1));
    if (this.at !== null) {
      const at = (WIDTH * place) / (length - 1);
      shapes.push(shape("line", { x1: at, x2: at, y1: 0, y2: HEIGHT, class: "cursor" }));
    }
    const values = series.map((row) => row[place - length + row.length] ?? null);
    const told = values.map((value) => (value === null ? "–" : this.format(value))).join(" / ");
    this.now.textContent = this.at === null ? told : `${told}  ${length - 1 - place} s ago`;
    this.top.textContent = `top ${this.format(most)}`;
    this.svg.setAttribute("aria-label", `${this.title}: ${told} now, the axis ends at ${this.format(most)}`);
    this.svg.replaceChildren(...shapes);
  }

  line(values, number, x, y) {
    const runs = [];
    values.forEach((value, i) => {
      if (value === null) return;
      if (i === 0 || values[i - 1] === null) runs.push([]);
      runs.at(-1).push(`${x(i, values).toFixed(1)},${y(value).toFixed(1)}`);
    });
    return runs.flatMap((points) => {
      const [first, last] = [points[0].split(",")[0], points.at(-1).split(",")[0]];
      const spread = points.length > 1 ? points : [points[0], `${Number(first) + 1},${points[0].split(",")[1]}`];
      const line = shape("polyline", { points: spread.join(" "), class: number ? "b-line" : "a-line" });
      if (number || values.every((value) => !value)) return [line];
      return [shape("polygon", { points: `${first},${HEIGHT} ${points.join(" ")} ${last},${HEIGHT}`, class: "a-area" }), line];
    });
  }
}

/** Counts by name, as columns. */
export class Columns {
  constructor(title, unit) {
    this.title = title;
    this.now = element("span", { class: "now" });
    this.columns = element("div", { class: "columns", role: "img" });
    this.ticks = element("div", { class: "ticks", "aria-hidden": "true" });
    this.figure = element("figure", { class: "chart" },
      element("figcaption", {}, element("h3", {}, title), this.now), this.columns, this.ticks,
      element("div", { class: "ends" }, element("span", {}, unit)));
  }

  draw(counts) {
    const names = Object.keys(counts), total = Object.values(counts).reduce((sum, count) => sum + count, 0);
    const most = Math.max(...Object.values(counts), 1);
    this.columns.replaceChildren(...names.map((name) => {
      const column = element("div", { title: `${name}: ${counts[name]}` });
      column.style.height = `${(100 * counts[name]) / most}%`;
      return column;
    }));
    this.ticks.replaceChildren(...names.map((name) => element("span", {}, name)));
    this.now.textContent = total ? `${total} ${total === 1 ? "batch" : "batches"}` : "–";
    this.columns.setAttribute("aria-label", names.map((name) => `${counts[name]} batches of ${name}`).join(", ") || "none yet");
  }
}

/** A value on its way to a limit. */
export function gauge(name, text, share, limit, on, hint = "") {
  const fill = element("div", { class: "fill" });
  fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  const track = element("div", { class: "track" }, fill);
  if (limit !== null) {
    const mark = element("div", { class: "limit", title: "alert" });
    mark.style.left = `${limit * 100}%`;
    track.append(mark);
  }
  return element("div", { class: on ? "gauge on" : "gauge" },
    element("p", {}, element("span", {}, name), element("span", {}, text)), track,
    ...(hint ? [element("small", { class: "hint" }, hint)] : []));
}

/** Names with shares between 0 and 1. */
export function bars(rows) {
  const list = element("dl", { class: "bars" });
  rows.forEach(({ name, share, text }, i) => {
    const fill = element("div", { class: "fill" });
    fill.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
    list.append(element("dt", i ? {} : { class: "first" }, name),
      element("dd", { class: "track", "aria-hidden": "true" }, fill), element("dd", { class: "value" }, text));
  });
  return list;
}

// SPDX-License-Identifier: Apache-2.0
// The page: which model, its form and answer, and the figures that come each second.

import { Columns, element, gauge, Lines } from "./charts.js";
import { formOf } from "./tryout.js";

const $ = (id) => document.getElementById(id);
const KEY = "onnxpress-key";
let models = [];
let running = null;

// ---- asking the server ----

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** POST a body (an object as JSON, a file as it is), or GET without one. Throws an Error that people can read. */
async function ask(path, body, signal) {
  const options = { headers: headers(), signal };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = body instanceof Blob ? body.type || "application/octet-stream" : "application/json";
    options.body = body instanceof Blob ? body : JSON.stringify(body);
  }
  let response;
  try { response = await fetch(path, options); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (response.status === 401) $("unlock").hidden = false;
  const streamed = response.headers.get("content-type")?.startsWith("text/event-stream");
  if (streamed && response.ok) return { response };
  const json = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(json.error?.message ?? json.error ?? `The server answered ${response.status}.`);
  return { response, json };
}

// ---- trying a model ----

const model = () => models.find((one) => one.name === $("model").value);

function showForm() {
  const chosen = model();
  if (!chosen) return;
  running?.abort();
  const kind = formOf(chosen);
  const run = element("button", { class: "main", id: "run" }, "Run");
  const stop = element("button", { type: "button", id: "stop", hidden: true }, "Stop");
  stop.addEventListener("click", () => running?.abort());
  const keys = element("span", { class: "hint" }, "or ", element("kbd", {}, "Ctrl"), " ", element("kbd", {}, "Enter"));
  $("form").replaceChildren(...kind.fields(chosen), element("div", { class: "actions" }, run, stop, keys));
  $("answer").replaceChildren();
  $("cost").textContent = "";
  $("error").hidden = true;
  $("facts").textContent = `${chosen.task} · version ${chosen.version}`;
  $("facts").title = `bundle ${chosen.bundle}`;
}

async function run(event) {
  event?.preventDefault();
  const chosen = model();
  if (!chosen || running) return;
  const kind = formOf(chosen), begun = performance.now();
  running = new AbortController();
  $("error").hidden = true;
  $("cost").textContent = "";
  $("run").disabled = true;
  $("stop").hidden = !kind.stops;
  const { signal } = running, show = (...parts) => $("answer").replaceChildren(...parts);
  try {
    const found = await kind.run((path, body, stopped) => ask(path, body, stopped ?? signal), chosen, { show, signal });
    if (Array.isArray(found)) show(...found);
    const note = found.note ? ` · ${found.note}` : "";
    $("cost").textContent = `${(performance.now() - begun).toFixed(0)} ms from here and back${note}`;
  } catch (error) {
    if (error.name === "AbortError") $("cost").textContent = "stopped";
    else { $("error").textContent = error.message; $("error").hidden = false; }
  } finally {
    running = null;
    if ($("run")) { $("run").disabled = false; $("stop").hidden = true; }
  }
}

async function loadModels() {
  const { json } = await ask("/page/models");
  const before = $("model").value, known = JSON.stringify(models);
  models = json.models;
  if (JSON.stringify(models) === known) return;
  $("model").replaceChildren(...models.map((one) => element("option", { value: one.name }, one.name)));
  const wanted = before || decodeURIComponent(location.hash.slice(1));
  if (models.some((one) => one.name === wanted)) $("model").value = wanted;
  showForm();
}

// ---- live figures ----

const short = (value) => (value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString());
const thousandths = (value) => (value > 0 && value < 0.001 ? "below 0.001" : value.toFixed(3));
const milliseconds = (value) => (value >= 1000 ? `${short(value / 1000)} s` : `${short(value)} ms`);
const mebibytes = (value) => `${short(value)} MiB`;

const charts = {
  rate: new Lines("Requests a second", ["answered", "refused or failed"], short),
  latency: new Lines("Latency", ["p50", "p99"], milliseconds),
  depth: new Lines("Waiting requests", [""], short),
  batches: new Columns("Batch sizes", "rows of a batch, last minute"),
  memory: new Lines("Memory of the server", [""], mebibytes),
  cpu: new Lines("Processor of the server", [""], (value) => `${short(value)} cores`),
};
$("charts").append(...Object.values(charts).map((chart) => chart.figure));

let last = null;

function drawLive(live) {
  last = live;
  const chosen = live.models[$("model").value];
  if (chosen) {
    const failed = chosen.errors_per_second;
    charts.rate.draw([chosen.requests_per_second.map((count, i) => count - failed[i]), failed]);
    charts.latency.draw([chosen.p50_ms, chosen.p99_ms]);
    charts.depth.draw([chosen.queue_depth]);
    charts.batches.draw(chosen.minute.batches);
    drawOutputs(chosen, live);
  }
  charts.memory.draw([(live.process.memory_bytes ?? []).map((bytes) => bytes / 2 ** 20)]);
  charts.cpu.draw([live.process.cpu ?? []]);
  $("alerts").hidden = !live.alerts.length;
  drawAlerts(live.alerts);
}

function drawAlerts(alerts) {
  const told = JSON.stringify(alerts);
  if ($("alerts").dataset.told === told) return; // a screen reader would read them each second
  $("alerts").dataset.told = told;
  $("alerts").replaceChildren(...alerts.map(({ model: name, kind, message, since }) => element("li", {},
    element("b", {}, [name, kind.replaceAll("_", " ")].filter(Boolean).join(": ")), ` ${message} `,
    element("span", { class: "hint" }, `since ${new Date(since * 1000).toLocaleTimeString()}`))));
}

function drawOutputs({ outputs, shadow, total, bundle, depth }, { gpus, audit }) {
  const cards = [];
  if (outputs) {
    const { what, rows, of } = outputs.gathering, kinds = Object.entries(outputs.drift);
    const begun = kinds.length || what === "window";
    cards.push(element("div", {}, element("h3", {}, "Output drift"),
      element("p", { class: "hint" }, begun ? `windows of ${of} rows against the ${outputs.reference === "golden" ? "golden samples" : "first rows"}; the mark is where it alerts` : "gathering the first rows, which later ones are compared with"),
      ...kinds.map(([name, { statistic, expected, threshold }]) => gauge(name,
        thousandths(statistic), statistic / threshold / 1.5, 1 / 1.5, statistic > threshold,
        `${thousandths(expected)} by chance, alert above ${thousandths(threshold)}`)),
      gauge(what === "window" ? "next window" : "reference", `${rows} of ${of} rows`, rows / of, null, false)));
  }
  if (shadow) {
    const { agreement, wanted, cosine, rows, dropped, failed, largest_difference: apart } = shadow;
    cards.push(element("div", {}, element("h3", {}, "Agreement with the shadow bundle"),
      element("p", { class: "hint" }, `${rows} rows replayed on ${shadow.bundle.slice(0, 12)}, ${dropped} requests dropped, ${failed} failed`),
      ...(agreement === null ? [] : [gauge("rows that agree", `${(100 * agreement).toFixed(1)} %`, agreement, wanted, agreement < wanted)]),
      ...(cosine === null ? [] : [element("p", { class: "hint" }, `mean cosine ${cosine.toFixed(4)}; largest difference ` +
        Object.entries(apart).map(([name, value]) => `${name} ${short(value)}`).join(", "))])));
  }
  if (gpus.length) {
    cards.push(element("div", {}, element("h3", {}, "GPU memory"), ...gpus.map(({ gpu, used, total: all, load }) =>
      gauge(`GPU ${gpu}, ${(100 * load).toFixed(0)} % busy`, `${short(used / 2 ** 30)} of ${short(all / 2 ** 30)} GiB`, used / all, null, false))));
  }
  cards.push(element("div", { class: "wide" }, element("h3", {}, "Since the start"),
    element("p", {}, `Requests: ${total.requests}, of which refused or failed: ${total.errors}. Rows: ${total.rows}, of which with NaN or ` +
      `infinity: ${outputs?.not_finite ?? 0}. Waiting now: ${depth}.`),
    element("p", { class: "hint mono" }, `bundle ${bundle}`),
    ...(audit ? [element("p", { class: "hint mono" }, `audit  ${audit.head}, line ${audit.lines}`)] : [])));
  $("outputs").replaceChildren(...cards);
}

async function tick() {
  if (!document.hidden) {
    try {
      const { json } = await ask("/live");
      const known = models.map((one) => one.version).join();
      const now = models.map((one) => json.models[one.name]?.version).join();
      if (!models.length || known !== now) await loadModels();
      drawLive(json);
      $("state").className = "on";
      $("state").textContent = "live";
      $("unlock").hidden = true;
    } catch (error) {
      $("state").className = "off";
      $("state").textContent = error.message;
    }
  }
  setTimeout(tick, 1000);
}

$("model").addEventListener("change", () => {
  location.hash = encodeURIComponent($("model").value);
  showForm();
  if (last) drawLive(last);
});
$("form").addEventListener("submit", run);
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(event);
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
});
tick();

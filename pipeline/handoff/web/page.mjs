// SPDX-License-Identifier: Apache-2.0
// The page: where the model runs is in its address, ?provider=wasm|webgpu&threads=N. What became of the golden samples
// is on <html> as data-state (`passed`, `failed` or `broken`) and data-lines, for whoever drives the page.
import { readGolden, runGolden, summary } from "./golden.mjs";
import { json, Model } from "./model.mjs";
import { numbers } from "./tensors.mjs";

const query = new URLSearchParams(location.search);
const provider = query.get("provider") === "webgpu" ? "webgpu" : "wasm";
const cores = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
const threads = Number(query.get("threads")) || cores;
const find = (id) => document.getElementById(id);
const make = (tag, text = "", attributes = {}) =>
  Object.assign(document.createElement(tag), { textContent: text }, attributes);

function say(text, kind = "") {
  Object.assign(find("state"), { textContent: text, className: kind });
}

function offerProviders() {
  for (const [key, label] of [["wasm", "WebAssembly"], ["webgpu", "WebGPU"]]) {
    const link = make("a", label, { href: `?provider=${key}` });
    if (key === provider) link.ariaCurrent = "page";
    find("providers").append(link);
  }
}

function describe({ about }) {
  document.title = find("name").textContent = about.name;
  const where = provider === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  find("facts").textContent = `${about.task} · ${about.model.split("/").at(-1)} · ${where} · on this machine alone`;
}

async function checkGolden(model) {
  const [table, raw, texts] = await Promise.all([
    fetch("golden/tensors.txt").then((r) => r.text()),
    fetch("golden/tensors.bin").then((r) => r.arrayBuffer()),
    json("golden/texts.json"),
  ]);
  const samples = readGolden(table, raw);
  const names = Object.fromEntries(texts.map(({ sample, text }) => [sample, text]));
  const rows = await runGolden(model.ort, model.session, samples, (row) => showRow(row, names[row.sample]));
  const other = model.text ? texts.filter(({ text, ids }) => model.text.encode(text).ids.join() !== ids.join()) : [];
  if (model.text) find("tokens").textContent = `${texts.length - other.length} of ${texts.length} texts have the golden token ids.`;
  const { lines, passed } = summary(rows);
  const all = passed && !other.length;
  const within = rows.filter((row) => row.difference <= row.tolerance).length;
  const state = { state: all ? "passed" : "failed", lines: lines.join("\n"), tokens: String(other.length) };
  return { state, text: `${within} of ${rows.length} answers agree with the original`, kind: all ? "good" : "bad" };
}

function showRow({ sample, output, difference, tolerance, fromPython }, text) {
  const good = difference <= tolerance, shown = [difference, tolerance, fromPython].map((v) => v.toPrecision(3));
  const row = make("tr");
  const name = text === undefined ? `sample ${sample}` : text || "(empty text)";
  row.append(...[name, output, ...shown].map((cell) => make("td", cell, { title: cell })));
  row.append(make("td", good ? "pass" : "fail", { className: good ? "good" : "bad" }));
  find("rows").append(row);
}

async function answer(model, text) {
  const place = find("answer"), { about } = model, start = performance.now();
  if (about.caches.length) {
    for await (const written of model.write(text)) place.replaceChildren(make("span", written));
  } else {
    const [name, result] = Object.entries(await model.runTexts([text]))[0];
    place.replaceChildren(...(about.labels[0] && result.dims.length === 2 ? bars(about, result) : [vector(name, result)]));
  }
  place.append(make("p", `${(performance.now() - start).toFixed(0)} ms`, { className: "quiet" }));
}

function bars({ labels }, result) {
  const values = [...numbers(result)], top = Math.max(...values);
  const weights = values.map((value) => Math.exp(value - top)), sum = weights.reduce((a, b) => a + b);
  const order = weights.map((weight, i) => [weight / sum, labels[i] ?? `class ${i}`]).sort((a, b) => b[0] - a[0]);
  return order.slice(0, 5).map(([share, label]) => {
    const bar = make("div", "", { className: "bar" });
    const percent = make("span", `${(100 * share).toFixed(1)} %`, { className: "number" });
    bar.append(make("span", label), make("meter", "", { value: share }), percent);
    return bar;
  });
}

function vector(name, result) {
  const first = [...numbers(result).subarray(0, 8)].map((value) => value.toFixed(4)).join(", ");
  return make("span", `${name} [${result.dims.join(" × ")}]: ${first}, …`);
}

function offerTrying(model) {
  if (!model.text) return;
  find("try").hidden = false;
  find("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    find("run").disabled = true;
    try {
      await answer(model, find("text").value);
    } catch (error) {
      find("answer").replaceChildren(make("span", error.message, { className: "bad" }));
    }
    find("run").disabled = false;
  });
}

async function main() {
  offerProviders();
  const start = performance.now(), model = await Model.load(provider, threads);
  const loaded = ((performance.now() - start) / 1000).toFixed(1);
  describe(model);
  say("Running the golden samples…");
  const { state, text, kind } = await checkGolden(model);
  say(`${text}; loaded in ${loaded} s`, kind);
  offerTrying(model);
  Object.assign(document.documentElement.dataset, state, { isolated: crossOriginIsolated, threads });
}

main().catch((error) => {
  say(error.message, "bad");
  Object.assign(document.documentElement.dataset, { state: "broken", lines: "", reason: error.message });
});

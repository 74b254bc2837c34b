// SPDX-License-Identifier: Apache-2.0
// A form for each kind of model, and its answer for people.

import { bars, element } from "./charts.js";

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function text(id, label, value = "", attributes = {}) {
  return element("div", { class: "field" }, element("label", { for: id }, label),
    element("textarea", { id, spellcheck: "false", ...attributes, value }));
}

function number(id, label, value, attributes) {
  return element("div", { class: "field" }, element("label", { for: id }, label),
    element("input", { id, type: "number", value: String(value), ...attributes }));
}

const EXAMPLES = ["A quiet, lovely film that stayed with me for days.", "It was one of the best evenings at the cinema this year."];

/** What stands in a form at first: a golden sample that a person can read, or this. */
const example = (model, place = 0) => model.texts[place] ?? EXAMPLES[place];

const value = (id) => document.getElementById(id).value;

async function predict(ask, model, body) {
  const { json } = await ask(`/models/${encodeURIComponent(model.name)}/predict`, body);
  return json.predictions;
}

function labels(found) {
  return bars(found.scores.slice(0, 10).map(({ label, score }) => ({ name: label, share: score, text: percent(score) })));
}

const CLASSES = {
  fields: (model) => [text("text", "Text", example(model))],
  run: async (ask, model) => [labels((await predict(ask, model, { text: value("text") }))[0])],
};

const VECTORS = {
  fields: (model) => [text("text", "First text", example(model)), text("other", "Second text", example(model, 1))],
  run: async (ask, model) => {
    const [a, b] = (await predict(ask, model, { text: [value("text"), value("other")] })).map((row) => row.embedding);
    const dot = (x, y) => x.reduce((sum, one, i) => sum + one * y[i], 0);
    const cosine = dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
    return [element("p", { class: "big" }, cosine.toFixed(3)),
      bars([{ name: "Similarity", share: cosine, text: percent(cosine) }]),
      element("p", { class: "hint" }, `cosine of two vectors of ${a.length} values; 1 is the same direction`)];
  },
};

const ANSWERS = {
  fields: (model) => [text("question", "Question", "What is it about?"), text("text", "Context", example(model))],
  run: async (ask, model) => {
    const context = value("text");
    const [found] = await predict(ask, model, { question: value("question"), context });
    return [element("p", { class: "prose" }, context.slice(0, found.start),
      element("mark", {}, context.slice(found.start, found.end)), context.slice(found.end)),
    element("p", { class: "hint" }, percent(found.score))];
  },
};

const TOKENS = {
  fields: CLASSES.fields,
  run: async (ask, model) => {
    const [found] = await predict(ask, model, { text: value("text") });
    return [element("p", { class: "prose" }, ...found.tokens.flatMap(({ token, label }) =>
      label === "O" ? [`${token} `] : [element("mark", {}, token, element("small", {}, label)), " "]))];
  },
};

const MASKS = {
  fields: (model) => [text("text", "Text with a mask token", example(model))],
  run: async (ask, model) => (await predict(ask, model, { text: value("text") }))[0].masks.map((choices) =>
    bars(choices.map(({ token, score }) => ({ name: token, share: score, text: percent(score) })))),
};

const IMAGES = {
  fields: () => {
    const preview = element("img", { class: "preview", alt: "the picture that you chose", hidden: true });
    const input = element("input", { id: "file", type: "file", accept: "image/*" });
    input.addEventListener("change", () => {
      URL.revokeObjectURL(preview.src);
      preview.hidden = !input.files.length;
      if (input.files.length) preview.src = URL.createObjectURL(input.files[0]);
    });
    return [element("div", { class: "field" }, element("label", { for: "file" }, "Picture"), input, preview)];
  },
  run: async (ask, model) => {
    const [file] = document.getElementById("file").files;
    if (!file) throw new Error("Choose a picture first.");
    const { json } = await ask(`/models/${encodeURIComponent(model.name)}/predict`, file);
    return [labels(json.predictions[0])];
  },
};

const WRITING = {
  fields: (model) => [text("text", "Prompt", model.texts[0] ?? "Once upon a time"),
    element("div", { class: "row" },
      number("tokens", "New tokens", 100, { min: "1", max: "4096" }),
      number("temperature", "Temperature", 0, { min: "0", max: "2", step: "0.1" }))],
  stops: true,
  run: async (ask, model, { show, signal }) => {
    const prompt = value("text"), written = element("span");
    show(element("p", { class: "prose" }, element("span", { class: "given" }, prompt), written));
    const body = { model: model.name, prompt, max_tokens: Number(value("tokens")),
      temperature: Number(value("temperature")), stream: true };
    let pieces = 0;
    const begun = performance.now();
    const { response } = await ask("/v1/completions", body, signal);
    for await (const event of events(response, signal)) {
      if (event.error) throw new Error(event.error.message ?? event.error);
      written.textContent += event.choices[0]?.text ?? "";
      pieces += 1;
    }
    const seconds = (performance.now() - begun) / 1000;
    return { note: `about ${(pieces / seconds).toFixed(0)} tokens a second` };
  },
};

async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (!signal.aborted) {
    const { done, value: part } = await reader.read();
    if (done) return;
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

const TENSORS = {
  fields: (model) => [text("json", `Body of POST /v2/models/${model.name}/infer`,
    pretty(model.request ?? { inputs: [] }), { class: "json" })],
  run: async (ask, model) => {
    let body;
    try { body = JSON.parse(value("json")); } catch (error) { throw new Error(`This is not JSON: ${error.message}`); }
    const { json } = await ask(`/v2/models/${encodeURIComponent(model.name)}/infer`, body);
    return json.outputs.map((output) => element("div", { class: "field" },
      element("h3", {}, `${output.name} ${output.datatype} [${output.shape.join(", ")}]`),
      element("pre", { tabindex: "0" }, shortened(output.data.flat(Infinity)))));
  },
};

/** JSON with one line for each input, so that numbers do not fill the screen. */
function pretty(request) {
  const rows = request.inputs.map((input) => `    ${JSON.stringify(input)}`);
  return `{\n  "inputs": [\n${rows.join(",\n")}\n  ]\n}`;
}

function shortened(values) {
  const shown = values.slice(0, 200).map((one) => (typeof one === "number" ? Number(one.toPrecision(6)) : one));
  return shown.join(", ") + (values.length > 200 ? `, … (${values.length} values)` : "");
}

const BY_TASK = {
  "text-classification": CLASSES, "image-classification": IMAGES, "feature-extraction": VECTORS,
  "question-answering": ANSWERS, "token-classification": TOKENS, "fill-mask": MASKS,
  "text-generation": WRITING, "text2text-generation": WRITING,
};

/** The form for a model: by its task where the server can read what a person gives, else by its tensors. */
export function formOf(model) {
  const kind = BY_TASK[model.task] ?? TENSORS;
  const wanted = kind === IMAGES ? "image" : "text";
  return model.reads === wanted ? kind : TENSORS;
}

// SPDX-License-Identifier: Apache-2.0
// The model in a browser. Everything is fetched from beside this file; `provider` is "wasm" or "webgpu".
import { generate } from "./generate.mjs";
import { tensor } from "./tensors.mjs";
import { Text } from "./text.mjs";

const at = (name) => new URL(name, import.meta.url).href;

export async function json(name) {
  const response = await fetch(at(name));
  if (!response.ok) throw Error(`${name}: ${response.status}`);
  return response.json();
}

/**
 * A device without subgroups where those have fewer than 8 lanes, as the software adapter's have: ONNX Runtime 1.30's
 * attention is wrong there (0.4 off in a logit from 32 tokens on). Elsewhere ONNX Runtime makes its own.
 */
async function ownDevice() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!(adapter?.info.subgroupMinSize < 8)) return {};
  const requiredLimits = {};
  for (const name in adapter.limits) requiredLimits[name] = adapter.limits[name];
  const requiredFeatures = ["shader-f16"].filter((name) => adapter.features.has(name));
  return { device: await adapter.requestDevice({ requiredFeatures, requiredLimits }) };
}

export class Model {
  static async load(provider = "wasm", threads = 1) {
    const model = new Model();
    const [about, ort] = await Promise.all([json("model.json"), import(at(`vendor/ort/ort.${provider}.min.mjs`))]);
    ort.env.wasm.wasmPaths = at("vendor/ort/");
    ort.env.wasm.numThreads = threads;
    const externalData = about.externalData.map((path) => ({ path: path.split("/").at(-1), data: at(path) }));
    const where = provider === "webgpu" ? { name: provider, ...(await ownDevice()) } : provider;
    const options = { executionProviders: [where], ...(externalData.length && { externalData }) };
    model.session = await ort.InferenceSession.create(at(about.model), options);
    if (about.tokenizer) {
      const { Tokenizer } = await import(at("vendor/tokenizers/tokenizers.min.mjs"));
      const files = await Promise.all(["tokenizer", "tokenizer_config"].map((name) => json(`model/${name}.json`)));
      model.text = new Text(Tokenizer, ...files, about.maxLength);
    }
    return Object.assign(model, { about, ort });
  }

  /** Run on texts; returns name -> ort.Tensor. */
  async runTexts(texts) {
    const types = Object.fromEntries(this.about.inputs.map(({ name, dtype }) => [name, dtype]));
    const feeds = Object.entries(this.text.batch(texts, this.session.inputNames));
    return this.session.run(
      Object.fromEntries(feeds.map(([name, rows]) => [name, tensor(this.ort, types[name], rows)])));
  }

  /** Yields the whole text so far, once a token. */
  async *write(prompt, options = {}) {
    const end = this.text.idOf(this.text.config.eos_token), ids = this.text.encode(prompt).ids, made = [];
    for await (const id of generate(this.ort, this.session, this.about, ids, { end, ...options })) {
      made.push(id);
      yield this.text.decode(made);
    }
  }
}

// SPDX-License-Identifier: Apache-2.0
// The model in Node: load it, feed it numbers or text, get tensors.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import * as ort from "onnxruntime-node";
import { generate } from "./generate.mjs";
import { tensor } from "./tensors.mjs";
import { Text } from "./text.mjs";

const here = (name) => fileURLToPath(new URL(name, import.meta.url));
const json = async (name) => JSON.parse(await readFile(here(name), "utf8"));

export class Model {
  /** Load the model of this folder; `options` are ONNX Runtime's session options. */
  static async load(options = {}) {
    const model = new Model();
    model.about = await json("model.json");
    model.session = await ort.InferenceSession.create(here(model.about.model), options);
    if (model.about.tokenizer) {
      const { Tokenizer } = await import("@huggingface/tokenizers");
      const files = [await json("model/tokenizer.json"), await json("model/tokenizer_config.json")];
      model.text = new Text(Tokenizer, ...files, model.about.maxLength);
    }
    return model;
  }

  /** Run on plain numbers, nested as the shape is: {input_ids: [[101, 102]]}. Returns name -> ort.Tensor. */
  async run(values) {
    const types = Object.fromEntries(this.about.inputs.map(({ name, dtype }) => [name, dtype]));
    const feeds = Object.entries(values).map(([name, value]) => [name, tensor(ort, types[name], value)]);
    return this.session.run(Object.fromEntries(feeds));
  }

  /** Run on texts. */
  async runTexts(texts) {
    return this.run(this.text.batch(texts, this.session.inputNames));
  }

  /** Yields the text that a language model writes, piece by piece. */
  async *write(prompt, options = {}) {
    const end = this.text.idOf(this.text.config.eos_token), ids = [];
    let shown = "";
    for await (const id of generate(ort, this.session, this.about, this.text.encode(prompt).ids, { end, ...options })) {
      ids.push(id);
      const text = this.text.decode(ids);
      if (text.endsWith("\ufffd")) continue; // half a character: the rest comes with the next token
      yield text.slice(shown.length);
      shown = text;
    }
  }
}

export { ort };

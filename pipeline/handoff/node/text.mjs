// SPDX-License-Identifier: Apache-2.0
// Text to a model's inputs, as the tokenizer in Python does it: padded to the longest text, cut at the model's limit
// with the special tokens kept. Takes the class Tokenizer of @huggingface/tokenizers as an argument.

export class Text {
  /** `file` and `config`: tokenizer.json and tokenizer_config.json, parsed; `limit`: the longest sequence, or null. */
  constructor(Tokenizer, file, config, limit) {
    this.tokenizer = new Tokenizer(file, config);
    this.config = config;
    this.limit = limit ?? Infinity;
  }

  /** The ids of one text: {ids, types}. */
  encode(text, special = true) {
    const options = { add_special_tokens: special, return_token_type_ids: true };
    const { ids, token_type_ids: types } = this.tokenizer.encode(text, options);
    const kept = ids.length > this.limit ? this.#cut(text, ids, special) : ids.map((_, i) => i);
    return { ids: kept.map((i) => ids[i]), types: kept.map((i) => types?.[i] ?? 0) };
  }

  /** Name -> nested numbers [texts, tokens], for those of `names` that text becomes. */
  batch(texts, names) {
    const rows = texts.map((text) => this.encode(text));
    const longest = Math.max(0, ...rows.map(({ ids }) => ids.length));
    const pad = this.idOf(this.config.pad_token);
    if (pad === undefined && rows.some(({ ids }) => ids.length < longest)) throw Error("no padding token");
    const filled = (row, value) => {
      const filling = Array(longest - row.length).fill(value);
      return this.config.padding_side === "left" ? [...filling, ...row] : [...row, ...filling];
    };
    const columns = {
      input_ids: rows.map(({ ids }) => filled(ids, pad)),
      attention_mask: rows.map(({ ids }) => filled(ids.map(() => 1), 0)),
      token_type_ids: rows.map(({ types }) => filled(types, this.config.pad_token_type_id ?? 0)),
    };
    return Object.fromEntries(names.filter((name) => name in columns).map((name) => [name, columns[name]]));
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true }) : "";
  }

  /** The id of a special token of tokenizer_config.json, which may be written as an object. */
  idOf(token) {
    return token == null ? undefined : this.tokenizer.token_to_id(token.content ?? token);
  }

  /** Which places stay: the special tokens around the text, and of the text as much as there is room for. */
  #cut(text, ids, special) {
    const plain = special ? this.tokenizer.encode(text, { add_special_tokens: false }).ids : ids;
    const around = ids.length - plain.length;
    let before = 0;
    while (before < around && plain.some((id, i) => id !== ids[before + i])) before++;
    const room = Math.max(0, this.limit - around);
    const first = this.config.truncation_side === "left" ? before + plain.length - room : before;
    const places = ids.map((_, i) => i);
    return [...places.slice(0, before), ...places.slice(first, first + room), ...places.slice(before + plain.length)];
  }
}

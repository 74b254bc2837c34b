// SPDX-License-Identifier: Apache-2.0
// Greedy decoding on a graph with a cache: prefill and every step are the same call, told apart by what is fed.
import { ARRAYS, numbers, tensor } from "./tensors.mjs";

/** Yields token ids until `end`, `count` tokens, or the model's longest sequence. `about` is model.json. */
export async function* generate(ort, session, about, prompt, { count = 64, end } = {}) {
  let cache = Object.fromEntries(about.caches.map(({ name, dtype, shape }) => [name, zeros(ort, dtype, shape)]));
  let step = [...prompt], length = 0;
  for (let made = 0; made < count && length + step.length <= (about.maxLength ?? Infinity); made++) {
    length += step.length;
    const known = {
      input_ids: [step],
      attention_mask: [Array(length).fill(1)],
      position_ids: [step.map((_, i) => length - step.length + i)],
      num_logits_to_keep: 1,
    };
    const wanted = about.inputs.filter(({ name }) => name in known);
    const own = wanted.map(({ name, dtype }) => [name, tensor(ort, dtype, known[name])]);
    const answers = await session.run({ ...Object.fromEntries(own), ...cache });
    const next = largest(numbers(answers.logits).subarray(-answers.logits.dims.at(-1)));
    if (next === end) return;
    yield next;
    cache = Object.fromEntries(about.caches.map(({ name, present }) => [name, answers[present]]));
    step = [next];
  }
}

function zeros(ort, dtype, shape) {
  return new ort.Tensor(dtype, new ARRAYS[dtype](shape.reduce((a, b) => a * b, 1)), shape);
}

function largest(values) {
  return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
}

// SPDX-License-Identifier: Apache-2.0
// node check.mjs: the golden samples on the model that transformers.js loads, then the same texts, images and prompts
// through its tokenizer, image processor, pipelines and `generate`. Prints a line an output,
// `OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON`; exit code 1 where anything is not as in Python.
import { readFile } from "node:fs/promises";
import { AutoTokenizer, pipeline, RawImage, softmax, Tensor, TextStreamer } from "@huggingface/transformers";
import { difference, readGolden, runGolden, summary } from "./golden.mjs";
import { about, load } from "./load.mjs";

const read = (name) => readFile(new URL(`golden/${name}`, import.meta.url));
const json = async (name) => JSON.parse(await read(name).catch(() => "[]"));
const { buffer, byteOffset, byteLength } = await read("tensors.bin");
const samples = readGolden(String(await read("tensors.txt")), buffer.slice(byteOffset, byteOffset + byteLength));
const problems = [];

const { model, pipe } = await load();
const session = model.sessions.model;
const ort = { Tensor: class { constructor(...args) { return new Tensor(...args).ort_tensor; } } };
const { lines, passed } = summary(await runGolden(ort, session, samples));
console.log(lines.join("\n"));
if (!passed) problems.push("an output is out of its tolerance");

await checkTexts(await json("texts.json"));
await checkGeneration(await json("generation.json"));
await checkImages(await json("images.json"));
if (problems.length) {
  console.error(problems[0]);
  process.exit(1);
}

/** The same ids as in Python; then text to answer, without a tensor in sight. */
async function checkTexts(texts) {
  if (!texts.length) return;
  const tokenizer = pipe?.tokenizer ?? (await AutoTokenizer.from_pretrained("model"));
  const whole = texts.filter(({ ids }) => ids.length < (about.maxLength ?? Infinity));
  for (const { sample, text, ids } of whole) {
    const inputs = await tokenizer(text);
    if ([...inputs.input_ids.data].join() !== ids.join()) problems.push(`other token ids for ${JSON.stringify(text)}`);
    if (about.caches.length || about.task !== "text-classification") continue;
    const reference = samples[sample].reference.logits, wanted = softmax([...samples[sample].python.logits.data]);
    for (const { label, score } of await pipe(text, { top_k: null })) {
      const off = Math.abs(wanted[model.config.label2id[label]] - score);
      if (!(off <= reference.tolerance)) problems.push(`${label} is ${score} for ${JSON.stringify(text)}`);
    }
  }
  console.log(`# ${whole.length} texts have the golden token ids; ${texts.length - whole.length} are as long as the limit`);
}

/** Greedy tokens equal to Python's up to a step at which two tokens were closer than the tolerance; and streamed. */
async function checkGeneration(cases) {
  for (const { prompt, ids, tokens, margins, tolerance } of cases) {
    const inputs = await pipe.tokenizer(prompt), pieces = [];
    const callback_function = (piece) => pieces.push(piece);
    const streamer = new TextStreamer(pipe.tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function });
    const options = { max_new_tokens: tokens.length, do_sample: false, repetition_penalty: 1, streamer };
    const made = (await model.generate({ ...inputs, ...options })).tolist()[0].map(Number);
    if (made.slice(0, ids.length).join() !== ids.join()) problems.push("the prompt has other token ids");
    const own = made.slice(ids.length), at = tokens.findIndex((token, i) => token !== own[i]);
    if (at >= 0 && margins[at] > tolerance) problems.push(`token ${at} is ${own[at]}, in Python ${tokens[at]}`);
    const text = pipe.tokenizer.decode(own, { skip_special_tokens: true });
    if (pieces.join("") !== text) problems.push("what was streamed is not the text");
    console.log(`# ${at < 0 ? own.length : at} greedy tokens as in Python, streamed in ${pieces.length} pieces`);
  }
}

/** An image through the processor and the pipeline. */
async function checkImages(cases) {
  for (const { file, width, height, channels, pixels, scores, tolerance } of cases) {
    const image = new RawImage(new Uint8ClampedArray(await read(file)), width, height, channels);
    const { pixel_values } = await pipe.processor([image]);
    const wanted = { type: "float32", data: pixels.flat(3), dims: pixel_values.dims };
    if (difference(wanted, pixel_values) > 1e-5) problems.push("the image is prepared in another way");
    const found = Object.fromEntries((await pipe(image, { top_k: scores.length })).map(({ label, score }) => [label, score]));
    const labels = scores.map((_, i) => model.config.id2label[i]);
    const off = Math.max(...labels.map((label, i) => Math.abs((found[label] ?? Infinity) - scores[i])));
    if (!(off <= tolerance)) problems.push(`the scores of an image are off by ${off}`);
    console.log(`# an image gives Python's scores to ${off.toPrecision(2)}`);
  }
}

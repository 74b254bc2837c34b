// SPDX-License-Identifier: Apache-2.0
// node check.mjs: the model on the golden samples, and the tokenizer on their texts. Prints a line an output,
// `OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON`; exit code 1 where one is out of its tolerance.
import { readFile } from "node:fs/promises";
import { readGolden, runGolden, summary } from "./golden.mjs";
import { Model, ort } from "./model.mjs";

const read = (name) => readFile(new URL(`golden/${name}`, import.meta.url));
const { buffer, byteOffset, byteLength } = await read("tensors.bin");
const samples = readGolden(String(await read("tensors.txt")), buffer.slice(byteOffset, byteOffset + byteLength));

const model = await Model.load();
const { lines, passed } = summary(await runGolden(ort, model.session, samples));
console.log(lines.join("\n"));
if (!passed) fail("an output is out of its tolerance");

const texts = model.text ? JSON.parse(await read("texts.json")) : [];
for (const { text, ids } of texts) {
  const own = model.text.encode(text).ids;
  if (own.join() !== ids.join()) fail(`other token ids than in Python for ${JSON.stringify(text.slice(0, 40))}`);
}
console.log(`# ${texts.length} texts have the golden token ids`);

function fail(reason) {
  console.error(reason);
  process.exit(1);
}

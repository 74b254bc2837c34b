// SPDX-License-Identifier: Apache-2.0
// node example.mjs [TEXT]
import { Model } from "./model.mjs";

const model = await Model.load();
const { about } = model;
const text = process.argv[2] ?? "This is a good day.";

if (about.caches.length && model.text) {
  for await (const piece of model.write(text)) process.stdout.write(piece);
  console.log();
} else if (model.text) {
  const answers = await model.runTexts([text]);
  for (const [name, { dims, data }] of Object.entries(answers)) {
    const best = data.reduce((top, value, i) => (value > data[top] ? i : top), 0);
    const label = dims.length === 2 ? about.labels?.[best] : undefined;
    console.log(name, dims, label ?? data.slice(0, 8));
  }
} else {
  console.log("This model takes", about.inputs, "and gives", about.outputs);
}

// SPDX-License-Identifier: Apache-2.0
// node example.mjs [TEXT or IMAGE]
import { AutoTokenizer, TextStreamer } from "@huggingface/transformers";
import { about, load } from "./load.mjs";

const { model, pipe } = await load();
const wantsFile = about.inputs.some(({ name }) => ["pixel_values", "input_values", "input_features"].includes(name));
const input = process.argv[2] ?? "This is a good day.";

if (wantsFile && !process.argv[2]) {
  console.log("node example.mjs FILE");
} else if (about.pipeline === "text-generation") {
  const streamer = new TextStreamer(pipe.tokenizer, { skip_prompt: true });
  await pipe(input, { max_new_tokens: 64, do_sample: false, streamer });
} else if (pipe) {
  console.log(await pipe(input));
} else {
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  console.log(await model(await tokenizer(input, { padding: true, truncation: true })));
}

// SPDX-License-Identifier: Apache-2.0
// The model in `model/`, from this folder alone: nothing is asked of any server.
import { readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { AutoModel, env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = dirname(fileURLToPath(import.meta.url));

export const about = JSON.parse(await readFile(new URL("model.json", import.meta.url), "utf8"));

/** {model, pipe}: `pipe` is null where no pipeline of transformers.js reads what this model gives. */
export async function load(options = {}) {
  if (!about.pipeline) return { model: await AutoModel.from_pretrained("model", options), pipe: null };
  const pipe = await pipeline(about.pipeline, "model", options);
  return { model: pipe.model, pipe };
}

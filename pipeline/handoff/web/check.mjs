// SPDX-License-Identifier: Apache-2.0
// node check.mjs wasm-in-node              the WASM build in Node, one thread
// node check.mjs wasm|webgpu CHROMIUM [PNG] the page in a browser without a window, and a picture of it
// Prints a line an output, `OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON`; exit code 1 where one is out of its
// tolerance, tokens differ, or the page asked any other server for anything.
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { readGolden, runGolden, summary } from "./golden.mjs";
import { serve } from "./serve.mjs";

const here = (name) => fileURLToPath(new URL(name, import.meta.url));
const [mode, program, picture] = process.argv.slice(2);
await (mode === "wasm-in-node" ? inNode() : inBrowser());

async function inNode() {
  const ort = await import("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  const about = JSON.parse(await readFile(here("model.json"), "utf8"));
  const externalData = await Promise.all(about.externalData.map(
    async (path) => ({ path: path.split("/").at(-1), data: new Uint8Array(await readFile(here(path))) })));
  const options = { executionProviders: ["wasm"], ...(externalData.length && { externalData }) };
  const session = await ort.InferenceSession.create(new Uint8Array(await readFile(here(about.model))), options);
  const raw = new Uint8Array(await readFile(here("golden/tensors.bin"))).buffer;
  const samples = readGolden(await readFile(here("golden/tensors.txt"), "utf8"), raw);
  const { lines, passed } = summary(await runGolden(ort, session, samples));
  finish(lines, passed ? "" : "an output is out of its tolerance");
}

async function inBrowser() {
  const { chromium } = await import("playwright-core");
  const server = await serve(here("."), 0);
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : []; // Chromium's sandbox does not work for root
  if (mode === "webgpu") args.push("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader");
  const browser = await chromium.launch({ executablePath: program, args });
  try {
    await look(browser, `http://127.0.0.1:${server.address().port}`);
  } finally {
    await browser.close();
    server.close();
  }
}

async function look(browser, origin) {
  const page = await browser.newPage({ viewport: { width: 1000, height: 1100 } });
  const outside = [], errors = [];
  await page.route((url) => !url.href.startsWith(origin), (route) => {
    outside.push(route.request().url());
    route.abort();
  });
  page.on("pageerror", (error) => errors.push(error.message));
  await page.goto(`${origin}/?provider=${mode}`);
  if (mode === "webgpu" && !(await page.evaluate(async () => navigator.gpu?.requestAdapter()))) {
    return finish([], "no WebGPU adapter");
  }
  await page.waitForSelector("html[data-state]", { state: "attached", timeout: 240_000 });
  const found = await page.evaluate(() => ({ ...document.documentElement.dataset }));
  if (await page.isVisible("#try")) {
    await page.click("#run");
    await page.waitForSelector("#answer p.quiet, #answer .bad", { timeout: 60_000 });
    if (await page.$("#answer .bad")) errors.push(await page.textContent("#answer .bad"));
  }
  if (picture) await page.screenshot({ path: picture, fullPage: true });
  console.log(`# isolated: ${found.isolated}, threads: ${found.threads}, requests to other servers: ${outside.length}`);
  const problem = found.reason ?? (found.state === "passed" ? errors[0] : "the page says that answers differ");
  finish(found.lines.split("\n"), outside.length ? `asked for ${outside[0]}` : (problem ?? ""));
}

function finish(lines, problem) {
  console.log(lines.join("\n"));
  if (problem) console.error(problem);
  process.exitCode = problem ? 1 : 0;
}

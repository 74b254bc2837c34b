// SPDX-License-Identifier: Apache-2.0
// node serve.mjs [PORT]: this folder on 127.0.0.1, with the two headers that WASM threads need (cross-origin
// isolation), the right types for modules and WASM, and a policy under which the page can reach no other server.
import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".txt": "text/plain; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8", ".json": "application/json", ".wasm": "application/wasm",
};
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy": "default-src 'self' blob: data:; script-src 'self' blob: 'wasm-unsafe-eval'",
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
};

/** Serve a folder; resolves to the server once it listens, on a free port where `port` is 0. */
export function serve(root, port) {
  const server = createServer((request, response) => answer(root, request, response));
  return new Promise((resolve) => server.listen(port, "127.0.0.1", () => resolve(server)));
}

async function answer(root, request, response) {
  try {
    if (!["GET", "HEAD"].includes(request.method)) return refuse(response, 405);
    const path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const file = normalize(join(root, path.endsWith("/") ? `${path}index.html` : path));
    if (!file.startsWith(normalize(root + sep)) || /(^|[\\/])\./.test(path)) return refuse(response, 404);
    const found = await stat(file).catch(() => null);
    if (!found?.isFile()) return refuse(response, 404);
    const type = TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
    if (request.method === "HEAD") response.end();
    else createReadStream(file).on("error", () => response.destroy()).pipe(response);
  } catch {
    refuse(response, 400); // a path that is no path
  }
}

function refuse(response, code) {
  response.writeHead(code, HEADERS).end();
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const server = await serve(fileURLToPath(new URL(".", import.meta.url)), Number(process.argv[2] ?? 8080));
  console.log(`http://127.0.0.1:${server.address().port}/`);
}

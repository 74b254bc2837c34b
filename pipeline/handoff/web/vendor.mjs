// SPDX-License-Identifier: Apache-2.0
// npm run vendor: copies out of node_modules what the page loads, so that it asks nobody but its own server.
import { cp, mkdir, readFile } from "node:fs/promises";
import { dirname } from "node:path";

const files = JSON.parse(await readFile("vendor.json", "utf8"));
for (const [from, to] of Object.entries(files)) {
  await mkdir(dirname(`vendor/${to}`), { recursive: true });
  await cp(`node_modules/${from}`, `vendor/${to}`);
}

// SPDX-License-Identifier: Apache-2.0
// The golden samples: tensors.txt has a line a tensor, `SAMPLE KIND NAME DTYPE OFFSET BYTES TOLERANCE RANK DIM...`,
// tensors.bin the numbers. KIND is input, reference (the original's answer) or python (this model's, in Python).
import { ARRAYS, numbers } from "./tensors.mjs";

/** [{input, reference, python}] by sample, each name -> {type, data, dims, tolerance}; `raw` is an ArrayBuffer. */
export function readGolden(table, raw) {
  const samples = [];
  for (const line of table.trim().split("\n")) {
    const [sample, kind, name, type, offset, bytes, tolerance, rank, ...dims] = line.split(" ");
    const part = raw.slice(Number(offset), Number(offset) + Number(bytes));
    const entry = { type, data: new ARRAYS[type](part), dims: dims.slice(0, Number(rank)).map(Number) };
    samples[sample] ??= { input: {}, reference: {}, python: {} };
    samples[sample][kind][name] = { ...entry, tolerance: Number(tolerance) };
  }
  return samples;
}

/** What a session wants for a sample. */
export function feedsOf(ort, sample) {
  const entries = Object.entries(sample.input);
  return Object.fromEntries(entries.map(([name, { type, data, dims }]) => [name, new ort.Tensor(type, data, dims)]));
}

/** The largest absolute difference; infinite where shapes differ or one of two values is not a number. */
export function difference(wanted, got) {
  if (wanted.dims.join() !== got.dims.join()) return Infinity;
  const [a, b] = [numbers(wanted), numbers(got)];
  return a.reduce((worst, value, i) => {
    if (Object.is(value, b[i]) || value === b[i]) return worst;
    const distance = Math.abs(value - b[i]);
    return Number.isNaN(distance) ? Infinity : Math.max(worst, distance);
  }, 0);
}

/** Run every sample: a row for each sample and output, {sample, output, difference, tolerance, fromPython}. */
export async function runGolden(ort, session, samples, onRow = () => {}) {
  const rows = [];
  for (const [number, sample] of samples.entries()) {
    const answers = await session.run(feedsOf(ort, sample));
    for (const [output, reference] of Object.entries(sample.reference)) {
      const got = answers[output];
      const row = { sample: number, output, difference: difference(reference, got), tolerance: reference.tolerance };
      rows.push({ ...row, fromPython: difference(sample.python[output], got) });
      onRow(rows.at(-1));
    }
  }
  return rows;
}

/** One line an output over all samples, `OUTPUT DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON`, and whether all passed. */
export function summary(rows) {
  const lines = [...new Set(rows.map((row) => row.output))].map((output) => {
    const own = rows.filter((row) => row.output === output);
    const worst = (key) => Math.max(...own.map((row) => row[key]));
    const shown = [worst("difference"), worst("tolerance"), worst("fromPython")];
    return [output, ...shown.map((value) => (value === Infinity ? "inf" : value))].join(" ");
  });
  return { lines, passed: rows.length > 0 && rows.every((row) => row.difference <= row.tolerance) };
}

# SPDX-License-Identifier: Apache-2.0
"""Whole layers out of a network: what they cost in accuracy without any training, and what they give.

    .venv/bin/python benchmarks/depth.py [--rounds 40] [--threads N] [--quick] [--untimed] [--write]

MiniLM-L6 fine-tuned on SST-2, fp32, cleaned and fused: one and two layers, and parts of layers, chosen by the error of
the logits or by the similarity of what enters and leaves them, on 96 training sentences. Accuracy is that of dev and
test together; times are taken in turns with the whole network. `--quick` judges on 200 sentences and makes five rounds;
`--untimed` leaves the times out, and everything else does not depend on the machine's load. Needs the model and data
named in `benchmarks/peers/assets.py` (ONNXPRESS_ASSETS says where).

Prediction, before anything was measured: nearly all products are those of the 6 layers, so that each saves 16.7 % of
the multiply-adds, and as the chain of kernels gets shorter by as much, latency follows at every batch size: 1.2 times
faster with one layer gone, 1.5 with two. Accuracy: a network of 6 layers has little to spare, about 1 point for the
first layer and 3 for the second.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from markdown import environment, interval, table, write_section
from peers.assets import find
from peers.environments import Environments
from peers.subjects import SUBJECTS, Feeds, Material, source_of

from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.prune_layers import PruneLayers
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

BATCH = 25
CALIBRATION = 96
VARIANTS: dict[str, dict[str, Any]] = {
    "1 layer, by the outputs' error": {"layers": 1},
    "1 layer, by similarity": {"layers": 1, "importance": "similarity"},
    "2 layers, by the outputs' error": {"layers": 2},
    "2 layers, by similarity": {"layers": 2, "importance": "similarity"},
    "2 parts, by the outputs' error": {"layers": 2, "blocks": "parts"},
    "a third of the multiply-adds, parts or layers": {"multiply_adds": 0.33, "blocks": "any"},
}


@dataclass
class Row:
    """One variant: what is gone, and how the rest does."""

    variant: str
    removed: str
    saved: float
    megabytes: float
    error: float
    accuracy: float
    file: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="200 sentences, five rounds")
    parser.add_argument("--untimed", action="store_true", help="accuracy, bytes and multiply-adds only")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    subject = SUBJECTS["minilm"]
    with tempfile.TemporaryDirectory(prefix="onnxpress-depth-") as name:
        folder = Path(name)
        exported = sources.load(source_of(subject))
        material = subject.material(exported, Environments(folder, options.threads), options.quick)
        assert exported.tokenize is not None
        sentences, labels = judged_on(200 if options.quick else None)
        evaluation = in_batches(sentences, exported.tokenize)
        rows = variants(exported.model, material, folder, options.threads, evaluation, labels)
        rounds = 0 if options.untimed else 5 if options.quick else options.rounds
        times = clock(rows, material, rounds, options.threads) if rounds else {}
    text = table_of(rows, times, len(labels), options.threads, rounds)
    text = f"{text}\n\n{environment(machine(), versions(), ('torch', 'onnxruntime'))}"
    print(text)
    if options.write:
        write_section("depth", text)


def judged_on(limit: int | None) -> tuple[list[str], np.ndarray]:
    """Sentences and labels of dev and test."""
    rows: list[tuple[str, int]] = []
    for file in ("dev.tsv", "test.tsv"):
        lines = (find("data_sst2") / file).read_text("utf-8").splitlines()
        pairs = [line.split("\t") for line in lines]
        rows += [(text, int(label)) for text, label in pairs]
    rows = rows[:: max(1, len(rows) // limit)][:limit] if limit else rows
    return [text for text, _ in rows], np.array([label for _, label in rows])


def in_batches(sentences: Sequence[str], tokenize: Callable[[list[str]], Feeds]) -> list[tuple[np.ndarray, Feeds]]:
    """Sentences of similar length together, padded, with their positions."""
    order = np.argsort([len(text) for text in sentences], kind="stable")
    groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [(group, tokenize([sentences[i] for i in group])) for group in groups]


def padded(samples: Sequence[Feeds]) -> Feeds:
    """Sentences in one batch, zeros behind the shorter ones (in the mask as well)."""
    length = max(feeds["input_ids"].shape[1] for feeds in samples)
    return {
        name: np.concatenate([np.pad(f[name], ((0, 0), (0, length - f[name].shape[1]))) for f in samples])
        for name in samples[0]
    }


def variants(
    model: ir.Model,
    material: Material,
    folder: Path,
    threads: int,
    evaluation: Sequence[tuple[np.ndarray, Feeds]],
    labels: np.ndarray,
) -> list[Row]:
    for step in (Clean(), Fuse(optional=True)):
        model, _ = run_pass(step, model)
    samples = material.calibration[:CALIBRATION]
    calibration = Calibration([padded(samples[i : i + 8]) for i in range(0, len(samples), 8)], threads=threads)
    rows = []
    for number, (variant, fields) in enumerate({"nothing": {}, **VARIANTS}.items()):
        result, removed, saved, error = model.clone(), "–", 0.0, 0.0
        if fields:
            result, report = run_pass(PruneLayers(**fields), result, calibration)
            removed = ", ".join(named(entry) for entry in report.details["removed"])
            saved, error = (report.details[k] for k in ("multiply_adds_saved_percent", "relative_error_at_outputs"))
        file = folder / f"{number}.onnx"
        megabytes = graph_file.write(result, file) / 1e6
        right = accuracy(file, threads, evaluation, labels)
        say(f"{variant}: {removed}; {right:.2f} %")
        rows.append(Row(variant, removed, saved, megabytes, error, right, file))
    return rows


def named(entry: dict[str, Any]) -> str:
    """`3` for a whole layer, `attention 3` for a part."""
    number = next((word for word in entry["block"].split(".") if word.isdigit()), entry["block"])
    return number if entry["kind"] == "layer" else f"{entry['kind']} {number}"


def accuracy(file: Path, threads: int, evaluation: Sequence[tuple[np.ndarray, Feeds]], labels: np.ndarray) -> float:
    """Percent of the sentences whose largest logit is the label's."""
    session = Session(file, threads=threads)
    right = 0
    for group, feeds in evaluation:
        right += int((next(iter(session.run(feeds).values())).argmax(-1) == labels[group]).sum())
    return 100 * right / len(labels)


def clock(rows: Sequence[Row], material: Material, rounds: int, threads: int) -> dict[str, list[str]]:
    """Times faster than the whole network, for every input; everybody takes turns."""
    contenders = [Contender(row.variant, "cpu", Session(row.file, threads=threads).run) for row in rows]
    found = measure(contenders, material.settings, rounds=rounds, max_seconds=180, threads=threads, progress=say)
    times: dict[str, list[str]] = {}
    for measurement in found:
        times.setdefault(measurement.variant, []).append(interval(measurement.ratio_to_reference))
    return times


def table_of(rows: Sequence[Row], times: dict[str, list[str]], count: int, threads: int, rounds: int) -> str:
    columns = ["gone", "which", "accuracy %", "drop", "multiply-adds saved %", "MB", "error of the logits"]
    if times:
        columns += ["1 sentence: x faster (95 %)", "8 x 128 tokens: x faster (95 %)"]
    best = rows[0].accuracy
    lines = [
        (row.variant, row.removed, f"{row.accuracy:.2f}", f"{best - row.accuracy:.2f}", f"{row.saved:.1f}",
         f"{row.megabytes:.1f}", f"{row.error:.3f}", *times.get(row.variant, ()))
        for row in rows
    ]  # fmt: skip
    how = f"; {threads} threads, interleaved, {rounds} rounds" if times else ""
    title = f"**Whole layers out of MiniLM-L6** (SST-2, fp32, no training; accuracy on {count:,} sentences{how})"
    return table(title, columns, lines)


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

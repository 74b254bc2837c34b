# SPDX-License-Identifier: Apache-2.0
"""Low rank and palettes: what accuracy they cost, what they save, and whether anything is faster.

    .venv/bin/python benchmarks/low_rank.py [--models minilm,resnet44] [--quick] [--untimed] [--threads 2] [--write]

Needs the models and data named in `benchmarks/peers/assets.py` (ONNXPRESS_ASSETS says where), and about 15 minutes on 2
cores; nothing is downloaded. Every row is one pass over the cleaned and fused fp32 graph, without any retraining. All
files are timed interleaved in one process, the fp32 file being the reference. `--write` puts the tables into README.md.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markdown import environment, interval, table, write_section
from peers.environments import Environments
from peers.subjects import SUBJECTS, Feeds, Subject, source_of

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.factorize import Factorize
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.share_weights import ShareWeights
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Measurement, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

MODELS = ("minilm", "resnet44")
COLUMNS = ("pass", "accuracy %", "drop", "MB", "parameters saved", "multiply-adds saved", "layers", "load ms", "1: ms",
           "1: x fp32 (95 %)", "8: ms", "8: x fp32 (95 %)", "seconds")  # fmt: skip
_JUDGED = 16
"""Samples of one length that are judged in one run."""


def forms() -> dict[str, Pass]:
    """What is tried; nothing is left out for its error, that is what the table is about."""
    free: dict[str, Any] = {"measure": False, "maximum_error": 1.0}
    found: dict[str, Pass] = {}
    for energy in (0.99, 0.95, 0.9):
        for whiten, name in ((False, "weights"), (True, "outputs")):
            found[f"factorize, energy {energy} of {name}"] = Factorize(energy=energy, whiten=whiten, **free)
    for budget in (0.15, 0.3, 0.5):
        for whiten, name in ((False, "weights"), (True, "outputs")):
            settings = {"rank": "budget", "budget": budget, "whiten": whiten, **free}
            found[f"factorize, budget {budget:.0%}, by {name}"] = Factorize(**settings)
    found["factorize, budget 30%, by outputs, where faster"] = Factorize(rank="budget", maximum_error=1.0)
    for bits in (8, 6, 4, 3, 2):
        found[f"palettes of {bits} bits"] = ShareWeights(bits=bits)  # type: ignore[arg-type]
    for bits in (4, 3, 2):
        found[f"palettes of {bits} bits, sensitive"] = ShareWeights(bits=bits, sensitive=True)  # type: ignore[arg-type]
        settings = {"bits": bits, "sensitive": True, "group_size": 32}
        found[f"palettes of {bits} bits, sensitive, a palette for 32 channels"] = ShareWeights(**settings)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--quick", action="store_true", help="few samples, forms and rounds: does it run at all?")
    parser.add_argument("--untimed", action="store_true", help="accuracy and bytes alone: they do not depend on load")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    tables = []
    for name in options.models.split(","):
        if name not in MODELS:
            raise SystemExit(f"no such model: {name}")
        with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
            comparison = Comparison(SUBJECTS[name], Path(folder), options.threads, options.quick)
            tables.append(comparison.table(0 if options.untimed else 5 if options.quick else options.rounds))
    line = environment(machine(), versions(), ("torch", "onnxruntime")).rstrip(".")
    text = "\n\n".join([*tables, f"{line}; {options.threads} threads."])
    print(text)
    if options.write:
        write_section("low-rank", text)


@dataclass
class Entry:
    """One pass and what became of it."""

    name: str
    file: Path | None = None
    report: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    accuracy: float = 0.0
    load_ms: float = 0.0
    problem: str = ""
    timed: list[Measurement] = field(default_factory=list)


class Comparison:
    """One model in all forms."""

    def __init__(self, subject: Subject, folder: Path, threads: int, quick: bool) -> None:
        say(f"{subject.title}: exporting")
        self.subject, self.folder, self.threads, self.quick = subject, folder, threads, quick
        exported = sources.load(source_of(subject))
        self.material = subject.material(exported, Environments(folder, threads), quick)
        samples = self.material.calibration[: 32 if quick else None]
        self.calibration = Calibration(samples, threads=threads, cache=folder / "statistics")
        model = exported.model
        for settings in (Clean(), Fuse()):
            model, _ = run_pass(settings, model)
        self.plain = folder / "fp32.onnx"
        graph_file.write(model, self.plain)

    def table(self, rounds: int) -> str:
        entries = [Entry("fp32", self.plain)]
        chosen = list(forms().items())
        for name, settings in chosen[:: 5 if self.quick else 1]:
            say(f"{self.subject.title}: {name}")
            entries.append(self.made(name, settings))
        for entry in entries:
            if entry.file is not None:
                say(f"{self.subject.title}: judging {entry.name}")
                session = Session(entry.file, threads=self.threads)
                entry.accuracy, entry.load_ms = self.accuracy(session.run), session.load_ms
        if rounds:
            self.clock([entry for entry in entries if entry.file is not None], rounds)
        shapes = "; ".join(setting.shape for setting in self.material.settings)
        title = f"**{self.subject.title}** ({self.subject.note}; timed on {shapes})"
        return table(title, COLUMNS, [self.row(entry, entries[0]) for entry in entries])

    def made(self, name: str, settings: Pass) -> Entry:
        started = time.perf_counter()
        try:
            model, report = run_pass(settings, graph_file.read(self.plain), self.calibration)
        except OnnxpressError as error:
            return Entry(name, problem=str(error).partition(": ")[2] or str(error))
        seconds = time.perf_counter() - started
        file = self.folder / f"{len(list(self.folder.iterdir()))}.onnx"
        graph_file.write(model, file)
        return Entry(name, file, report.details, seconds)

    def accuracy(self, run: Callable[[Feeds], dict[str, np.ndarray]]) -> float:
        """Percent of the evaluation samples whose largest logit is the label's; samples of one length share a run."""
        groups: dict[tuple[tuple[int, ...], ...], list[tuple[np.ndarray, Feeds]]] = {}
        begin = 0
        for feeds in self.material.evaluation:
            count = len(next(iter(feeds.values())))
            key = tuple(array.shape[1:] for array in feeds.values())
            groups.setdefault(key, []).append((np.arange(begin, begin + count), feeds))
            begin += count
        right = 0
        for members in groups.values():
            for start in range(0, len(members), _JUDGED):
                some = members[start : start + _JUDGED]
                batch = {name: np.concatenate([feeds[name] for _, feeds in some]) for name in some[0][1]}
                answers = next(iter(run(batch).values())).argmax(-1)
                right += int((answers == self.material.labels[np.concatenate([places for places, _ in some])]).sum())
        return 100 * right / len(self.material.labels)

    def clock(self, entries: list[Entry], rounds: int) -> None:
        sessions = [Session(entry.file, threads=self.threads) for entry in entries if entry.file is not None]
        contenders = [Contender(e.name, "cpu", session.run) for e, session in zip(entries, sessions, strict=True)]
        settings = self.material.settings
        found = measure(contenders, settings, rounds=rounds, max_seconds=600, threads=self.threads, progress=say)
        for index, entry in enumerate(entries):
            entry.timed = found[index :: len(entries)]

    def row(self, entry: Entry, reference: Entry) -> tuple[object, ...]:
        if entry.file is None:
            return (entry.name, f"refused: {entry.problem}", *["–"] * (len(COLUMNS) - 2))
        details = entry.report
        shares = [details.get(f"{unit}_saved_percent") for unit in ("parameters", "multiply_adds")]
        changed = details.get("layers_factorized", details.get("palettes"))
        times = [cell for m in entry.timed for cell in (f"{m.latency_ms['p50']:.2f}", interval(m.ratio_to_reference))]
        return (
            entry.name,
            f"{entry.accuracy:.2f}",
            "–" if entry is reference else f"{reference.accuracy - entry.accuracy:.2f}",
            f"{graph_file.file_bytes(entry.file) / 1e6:.2f}",
            *("–" if share is None else f"{share:.1f} %" for share in shares),
            "–" if changed is None else changed,
            f"{entry.load_ms:.0f}" if entry.timed else "–",
            *(times or ["–"] * 4),
            f"{entry.seconds:.1f}" if entry.seconds and entry.timed else "–",
        )


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

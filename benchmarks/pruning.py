# SPDX-License-Identifier: Apache-2.0
"""Structured pruning without training: accuracy against measured latency, with and without repair, and then int8.

    .venv/bin/python benchmarks/pruning.py [--models minilm,resnet44,squeezenet] [--quick] [--threads 2] [--write]

The fp32 graph, cleaned and fused, loses growing shares of its multiply-adds in three ways: `prune_structured`, the same
without the repair, and by the magnitude of the weights alone. All cut graphs are then timed on ONNX Runtime's CPU
provider, taking turns with the graph that was not cut. For MiniLM a second table goes on to int8 and compares with
PyTorch eager fp32. Needs the models and data named in `benchmarks/peers/assets.py` (ONNXPRESS_ASSETS says where), and
about 25 minutes on 2 cores.
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
import torch
from markdown import environment, interval, table, write_section
from peers.assets import find
from peers.environments import Environments
from peers.subjects import SUBJECTS, Feeds, Subject, batches_of, by_shape, joined, source_of

from onnxpress.exporters import graph_file, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.narrow import Narrow
from onnxpress.pipeline.passes.prune_structured import PruneStructured
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Measurement, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

METHODS: dict[str, dict[str, Any]] = {
    "prune_structured": {},
    "without repair": {"repair": False},
    "by magnitude": {"importance": "magnitude", "repair": False, "at_outputs": False},
}
SHARES = {"minilm": (0.2, 0.3, 0.4, 0.5), "resnet44": (0.1, 0.2, 0.3), "squeezenet": (0.05, 0.1, 0.2)}
INT8_SHARES = (0.35, 0.5, 0.6)
Run = Callable[[Feeds], dict[str, np.ndarray]]


@dataclass
class Row:
    """One graph: how right it is and, later, how fast."""

    name: str
    share: str
    right: list[np.ndarray]
    megabytes: float
    file: Path
    timed: Sequence[Measurement] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(SHARES), help=f"some of {', '.join(SHARES)}")
    parser.add_argument("--tables", default="curve,int8", help="some of curve, int8")
    parser.add_argument("--quick", action="store_true", help="few samples and rounds: does it run at all?")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(SHARES):
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rounds = 5 if options.quick else options.rounds
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="onnxpress-pruning-") as folder:
            pruning = Pruning(name, Path(folder), options.threads, options.quick)
            tables = {f"pruning-{name}": pruning.curve(rounds)} if "curve" in options.tables else {}
            if name == "minilm" and "int8" in options.tables:
                tables["pruned-int8"] = pruning.int8(rounds)
        line = environment(machine(), versions(), ("torch", "onnxruntime", "numpy"))
        for section, text in tables.items():
            print(f"{text}\n\n{line}\n", flush=True)
            if options.write:
                write_section(section, f"{text}\n\n{line}")


class Pruning:
    """One model, cut in every way."""

    def __init__(self, name: str, folder: Path, threads: int, quick: bool) -> None:
        self.name, self.folder, self.threads, self.quick = name, folder, threads, quick
        self.subject: Subject = SUBJECTS[name]
        say(f"{self.subject.title}: exporting")
        exported = sources.load(source_of(self.subject))
        assert exported.reference is not None
        self.torch: Run = exported.reference.run
        self.material = self.subject.material(exported, Environments(folder, threads), quick)
        self.model = self.passed(exported.model, Clean(), Fuse(optional=True))
        seen = self.material.calibration[: 32 if quick else None]
        self.calibration = Calibration([joined(seen, group) for group in by_shape(seen)], threads=threads)
        self.sets = [batches_of(self.material.evaluation, self.material.labels)]
        if name == "minilm":
            self.sets.append(_sst2_test(exported, quick))
        self.before = self.judged("not cut", "", self.model)

    def passed(self, model: ir.Model, *passes: Pass) -> ir.Model:
        model = model.clone()
        for settings in passes:
            model, _ = run_pass(settings, model, self.calibration if settings.needs else None)
        return model

    def curve(self, rounds: int) -> str:
        rows = [self.before]
        for method, settings in METHODS.items():
            first = PruneStructured(multiply_adds=0.5, **settings)
            survey = first.survey(self.model, self.calibration)
            for share in SHARES[self.name][:: 3 if self.quick else 1]:
                say(f"{self.subject.title}: {method}, {share:.0%}")
                own = PruneStructured(multiply_adds=share, **settings)
                cut = own.apply(self.model.clone(), own.plan(self.model, self.calibration, survey))
                rows.append(self.judged(method, f"{share:.0%}", cut))
        self.clock(rows, rounds)
        cells = [(r.name, r.share, *self.scores(r), f"{r.megabytes:.1f}", *_ratios(r)) for r in rows]
        columns = ("cut", "multiply-adds saved", *self.titles(), "MB", *self.clocks("uncut"))
        return table(f"**{self.subject.title}** ({self.subject.note})", columns, cells)

    def int8(self, rounds: int) -> str:
        """From PyTorch to the pruned int8 graph."""
        narrowed = self.passed(self.model, Narrow())
        rows = [
            Row("PyTorch eager fp32", "", self.before.right, self.before.megabytes, self.before.file),
            self.judged("ONNX fp32", "", self.model),
            self.judged("narrow", "", narrowed),
            self.judged("int8", "", self.passed(self.model, QuantizeDynamic())),
            self.judged("narrow, int8", "", self.passed(narrowed, QuantizeDynamic())),
        ]
        settings = PruneStructured(multiply_adds=0.5)
        survey = settings.survey(narrowed, self.calibration)
        for share in INT8_SHARES[:: 2 if self.quick else 1]:
            say(f"narrow, prune {share:.0%}, int8")
            own = PruneStructured(multiply_adds=share)
            cut = own.apply(narrowed.clone(), own.plan(narrowed, self.calibration, survey))
            rows.append(self.judged("narrow, pruned", f"{share:.0%}", cut))
            rows.append(self.judged("narrow, pruned, int8", f"{share:.0%}", self.passed(cut, QuantizeDynamic())))
        # In two runs: the more models take turns, the colder each finds the caches
        rounded = [row for row in rows[1:] if "int8" in row.name]
        floats = [row for row in rows[1:] if row not in rounded]
        self.clock([rows[0], *rounded], rounds, reference=self.torch)
        self.clock([rows[0], *floats], rounds, reference=self.torch)
        cells = [(r.name, r.share, *self.scores(r), f"{r.megabytes:.1f}", *_ratios(r)) for r in rows]
        columns = ("form", "pruned", *self.titles(), "MB", *self.clocks("PyTorch"))
        return table("**MiniLM-L6, SST-2: pruned, then int8** (no training)", columns, cells)

    def judged(self, name: str, share: str, model: ir.Model) -> Row:
        file = self.folder / f"{name} {share}.onnx".replace("%", "").replace(",", "").replace(" ", "_")
        size = graph_file.write(model, file)
        run = Session(file, threads=self.threads).run
        right = [
            np.concatenate([next(iter(run(f).values())).argmax(-1) == own for f, own in zip(*data, strict=True)])
            for data in self.sets
        ]
        row = Row(name, share, right, size / 1e6, file)
        say(f"{name} {share}: {', '.join(self.scores(row))}")
        return row

    def titles(self) -> list[str]:
        return ["dev %", "test %", "both: points lost"] if len(self.sets) > 1 else ["accuracy %", "points lost"]

    def scores(self, row: Row) -> list[str]:
        best = getattr(self, "before", row)
        lost = 100 * (np.concatenate(best.right).mean() - np.concatenate(row.right).mean())
        return [*(f"{100 * right.mean():.2f}" for right in row.right), f"{lost:.2f}"]

    def clocks(self, reference: str) -> list[str]:
        one, eight = self.material.settings
        return [f"{shape}: x {reference} (95 %)" for shape in (one.shape, f"{one.shape}, 4 in a row", eight.shape)]

    def clock(self, rows: list[Row], rounds: int, reference: Run | None = None) -> None:
        """Everybody takes turns, the first row being the reference."""
        runs = [Session(row.file, threads=self.threads).run for row in rows]
        if reference is not None:
            runs[0] = reference
        contenders = [Contender(f"{r.name} {r.share}", "cpu", run) for r, run in zip(rows, runs, strict=True)]
        one, eight = self.material.settings
        found = []
        for setting, times, burst in ((one, 8, 1), (one, 8, 4), (eight, 1, 1)):  # batch 1 is short, and varies more
            say(f"timing {setting.shape}, {burst} in a row")
            many = times * rounds
            found += measure(contenders, [setting], rounds=many, max_seconds=120, threads=self.threads, burst=burst)
        for index, row in enumerate(rows):
            row.timed = found[index :: len(rows)]


def _sst2_test(exported: ExportedModel, quick: bool) -> tuple[list[Feeds], list[np.ndarray]]:
    lines = (find("data_sst2") / "test.tsv").read_text("utf-8").splitlines()[: 100 if quick else None]
    rows = [line.split("\t") for line in lines]
    assert exported.tokenize is not None
    tokenize = exported.tokenize
    return batches_of([tokenize([text]) for text, _ in rows], np.array([int(label) for _, label in rows]))


def _ratios(row: Row) -> list[str]:
    return [interval(m.ratio_to_reference) for m in row.timed]


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

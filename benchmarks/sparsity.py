# SPDX-License-Identifier: Apache-2.0
"""Pruned single weights: accuracy, bytes on the disk in each form of storage, and the speed that they do not bring.

    .venv/bin/python benchmarks/sparsity.py [--models minilm,resnet44] [--quick] [--untimed] [--threads 2] [--write]

The fp32 graph, cleaned and fused, is pruned by every method to 50 %, 2:4 and 80 % on 300 samples, judged, and stored
dense, as sparse initializers and as bitmaps. Bitmaps are timed, taking turns with the graph that was not pruned; the
three forms of one graph have to give the same outputs. Needs the models and data named in `benchmarks/peers/assets.py`
(ONNXPRESS_ASSETS says where). `--untimed` leaves the times out; everything else does not depend on the machine's load.
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
from peers.environments import Environments
from peers.subjects import SUBJECTS, Feeds, Subject, batches_of, by_shape, joined, source_of

from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.prune_magnitude import PruneMagnitude
from onnxpress.pipeline.passes.store_sparse import StoreSparse
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime import probe
from onnxpress.runtime.benchmark import Contender, Measurement, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

TARGETS: dict[str, dict[str, Any]] = {"50 %": {"ratio": 0.5}, "2:4": {"pattern": "2:4"}, "80 %": {"ratio": 0.8}}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "magnitude, all layers together": {"scope": "global"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt, front to back": {"method": "sparsegpt", "sequential": True},
}
COLUMNS = ("pruned by", "to", "accuracy %", "drop", "zeros %", "MB dense", "MB sparse", "MB bitmap", "load ms",
           "1: x dense (95 %)", "8: x dense (95 %)")  # fmt: skip


@dataclass
class Row:
    """One pruned graph: its answers, its files and, later, its times."""

    method: str
    target: str
    accuracy: float
    zeros: float
    megabytes: dict[str, float]
    file: Path
    timed: Sequence[Measurement] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="minilm,resnet44", help=f"some of {', '.join(SUBJECTS)}")
    parser.add_argument("--quick", action="store_true", help="few samples and rounds: does it run at all?")
    parser.add_argument("--untimed", action="store_true", help="accuracy and bytes only")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(SUBJECTS):
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rounds = 0 if options.untimed else 5 if options.quick else options.rounds
    tables = []
    for name in chosen:
        with tempfile.TemporaryDirectory(prefix="onnxpress-sparsity-") as folder:
            tables.append(Pruning(SUBJECTS[name], Path(folder), options.threads, options.quick).table(rounds))
    text = "\n\n".join([*tables, environment(machine(), versions(), ("torch", "onnxruntime", "numpy"))])
    print(text)
    if options.write:
        write_section("sparsity", text)


class Pruning:
    """One model, pruned in every way."""

    def __init__(self, subject: Subject, folder: Path, threads: int, quick: bool) -> None:
        say(f"{subject.title}: exporting")
        self.subject, self.folder, self.threads, self.quick = subject, folder, threads, quick
        exported = sources.load(source_of(subject))
        self.material = subject.material(exported, Environments(folder, threads), quick)
        model = exported.model
        for settings in (Clean(), Fuse(optional=True)):
            model, _ = run_pass(settings, model)
        self.plain = folder / "dense.onnx"
        graph_file.write(model, self.plain)
        seen = self.material.calibration[: 32 if quick else None]
        self.calibration = Calibration([joined(seen, group) for group in by_shape(seen)], threads=threads)
        self.batches, self.labels = batches_of(self.material.evaluation, self.material.labels)

    def table(self, rounds: int) -> str:
        best = self.accuracy(self.plain)
        rows = []
        for target, how in TARGETS.items():
            for method, settings in METHODS.items():
                if not ("pattern" in how and "scope" in settings):
                    rows.append(self.pruned(method, target, PruneMagnitude(**settings, **how)))
        reference = self.clock(rows, rounds) if rounds else ()
        size = f"{graph_file.file_bytes(self.plain) / 1e6:.2f}"
        first = ("nothing", "", f"{best:.2f}", "–", "–", size, "–", "–", *cells(reference))
        lines: list[tuple[object, ...]] = [first]
        for row in rows:
            megabytes = (f"{row.megabytes[form]:.2f}" for form in ("dense", "sparse", "bitmap"))
            judged = (f"{row.accuracy:.2f}", f"{best - row.accuracy:.2f}", f"{row.zeros:.1f}")
            lines.append((row.method, row.target, *judged, *megabytes, *cells(row.timed)))
        shapes = "; ".join(setting.shape for setting in self.material.settings)
        return table(f"**{self.subject.title}** ({self.subject.note}; timed on {shapes})", COLUMNS, lines)

    def pruned(self, method: str, target: str, settings: PruneMagnitude) -> Row:
        say(f"{self.subject.title}: {method}, {target}")
        model, report = run_pass(settings, graph_file.read(self.plain), self.calibration if settings.needs else None)
        megabytes, files = {}, {}
        for form in ("dense", "sparse", "bitmap"):
            files[form] = self.folder / f"{method} {target} {form}.onnx".replace("%", "percent")
            stored = self.stored(model.clone(), form)
            megabytes[form] = graph_file.write(stored, files[form]) / 1e6
        outputs = [next(iter(self.session(file)(self.batches[0]).values())) for file in files.values()]
        if not all(np.array_equal(outputs[0], other) for other in outputs):
            raise SystemExit(f"{method}, {target}: the forms of storage do not give the same outputs")
        accuracy = self.accuracy(files["dense"])
        say(f"{self.subject.title}: {method}, {target}: {accuracy:.2f} % in {report.seconds:.0f} s")
        return Row(method, target, accuracy, report.details["sparsity_percent"], megabytes, files["bitmap"])

    @staticmethod
    def stored(model: ir.Model, form: str) -> ir.Model:
        if form == "dense":
            return model
        return run_pass(StoreSparse(form=form, optional=True), model)[0]  # type: ignore[arg-type]

    def session(self, file: Path) -> Callable[[Feeds], dict[str, np.ndarray]]:
        return Session(file, threads=self.threads).run

    def accuracy(self, file: Path) -> float:
        """Percent of the evaluation samples whose largest logit is the label's."""
        run = self.session(file)
        right = [
            next(iter(run(feeds).values())).argmax(-1) == own
            for feeds, own in zip(self.batches, self.labels, strict=True)
        ]
        return float(100 * np.mean(np.concatenate(right)))

    def clock(self, rows: list[Row], rounds: int) -> list[Measurement]:
        """Everybody takes turns; return the times of the dense graph, and leave the others' in their rows."""
        files, settings, one = [self.plain, *(row.file for row in rows)], self.material.settings, self.folder / "1.npz"
        np.savez(one, **settings[0].feeds[0])  # type: ignore[arg-type]
        contenders = [
            Contender(file.stem, "cpu", self.session(file), probe.command(file, one, threads=self.threads))
            for file in files
        ]
        found = measure(contenders, settings, rounds=rounds, max_seconds=300, threads=self.threads, progress=say)
        by_setting = [found[i : i + len(files)] for i in range(0, len(found), len(files))]
        for index, row in enumerate(rows):
            row.timed = [measured[index + 1] for measured in by_setting]
        return [measured[0] for measured in by_setting]


def cells(measured: Sequence[Measurement]) -> list[str]:
    if not measured:
        return ["–"] * 3
    load = measured[0].load_ms
    return ["–" if load is None else f"{load:.0f}", *(interval(m.ratio_to_reference) for m in measured)]


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

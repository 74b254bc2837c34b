# SPDX-License-Identifier: Apache-2.0
"""int8 by onnxpress, by ONNX Runtime's quantizers and by NNCF: same file, same data, two engines.

    .venv/bin/python benchmarks/int8_peers.py [--models resnet20,minilm] [--quick] [--threads 2] [--rounds 20] [--write]

Needs the models and data named in `benchmarks/peers/assets.py` (ONNXPRESS_ASSETS says where), a package index for the
peers' own environments (700 MB, deleted afterwards unless --workdir or --keep says otherwise), and about 40 minutes on
2 cores. Our exporter writes each fp32 file once, cleaned and not fused, and everybody quantizes that file. Every result
is then judged and timed on ONNX Runtime's CPU provider and on OpenVINO (float32 stays float32 on both), in one process,
taking turns, PyTorch eager fp32 being the reference. `--write` puts the tables into README.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from markdown import environment, interval, table, write_section
from peers.environments import PACKAGES, Attempt, Environments
from peers.subjects import SUBJECTS, Feeds, Material, Subject, source_of, write_dataset, write_samples

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.data import load_dataset
from onnxpress.pipeline.metrics import tensor_errors
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.pressing import press
from onnxpress.pipeline.recipe import built_in, load_recipe
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Measurement, measure
from onnxpress.runtime.kernels import executed_kernels
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

RECIPES = ("int8-dynamic", "int8-static", "int8-openvino")
"""Ours, as far as they are built in."""

ENGINES = {"cpu": "ONNX Runtime", "openvino": "OpenVINO"}
COLUMNS = ("int8 by", "on", "accuracy %", "drop", "MB", "products in int8", "1: ms", "1: x PyTorch (95 %)", "8: ms",
           "8: x PyTorch (95 %)", "seconds")  # fmt: skip
_PRODUCT = re.compile(r"MatMul|Gemm|Conv(?!ert)|FullyConnected|Attention")

Run = Callable[[Feeds], dict[str, np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(SUBJECTS), help=f"some of {', '.join(SUBJECTS)}")
    parser.add_argument("--quick", action="store_true", help="few samples and rounds: does it run at all?")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--workdir", type=Path, help="where to make the environments and files; kept")
    parser.add_argument("--keep", action="store_true", help="keep the folder and say where it is")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    chosen = options.models.split(",")
    if unknown := set(chosen) - set(SUBJECTS):
        raise SystemExit(f"no such model: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    folder = options.workdir or Path(tempfile.mkdtemp(prefix="onnxpress-peers-"))
    folder.mkdir(parents=True, exist_ok=True)
    rounds = 5 if options.quick else options.rounds
    try:
        environments = Environments(folder, options.threads)
        tables = [Comparison(SUBJECTS[name], environments, options.quick).table(rounds) for name in chosen]
    finally:
        if options.keep or options.workdir:
            say(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    line = environment(machine(), versions(), ("torch", "onnxruntime", "openvino"))
    peers = f"NNCF {PACKAGES['nncf'][0].partition('==')[2]}; {options.threads} threads."
    text = "\n\n".join([*tables, f"{line.rstrip('.')}, {peers}"])
    print(text)
    if options.write:
        write_section("int8-peers", text)


@dataclass
class Entry:
    """One file on one engine."""

    tool: str
    provider: str
    attempt: Attempt
    run: Run | None = None
    problem: str = ""
    judged: str = "–"
    drop: str = "–"
    products: str = "–"
    timed: list[Measurement] = field(default_factory=list)


class Comparison:
    """One model, everybody's int8 of it, and both engines."""

    def __init__(self, subject: Subject, environments: Environments, quick: bool) -> None:
        say(f"{subject.title}: exporting")
        self.subject, self.environments, self.threads = subject, environments, environments.threads
        self.folder = Path(tempfile.mkdtemp(prefix="model-", dir=environments.folder))
        exported = sources.load(source_of(subject))
        assert exported.reference is not None
        self.torch: Run = exported.reference.run
        self.material: Material = subject.material(exported, environments, quick)
        if quick:
            del self.material.calibration[32:]
        self.plain = self.folder / "fp32.onnx"
        graph_file.write(run_pass(Clean(), exported.model)[0], self.plain)
        self.samples = write_samples(self.material.calibration, self.folder / "samples.npz")
        self.dataset = write_dataset(self.material.calibration, self.folder / "calibration.npz")
        self.wanted = self.torch(self.material.settings[0].feeds[0])
        self.best = self.accuracy(self.torch)

    def table(self, rounds: int) -> str:
        entries = [
            self.entry(tool, provider, made)
            for tool, made in self.files().items()
            for provider in (ENGINES if made.file else ("",))
        ]
        for entry in entries:
            self.judge(entry)
        reference = self.clock(entries, rounds)
        first = ("fp32", "PyTorch", "–" if self.best is None else f"{self.best:.2f}", "–", "–", "–")
        rows: list[tuple[object, ...]] = [(*first, *times(reference), "–"), *(self.row(entry) for entry in entries)]
        shapes = "; ".join(setting.shape for setting in self.material.settings)
        notes = {f"{entry.tool}: {cell(entry.attempt.note)}." for entry in entries if entry.attempt.note}
        shutil.rmtree(self.folder, ignore_errors=True)
        entries.clear()
        gc.collect()
        title = f"**{self.subject.title}** ({self.subject.note}; timed on {shapes})"
        return "\n\n".join([table(title, COLUMNS, rows), *sorted(notes)])

    # ------------------------------------------------------------------------------------------------- quantizing

    def files(self) -> dict[str, Attempt]:
        """Tool -> what it made of the fp32 file."""
        made = {"not quantized": Attempt(self.plain, None)}
        for name in RECIPES:
            if name in built_in():
                say(f"{self.subject.title}: {name}")
                made[f"onnxpress {name}"] = self.ours(name)
        text = self.subject.transformer
        script, kinds = "quantize_onnxruntime.py", {"static": "quantize_static"}
        if text:
            kinds = {"dynamic": "quantize_dynamic", **kinds, "static-weights": "quantize_static, weights alone"}
        for method, label in kinds.items():
            made[f"ONNX Runtime {label}"] = self.peer("onnxruntime", script, method)
        made["NNCF"] = self.peer("nncf", "quantize_nncf.py", "transformer" if text else "convolution")
        return made

    def peer(self, name: str, script: str, method: str) -> Attempt:
        say(f"{self.subject.title}: {name} {method}")
        out = self.folder / f"{name}_{method}.onnx"
        return self.environments.quantize(name, script, method, self.plain, self.samples, out)

    def ours(self, name: str) -> Attempt:
        """A press of the fp32 file; the seconds are those of the passes, calibration among them."""
        words = [f"calibration.examples={len(self.material.calibration)}", f"benchmark.threads={self.threads}"]
        recipe = load_recipe(name, [*words, "benchmark.rounds=5", "benchmark.max_seconds=0.1"])
        recipe = recipe.model_copy(update={"gates": ()})  # the tables judge
        measures = any(settings.needs for settings in recipe.built_passes())
        try:
            outcome = press(
                str(self.plain),
                recipe,
                self.folder / name,
                calibration=load_dataset(str(self.dataset)) if measures else None,
                provider="openvino" if name.endswith("openvino") else "cpu",
            )
        except OnnxpressError as error:
            return Attempt(None, None, str(error))
        file = self.folder / name / outcome.manifest["variants"][name]["path"]
        return Attempt(file, sum(report["seconds"] for report in outcome.manifest["passes"]))

    # --------------------------------------------------------------------------------------------------- judging

    def entry(self, tool: str, provider: str, made: Attempt) -> Entry:
        entry = Entry(tool, provider, made, problem=made.problem)
        if made.file is None:
            return entry
        try:
            entry.run = Session(made.file, provider=provider, threads=self.threads).run
            kernels = [k for k in executed_kernels(made.file, provider, self.threads) if _PRODUCT.search(k.op)]
            entry.products = f"{sum(k.integer for k in kernels)} of {len(kernels)}"
        except OnnxpressError as error:
            entry.run, entry.problem = None, str(error)
        return entry

    def judge(self, entry: Entry) -> None:
        if entry.run is None:
            return
        say(f"{self.subject.title}: judging {entry.tool} on {ENGINES[entry.provider]}")
        try:
            accuracy = self.accuracy(entry.run)
            if accuracy is not None and self.best is not None:
                entry.judged, entry.drop = f"{accuracy:.2f}", f"{self.best - accuracy:.2f}"
                return
            found = entry.run(self.material.settings[0].feeds[0])
        except OnnxpressError as error:
            entry.run, entry.problem = None, str(error)
            return
        name = next(iter(self.wanted))
        entry.judged = f"{tensor_errors(self.wanted[name], found[name])['sqnr_db']:.1f} dB"

    def accuracy(self, run: Run) -> float | None:
        """Percent of the evaluation samples whose largest logit is the label's."""
        if not self.material.evaluation:
            return None
        answers = [next(iter(run(feeds).values())).argmax(-1) for feeds in self.material.evaluation]
        return float(100 * np.mean(np.concatenate(answers) == self.material.labels))

    def clock(self, entries: list[Entry], rounds: int) -> list[Measurement]:
        """Everybody takes turns; return PyTorch's times, and leave the others' in their entries."""
        ready = [entry for entry in entries if entry.run is not None]
        contenders = [Contender("PyTorch", "pytorch", self.torch)]
        contenders += [Contender(entry.tool, entry.provider, entry.run) for entry in ready if entry.run is not None]
        settings = self.material.settings
        found = measure(contenders, settings, rounds=rounds, max_seconds=600, threads=self.threads, progress=say)
        by_setting = [found[i : i + len(contenders)] for i in range(0, len(found), len(contenders))]
        for index, entry in enumerate(ready):
            entry.timed = [row[index + 1] for row in by_setting]
        return [row[0] for row in by_setting]

    def row(self, entry: Entry) -> tuple[object, ...]:
        head = (entry.tool, ENGINES.get(entry.provider, "–"))
        if entry.run is None or entry.attempt.file is None:
            return (*head, f"fails: {cell(entry.problem)}", *["–"] * (len(COLUMNS) - 3))
        size = f"{graph_file.file_bytes(entry.attempt.file) / 1e6:.2f}"
        seconds = "–" if entry.attempt.seconds is None else f"{entry.attempt.seconds:.1f}"
        return (*head, entry.judged, entry.drop, size, entry.products, *times(entry.timed), seconds)


def times(measured: list[Measurement]) -> list[str]:
    return [part for m in measured for part in (f"{m.latency_ms['p50']:.2f}", interval(m.ratio_to_reference))]


def cell(text: str) -> str:
    return re.sub(r"\S*/\S*/", "…/", text).replace("|", "/")


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Computing only the token that is read: what `narrow` saves on a classifier in the manner of BERT.

    .venv/bin/python benchmarks/narrow.py [--rounds 40] [--threads N] [--quick] [--write]

MiniLM-L6 fine-tuned on SST-2 where ONNXPRESS_ASSETS has it, else BERT-base with random weights; fp32 and dynamic int8,
each with and without the pass, at 1 x own length and 8 x 128 tokens (random tokens: 1 x 128). `--quick` makes five
rounds.

Prediction, before anything was measured: of the last of L layers only keys and values are computed for all tokens, 2
of its 12 units of width squared (query, key, value, output: 1 each; the network: 8), so that at many tokens 5 / 6 of
one layer are saved: 1 - 5 / (6 L) of the multiply-adds of the products with weights remain, 86 % at 6 layers and 93 %
at 12. These products are most of the time, and the kernels of attention and the normalizations shrink with them: 1.16
times faster at 6 layers, 1.07 at 12, in fp32 and int8 alike; less for short inputs, where a call has its fixed cost.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
from markdown import environment, interval, table, write_section
from peers.assets import ASSETS
from peers.environments import Environments
from peers.subjects import SUBJECTS, Material, Subject, source_of

from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.narrow import Narrow
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

Feeds = dict[str, np.ndarray]
VARIANTS: dict[str, tuple[Pass, ...]] = {
    "fp32": (),
    "fp32, narrow": (Narrow(),),
    "int8": (QuantizeDynamic(),),
    "int8, narrow": (Narrow(), QuantizeDynamic()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="five rounds")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    present = (ASSETS / "minilm-sst2").is_dir() and (ASSETS / "data_sst2").is_dir()
    subject = SUBJECTS["minilm" if present else "bert-base"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = sources.load(source_of(subject))
        material = subject.material(exported, Environments(folder, options.threads), options.quick)
        models = pressed(exported.model)
        rounds = 5 if options.quick else options.rounds
        text = table_of(subject, material, models, folder, rounds, options.threads)
    text = f"{text}\n\n{environment(machine(), versions(), ('torch', 'onnxruntime'))}"
    print(text)
    if options.write:
        write_section("narrow", text)


def pressed(model: ir.Model) -> dict[str, ir.Model]:
    """The same graph in every variant."""
    for settings in (Clean(), Fuse()):
        model, _ = run_pass(settings, model)
    made = {}
    for variant, passes in VARIANTS.items():
        result = model.clone()
        for settings in passes:
            result, _ = run_pass(settings, result)
        made[variant] = result
    return made


def table_of(
    subject: Subject, material: Material, models: dict[str, ir.Model], folder: Path, rounds: int, threads: int
) -> str:
    sessions = {}
    for number, (variant, model) in enumerate(models.items()):
        file = folder / f"variant_{number}.onnx"
        graph_file.write(model, file)
        sessions[variant] = Session(file, threads=threads)
    differences = {variant: difference(sessions, variant, material) for variant in VARIANTS}
    rows = []
    for kind in ("fp32", "int8"):
        pair = [kind, f"{kind}, narrow"]
        contenders = [Contender(variant, "cpu", sessions[variant].run) for variant in pair]
        found = measure(contenders, material.settings, rounds=rounds, max_seconds=60, threads=threads, progress=say)
        for m, setting in zip(found, [s for s in material.settings for _ in pair], strict=True):
            # Counted before quantizing, which changes no size
            work = products(models[m.variant.replace("int8", "fp32")], setting.feeds[0]) / 1e6
            times = (f"{m.latency_ms['p50']:.2f}", f"{m.latency_ms['min']:.2f}")
            rows.append(
                (m.shape, m.variant, f"{work:.1f}", *times, interval(m.ratio_to_reference), differences[m.variant])
            )
    columns = ("input", "", "million multiply-adds", "p50 ms", "min ms", "x without narrow (95 %)")
    title = f"**The last layer for one token** ({subject.title}; {threads} threads, interleaved, {rounds} rounds)"
    return table(title, (*columns, "largest difference of a logit to fp32"), rows)


def products(model: ir.Model, feeds: Feeds) -> int:
    """Multiply-adds of the products with weights; the kernels of attention are not counted."""
    shapes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    return sum(multiply_adds(model, shapes).values())


def difference(sessions: dict[str, Session], variant: str, material: Material) -> str:
    """The largest difference of a logit to fp32 without the pass, over the inputs that are timed."""
    largest = 0.0
    for feeds in (feeds for setting in material.settings for feeds in setting.feeds):
        wanted, got = sessions["fp32"].run(feeds), sessions[variant].run(feeds)
        largest = max(largest, *(float(np.abs(wanted[name] - got[name]).max()) for name in wanted))
    return f"{largest:.1e}" if largest else "0"


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What `fuse` makes of each family's graph, against onnxscript's and ONNX Runtime's own optimizers; and rule by rule.

    .venv/bin/python benchmarks/fusion.py [--quick] [--models bert,llama] [--rounds 40] [--threads 2] [--write]

Models with random weights, 4 layers of width 768 (T5: 512), exported with dynamo at opset 20, and stories260K where the
assets are there; about 5 minutes on 2 cores, most of it exporting. Every graph is run by ONNX Runtime with its own
fusions at load time switched on, as they are by default: they are part of each row, the first included. The peers are
onnxscript's `optimize_for_ort` and `onnxruntime.transformers.optimizer`, called as their documentation shows. `--quick`
takes tiny models and few rounds, to see that everything runs; `--write` puts the tables into README.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fusion_models
import numpy as np
import onnx_ir as ir
import torch
from fusion_rules import rule_table
from markdown import environment, interval, table, write_section

from onnxpress.exporters import graph_file
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Setting, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

PLAIN, OURS, IN_PLACE = "cleaned only", "onnxpress", "onnxpress, `grouped_query`"
MODEL_TYPES = {"bert": "bert", "modernbert": "bert", "vit": "vit", "t5_encoder": "t5", "t5_decoder": "t5"}
"""What ONNX Runtime's optimizer calls an architecture; decoders are `gpt2` there."""


@dataclass
class Variant:
    """What one tool made of one graph: a file, or the first line of its error."""

    name: str
    file: Path | None = None
    nodes: int = 0
    problem: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(fusion_models.MODELS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="tiny models, few rounds: only to see that it runs")
    parser.add_argument("--write", action="store_true", help="replace the tables in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rounds = 6 if options.quick else options.rounds
    rows: list[tuple[object, ...]] = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows += architecture(name, Path(folder), options.quick, rounds, options.threads)
        gc.collect()
    columns = ("architecture", "tool", "nodes", "input", "p50 ms", "x cleaned only (95 %)", "largest difference")
    text = "\n\n".join(
        [
            table("**Fusing, by architecture**", columns, rows),
            rule_table(rounds * 3, options.threads, quick=options.quick),
            environment(machine(), versions(), ("torch", "onnx", "onnxruntime", "onnxscript", "transformers")),
        ]
    )
    print(text)
    if options.write:
        write_section("fusion", text)


def architecture(name: str, folder: Path, quick: bool, rounds: int, threads: int) -> list[tuple[object, ...]]:
    """The rows of one architecture: every tool's graph on every input."""
    say(f"exporting {name}")
    try:
        subject = fusion_models.build(name, tiny=quick)
    except SystemExit as missing:
        say(str(missing))
        return []
    source = folder / "cleaned.onnx"
    model, _ = run_pass(Clean(), subject.export())
    graph_file.write(model, source)
    wanted = {key: subject.expected(feeds) for key, feeds in subject.settings.items()}
    variants = [made(tool, how, source, folder, subject) for tool, how in tools(name, subject).items()]
    sessions = {v.name: Session(v.file, threads=threads) for v in variants if v.file is not None}
    rows: list[tuple[object, ...]] = []
    for key, feeds in subject.settings.items():
        times = measured(sessions, key, feeds, rounds, threads)
        for variant in variants:
            if variant.file is None:
                rows.append((name, variant.name, "", key, variant.problem, "", ""))
                continue
            p50, ratio = times[variant.name]
            difference = largest_difference(sessions[variant.name], feeds, wanted[key])
            rows.append((name, variant.name, variant.nodes, key, f"{p50:.2f}", ratio, f"{difference:.0e}"))
    return rows


def tools(name: str, subject: fusion_models.Subject) -> dict[str, Callable[[Path, Path], None]]:
    found = {PLAIN: copied, OURS: fused_by(Fuse(optional=True)), "onnxscript": onnxscript_fuse}
    found["onnxruntime.transformers"] = ort_fuse(MODEL_TYPES.get(name, "gpt2"), subject)
    if "past_key_values.0.key" in subject.example and name != "t5_decoder":
        found[IN_PLACE] = fused_by(Fuse(grouped_query=True))
    return found


def made(
    name: str, how: Callable[[Path, Path], None], source: Path, folder: Path, subject: fusion_models.Subject
) -> Variant:
    """Run a tool, load and run what it wrote, and keep its error if it has one."""
    say(f"  {name}")
    target = folder / f"{len(list(folder.iterdir()))}.onnx"
    try:
        how(source, target)
        for feeds in subject.settings.values():
            run(Session(target, threads=1), feeds)
        return Variant(name, target, sum(1 for _ in ir.load(target).graph.all_nodes()))
    except Exception as error:  # noqa: BLE001 - the error of a peer is a result here
        first = (" ".join(str(error).split()) or type(error).__name__).replace("|", "/")
        return Variant(name, problem=f"fails: {type(error).__name__}: {first[:80]}")


def measured(
    sessions: Mapping[str, Session], key: str, feeds: fusion_models.Feeds, rounds: int, threads: int
) -> dict[str, tuple[float, str]]:
    """Variant -> median milliseconds, and how many times as fast as the graph that was only cleaned."""
    contenders = [Contender(name, "cpu", partial(run, session)) for name, session in sessions.items()]
    setting = Setting(key, 1, key, [feeds])
    found = measure(contenders, [setting], rounds=rounds, max_seconds=60, threads=threads, burst=2, progress=say)
    return {m.variant: (m.latency_ms["p50"], interval(m.ratio_to_reference)) for m in found}


def largest_difference(session: Session, feeds: fusion_models.Feeds, wanted: list[np.ndarray]) -> float:
    """Between any output and PyTorch's."""
    found = run(session, feeds)
    return max(float(np.abs(a - b).max()) for a, b in zip(found.values(), wanted, strict=True) if a.size)


def run(session: Session, feeds: fusion_models.Feeds) -> dict[str, np.ndarray]:
    """A tool may have dropped an input that nothing reads: T5's decoder does without the encoder's output."""
    return session.run({spec.name: feeds[spec.name] for spec in session.signature.inputs})


def copied(source: Path, target: Path) -> None:
    graph_file.write(graph_file.read(source), target)


def fused_by(settings: Fuse) -> Callable[[Path, Path], None]:
    def fuse(source: Path, target: Path) -> None:
        model, _ = run_pass(settings, graph_file.read(source))
        graph_file.write(model, target)

    return fuse


def onnxscript_fuse(source: Path, target: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model, _ = optimize_for_ort(ir.load(source))
    ir.save(model, target)


def ort_fuse(model_type: str, subject: fusion_models.Subject) -> Callable[[Path, Path], None]:
    config: Any = subject.config
    heads = getattr(config, "num_attention_heads", None) or config.num_heads

    def fuse(source: Path, target: Path) -> None:
        from onnxruntime.transformers import optimizer

        fused = optimizer.optimize_model(
            str(source), model_type=model_type, num_heads=heads, hidden_size=config.hidden_size, opt_level=0
        )
        fused.save_model_to_file(str(target))

    return fuse


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    main()

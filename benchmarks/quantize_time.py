# SPDX-License-Identifier: Apache-2.0
"""BERT-base, random weights: seconds and peak memory of each quantizer, beside the time of as many forward passes.

    .venv/bin/python benchmarks/quantize_time.py [--samples 64] [--threads 2] [--write]

Needs the development environment alone. The graph is exported, cleaned and fused once; each quantizer then runs in a
process of its own that reads the file, runs the pass and writes the result. Seconds are those of the pass; the peak is
that of the whole process, and in brackets what it is above a process that has only imported everything. Samples are
sequences of 128 tokens, eight a batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from markdown import environment, table, write_section

from onnxpress.contracts.process import peak_rss_mib
from onnxpress.exporters import graph_file
from onnxpress.pipeline.passes.base import pass_named, run_pass
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "quantize_dynamic": ("quantize_dynamic", {}),
    "quantize_static, minmax": ("quantize_static", {"ranges": "minmax"}),
    "quantize_static, mse": ("quantize_static", {"ranges": "mse"}),
    "smooth": ("smooth", {}),
    "quantize_weights, int4 g32 rtn": ("quantize_weights", {"bits": 4, "group_size": 32, "method": "rtn"}),
    "quantize_weights, int4 g32 gptq": ("quantize_weights", {"bits": 4, "group_size": 32, "method": "gptq"}),
}
WIDTH, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--child", nargs=2, metavar=("PASS", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, file = options.child
        print(json.dumps(child(name, Path(file), options.samples, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = export(Path(folder) / "bert.onnx")
        text = tables(file, options.samples, options.threads)
    print(text)
    if options.write:
        write_section("quantize-time", text)


def tables(file: Path, samples: int, threads: int) -> str:
    size = file.stat().st_size / 2**20
    forward = spawn("forward", file, samples, threads)["seconds"]
    idle = spawn("nothing", file, samples, threads)["mib"]
    rows = [["one forward pass a sample", f"{forward:.1f}", "", "", ""]]
    for name in PASSES:
        found = spawn(name, file, samples, threads)
        above = found["mib"] - idle
        rows.append([
            name, f"{found['seconds']:.1f}", f"{found['seconds'] / forward * samples:.0f}",
            f"{found['mib']:.0f} ({above:.0f})", f"{above / size:.1f} x",
        ])  # fmt: skip
    title = f"BERT-base ({size:.0f} MiB), {samples} samples of {WIDTH} tokens, {threads} threads."
    columns = ["", "seconds", "in forward passes", "peak MiB (above imports)", "above imports / model file"]
    return table(title, columns, rows) + "\n\n" + environment(machine(), versions(), ("onnxruntime", "numpy"))


def spawn(name: str, file: Path, samples: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, str(file)]
    command += ["--samples", str(samples), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(name: str, file: Path, samples: int, threads: int) -> dict[str, float]:
    data = batches(samples)
    if name == "nothing":
        import onnxruntime  # noqa: F401 - what every other child has loaded

        return {"seconds": 0.0, "mib": peak_rss_mib()}
    if name == "forward":
        session = Session(file, threads=threads)
        session.run(data[0])
        started = time.perf_counter()
        for batch in data:
            session.run(batch)
        return {"seconds": time.perf_counter() - started, "mib": peak_rss_mib()}
    kind, settings = PASSES[name]
    model = graph_file.read(file)
    started = time.perf_counter()
    pressed, _ = run_pass(pass_named(kind).model_validate(settings), model, Calibration(data, threads=threads))
    seconds = time.perf_counter() - started
    graph_file.write(pressed, file.with_name("pressed.onnx"))
    return {"seconds": seconds, "mib": peak_rss_mib()}


def batches(samples: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": rng.integers(0, 30522, (BATCH, WIDTH)),
            "attention_mask": np.ones((BATCH, WIDTH), np.int64),
            "token_type_ids": np.zeros((BATCH, WIDTH), np.int64),
        }
        for _ in range(samples // BATCH)
    ]


def bert() -> tuple[Any, dict[str, Any], dict[str, dict[int, str]]]:
    """The factory: BERT-base for classification with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = BertForSequenceClassification(BertConfig(attn_implementation="eager")).eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(input_ids, attention_mask, token_type_ids).logits

    inputs = {name: torch.ones(2, 9, dtype=torch.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    return Logits(), inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}


def export(file: Path) -> Path:
    from onnxpress.exporters import sources
    from onnxpress.exporters.settings import ExportSettings

    model = sources.load("quantize_time:bert", None, ExportSettings()).model
    for kind in ("clean", "fuse"):
        model, _ = run_pass(pass_named(kind)(), model)
    graph_file.write(model, file)
    return file


if __name__ == "__main__":
    main()

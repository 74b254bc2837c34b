# SPDX-License-Identifier: Apache-2.0
"""How much processor time each engine burns after a run has returned: what its neighbours pay for.

    .venv/bin/python benchmarks/idle_threads.py [MODEL.onnx] [--threads N] [--rounds 30]

MODEL defaults to the demo's bundle (`make demo`) and has int64 inputs alone. Counted is the processor time of this
process while it sleeps for 100 ms after a run, so that other programs on the machine do not matter. See
`benchmarks/spinning.py` for what it does to latencies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from onnxpress.runtime.machine import default_threads
from onnxpress.runtime.session import Session

DEMO = Path(__file__).parents[1] / "artifacts" / "demo" / "onnx" / "model_quantized.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    print("engine | processor ms in the 100 ms after a run, median | most\n---|---|---")
    for name, run in contenders(options.model, options.threads).items():
        burnt = [after(run) for _ in range(options.rounds + 3)][3:]
        print(f"{name} | {statistics.median(burnt):.2f} | {max(burnt):.2f}")


def contenders(model: Path, threads: int) -> dict[str, Callable[[], object]]:
    """One run of 64 tokens on each engine, and a product of PyTorch's."""
    torch.set_num_threads(threads)
    stopping, openvino = Session(model, threads=threads), Session(model, provider="openvino", threads=threads)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    plain = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    feeds = {spec.name: np.ones((1, 64), np.int64) for spec in stopping.signature.inputs}
    matrix = torch.ones(512, 512)
    return {
        "ONNX Runtime, as it comes": lambda: plain.run(None, feeds),
        "ONNX Runtime, as onnxpress sets it": lambda: stopping.run(feeds),
        "OpenVINO, as onnxpress sets it": lambda: openvino.run(feeds),
        "PyTorch": lambda: matrix @ matrix,
    }


def after(run: Callable[[], object]) -> float:
    """Milliseconds of processor time that this process uses in the 100 ms after a run."""
    run()
    before = time.process_time()
    time.sleep(0.1)
    return 1000 * (time.process_time() - before)


if __name__ == "__main__":
    main()

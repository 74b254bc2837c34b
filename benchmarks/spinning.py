# SPDX-License-Identifier: Apache-2.0
"""What idle threads of one ONNX Runtime session cost the next one, when sessions take turns on the same cores.

    .venv/bin/python benchmarks/spinning.py [MODEL.onnx] [--threads N] [--rounds 20]

MODEL defaults to the demo's bundle (`make demo`). One and three sessions of it take turns, once with ONNX Runtime's
default (threads spin for a while after a call returns) and once with `session.force_spinning_stop`, which is how
onnxpress measures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnxpress.runtime.machine import default_threads

DEMO = Path(__file__).parents[1] / "artifacts" / "demo" / "onnx" / "model_quantized.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    print("sessions | threads stop spinning | p50 ms of the first | min ms\n---|---|---|---")
    for count in (1, 3):
        for stop in (False, True):
            times = turns(options.model, options.threads, options.rounds, count, stop)
            print(f"{count} | {'yes' if stop else 'no'} | {statistics.median(times):.2f} | {min(times):.2f}")


def turns(model: Path, threads: int, rounds: int, count: int, stop: bool) -> list[float]:
    """Milliseconds of the first of `count` sessions that take turns on one input of 128 tokens."""
    sessions = [open_session(model, threads, stop) for _ in range(count)]
    feeds = {i.name: np.ones((1, 128), np.int64) for i in sessions[0].get_inputs()}
    times = []
    for index in range(rounds + 3):
        for session in sessions:
            started = time.perf_counter()
            session.run(None, feeds)
            if session is sessions[0] and index >= 3:
                times.append(1000 * (time.perf_counter() - started))
    return times


def open_session(model: Path, threads: int, stop: bool) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    if stop:
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()

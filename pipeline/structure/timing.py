# SPDX-License-Identifier: Apache-2.0
"""How much faster one graph is than another, on the calibration data, taking turns."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from ...exporters import graph_file
from ...runtime.benchmark import Contender, Setting, measure
from ...runtime.machine import default_threads
from ...runtime.session import Session
from ..statistics import Calibration

_ROUNDS = 126
_BATCHES = 6


def speed_up(before: ir.Model, after: ir.Model, calibration: Calibration, *, seconds: float = 8.0) -> float:
    """How many times as fast `after` is as `before`: the median over turns on a few batches of the calibration data."""
    batches = [dict(batch) for batch in calibration.sample(_BATCHES).batches]
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        contenders = []
        for name, model in (("before", before), ("after", after)):
            file = Path(folder) / f"{name}.onnx"
            graph_file.write(model, file)
            session = Session(file, provider=calibration.provider, threads=calibration.threads)
            contenders.append(Contender(name, calibration.provider, session.run))
        threads = calibration.threads or default_threads()
        setting = Setting("calibration", 1, "calibration batches", batches)
        found = measure(contenders, [setting], rounds=_ROUNDS, max_seconds=seconds, threads=threads)
    return found[1].ratio_to_reference["median"]

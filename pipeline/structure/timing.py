# SPDX-License-Identifier: Apache-2.0
"""How much faster one graph is than another, on the calibration data, taking turns."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...exporters import graph_file
from ...runtime.session import Session
from ..statistics import Calibration

_ROUNDS = 21
_BATCHES = 6


def speed_up(before: ir.Model, after: ir.Model, calibration: Calibration, *, seconds: float = 8.0) -> float:
    """Median over the rounds of the time of `before` by that of `after`; a round is some batches by each in turn."""
    batches = calibration.sample(_BATCHES).batches
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        sessions = []
        for name, model in (("before", before), ("after", after)):
            file = Path(folder) / name / "model.onnx"
            file.parent.mkdir()
            graph_file.write(model, file)
            sessions.append(Session(file, provider=calibration.provider, threads=calibration.threads))
        for session in sessions:
            for batch in batches:
                session.run(batch)
        ratios, stop = [], time.perf_counter() + seconds
        for turn in range(_ROUNDS):
            spent = [0.0, 0.0]
            for batch in batches:
                for number in (0, 1) if turn % 2 else (1, 0):
                    started = time.perf_counter()
                    sessions[number].run(batch)
                    spent[number] += time.perf_counter() - started
            ratios.append(spent[0] / spent[1])
            if turn >= 4 and time.perf_counter() > stop:
                break
    return float(np.median(ratios))

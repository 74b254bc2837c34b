# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.runtime import NodeTime, by_operator, operators_after_optimization, profile
from onnxpress.runtime.profiling import _node_times

PLAIN = """
<ir_version: 8, opset_import: ["": 18]>
plain (float[batch, 2] x) => (float[batch, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
    first = MatMul(x, w)
    one = Constant<value_float = 1.0>()
    two = Add(one, one)
    scaled = Max(first, two)
    second = MatMul(scaled, w)
    y = Tanh(second)
}
"""


def test_profile_counts_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = onnx.parser.parse_model(PLAIN).SerializeToString()
    times = profile(model, {"x": np.ones((3, 2), np.float32)}, threads=1, runs=2)
    # Constant and Add are folded by onnxruntime: they are in the file, but they do not run
    assert sorted(time.op for time in times) == ["MatMul", "MatMul", "Max", "Tanh"]
    assert len({time.name for time in times}) == 4
    assert {time.provider for time in times} == {"cpu"}
    assert sum(time.share for time in times) == pytest.approx(1)
    assert times == sorted(times, key=lambda time: (-time.ms_per_run, time.name))
    assert os.listdir() == []  # the trace went elsewhere


def test_operators_after_optimization() -> None:
    model = onnx.parser.parse_model(PLAIN).SerializeToString()
    counts = operators_after_optimization(model, {"x": np.ones((3, 2), np.float32)}, threads=1)
    assert list(counts.items()) == [("MatMul", 2), ("Max", 1), ("Tanh", 1)]


def test_runs_below_one(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="runs"):
        profile(tiny, feeds, runs=0)


def event(name: str, ts: int, dur: int, op: str = "", node: int = 0) -> dict[str, object]:
    if not op:
        return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "args": {}}
    args = {"op_name": op, "provider": "CPUExecutionProvider", "node_index": str(node)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_times_by_hand() -> None:
    """Warm-up 9000 us must not count; medians over three runs are 2 ms (a) and 1 + 1 ms (b, which runs twice)."""
    events = [event("a", 10, 9000, "MatMul"), event("model_run", 5, 9100)]
    for start, micros in [(10_000, 1000), (20_000, 2000), (30_000, 7000)]:
        events += [event("a", start + 1, micros, "MatMul"), event("b", start + 2, 1000, "Add", 1)]
        events += [event("b", start + 3, 1000, "Add", 1), event("model_run", start, 9000)]
    a, b = _node_times(events, runs=3)
    assert a == NodeTime("MatMul", "a", "cpu", 2.0, 0.5)
    assert b == NodeTime("Add", "b", "cpu", 2.0, 0.5)


def test_by_operator_sums() -> None:
    times = [
        NodeTime("Add", "a", "cpu", 1, 0.25),
        NodeTime("Add", "b", "cpu", 2, 0.5),
        NodeTime("Add", "c", "cuda", 1, 0.25),
    ]
    rows = by_operator(times)
    assert [(row.op, row.provider, row.nodes, row.ms_per_run, row.share) for row in rows] == [
        ("Add", "cpu", 2, 3, 0.75),
        ("Add", "cuda", 1, 1, 0.25),
    ]

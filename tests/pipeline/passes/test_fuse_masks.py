# SPDX-License-Identifier: Apache-2.0
"""What computes a mask gets shorter, and the mask stays the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same, left_alone
from pass_tools import Array, count, model_from, press

from onnxpress.pipeline.passes.clean import Clean

LOOKUP = """
    zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() a12 = Constant<value = int64[2] {1, 2}>()
    a3 = Constant<value = int64[1] {3}>() a012 = Constant<value = int64[3] {0, 1, 2}>()
    last = Constant<value = int64[1] {-1}>() m = Cast<to = 9>(tokens)
    b0 = Shape<start = 0, end = 1>(tokens) b = Squeeze(b0) t0 = Shape<start = 1, end = 2>(tokens) t = Squeeze(t0)
    rows = Range(FIRST, b, one) columns = Range(zero, t, one) r3 = Unsqueeze(rows, a12) r4 = Unsqueeze(r3, a3)
    c4 = Unsqueeze(columns, a012) all = Max(r4, c4) shape = Shape(all) rw = Expand(r4, shape) cw = Expand(c4, shape)
    r5 = Unsqueeze(rw, last) c5 = Unsqueeze(cw, last) pairs = Concat<axis = -1>(PAIR) found = GatherND(m, pairs)
"""
SHAPES = (
    "<bool[b, t] m, int64[b] rows, int64[t] columns, int64[b, 1, 1] r3, int64[b, 1, 1, 1] r4, int64[1, 1, 1, t] c4,"
)


def mask(
    first: str = "zero",
    pair: str = "r5, c5",
    join: str = "y = And(found, seen)",
    columns: str = "t",
    seen: str = "t",
) -> ir.Model:
    body = LOOKUP.replace("FIRST", first).replace("PAIR", pair)
    known = SHAPES.replace("int64[t] columns", f"int64[{columns}] columns").replace("1, t] c4", f"1, {columns}] c4")
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (int64[b, t] tokens, bool[1, 1, s, {seen}] seen) => (bool[b, 1, s, t] y)
        {known} bool[u, 1, 1, w] found> {{ {body} {join} }}"""
    return press(Clean(), model_from(text))[0]


def feeds(batch: int, keys: int) -> dict[str, Array]:
    tokens = np.random.default_rng(batch).integers(0, 2, (batch, keys))
    return {"tokens": tokens, "seen": np.tri(keys, dtype=bool)[None, None]}


SIZES = [feeds(1, 1), feeds(2, 5), feeds(4, 2)]


def test_a_lookup_of_everything_is_the_mask_itself() -> None:
    model, _ = fused_same(mask(), {"mask": 1}, SIZES)
    assert count(model) == {"Cast": 1, "Unsqueeze": 1, "And": 1}


def test_conditions_that_hold_always_and_sizes_that_it_has_already() -> None:
    join = """true = Constant<value = bool {1}>() sure = And(true, found) both = And(sure, seen)
        s0 = Shape<start = 2, end = 3>(seen) single = Constant<value = int64[1] {1}>()
        full = Concat<axis = 0>(b0, single, s0, t0) y0 = Expand(both, full) y = Not(y0)"""
    model = mask(join=join)
    for node in model.graph:
        if node.op_type == "And":
            node.outputs[0].shape = ir.Shape(["b", 1, "s", "t"] if node.outputs[0].name == "both" else ["b", 1, 1, "t"])
        if node.op_type == "Expand" and node.outputs[0].name == "y0":
            node.outputs[0].shape = ir.Shape(["b", 1, "s", "t"])
    model, _ = fused_same(model, {"mask": 3}, SIZES)
    assert count(model) == {"Cast": 1, "Unsqueeze": 1, "And": 1, "Not": 1}


def test_a_mask_whose_length_has_a_name_of_its_own_is_checked_where_it_is_joined() -> None:
    model, _ = fused_same(mask(columns="past_and_new", seen="past_and_new"), {"mask": 1}, SIZES)
    assert "GatherND" not in count(model)


NOT_ALL = {
    "from_the_second_row": {"first": "one"},
    "transposed": {"pair": "c5, r5"},
    "other_keys": {"columns": "other"},
    "other_keys_alone": {"columns": "other", "seen": "other", "join": "some = Not(found) y = And(some, seen)"},
}


@pytest.mark.parametrize("case", NOT_ALL)
def test_another_lookup_stays(case: str) -> None:
    assert left_alone(mask(**NOT_ALL[case])) == []


def test_what_a_graph_returns_keeps_its_name() -> None:
    join = "true = Constant<value = bool {1}>() both = And(found, seen) y = And(both, true)"
    model, _ = fused_same(mask(join=join), {"mask": 1}, SIZES)
    assert [value.name for value in model.graph.outputs] == ["y"]

# SPDX-License-Identifier: Apache-2.0
"""Attention of decoders: with a cache in front, over another network's output, with relative positions and a mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same
from pass_tools import Array, count, model_from, normal, press

from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse

FUSED = "com.microsoft::MultiHeadAttention"
LOWEST = np.finfo(np.float32).min
SPLIT = """
    split = Constant<value = int64[4] {0, 0, 2, 4}>() join = Constant<value = int64[3] {0, 0, 8}>()
    flat = Constant<value = int64[2] {-1, 8}>() c = Constant<value_float = 0.5>()
    q0 = Reshape(x, split) q1 = Transpose<perm = [0, 2, 1, 3]>(q0)
"""
FRESH = """
    y1 = Neg(x) y2 = Abs(x) k0 = Reshape(y1, split) v0 = Reshape(y2, split)
    k1 = Transpose<perm = [0, 2, 1, 3]>(k0) v1 = Transpose<perm = [0, 2, 1, 3]>(v0)
    k = Concat<axis = -2>(past_k, k1) v = Concat<axis = 2>(past_v, v1)
"""
ATTEND = """
    kt = Transpose<perm = [0, 1, 3, 2]>(k) m = MatMul(q1, kt) n = Mul(m, c) SCORES p = Softmax<axis = -1>(a)
    o1 = MatMul(p, v) o2 = Transpose<perm = [0, 2, 1, 3]>(o1) MERGE
"""
MERGE = "o3 = Reshape(o2, join) y = Relu(o3)"
CACHE = "float[b, 2, past, 4] past_k, float[b, 2, past, 4] past_v"
MASK = "float[b, 1, s, total] mask"


def cached(*, scores: str = "a = Add(n, mask)", inputs: str = MASK, merge: str = MERGE, more: str = "") -> ir.Model:
    attend = ATTEND.replace("SCORES", scores).replace("MERGE", merge)
    outputs = "float[b, s, 8] y, float[b, 2, total, 4] k, float[b, 2, total, 4] v"
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 8] x, {CACHE}, {inputs}) => ({outputs}) {{ {SPLIT} {FRESH} {more} {attend} }}"""
    return press(Clean(), model_from(text))[0]


def feeds(batch: int, new: int, past: int, *, left: int = 0) -> dict[str, Array]:
    causal = np.where(np.arange(past + new) <= past + np.arange(new)[:, None], 0, LOWEST).astype(np.float32)
    mask = np.tile(causal, (batch, 1, 1, 1))
    mask[0, ..., :left] = LOWEST
    cache = {f"past_{part}": normal(batch, 2, past, 4, seed=i) for i, part in enumerate("kv")}
    return {"x": normal(batch, new, 8), "mask": mask, **cache}


SIZES = [feeds(1, 1, 0), feeds(2, 5, 0, left=2), feeds(2, 1, 4), feeds(3, 2, 7, left=8)]


def test_the_cache_goes_into_the_operator() -> None:
    model, _ = fused_same(cached(), {"attention": 1}, SIZES)
    fused = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [value.name for value in fused.outputs[1:]] == ["k", "v"]
    assert {"Concat", "Transpose", "MatMul"}.isdisjoint(count(model))


def test_a_mask_made_of_the_length_of_all_keys_keeps_the_cache_outside() -> None:
    more = """
        size = Shape<start = 2, end = 3>(k) one = Constant<value = int64[1] {1}>() new = Shape<start = 1, end = 2>(x)
        shape = Concat<axis = 0>(one, one, new, size) zero = Constant<value_float = 0.0>()
        none = Expand(zero, shape) both = Add(mask, none)
    """
    model, _ = fused_same(cached(scores="a = Add(n, both)", more=more), {"attention": 1}, SIZES)
    fused = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert len(fused.outputs) == 1
    assert {"k", "v"} <= {node.outputs[0].name for node in model.graph if node.op_type == "Concat"}


@pytest.mark.parametrize("order", ["Add(n, positions) a = Add(t, mask)", "Add(mask, n) a = Add(positions, t)"])
def test_relative_positions_and_a_mask(order: str) -> None:
    inputs = f"{MASK}, float[1, 2, s, total] positions"
    given = [{**f, "positions": normal(1, 2, *f["mask"].shape[2:], seed=5)} for f in SIZES]
    model, _ = fused_same(cached(scores=f"t = {order}", inputs=inputs), {"attention": 1}, given)
    assert count(model)["Add"] == 1


def test_heads_merged_to_rows_of_a_matrix() -> None:
    rows = "o3 = Reshape(o2, flat) o4 = Relu(o3) y = Reshape(o4, back)"
    more = """sizes = Shape<start = 0, end = 2>(x) eight = Constant<value = int64[1] {8}>()
        back = Concat<axis = 0>(sizes, eight)"""
    model, _ = fused_same(cached(merge=rows, more=more), {"attention": 1}, SIZES)
    assert (count(model)[FUSED], count(model)["Reshape"]) == (1, 2)


def test_keys_and_values_of_an_encoder_that_are_kept() -> None:
    attend = ATTEND.replace("SCORES", "a = Add(n, mask)").replace("MERGE", MERGE)
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 8] x, float[b, 2, source, 4] k, float[b, 2, source, 4] v, float[b, 1, 1, source] mask)
        => (float[b, s, 8] y) {{ {SPLIT} {attend} }}"""
    given = []
    for batch, new, source in ((1, 1, 3), (2, 4, 1), (3, 2, 6)):
        mask = np.zeros((batch, 1, 1, source), np.float32)
        mask[0, ..., 1:] = LOWEST
        cross = {part: normal(batch, 2, source, 4, seed=i) for i, part in enumerate("kv")}
        given.append({"x": normal(batch, new, 8), "mask": mask, **cross})
    model, _ = fused_same(press(Clean(), model_from(text))[0], {"attention": 1}, given, fewer=False)
    fused = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [value.name for value in fused.inputs[1:3] if value is not None] == ["k", "v"]


def test_queries_that_were_normalized_head_by_head() -> None:
    """As in Qwen3, where no value has all heads of a token side by side."""
    split = SPLIT.replace("q0 = Reshape(x, split)", "q00 = Reshape(x, split) q0 = Softsign(q00)")
    attend = ATTEND.replace("SCORES", "a = Add(n, mask)").replace("MERGE", MERGE)
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 8] x, {CACHE}, {MASK}) => (float[b, s, 8] y) {{ {split} {FRESH} {attend} }}"""
    model, _ = fused_same(press(Clean(), model_from(text))[0], {"attention": 1}, SIZES)
    assert count(model)[FUSED] == 1


def test_switched_off() -> None:
    model, report, _ = press(Fuse(attention=False), cached())
    assert (report.changed, FUSED in count(model)) == (0, False)

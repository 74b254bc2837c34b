# SPDX-License-Identifier: Apache-2.0
"""Products with keys and values that query heads share are made without the copies, and are the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same, left_alone
from pass_tools import Array, count, model_from, normal, press, run

from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse

GROUPS, SHARE, SIZE = 2, 3, 4
HEADS = GROUPS * SHARE
REPEAT = """
    NAME_5 = Unsqueeze(NAME, a2) NAME_wide = Expand(NAME_5, wide) NAME_all = Reshape(NAME_wide, all)
"""
ATTEND = """
    kt = Transpose<perm = [0, 1, 3, 2]>(k_all) m = MatMul(q, kt) n = Mul(m, c) a = Add(n, mask)
    p = Softmax<axis = -1>(a) o = MatMul(p, v_all) y = Neg(o)
"""
SCALED_KEYS = ATTEND.replace("m = MatMul(q, kt) n = Mul(m, c)", "k2 = Mul(kt, c) n = MatMul(q, k2)")


def grouped(body: str = ATTEND, *, opset: int = 20, axis: int = 2, **changes: str) -> ir.Model:
    keys = changes.get("keys", f"float[b, {GROUPS}, t, {SIZE}] k")
    wide, after = changes.get("wide", f"b, groups, {SHARE}, t, size"), f"[b, {HEADS}, t, {SIZE}]"
    repeats = REPEAT.replace("NAME", "k") + REPEAT.replace("NAME", "v")
    sizes = wide.replace("groups", "two").replace("size", "four").replace(str(SHARE), "three").replace("HEADS", "six")
    text = f"""<ir_version: 11, opset_import: ["": {opset}]>
        g (float[b, {HEADS}, s, {SIZE}] q, {keys}, float[b, {GROUPS}, t, {SIZE}] v, float[b, 1, s, t] mask)
        => (float[b, {HEADS}, s, {SIZE}] y)
        <float[b, {GROUPS}, {SHARE}, t, {SIZE}] k_wide, float[b, {GROUPS}, {SHARE}, t, {SIZE}] v_wide,
         float{after} k_all, float{after} v_all> {{
        a2 = Constant<value = int64[1] {{{axis}}}>() two = Constant<value = int64[1] {{{GROUPS}}}>()
        three = Constant<value = int64[1] {{{SHARE}}}>() four = Constant<value = int64[1] {{{SIZE}}}>()
        six = Constant<value = int64[1] {{{HEADS}}}>() c = Constant<value_float = 0.5>()
        b = Shape<start = 0, end = 1>(v) t = Shape<start = 2, end = 3>(v) wide = Concat<axis = 0>({sizes})
        all = Concat<axis = 0>(b, six, t, four) {repeats} {body} }}"""
    return press(Clean(), model_from(text))[0]


def feeds(batch: int, queries: int, keys: int) -> dict[str, Array]:
    hidden = np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0, np.finfo(np.float32).min)
    mask = np.broadcast_to(hidden, (batch, 1, queries, keys)).astype(np.float32)
    mask = mask.copy()
    mask[0, ..., :1] = np.finfo(np.float32).min  # padding on the left; a first query sees nothing
    return {
        "q": normal(batch, HEADS, queries, SIZE),
        "k": normal(batch, GROUPS, keys, SIZE, seed=1),
        "v": normal(batch, GROUPS, keys, SIZE, seed=2),
        "mask": mask,
    }


SIZES = [(1, 1, 1), (1, 1, 9), (2, 5, 5), (3, 2, 7)]


@pytest.mark.parametrize("body", [ATTEND, SCALED_KEYS], ids=["scores_scaled", "keys_scaled"])
def test_nothing_is_repeated(body: str) -> None:
    model, _ = fused_same(grouped(body), {"grouped_heads": 2}, [feeds(*sizes) for sizes in SIZES])
    assert "Expand" not in count(model)
    assert "Unsqueeze" not in count(model)
    assert count(model)["MatMul"] == 2


def test_it_is_attention_of_repeated_heads() -> None:
    model, given = press(Fuse(), grouped())[0], feeds(2, 3, 5)
    q, k, v = (given[name].astype(np.float64) for name in "qkv")
    scores = q @ k.repeat(SHARE, 1).swapaxes(2, 3) * 0.5 + given["mask"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True) @ v.repeat(SHARE, 1)
    np.testing.assert_allclose(-run(model, given)[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_standard_operator_repeats_by_itself() -> None:
    body = "o = Attention<scale = 0.5>(q, k_all, v_all, mask) y = Neg(o)"
    model, report = fused_same(grouped(body, opset=23), {"grouped_heads": 1}, [feeds(*s) for s in SIZES[1:2]])
    assert count(model) == {"Attention": 1, "Neg": 1}
    assert [left.reason for left in report.left] == ["queries and keys have different numbers of heads"]


def test_what_is_repeated_otherwise_stays() -> None:
    # One key for all: Expand repeats it over the keys' own axis too
    assert "Expand" in count(press(Fuse(), grouped(keys=f"float[b, {GROUPS}, 1, {SIZE}] k"))[0])
    # A new axis elsewhere: heads are repeated as a whole, (0, 1, 0, 1, 0, 1), not each
    assert "Expand" in count(press(Fuse(), grouped(axis=1, wide=f"b, {SHARE}, groups, t, size"))[0])


def test_a_product_with_one_head_for_each_stays() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[b, 2, s, 4] p, float[b, 2, s, 4] v) => (float[b, 2, s, 4] y) {
        t = Transpose<perm = [0, 1, 3, 2]>(v) m = MatMul(p, t) y = MatMul(m, v) }"""
    assert left_alone(press(Clean(), model_from(text))[0]) == []

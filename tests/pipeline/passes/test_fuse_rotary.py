# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding becomes RotaryEmbedding, with the numbers of an exact rotation, for any position."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same, left_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, count, model_from, normal, press, run

from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse

HEADS, SIZE = 3, 8
FUSED = "com.microsoft::RotaryEmbedding"
CONSTANTS = """
    split = Constant<value = int64[4] {0, 0, 3, 8}>() a1 = Constant<value = int64[1] {1}>()
    a2 = Constant<value = int64[1] {2}>() a3 = Constant<value = int64[1] {3}>() zero = Constant<value = int64[1] {0}>()
    half = Constant<value = int64[1] {HALF}>() most = Constant<value = int64[1] {9223372036854775807}>()
    width = Constant<value = int64[1] {WIDTH}>()
"""
ANGLES = "p2 = Unsqueeze(positions, a2) pf = Cast<to = 1>(p2) angle = Mul(pf, rates)"
WAVES = "both = Concat<axis = -1>(angle, angle) c = Cos(both) s = Sin(both)"
TURN = """
    u = Mul(t, cos) low = Slice(t, zero, half, a3, a1) high = Slice(t, half, most, a3, a1) n = Neg(high)
    k = Concat<axis = -1>(n, low) w = Mul(k, sin) r = Add(u, w)
"""
LAYOUTS = {
    "projection": ("q = Reshape(x, split) t = Transpose<perm = [0, 2, 1, 3]>(q)", "a1", 1, "float[b, l, 24]"),
    "heads_first": ("t = Identity(x)", "a1", 1, "float[b, 3, l, 8]"),
    "tokens_first": ("t = Reshape(x, split)", "a2", 2, "float[b, l, 24]"),
}


def rotary(layout: str = "projection", *, rotated: int = SIZE, **changes: str) -> ir.Model:
    head, axis, place, kind = LAYOUTS[layout]
    constants = CONSTANTS.replace("HALF", str(rotated // 2)).replace("WIDTH", str(rotated))
    body = changes.get("turn", TURN)
    if rotated < SIZE:
        body = body.replace("(t,", "(part,").replace("r = Add", "inner = Add")
        body = f"part = Slice(t, zero, width, a3, a1) rest = Slice(t, width, most, a3, a1) {body}"
        body += " r = Concat<axis = -1>(inner, rest)"
    positions = changes.get("positions", "int64[b, l] positions")
    shape = ["b", "l", "3", "8"] if place == 2 else ["b", "3", "l", "8"]
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g ({kind} x, {positions}, float[{rotated // 2}] rates) => (float[{", ".join(shape)}] y) {{
        {constants} {ANGLES} {changes.get("waves", WAVES)} {head} cos = Unsqueeze(c, {axis}) sin = Unsqueeze(s, {axis})
        {body} y = Neg(r) }}"""
    model = model_from(text, {"rates": rates(rotated)})
    return press(Clean(), model)[0]


def rates(rotated: int) -> Array:
    return (1 / 100.0 ** (np.arange(rotated // 2) / (rotated // 2))).astype(np.float32)


def data(layout: str, batch: int, length: int) -> Array:
    return normal(*((batch, HEADS, length, SIZE) if layout == "heads_first" else (batch, length, HEADS * SIZE)))


def exact(x: Array, positions: Array, rotated: int) -> Array:
    """[batch, heads, length, size], turned in double precision."""
    angle = positions[:, None, :, None] * rates(rotated).astype(np.float64)
    one, other = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    turned = [one * np.cos(angle) - other * np.sin(angle), other * np.cos(angle) + one * np.sin(angle)]
    return np.concatenate([*turned, x[..., rotated:]], -1)


@pytest.mark.parametrize("rotated", [SIZE, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_fused(layout: str, rotated: int) -> None:
    feeds = [
        {"x": data(layout, b, length), "positions": start + np.arange(b * length).reshape(b, length)}
        for b, length, start in ((1, 1, 0), (2, 5, 3), (3, 1, 70_000))
    ]
    # The tables, which all layers share, are more nodes than one rotation
    model, _ = fused_same(rotary(layout, rotated=rotated), {"rotary": 1}, feeds, fewer=False)
    assert count(model)[FUSED] == 1
    assert (count(model)["Neg"], count(model)["Slice"]) == (1, 2)  # the last node, and the halves of two tables


@settings(max_examples=15, deadline=None)
@given(
    start=st.integers(0, 4000), batch=st.integers(1, 3), length=st.integers(1, 6), rotated=st.sampled_from([2, 4, 8])
)
def test_it_rotates(start: int, batch: int, length: int, rotated: int) -> None:
    model = press(Fuse(), rotary(rotated=rotated))[0]
    x, positions = data("projection", batch, length), np.random.default_rng(start).integers(0, 4001, (batch, length))
    found = -run(model, {"x": x, "positions": positions})[0]
    split = x.reshape(batch, length, HEADS, SIZE).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, exact(split, positions, rotated), atol=2e-3)
    np.testing.assert_allclose(np.square(found).sum(-1), np.square(split).sum(-1), rtol=1e-4)


def test_positions_of_all_sequences_at_once() -> None:
    model = rotary(positions="int64[1, l] positions")
    feeds = [{"x": data("projection", b, 4), "positions": np.arange(4)[None] + 9} for b in (1, 3)]
    fused_same(model, {"rotary": 1}, feeds, fewer=False)


def test_queries_and_keys_share_their_tables() -> None:
    keys = re.sub(r"\b(u|low|high|n|k|w|r)\b", r"\1_b", TURN).replace("(t", "(t_b")
    turn = f"{TURN.replace('r = Add', 'r_a = Add')} t_b = Abs(t) {keys} r = Mul(r_a, r_b)"
    feeds = [{"x": data("heads_first", 2, 3), "positions": np.arange(6).reshape(2, 3)}]
    model, _ = fused_same(rotary("heads_first", turn=turn), {"rotary": 2}, feeds, fewer=False)
    assert count(model)[FUSED] == 2
    assert count(model)["Range"] == 1


def test_fp16() -> None:
    model = press(CastPass(), press(Fuse(), rotary())[0])[0]
    x, positions = data("projection", 2, 3), np.arange(6).reshape(2, 3)
    found = -run(model, {"x": x, "positions": positions})[0]
    split = x.reshape(2, 3, HEADS, SIZE).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, exact(split, positions, SIZE), atol=2e-2)


def test_what_cannot_be_fused_says_why() -> None:
    unequal = "other = Neg(angle) both = Concat<axis = -1>(angle, other) c = Cos(both) s = Sin(both)"
    assert left_alone(rotary(waves=unequal)) == ["the two halves of its cosines are not known to be the same"]
    swapped = TURN.replace("Concat<axis = -1>(n, low)", "Concat<axis = -1>(low, n)")
    assert left_alone(rotary(turn=swapped)) == []
    kept = TURN.replace("n = Neg(high)", "n = Abs(high)")
    assert left_alone(rotary(turn=kept)) == []
    assert left_alone(rotary(positions="int64[other, l] positions")) == [
        "its cosines are not known to be for one or for all sequences"
    ]

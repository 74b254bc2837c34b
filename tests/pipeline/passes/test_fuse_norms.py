# SPDX-License-Identifier: Apache-2.0
"""Normalizations that are written out come into the form for which the runtime has one kernel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same, left_alone
from pass_tools import count, model_from, normal, press, run, to_bytes

from onnxpress.pipeline.passes.clean import Clean
from onnxpress.runtime.profiling import operators_after_optimization

SQUARES = {"power": "p = Pow(h, two)", "product": "p = Mul(h, h)"}
INVERSES = {
    "reciprocal": "q = Sqrt(v) r = Reciprocal(q)",
    "division": "q = Sqrt(v) r = Div(one, q)",
    "power": "r = Pow(v, minus_half)",
}
CONSTANTS = """
    two = Constant<value_float = 2.0>() one = Constant<value_float = 1.0>() e = Constant<value_float = 0.00001>()
    minus_half = Constant<value_float = -0.5>() axes = Constant<value = int64[1] {-1}>()
"""


def rms(square: str = SQUARES["power"], inverse: str = INVERSES["reciprocal"], **changes: str) -> ir.Model:
    mean = changes.get("mean", "m = ReduceMean<keepdims = 1>(p, axes)")
    data = changes.get("data", "h")
    text = f"""<ir_version: 10, opset_import: ["": 18]>
        g (float[b, s, 8] x, float[8] gamma) => (float[b, s, 8] y) {{
        {CONSTANTS} h = Neg(x) {square} {mean} v = Add(m, e) {inverse} n = Mul({data}, r) y = Mul(gamma, n) }}"""
    return press(Clean(), model_from(text, {"gamma": normal(8)}))[0]


@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("square", SQUARES)
def test_rms_norm_becomes_one_kernel(square: str, inverse: str) -> None:
    x = normal(2, 3, 8)
    model = rms(SQUARES[square], INVERSES[inverse])
    known = (square, inverse) == ("power", "division")
    assert known == ("SimplifiedLayerNormalization" in operators_after_optimization(to_bytes(model), {"x": x}))
    # A power of -0.5 is one node, where the runtime wants to see two
    feeds = [{"x": x}, {"x": normal(1, 1, 8, seed=1)}]
    model, _ = fused_same(model, {"rms_norm": 1}, feeds, fewer=inverse != "power")
    assert operators_after_optimization(to_bytes(model), {"x": x}) == {"Neg": 1, "SimplifiedLayerNormalization": 1}
    wanted = -x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-5) * normal(8)
    np.testing.assert_allclose(run(model, {"x": x})[0], wanted, rtol=1e-4, atol=1e-5)


NO_RMS = {
    "cube": {"square": "three = Constant<value_float = 3.0>() p = Pow(h, three)"},
    "other_data": {"data": "x"},
    "other_axis": {"mean": "a = Constant<value = int64[1] {1}>() m = ReduceMean<keepdims = 1>(p, a)"},
    "all_axes": {"mean": "m = ReduceMean<keepdims = 1>(p)"},
    "another_root": {"inverse": "r = Reciprocal(v)"},
    "twice_the_inverse": {"inverse": "q = Sqrt(v) r = Div(two, q)"},
}


@pytest.mark.parametrize("case", NO_RMS)
def test_what_is_no_rms_norm_stays(case: str) -> None:
    assert left_alone(rms(**NO_RMS[case])) == []


def layer_norm(centred: str = "d", tail: str = "y = Add(t, beta)", opset: int = 17, **changes: str) -> ir.Model:
    again = changes.get("again", "")
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
        g (float[b, s, 8] x, float[8] gamma, float[8] beta) => (float[b, s, 8] y) {{
        {CONSTANTS} h = Neg(x) m = ReduceMean<axes = [-1]>(h) d = Sub(h, m) {again} p = Pow({centred}, two)
        v = ReduceMean<axes = [-1]>(p) w = Add(v, e) q = Sqrt(w) n = Div(d, q) t = Mul(n, gamma) {tail} }}"""
    return press(Clean(), model_from(text, {"gamma": normal(8), "beta": normal(8, seed=1)}))[0]


@pytest.mark.parametrize("again", [False, True], ids=["shared", "subtracted_twice"])
def test_layer_norm_becomes_one_node(again: bool) -> None:
    model = layer_norm("d2", again="d2 = Sub(h, m)") if again else layer_norm()
    model, _ = fused_same(model, {"layer_norm": 1}, [{"x": normal(2, 3, 8)}, {"x": normal(1, 1, 8)}])
    assert count(model) == {"Neg": 1, "LayerNormalization": 1}


def test_the_residual_before_a_layer_norm_in_primitives_is_kept_apart() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[b, s, 8] x, float[8] gamma, float[8] beta) => (float[b, s, 8] y) {
        two = Constant<value_float = 2.0>() e = Constant<value_float = 0.00001>() r = Relu(x) h = Add(x, r)
        m = ReduceMean<axes = [-1]>(h) d = Sub(h, m) p = Pow(d, two) v = ReduceMean<axes = [-1]>(p) w = Add(v, e)
        q = Sqrt(w) n = Div(d, q) t = Mul(n, gamma) y = Add(t, beta) }"""
    model = model_from(text, {"gamma": normal(8), "beta": normal(8, seed=1)})
    model, _ = fused_same(model, {"layer_norm": 1, "residual_sum": 1}, [{"x": normal(2, 3, 8)}])
    assert count(model) == {"Relu": 1, "Sum": 1, "LayerNormalization": 1}


def test_what_is_no_layer_norm_stays() -> None:
    assert left_alone(layer_norm("h")) == []  # the second moment, not the variance
    assert left_alone(layer_norm(tail="u = Add(t, beta) y = Add(u, t)")) == []  # the scaled one is read elsewhere too
    assert left_alone(layer_norm(opset=16)) == ["LayerNormalization needs opset 17, the graph has 16"]

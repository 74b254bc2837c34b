# SPDX-License-Identifier: Apache-2.0
"""Gemm between reshapes becomes a product that keeps its axes; products of one input become one where asked for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fusing import fused_same, left_alone
from pass_tools import count, model_from, normal, press, run

from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic

WEIGHTS = {"w": normal(8, 6), "bias": normal(6, seed=1)}
X = [{"x": normal(2, 3, 8)}, {"x": normal(1, 1, 8, seed=1)}]


def gemm(arguments: str = "flat, w, bias", attributes: str = "", tail: str = "y = Reshape(g, back)") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 8] x, float[8, 6] w, float[6] bias) => (float[b, s, 6] y) {{
        rows = Constant<value = int64[2] {{-1, 8}}>() six = Constant<value = int64[1] {{6}}>()
        sizes = Shape<start = 0, end = 2>(x) back = Concat<axis = 0>(sizes, six) flat = Reshape(x, rows)
        g = Gemm {attributes} ({arguments}) {tail} }}"""
    model = press(Clean(), model_from(text, WEIGHTS))[0]
    for node in model.graph:
        if node.op_type == "Reshape" and node.outputs[0].name == "y":
            node.outputs[0].shape = ir.Shape(["b", "s", 6])
    return model


@pytest.mark.parametrize("arguments", ["flat, w, bias", "flat, w"])
def test_a_layer_keeps_its_axes(arguments: str) -> None:
    model, _ = fused_same(gemm(arguments), {"gemm": 1}, X)
    assert count(model) == ({"MatMul": 1, "Add": 1} if "bias" in arguments else {"MatMul": 1})
    assert "w" in model.graph.initializers


def test_other_gemms_stay() -> None:
    assert left_alone(gemm(attributes="<alpha = 2.0>")) == ["Gemm with a factor, or a transposed one"]
    assert left_alone(gemm(tail="h = Relu(g) y = Reshape(h, back)")) == []


def projections(biases: str = "qkv", more: str = "", outputs: str = "") -> ir.Model:
    widths = {"q": 8, "k": 4, "v": 4}
    weights = {f"w{part}": normal(8, width, seed=i) for i, (part, width) in enumerate(widths.items())}
    weights |= {f"b{part}": normal(width, seed=i) for i, (part, width) in enumerate(widths.items())}
    inputs = ", ".join(f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    body = " ".join(
        f"{part}m = MatMul(x, w{part}) {part} = {f'Add(b{part}, {part}m)' if part in biases else f'Neg({part}m)'}"
        for part in widths
    )
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 8] x, {inputs}) => (float[b, s, 8] q, float[b, s, 4] kv {outputs}) {{
        {body} {more} kv = Mul(k, v) }}"""
    return press(Clean(), model_from(text, weights))[0]


PACKED = Fuse(packed=True)


@pytest.mark.parametrize("biases", ["qkv", "qk", ""])
def test_products_of_one_input_are_joined_where_asked_for(biases: str) -> None:
    model, _ = fused_same(projections(biases), {"packed": 1}, X, PACKED, fewer=biases == "qkv")
    assert count(model)["MatMul"] == count(model)["Split"] == 1
    packed = model.graph.initializers["wq+wk+wv"]
    np.testing.assert_array_equal(
        packed.const_value.numpy(),
        np.concatenate([normal(8, width, seed=i) for i, width in enumerate((8, 4, 4))], axis=1),
    )
    assert not {"wq", "wk", "wv"} & set(model.graph.initializers)


def test_nothing_is_joined_unless_asked_for() -> None:
    assert left_alone(projections()) == []


def test_weights_that_others_read_stay() -> None:
    model = projections(more="other = Relu(x) z = MatMul(other, wq)", outputs=", float[b, s, 8] z")
    model, _ = fused_same(model, {"packed": 1}, X, PACKED, fewer=False)
    assert "wk+wv" in model.graph.initializers
    assert count(model)["MatMul"] == 3


@pytest.mark.parametrize("settings", [Fuse(optional=True), PACKED], ids=["apart", "joined"])
def test_int8_takes_the_layers_in_either_form(settings: Fuse) -> None:
    wanted = run(projections(), X[0])
    model = press(settings, projections())[0]
    model, report, _ = press(QuantizeDynamic(minimum_elements=1), model)
    assert report.details["elements_quantized_percent"] > 85
    assert "MatMul" not in count(model)
    np.testing.assert_allclose(run(model, X[0])[0], wanted[0], atol=0.2)

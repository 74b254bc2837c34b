# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds against counts made by hand."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes.graph import label
from onnxpress.pipeline.statistics import Calibration

HEAD = '<ir_version: 10, opset_import: ["": 20]> g'


def counted(signature: str, body: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Multiply-adds by node, of the graph run on ones of `shapes`; inputs that start with w become weights."""
    model = ir.from_proto(onnx.parser.parse_model(f"{HEAD} ({signature}) => (float[?] y) {{ {body} }}"))
    model.graph.outputs[0].shape = None
    feeds = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for value in [v for v in model.graph.inputs if str(v.name).startswith("w")]:
        array = feeds.pop(str(value.name))
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    sizes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    return {label(node): count for node, count in multiply_adds(model, sizes).items()}


PRODUCTS: dict[str, tuple[str, dict[str, tuple[int, ...]], int]] = {
    "matrix": ("y = MatMul(x, w)", {"x": (5, 3), "w": (3, 7)}, 5 * 3 * 7),
    "leading axes": ("y = MatMul(x, w)", {"x": (2, 4, 5, 3), "w": (3, 7)}, 2 * 4 * 5 * 3 * 7),
    "batched": ("y = MatMul(x, v)", {"x": (2, 4, 5, 3), "v": (2, 4, 3, 7)}, 2 * 4 * 5 * 3 * 7),
    "broadcast": ("y = MatMul(x, v)", {"x": (2, 1, 5, 3), "v": (4, 3, 7)}, 2 * 4 * 5 * 3 * 7),
    "vector left": ("y = MatMul(x, w)", {"x": (3,), "w": (3, 7)}, 3 * 7),
    "vector right": ("y = MatMul(x, w)", {"x": (5, 3), "w": (3,)}, 5 * 3),
    "two vectors": ("y = MatMul(x, v)", {"x": (3,), "v": (3,)}, 3),
    "nothing": ("y = MatMul(x, w)", {"x": (0, 3), "w": (3, 7)}, 0),
    "gemm": ("y = Gemm(x, w)", {"x": (5, 3), "w": (3, 7)}, 5 * 3 * 7),
    "gemm, transA": ("y = Gemm<transA = 1>(x, w)", {"x": (3, 5), "w": (3, 7)}, 5 * 3 * 7),
    "gemm, transB": ("y = Gemm<transB = 1>(x, w)", {"x": (5, 3), "w": (7, 3)}, 5 * 3 * 7),
    "gemm, both": ("y = Gemm<transA = 1, transB = 1>(x, w)", {"x": (3, 5), "w": (7, 3)}, 5 * 3 * 7),
    "conv": ("y = Conv(x, w)", {"x": (2, 3, 9, 8), "w": (4, 3, 3, 2)}, 2 * 4 * 7 * 7 * 3 * 3 * 2),
    "conv, strided": (
        "y = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w)", {"x": (1, 3, 8, 8), "w": (4, 3, 3, 3)},
        4 * 4 * 4 * 3 * 9,
    ),
    "conv of sound": ("y = Conv(x, w)", {"x": (1, 3, 10), "w": (4, 3, 5)}, 4 * 6 * 3 * 5),
    "grouped": ("y = Conv<group = 2>(x, w)", {"x": (1, 4, 5, 5), "w": (6, 2, 3, 3)}, 6 * 3 * 3 * 2 * 9),
    "depthwise": ("y = Conv<group = 4>(x, w)", {"x": (1, 4, 5, 5), "w": (4, 1, 3, 3)}, 4 * 3 * 3 * 9),
    "transposed": (
        "y = ConvTranspose<strides = [2, 2]>(x, w)", {"x": (1, 3, 5, 5), "w": (3, 4, 2, 2)}, 3 * 5 * 5 * 4 * 4,
    ),
    "transposed, grouped": (
        "y = ConvTranspose<group = 2>(x, w)", {"x": (1, 4, 5, 5), "w": (4, 3, 2, 2)}, 4 * 5 * 5 * 3 * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_product(name: str) -> None:
    body, shapes, expected = PRODUCTS[name]
    signature = ", ".join(f"float[{', '.join('?' for _ in shape)}] {name}" for name, shape in shapes.items())
    for value, shape in shapes.items():
        if value.startswith("w"):
            declared = f"float[{', '.join('?' for _ in shape)}] {value}"
            signature = signature.replace(declared, f"float[{', '.join(map(str, shape))}] {value}")
    assert counted(signature, body, shapes) == {"y": expected}


def test_a_whole_graph_is_counted_node_by_node_and_weights_need_no_shape() -> None:
    body = "h = MatMul(x, w1) a = Relu(h) y = MatMul(a, w2)"
    found = counted("float[n, 3] x, float[3, 8] w1, float[8, 2] w2", body, {"x": (5, 3), "w1": (3, 8), "w2": (8, 2)})
    assert found == {"h": 5 * 3 * 8, "y": 5 * 8 * 2}


def test_what_has_no_known_shape_is_left_out() -> None:
    text = f"""{HEAD} (bool c, float[3, 3] x) => (float[3, 3] y)
    {{ p = MatMul(x, x) y = If(c) <then_branch = t () => (float[3, 3] a) {{ a = MatMul(p, x) }},
                                   else_branch = e () => (float[3, 3] b) {{ b = Neg(p) }}> }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert values_to_measure(model) == ["x", "p", "a"]
    feeds = {"c": np.array(True), "x": np.ones((3, 3), np.float32)}
    shapes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    assert shapes == {"x": (3, 3), "p": (3, 3)}
    assert {label(node): count for node, count in multiply_adds(model, shapes).items()} == {"p": 27}

# SPDX-License-Identifier: Apache-2.0
"""Where the pairs stand: what ONNX Runtime runs then has integer kernels only, and no pair too many.

Each expectation is the exact list of kernels, without transposes: one pair that stands in the wrong place shows as a
DequantizeLinear, or as a Conv in floating point.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from pass_tools import count, normal, run
from static_tools import IMAGES, executed, fan_in, image_network, network, noise, quantize

CONV = "c = Conv(x, w0, b0) r = Relu(c)"


def after_convolution(body: str) -> str:
    """`body` behind a convolution c and, if it is read, its activation r."""
    return f"{CONV if re.search('[(, ]r[,)]', body) else CONV.partition(' r =')[0]} {body}"


ENDS = {"QuantizeLinear": 1, "DequantizeLinear": 1}
"""The input is rounded, the output is turned back into floats."""

CHAINS: dict[str, tuple[str, dict[str, int]]] = {
    "relu": ("y = Conv(r, w1, b1)", {"QLinearConv": 2}),
    "no bias": ("d = Conv(x, w0) e = Relu(d) y = Conv(e, w1)", {"QLinearConv": 2}),
    "nothing between": ("y = Conv(c, w1, b1)", {"QLinearConv": 2}),
    "relu6": ("d = Clip(c, zero, six) y = Conv(d, w1, b1)", {"QLinearConv": 2}),
    "clip from zero": ("d = Clip(c, zero) y = Conv(d, w1, b1)", {"QLinearConv": 2}),
    "depthwise": ("d = Conv<group = 8, pads = [1, 1, 1, 1]>(r, dw) y = Conv(d, w1, b1)", {"QLinearConv": 3}),
    "add": ("d = Conv(r, w1, b1) s = Add(d, r) y = Conv(s, w2)", {"QLinearConv": 3, "QLinearAdd": 1}),
    "add, relu": ("d = Conv(r, w1) s = Add(d, r) t = Relu(s) y = Conv(t, w2)", {"QLinearConv": 3, "QLinearAdd": 1}),
    "add to itself": ("s = Add(r, r) y = Conv(s, w2)", {"QLinearConv": 2, "QLinearAdd": 1}),
    "mul": ("d = Conv(r, w1) s = Mul(d, r) y = Conv(s, w2)", {"QLinearConv": 3, "QLinearMul": 1}),
    "concat": (
        "d = Conv(r, w1) e = Conv(r, w2) k = Concat<axis = 1>(d, e, r, r) f = Slice(k, first1, eight1, one1) "
        "y = Conv(f, w1)", {"QLinearConv": 4, "QLinearConcat": 1, "Slice": 1},
    ),
    "max pool": ("p = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(p, w1)", {"QLinearConv": 2, "NhwcMaxPool": 1}),
    "average pool": (
        "p = AveragePool<kernel_shape = [2, 2]>(r) y = Conv(p, w1)", {"QLinearConv": 2, "QLinearAveragePool": 1},
    ),
    "global pool": ("p = GlobalAveragePool(r) y = Conv(p, w1)", {"QLinearConv": 2, "QLinearGlobalAveragePool": 1}),
    "leaky relu": ("d = LeakyRelu(c) y = Conv(d, w1)", {"QLinearConv": 2, "QLinearLeakyRelu": 1}),
    "silu": (
        "g = Sigmoid(c) d = Mul(c, g) y = Conv(d, w1)", {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
    ),
    "squeeze and excite": (
        "p = GlobalAveragePool(r) q = Conv(p, w1, b1) g = Sigmoid(q) m = Mul(r, g) y = Conv(m, w2)",
        {"QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QLinearSigmoid": 1, "QLinearMul": 1},
    ),
    "pad": ("p = Pad(r, pads) y = Conv(p, w3)", {"QLinearConv": 2, "Pad": 1}),
    "pad with zeros": ("p = Pad(r, pads, zero) y = Conv(p, w3)", {"QLinearConv": 2, "Pad": 1}),
    "pad, reflecting": ('p = Pad<mode = "reflect">(r, pads) y = Conv(p, w3)', {"QLinearConv": 2, "Pad": 1}),
    "slice": ("s = Slice(r, start, end, axes) y = Conv(s, w1)", {"QLinearConv": 2, "Slice": 1}),
    "resize": (
        's = Resize<mode = "nearest">(r, , twice) y = Conv(s, w1)', {"QLinearConv": 2, "Resize": 1},
    ),
    "split": (
        "s, t = Split<axis = 1>(r, halves) k = Concat<axis = 1>(t, s) y = Conv(k, w1)",
        {"QLinearConv": 2, "Split": 1, "QLinearConcat": 1},
    ),
    "shuffle": (
        "s = Reshape(r, groups) t = Transpose<perm = [0, 2, 1, 3, 4]>(s) u = Reshape(t, back) y = Conv(u, w1)",
        {"QLinearConv": 2, "Reshape": 2},
    ),
    "gather": (
        "s = Reshape(r, groups) t = Gather<axis = 1>(s, second) u = Concat<axis = 1>(t, t) y = Conv(u, w1)",
        {"QLinearConv": 2, "Reshape": 1, "Gather": 1, "QLinearConcat": 1},
    ),
}  # fmt: skip
INDICES = {"first1": np.array([0]), "eight1": np.array([8]), "one1": np.array([1])}


@pytest.mark.parametrize("name", CHAINS)
def test_integers_flow_from_convolution_to_convolution(name: str) -> None:
    body, expected = CHAINS[name]
    model, report, before = quantize(image_network(after_convolution(body), **INDICES), IMAGES)
    assert executed(model, IMAGES[0]) == dict(sorted({**ENDS, **expected}.items()))
    assert 20 < noise(before, model, IMAGES[0]) < 60
    assert report.details["multiply_adds_percent"] == 100.0
    assert not report.left


STAYING: dict[str, tuple[str, dict[str, int]]] = {
    # An activation that does not end at zero is no part of the rounding: the convolution is, nevertheless
    "clip at -1": ("d = Clip(c, minus, unit) y = Conv(d, w1)", {"Clip": 1, "QuantizeLinear": 2, "DequantizeLinear": 2}),
    "two readers": ("s = Add(c, r) y = Conv(s, w1)", {"QLinearAdd": 1, "QuantizeLinear": 2, "DequantizeLinear": 2}),
    "hard swish": (
        "d = HardSwish(c) y = Conv(d, w1)", {"HardSigmoid": 1, "Mul": 1, "QuantizeLinear": 2, "DequantizeLinear": 2},
    ),
    "gate without a kernel": (
        "p = GlobalAveragePool(r) g = HardSigmoid(p) m = Mul(r, g) y = Conv(m, w1)",
        {"QLinearGlobalAveragePool": 1, "HardSigmoid": 1, "QLinearMul": 1, "QuantizeLinear": 2, "DequantizeLinear": 2},
    ),
    "a constant factor": ("d = Mul(c, row) y = Conv(d, w1)", {"Mul": 1, "QuantizeLinear": 2, "DequantizeLinear": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_around_what_has_no_integer_kernel_the_convolutions_have_theirs(name: str) -> None:
    body, expected = STAYING[name]
    model, _, before = quantize(image_network(after_convolution(body)), IMAGES)
    assert executed(model, IMAGES[0]) == dict(sorted({"QLinearConv": 2, **expected}.items()))
    assert 20 < noise(before, model, IMAGES[0]) < 60


TAILS: dict[str, tuple[str, str, dict[str, int]]] = {
    "reshape": ("z = Reshape(r, groups)", "float[n, a, b, c, d] z", {"Reshape": 1}),
    "heads": (
        "s = Sigmoid(c) d = Conv(c, w1) z = Concat<axis = 1>(s, d)", "float[n, e, h, v] z",
        {"QLinearConv": 2, "Sigmoid": 1, "Concat": 1, "DequantizeLinear": 2},
    ),
    "softmax": ("z = Softmax<axis = 1>(c)", "float[n, e, h, v] z", {"Softmax": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_what_is_only_read_as_floats_at_the_end_is_not_rounded_again(name: str) -> None:
    """Scores of 0 to 1 and boxes of hundreds of pixels would share one scale in a Concat."""
    body, outputs, expected = TAILS[name]
    model, _, _ = quantize(image_network(after_convolution(body), outputs=outputs), IMAGES)
    assert executed(model, IMAGES[0]) == dict(sorted({**ENDS, "QLinearConv": 1, **expected}.items()))


def test_a_residual_block_of_resnet() -> None:
    body = """c1 = Conv<pads = [1, 1, 1, 1]>(x, v1, b1) r1 = Relu(c1)
        c2 = Conv<pads = [1, 1, 1, 1]>(r1, v2, b2) r2 = Relu(c2)
        c3 = Conv<pads = [1, 1, 1, 1]>(r2, v3, b3) s = Add(c3, r1) r3 = Relu(s)
        p = GlobalAveragePool(r3) f = Flatten(p) y = Gemm<transB = 1>(f, v4, b4)"""
    weights = {f"v{i + 1}": fan_in(64, 3 if i == 0 else 64, 3, 3, seed=i) for i in range(3)}
    weights |= {f"b{i}": normal(64, seed=i) for i in (1, 2, 3)} | {"v4": fan_in(10, 64), "b4": normal(10)}
    model, report, before = quantize(image_network(body, outputs="float[n, 10] y", **weights), IMAGES)
    assert executed(model, IMAGES[0]) == {
        "Flatten": 1, "QGemm": 1, "QLinearAdd": 1, "QLinearConv": 3, "QLinearGlobalAveragePool": 1, "QuantizeLinear": 1,
    }  # fmt: skip
    assert noise(before, model, IMAGES[0]) > 35
    assert report.bytes_before / report.bytes_after > 3.8
    assert report.details == {
        "multiply_adds_percent": 100.0, "values_quantized": 6, "flowing": 6, "Conv": 3, "Gemm": 1,
    }  # fmt: skip


def test_a_fire_module_of_squeezenet() -> None:
    body = """c0 = Conv(x, v0, b0) r0 = Relu(c0) m0 = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r0)
        s = Conv(m0, v1, b1) sr = Relu(s) e1 = Conv(sr, v2, b2) e1r = Relu(e1)
        e3 = Conv<pads = [1, 1, 1, 1]>(sr, v3, b3) e3r = Relu(e3) k = Concat<axis = 1>(e1r, e3r)
        m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(k) l = Conv(m, v4, b4) lr = Relu(l)
        y = GlobalAveragePool(lr)"""
    shapes = [(32, 3, 3, 3), (32, 32, 1, 1), (96, 32, 1, 1), (96, 32, 3, 3), (10, 192, 1, 1)]
    weights = {f"v{i}": fan_in(*shape, seed=i) for i, shape in enumerate(shapes)}
    weights |= {f"b{i}": normal(shape[0], seed=i) for i, shape in enumerate(shapes)}
    model, report, before = quantize(image_network(body, **weights), IMAGES)
    assert executed(model, IMAGES[0]) == {
        "DequantizeLinear": 1, "NhwcMaxPool": 2, "QLinearConcat": 1, "QLinearConv": 5, "QLinearGlobalAveragePool": 1,
        "QuantizeLinear": 1,
    }  # fmt: skip
    assert noise(before, model, IMAGES[0]) > 30
    assert report.bytes_before / report.bytes_after > 3.3


def test_a_depthwise_block_of_mobilenet() -> None:
    body = """c0 = Conv(x, v0, b0) r0 = Clip(c0, zero, six) e = Conv(r0, v1, b1) er = Clip(e, zero, six)
        d = Conv<group = 24, pads = [1, 1, 1, 1]>(er, v2, b2) dr = Clip(d, zero, six)
        q = Conv(dr, v3, b3) s = Add(q, r0) y = Conv(s, v4)"""
    shapes = [(8, 3, 3, 3), (24, 8, 1, 1), (24, 1, 3, 3), (8, 24, 1, 1), (4, 8, 1, 1)]
    weights = {f"v{i}": 4 * fan_in(*shape, seed=i) for i, shape in enumerate(shapes)}
    weights |= {f"b{i}": normal(shape[0], seed=i) for i, shape in enumerate(shapes)}
    model, _, before = quantize(image_network(body, **weights), IMAGES)
    assert executed(model, IMAGES[0]) == {**ENDS, "QLinearAdd": 1, "QLinearConv": 5}
    assert noise(before, model, IMAGES[0]) > 25


VECTORS = {"x": normal(8, 32)}
MLP = {f"v{i}": fan_in(n, m, seed=i).T.copy() for i, (m, n) in enumerate([(32, 64), (64, 64), (64, 10)])}
MLP |= {f"b{i}": normal(n, seed=i) for i, n in enumerate([64, 64, 10])} | {"v3": fan_in(10, 64, seed=3)}


def test_a_perceptron() -> None:
    body = """h = MatMul(x, v0) a = Add(h, b0) r = Relu(a) h2 = MatMul(r, v1) a2 = Add(b1, h2) r2 = Relu(a2)
        y = Gemm<transB = 1>(r2, v3, b2)"""
    model, report, before = quantize(network("float[n, 32] x", body, "float[n, 10] y", MLP), VECTORS)
    assert executed(model, VECTORS) == {"QGemm": 3, "QuantizeLinear": 1}
    assert 30 < noise(before, model, VECTORS) < 60
    assert report.bytes_before / report.bytes_after > 3


FACTORS: dict[str, tuple[str, str, dict[str, int]]] = {
    "matmul": ("n, 32", "y = MatMul(x, v0)", {"MatMulIntegerToFloat": 1}),
    "bias": ("n, 32", "h = MatMul(x, v0) y = Add(h, b0)", {"QGemm": 1}),
    "bias first": ("n, 32", "h = MatMul(x, v0) y = Add(b0, h)", {"QGemm": 1}),
    "bias as a row": ("n, 32", "h = MatMul(x, v0) y = Add(h, row)", {"QGemm": 1}),
    "tanh": ("n, 32", "h = MatMul(x, v0) a = Add(h, b0) y = Tanh(a)", {"QGemm": 1, "Tanh": 1}),
    "residual": ("n, 32", "h = MatMul(x, square) y = Add(h, x)", {"MatMulIntegerToFloat": 1, "Sum": 1}),
    "gemm": ("n, 32", "y = Gemm(x, v0)", {"MatMulIntegerToFloat": 1}),
    "gemm with a bias": ("n, 32", "y = Gemm(x, v0, b0)", {"QGemm": 1}),
    "gemm with a bias as a row": ("n, 32", "y = Gemm(x, v0, row)", {"QGemm": 1}),
    "gemm with one number": ("n, 32", "y = Gemm(x, v0, one)", {"MatMulIntegerToFloat": 1, "Sum": 1}),
    "gemm with an activation": ("n, 32", "y = Gemm(x, square, x)", {"MatMulIntegerToFloat": 1, "Sum": 1}),
    "sequence": ("n, s, 32", "y = MatMul(x, v0)", {"MatMulIntegerToFloat": 1}),
    "sequence with a bias": ("n, s, 32", "h = MatMul(x, v0) y = Add(h, b0)", {"MatMulIntegerToFloat": 1, "Add": 1}),
    "sequence of fixed size": ("4, 2, 32", "h = MatMul(x, v0) y = Add(h, b0)", {"QGemm": 1, "Reshape": 2}),
    "sequence, residual": ("4, 2, 32", "h = MatMul(x, square) y = Add(h, x)", {"MatMulIntegerToFloat": 1, "Sum": 1}),
    "vector": ("32", "h = MatMul(x, v0) y = Add(h, b0)", {"QGemm": 1, "Reshape": 2}),
}
ROWS = MLP | {"row": normal(1, 64, seed=4), "square": fan_in(32, 32, seed=9), "one": normal(1, 1)}


@pytest.mark.parametrize("name", FACTORS)
def test_a_matrix_product_is_one_of_integers_whatever_is_added_to_it(name: str) -> None:
    shape, body, expected = FACTORS[name]
    feeds = {"x": normal(*(int(d) if d.strip().isdigit() else 4 for d in shape.split(",")))}
    ends = shape.replace("32", "32" if "square" in body else "64")
    model, report, before = quantize(network(f"float[{shape}] x", body, f"float[{ends}] y", ROWS), feeds)
    assert executed(model, feeds) == dict(sorted({"QuantizeLinear": 1, **expected}.items()))
    assert report.changed == 2, "one product, one value"
    assert 30 < noise(before, model, feeds) < 70


def test_factors_that_read_one_value_round_it_once() -> None:
    body = "q = MatMul(x, v0) k = MatMul(x, v4) t = Tanh(x) u = MatMul(t, v4) a = Add(q, k) y = Add(a, u)"
    model, report, before = quantize(
        network("float[n, s, 32] x", body, "float[n, s, 64] y", ROWS | {"v4": normal(32, 64, seed=8)}),
        {"x": normal(2, 3, 32)},
    )
    assert count(model)["QuantizeLinear"] == 2
    assert report.details["values_quantized"] == 2
    assert noise(before, model, {"x": normal(2, 3, 32)}) > 30
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    assert tanh.inputs[0] is model.graph.inputs[0], "who reads floats goes on to do so"


@pytest.mark.parametrize("settings", [{"symmetric": True}, {"symmetric": True, "activations": "int8"}])
def test_with_zero_in_the_middle_an_activation_is_no_part_of_the_rounding(settings: dict[str, object]) -> None:
    model, _, before = quantize(image_network(f"{CONV} y = Conv(r, w1, b1)"), IMAGES, **settings)
    assert executed(model, IMAGES[0]) == {
        "DequantizeLinear": 2, "QLinearConv": 2, "QuantizeLinear": 2, "Relu": 1,
    }  # fmt: skip
    assert noise(before, model, IMAGES[0]) > 30


def test_what_the_graph_returns_keeps_its_name_and_shape() -> None:
    """c is read by a Relu and returned, r by a pool that shares its scale, p is a pool and returned."""
    body = f"""{CONV} p = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(p, w1) k = MaxPool<kernel_shape = [2, 2]>(c)
        z = Conv(k, w1)"""
    outputs = "float[n, c, h, v] y, float[n, d, e, f] c, float[n, i, j, o] r, float[n, s, t, u] p, float[n, q, l, m] z"
    model, _, before = quantize(image_network(body, outputs=outputs), IMAGES)
    assert [v.name for v in model.graph.outputs] == ["y", "c", "r", "p", "z"]
    assert [len(v.shape or ()) for v in model.graph.outputs] == [4] * 5
    for expected, got in zip(run(before, IMAGES[0]), run(model, IMAGES[0]), strict=True):
        assert expected.shape == got.shape
        assert 25 < 10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum()) < 60
    assert executed(model, IMAGES[0])["QLinearConv"] == 3

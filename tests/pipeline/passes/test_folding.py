# SPDX-License-Identifier: Apache-2.0
"""Folding a scale changes weights, and no output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pass_tools import Array, count, model_from, normal, run, session, to_bytes

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.pipeline.passes.folding import (
    edit_constant,
    find_fold,
    fold_input_scale,
    matrix_of,
    scale_matrices,
)
from onnxpress.pipeline.passes.graph import nodes_of

WIDTH = 8
HEADER = (
    '<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> g (float[b, s, 8] x{more}) => (float[b, s, 4] y)'
)

# What makes `h`, the input of the layers; how it is absorbed, or None where only a Mul can
SHAPES: dict[str, tuple[str, str | None]] = {
    "layer norm": ("h = LayerNormalization<axis = -1>(x, gamma, beta)", "norm"),
    "layer norm without beta": ("h = LayerNormalization<axis = -1>(x, gamma)", "norm"),
    "skip layer norm": ("h = com.microsoft.SkipLayerNormalization(x, x, gamma, beta)", "norm"),
    "skip simplified": ("h = com.microsoft.SkipSimplifiedLayerNormalization(x, x, gamma, beta)", "norm"),
    "rms of primitives": (
        "sq = Mul(x, x) m = ReduceMean<keepdims = 1>(sq, last) r = Sqrt(m) n = Div(x, r) h = Mul(gamma, n)",
        "constant",
    ),
    "norm of primitives": (
        "m = ReduceMean<keepdims = 1>(x, last) d = Sub(x, m) sq = Mul(d, d) v = ReduceMean<keepdims = 1>(sq, last) "
        "r = Sqrt(v) n = Div(d, r) g = Mul(n, gamma) h = Add(g, beta)",
        "constant",
    ),
    "constant divisor": ("h = Div(x, gamma)", "constant"),
    "linear": ("h = MatMul(x, square)", "linear"),
    "linear with bias": ("p = MatMul(x, square) h = Add(beta, p)", "linear"),
    "linear with a constant scalar": ("p = MatMul(x, square) a = Add(p, half) h = Mul(a, half)", "linear"),
    "weight behind a transpose": ("t = Transpose<perm = [1, 0]>(square) h = MatMul(x, t)", "linear"),
    "relu": ("p = MatMul(x, square) q = Add(p, beta) h = Relu(q)", "linear"),
    "leaky relu": ("p = MatMul(x, square) q = Sub(beta, p) h = LeakyRelu<alpha = 0.1>(q)", "linear"),
    "gemm": (
        "f = Reshape(x, flat) p = Gemm<transB = 1>(f, square, beta) h = Reshape(p, back)",
        "linear",
    ),
    "gated": ("g = MatMul(x, gate) i = Sigmoid(g) a = Mul(g, i) u = MatMul(x, square) h = Mul(a, u)", "linear"),
    "gated, linear branch first": ("g = MatMul(x, gate) a = Tanh(g) u = MatMul(x, square) h = Mul(u, a)", "linear"),
    "attention": (
        "v = MatMul(x, square) vb = Add(v, beta) vr = Reshape(vb, split) vh = Transpose<perm = [0, 2, 1, 3]>(vr) "
        "q = MatMul(x, gate) qr = Reshape(q, split) qh = Transpose<perm = [0, 2, 1, 3]>(qr) "
        "kh = Transpose<perm = [0, 2, 3, 1]>(qr) s = MatMul(qh, kh) p = Softmax<axis = -1>(s) "
        "o = MatMul(p, vh) ot = Transpose<perm = [0, 2, 1, 3]>(o) h = Reshape(ot, merge)",
        "linear",
    ),
    "attention, packed": (
        "qkv = MatMul(x, triple) b = Add(qkv, beta3) q, k, v = Split<axis = -1, num_outputs = 3>(b) "
        "h = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v)",
        "linear",
    ),
    "attention, fused": (
        "v = MatMul(x, square) q = MatMul(x, gate) h = com.microsoft.MultiHeadAttention<num_heads = 2>(q, q, v, beta3)",
        "linear",
    ),
    "the first token": ("n = LayerNormalization<axis = -1>(x, gamma, beta) h = Gather<axis = 1>(n, first)", "norm"),
    "opset 23: rms norm": ("h = RMSNormalization<axis = -1>(x, gamma)", "norm"),
    "opset 23: attention": (
        "v = MatMul(x, square) q = MatMul(x, gate) "
        "h = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(q, q, v)",
        "linear",
    ),
    "opset 23: heads that share": (
        "v = MatMul(x, narrow) q = MatMul(x, gate) h = Attention<q_num_heads = 2, kv_num_heads = 1>(q, v, v)",
        None,
    ),
    "heads that share, of primitives": (
        "v = MatMul(x, narrow) vr = Reshape(v, split1) vh = Transpose<perm = [0, 2, 1, 3]>(vr) "
        "ve = Expand(vh, two_heads) s = MatMul(x, square) st = Unsqueeze(s, first) sm = MatMul(st, sees) "
        "p = Softmax<axis = -1>(sm) "
        "o = MatMul(p, ve) ot = Transpose<perm = [0, 2, 1, 3]>(o) h = Reshape(ot, merge)",
        None,
    ),
    "activation function": ("p = MatMul(x, square) h = Tanh(p)", None),
    "gelu of primitives": (
        "p = MatMul(x, square) e = Erf(p) f = Add(e, half) g = Mul(p, f) h = Mul(g, half)",
        None,
    ),
    "two branches that bend": ("g = Tanh(x) i = Sigmoid(x) h = Mul(g, i)", None),
    "residual sum": ("p = MatMul(x, square) h = Add(p, x)", None),
    "input": ("h = Neg(x)", None),
}
CONSTANTS: dict[str, Array] = {
    "gamma": np.exp(normal(WIDTH, seed=1)),
    "beta": normal(WIDTH, seed=2),
    "beta3": normal(3 * WIDTH, seed=3),
    "square": normal(WIDTH, WIDTH, seed=4),
    "gate": normal(WIDTH, WIDTH, seed=5),
    "triple": normal(WIDTH, 3 * WIDTH, seed=6),
    "half": np.array(0.5, np.float32),
    "narrow": normal(WIDTH, WIDTH // 2, seed=10),
    "sees": normal(WIDTH, 3, seed=11),
    "first": np.array([1]),
    "split1": np.array([0, 0, 1, WIDTH // 2]),
    "two_heads": np.array([1, 2, 1, 1]),
    "last": np.array([-1]),
    "flat": np.array([-1, WIDTH]),
    "back": np.array([2, -1, WIDTH]),
    "split": np.array([0, 0, 2, WIDTH // 2]),
    "merge": np.array([0, 0, WIDTH]),
}
TAIL = "h1 = MatMul(h, w1) wt = Transpose<perm = [1, 0]>(w2) h2 = MatMul(h, wt) y = Add(h1, h2)"


def build(body: str, tail: str = TAIL, *, opset: int = 18, **more: Array) -> ir.Model:
    """`body` makes h [b, s, 8] from x; two layers read it."""
    weights = {"w1": normal(WIDTH, 4, seed=7), "w2": normal(4, WIDTH, seed=8), **CONSTANTS, **more}
    text = f"{body} {tail}"
    used = {n: a for n, a in weights.items() if f"({n}" in text or f" {n}," in text or f" {n})" in text}
    kinds = {"float32": "float", "float16": "float16", "int64": "int64"}
    more_inputs = "".join(f", {kinds[a.dtype.name]}{list(a.shape) or ''} {n}" for n, a in used.items())
    return model_from(HEADER.format(opset=opset, more=more_inputs) + " { " + text + " }", used)


def value_of(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in nodes_of(model) for v in n.outputs if v.name == name)


def layers(model: ir.Model, name: str = "h") -> list[ir.Node]:
    return [u.node for u in value_of(model, name).uses() if u.node.op_type in ("MatMul", "Gemm") and u.idx == 0]


X = {"x": normal(2, 3, WIDTH, seed=9)}
scales = npst.arrays(np.float32, WIDTH, elements=st.floats(2.0**-6, 2.0**6, width=32))


def assert_close(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=5, deadline=None)
@given(scale=scales)
def test_the_output_stays(shape: str, scale: Array) -> None:
    body, how = SHAPES[shape]
    model = build(body, opset=23 if shape.startswith("opset 23") else 18)
    expected, before = run(model, X)[0], count(model)
    h, readers = value_of(model, "h"), layers(model)
    found = find_fold(h, readers, WIDTH)
    record = fold_input_scale(model, h, scale, readers)
    scale_matrices(model, readers, scale)
    got = run(model, X)[0]
    assert_close(got, expected)
    if how is None:
        assert isinstance(found, str)
        assert (record["how"], record["reason"]) == ("mul", found)
        assert count(model)["Mul"] == before.get("Mul", 0) + 1
    else:
        assert isinstance(found, dict)
        assert record["how"] == found["how"] == how
        assert count(model) == before


@pytest.mark.parametrize("shape", [name for name, (_, how) in SHAPES.items() if how])
def test_weights_change_and_no_node_is_added(shape: str) -> None:
    model = build(SHAPES[shape][0], opset=23 if shape.startswith("opset 23") else 18)
    before = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items() if v.const_value is not None}
    h, readers = value_of(model, "h"), layers(model)
    record = fold_input_scale(model, h, np.full(WIDTH, 2, np.float32), readers, insert_mul=False)
    assert record["weights"]
    for name in record["weights"]:
        new = model.graph.initializers[name].const_value
        assert new is not None
        old = before[name.removesuffix("_scaled")]
        ratio = old / new.numpy()
        # The values' part alone where queries and keys share the weight
        assert set(np.unique(ratio)) <= {np.float32(v) for v in (0.5, 1.0, 2.0)}
        assert not np.array_equal(old, new.numpy())


def test_values_that_are_scaled_change_their_names() -> None:
    """Whoever compares this graph with another one by names compares what is the same alone."""
    model = build(SHAPES["attention"][0])
    scale, readers = np.exp(normal(WIDTH)), layers(model)
    fold_input_scale(model, value_of(model, "h"), scale, readers)
    scale_matrices(model, readers, scale)
    names = {str(v.name) for n in nodes_of(model) for v in n.outputs}
    scaled = {name.removesuffix("_scaled") for name in names if name.endswith("_scaled")}
    assert scaled == {"v", "vb", "vr", "vh", "o", "ot", "h"}
    assert {"q", "qr", "qh", "kh", "s", "p", "y"} <= names


def test_reasons_name_what_is_in_the_way() -> None:
    def reason(shape: str) -> str:
        model = build(SHAPES[shape][0], opset=23 if shape.startswith("opset 23") else 18)
        found = find_fold(value_of(model, "h"), layers(model), WIDTH)
        assert isinstance(found, str)
        return found

    assert "does not pass Tanh" in reason("activation function")
    assert "read by others too" in reason("gelu of primitives")
    assert "does not pass Expand" in reason("heads that share, of primitives")
    assert "share keys and values" in reason("opset 23: heads that share")
    assert "sum of two activations" in reason("residual sum")
    assert "an input of the graph" in reason("input")


RESIDUAL = "h1 = MatMul(h, w1) h2 = MatMul(h, w2t) a = Add(h1, h2) r = ReduceMean<keepdims = 1>(h, last) y = Add(a, r)"


def test_another_reader_keeps_what_it_read() -> None:
    """As after a LayerNormalization that a residual connection passes by: one Mul for both layers."""
    model = build("h = LayerNormalization<axis = -1>(x, gamma, beta)", RESIDUAL, w2t=normal(WIDTH, 4, seed=8))
    expected, gamma = run(model, X)[0], model.graph.initializers["gamma"].const_value
    h, readers, scale = value_of(model, "h"), layers(model), np.exp2(np.arange(WIDTH)).astype(np.float32)
    names = [str(v.name) for n in model.graph for v in n.outputs]
    with pytest.raises(OnnxpressError, match=r"cannot be folded.*also read by.*ReduceMean"):
        fold_input_scale(model, h, scale, readers, insert_mul=False)
    record = fold_input_scale(model, h, scale, readers)
    scale_matrices(model, readers, scale)
    assert count(model)["Mul"] == 1
    assert model.graph.initializers["gamma"].const_value is gamma
    assert [u.node.op_type for u in h.uses()] == ["ReduceMean", "Mul"]
    assert len({node.inputs[0] for node in readers}) == 1
    assert set(names) < {str(v.name) for n in model.graph for v in n.outputs}
    np.testing.assert_array_equal(model.graph.initializers[record["weights"][0]].const_value.numpy(), 1 / scale)
    assert_close(run(model, X)[0], expected)


def test_a_layer_that_is_not_compensated_is_another_reader() -> None:
    model = build("h = LayerNormalization<axis = -1>(x, gamma, beta)")
    expected, (first, _) = run(model, X)[0], layers(model)
    scale = np.full(WIDTH, 4, np.float32)
    assert fold_input_scale(model, value_of(model, "h"), scale, [first])["how"] == "mul"
    scale_matrices(model, [first], scale)
    assert_close(run(model, X)[0], expected)


def test_what_the_graph_returns_is_not_scaled() -> None:
    model = build("h = LayerNormalization<axis = -1>(x, gamma, beta)")
    h = value_of(model, "h")
    h.shape, h.dtype = ir.Shape(["b", "s", WIDTH]), ir.DataType.FLOAT
    model.graph.outputs.append(h)
    expected, readers, scale = run(model, X), layers(model), np.exp(normal(WIDTH))
    assert fold_input_scale(model, h, scale, readers)["reason"] == "the activation is an output of the graph"
    scale_matrices(model, readers, scale)
    for old, new in zip(expected, run(model, X), strict=True):
        assert_close(new, old)


def test_an_input_of_the_graph_gets_a_mul_at_its_start() -> None:
    model = build("", TAIL.replace("h,", "x,"))
    expected, x = run(model, X)[0], model.graph.inputs[0]
    readers, scale = [u.node for u in x.uses()], np.exp(normal(WIDTH))
    fold_input_scale(model, x, scale, readers)
    scale_matrices(model, readers, scale)
    assert model.graph[0].op_type == "Mul"
    assert_close(run(model, X)[0], expected)


def test_weights_of_others_stay() -> None:
    """gamma, beta and w1 have other readers: these keep theirs, in bytes."""
    others = "k = LayerNormalization<axis = -1>(x, gamma, beta) "
    tail = "h1 = MatMul(h, w1) k1 = MatMul(k, w1) y = Add(h1, k1)"
    model = build(others + "h = LayerNormalization<axis = -1>(x, gamma, beta)", tail)
    kept = {n: model.graph.initializers[n].const_value.numpy().tobytes() for n in ("gamma", "beta", "w1")}
    expected, readers, scale = run(model, X)[0], layers(model), np.exp(normal(WIDTH))
    record = fold_input_scale(model, value_of(model, "h"), scale, readers)
    assert record["weights"] == ["gamma_scaled", "beta_scaled"]
    assert scale_matrices(model, readers, scale) == ["w1_scaled"]
    assert kept == {n: model.graph.initializers[n].const_value.numpy().tobytes() for n in kept}
    assert_close(run(model, X)[0], expected)


def test_layers_that_share_a_weight_scale_it_once() -> None:
    tail = "h1 = MatMul(h, w) f = Reshape(h, flat) h2 = MatMul(f, w) b = Reshape(h2, back) y = Add(h1, b)"
    model = build("h = Relu(x)", tail, w=normal(WIDTH, 4, seed=3), back=np.array([2, -1, 4]))
    nodes = [n for n in model.graph if n.op_type == "MatMul"]
    old = model.graph.initializers["w"].const_value.numpy().copy()
    assert scale_matrices(model, nodes, np.full(WIDTH, 2, np.float32)) == ["w"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), 2 * old)


def test_a_weight_that_is_read_in_two_orientations() -> None:
    tail = (
        "f = Reshape(h, flat) h1 = MatMul(f, square) h2 = Gemm<transB = 1>(f, square) a = Add(h1, h2) "
        "c = MatMul(a, w1) y = Reshape(c, out)"
    )
    model = build("h = LayerNormalization<axis = -1>(x, gamma, beta)", tail, out=np.array([2, 3, 4]))
    expected, f = run(model, X)[0], value_of(model, "f")
    readers, scale = layers(model, "f"), np.exp(normal(WIDTH))
    assert len(readers) == 2
    assert fold_input_scale(model, f, scale, readers)["through"]
    scale_matrices(model, readers, scale)
    assert_close(run(model, X)[0], expected)


def test_layers_inside_a_branch() -> None:
    model = model_from(
        """
        <ir_version: 10, opset_import: ["": 18]>
        g (float[b, 8] x, bool c, float[8] gamma, float[8, 4] w) => (float[b, 4] y) {
            h = LayerNormalization<axis = -1>(x, gamma)
            y = If (c) <
                then_branch = t () => (float[b, 4] p) { p = MatMul(h, w) },
                else_branch = e () => (float[b, 4] q) { r = MatMul(h, w) q = Neg(r) }
            >
        }""",
        {"gamma": normal(8), "w": normal(8, 4)},
    )
    feeds = {"x": normal(2, 8), "c": np.array(False)}
    expected, scale = run(model, feeds)[0], np.exp(normal(8, seed=2))
    readers = layers(model)
    assert len(readers) == 2
    assert fold_input_scale(model, value_of(model, "h"), scale, readers[:1])["how"] == "mul"
    scale_matrices(model, readers[:1], scale)
    assert_close(run(model, feeds)[0], expected)
    assert_close(run(model, {**feeds, "c": np.array(True)})[0], -expected)


def test_simplified_layer_normalization_as_onnx_runtime_writes_it() -> None:
    model = build("h = SimplifiedLayerNormalization<axis = -1>(x, gamma)")
    found = find_fold(value_of(model, "h"), layers(model), WIDTH)
    assert isinstance(found, dict)
    assert (found["how"], found["weights"]) == ("norm", ["gamma"])


def test_a_scale_that_half_precision_cannot_hold_becomes_a_mul() -> None:
    body = "n = LayerNormalization<axis = -1>(x, gamma) c = Cast<to = 10>(n) d = Mul(c, large) h = Cast<to = 1>(d)"
    model = build(body, large=np.full(WIDTH, 100, np.float16))
    d = value_of(model, "d")
    readers = [use.node for use in d.uses()]
    with pytest.raises(OnnxpressError, match="1 / scale of 'd' is out of the range of float16"):
        fold_input_scale(model, d, np.full(WIDTH, 1e-5, np.float32), readers)
    record = fold_input_scale(model, d, np.full(WIDTH, 1e-3, np.float32), readers)
    assert record["reason"] == "the scale carries 'large' out of the range of float16"


def test_unknown_shapes_are_not_guessed() -> None:
    model = build(SHAPES["attention"][0])
    value_of(model, "ot").shape = None
    assert find_fold(value_of(model, "h"), layers(model), WIDTH) == "the shape around h is not known"


def test_reshape_that_cuts_the_channels() -> None:
    model = build("p = Reshape(x, cut) q = Relu(p) h = Reshape(q, back)", cut=np.array([2, 4, 6]))
    found = find_fold(value_of(model, "h"), layers(model), WIDTH)
    assert found == "h cuts the channels differently"


@pytest.mark.parametrize("scale", [[1.0] * 7 + [0.0], [1.0] * 7 + [-1.0], [1.0] * 7 + [np.nan], [[1.0] * 8]])
def test_scales_are_positive(scale: list[float]) -> None:
    model = build("h = LayerNormalization<axis = -1>(x, gamma)")
    before = to_bytes(model)
    with pytest.raises(OnnxpressError, match="positive, finite"):
        fold_input_scale(model, value_of(model, "h"), np.array(scale), layers(model))
    assert to_bytes(model) == before


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Add(x, beta4)", "Add is no MatMul or Gemm"),
        ("z = MatMul(x, x2) y = MatMul(z, w1)", "the right factor is no constant"),
        ("k = Constant<value = float[8, 4] {1}>() y = MatMul(x, k)", "the weight is a Constant node"),
        ("y = MatMul(x, w3)", "the weight is not a matrix of floating point numbers"),
        ("f = Reshape(x, flat) t = Transpose(f) p = Gemm<transA = 1>(t, w1) y = Reshape(p, out)", "Gemm with transA"),
    ],
)
def test_layers_without_a_weight(body: str, reason: str) -> None:
    if "Constant<" in body:
        body = body.replace("{1}", "{" + ", ".join(["1"] * 32) + "}")
    more = {"beta4": normal(4), "w3": normal(1, WIDTH, 4), "out": np.array([2, 3, 4])}
    model = build(body.replace("x2", "square"), "", **more)
    if "no constant" in reason:
        square = model.graph.initializers.pop("square")
        square.const_value = None
        model.graph.inputs.append(square)
    node = next(n for n in model.graph if n.op_type in ("MatMul", "Gemm", "Add"))
    assert matrix_of(node) == reason
    with pytest.raises(OnnxpressError, match="has no weight to scale"):
        scale_matrices(model, [node], np.ones(WIDTH))


def test_the_weight_by_input_channel() -> None:
    model = build("h = Relu(x)")
    for node, name in zip(layers(model), ("w1", "w2"), strict=True):
        matrix = matrix_of(node)
        assert not isinstance(matrix, str)
        assert matrix.stored.name == name
        assert matrix.by_input().shape == (WIDTH, 4)


def test_a_constant_node_is_replaced_by_a_weight() -> None:
    model = build("k = Constant<value = float[8] {1, 2, 3, 4, 5, 6, 7, 8}>() h = Mul(x, k)")
    node = value_of(model, "h").producer()
    assert node is not None
    assert edit_constant(model, [(node, 1)], lambda a: a * 2) == "k_scaled"
    assert "Constant" not in count(model)
    session(model)

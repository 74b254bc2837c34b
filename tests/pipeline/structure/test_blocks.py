# SPDX-License-Identifier: Apache-2.0
"""Which residual branches and layers are found, and why others are not."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

sys.path.append(str(Path(__file__).parents[1] / "passes"))
import numpy as np
import pytest
from pass_tools import model_from, normal, run, to_bytes
from residual_networks import transformer
from static_tools import fan_in, image_network, network

from onnxpress.pipeline.structure.blocks import Block, dead_nodes, find_blocks, read_sizes_of_inputs

SQUARE = {f"m{i}": normal(8, 8, seed=i) for i in range(6)}


def pairs(blocks: list[Block]) -> list[list[tuple[str, str]]]:
    return [block.replaced() for block in blocks]


def vectors(body: str, outputs: str = "float[n, 8] y", **more: np.ndarray) -> ir.Model:
    return network("float[n, 8] x", body, outputs, {**SQUARE, "g": normal(8), **more})


def test_parts_of_a_pre_norm_transformer_are_sums_and_layers_are_two_of_them() -> None:
    found = find_blocks(transformer("pre", 2))
    assert [(b.kind, *b.replaced()[0]) for b in found.parts] == [
        ("attention", "s", "a0_sum"),
        ("feed-forward", "a0_sum", "f0_sum"),
        ("attention", "f0_sum", "a1_sum"),
        ("feed-forward", "a1_sum", "f1_sum"),
    ]
    first = [("s", "a0_sum"), ("a0_sum", "f0_sum")]
    assert pairs(found.layers) == [first, [("f0_sum", "a1_sum"), ("a1_sum", "f1_sum")]]
    assert not any(block.reason for block in found.parts + found.layers)
    assert not found.stays


def test_in_a_post_norm_transformer_the_norm_belongs_to_the_part() -> None:
    found = find_blocks(transformer("post", 2))
    assert pairs(found.layers) == [
        [("s", "a0_out"), ("a0_out", "f0_out")],
        [("f0_out", "a1_out"), ("a1_out", "f1_out")],
    ]


def test_one_layer_that_does_not_repeat_is_still_attention_and_feed_forward() -> None:
    assert [len(layer.parts) for layer in find_blocks(transformer("pre", 1)).layers] == [2]


def test_where_the_stream_is_no_norm_the_norm_behind_the_first_sum_stays() -> None:
    body = """
    a = MatMul(x, m0) r = Add(a, x) n = LayerNormalization(r, g)
    b = MatMul(n, m1) s = Add(b, n) y = LayerNormalization(s, g)"""
    found = find_blocks(vectors(body))
    assert pairs(found.parts) == [[("x", "r")], [("n", "y")]]
    assert pairs(found.layers) == [[("x", "r")], [("n", "y")]]


def test_attention_and_feed_forward_side_by_side() -> None:
    """As in GPT-J: both read one norm of the stream, and either may go."""
    body = """
    n = LayerNormalization(x, g) q = MatMul(n, m0) p = Softmax(q) a = MatMul(p, m1) s = Add(a, x)
    f = MatMul(n, m2) y = Add(f, s)"""
    assert pairs(find_blocks(vectors(body)).parts) == [[("x", "s")], [("s", "y")]]
    joined = body.replace("s = Add(a, x)", "").replace("y = Add(f, s)", "y = Sum(a, x, f)")
    assert pairs(find_blocks(vectors(joined)).parts) == [[("x", "y")]]


def test_a_residual_block_takes_its_relu_along_where_the_stream_comes_from_one() -> None:
    body = """
    c0 = Conv<pads = [1, 1, 1, 1]>(x, w0, b0) a = Relu(c0)
    c1 = Conv(a, w1, b1) s1 = Add(c1, a) r1 = Relu(s1)
    c2 = Conv(r1, w1, b1) s2 = Add(r1, c2) r2 = Sigmoid(s2)
    c3 = Conv(r2, w1, b1) s3 = Add(r2, c3) y = Relu(s3)"""
    found = find_blocks(image_network(body))
    assert pairs(found.parts) == [[("a", "r1")], [("r1", "s2")], [("r2", "s3")]]
    assert [block.kind for block in found.parts] == ["convolution"] * 3
    assert pairs(found.layers) == pairs(found.parts)


def test_a_shortcut_with_weights_is_left_with_the_reason() -> None:
    body = """
    c0 = Conv<pads = [1, 1, 1, 1]>(x, w0, b0) a = Relu(c0)
    c1 = Conv<strides = [2, 2]>(a, w1, b1) p = Conv<strides = [2, 2]>(a, down) y = Add(c1, p)"""
    found = find_blocks(image_network(body, down=fan_in(8, 8, 1, 1)))
    assert not found.parts
    assert [stays.reason for stays in found.stays] == ["its shortcut is not what the branch starts from"]


def test_what_is_added_without_weights_or_from_elsewhere_is_no_block() -> None:
    assert not find_blocks(vectors("c = Mul(x, x) y = Add(c, x)")).parts, "no weight goes"
    assert not find_blocks(vectors("a = MatMul(x, m0) b = MatMul(x, m1) y = Add(a, b)")).parts, "no shortcut"
    assert not find_blocks(vectors("a = MatMul(x, m0) y = Add(a, g)")).parts, "a bias"
    assert not find_blocks(vectors("a = MatMul(x, m0) y = Mul(a, x)")).parts, "no sum"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (
            "k = MatMul(x, m0) a = MatMul(k, m1) y = Add(a, x)",
            ", float[n, 8] k",
            "the graph returns 'k' from within it",
        ),
        ("k = MatMul(x, m0) a = MatMul(k, m1) s = Add(a, x) y = Mul(s, k)", "", "k within it is needed elsewhere"),
    ],
)
def test_a_branch_that_others_need_cannot_go(body: str, outputs: str, reason: str) -> None:
    model = vectors(body, f"float[n, 8] y{outputs}")
    found = find_blocks(model)
    assert [block.reason for block in found.parts] == [reason]
    assert [block.reason for block in found.layers] == [reason]


def test_a_layer_with_a_part_that_cannot_go_cannot_go_either() -> None:
    found = find_blocks(transformer("pre", 2, outputs=", float[n, t, 8] a1_k"))
    assert [bool(block.reason) for block in found.parts] == [False, False, True, False]
    assert [block.reason for block in found.layers] == ["", "the graph returns 'a1_k' from within it"]


def test_a_branch_that_stretches_the_stream_cannot_go() -> None:
    body = "f = MatMul(x, m0) e = Add(f, rows) y = Add(e, x)"
    model = network("float[1, 8] x", body, "float[5, 8] y", {**SQUARE, "rows": normal(5, 8)})
    assert [block.reason for block in find_blocks(model).parts] == ["it changes the shape of what it is added to"]


def test_sums_within_ones_of_the_runtime_are_left() -> None:
    model = model_from(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[n, 2, 8] x, float[8, 8] m, float[8] g) => (float[n, 2, 8] y)
        { a = MatMul(x, m) y = com.microsoft.SkipLayerNormalization(a, x, g) }""",
        {"m": normal(8, 8), "g": normal(8)}, infer=False,
    )  # fmt: skip
    assert "sum and norm at once" in find_blocks(model).stays[0].reason


def test_a_mask_or_another_network_may_come_from_outside() -> None:
    """Cross-attention: keys and values are computed from the encoder, and go with the branch."""
    body = """
    k = MatMul(e, m0) q = MatMul(x, m1) t = Transpose(k) s = MatMul(q, t) w = Add(s, mask) p = Softmax(w)
    c = MatMul(p, k) o = MatMul(c, m2) y = Add(o, x)"""
    model = network("float[n, 8] x, float[l, 8] e, float[n, l] mask", body, "float[n, 8] y", SQUARE)
    (part,) = find_blocks(model).parts
    assert (part.kind, part.replaced()) == ("attention", [("x", "y")])
    gone = dead_nodes(model, {part.parts[0].target: part.parts[0].source})
    assert len(gone) == len(model.graph)


def test_layers_are_what_repeats() -> None:
    """Three parts a layer: attention, attention, feed-forward, as in a decoder that reads an encoder."""
    lines, stream = [], "x"
    for layer in range(2):
        for part in range(3):
            name = f"h{layer}{part}"
            middle = f"{name}_p = Softmax({name}_q) " if part < 2 else f"{name}_p = Relu({name}_q) "
            lines.append(
                f"{name}_q = MatMul({stream}, m{part}) {middle} {name}_o = MatMul({name}_p, m{part + 3}) "
                f"{name} = Add({stream}, {name}_o)"
            )
            stream = name
    found = find_blocks(vectors("\n".join(lines), "float[n, 8] h12"))
    assert [len(layer.parts) for layer in found.layers] == [3, 3]


def test_blocks_are_named_after_their_weights_and_no_two_alike() -> None:
    model = transformer("pre", 2)
    for name, value in list(model.graph.initializers.items()):
        if name[0] == "l" and name != "last":
            value.name = f"encoder.{name[1]}.{name[3:]}.weight"
    found = find_blocks(model)
    assert [str(layer) for layer in found.layers] == ["layer encoder.0", "layer encoder.1"]
    assert len({str(block) for block in found.parts + found.layers}) == 6


def test_lengths_are_read_from_the_inputs() -> None:
    """The first layer's query tells the batch size to all layers; its layer can go all the same."""
    body = """
    a = MatMul(x, m0) s = Add(a, x) d = Shape<start = 0, end = 1>(a) b = Expand(one, d) u = Unsqueeze(b, last)
    f = MatMul(s, m1) v = Mul(f, u) y = Add(v, s)"""
    model = vectors(body, one=normal(1), last=np.array([1]))
    assert [bool(block.reason) for block in find_blocks(model).parts] == [True, False]
    feeds, before = {"x": normal(3, 8)}, to_bytes(model)
    read_sizes_of_inputs(model)
    assert [bool(block.reason) for block in find_blocks(model).parts] == [False, False]
    np.testing.assert_array_equal(run(model, feeds)[0], run(before, feeds)[0])


def test_lengths_are_rebuilt_from_numbers_and_names() -> None:
    body = "a = MatMul(x, wide) d = Shape(a) s = Cast<to = 1>(d) y = Reshape(s, two)"
    model = vectors(body, "float[1, 2] y", wide=normal(8, 3), two=np.array([1, 2]))
    before = len(model.graph)
    read_sizes_of_inputs(model)
    assert len(model.graph) == before + 2
    gone = dead_nodes(model, {})
    assert [node.op_type for node in gone] == ["MatMul"]
    assert run(model, {"x": normal(5, 8)})[0].tolist() == [[5, 3]]


def test_lengths_without_names_are_left_alone() -> None:
    body = "a = NonZero(x) d = Shape(a) s = Cast<to = 1>(d) y = Reshape(s, two)"
    model = vectors(body, "float[1, 2] y", two=np.array([1, 2]))
    read_sizes_of_inputs(model)
    assert run(model, {"x": np.ones((5, 8), np.float32)})[0].tolist() == [[2, 40]]


def test_a_mask_that_all_layers_read_is_no_shortcut() -> None:
    """Scores of the second layer depend on the mask by way of the first."""
    body = """
    q0 = MatMul(x, m0) w0 = Add(q0, mask) p0 = Softmax(w0) o0 = MatMul(p0, m1) s0 = Add(x, o0)
    q1 = MatMul(s0, m2) w1 = Add(q1, mask) p1 = Softmax(w1) o1 = MatMul(p1, m3) s1 = Add(s0, o1)"""
    model = network("float[n, 8] x, float[n, 8] mask", body, "float[n, 8] s1", SQUARE)
    found = find_blocks(model)
    assert pairs(found.parts) == [[("x", "s0")], [("s0", "s1")]]
    assert not any(block.reason for block in found.parts)

# SPDX-License-Identifier: Apache-2.0
"""What is known of sizes that only the run tells."""

from __future__ import annotations

import pytest

from onnxpress.pipeline.structure.probing import agreed, probe
from onnxpress.pipeline.structure.walk import walk_graph

from .oracle import graph_of


def net(inputs: str, body: str, constants: str = "", output: str = "y") -> str:
    return (
        f'<ir_version: 10, opset_import: ["": 21]>\nnet ({inputs}) => (float[S] {output}) <{constants}>\n'
        f"{{\n{body}\n {output} = Relu (r)\n}}"
    )


def test_a_graph_of_fixed_sizes_needs_one_probe() -> None:
    (only,) = probe(graph_of(net("float[2, 6] x", "r = Transpose (x)")))
    assert only.shapes["r"] == (6, 2)


def test_sizes_of_one_name_are_one_number() -> None:
    first, *_ = probe(graph_of(net("float[N, T] x, float[T, N] z", "r = MatMul (x, z)")))
    batch, length = first.shapes["x"]
    assert first.shapes["z"] == (length, batch)
    assert batch != length


def test_a_named_sum_is_the_sum() -> None:
    text = net("float[N, T] x, float[N, P] p, float[N, S] m", "c = Concat <axis = 1> (x, p)\n r = Add (c, m)")
    model = graph_of(text)
    model.graph.inputs[2].shape = type(model.graph.inputs[2].shape)(["N", "P + T"])  # type: ignore[arg-type, misc]
    first, *_ = probe(model)
    assert first.shapes["m"] == first.shapes["c"] == first.shapes["r"]


@pytest.mark.parametrize(
    ("body", "fixed"),
    [
        ("r = Reshape (x, whole)", True),
        ("r = Slice (x, zero, eight, zero)", False),  # shorter in a short sample
        ("s = Shape <end = 1> (x)\n e = Add (s, many)\n n = Div (e, many)\n r = ConstantOfShape (n)", False),  # windows
        ("s = Shape <end = 1> (x)\n d = Div (s, s)\n n = Mul (d, many)\n r = ConstantOfShape (n)", True),
    ],
)
def test_what_is_the_same_in_every_run(body: str, fixed: bool) -> None:
    constants = "int64[1] whole = {8}, int64[1] zero = {0}, int64[1] eight = {8}, int64[1] many = {256}"
    inputs = "float[2, 4] x" if "whole" in body else "float[T] x"
    model = graph_of(net(inputs, body, constants))
    walk = walk_graph(model, open_inputs=lambda name: False)
    value = next(v for node in model.graph for v in node.outputs if v.name == "r")
    assert walk.fixed(value, 0) is fixed


def test_arithmetic_with_sizes_is_followed() -> None:
    body = (
        "s = Shape (x)\n n = Gather (s, one)\n d = Div (n, three)\n u = Unsqueeze (d, zero)\n r = ConstantOfShape (u)"
    )
    constants = "int64 one = {1}, int64 three = {3}, int64[1] zero = {0}"
    model = graph_of(net("float[N, 12] x", body, constants))
    walk = walk_graph(model, open_inputs=lambda name: False)
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert [size.number for size in walk.sizes_of(values["u"]) or ()] == [4]
    (batch, _) = walk.sizes_of(values["s"]) or ()
    assert batch.number is None
    assert batch.probed == walk.probes[0].shapes["x"][0]


def test_agreement() -> None:
    assert agreed([4]) == 4
    assert agreed([4, 4, 4]) == 4
    assert agreed([4, 4, None]) == 4
    assert agreed([4, None, 4]) is None
    assert agreed([4, 4, 5]) is None

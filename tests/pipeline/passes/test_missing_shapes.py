# SPDX-License-Identifier: Apache-2.0
"""Shapes behind operators that ONNX's inference does not know: those that the runtime computes, or none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_tools import model_from

from onnxpress.pipeline.passes.graph import dims
from onnxpress.pipeline.passes.missing_shapes import fill_shapes

INPUTS = "float[batch, sequence, 8] x, float[8, 8] w, float[8] t, float[batch, sequence, 1] c, float[sequence, 8] p"


def shape_of_y(body: str, inputs: str = INPUTS) -> tuple[int | str | None, ...] | None:
    text = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> g ({inputs}) => (float[unknown] r)
        {{ {body} r = Flatten(y) }}"""
    model = model_from(text, infer=False)
    fill_shapes(model)
    value = next(value for node in model.graph for value in node.outputs if value.name == "y")
    assert dims(value) is None or value.dtype == ir.DataType.FLOAT
    return dims(value)


BODIES = {
    "com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, x)": ("batch", "sequence", 8),
    "com.microsoft.SkipLayerNormalization(x, x, t)": ("batch", "sequence", 8),
    "com.microsoft.BiasGelu(x, t)": ("batch", "sequence", 8),
    "MatMul(x, w)": ("batch", "sequence", 8),
    "MatMul(w, x)": None,
    "Add(t, x)": ("batch", "sequence", 8),
    "Mul(x, c)": ("batch", "sequence", 8),
    "Sum(x, p, t)": ("batch", "sequence", 8),
    "com.microsoft.MultiHeadAttention<num_heads = 2>(x)": None,
    "NewThing(x, t)": None,
    "Add(x, z)": None,
}


@pytest.mark.parametrize("operator", BODIES)
def test_what_follows_from_the_inputs(operator: str) -> None:
    assert shape_of_y(f"z = NewThing(x, t) y = {operator}") == BODIES[operator]


def test_parts_of_a_split() -> None:
    parts = "n = Constant<value = int64[2] {6, 2}>() y, u = Split<axis = -1>(x, n)"
    assert shape_of_y(parts) == ("batch", "sequence", 6)


def test_what_stands_in_front_is_inferred_as_ever() -> None:
    body = "o = Transpose<perm = [1, 0, 2]>(x) y = com.microsoft.BiasGelu(o, t)"
    assert shape_of_y(body) == ("sequence", "batch", 8)


def test_two_names_for_one_size_decide_nothing() -> None:
    assert shape_of_y("y = Add(x, z)", "float[batch, a, 8] x, float[batch, b, 1] z") == ("batch", None, 8)


def test_what_is_known_is_not_touched() -> None:
    model = model_from("""<ir_version: 10, opset_import: ["": 20]> g (float[a, 8] x) => (float[b, 8] y)
        { y = Relu(x) }""", infer=False)  # fmt: skip
    fill_shapes(model)
    assert dims(model.graph.outputs[0]) == ("b", 8)


@given(st.lists(st.lists(st.sampled_from([1, 3]), min_size=1, max_size=4), min_size=2, max_size=4))
def test_numbers_are_broadcast_as_numpy_does(shapes: list[list[int]]) -> None:
    inputs = ", ".join(f"float[{', '.join(map(str, shape))}] x{i}" for i, shape in enumerate(shapes))
    names = ", ".join(f"x{i}" for i in range(len(shapes)))
    assert shape_of_y(f"y = Sum({names})", inputs) == np.broadcast_shapes(*map(tuple, shapes))

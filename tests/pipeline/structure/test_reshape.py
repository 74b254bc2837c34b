# SPDX-License-Identifier: Apache-2.0
"""Axes followed through Reshape and Transpose, against numpy on the elements themselves."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.pipeline.structure.walk import Walk, walk_graph

from .oracle import graph_of


def reshaping(shape: list[int], steps: list[list[int]]) -> str:
    """A graph that takes a weight through reshapes and, behind each, a Transpose that turns the axes around."""
    constants = ", ".join(f"int64[{len(t)}] t{i} = {{{', '.join(map(str, t))}}}" for i, t in enumerate(steps))
    lines, name = [], "w1"
    for i in range(len(steps)):
        lines.append(f"r{i} = Reshape ({name}, t{i})\n n{i} = Transpose (r{i})")
        name = f"n{i}"
    body = "\n".join(lines)
    return (
        f'<ir_version: 10, opset_import: ["": 21]>\nnet (float{shape} w1) => (float[S] y) <{constants}>\n'
        f"{{\n{body}\n y = Identity ({name})\n}}"
    )


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    current, steps = list(shape), []
    for _ in range(draw(st.integers(1, 3))):
        target = list(current)
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(target) - 1))
            divisor = draw(st.sampled_from([d for d in range(1, target[place] + 1) if target[place] % d == 0]))
            if draw(st.booleans()) and place + 1 < len(target):
                target[place : place + 2] = [target[place] * target[place + 1]]
            elif len(target) < 6:
                target[place : place + 1] = [divisor, target[place] // divisor]
        stated = list(target)
        if draw(st.booleans()):
            stated[draw(st.integers(0, len(stated) - 1))] = -1
        steps.append(stated)
        current = target[::-1]
    return shape, steps


@given(graphs(), st.integers(0, 2**31))
def test_a_cut_before_is_a_cut_behind(case: tuple[list[int], list[list[int]]], seed: int) -> None:
    shape, steps = case
    model = graph_of(reshaping(shape, steps))
    walk = walk_graph(model, open_inputs=lambda name: True)
    gone = removable(walk, np.random.default_rng(seed))
    labels = walk.units.classes()
    elements = np.arange(math.prod(shape)).reshape(shape)

    def compressed(value: ir.Value, array: np.ndarray) -> np.ndarray:
        for axis, units in enumerate(walk.axes[value] or []):
            if units is not None:
                array = np.compress(~np.isin(labels[units], gone), array, axis=axis)
        return array

    whole, small = elements, compressed(model.graph.initializers["w1"], elements)
    for node in model.graph:
        if node.op_type == "Reshape":
            assert node.inputs[1] is not None
            assert node.inputs[1].const_value is not None
            whole = whole.reshape(node.inputs[1].const_value.numpy())
            small = small.reshape(compressed(node.outputs[0], whole).shape)
        elif node.op_type == "Transpose":
            whole, small = whole.T, small.T
        np.testing.assert_array_equal(small, compressed(node.outputs[0], whole))


def removable(walk: Walk, rng: np.random.Generator) -> list[int]:
    """Some classes that nothing closes, and that leave at least one position of every axis."""
    labels = walk.units.classes()
    closed = {int(label) for entry in walk.units.closed for label in labels[entry.units]}
    gone: list[int] = []
    for label in rng.permutation(np.unique(labels)).tolist()[: walk.units.count // 3 + 1]:
        axes = [units for value in walk.axes.values() for units in value or [] if units is not None]
        if label not in closed and all((~np.isin(labels[units], [*gone, label])).any() for units in axes):
            gone.append(label)
    return gone


@pytest.mark.parametrize(
    ("shape", "steps", "bears"),
    [
        ([6, 4], [[2, 3, 4]], [(4,), (3,), ()]),  # turned around: 4 columns; of 2 x 3 rows the larger part
        ([6], [[1, 6, 1]], [(), (6,), ()]),
        ([2, 3], [[6]], [(6,)]),
    ],
)
def test_which_axis_bears_the_units(shape: list[int], steps: list[list[int]], bears: list[tuple[int, ...]]) -> None:
    model = graph_of(reshaping(shape, steps))
    walk = walk_graph(model, open_inputs=lambda name: True)
    axes = walk.axes[model.graph.outputs[0]] or []
    assert [() if units is None else (len(units),) for units in axes] == bears

# SPDX-License-Identifier: Apache-2.0
"""Constants that are nearly, and not quite, what an operation leaves its other input as.

onnxscript's rules take `x + c` for `x` where |c| is at most 1e-8, and `x * c` where c is 1 to five places. A norm with
an epsilon of 1e-8 (Helium's) then divides by zero for a token whose embedding is zero. Here such constants are inputs
while the rules run, which no rule looks into.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .graph import constant, fresh_name, is_op, nodes_of, scalar

_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0}
_NEAR = 1e-4
"""Wider than the rules' own tolerance: holding a constant back costs nothing."""


def with_exact_constants(model: ir.Model, transform: Callable[[ir.Model], None]) -> None:
    """Call `transform`, which changes the model in place, so that no nearly neutral constant is lost."""
    held = [_hold_back(model, node, position, value) for node, position, value in _nearly_neutral(model)]
    try:
        transform(model)
    finally:
        for value, tensor in held:
            model.graph.inputs.remove(value)
            value.const_value = tensor
            model.graph.initializers.add(value)


def _nearly_neutral(model: ir.Model) -> list[tuple[ir.Node, int, ir.Value]]:
    found = []
    for node in list(nodes_of(model)):
        for position, value in enumerate(node.inputs):
            if value is not None and any(is_op(node, op) and _is_near(value, n) for op, n in _NEUTRAL.items()):
                found.append((node, position, value))
    return found


def _is_near(value: ir.Value, neutral: float) -> bool:
    number = scalar(value)
    return number is not None and 0.0 < abs(number - neutral) < _NEAR


def _hold_back(model: ir.Model, node: ir.Node, position: int, value: ir.Value) -> tuple[ir.Value, ir.TensorProtocol]:
    array = constant(value)
    assert array is not None
    tensor = ir.tensor(array, name=fresh_name(model, f"{value.name}_exact"))
    stand_in = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    model.graph.inputs.append(stand_in)
    node.replace_input_with(position, stand_in)
    return stand_in, tensor

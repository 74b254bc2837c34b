# SPDX-License-Identifier: Apache-2.0
"""Normalizations that are written out in single operators, in the form for which ONNX Runtime has one kernel.

Root mean square normalization, as torch.export writes it, multiplies by the reciprocal of the root. ONNX Runtime, when
it loads a file, looks for the division and makes SimplifiedLayerNormalization of it: three to four times as fast, and
the file stays in standard operators of any opset. Standard RMSNormalization (opset 23) is as fast; com.microsoft's
SkipSimplifiedLayerNormalization, with the residual addition inside, is slower than the two nodes that it replaces
(benchmarks/fusion.py), and so is not written.

References: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), 3; LayerNormalization-17 in
ONNX's Operators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import (
    add_weight,
    attribute,
    constant,
    dims,
    is_op,
    make_node,
    only_consumer,
    producer,
    replace_node,
    scalar,
)


@dataclass(frozen=True)
class RootMeanSquare:
    """x / sqrt(mean(x^2) + epsilon).

    Attributes:
        data: x.
        mean: The mean's node.
        epsilon: Scalar.
    """

    data: ir.Value
    mean: ir.Node
    epsilon: ir.Value


def match_rms_norm(node: ir.Node) -> RootMeanSquare | None:
    """Mul(x, Reciprocal(Sqrt(ReduceMean(x^2) + e))) over the last axis, or with Div(1, .) or Pow(., -0.5)."""
    if not is_op(node, "Mul"):
        return None
    for index in (0, 1):
        data, inverse = node.inputs[index], node.inputs[1 - index]
        found = _variance(_under_inverse_root(inverse))
        if data is None or found is None:
            continue
        mean, epsilon = found
        if _square_of(mean.inputs[0]) is data and _over_last_axis(mean, data):
            return RootMeanSquare(data, mean, epsilon)
    return None


def _under_inverse_root(value: ir.Value | None) -> ir.Value | None:
    """v of 1 / sqrt(v)."""
    power = producer(value, "Pow")
    if power is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == -0.5 else None
    inverse = producer(value, "Reciprocal", "Div")
    if inverse is None or (inverse.op_type == "Div" and scalar(inverse.inputs[0]) != 1):
        return None
    root = producer(inverse.inputs[0 if inverse.op_type == "Reciprocal" else 1], "Sqrt")
    return root.inputs[0] if root is not None else None


def _variance(value: ir.Value | None) -> tuple[ir.Node, ir.Value] | None:
    """Add(ReduceMean(.), e) -> the mean's node and e."""
    add = producer(value, "Add")
    for index in (0, 1) if add is not None else ():
        assert add is not None
        mean, epsilon = producer(add.inputs[index], "ReduceMean"), add.inputs[1 - index]
        if mean is not None and epsilon is not None and scalar(epsilon) is not None:
            return mean, epsilon
    return None


def _square_of(value: ir.Value | None) -> ir.Value | None:
    node = producer(value, "Pow", "Mul")
    if node is None:
        return None
    square = scalar(node.inputs[1]) == 2 if node.op_type == "Pow" else node.inputs[0] is node.inputs[1]
    return node.inputs[0] if square else None


def _over_last_axis(mean: ir.Node, data: ir.Value) -> bool:
    stated = attribute(mean, "axes", None)
    array = constant(mean.inputs[1]) if stated is None and len(mean.inputs) > 1 else stated
    if array is None or not attribute(mean, "keepdims", 1):
        return False
    axes, shape = [int(axis) for axis in array], dims(data)
    return axes == [-1] or (shape is not None and axes == [len(shape) - 1])


def write_rms_norm(model: ir.Model, node: ir.Node, match: RootMeanSquare) -> None:
    """x / Sqrt(ReduceMean(Pow(x, 2)) + e), with an epsilon and a square of its own: the runtime wants them so."""
    name, mean = str(node.outputs[0].name), match.mean
    square = mean.inputs[0].producer() if mean.inputs[0] is not None else None
    new: list[ir.Node] = []
    if not is_op(square, "Pow"):
        dtype = match.data.dtype or ir.DataType.FLOAT
        two = add_weight(model, model.graph, f"{name}_two", np.asarray(2.0, dtype.numpy()))
        new.append(make_node("Pow", [match.data, two], [f"{name}_square"]))
        kept = {key: value.value for key, value in mean.attributes.items()}
        new.append(make_node("ReduceMean", [new[-1].outputs[0], *mean.inputs[1:]], [f"{name}_mean"], attributes=kept))
        mean = new[-1]
    new.append(make_node("Add", [mean.outputs[0], match.epsilon], [f"{name}_variance"]))
    new.append(make_node("Sqrt", [new[-1].outputs[0]], [f"{name}_root"]))
    new.append(make_node("Div", [match.data, new[-1].outputs[0]], [f"{name}_normal"]))
    replace_node(node, new)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) gamma + beta."""

    data: ir.Value
    gamma: ir.Value
    beta: ir.Value
    epsilon: float


def match_layer_norm(node: ir.Node) -> LayerNorm | None:
    """The Add at the end of a layer normalization over the last axis that is written out."""
    if not is_op(node, "Add"):
        return None
    for index in (0, 1):
        scaled, beta = producer(node.inputs[index], "Mul"), node.inputs[1 - index]
        for other in (0, 1) if scaled is not None and _is_vector(beta) else ():
            assert scaled is not None
            found, gamma = _standardized(producer(scaled.inputs[other], "Div")), scaled.inputs[1 - other]
            if found is None or not _is_vector(gamma) or only_consumer(scaled.outputs[0]) is not node:
                continue
            data, epsilon = found
            assert gamma is not None
            assert beta is not None
            return LayerNorm(data, gamma, beta, epsilon)
    return None


def _is_vector(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.ndim == 1


def _standardized(division: ir.Node | None) -> tuple[ir.Value, float] | None:
    """Div(d, Sqrt(ReduceMean(d^2) + e)) with d = x - ReduceMean(x) -> x and e."""
    if division is None:
        return None
    centred, root = division.inputs[0], producer(division.inputs[1], "Sqrt")
    found = _variance(root.inputs[0]) if root is not None else None
    minus = producer(centred, "Sub")
    if found is None or minus is None or centred is None:
        return None
    variance, epsilon = found
    data, mean, square = minus.inputs[0], producer(minus.inputs[1], "ReduceMean"), _square_of(variance.inputs[0])
    # Without sharing of common subexpressions, torch's older exporter subtracts the mean twice
    again = producer(square, "Sub")
    same = square is centred or (again is not None and tuple(again.inputs) == tuple(minus.inputs))
    if data is None or mean is None or mean.inputs[0] is not data or not same:
        return None
    if not _over_last_axis(mean, data) or not _over_last_axis(variance, centred):
        return None
    value = scalar(epsilon)
    return (data, value) if value is not None else None


def write_layer_norm(model: ir.Model, node: ir.Node, match: LayerNorm) -> None:
    name = str(node.outputs[0].name)
    attributes = {"axis": -1, "epsilon": match.epsilon}
    inputs = [match.data, match.gamma, match.beta]
    replace_node(node, [make_node("LayerNormalization", inputs, [f"{name}_norm"], attributes=attributes)])

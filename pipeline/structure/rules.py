# SPDX-License-Identifier: Apache-2.0
"""Rules of operators that compute: element by element, products, convolutions, norms, reductions, pooling.

Reference: the operators' specifications in ONNX's Operators.md, and ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..passes.graph import MICROSOFT, attribute, label
from .units import Ids
from .walk import Axes, Walk, rule

_ELEMENTWISE = (
    "Abs", "Acos", "Asin", "Atan", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg",
    "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BROADCAST = (
    "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip


@rule(*_ELEMENTWISE)
def _elementwise(walk: Walk, node: ir.Node) -> list[Axes | None]:
    found = walk.of(node.inputs[0])
    value = node.inputs[0]
    if node.op_type in ("Cast", "Identity") and value is not None and (sizes := walk.sizes_of(value)) is not None:
        walk.sizes[node.outputs[0]] = sizes
    return [found] * len(node.outputs)


@rule("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasSplitGelu", domain=MICROSOFT)
def _contrib_elementwise(walk: Walk, node: ir.Node) -> list[Axes | None]:
    if node.op_type == "BiasSplitGelu":
        return unknown(walk, node, "BiasSplitGelu has no rule")
    return [broadcast(walk, node, [v for v in node.inputs if v is not None])]


@rule(*_BROADCAST)
def _broadcasting(walk: Walk, node: ir.Node) -> list[Axes | None]:
    values = [value for value in node.inputs if value is not None]
    return [broadcast(walk, node, values)]


def unknown(walk: Walk, node: ir.Node, reason: str) -> list[Axes | None]:
    """Close all that the node reads: for the forms of an operator that its rule does not know."""
    for value in node.inputs:
        walk.close_all(node, value, reason)
    return []


def broadcast(walk: Walk, node: ir.Node, values: Sequence[ir.Value], *, keep_last: int = 0) -> Axes | None:
    """The axes of values that are broadcast against each other, without their `keep_last` last axes."""
    many = [walk.of(value) for value in values]
    if any(axes is None for axes in many):
        unknown(walk, node, "it meets a value of unknown rank")
        return None
    known = [(value, axes) for value, axes in zip(values, many, strict=True) if axes is not None]
    rank = max(len(axes) for _, axes in known) - keep_last
    found: Axes = [None] * rank
    for place in range(1, rank + 1):
        terms = [(value, axes, -place - keep_last) for value, axes in known if place + keep_last <= len(axes)]
        found[-place] = _joined(walk, node, terms)
    return found


def _joined(walk: Walk, node: ir.Node, terms: Sequence[tuple[ir.Value, Axes, int]]) -> Ids | None:
    """One axis of a broadcast: those of size one stretch, all others are tied."""
    result: Ids | None = None
    stretched = [(value, axes, axis) for value, axes, axis in terms if axes[axis] is None]
    for _, axes, axis in terms:
        units = axes[axis]
        if units is not None:
            result = units if result is None else walk.tie(node, result, units)
    if result is not None and any(walk.size(value, axis) != 1 for value, _, axis in stretched):
        walk.close(node, result, f"{node.op_type} joins it with an axis whose size only the run tells")
    return result


# Products


@rule("MatMul")
def matrix_product(walk: Walk, node: ir.Node) -> list[Axes | None]:
    """A product as MatMul has it: of the last axis and the last but one, with a batch in front."""
    left, right = node.inputs[:2]
    a, b = walk.of(left), walk.of(right)
    if a is None or b is None or left is None or right is None:
        return unknown(walk, node, "a factor of unknown rank")
    contract(walk, node, a[-1], b[-2 if len(b) > 1 else 0])
    rows: Axes = [a[-2]] if len(a) > 1 else []
    columns: Axes = [b[-1]] if len(b) > 1 else []
    batch = (
        broadcast(walk, node, [v for v, x in ((left, a), (right, b)) if len(x) > 2], keep_last=2)
        if (max(len(a), len(b)) > 2)
        else []
    )
    return [[*(batch or []), *rows, *columns]]


def contract(walk: Walk, node: ir.Node, one: Ids | None, other: Ids | None) -> None:
    """Sum over an axis that both have: a term that is cut from both is a zero less."""
    if one is not None or other is not None:
        walk.tie(node, one, other, "its product is with an axis that cannot be cut")


@rule("FusedMatMul", domain=MICROSOFT)
def _fused_matmul(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return unknown(walk, node, "FusedMatMul has no rule")


@rule("Gemm")
def _gemm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    a, b = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    if a is None or b is None:
        return unknown(walk, node, "a factor of unknown rank")
    a = a[::-1] if attribute(node, "transA", 0) else a
    b = b[::-1] if attribute(node, "transB", 0) else b
    contract(walk, node, a[1], b[0])
    found: Axes = [a[0], b[1]]
    bias = walk.input(node, 2)
    if bias is not None:
        added = walk.of(bias) or []
        for place in range(1, len(added) + 1):
            units = added[-place]
            if units is not None:
                found[-place] = walk.tie(node, found[-place], units)
            elif found[-place] is not None and walk.size(bias, -place) != 1:
                walk.close(node, found[-place], "its bias has an unknown size")
    return [found]


@rule("Einsum")
def _einsum(walk: Walk, node: ir.Node) -> list[Axes | None]:
    equation = attribute(node, "equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    many = [walk.of(value) for value in node.inputs]
    repeated = any(len(set(term)) != len(term) for term in letters)
    if not arrow or "." in equation or repeated or any(axes is None for axes in many):
        return unknown(walk, node, f"Einsum '{equation}' has no rule")
    by_letter: dict[str, Ids | None] = {}
    for index, term in enumerate(letters):
        for place, letter in enumerate(term):
            units = (many[index] or [])[place]
            if letter not in by_letter:
                by_letter[letter] = units
            elif units is not None or by_letter[letter] is not None:
                by_letter[letter] = walk.tie(node, by_letter[letter], units)
    return [[by_letter[letter] for letter in result]]


# Convolutions


@rule("Conv", "ConvTranspose")
def _conv(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, weight = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    if data is None or weight is None:
        return unknown(walk, node, "a factor of unknown rank")
    for units in (*data[2:], *weight[2:]):
        walk.close(node, units, "it is an axis of space")
    groups = int(attribute(node, "group", 1))
    into, out = (weight[1], weight[0]) if node.op_type == "Conv" else (weight[0], weight[1])
    bias = walk.of(walk.input(node, 2)) or [None]
    if groups == 1:
        contract(walk, node, data[1], into)
        produced = out
    else:
        produced = _grouped(walk, node, data[1], weight, groups)
    if bias[0] is not None:
        produced = walk.tie(node, produced, bias[0])
    return [[data[0], produced, *([None] * (len(data) - 2))]]


def _grouped(walk: Walk, node: ir.Node, channels: Ids | None, weight: Axes, groups: int) -> Ids | None:
    """A grouped convolution is cut by whole groups: the attribute counts them, and their inside stays."""
    first, inner = weight[0], weight[1]
    walk.close(node, inner, "it lies inside a group of the convolution")
    if first is None or channels is None:
        walk.close(node, first, "its product is with an axis that cannot be cut")
        walk.close(node, channels, "its product is with an axis that cannot be cut")
        return first
    ins = walk.merged(node, channels, groups)
    outs = walk.merged(node, first, groups)
    walk.units.tie(ins, outs)
    walk.count_attribute(node, "group", ins)
    if node.op_type == "Conv":
        return first
    return np.repeat(ins, (len(inner) if inner is not None else 1))  # ConvTranspose: [C, M / group]


# Norms


@rule("BatchNormalization", "InstanceNormalization")
def _batch_norm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None or len(data) < 2:
        return unknown(walk, node, "data of unknown rank")
    if len([o for o in node.outputs if o.uses() or o.is_graph_output()]) > 1:
        return unknown(walk, node, "it also returns its statistics")
    if attribute(node, "spatial", 1) == 0:
        return unknown(walk, node, "BatchNormalization that is not spatial")
    if node.op_type == "InstanceNormalization":
        for units in data[2:]:
            walk.close(node, units, "it is an axis of space")
    channels = data[1]
    for index in range(1, len(node.inputs)):
        own = walk.of(node.inputs[index])
        if own is not None and (own[0] is not None or channels is not None):
            channels = walk.tie(node, channels, own[0])
    return [[data[0], channels, *data[2:]]]


@rule("GroupNormalization")
def _group_norm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, groups = walk.of(node.inputs[0]), int(attribute(node, "num_groups", 1))
    if data is None or data[1] is None:
        return unknown(walk, node, "GroupNormalization of unknown channels")
    for units in data[2:]:
        walk.close(node, units, "it is an axis of space")
    stretches = walk.merged(node, data[1], groups)
    for value in node.inputs[1:3]:
        own = (walk.of(value) or [None])[0]
        if own is None:
            continue
        # One number a group before opset 21, one a channel since
        walk.tie(node, stretches if len(own) == groups and len(data[1]) != groups else data[1], own)
    walk.count_attribute(node, "num_groups", stretches)
    return [data]


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return _normalized(walk, node, node.inputs[:1], int(attribute(node, "axis", -1)), node.inputs[1:3])


@rule("SkipLayerNormalization", domain=MICROSOFT)
def _skip_norm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return _normalized(walk, node, node.inputs[:2], -1, node.inputs[2:5])


@rule("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_rms_norm(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return _normalized(walk, node, node.inputs[:2], -1, node.inputs[2:4])


def _normalized(
    walk: Walk, node: ir.Node, terms: Sequence[ir.Value | None], axis: int, scales: Sequence[ir.Value | None]
) -> list[Axes | None]:
    data = broadcast(walk, node, [value for value in terms if value is not None])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    first = axis % len(data)
    for value in scales:
        own = walk.of(value)
        for place in range(1, len(own or ()) + 1):
            units = (own or [])[-place]
            if units is not None:
                data[-place] = walk.tie(node, data[-place], units)
            elif walk.size(value, -place) != 1:
                walk.close(node, data[-place], "its scale has an unknown size")
    for units in data[first:]:
        if units is not None:
            walk.normalized.append(units)
    outputs: list[Axes | None] = [data]
    for value in node.outputs[1:]:
        # Means and deviations have one element; the last output of a Skip norm is the sum itself
        whole = node.op_type.startswith("Skip") and value is node.outputs[-1] and len(node.outputs) == 4
        outputs.append(data if whole else [*data[:first], *([None] * (len(data) - first))])
    return outputs


# Reductions and what works along an axis


@rule("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2")
def _reduce(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return _reduced(walk, node, summing=True)


@rule("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp")
def _reduce_other(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return _reduced(walk, node, summing=False)


def _reduced(walk: Walk, node: ir.Node, *, summing: bool) -> list[Axes | None]:
    data, axes = walk.of(node.inputs[0]), walk.numbers(node, 1, "axes")
    if data is None or (axes is None and walk.input(node, 1) is not None):
        return unknown(walk, node, "a reduction over unknown axes")
    if axes is None or not axes:
        axes = [] if attribute(node, "noop_with_empty_axes", 0) else list(range(len(data)))
    gone = {axis % len(data) for axis in axes}
    for axis in gone:
        units = data[axis]
        if units is not None and not summing:
            walk.close(node, units, f"{node.op_type} over it")
        elif units is not None and node.op_type == "ReduceMean":
            walk.normalized.append(units)
    if attribute(node, "keepdims", 1):
        return [[None if axis in gone else units for axis, units in enumerate(data)]]
    return [[units for axis, units in enumerate(data) if axis not in gone]]


@rule("ArgMax", "ArgMin")
def _arg(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, axis = walk.of(node.inputs[0]), int(attribute(node, "axis", 0))
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    walk.close(node, data[axis], f"{node.op_type} over it")
    rest: Axes = list(data)
    if attribute(node, "keepdims", 1):
        rest[axis] = None
    else:
        del rest[axis]
    return [rest]


@rule("Softmax", "LogSoftmax", "Hardmax", "CumSum", "LpNormalization", "TopK")
def _along_axis(walk: Walk, node: ir.Node) -> list[Axes | None]:
    """The axis itself has to stay; the others pass. Before opset 13 all axes from it on were one."""
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    old = node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and walk.model.opset_imports.get("", 0) < 13
    axis = (
        walk.numbers(node, 1, "axis") if node.op_type == "CumSum" else [int(attribute(node, "axis", 1 if old else -1))]
    )
    if axis is None:
        return unknown(walk, node, "an unknown axis")
    first = axis[0] % len(data)
    for place, units in enumerate(data):
        if place == first or (old and place > first):
            walk.close(node, units, f"{node.op_type} over it")
    if node.op_type == "TopK":
        data = [None if place == first else units for place, units in enumerate(data)]
    return [data] * len(node.outputs)


@rule("Trilu")
def _trilu(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    for units in data[-2:]:
        walk.close(node, units, "Trilu counts along it")
    return [data]


@rule("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pool(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    for units in data[2:]:
        walk.close(node, units, "it is an axis of space")
    return [[data[0], data[1], *([None] * (len(data) - 2))]] * len(node.outputs)


# Rounded weights and activations, as standard pairs


@rule("QuantizeLinear", "DequantizeLinear")
def _rounding(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None or attribute(node, "block_size", 0):
        return unknown(walk, node, f"{node.op_type} in blocks")
    found: Axes = list(data)
    axis = int(attribute(node, "axis", 1))
    for value in node.inputs[1:3]:
        own = walk.of(value)
        if own and own[0] is not None:
            found[axis] = walk.tie(node, found[axis], own[0])
    return [found]


@rule("RandomNormalLike", "RandomUniformLike", "Bernoulli")
def _random(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return unknown(walk, node, f"{label(node)} is random")

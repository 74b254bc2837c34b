# SPDX-License-Identifier: Apache-2.0
"""Products with keys or values that groups of query heads share, without a copy for each query head.

    MatMul(a [b, groups x g, s, x], repeated(k) [b, groups x g, x, t])
    -> Reshape(MatMul(Reshape(a) [b, groups, g x s, x], k [b, groups, x, t]))

The standard `Attention` of opset 23 does without repeated heads by itself, if it is given the ones before.

PyTorch repeats the keys and values of grouped-query attention (`repeat_kv`: Unsqueeze, Expand, Reshape) before it
multiplies, which copies the whole cache for each layer and token. The heads of a group stand side by side, so their
queries are as well rows of one taller matrix; reshaping to it moves nothing. Standard operators, exact, for any number
of sequences, of past and of new tokens, which com.microsoft's GroupQueryAttention is not (see `grouped_query`).

Reference: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (arXiv 2305.13245), 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .attention import may_be_equal, turned_back
from .attention_nodes import int64_weight
from .graph import attribute, constant, dims, is_op, make_node, producer, replace_node, scalar


@dataclass(frozen=True)
class GroupedProduct:
    """A product whose right factor is repeated.

    Attributes:
        source: What is repeated, [batch, groups, length, size].
        groups, share: Heads of `source`, and how many query heads share one.
        turned: Whether the product reads it with the last two axes exchanged.
        scaled: The Mul by a constant between it and the product, with torch's root of the scale.
    """

    source: ir.Value
    groups: int
    share: int
    turned: bool
    scaled: ir.Node | None


@dataclass(frozen=True)
class GroupedAttention:
    """A standard `Attention` whose keys and values are repeated, which it can do without."""

    key: ir.Value
    value: ir.Value


def match_grouped(node: ir.Node) -> GroupedProduct | GroupedAttention | None:
    """`node` as a product, or attention, with repeated heads, if it is one."""
    if is_op(node, "Attention"):
        keys, values = repeated(node.inputs[1]), repeated(node.inputs[2])
        return GroupedAttention(keys[0], values[0]) if keys and values and keys[1:] == values[1:] else None
    if not is_op(node, "MatMul"):
        return None
    left, right, scaled = dims(node.inputs[0]), node.inputs[1], producer(node.inputs[1], "Mul")
    if scaled is not None:
        constants = [scalar(value) is not None for value in scaled.inputs]
        if constants.count(True) != 1:
            return None
        right = scaled.inputs[constants.index(False)]
    for value, turned in ((right, False), (turned_back(right) if right is not None else None, True)):
        found = repeated(value)
        if found is not None and left is not None and len(left) == 4 and left[1] == found[1] * found[2]:
            return GroupedProduct(*found, turned, scaled)
    return None


def repeated(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """Reshape(Expand(Unsqueeze(x, 2))): x [b, groups, t, h], the number of groups, and how often each is repeated."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if reshape is None or expand is None or unsqueeze is None:
        return None
    source, axes = unsqueeze.inputs[0], _axes(unsqueeze)
    before, wide, after = dims(source), dims(expand.outputs[0]), dims(value)
    if source is None or before is None or wide is None or after is None or axes not in ([2], [-3]):
        return None
    if len(before) != 4 or len(wide) != 5 or len(after) != 4:
        return None
    groups, share = wide[1], wide[2]
    if not isinstance(groups, int) or not isinstance(share, int) or after[1] != groups * share or share == 1:
        return None
    # Expand may do no more than repeat the new axis, and Reshape no more than merge it
    kept = (before[0], before[1], before[2], before[3])
    same = zip((*kept, *kept), (wide[0], wide[1], wide[3], wide[4], after[0], groups, after[2], after[3]), strict=True)
    if not all(may_be_equal(a, b) and not (a == 1 and b != 1) for a, b in same):
        return None
    return source, groups, share


def _axes(node: ir.Node) -> list[int]:
    stated = attribute(node, "axes", None)
    array = constant(node.inputs[1]) if stated is None and len(node.inputs) > 1 else stated
    return [] if array is None else [int(axis) for axis in array]


def write_grouped(model: ir.Model, node: ir.Node, match: GroupedProduct | GroupedAttention) -> None:
    """Multiply the query heads of a group at once; the last axes of both factors are copied from what is there."""
    if isinstance(match, GroupedAttention):
        node.replace_input_with(1, match.key)
        node.replace_input_with(2, match.value)
        return
    name, left = str(node.outputs[0].name), node.inputs[0]
    tall = int64_weight(model, [0, match.groups, -1, 0])
    full = int64_weight(model, [0, match.groups * match.share, -1, 0])
    new = [make_node("Reshape", [left, tall], [f"{name}_rows"])]
    factor = match.source
    if match.turned:
        new.append(make_node("Transpose", [factor], [f"{name}_keys"], attributes={"perm": [0, 1, 3, 2]}))
        factor = new[-1].outputs[0]
    if match.scaled is not None:
        constants = [factor if scalar(v) is None else v for v in match.scaled.inputs]
        new.append(make_node("Mul", constants, [f"{name}_scaled"]))
        factor = new[-1].outputs[0]
    new.append(make_node("MatMul", [new[0].outputs[0], factor], [f"{name}_product"]))
    new.append(make_node("Reshape", [new[-1].outputs[0], full], [f"{name}_heads"]))
    replace_node(node, new)

# SPDX-License-Identifier: Apache-2.0
"""Recognize attention over split heads in a graph, in the forms that torch.export, TorchScript and opset 23 write it.

The forms differ in where the scale sits (on the queries, on the scores, or its root on queries and keys), in how the
keys are transposed, and in the guard against rows that attend to nothing (`IsNaN`, `Where` behind the Softmax).

One thing differs after fusing: such a row, which was NaN, or zero behind the guard, becomes the mean of all values. It
occurs where a sequence is padding throughout, whose output nobody reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from .graph import attribute, consumers, dims, is_op, only_consumer, producer, scalar


@dataclass(frozen=True)
class AttentionMatch:
    """One attention, as MultiHeadAttention takes it.

    Attributes:
        query, key, value: [batch, length, heads x head size], before the heads are split.
        heads: Number of heads, the same for all three.
        scale: Factor on the scores.
        mask: Added to the scores (or boolean: True attends); rank 4; None without a mask.
        mask_is_boolean: Whether the mask is boolean.
        mask_has_all_rows: Whether its third axis is known to be the query length; else it may be 1.
        output: [batch, length, heads x head size], the heads merged again.
        first, last: The nodes between which the replacement must stand.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    mask: ir.Value | None
    mask_is_boolean: bool
    mask_has_all_rows: bool
    output: ir.Value
    first: ir.Node
    last: ir.Node


def match_softmax(softmax: ir.Node) -> AttentionMatch | str | None:
    """The attention around this Softmax, the reason why it stays, or None when it is no attention at all."""
    scores, mask, scale = _scores(softmax.inputs[0])
    if scores is None:
        return None
    weighted = _weighted_values(softmax)
    if weighted is None:
        multiplied = any(
            is_op(n, "MatMul") and n.inputs[0] is softmax.outputs[0] for n in consumers(softmax.outputs[0])
        )
        return "its probabilities have other readers" if multiplied else None
    query, query_scale = _unscaled(scores.inputs[0])
    key, key_scale = _unscaled(scores.inputs[1])
    q, k, v = _split_heads(query), _split_keys(key), _split_heads(weighted.inputs[1])
    if q is None or k is None or v is None:
        return "heads are not split as [batch, length, heads, size]"
    if not q.heads == k.heads == v.heads:
        return "queries and keys have different numbers of heads"
    if attribute(softmax, "axis", -1) not in (-1, 3):
        return "softmax is not over the keys"
    return _finish(softmax, q, k, v, scale * query_scale * key_scale, mask, False, weighted.outputs[0])


def match_opset23(node: ir.Node) -> AttentionMatch | str:
    """The standard `Attention` operator, if it does no more than MultiHeadAttention can."""
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    if inputs[4] is not None or inputs[5] is not None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return "keeps a cache of past keys, or returns its scores"
    if inputs[6] is not None:  # opset 24
        return "has a length for each row of the batch"
    if attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        return "causal or soft-capped"
    q, k, v = (_split_heads(inputs[i]) for i in range(3))
    if q is None or k is None or v is None:
        return "heads are not split as [batch, length, heads, size]"
    if not q.heads == k.heads == v.heads:
        return "queries and keys have different numbers of heads"
    scale = attribute(node, "scale", None)
    if scale is None:
        scale = 1 / math.sqrt(q.size)
    mask = inputs[3]
    boolean = mask is not None and mask.dtype == ir.DataType.BOOL
    if mask is not None and mask.dtype is None:
        return "the type of the mask is not known"
    return _finish(node, q, k, v, float(scale), mask, boolean, node.outputs[0])


@dataclass(frozen=True)
class _Heads:
    whole: ir.Value
    heads: int
    size: int


def _finish(
    anchor: ir.Node,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    scale: float,
    mask: ir.Value | None,
    boolean: bool,
    attended: ir.Value,
) -> AttentionMatch | str:
    if only_consumer(attended) is None:
        return "the attended values have other readers"
    merged = _merged_heads(attended, v.heads * v.size)
    if merged is None:
        return "heads are not merged to [batch, length, width]"
    if q.whole.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "the queries are not known to be fp32 or fp16"
    has_all_rows = True
    if mask is not None:
        shape = dims(mask)
        if shape is None or len(shape) != 4:
            return "the mask is not known to have four axes"
        if shape[1] not in (1, q.heads):
            return "the mask's heads are not known"
        if not _may_be_equal(shape[3], _length(k)) or (shape[3] == 1 and _length(k) != 1):
            return "the mask does not have one entry a key"
        rows = _length(q)
        has_all_rows = shape[2] is not None and shape[2] == rows
    return AttentionMatch(
        q.whole, k.whole, v.whole, q.heads, scale, mask, boolean, has_all_rows, merged.outputs[0], anchor, merged
    )


def _length(heads: _Heads) -> int | str | None:
    return (dims(heads.whole) or (None, None))[1]


def _may_be_equal(one: int | str | None, other: int | str | None) -> bool:
    """Whether two sizes can be the same: two different names may still stand for one size."""
    return not (isinstance(one, int) and isinstance(other, int)) or one == other


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None, float]:
    """Take `MatMul [x scale] [+ mask]` apart, in either order of the addition."""
    add = producer(value, "Add")
    if add is None:
        inner, scale = _unscaled(value)
        return producer(inner, "MatMul"), None, scale
    for index in (0, 1):
        inner, scale = _unscaled(add.inputs[index])
        product = producer(inner, "MatMul")
        if product is not None:
            return product, add.inputs[1 - index], scale
    return None, None, 1.0


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Strip one multiplication by, or division through, a constant scalar."""
    for node in (producer(value, "Mul"), producer(value, "Div")):
        if node is None:
            continue
        factor = scalar(node.inputs[1])
        if factor is not None and factor != 0:
            return node.inputs[0], factor if node.op_type == "Mul" else 1 / factor
        factor = scalar(node.inputs[0]) if node.op_type == "Mul" else None
        if factor is not None:
            return node.inputs[1], factor
    return value, 1.0


def _weighted_values(softmax: ir.Node) -> ir.Node | None:
    """The MatMul of the probabilities with the values, behind an optional guard against NaN."""
    probabilities = softmax.outputs[0]
    if probabilities.is_graph_output():
        return None
    for where in consumers(probabilities):
        # Where(IsNaN(p), 0, p): rows that attend to nothing
        test = producer(where.inputs[0], "IsNaN") if is_op(where, "Where") else None
        if test is not None and set(consumers(probabilities)) == {test, where} and scalar(where.inputs[1]) == 0:
            probabilities = where.outputs[0]
            break
    product = only_consumer(probabilities)
    return product if is_op(product, "MatMul") and product and product.inputs[0] is probabilities else None


def _split_heads(value: ir.Value | None) -> _Heads | None:
    """Transpose(Reshape(x, [b, s, heads, size]), (0, 2, 1, 3)) -> x."""
    transpose = producer(value, "Transpose")
    if transpose is None or list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:
        return None
    return _unsplit(transpose.inputs[0])


def _unsplit(split: ir.Value | None) -> _Heads | None:
    """Reshape(x [b, s, width]) to [b, s, heads, size] -> x; one of the two last sizes may be left open."""
    reshape, shape = producer(split, "Reshape"), dims(split)
    whole = reshape.inputs[0] if reshape is not None else None
    around = dims(whole)
    if whole is None or shape is None or around is None or len(shape) != 4 or len(around) != 3:
        return None
    if not (_may_be_equal(shape[0], around[0]) and _may_be_equal(shape[1], around[1])):
        return None
    width, heads, size = around[2], shape[2], shape[3]
    if isinstance(width, int) and isinstance(size, int) and not isinstance(heads, int):
        heads = width // size
    if isinstance(width, int) and isinstance(heads, int) and not isinstance(size, int):
        size = width // heads
    if not isinstance(heads, int) or not isinstance(size, int) or (isinstance(width, int) and width != heads * size):
        return None
    return _Heads(whole, heads, size)


def _split_keys(value: ir.Value | None) -> _Heads | None:
    """The keys with their last two axes exchanged: by one Transpose, by two, or through three axes."""
    transpose = producer(value, "Transpose")
    if transpose is not None:
        permutation = list(attribute(transpose, "perm", []))
        if permutation == [0, 1, 3, 2]:
            return _split_heads(transpose.inputs[0])
        if permutation == [0, 2, 3, 1]:
            return _unsplit(transpose.inputs[0])
        return None
    # torch's SDPA: [b, n, s, h] -> [b * n, s, h] -> [b * n, h, s] -> [b, n, h, s]
    outer = producer(value, "Reshape")
    middle = producer(outer.inputs[0], "Transpose") if outer is not None else None
    if middle is None or list(attribute(middle, "perm", [])) != [0, 2, 1]:
        return None
    inner = producer(middle.inputs[0], "Reshape")
    return _split_heads(inner.inputs[0]) if inner is not None else None


def _merged_heads(attended: ir.Value, width: int) -> ir.Node | None:
    """Reshape(Transpose(x, (0, 2, 1, 3)), [b, s, width]): the node that puts the heads together again."""
    transpose = only_consumer(attended)
    if not is_op(transpose, "Transpose") or list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:  # type: ignore[arg-type]
        return None
    assert transpose is not None
    reshape = only_consumer(transpose.outputs[0])
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    shape, split = dims(reshape.outputs[0]), dims(transpose.outputs[0])
    if shape is None or len(shape) != 3 or shape[2] not in (width, None):
        return None
    if split is not None and not (_may_be_equal(shape[0], split[0]) and _may_be_equal(shape[1], split[1])):
        return None
    return reshape

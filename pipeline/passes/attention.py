# SPDX-License-Identifier: Apache-2.0
"""Recognize attention over split heads in a graph, in the forms that torch.export, TorchScript and opset 23 write it.

The forms differ in where the scale sits (on the queries, on the scores, or its root on queries and keys), in what is
added to the scores (a mask, relative positions, both), in how the keys are transposed, in the guard against rows that
attend to nothing (`IsNaN`, `Where` behind the Softmax), and in where keys and values come from: from this input, from a
cache and this input, or from another network's output.

One thing differs after fusing: a row that attends to nothing, which was NaN, or zero behind the guard, becomes the mean
of all values, as it is in the unfused graph where the mask is the lowest finite number. It occurs where a sequence is
padding throughout or begins with padding, and nobody reads what comes out there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from .graph import attribute, consumers, dims, is_op, only_consumer, producer, scalar


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values, split into heads.

    Attributes:
        split: [batch, heads, length, size], as the products read them; with a cache, past and fresh ones together; None
            where the graph transposes keys in one step and has no such value.
        whole: The fresh ones before their heads were brought to the front, [batch, length, heads x size] or [batch,
            length, heads, size]; None where the graph has no such value.
        heads, size: Their number, and the size of one.
        past: Those of the cache, [batch, heads, past length, size], that stand in front of the fresh ones.
    """

    split: ir.Value | None
    whole: ir.Value | None
    heads: int
    size: int
    past: ir.Value | None = None


@dataclass(frozen=True)
class AttentionMatch:
    """One attention.

    Attributes:
        query, key, value: What it reads; all have as many heads.
        heads: Number of heads.
        scale: Factor on the scores.
        masks: Added to the scores, each of rank 4; or one boolean mask (True attends); empty without a mask.
        mask_is_boolean: Whether the mask is boolean.
        mask_has_all_rows: Whether the masks' third axis is known to be the query length; else it may be 1.
        attended: [batch, heads, length, size], what the replacement computes.
        output: [batch, length, heads x size], the heads merged again; or the same as [batch x length, heads x size].
        first, last: The nodes between which the replacement must stand.
    """

    query: Heads
    key: Heads
    value: Heads
    heads: int
    scale: float
    masks: tuple[ir.Value, ...]
    mask_is_boolean: bool
    mask_has_all_rows: bool
    attended: ir.Value
    output: ir.Value
    first: ir.Node
    last: ir.Node


def match_softmax(softmax: ir.Node) -> AttentionMatch | str | None:
    """The attention around this Softmax, the reason why it stays, or None when it is no attention at all."""
    found = match_scores(softmax)
    if not isinstance(found, ScoresMatch):
        return found
    q, k, v = split_heads(found.query), _split_keys(found.turned_key), split_heads(found.value)
    return finish(softmax, q, k, v, found.scale, tuple(found.masks), False, found.attended)


@dataclass(frozen=True)
class ScoresMatch:
    """Softmax(query key^T scale + masks) value: query and value [batch, heads, length, size], key^T with size first."""

    query: ir.Value
    turned_key: ir.Value
    value: ir.Value
    scale: float
    masks: list[ir.Value]
    attended: ir.Value


def match_scores(softmax: ir.Node) -> ScoresMatch | str | None:
    """The two products around this Softmax, without a look at where their factors come from."""
    scores, masks, scale = _scores(softmax.inputs[0])
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
    value = weighted.inputs[1]
    assert query is not None
    assert key is not None
    assert value is not None
    if attribute(softmax, "axis", -1) not in (-1, 3):
        return "softmax is not over the keys"
    return ScoresMatch(query, key, value, scale * query_scale * key_scale, masks, weighted.outputs[0])


def match_opset23(node: ir.Node) -> AttentionMatch | str:
    """The standard `Attention` operator, if it does no more than MultiHeadAttention can.

    With a cache or with grouped heads it stays: the runtime's kernel for it is as fast as any (benchmarks/fusion.py).
    """
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    if inputs[4] is not None or inputs[5] is not None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return "keeps a cache of past keys, or returns its scores"
    if inputs[6] is not None:  # opset 24
        return "has a length for each row of the batch"
    if attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        return "causal or soft-capped"
    q, k, v = (split_heads(inputs[i]) for i in range(3))
    scale = attribute(node, "scale", None)
    if scale is None:
        scale = 1 / math.sqrt(q.size) if q is not None else 1.0
    mask = inputs[3]
    boolean = mask is not None and mask.dtype == ir.DataType.BOOL
    if mask is not None and mask.dtype is None:
        return "the type of the mask is not known"
    return finish(node, q, k, v, float(scale), () if mask is None else (mask,), boolean, node.outputs[0])


def finish(
    anchor: ir.Node,
    q: Heads | None,
    k: Heads | None,
    v: Heads | None,
    scale: float,
    masks: tuple[ir.Value, ...],
    boolean: bool,
    attended: ir.Value,
) -> AttentionMatch | str:
    """Queries, keys and values as one attention, if heads, masks and what follows are as an operator has them."""
    if q is None or k is None or v is None:
        return "heads are not split as [batch, length, heads, size]"
    if not q.heads == k.heads == v.heads:
        return "queries and keys have different numbers of heads"
    if q.past is not None:
        return "the queries are joined from two parts"
    if only_consumer(attended) is None:
        return "the attended values have other readers"
    merged = _merged_heads(attended, v.heads * v.size)
    if merged is None:
        return "heads are not merged to [batch, length, width]"
    if q.split is None or q.split.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return "the queries are not known to be fp32 or fp16"
    rows, keys, has_all_rows = length(q), length(k), not masks
    for mask in masks:
        shape = dims(mask)
        if shape is None or len(shape) != 4:
            return "the mask is not known to have four axes"
        if shape[1] not in (1, q.heads):
            return "the mask's heads are not known"
        if not may_be_equal(shape[3], keys) or (shape[3] == 1 and keys != 1):
            return "the mask does not have one entry a key"
        has_all_rows |= shape[2] is not None and shape[2] == rows
    return AttentionMatch(
        q, k, v, q.heads, scale, masks, boolean, has_all_rows, attended, merged.outputs[0], anchor, merged
    )


def length(heads: Heads) -> int | str | None:
    if heads.split is None:
        return (dims(heads.whole) or (None, None))[1]
    return (dims(heads.split) or (None,) * 4)[2]


def may_be_equal(one: int | str | None, other: int | str | None) -> bool:
    """Whether two sizes can be the same: two different names may still stand for one size."""
    return not (isinstance(one, int) and isinstance(other, int)) or one == other


def _scores(value: ir.Value | None, deep: int = 3) -> tuple[ir.Node | None, list[ir.Value], float]:
    """Take `MatMul [x scale] [+ mask [+ mask]]` apart, in any order of the additions."""
    inner, scale = _unscaled(value)
    product = producer(inner, "MatMul")
    if product is not None:
        return product, [], scale
    add = producer(value, "Add")
    for index in (0, 1) if add is not None and deep else ():
        assert add is not None
        product, masks, scale = _scores(add.inputs[index], deep - 1)
        other = add.inputs[1 - index]
        if product is not None and other is not None:
            return product, [*masks, other], scale
    return None, [], 1.0


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


def split_heads(value: ir.Value | None) -> Heads | None:
    """What a value [batch, heads, length, size] was made of: its own input, a cache, or nothing that is known."""
    shape = dims(value)
    if value is None or shape is None or len(shape) != 4:
        return None
    join = producer(value, "Concat")
    if join is not None and len(join.inputs) == 2 and attribute(join, "axis", 0) in (2, -2):
        past, fresh = join.inputs
        before, inner = dims(past), _fresh_heads(fresh)
        # Past and fresh ones may say less about their sizes than the other, but must not contradict
        if inner is not None and before is not None and before[1:4:2] == (inner.heads, inner.size):
            return Heads(value, inner.whole, inner.heads, inner.size, past)
    return _fresh_heads(value)


def _fresh_heads(value: ir.Value | None) -> Heads | None:
    """Transpose(x, (0, 2, 1, 3)) of [b, s, heads, size], which is Reshape(y [b, s, width]) where that can be seen."""
    shape = dims(value)
    if value is None or shape is None or len(shape) != 4:
        return None
    transpose = producer(value, "Transpose")
    whole, split = None, shape[1:4:2]
    if transpose is not None and list(attribute(transpose, "perm", [])) == [0, 2, 1, 3]:
        whole = transpose.inputs[0]
        unsplit = _unsplit(whole)
        if unsplit is not None:
            whole, *split = unsplit  # type: ignore[assignment]
    heads, size = split
    return Heads(value, whole, heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def _unsplit(split: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """Reshape(x [b, s, width]) to [b, s, heads, size] -> x; one of the two last sizes may be left open."""
    reshape, shape = producer(split, "Reshape"), dims(split)
    whole = reshape.inputs[0] if reshape is not None else None
    around = dims(whole)
    if whole is None or shape is None or around is None or len(shape) != 4 or len(around) != 3:
        return None
    if not (may_be_equal(shape[0], around[0]) and may_be_equal(shape[1], around[1])):
        return None
    width, heads, size = around[2], shape[2], shape[3]
    if isinstance(width, int) and isinstance(size, int) and not isinstance(heads, int):
        heads = width // size
    if isinstance(width, int) and isinstance(heads, int) and not isinstance(size, int):
        size = width // heads
    if not isinstance(heads, int) or not isinstance(size, int) or (isinstance(width, int) and width != heads * size):
        return None
    return whole, heads, size


def _split_keys(turned: ir.Value) -> Heads | None:
    """Keys [b, n, h, s]; where one Transpose makes them of [b, s, n, h], no value has the heads in front."""
    transpose = producer(turned, "Transpose")
    if transpose is not None and list(attribute(transpose, "perm", [])) == [0, 2, 3, 1]:
        found = _unsplit(transpose.inputs[0])
        return Heads(None, *found) if found is not None else None
    return split_heads(turned_back(turned))


def turned_back(turned: ir.Value) -> ir.Value | None:
    """The keys [b, n, s, h] behind [b, n, h, s]: exchanged by one Transpose, or through three axes."""
    transpose = producer(turned, "Transpose")
    if transpose is not None:
        return transpose.inputs[0] if list(attribute(transpose, "perm", [])) == [0, 1, 3, 2] else None
    # torch's SDPA: [b, n, s, h] -> [b * n, s, h] -> [b * n, h, s] -> [b, n, h, s]
    outer = producer(turned, "Reshape")
    middle = producer(outer.inputs[0], "Transpose") if outer is not None else None
    if middle is None or list(attribute(middle, "perm", [])) != [0, 2, 1]:
        return None
    inner = producer(middle.inputs[0], "Reshape")
    keys = inner.inputs[0] if inner is not None else None
    before, after = dims(keys), dims(turned)
    if before is None or len(before) != 4 or after is None or len(after) != 4:
        return None
    b, n, h, s = after
    return keys if all(map(may_be_equal, before, (b, n, s, h))) else None


def _merged_heads(attended: ir.Value, width: int) -> ir.Node | None:
    """Reshape(Transpose(x, (0, 2, 1, 3)), [b, s, width] or [b s, width]): what puts the heads together again."""
    transpose = only_consumer(attended)
    if transpose is None or not is_op(transpose, "Transpose"):
        return None
    if list(attribute(transpose, "perm", [])) != [0, 2, 1, 3]:
        return None
    reshape = only_consumer(transpose.outputs[0])
    if reshape is None or not is_op(reshape, "Reshape"):
        return None
    shape, split = dims(reshape.outputs[0]), dims(transpose.outputs[0])
    if shape is None or shape[-1:] not in ((width,), (None,)):
        return None
    if len(shape) == 2:
        return reshape if shape[1] == width else None
    if len(shape) != 3:
        return None
    if split is not None and not (may_be_equal(shape[0], split[0]) and may_be_equal(shape[1], split[1])):
        return None
    return reshape

# SPDX-License-Identifier: Apache-2.0
"""Rules of attention as one operator: heads are cut whole, together with the query heads that share their keys.

The size of a head never changes, so neither does the scale of the scores. What counts heads is an attribute.

Reference: Attention-23 and RotaryEmbedding-23 in ONNX's Operators.md; Attention, MultiHeadAttention,
GroupQueryAttention, RotaryEmbedding, EmbedLayerNormalization in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..passes.graph import MICROSOFT, attribute
from .rules import contract, unknown
from .units import Ids
from .walk import Axes, Walk, put_ints, rule


@rule("MultiHeadAttention", domain=MICROSOFT)
def _multi_head(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    query, key, value = (walk.of(walk.input(node, index)) for index in range(3))
    heads = int(attribute(node, "num_heads", 1))
    if query is None or key is None or value is None or len(query) != 3 or len(key) not in (3, 4):
        return unknown(walk, node, "MultiHeadAttention with packed query, key and value")
    rows = [_heads(walk, node, axes, heads) for axes in (query, key, value)]
    common = _tied(walk, node, rows)
    _bias(walk, node, 3, [query[-1], key[-1] if len(key) == 3 else None, value[-1] if len(value) == 3 else None])
    _head_axis(walk, node, common, ((5, 1), (6, 1), (7, 1)))
    _keep_inside(walk, node, [axes for axes in (key, value) if len(axes) == 4])
    if common is not None:
        walk.count_attribute(node, "num_heads", common)
    out = value[-1] if len(value) == 3 else None
    if len(value) == 4 and common is not None:
        size = walk.size(node.inputs[2], 3)
        out = np.repeat(common, size) if size is not None else None
        if out is None:
            walk.close(node, common, "the size of a head is unknown")
    cache: Axes = [query[0], common, None, None]
    return [[query[0], query[1], out], cache, cache][: len(node.outputs)]


def _heads(walk: Walk, node: ir.Node, axes: Axes, heads: int) -> Ids | None:
    """One unit a head, from features [.., heads x size] or [batch, heads, length, size]."""
    if len(axes) == 4:
        return axes[1]
    features = axes[-1]
    if features is None or len(features) % heads or heads == 1:
        walk.close(node, features, "a single head" if heads == 1 else "features that are no whole number of heads")
        return None
    return walk.merged(node, features, heads)


def _tied(walk: Walk, node: ir.Node, rows: list[Ids | None]) -> Ids | None:
    common = rows[0]
    for other in rows[1:]:
        if common is not None or other is not None:
            common = walk.tie(node, common, other, "its partner in attention cannot be cut")
    return common


def _bias(walk: Walk, node: ir.Node, index: int, parts: list[Ids | None]) -> None:
    """The biases of query, key and value in one vector."""
    own = (walk.of(walk.input(node, index)) or [None])[0]
    if own is None:
        return
    if any(part is None for part in parts) or sum(len(part) for part in parts if part is not None) != len(own):
        walk.close(node, own, "a bias in parts of unknown size")
        for part in parts:
            walk.close(node, part, "a bias in parts of unknown size")
        return
    walk.units.tie(own, np.concatenate([part for part in parts if part is not None]))


def _head_axis(walk: Walk, node: ir.Node, heads: Ids | None, places: tuple[tuple[int, int], ...]) -> None:
    """Inputs that have an axis of heads: biases of the scores, caches. One position is for all heads."""
    for index, axis in places:
        value = walk.input(node, index)
        axes = walk.of(value)
        if value is None or axes is None or len(axes) <= (axis if axis >= 0 else -axis - 1):
            continue
        if axes[axis] is not None:
            walk.tie(node, heads, axes[axis])
        elif heads is not None and walk.size(value, axis) != 1:
            walk.close(node, heads, "it meets an axis of heads whose size only the run tells")
        _keep_inside(walk, node, [[None, None, *axes[2:]]] if len(axes) == 4 else [])


def _keep_inside(walk: Walk, node: ir.Node, many: list[Axes]) -> None:
    for axes in many:
        for units in axes[2:]:
            walk.close(node, units, "it lies inside a head")


@rule("Attention", domain=MICROSOFT)
def _packed_attention(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    data, weight = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    heads = int(attribute(node, "num_heads", 1))
    if data is None or weight is None or weight[1] is None:
        return unknown(walk, node, "Attention without weights")
    contract(walk, node, data[-1], weight[0])
    stated = attribute(node, "qkv_hidden_sizes", None)
    third = len(weight[1]) // 3
    sizes = [int(n) for n in stated] if stated else [third] * 3
    parts = np.split(weight[1], np.cumsum(sizes)[:-1])
    rows = [_heads(walk, node, [part], heads) for part in parts]
    common = _tied(walk, node, rows)
    bias = walk.of(walk.input(node, 2))
    if bias is not None:
        walk.tie(node, weight[1], bias[0])
    _head_axis(walk, node, common, ((4, 2), (5, 1)))
    if common is not None:
        walk.count_attribute(node, "num_heads", common)
    if stated:
        walk.fix(node, lambda kept: put_ints(node, "qkv_hidden_sizes", [int(kept(part).sum()) for part in parts]))
    return [[data[0], data[1], parts[2]], [None, data[0], common, None, None]][: len(node.outputs)]


@rule("GroupQueryAttention", domain=MICROSOFT)
def _group_query(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    query, key, value = (walk.of(walk.input(node, index)) for index in range(3))
    heads, groups = int(attribute(node, "num_heads", 1)), int(attribute(node, "kv_num_heads", 1))
    if query is None or query[-1] is None:
        return unknown(walk, node, "GroupQueryAttention of unknown width")
    features = query[-1]
    if key is None or value is None:
        size = len(features) // (heads + 2 * groups)
        edges = [heads * size, (heads + groups) * size]
        parts: list[Ids | None] = list(np.split(features, edges))
    else:
        parts = [features, key[-1], value[-1]]
    rows = [_heads(walk, node, [part], count) for part, count in zip(parts, (heads, groups, groups), strict=True)]
    common = _grouped(walk, node, rows[0], _tied(walk, node, rows[1:]), groups)
    _head_axis(walk, node, common, ((3, 1), (4, 1)))
    _head_axis(walk, node, rows[0], ((10, 1), (11, 0)))
    if common is not None:
        walk.count_attribute(node, "num_heads", rows[0])
        walk.count_attribute(node, "kv_num_heads", common)
    cache: Axes = [query[0], common, None, None]
    return [[query[0], query[1], parts[0]], cache, cache][: len(node.outputs)]


def _grouped(walk: Walk, node: ir.Node, queries: Ids | None, keys: Ids | None, groups: int) -> Ids | None:
    """Tie the query heads of a group to their key and value head."""
    if queries is None or keys is None:
        walk.close(node, queries, "its partner in attention cannot be cut")
        walk.close(node, keys, "its partner in attention cannot be cut")
        return None
    walk.units.tie(queries.reshape(groups, -1), keys[:, None])
    return keys


@rule("Attention")
def _attention(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    many = [walk.of(walk.input(node, index)) for index in range(3)]
    if any(axes is None for axes in many):
        return unknown(walk, node, "Attention of unknown rank")
    query, key, value = (list(axes or []) for axes in many)
    flat = len(query) == 3
    heads = int(attribute(node, "q_num_heads", 0)) if flat else walk.size(node.inputs[0], 1)
    groups = int(attribute(node, "kv_num_heads", 0)) if flat else walk.size(node.inputs[1], 1)
    if not heads or not groups:
        return unknown(walk, node, "Attention with an unknown number of heads")
    rows = [_heads(walk, node, axes, count) for axes, count in ((query, heads), (key, groups), (value, groups))]
    common = _tied(walk, node, rows[1:])
    common = _grouped(walk, node, rows[0], common, groups) if common is not None or rows[0] is not None else None
    if not flat:
        _keep_inside(walk, node, [query, key, value])
    mask = walk.of(walk.input(node, 3))
    if mask is not None and len(mask) >= 3:
        _head_axis(walk, node, rows[0] if common is not None else None, ((3, len(mask) - 3),))
    _head_axis(walk, node, common, ((4, 1), (5, 1)))
    if flat and common is not None:
        walk.count_attribute(node, "q_num_heads", rows[0])
        walk.count_attribute(node, "kv_num_heads", common)
    return _attention_outputs(walk, node, query, value, common, rows[0], heads // groups, flat)


def _attention_outputs(
    walk: Walk, node: ir.Node, query: Axes, value: Axes, common: Ids | None, rows: Ids | None, share: int, flat: bool
) -> Sequence[Axes | None]:
    """The output has the query's heads, of the values' size."""
    cache: Axes = [query[0], common, None, None]
    if not flat:
        out: Axes = [query[0], rows, query[2], value[3]]
    else:
        size = None if value[2] is None or common is None else len(value[2]) // len(common)
        out = [query[0], query[1], None if size is None or rows is None else np.repeat(rows, size)]
    return [out, cache, cache, [query[0], rows, None, None]][: len(node.outputs)]


@rule("RotaryEmbedding", domain=MICROSOFT)
def _contrib_rotary(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    return _rotary(walk, node, cosine=2, others=(2, 3))


@rule("RotaryEmbedding")
def _standard_rotary(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    return _rotary(walk, node, cosine=1, others=(1, 2))


def _rotary(walk: Walk, node: ir.Node, *, cosine: int, others: tuple[int, ...]) -> Sequence[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    for index in others:
        walk.close_all(node, walk.input(node, index), "angles of a rotary embedding")
    if len(data) == 4:
        walk.close(node, data[3], "it lies inside a head")
        return [data]
    features, heads = data[-1], int(attribute(node, "num_heads", 0))
    if not heads:
        half = walk.size(node.inputs[cosine], -1)
        heads = len(features) // (2 * half) if features is not None and half else 0
    if features is None or not heads or len(features) % heads:
        walk.close(node, features, "rotary embedding of heads of unknown size")
        return [data]
    stretches = _heads(walk, node, [features], heads)
    if stretches is not None and attribute(node, "num_heads", 0):
        walk.count_attribute(node, "num_heads", stretches)
    return [data]


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def _embed(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    tables = [walk.of(walk.input(node, index)) for index in (2, 3, 4)]
    known = [axes for axes in tables if axes is not None]
    features: Ids | None = known[0][1] if known else None
    for axes in known:
        walk.close(node, axes[0], "rows are looked up by their number")
        features = walk.tie(node, features, axes[1])
    for index in (5, 6):
        own = walk.of(walk.input(node, index))
        if own is not None:
            features = walk.tie(node, features, own[0])
    if features is not None:
        walk.normalized.append(features)
    hidden: Axes = [None, None, features]
    outputs: list[Axes | None] = [hidden, [None], hidden]
    return outputs[: len(node.outputs)]

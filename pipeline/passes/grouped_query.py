# SPDX-License-Identifier: Apache-2.0
"""Attention with a cache as com.microsoft's GroupQueryAttention, which appends to the cache itself.

Given one buffer as past and as present, of any length that has room for all tokens, the operator appends in place:
nothing is copied from token to token. How far each row is filled, it learns from the number of ones in its row of the
attention mask. From this follow three limits, which is why the rule has to be
asked for:

- Padding stands on the right: a row's tokens begin at position 0 of its cache. Padding on the left cannot be said.
- Each row's next token goes behind its own last one, so rows of different lengths need position_ids of their own.
- On the CPU, several sequences with several new tokens each work only without a past.

The mask is not recognized by its nodes, which every exporter writes differently, but by what it computes: it is run on
a few shapes, one of them long, and must be causal and hide what the attention mask hides, and nothing else.

Reference: GroupQueryAttention in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...contracts.errors import InputError
from ...exporters import graph_file
from ...runtime.session import Session
from .attention import AttentionMatch, Heads, finish, match_scores, split_heads, turned_back
from .attention_nodes import flat_heads, hand_over, int64_weight
from .graph import MICROSOFT, add_weight, attribute, consumers, dims, is_op, make_node, replace_value
from .grouped_heads import repeated

_HIDDEN = -1e4
"""A mask with less than this hides a key, also in fp16."""

_SHAPES = ((2, 0, 3, 1), (2, 2, 3, 2), (2, 3, 1, 1), (1, 131071, 1, 0))
"""Rows, past, new and hidden tokens that a mask is tried on; the last for windows, which hide what is far back."""


@dataclass(frozen=True)
class CachedAttention:
    """Attention whose keys and values are those of a cache and this input's.

    Attributes:
        attention: With the keys and values as the cache has them, before any repetition.
        groups: Heads of keys and values.
        tokens: The attention mask among the graph's inputs, [batch, past + new]; None until the mask is confirmed.
    """

    attention: AttentionMatch
    groups: int
    tokens: ir.Value | None = None


def match_cached(softmax: ir.Node) -> CachedAttention | str | None:
    """The attention around this Softmax, if a cache among the graph's inputs and outputs feeds it; else why not."""
    if not is_op(softmax, "Softmax"):
        return None
    found = match_scores(softmax)
    if found is None or isinstance(found, str):
        return found
    shared = [_shared(value) for value in (turned_back(found.turned_key), found.value)]
    key, value = (heads for heads, _ in shared)
    query = split_heads(found.query)
    if query is None or key is None or value is None or shared[0][1] != shared[1][1]:
        return "heads are not split as [batch, length, heads, size]"
    if query.heads != key.heads * shared[0][1] or key.heads != value.heads or not query.size == key.size == value.size:
        return "queries, keys and values do not fit together"
    for heads in (key, value):
        if heads.past is None or heads.split is None or heads.whole is None:
            return "keeps no cache of past keys and values"
        inside = softmax.graph is not heads.past.graph
        if inside or not heads.past.is_graph_input() or not heads.split.is_graph_output():
            return "its cache is not among the graph's inputs and outputs"
    if len(found.masks) != 1:
        return "its mask has several parts" if found.masks else "has no mask, so is not causal"
    keys, values = (Heads(h.split, h.whole, query.heads, h.size, h.past) for h in (key, value))
    whole = finish(softmax, query, keys, values, found.scale, tuple(found.masks), False, found.attended)
    return whole if isinstance(whole, str) else CachedAttention(whole, key.heads)


def _shared(value: ir.Value | None) -> tuple[Heads | None, int]:
    """The heads before they were repeated, and how often each was."""
    found = repeated(value)
    return (split_heads(found[0]), found[2]) if found is not None else (split_heads(value), 1)


def confirm_causal(match: CachedAttention, known: dict[str, Any]) -> CachedAttention | str:
    """The match with the attention mask that its mask is made of; or what is wrong with that, found by running it."""
    mask = match.attention.masks[0]
    key = f"mask {mask.name}"
    if key not in known:
        assert match.attention.key.past is not None
        known[key] = _causal_over(mask, match.attention.key.past)
    tokens = known[key]
    if isinstance(tokens, ir.Value):
        return CachedAttention(match.attention, match.groups, tokens)
    return str(tokens)


def _causal_over(mask: ir.Value, past: ir.Value) -> ir.Value | str:
    """The input [batch, past + new] by which `mask` hides padding, if it is causal besides and nothing more."""
    graph = mask.graph
    assert isinstance(graph, ir.Graph)
    inputs = _inputs_of(mask)
    batch, _, before, _ = dims(past) or (None,) * 4
    counted = {batch, before, *(_name(value, 1) for value in graph.inputs if value.name == "input_ids")}
    tokens = [v for v in inputs if len(dims(v) or ()) == 2 and _name(v, 1) not in counted and _name(v, 1) is not None]
    if len(tokens) != 1 or tokens[0].dtype is None or not tokens[0].dtype.is_integer():
        return "its mask does not depend on one attention mask of integers among the inputs"
    part = ir.Model(ir.convenience.extract(graph, inputs, [mask]), ir_version=10)
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        file = Path(folder) / "mask.onnx"
        graph_file.write(part, file)
        session = Session(file, threads=1)
        for rows, old, new, hidden in _SHAPES:
            seen = np.ones((rows, old + new), np.int64)
            seen[0, old + new - hidden :] = 0
            sizes: dict[int | str | None, int] = {batch: rows, before: old}
            feeds = {str(v.name): _example(v, seen if v is tokens[0] else None, sizes, new) for v in inputs}
            found = next(iter(session.run(feeds).values())) > _HIDDEN
            wanted = np.arange(old + new)[None, None, None] <= old + np.arange(new)[None, None, :, None]
            wanted = wanted & (seen[:, None, None] == 1)
            if not np.array_equal(np.broadcast_to(found, wanted.shape), wanted):
                return "its mask is not causal, or hides more than padding"
    return tokens[0]


def _inputs_of(value: ir.Value) -> list[ir.Value]:
    """The graph's inputs that `value` is computed from."""
    seen, waiting, found = {value}, [value], []
    while waiting:
        inner = waiting.pop()
        if inner.is_graph_input():
            found.append(inner)
        node = inner.producer()
        for before in node.inputs if node is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return sorted(found, key=lambda v: str(v.name))


def _name(value: ir.Value, axis: int) -> int | str | None:
    return (dims(value) or ())[axis : axis + 1][0] if len(dims(value) or ()) > axis else None


def _example(value: ir.Value, given: np.ndarray | None, sizes: dict[int | str | None, int], new: int) -> np.ndarray:
    """Numbers for one input: the mask that is given, or zeros of the right size; an unknown size counts new tokens."""
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    if given is not None:
        return given.astype(dtype)
    return np.zeros([size if isinstance(size, int) else sizes.get(size, new) for size in dims(value) or ()], dtype)


def write_cached(model: ir.Model, match: CachedAttention, known: dict[str, Any]) -> None:
    """Put one GroupQueryAttention in place of everything from the split heads to the merged ones."""
    found, graph = match.attention, match.attention.last.graph
    assert isinstance(graph, ir.Graph)
    nodes: list[ir.Node] = []
    parts = [flat_heads(model, Heads(h.split, h.whole, n, h.size), nodes) for h, n in _with_counts(match)]
    if "lengths" not in known:
        known["lengths"] = _lengths(model, match, nodes)
    filled, total = known["lengths"]
    names = [f"{found.output.name}_attention", f"{found.output.name}_key", f"{found.output.name}_value"]
    attributes = {"num_heads": found.heads, "kv_num_heads": match.groups, "scale": found.scale}
    inputs = [*parts, found.key.past, found.value.past, filled, total]
    node = make_node("GroupQueryAttention", inputs, names, domain=MICROSOFT, attributes=attributes)
    graph.insert_before(found.last, [*nodes, node])
    for heads, present in zip((found.key, found.value), node.outputs[1:], strict=True):
        assert heads.split is not None
        present.shape, present.type = heads.split.shape, heads.split.type
        replace_value(heads.split, present)
    hand_over(found, node.outputs[0])
    model.opset_imports[MICROSOFT] = 1


def _with_counts(match: CachedAttention) -> list[tuple[Heads, int]]:
    found = match.attention
    return [(found.query, found.heads), (found.key, match.groups), (found.value, match.groups)]


def _lengths(model: ir.Model, match: CachedAttention, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """Tokens of each row less one, int32 [batch], and the width of the attention mask, int32 [1]."""
    tokens = match.tokens
    assert tokens is not None
    one = int64_weight(model, [1])
    int32 = {"to": int(ir.DataType.INT32)}
    less = add_weight(model, model.graph, "int32_1", np.ones(1, np.int32))
    count = make_node("ReduceSum", [tokens, one], [f"{tokens.name}_count"], attributes={"keepdims": 0})
    counted = make_node("Cast", [count.outputs[0]], [f"{tokens.name}_count_int32"], attributes=int32)
    filled = make_node("Sub", [counted.outputs[0], less], [f"{tokens.name}_filled"])
    width = make_node("Shape", [tokens], [f"{tokens.name}_width"], attributes={"start": 1, "end": 2})
    total = make_node("Cast", [width.outputs[0]], [f"{tokens.name}_total"], attributes=int32)
    nodes += [count, counted, filled, width, total]
    return filled.outputs[0], total.outputs[0]


def refuse_lengths_of_caches(model: ir.Model) -> None:
    """A cache that is longer than what is in it must not be asked for its length.

    Raises:
        InputError: Something else than the operator reads a cache: positions that are counted from it, mostly.
    """
    for node in model.graph:
        if not is_op(node, "GroupQueryAttention", domain=MICROSOFT):
            continue
        for cache in node.inputs[3:5]:
            for reader in consumers(cache) if cache is not None else ():
                counts_rows = is_op(reader, "Shape") and 0 < attribute(reader, "end", 9) <= 2
                if reader is not node and not counts_rows:
                    raise InputError(
                        f"'{cache.name if cache else ''}' is also read by {reader.op_type}, so that it cannot be a "
                        "buffer that is longer than what is in it",
                        next_step="Export with position_ids as an input, or leave grouped_query off.",
                    )

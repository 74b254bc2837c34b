# SPDX-License-Identifier: Apache-2.0
"""Attention masks without what transformers' mask functions leave behind when they are traced.

transformers makes a mask by asking, for every sequence, query and key, whether the one may see the other. Traced, the
padding mask is looked up by pairs of indices that say no more than "all of it" (GatherND), and conditions are joined
with others that are always true. That is a dozen operators for each token that is generated: 3 to 13 % of the time on
small models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .attention_nodes import int64_weight
from .graph import attribute, constant, consumers, dims, is_op, make_node, producer, replace_node, replace_value, scalar


@dataclass(frozen=True)
class MaskMatch:
    """A value that is another one: with axes of size 1 at 1 and 2 (`spread`), or as it is."""

    source: ir.Value
    spread: bool


def match_mask(node: ir.Node) -> MaskMatch | None:
    """A lookup of the whole padding mask, And with true, or Expand to the size that a mask has already."""
    if is_op(node, "GatherND"):
        source = _looked_up(node)
        return MaskMatch(source, True) if source is not None else None
    if node.outputs[0].is_graph_output():
        return None
    if is_op(node, "And"):
        for index in (0, 1):
            array, other = constant(node.inputs[index]), node.inputs[1 - index]
            if array is not None and array.ndim == 0 and array.dtype == np.bool_ and array and other is not None:
                return MaskMatch(other, False)
    if is_op(node, "Expand"):
        source = node.inputs[0]
        before, after = dims(source), dims(node.outputs[0])
        if source is not None and source.dtype == ir.DataType.BOOL and _known_same(before, after):
            return MaskMatch(source, False)
    return None


def _known_same(one: tuple[int | str | None, ...] | None, other: tuple[int | str | None, ...] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a is not None and same_size(a, b) for a, b in zip(one, other, strict=True))


def same_size(one: int | str | None, other: int | str | None) -> bool:
    """Whether two sizes are the same number or the same sum: `past + new` is `new + past`."""
    if isinstance(one, str) and isinstance(other, str):
        if one.startswith("unk__"):  # a name that shape inference made up, perhaps twice
            return False
        return sorted(one.split(" + ")) == sorted(other.split(" + "))
    return one is not None and one == other


def _looked_up(node: ir.Node) -> ir.Value | None:
    """m [batch, keys] of GatherND(m, pairs), where the pairs [batch, 1, 1, keys, 2] are all (i, j) in order."""
    mask, pairs = node.inputs[0], producer(node.inputs[1], "Concat")
    shape = dims(mask)
    if pairs is None or len(pairs.inputs) != 2 or attribute(node, "batch_dims", 0) or shape is None or len(shape) != 2:
        return None
    # One size for heads and queries: looked up for each query, it would be more than the mask
    if attribute(pairs, "axis", 0) not in (-1, 4) or (dims(node.outputs[0]) or ())[1:3] != (1, 1):
        return None
    rows, columns = (_numbers(value) for value in pairs.inputs)
    if rows is None or columns is None or rows[1] != (0,) or columns[1] != (3,):
        return None
    sizes = _sizes(mask) or shape
    if not same_size(rows[0], sizes[0]):
        return None
    return mask if same_size(columns[0], sizes[1]) or _joined_at_that_size(node, columns[0], sizes[1]) else None


def _joined_at_that_size(node: ir.Node, counted: int | str | None, size: int | str | None) -> bool:
    """Whether every reader joins the result with as many keys as are looked up, and so refuses a mask of another size.

    Where the mask's length has a name of its own (`total_sequence`), no name says that it is `past + new`. A mask that
    is longer would have been cut; now it is an error.
    """
    readers = consumers(node.outputs[0])
    if not isinstance(counted, str) or not isinstance(size, str) or not readers:
        return False
    others = [v for reader in readers for v in reader.inputs if is_op(reader, "And") and v is not node.outputs[0]]
    return len(others) == len(readers) and all(same_size((dims(v) or (None,))[-1], counted) for v in others)


def _sizes(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The shape of a mask of two axes, behind a Cast and GPT-2's Reshape to [batch, -1], which changes nothing."""
    cast = producer(value, "Cast")
    inner = cast.inputs[0] if cast is not None else value
    reshape = producer(inner, "Reshape")
    if reshape is None:
        return dims(inner)
    before, after = dims(reshape.inputs[0]), dims(inner)
    same = before is not None and after is not None and len(before) == len(after) == 2 and before[0] == after[0]
    return before if same else None


def _numbers(value: ir.Value | None) -> tuple[int | str | None, tuple[int, ...]] | None:
    """Unsqueeze(Expand(Unsqueeze(Range(0, n, 1)), shape), -1) -> n's name, and the axis that counts."""
    last = producer(value, "Unsqueeze")
    wide = producer(last.inputs[0], "Expand") if last is not None else None
    narrow = wide.inputs[0] if wide is not None else None
    shape, counted = dims(narrow), narrow
    if shape is None or len(shape) != 4:
        return None
    while (node := producer(counted, "Unsqueeze")) is not None:
        counted = node.inputs[0]
    numbers = producer(counted, "Range")
    if numbers is None or scalar(numbers.inputs[0]) != 0 or scalar(numbers.inputs[2]) != 1:
        return None
    axes = tuple(axis for axis, size in enumerate(shape) if size != 1)
    return ((dims(counted) or (None,))[0], axes) if len(axes) == 1 else None


def write_mask(model: ir.Model, node: ir.Node, match: MaskMatch) -> None:
    if match.spread:
        name = str(node.outputs[0].name)
        axes = int64_weight(model, [1, 2])
        replace_node(node, [make_node("Unsqueeze", [match.source, axes], [f"{name}_spread"])])
        return
    replace_value(node.outputs[0], match.source)

# SPDX-License-Identifier: Apache-2.0
"""Where the axes of a value are after a Reshape.

Axes are matched from the right and from the left by equal products of their sizes; what neither side explains is closed.
When axes merge, a position of the new axis is cut with the position of the one axis that has units. When an axis
splits, as features do into heads, one of its parts has to bear the units: a rectangle can lose whole rows or whole columns.
Which part is decided by what becomes of it: a part that a product treats as a batch (heads) is cut best, one that is
summed over, indexed or normalized not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..passes.graph import attribute, constant, consumers, dims, is_op
from .units import Ids
from .walk import Axes, Size, Walk

_Segment = tuple[list[int], list[int]]
"""Input axes and the output axes that hold the same elements."""


def reshaped(walk: Walk, node: ir.Node, target: Sequence[Size], *, zero_copies: bool = True) -> Axes:
    """The axes of the output of a Reshape-like node; units that cannot be followed are closed.

    Args:
        walk: The walk.
        node: Its first input is what is reshaped.
        target: One size for each output axis, as the node states it: 0 (copy, if so) and -1 (the rest) included.
        zero_copies: What a 0 means.
    """
    value = node.inputs[0]
    axes = walk.of(value)
    assert axes is not None
    have = [walk.size(value, axis) for axis in range(len(axes))]
    want = _numbers(node, target, have, zero_copies)
    walk.lengths[node.outputs[0]] = want
    found: Axes = [None] * len(target)
    covered: set[int] = set()
    same = _same_names(node, target, zero_copies)
    for ins, outs in _segments(have, want, same):
        covered.update(ins)
        if any(axes[axis] is not None for axis in ins):
            parts = _carried(walk, node, [axes[a] for a in ins], [have[a] for a in ins], [want[a] for a in outs], outs)
            for axis, units in zip(outs, parts, strict=True):
                found[axis] = units
    for axis, units in enumerate(axes):
        if axis not in covered:
            walk.close(node, units, "Reshape mixes it with an axis whose size only the run tells")
    _leave_fixes(walk, node, axes, found, target, zero_copies)
    return found


def _numbers(node: ir.Node, target: Sequence[Size], have: Sequence[int | None], zero_copies: bool) -> list[int | None]:
    """The output's sizes, as far as they are fixed: by the node, by the shape that was inferred, or by the others."""
    inferred = dims(node.outputs[0]) or ()
    want: list[int | None] = []
    for position, size in enumerate(target):
        if size.number == 0 and zero_copies:
            want.append(have[position] if position < len(have) else None)
        elif size.number == -1 or size.number is None:
            known = inferred[position] if position < len(inferred) else None
            want.append(len(size.units) if size.units is not None else known if isinstance(known, int) else None)
        else:
            want.append(size.number)
    missing = [position for position, number in enumerate(want) if number is None]
    if len(missing) == 1 and all(number is not None for number in have):
        known = math.prod(number for number in want if number is not None)
        want[missing[0]] = math.prod(int(number or 0) for number in have) // known if known else None
    return want


def _same_names(node: ir.Node, target: Sequence[Size], zero_copies: bool) -> list[bool]:
    """Whether the n-th axis is copied, or has the same symbolic size before and after."""
    before, after = dims(node.inputs[0]) or (), dims(node.outputs[0]) or ()
    found = []
    for position, size in enumerate(target):
        names = [shape[position] if position < len(shape) else None for shape in (before, after)]
        copied = zero_copies and size.number == 0
        found.append(copied or (isinstance(names[0], str) and names[0] == names[1]))
    return found


def _segments(have: Sequence[int | None], want: Sequence[int | None], same: Sequence[bool]) -> list[_Segment]:
    """Stretches of input and output axes with equal products, as far as both ends tell."""
    right = _from_right(have, want)
    used_in = sum(len(ins) for ins, _ in right)
    used_out = sum(len(outs) for _, outs in right)
    rest_in, rest_out = len(have) - used_in, len(want) - used_out
    left: list[_Segment] = []
    start = 0
    while start < min(rest_in, rest_out):
        if not same[start] and (have[start] is None or have[start] != want[start]):
            break
        left.append(([start], [start]))
        start += 1
    middle_in, middle_out = list(range(start, rest_in)), list(range(start, rest_out))
    segments = [*left, *right]
    sizes = [have[axis] for axis in middle_in]
    open_sizes = [axis for axis in middle_out if want[axis] is None]
    if middle_in and len(open_sizes) <= 1 and middle_out and all(size is not None for size in sizes):
        segments.append((middle_in, middle_out))  # the one size left follows from their product
    return segments


def _from_right(have: Sequence[int | None], want: Sequence[int | None]) -> list[_Segment]:
    found: list[_Segment] = []
    i, j = len(have), len(want)
    while i > 0 and j > 0:
        ins, outs = [i - 1], [j - 1]
        one, other = have[i - 1], want[j - 1]
        while one is not None and other is not None and one != other:
            if one < other and ins[0] > 0:
                ins.insert(0, ins[0] - 1)
                one = None if have[ins[0]] is None else one * int(have[ins[0]] or 0)
            elif other < one and outs[0] > 0:
                outs.insert(0, outs[0] - 1)
                other = None if want[outs[0]] is None else other * int(want[outs[0]] or 0)
            else:
                return found
        if one is None or other is None:
            return found
        found.append((ins, outs))
        i, j = ins[0], outs[0]
    return found


def _carried(
    walk: Walk,
    node: ir.Node,
    units: Sequence[Ids | None],
    have: Sequence[int | None],
    want: Sequence[int | None],
    places: Sequence[int],
) -> Axes:
    """Units of the output axes of one segment."""
    if len(units) == 1 and len(want) == 1:
        return [units[0]]
    shape = [int(size or 1) for size in have]
    total, known = math.prod(shape), math.prod(size for size in want if size is not None)
    want = [total // known if size is None else size for size in want]
    if math.prod(want) != total:
        for own in units:
            walk.close(node, own, "Reshape of sizes that do not agree")
        return [None] * len(want)
    bearing = [axis for axis, own in enumerate(units) if own is not None]
    # Of several axes with units only one can be followed; rows of the others would not stay together
    best = max(bearing, key=lambda axis: shape[axis])
    for axis in bearing:
        if axis != best:
            walk.close(node, units[axis], "Reshape merges it with another axis")
    own = units[best]
    assert own is not None
    along = own.reshape([-1 if axis == best else 1 for axis in range(len(shape))])
    grid = np.broadcast_to(along, shape).reshape([int(size or 1) for size in want])
    wide = [axis for axis, size in enumerate(grid.shape) if size > 1]
    found: Axes = [None] * len(grid.shape)
    if len(wide) == 1:
        found[wide[0]] = np.ascontiguousarray(grid.reshape(-1))
        return found
    bearer = _bearer(node.outputs[0], grid.shape, wide, places)
    rows = np.moveaxis(grid, bearer, 0).reshape(grid.shape[bearer], -1)
    walk.units.tie(rows, rows[:, :1])
    found[bearer] = np.ascontiguousarray(rows[:, 0])
    return found


def _bearer(value: ir.Value, shape: Sequence[int], wide: Sequence[int], places: Sequence[int]) -> int:
    """Which of the parts of a split axis takes the units: see the module's text."""
    return max(wide, key=lambda axis: (fate(value, places[axis], 12), shape[axis], -axis))


_BATCH, _FREE, _OUTER, _BOUND = 3, 2, 1, 0
_ALONG_ONE = ("Softmax", "LogSoftmax", "Split", "Gather", "Slice", "CumSum", "TopK", "ArgMax", "LpNormalization")


def fate(value: ir.Value, axis: int, depth: int) -> int:
    """What becomes of an axis: a product's batch (3), nothing in particular (2), a product's own rows or columns (1),
    or it is summed over, indexed or normalized (0)."""
    marks = [_fate_in(node, value, axis, depth) for node in consumers(value)]
    if _BOUND in marks:
        return _BOUND
    return next((mark for mark in (_BATCH, _OUTER) if mark in marks), _FREE)


def _fate_in(node: ir.Node, value: ir.Value, axis: int, depth: int) -> int:
    rank = len(value.shape) if value.shape is not None else None
    if is_op(node, "MatMul") and rank is not None:
        if axis < rank - 2:
            return _BATCH
        left = node.inputs[0] is value
        return _BOUND if (axis == rank - 1) == left else _OUTER
    if is_op(node, "Attention") and rank == 4:
        return _BATCH if axis == 1 else _BOUND
    if is_op(node, *_ALONG_ONE) and rank is not None and int(attribute(node, "axis", -1)) % rank == axis:
        return _BOUND
    if is_op(node, "Slice"):
        return _BOUND if _slices(node, axis, rank) else _on(node, axis, depth)
    if depth <= 0:
        return _FREE
    if is_op(node, "Transpose"):
        order = list(attribute(node, "perm", range(rank or 0))) if "perm" in node.attributes else None
        order = order if order is not None else list(range(rank or 0))[::-1]
        return fate(node.outputs[0], order.index(axis), depth - 1) if axis in order else _FREE
    if is_op(node, "Unsqueeze", "Expand", "Split"):
        return _FREE if is_op(node, "Unsqueeze") else _on(node, axis, depth)
    same = len(node.outputs) == 1 and _same_rank(node, rank)
    if same and not is_op(node, "Reshape", "Gather", "Einsum", "LayerNormalization", "Concat"):
        return _on(node, axis, depth)
    if is_op(node, "Concat") and rank is not None:
        return _BOUND if int(attribute(node, "axis", 0)) % rank == axis else _on(node, axis, depth)
    return _FREE


def _on(node: ir.Node, axis: int, depth: int) -> int:
    marks = [fate(output, axis, depth - 1) for output in node.outputs]
    return min(marks) if _BOUND in marks else max(marks, default=_FREE)


def _same_rank(node: ir.Node, rank: int | None) -> bool:
    shape = node.outputs[0].shape
    return rank is not None and (shape is None or len(shape) == rank)


def _slices(node: ir.Node, axis: int, rank: int | None) -> bool:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None:
        return True
    return any(int(a) % (rank or 1) == axis for a in np.asarray(axes).reshape(-1))


def _leave_fixes(
    walk: Walk, node: ir.Node, before: Axes, found: Axes, target: Sequence[Size], zero_copies: bool
) -> None:
    """Numbers that the node states for an axis with units have to become the number of those that stay."""
    stated = {}
    for position, (size, units) in enumerate(zip(target, found, strict=True)):
        if units is None or size.number == -1:
            continue
        if size.units is not None:
            walk.tie(node, size.units, units)
            continue
        if size.number == 0 and zero_copies and position < len(before) and before[position] is units:
            continue
        if size.number is None or not walk.writable(walk.input(node, 1), position):
            walk.close(node, units, "the target of Reshape cannot be rewritten")
            continue
        stated[position] = units
    if stated:
        walk.fix(node, lambda kept: walk.write_sizes(node, 1, {p: int(kept(u).sum()) for p, u in stated.items()}))

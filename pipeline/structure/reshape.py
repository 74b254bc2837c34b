# SPDX-License-Identifier: Apache-2.0
"""Where the axes of a value are after a Reshape.

Axes are matched from the right and from the left by equal products of their sizes (sizes that only the run tells are
primes, see `probing`); what neither side explains is closed. When axes merge, a position of the new axis is cut with
the position of the one axis that has units. When an axis splits, as features do into heads, one of its parts has to
bear the units: a rectangle can lose whole rows or whole columns. Which part is decided by what becomes of it: a part
that a product treats as a batch (heads) is cut best, one that is summed over, indexed or normalized not at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..passes.graph import attribute, constant, consumers, dims, is_op
from .units import Ids
from .walk import Axes, Kept, Size, Walk

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
    want = _numbers(walk, node, target, have, zero_copies)
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


def _numbers(
    walk: Walk, node: ir.Node, target: Sequence[Size], have: Sequence[int | None], zero_copies: bool
) -> list[int | None]:
    """The output's sizes: as the node states them, or as they were probed, or what the others leave."""
    want: list[int | None] = []
    for position, size in enumerate(target):
        if size.number == 0 and zero_copies:
            want.append(have[position] if position < len(have) else None)
        elif size.units is not None:
            want.append(len(size.units))
        elif size.number == -1 or size.probed is None:
            want.append(walk.size(node.outputs[0], position))
        else:
            want.append(size.probed)
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
    sizes = [total // known if size is None else size for size in want]
    if math.prod(sizes) != total:
        for own in units:
            walk.close(node, own, "Reshape of sizes that do not agree")
        return [None] * len(sizes)
    bearing = [axis for axis, own in enumerate(units) if own is not None]
    # Of several axes with units only one can be followed; rows of the others would not stay together
    best = max(bearing, key=lambda axis: (not walk.is_closed(units[axis]), shape[axis]))
    for axis in bearing:
        if axis != best:
            walk.close(node, units[axis], "Reshape merges it with another axis")
    own = units[best]
    assert own is not None
    along = own.reshape([-1 if axis == best else 1 for axis in range(len(shape))])
    grid = np.broadcast_to(along, shape).reshape(sizes)
    wide = [axis for axis, size in enumerate(grid.shape) if size > 1]
    found: Axes = [None] * len(grid.shape)
    if len(wide) == 1:
        found[wide[0]] = np.ascontiguousarray(grid.reshape(-1))
        return found
    bearer = _bearer(walk, node.outputs[0], grid, wide, places)
    rows = np.moveaxis(grid, bearer, 0).reshape(grid.shape[bearer], -1)
    walk.units.tie(rows, rows[:, :1])
    found[bearer] = np.ascontiguousarray(rows[:, 0])
    return found


def _bearer(walk: Walk, value: ir.Value, grid: np.ndarray, wide: Sequence[int], places: Sequence[int]) -> int:
    """Which of the parts of a split axis takes the units: one along which they differ already, or see the module."""
    for axis in wide:
        rows = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return axis
    fixed = [axis for axis in wide if walk.fixed(value, places[axis])] or wide
    return max(fixed, key=lambda axis: (fate(walk, value, places[axis], 12), grid.shape[axis], -axis))


_BATCH, _FREE, _OUTER, _BOUND = 3, 2, 1, 0
_ALONG_ONE = ("Softmax", "LogSoftmax", "Split", "Gather", "Slice", "CumSum", "TopK", "ArgMax", "LpNormalization")


def fate(walk: Walk, value: ir.Value, axis: int, depth: int) -> int:
    """What becomes of an axis: a product's batch (3), nothing in particular (2), a product's own rows or columns (1),
    or it is summed over, indexed or normalized (0)."""
    marks = [_fate_in(walk, node, value, axis, depth) for node in consumers(value)]
    if _BOUND in marks:
        return _BOUND
    return next((mark for mark in (_BATCH, _OUTER) if mark in marks), _FREE)


def _fate_in(walk: Walk, node: ir.Node, value: ir.Value, axis: int, depth: int) -> int:
    shape = walk.shape(value)
    if shape is None or depth <= 0:
        return _FREE
    rank, output = len(shape), node.outputs[0]
    if is_op(node, "MatMul"):
        if axis < rank - 2:
            return _BATCH
        left = node.inputs[0] is value
        return _BOUND if (axis == rank - 1) == left else _OUTER
    if is_op(node, "Attention") and rank == 4:
        return _BATCH if axis == 1 else _BOUND
    if is_op(node, "InstanceNormalization", "Conv", "ConvTranspose", "GroupNormalization") and axis >= 2:
        return _BOUND
    if is_op(node, *_ALONG_ONE) and int(attribute(node, "axis", -1)) % rank == axis:
        return _BOUND
    if is_op(node, "Slice") and _slices(node, axis, rank):
        return _BOUND
    if is_op(node, "Transpose"):
        order = list(attribute(node, "perm", range(rank)[::-1]))
        return fate(walk, output, order.index(axis), depth - 1)
    if is_op(node, "Reshape") and node.inputs[0] is value:
        return _fate_behind(walk, node, shape, axis, depth)
    if is_op(node, "Concat") and int(attribute(node, "axis", 0)) % rank == axis:
        return _BOUND
    if is_op(node, "Unsqueeze") and (axes := walk.numbers(node, 1, "axes")) is not None:
        places = [place for place in range(rank + len(axes)) if place not in {a % (rank + len(axes)) for a in axes}]
        return fate(walk, output, places[axis], depth - 1)
    if is_op(node, "Unsqueeze", "Reshape", "Gather", "Einsum", "LayerNormalization"):
        return _FREE
    same = len(walk.shape(output) or ()) == rank
    if is_op(node, "Expand", "Split", "Slice", "Concat") or (same and len(node.outputs) == 1):
        return _on(walk, node, axis, depth)
    return _FREE


def _fate_behind(walk: Walk, node: ir.Node, before: Sequence[int | None], axis: int, depth: int) -> int:
    """Behind a Reshape that keeps the axis as it is, counted from the left or from the right."""
    after, output = walk.shape(node.outputs[0]) or (), node.outputs[0]
    if tuple(before[: axis + 1]) == tuple(after[: axis + 1]):
        return fate(walk, output, axis, depth - 1)
    tail = len(before) - axis
    if tail <= len(after) and tuple(before[axis:]) == tuple(after[len(after) - tail :]):
        return fate(walk, output, len(after) - tail, depth - 1)
    return _FREE


def _on(walk: Walk, node: ir.Node, axis: int, depth: int) -> int:
    marks = [fate(walk, output, axis, depth - 1) for output in node.outputs]
    return min(marks) if _BOUND in marks else max(marks, default=_FREE)


def _slices(node: ir.Node, axis: int, rank: int) -> bool:
    """Whether Slice cuts along the axis."""
    axes = attribute(node, "axes", None)
    if axes is None:
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is None or any(int(a) % rank == axis for a in np.asarray(axes).reshape(-1))


def _leave_fixes(
    walk: Walk, node: ir.Node, before: Axes, found: Axes, target: Sequence[Size], zero_copies: bool
) -> None:
    """Numbers that the node states for an axis with units have to become the number of those that stay."""
    output, rest = node.outputs[0], any(size.number == -1 for size in target)
    stated: dict[int, tuple[Ids | None, Ids | None]] = {}
    for position, (size, units) in enumerate(zip(target, found, strict=True)):
        if units is None or size.number == -1 or size.units is units:
            continue
        if size.number == 0 and zero_copies and position < len(before) and before[position] is units:
            continue
        fixed = walk.fixed(output, position) or size.number is not None
        writable = walk.writable(walk.input(node, 1), position)
        if size.units is not None and not (writable and fixed):
            walk.tie(node, size.units, units)
            continue
        if not writable or (rest and not fixed):
            walk.close(node, units, "the target of Reshape cannot be rewritten")
            continue
        stated[position] = (units if fixed else None, size.units)
        rest = rest or not fixed
    if stated:

        def rewrite(kept: Kept) -> None:
            followed = [units for _, units in stated.values() if units is not None]
            changed = (found[position] for position in stated)
            if all(kept(units).all() for units in (*changed, *followed) if units is not None):
                return
            numbers = {p: -1 if units is None else int(kept(units).sum()) for p, (units, _) in stated.items()}
            walk.write_sizes(node, 1, numbers)

        walk.fix(node, rewrite)

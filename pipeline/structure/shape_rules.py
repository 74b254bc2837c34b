# SPDX-License-Identifier: Apache-2.0
"""Rules of operators that move elements and do not change them, and of vectors of sizes.

Reference: the operators' specifications in ONNX's Operators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..passes.graph import attribute, constant
from .reshape import reshaped
from .rules import unknown
from .units import Ids
from .walk import Axes, Kept, Size, Walk, put_ints, rule


@rule("Shape")
def _shape(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return []
    start, end = int(attribute(node, "start", 0)), attribute(node, "end", None)
    walk.sizes[node.outputs[0]] = [Size(units=units) for units in data][start : None if end is None else int(end)]
    return [[None]]


@rule("Size")
def _size(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return unknown(walk, node, "its number of elements is computed with")


@rule("Reshape")
def _reshape(walk: Walk, node: ir.Node) -> list[Axes | None]:
    value, data = node.inputs[0], walk.of(node.inputs[0])
    sizes = walk.sizes_of(value)
    if sizes is not None and len(sizes) <= 1 and value not in walk.model.graph.inputs:
        walk.sizes[node.outputs[0]] = sizes
    target = walk.sizes_of(walk.input(node, 1))
    if "shape" in node.attributes:
        return _old_reshape(walk, node)
    if data is None or target is None:
        return unknown(walk, node, "the target of Reshape is computed")
    return [reshaped(walk, node, target, zero_copies=not attribute(node, "allowzero", 0))]


def _old_reshape(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return unknown(walk, node, "Reshape of opset 4 or below")


@rule("Flatten")
def _flatten(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    axis = int(attribute(node, "axis", 1))
    axis = axis + len(data) if axis < 0 else axis
    left = [walk.size(node.inputs[0], a) for a in range(axis)]
    count = int(np.prod([n or 1 for n in left])) if all(n is not None for n in left) else None
    # Two sizes that follow by themselves: what is on the left, and the rest
    right = [walk.size(node.inputs[0], a) for a in range(axis, len(data))]
    rest = int(np.prod([n or 1 for n in right])) if all(n is not None for n in right) else None
    found = _merged(walk, node, data[axis:], right) if rest is not None else None
    if rest is None:
        for units in data[axis:]:
            walk.close(node, units, "Flatten mixes it with an axis whose size only the run tells")
    first = _merged(walk, node, data[:axis], left) if count is not None and axis else None
    if axis and count is None:
        for units in data[:axis]:
            walk.close(node, units, "Flatten mixes it with an axis whose size only the run tells")
    return [[first, found]]


def _merged(walk: Walk, node: ir.Node, axes: Sequence[Ids | None], sizes: Sequence[int | None]) -> Ids | None:
    """Several axes as one: the positions of the one that has units, the others closed."""
    bearing = [axis for axis, units in enumerate(axes) if units is not None]
    if not bearing:
        return None
    best = max(bearing, key=lambda axis: int(sizes[axis] or 1) * (not walk.is_closed(axes[axis])))
    for axis in bearing:
        if axis != best:
            walk.close(node, axes[axis], "merged with another axis")
    own = axes[best]
    assert own is not None
    shape = [int(size or 1) for size in sizes]
    grid = np.broadcast_to(own.reshape([-1 if axis == best else 1 for axis in range(len(shape))]), shape)
    return np.ascontiguousarray(grid.reshape(-1))


@rule("Squeeze")
def _squeeze(walk: Walk, node: ir.Node) -> list[Axes | None]:
    _pass_sizes(walk, node)
    data, axes = walk.of(node.inputs[0]), walk.numbers(node, 1, "axes")
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    if axes is None:
        sizes = [walk.size(node.inputs[0], axis) for axis in range(len(data))]
        if walk.input(node, 1) is not None or any(size is None for size in sizes):
            return unknown(walk, node, "Squeeze of unknown axes")
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
    gone = {axis % len(data) for axis in axes}
    return [[units for axis, units in enumerate(data) if axis not in gone]]


@rule("Unsqueeze")
def _unsqueeze(walk: Walk, node: ir.Node) -> list[Axes | None]:
    _pass_sizes(walk, node)
    data, axes = walk.of(node.inputs[0]), walk.numbers(node, 1, "axes")
    if data is None or axes is None:
        return unknown(walk, node, "Unsqueeze of unknown axes")
    rank = len(data) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(data)
    return [[None if axis in new else next(rest) for axis in range(rank)]]


def _pass_sizes(walk: Walk, node: ir.Node) -> None:
    """One size stays one size, as a scalar or as a vector of one."""
    value = node.inputs[0]
    if value in walk.sizes and len(walk.sizes[value]) == 1:
        walk.sizes[node.outputs[0]] = walk.sizes[value]
    elif value in walk.sizes:
        walk.close_all(node, value, "its sizes are reshaped")


@rule("Transpose")
def _transpose(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    order = [int(axis) for axis in attribute(node, "perm", list(range(len(data)))[::-1])]
    return [[data[axis] for axis in order]]


@rule("Concat")
def _concat(walk: Walk, node: ir.Node) -> list[Axes | None]:
    values = [value for value in node.inputs if value is not None]
    parts = [walk.sizes_of(value) for value in values]
    if all(part is not None for part in parts) and any(value in walk.sizes for value in values):
        walk.sizes[node.outputs[0]] = [size for part in parts for size in part or ()]
        return [[None]]
    many = [walk.of(value) for value in values]
    if any(axes is None for axes in many):
        return unknown(walk, node, "a part of unknown rank")
    axes = [a for a in many if a is not None]
    rank = len(axes[0])
    at = int(attribute(node, "axis", 1)) % rank
    found: Axes = list(axes[0])
    for other in axes[1:]:
        for axis in range(rank):
            if axis != at and (found[axis] is not None or other[axis] is not None):
                found[axis] = walk.tie(node, found[axis], other[axis])
    lengths = [walk.size(value, at) for value in values]
    if all(part[at] is None for part in axes):
        return [found]
    if any(length is None or not walk.fixed(value, at) for value, length in zip(values, lengths, strict=True)):
        for part in axes:
            walk.close(node, part[at], "Concat joins it with a part whose size only the run tells")
        found[at] = None
        return [found]
    pieces = []
    for part, length in zip(axes, lengths, strict=True):
        own = part[at]
        if own is None:
            own = walk.units.fresh(int(length or 1))
            walk.close(node, own, "a part of Concat that cannot be cut")
        pieces.append(own)
    found[at] = np.concatenate(pieces)
    return [found]


@rule("Split")
def _split(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data_value = node.inputs[0]
    data = walk.of(data_value)
    if data_value in walk.sizes:
        walk.close_all(node, data_value, "its sizes are split")
    if data is None or data_value is None:
        return unknown(walk, node, "data of unknown rank")
    at = int(attribute(node, "axis", 0)) % len(data)
    own, count = data[at], len(node.outputs)
    if own is None:
        return [list(data) for _ in range(count)]
    sizes = walk.numbers(node, 1, "split")
    if (sizes is None and walk.input(node, 1) is not None) or not walk.fixed(data_value, at):
        walk.close(node, own, "Split into computed sizes")
        return [[None if axis == at else units for axis, units in enumerate(data)] for _ in range(count)]
    if sizes is None:
        each = -(-len(own) // count)
        sizes = [min(each, len(own) - each * i) for i in range(count)]
    parts = np.split(own, np.cumsum(sizes)[:-1])

    def rewrite(kept: Kept) -> None:
        numbers = [int(kept(part).sum()) for part in parts]
        if sum(numbers) == len(own):
            return
        if walk.model.opset_imports.get("", 0) < 13:
            put_ints(node, "split", numbers)
            return
        node.attributes.pop("num_outputs", None)
        if walk.input(node, 1) is None:
            node.resize_inputs(2)
        _new_input(walk, node, 1, np.asarray(numbers, np.int64), "split")

    walk.fix(node, rewrite)
    return [[part if axis == at and len(part) > 1 else None if axis == at else units
             for axis, units in enumerate(data)] for part in _guarded(walk, node, parts)]  # fmt: skip


def _guarded(walk: Walk, node: ir.Node, parts: Sequence[Ids]) -> Sequence[Ids]:
    """A part of one position has no units of its own: it has to stay."""
    for part in parts:
        if len(part) == 1:
            walk.close(node, part, "a part of Split with one position")
    return parts


def _new_input(walk: Walk, node: ir.Node, index: int, array: np.ndarray, what: str) -> None:
    from ..passes.graph import add_weight

    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(index, add_weight(walk.model, graph, f"{node.outputs[0].name}_{what}", array))


@rule("Slice")
def _slice(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    starts, ends = walk.numbers(node, 1, "starts"), walk.numbers(node, 2, "ends")
    axes, steps = walk.numbers(node, 3, "axes"), walk.numbers(node, 4, "steps")
    value = node.inputs[0]
    if value in walk.sizes:
        if starts is None or ends is None or len(starts) != 1:
            walk.close_all(node, value, "its sizes are sliced")
        else:
            walk.sizes[node.outputs[0]] = walk.sizes[value][slice(starts[0], ends[0], (steps or [1])[0])]
        return [[None]]
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    if axes is None and walk.input(node, 3) is not None:
        return unknown(walk, node, "Slice of computed axes")
    given = walk.sizes_of(walk.input(node, 1)) if starts is None else starts
    axes = axes if axes is not None else list(range(len(given) if given is not None else len(data)))
    found: Axes = list(data)
    for index, axis in enumerate(axes):
        units = data[axis]
        if units is None:
            continue
        known = starts is not None and ends is not None and (steps is not None or walk.input(node, 4) is None)
        if not known or value is None or not walk.fixed(value, axis):
            walk.close(node, units, "Slice at computed positions")
            found[axis] = None
            continue
        window = slice((starts or [])[index], (ends or [])[index], steps[index] if steps else 1)
        found[axis] = _sliced(walk, node, index, units, window)
    return [found]


def _sliced(walk: Walk, node: ir.Node, index: int, units: Ids, window: slice) -> Ids | None:
    """Units of a slice along their axis; start and end move with what is cut before them."""
    part = units[slice(window.start, window.stop, window.step or 1)]
    if len(part) == len(units) and (window.step or 1) == 1:
        return part
    if (window.step or 1) != 1 or len(part) < 2:
        walk.close(node, units, "Slice takes single positions of it")
        return part if len(part) > 1 else None
    first, last, _ = window.indices(len(units))

    def rewrite(kept: Kept) -> None:
        stay = kept(units)
        start, end = int(stay[:first].sum()), int(stay[:last].sum())
        if "starts" in node.attributes:
            for name, number in (("starts", start), ("ends", end)):
                numbers = [int(n) for n in attribute(node, name, ())]
                numbers[index] = number
                put_ints(node, name, numbers)
            return
        for place, number in ((1, start), (2, end)):
            walk.write_sizes(node, place, {index: number})

    walk.fix(node, rewrite)
    return part


@rule("Gather")
def _gather(walk: Walk, node: ir.Node) -> list[Axes | None]:
    value, indices = node.inputs[0], constant(node.inputs[1])
    axis = int(attribute(node, "axis", 0))
    if value in walk.sizes:
        sizes = walk.sizes[value]
        if indices is None or indices.size > len(sizes) or indices.ndim > 1:
            walk.close_all(node, value, "its sizes are looked up")
        else:
            walk.sizes[node.outputs[0]] = [sizes[int(i)] for i in indices.reshape(-1)]
        return [[None] * (indices.ndim if indices is not None else 0)]
    data, where = walk.of(value), walk.of(node.inputs[1])
    if data is None or where is None:
        return unknown(walk, node, "data of unknown rank")
    axis %= len(data)
    own = data[axis]
    middle: Axes = list(where)
    if indices is not None:
        for units in where:
            walk.close(node, units, "positions of a constant list")
    if own is not None:
        middle = _picked(walk, node, own, indices, where)
    return [[*data[:axis], *middle, *data[axis + 1 :]]]


def _picked(walk: Walk, node: ir.Node, own: Ids, indices: np.ndarray | None, where: Axes) -> Axes:
    """The axis along which Gather picks; constant indices are counted anew after a cut."""
    if indices is None:
        walk.close(node, own, "rows are looked up by their number")
        return list(where)
    if indices.ndim != 1 or indices.size < 2:
        walk.close(node, np.unique(own[indices.reshape(-1)]), "Gather takes it by its number")
        if indices.size:
            _leave_counting(walk, node, own, indices)
        return list(where)
    picked = own[indices]
    _leave_counting(walk, node, own, indices)
    return [picked]


def _leave_counting(walk: Walk, node: ir.Node, own: Ids, indices: np.ndarray) -> None:
    def rewrite(kept: Kept) -> None:
        stay = kept(own)
        if stay.all():
            return
        places = np.cumsum(stay) - 1
        wanted = np.where(indices < 0, indices + len(own), indices)
        new = places[wanted] if wanted.ndim != 1 or wanted.size < 2 else places[wanted[stay[wanted]]]
        _new_input(walk, node, 1, np.asarray(new, np.int64), "indices")

    walk.fix(node, rewrite)


@rule("Expand")
def _expand(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, target = walk.of(node.inputs[0]), walk.sizes_of(walk.input(node, 1))
    if data is None or target is None:
        return unknown(walk, node, "Expand to a computed shape")
    rank = max(len(data), len(target))
    found: Axes = [None] * rank
    ones: dict[int, int] = {}
    for place in range(1, rank + 1):
        own = data[-place] if place <= len(data) else None
        size = target[-place] if place <= len(target) else Size(1)
        found[-place] = own
        if own is not None:
            if size.units is not None:
                walk.tie(node, own, size.units)
            elif size.number is None or (size.number != 1 and not walk.writable(node.inputs[1], len(target) - place)):
                walk.close(node, own, "the target of Expand cannot be rewritten")
            elif size.number != 1:
                ones[len(target) - place] = 1  # 1 leaves an axis as it is
        elif size.units is not None:
            found[-place] = size.units if walk.size(node.inputs[0], -place) == 1 or place > len(data) else None
            if found[-place] is None:
                walk.close(node, size.units, "Expand to its length")
    if ones:
        walk.fix(node, lambda kept: walk.write_sizes(node, 1, ones))
    return [found]


@rule("ConstantOfShape")
def _constant_of_shape(walk: Walk, node: ir.Node) -> list[Axes | None]:
    """A tensor of one number: an axis of fixed size can be cut, since the size can be rewritten."""
    target = walk.sizes_of(node.inputs[0])
    if target is None:
        return []
    found: Axes = []
    own: dict[int, Ids] = {}
    filling = attribute(node, "value", None)
    if filling is not None and not filling.dtype.is_floating_point():
        return [[None] * len(target)]  # a vector of sizes itself, or a mask
    for place, size in enumerate(target):
        if size.units is not None:
            found.append(size.units)
        elif size.number is not None and size.number > 1 and walk.writable(node.inputs[0], place):
            own[place] = walk.units.fresh(size.number)
            found.append(own[place])
        else:
            found.append(None)
    if own:
        walk.fix(node, lambda kept: walk.write_sizes(node, 0, {p: int(kept(u).sum()) for p, u in own.items()}))
    return [found]


@rule("Tile")
def _tile(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, repeats = walk.of(node.inputs[0]), walk.sizes_of(walk.input(node, 1))
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    if repeats is None or any(size.probed is None for size in repeats):
        return unknown(walk, node, "Tile by computed numbers")
    counts = [size.probed or 0 for size in repeats]
    return [[None if units is None else np.tile(units, n) for units, n in zip(data, counts, strict=True)]]


@rule("Pad")
def _pad(walk: Walk, node: ir.Node) -> list[Axes | None]:
    """Padding along an axis with units makes positions that can be cut as well: the pad becomes smaller."""
    data, pads = walk.of(node.inputs[0]), walk.numbers(node, 1, "pads")
    if data is None or pads is None:
        return unknown(walk, node, "Pad by computed numbers")
    axes = walk.numbers(node, 3, "axes") or list(range(len(data)))
    found: Axes = list(data)
    plain = attribute(node, "mode", "constant") in ("constant", b"constant")
    value = constant(walk.input(node, 2)) if walk.input(node, 2) is not None else np.zeros(1)
    zero = value is not None and not np.any(value) and attribute(node, "value", 0.0) == 0.0
    for index, axis in enumerate(axes):
        before, after = pads[index], pads[index + len(axes)]
        units = data[axis]
        if not before and not after:
            continue
        found[axis] = None
        if units is None:
            continue
        if not (plain and zero) or before < 0 or after < 0:
            walk.close(node, units, "Pad along it")
            continue
        front, back = walk.units.fresh(before), walk.units.fresh(after)
        found[axis] = np.concatenate([front, units, back])
        walk.fix(node, _pad_rewrite(walk, node, {index: front, index + len(axes): back}))
    return [found]


def _pad_rewrite(walk: Walk, node: ir.Node, parts: dict[int, Ids]):  # type: ignore[no-untyped-def]
    def rewrite(kept: Kept) -> None:
        numbers = {place: int(kept(units).sum()) if len(units) else 0 for place, units in parts.items()}
        if "pads" in node.attributes:
            old = [int(n) for n in attribute(node, "pads", ())]
            put_ints(node, "pads", [numbers.get(place, n) for place, n in enumerate(old)])
        else:
            walk.write_sizes(node, 1, numbers)

    return rewrite


@rule("Resize", "Upsample")
def _resize(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    scales = attribute(node, "scales", None)
    if scales is None:
        index = 1 if node.op_type == "Upsample" or walk.model.opset_imports.get("", 0) < 11 else 2
        array = constant(walk.input(node, index))
        scales = None if array is None or not array.size else array.reshape(-1).tolist()
    sizes = walk.sizes_of(walk.input(node, 3)) if node.op_type == "Resize" else None
    axes = walk.numbers(node, -1, "axes") or list(range(len(data)))
    found: Axes = list(data)
    stated: dict[int, Ids] = {}
    for index, axis in enumerate(axes):
        units = data[axis]
        size = sizes[index] if sizes is not None and index < len(sizes) else None
        same = scales is not None and float(scales[index]) == 1.0
        if units is None:
            continue
        if size is not None and (size.units is units or size.number == len(units)):
            same = size.units is units or walk.writable(node.inputs[3], index)
            if size.units is None and same:
                stated[index] = units
        if not same:
            walk.close(node, units, f"{node.op_type} along it")
            found[axis] = None
    if stated:
        walk.fix(node, lambda kept: walk.write_sizes(node, 3, {p: int(kept(u).sum()) for p, u in stated.items()}))
    return [found]


@rule("DepthToSpace", "SpaceToDepth")
def _depth(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, block = walk.of(node.inputs[0]), int(attribute(node, "blocksize", 1)) ** 2
    if data is None:
        return unknown(walk, node, "data of unknown rank")
    for units in data[2:]:
        walk.close(node, units, "it is an axis of space")
    channels = data[1]
    if channels is None:
        return [[data[0], None, None, None]]
    if node.op_type == "SpaceToDepth":
        return [[data[0], np.tile(channels, block), None, None]]
    rows = channels.reshape(-1, block) if attribute(node, "mode", "DCR") == "CRD" else channels.reshape(block, -1).T
    walk.units.tie(rows, rows[:, :1])
    return [[data[0], np.ascontiguousarray(rows[:, 0]) if len(rows) > 1 else None, None, None]]


@rule("OneHot", "Range", "NonZero", "EyeLike", "RandomNormal", "RandomUniform")
def _made(walk: Walk, node: ir.Node) -> list[Axes | None]:
    return unknown(walk, node, f"{node.op_type} has no rule")


@rule("Constant")
def _constant(walk: Walk, node: ir.Node) -> list[Axes | None]:
    walk.of(node.outputs[0])
    return []

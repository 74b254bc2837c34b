# SPDX-License-Identifier: Apache-2.0
"""One walk over a graph that gives every axis of every value its units, operator by operator.

What an operator does with units is said by its rule (`rules`, `shape_rules`, `attention_rules`, `recurrent_rules`), one
function in one table. A rule reads the axes of the inputs, ties units, and returns the axes of the outputs; where the
node itself holds sizes (a target shape, a head count), it leaves a fix that rewrites them once the cut is decided. An
operator without a rule closes all units that reach it: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..passes.graph import add_weight, constant, dims, label, make_node, producer
from .probing import LONGEST, agreed, probe
from .units import Ids, Units

Axes = list[Ids | None]
"""The units along each axis of a value; None where the axis has one position, or a size that only the run tells."""

Kept = Callable[[Ids], np.ndarray]
"""Units to bool: which of them stay."""

Rule = Callable[["Walk", ir.Node], "Sequence[Axes | None]"]
"""The axes of the node's outputs, None where not even the rank is known."""

RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) to its rule."""


def rule(*operators: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Decorator: this function is the rule of these operators."""

    def add(function: Rule) -> Rule:
        RULES.update({(domain, operator): function for operator in operators})
        return function

    return add


@dataclass(frozen=True)
class Size:
    """One element of a vector of sizes, as it comes to a Reshape.

    Attributes:
        number: Its number, where no input of the graph changes it.
        units: The axis that it is the length of, where the run reads it from a value: it follows the cut by itself.
        probed: Its number in the first probe (see `probing`).
    """

    number: int | None = None
    units: Ids | None = None
    probed: int | None = None


class Walk:
    """The state of the walk, and what rules may ask and say.

    Attributes:
        axes: Of every value seen so far.
        probes: All sizes, for two choices of numbers for those that only the run tells.
        sizes: Of small vectors that hold sizes, where an axis with units is among them.
        fixes: Node and what rewrites its sizes; called when the cut is decided, in graph order.
        constants: What is fixed and was met.
        normalized: Units over which a mean is taken: cutting them changes the mean.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model, self.units = model, Units()
        self.axes: dict[ir.Value, Axes | None] = {}
        self.sizes: dict[ir.Value, list[Size]] = {}
        self.fixes: list[tuple[ir.Node, Callable[[Kept], None]]] = []
        self.normalized: list[Ids] = []
        self.constants: dict[ir.Value, np.ndarray] = {}
        self.probes = probe(model)

    # What a rule asks

    def input(self, node: ir.Node, index: int) -> ir.Value | None:
        return node.inputs[index] if index < len(node.inputs) else None

    def of(self, value: ir.Value | None) -> Axes | None:
        """The axes of a value; a constant gets its units when it is first met."""
        if value is None:
            return None
        if value not in self.axes:
            array = constant(value)
            if array is None:
                shape = dims(value) if value.shape is not None else self.probes[0].shapes.get(str(value.name))
                self.axes[value] = None if shape is None else [None] * len(shape)
            else:
                self.constants[value] = array
                # A short vector of whole numbers is one of sizes or positions, which rules rewrite element by element
                plain = array.dtype == np.int64 and array.ndim <= 1 and array.size <= LONGEST
                self.axes[value] = [self.units.fresh(n) if n > 1 and not plain else None for n in array.shape]
        return self.axes[value]

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """How long an axis is before any cut: in the first probe, where only the run tells."""
        if value is None:
            return None
        if value in self.constants:
            return int(self.constants[value].shape[axis])
        number = _stated(value, axis)
        return number if number is not None else self.probes[0].size(str(value.name), axis)

    def shape(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """All sizes, as `size` has them; None where not even the rank is known."""
        known = dims(value)
        rank = len(known) if known is not None else len(self.probes[0].shapes.get(str(value.name), ()))
        if known is None and str(value.name) not in self.probes[0].shapes:
            return None
        return tuple(self.size(value, axis) for axis in range(rank))

    def fixed(self, value: ir.Value, axis: int) -> bool:
        """Whether an axis has the same length in every run."""
        if value in self.constants or _stated(value, axis) is not None:
            return True
        return agreed([probe.size(str(value.name), axis) for probe in self.probes]) is not None

    def sizes_of(self, value: ir.Value | None) -> list[Size] | None:
        """The elements of a small integer vector (or scalar), where it is one of sizes; None otherwise."""
        if value is None:
            return None
        array = constant(value) if value.dtype in (ir.DataType.INT64, ir.DataType.INT32, None) else None
        if array is not None and (array.dtype not in (np.int64, np.int32) or array.ndim > 1 or array.size > LONGEST):
            return None
        plain = self._plain_sizes(value, array)
        tracked = self.sizes.get(value)
        if tracked is None or plain is None or len(plain) != len(tracked):
            return tracked if tracked is not None else plain
        return [known if size.units is None else size for size, known in zip(tracked, plain, strict=True)]

    def _plain_sizes(self, value: ir.Value, array: np.ndarray | None) -> list[Size] | None:
        """The elements as numbers: a constant's own, or as probed."""
        if array is not None:
            return [Size(n, None, n) for n in array.reshape(-1).tolist()]
        first = self.probes[0].numbers.get(str(value.name))
        if first is None:
            return None
        found = [probe.numbers.get(str(value.name)) for probe in self.probes]
        flat = [None if one is None or one.size != first.size else one.reshape(-1).tolist() for one in found]
        return [
            Size(agreed([None if one is None else one[place] for one in flat]), None, int(number))
            for place, number in enumerate(first.reshape(-1))
        ]

    def is_closed(self, units: Ids | None) -> bool:
        """Whether it is known by now that these units stay."""
        return units is None or any(np.isin(units[:1], closed.units).any() for closed in self.units.closed)

    def numbers(self, node: ir.Node, index: int, name: str) -> list[int] | None:
        """Whole numbers that are an attribute in old opsets and a constant input in new ones; None if not fixed."""
        found = node.attributes.get(name)
        if found is not None and found.value is not None:
            value = found.value
            return [int(n) for n in value] if isinstance(value, (list, tuple)) else [int(value)]
        array = constant(self.input(node, index)) if index >= 0 else None
        return None if array is None else [int(n) for n in np.asarray(array).reshape(-1)]

    # What a rule says

    def tie(self, node: ir.Node, one: Ids | None, other: Ids | None, why: str = "") -> Ids | None:
        """Tie two axes of one length position by position; either may be free of units, which closes the other."""
        if one is None or other is None:
            found = one if one is not None else other
            self.close(node, found, why or f"{node.op_type} joins it with an axis that cannot be cut")
            return found
        if len(one) != len(other):
            self.close(node, one, "axes of different sizes meet")
            self.close(node, other, "axes of different sizes meet")
            return one
        self.units.tie(one, other)
        return one

    def close(self, node: ir.Node, units: Ids | None, reason: str) -> None:
        self.units.close(units, label(node), reason)

    def close_all(self, node: ir.Node, value: ir.Value | None, reason: str) -> None:
        """Close every axis of a value, and what its elements are the sizes of."""
        for units in self.of(value) or ():
            self.close(node, units, reason)
        for size in self.sizes.get(value, ()) if value is not None else ():
            self.close(node, size.units, "its length is computed with")

    def merged(self, node: ir.Node, whole: Ids, groups: int) -> Ids:
        """Tie the positions of each of `groups` equal stretches of an axis; one unit for each stretch."""
        blocks = whole.reshape(groups, -1)
        self.units.tie(blocks, blocks[:, :1])
        return np.ascontiguousarray(blocks[:, 0])

    def fix(self, node: ir.Node, rewrite: Callable[[Kept], None]) -> None:
        self.fixes.append((node, rewrite))

    def count_attribute(self, node: ir.Node, name: str, units: Ids | None) -> None:
        """The attribute `name` counts these units."""
        if units is not None:
            self.fix(node, lambda kept: _put(node, name, int(kept(units).sum())))

    # Vectors of sizes, rewritten for one reader

    def writable(self, value: ir.Value | None, position: int) -> bool:
        """Whether `write_sizes` could write into this element of the vector."""
        sizes = self.sizes_of(value)
        if value is None or sizes is None:
            return False
        if len(sizes) == 1 or all(size.number is not None for size in sizes):
            return True
        maker = producer(value, "Concat", "Cast", "Identity")
        for part in maker.inputs if maker is not None else ():
            length = len(self.sizes_of(part) or ())
            if position < length:
                return self.writable(part, position)
            position -= length
        return False

    def write_sizes(self, node: ir.Node, index: int, numbers: dict[int, int]) -> None:
        """Put numbers into some elements of the vector that is an input of the node, for this node alone."""
        value = node.inputs[index]
        assert value is not None
        old = self.sizes_of(value) or []
        changed = {place: n for place, n in numbers.items() if place >= len(old) or old[place].number != n}
        if changed:
            node.replace_input_with(index, self._rewritten(value, changed, node))

    def _rewritten(self, value: ir.Value, numbers: dict[int, int], reader: ir.Node) -> ir.Value:
        graph, sizes = reader.graph, self.sizes_of(value) or []
        assert isinstance(graph, ir.Graph)
        if len(numbers) == len(sizes) or all(size.number is not None for size in sizes):
            new = np.asarray([numbers.get(place, size.number) for place, size in enumerate(sizes)], np.int64)
            new = new.reshape(() if dims(value) == () else (-1,))
            return add_weight(self.model, graph, f"{value.name}_cut", new.astype((value.dtype or _INT64).numpy()))
        maker = producer(value, "Concat", "Cast", "Identity")
        assert maker is not None, "only what is writable is written"
        inputs, start = [], 0
        for part in maker.inputs:
            assert part is not None
            length = len(self.sizes_of(part) or ())
            own = {p - start: n for p, n in numbers.items() if start <= p < start + length}
            inputs.append(self._rewritten(part, own, reader) if own else part)
            start += length
        copy = make_node(maker.op_type, inputs, [f"{value.name}_cut"])
        copy.attributes.update(maker.attributes)
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.insert_before(reader, copy)
        return copy.outputs[0]

    def freeze(self, node: ir.Node, units: Ids) -> bool:
        """Let what a node computes from the length of an axis be what it was before the cut, if that is one number."""
        known = [self.sizes_of(value) for value in node.outputs]
        if any(sizes is None or any(size.number is None for size in sizes) for sizes in known):
            return False

        def rewrite(kept: Kept) -> None:
            graph = node.graph
            if kept(units).all() or not isinstance(graph, ir.Graph):
                return
            for value, sizes in zip(node.outputs, known, strict=True):
                array = np.asarray([size.number for size in sizes or ()], (value.dtype or _INT64).numpy())
                array = array.reshape(() if dims(value) == () else (-1,))
                value.replace_all_uses_with(add_weight(self.model, graph, f"{value.name}_fixed", array))

        self.fix(node, rewrite)
        return True


_INT64 = ir.DataType.INT64


def _stated(value: ir.Value, axis: int) -> int | None:
    """The size in the graph's own shapes."""
    shape = dims(value)
    number = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    return number if isinstance(number, int) else None


def _put(node: ir.Node, name: str, number: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, number)


def put_ints(node: ir.Node, name: str, numbers: Sequence[int]) -> None:
    """Set an attribute that holds several whole numbers."""
    node.attributes[name] = ir.AttrInt64s(name, [int(number) for number in numbers])


def walk_graph(model: ir.Model, *, open_inputs: Callable[[str], bool]) -> Walk:
    """Visit every node of the main graph in order.

    Args:
        model: Stays as it is; topologically sorted.
        open_inputs: Which inputs of the graph may change in size (the caches of attention, if the user says so).
    """
    walk = Walk(model)
    for value in model.graph.inputs:
        name, shape = str(value.name), dims(value)
        axes: Axes = [walk.units.fresh(n) if isinstance(n, int) and n > 1 else None for n in shape or ()]
        walk.axes[value] = None if shape is None else axes
        if not open_inputs(name):
            for units in axes:
                walk.units.close(units, name, "it is an input of the graph")
    for node in model.graph:
        _visit(walk, node)
    for value in model.graph.outputs:
        name = str(value.name)
        sizes = [size.units for size in walk.sizes.get(value, ())]
        for units in (*([] if open_inputs(name) else walk.of(value) or []), *sizes):
            walk.units.close(units, name, "it is an output of the graph")
    return walk


def _visit(walk: Walk, node: ir.Node) -> None:
    """Apply the node's rule, or close what it reads."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    found = RULES.get((domain, node.op_type))
    if found is None or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)):
        for read in _read(node):
            walk.close_all(node, read, f"{node.op_type} has no rule")
        return
    outputs = found(walk, node)
    for result, axes in zip(node.outputs, outputs, strict=False):
        if axes is not None:
            walk.axes[result] = list(axes)
    tracked = any(value in walk.sizes for value in node.outputs)
    for index, value in enumerate(node.inputs):
        for size in walk.sizes.get(value, ()) if value is not None else ():
            if size.units is None or tracked or (node.op_type, index) in _FOLLOW or walk.freeze(node, size.units):
                continue
            walk.close(node, size.units, "its length is computed with")


_FOLLOW = (("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Resize", 3))
"""Inputs that hold sizes, and whose rules see to it that they stay right."""


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())


def _read(node: ir.Node) -> list[ir.Value]:
    """All that a node reads, the values that its subgraphs take from outside included."""
    found = [value for value in node.inputs if value is not None]
    for attribute in _attributes(node):
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            found += [value for inner in graph.all_nodes() for value in inner.inputs if value is not None]
            found += list(graph.outputs)
    return list(dict.fromkeys(found))

# SPDX-License-Identifier: Apache-2.0
"""`narrow`: compute only the positions that are read.

    Gather(f(x), 0, axis=1)  ->  f(Gather(x, 0, axis=1))

A classifier in the manner of BERT reads one token of its last layer, and computes that layer for all of them. Only the
keys and values need all tokens: the query, the row of attention, the output projection, the feed-forward network and
the normalizations are moved behind the selection, which is 5 of 6 multiply-adds of that layer where the feed-forward
network is four times as wide. The function stays the same; only the order of sums within a product may change.

The pass walks backwards from every Gather or Slice by constants of an activation. A value is narrowed when all its
readers need the same positions of the same axis, and what makes it treats these positions each by itself (`positions`);
otherwise the selection is written there, once for all of its readers. Nothing is computed twice. A selection that
reaches no matrix product stays where it was: little would be saved. A narrowed value gets a new name, `..._narrow`: a
pass that compares two graphs by the names of their values must not find it.

Put it after `clean` and `fuse`, which make shapes known and bring attention into a form that has a query of its own,
and before quantizers and casts.

Related: Goyal et al., "PoWER-BERT" (arXiv 2001.08950), which drops tokens layer by layer, and so changes what is
computed; here nothing is dropped that anything reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import (
    add_weight,
    attribute,
    constant,
    dims,
    drop_unused_weights,
    is_op,
    is_weight,
    label,
    make_node,
    producer,
    replace_node,
)
from .missing_shapes import fill_shapes
from .positions import Passage, Selection, inputs_for

_Demand = tuple[int, Selection]
"""An axis, and the positions of it that are read."""
_CHAINED = "another selection stands in front of it"


@register("narrow")
class Narrow(Pass):
    """Settings: none but `optional`."""

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        model = model.clone()
        fill_shapes(model)
        chosen, plan.left = _selections(model)
        plan.seen = len(chosen) + len(plan.left)
        found = _worthwhile(model, chosen, plan.left)
        for chooser in found.choosers:
            steps = list(found.steps_from(chooser))
            stops = Counter(found.stops_from(chooser))
            products = [label(node) for node in steps if found.passages[node].is_product]
            plan.actions.append(
                {
                    "selection": chooser.node.outputs[0].name,
                    "axis": chooser.axis,
                    "positions": str(chooser.selection),
                    "nodes": len(steps),
                    "products": products,
                    "stops": dict(stops),
                }
            )
        if not plan.seen:
            plan.left.append(Left(str(model.graph.name or "graph"), "nothing selects positions"))
        plan.details = _details(plan, found)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        if not plan.actions:
            return model
        wanted = {action["selection"] for action in plan.actions}
        fill_shapes(model)
        chosen = [c for c in _selections(model)[0] if c.node.outputs[0].name in wanted]
        found = _Backwards(model, chosen)
        _write(model, found)
        RemoveUnusedNodesPass()(model)
        drop_unused_weights(model)
        return model


@dataclass(frozen=True)
class _Chooser:
    """A node that reads few positions of an activation."""

    node: ir.Node
    axis: int
    selection: Selection


def _selections(model: ir.Model) -> tuple[list[_Chooser], list[Left]]:
    """The nodes that select constant positions of an activation, and those that select others."""
    chosen, left = [], []
    for node in model.graph:
        if not is_op(node, "Gather", "Slice") or node.inputs[0] is None or constant(node.inputs[0]) is not None:
            continue
        shape = dims(node.inputs[0])
        if producer(node.inputs[0], "Shape") is not None or (shape is not None and len(shape) < 2):
            continue
        found = _read_choice(node, shape)
        if isinstance(found, str):
            left.append(Left(label(node), found))
        else:
            chosen.append(found)
    return chosen, left


def _read_choice(node: ir.Node, shape: tuple[int | str | None, ...] | None) -> _Chooser | str:
    if shape is None:
        return "the shape of what it reads is not known"
    found = _read_gather(node, len(shape)) if node.op_type == "Gather" else _read_slice(node, len(shape))
    if isinstance(found, str):
        return found
    count, size = found.selection.at_most, shape[found.axis]
    if count is None:
        return "how many positions it takes depends on the size of the axis"
    if count < 1:
        return "takes no position"
    return "takes every position" if isinstance(size, int) and count >= size else found


def _read_gather(node: ir.Node, rank: int) -> _Chooser | str:
    indices = constant(node.inputs[1])
    if indices is None:
        return "its positions are computed"
    if indices.ndim > 1 or not indices.size:
        return "its positions are no list"
    places = tuple(int(i) for i in np.ravel(indices))
    return _Chooser(node, attribute(node, "axis", 0) % rank, Selection(places))


def _read_slice(node: ir.Node, rank: int) -> _Chooser | str:
    if len(node.inputs) < 3:
        return "Slice of opset 9"
    parts = [constant(value) for value in node.inputs[1:]]
    if any(part is None for part in parts):
        return "its positions are computed"
    found: list[list[int]] = [np.ravel(part).tolist() for part in parts if part is not None]
    starts, ends, axes, steps = [*found, *([0], [1])[len(found) - 2 :]]
    if len(starts) != 1:
        return "slices several axes"
    if steps != [1]:
        return "slices in steps"
    start, end = int(starts[0]), int(ends[0])
    # One position from either end: the same as a Gather of it
    if (start, end) == (0, 1) or (start == -1 and end >= np.iinfo(np.int32).max):
        return _Chooser(node, int(axes[0]) % rank, Selection((start,)))
    return _Chooser(node, int(axes[0]) % rank, Selection(start=start, end=end))


# ---------------------------------------------------------------------------------------------------------- analysis


@dataclass
class _Backwards:
    """What every value is read for, found from the results to the inputs.

    Attributes:
        choosers: The selections that it starts from.
        passages: Nodes that are narrowed, last one first, and what they read.
        narrowed: What is left of their outputs.
        demands: What a node, by its input's index, reads of that input; absent where it reads all.
        stops: Values that are needed whole, or made by a node that a selection cannot pass, and why.
    """

    model: ir.Model
    choosers: list[_Chooser]
    passages: dict[ir.Node, Passage] = field(default_factory=dict)
    narrowed: dict[ir.Value, _Demand] = field(default_factory=dict)
    demands: dict[tuple[ir.Node, int], _Demand] = field(default_factory=dict)
    stops: dict[ir.Value, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for chooser in self.choosers:
            self._demand(chooser.node, 0, chooser.axis, chooser.selection)
        starts = {chooser.node for chooser in self.choosers}
        for node in reversed(self.model.graph):
            if node not in starts:
                self._visit(node)
            elif self._is_selected_from(node.outputs[0]):
                self.stops[node.outputs[0]] = _CHAINED

    def _demand(self, node: ir.Node, index: int, axis: int, selection: Selection) -> None:
        self.demands[node, index] = (axis, selection)
        value = node.inputs[index]
        if value is not None and value.producer() is None:
            self.stops[value] = "a constant" if is_weight(value) else "an input of the graph"

    def _visit(self, node: ir.Node) -> None:
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        wanted = [self._wanted(value) for value in used]
        known = next((want for want in wanted if not isinstance(want, str)), None)
        if known is None and not any(self._is_selected_from(value) for value in used):
            return
        reason = next((want for want in wanted if isinstance(want, str)), None)
        if reason is None and any(want != known for want in wanted):
            reason = f"different positions of what {node.op_type} makes are read"
        passage = inputs_for(node, *known) if reason is None and known is not None else str(reason)
        if isinstance(passage, str):
            self.stops.update(dict.fromkeys(used, passage))
            return
        assert known is not None
        self.passages[node] = passage
        self.narrowed.update(dict.fromkeys(used, known))
        for index, axis in passage.inputs.items():
            self._demand(node, index, axis, known[1])

    def _wanted(self, value: ir.Value) -> _Demand | str:
        """What all readers of `value` read of it; or who reads all of it."""
        if value.is_graph_output():
            return "the graph returns what is selected from"
        found = {}
        for use in value.uses():
            demand = self.demands.get((use.node, use.idx))
            if demand is not None:
                found[demand] = use.node
        for use in value.uses():
            if (use.node, use.idx) not in self.demands and not all(_ignores(use.node, axis) for axis, _ in found):
                return f"{use.node.op_type} reads all positions"
        if not found:
            return f"{next(iter(value.uses())).node.op_type} reads all positions"
        if len(found) > 1:
            return "different positions are read"
        return next(iter(found))

    def _is_selected_from(self, value: ir.Value) -> bool:
        return any((use.node, use.idx) in self.demands for use in value.uses())

    def steps_from(self, chooser: _Chooser) -> Iterator[ir.Node]:
        """The nodes that are narrowed for `chooser`, each once."""
        seen, waiting = set(), [chooser.node.inputs[0]]
        while waiting:
            value = waiting.pop()
            node = value.producer() if value is not None else None
            if node is None or node in seen or node not in self.passages:
                continue
            seen.add(node)
            yield node
            waiting += [node.inputs[index] for index in self.passages[node].inputs]

    def stops_from(self, chooser: _Chooser) -> Iterator[str]:
        """Why it goes no further, once for each value where it ends."""
        steps = list(self.steps_from(chooser))
        values = [chooser.node.inputs[0], *(node.inputs[i] for node in steps for i in self.passages[node].inputs)]
        yield from (self.stops[value] for value in dict.fromkeys(values) if value in self.stops)


def _ignores(node: ir.Node, axis: int) -> bool:
    """Whether `node` reads a shape without the size of that axis."""
    shape = dims(node.inputs[0]) if is_op(node, "Shape") else None
    if shape is None:
        return False
    first, last, _ = slice(attribute(node, "start", 0), attribute(node, "end", None)).indices(len(shape))
    if not first <= axis < last:
        return True
    readers = [use.node for use in node.outputs[0].uses()]
    picked = [constant(reader.inputs[1]) if is_op(reader, "Gather") else None for reader in readers]
    return not node.outputs[0].is_graph_output() and all(
        indices is not None and all(int(i) % (last - first) != axis - first for i in np.ravel(indices))
        for indices in picked
    )


def _worthwhile(model: ir.Model, choosers: list[_Chooser], left: list[Left]) -> _Backwards:
    """The analysis from those selections alone that reach a product; the others are added to `left`."""
    while True:
        found = _Backwards(model, choosers)
        idle = [c for c in choosers if not any(found.passages[node].is_product for node in found.steps_from(c))]
        if not idle:
            return found
        # What stands behind one that goes may get further than that one
        idle = [c for c in idle if _CHAINED not in found.stops_from(c)] or idle
        for chooser in idle:
            why = "; ".join(dict.fromkeys(found.stops_from(chooser)))
            left.append(Left(label(chooser.node), f"no product can be narrowed: {why}"))
        choosers = [c for c in choosers if c not in idle]


# ----------------------------------------------------------------------------------------------------------- writing


def _write(model: ir.Model, found: _Backwards) -> None:
    made: dict[tuple[ir.Value, _Demand], ir.Value] = {}
    for node, passage in found.passages.items():
        for index in passage.inputs:
            value, demand = node.inputs[index], found.demands[node, index]
            assert value is not None
            if value in found.narrowed:
                continue
            if (value, demand) not in made:
                made[value, demand] = _select(model, value, demand)
            node.replace_input_with(index, made[value, demand])
        if passage.edit is not None:
            passage.edit(model)
        for value in node.outputs:
            if value not in found.narrowed:
                value.shape = None  # nothing reads it, and what it says is no longer true
    for value, demand in found.narrowed.items():
        value.shape = _narrow_shape(value, demand)
        value.name = f"{value.name}_narrow"
    for chooser in found.choosers:
        _finish(model, chooser)


def _narrow_shape(value: ir.Value, demand: _Demand) -> ir.Shape | None:
    shape = dims(value)
    if shape is None:
        return None
    axis, selection = demand
    return ir.Shape([*shape[:axis], selection.count, *shape[axis + 1 :]])


def _select(model: ir.Model, value: ir.Value, demand: _Demand) -> ir.Value:
    """The positions of `value`, with their axis kept."""
    (axis, selection), name = demand, f"{value.name}_narrow"
    graph, array = model.graph, constant(value)
    if array is not None:
        places = list(selection.indices) if selection.indices else slice(selection.start, selection.end)
        return add_weight(model, graph, name, array[(slice(None),) * axis + (places,)])

    def numbers(part: str, values: list[int]) -> ir.Value:
        return add_weight(model, graph, f"{name}_{part}", np.asarray(values, np.int64))

    if selection.indices:
        node = make_node(
            "Gather", [value, numbers("positions", [*selection.indices])], [name], attributes={"axis": axis}
        )
    else:
        bounds = [numbers("start", [selection.start]), numbers("end", [selection.end]), numbers("axis", [axis])]
        node = make_node("Slice", [value, *bounds], [name])
    node.outputs[0].shape, node.outputs[0].type = _narrow_shape(value, demand), value.type
    maker = value.producer()
    if maker is not None:
        graph.insert_after(maker, node)
    else:
        graph.insert_before(graph[0], node)
    return node.outputs[0]


def _finish(model: ir.Model, chooser: _Chooser) -> None:
    """Read all that is left: of one position the axis is dropped, of several nothing remains to be done."""
    node = chooser.node
    indices = constant(node.inputs[1]) if node.op_type == "Gather" else None
    if indices is not None and indices.ndim == 0:
        first = add_weight(model, model.graph, f"{node.outputs[0].name}_first", np.zeros((), np.int64))
        node.replace_input_with(1, first)
        return
    whole = node.inputs[0]
    if node.outputs[0].is_graph_output():
        replace_node(node, [make_node("Identity", [whole], [f"{node.outputs[0].name}_all"])])
        return
    assert whole is not None
    node.outputs[0].replace_all_uses_with(whole)
    model.graph.remove(node, safe=True)


def _details(plan: Plan, found: _Backwards) -> dict[str, Any]:
    used = {node for chooser in found.choosers for node in found.steps_from(chooser)}
    stops: Counter[str] = Counter()
    for chooser in found.choosers:
        stops.update(found.stops_from(chooser))
    return {
        "selections_moved": len(plan.actions),
        "nodes_narrowed": len(used),
        "products_narrowed": sum(found.passages[node].is_product for node in used),
        "stopped_by": dict(stops),
    }

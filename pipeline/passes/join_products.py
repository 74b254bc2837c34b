# SPDX-License-Identifier: Apache-2.0
"""`join_products`: quantized products of one input (queries, keys and values; gate and up) as one product and a Split.

Each product of one token with several threads ends with all of them waiting for the last: with fewer products they wait
less. Rows of MatMulNBits' weights are stored one after the other, so that joining is putting arrays behind each other;
every number stays what it is. It comes after `quantize_weights`: then each weight has been rounded, compared and listed
under its own name. A weight's rows keep being known: `details["joined"]` says where they went.

Reference: MatMulNBits in ONNX Runtime's ContribOperators.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .fuse_projections import joined_name
from .graph import (
    MICROSOFT,
    add_tensor,
    add_weight,
    attribute,
    consumers,
    drop_unused_weights,
    is_op,
    is_weight,
    label,
    make_node,
    nodes_of,
    only_consumer,
    replace_value,
)

_SHARED = ("K", "bits", "block_size", "accuracy_level")


@register("join_products")
class JoinProducts(Pass):
    """No settings."""

    may_be_idle = True

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        seen: set[ir.Node] = set()
        for node in nodes_of(model):
            if node in seen or not is_op(node, "MatMulNBits", domain=MICROSOFT):
                continue
            together = _of_one_input(node)
            seen.update(together)
            plan.seen += len(together)
            for reason, group in _by_kind(together):
                if reason or len(group) < 2:
                    plan.left += [Left(label(n), reason or "nothing else like it reads its input") for n in group]
                else:
                    plan.actions.append({"outputs": [n.outputs[0].name for n in group]})
        plan.details = {"products": sum(len(action["outputs"]) for action in plan.actions), "into": len(plan.actions)}
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        by_output = {node.outputs[0].name: node for node in nodes_of(model) if node.outputs}
        latest, joined = _Latest(), dict[str, tuple[str, int]]()
        for action in plan.actions:
            _join(model, [by_output[name] for name in action["outputs"]], latest, joined)
        drop_unused_weights(model)
        plan.details["joined"] = joined
        return model


def _of_one_input(node: ir.Node) -> list[ir.Node]:
    """The products of this one's input, in graph order; this one among them."""
    assert node.inputs[0] is not None
    assert node.graph is not None
    readers = {n for n in consumers(node.inputs[0]) if n.graph is node.graph and n.inputs[0] is node.inputs[0]}
    readers = {n for n in readers if is_op(n, "MatMulNBits", domain=MICROSOFT)}
    return [n for n in node.graph if n in readers] if len(readers) > 1 else [node]


def _by_kind(nodes: Sequence[ir.Node]) -> list[tuple[str, list[ir.Node]]]:
    """Groups that can be joined, and those that cannot with the reason."""
    groups: dict[tuple[Any, ...], list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(_kind(node), []).append(node)
    return [(key[0], group) for key, group in groups.items()]


def _kind(node: ir.Node) -> tuple[Any, ...]:
    """What has to be the same, after the reason why it stays alone (or an empty one)."""
    weights = [v for v in node.inputs[1:] if v is not None]
    if any(v is not None for v in node.inputs[4:]):
        return ("has a bias or an order of its own", node)
    if not all(is_weight(v) and only_consumer(v) is node and v.const_value is not None for v in weights):
        return ("its weight has other readers", node)
    if any(len(v.shape or ()) < 2 for v in weights):
        return ("its scales are flat", node)
    kinds = tuple((v.dtype, *v.const_value.shape.numpy()[1:]) for v in weights if v.const_value is not None)
    return ("", *(attribute(node, name, None) for name in _SHARED), kinds)


class _Latest:
    """The arrays of the product that was asked for last: they are written one after the other, and rounded once."""

    def __init__(self) -> None:
        self.owner: object = None
        self.arrays: list[np.ndarray] = []
        self.lock = threading.Lock()

    def array(self, owner: object, index: int, make: Callable[[], list[np.ndarray]]) -> np.ndarray:
        with self.lock:
            if self.owner is not owner:
                self.owner, self.arrays = None, []
                self.arrays, self.owner = make(), owner
            return self.arrays[index]


def _join(model: ir.Model, nodes: list[ir.Node], latest: _Latest, joined: dict[str, tuple[str, int]]) -> None:
    first, graph = nodes[0], nodes[0].graph
    assert isinstance(graph, ir.Graph)
    name, widths = str(first.outputs[0].name), [int(attribute(node, "N", 0)) for node in nodes]
    columns = [[v for v in values if v is not None] for values in zip(*(n.inputs[1:] for n in nodes), strict=False)]
    inputs = [first.inputs[0], *_stacked(model, graph, columns, latest)]
    for column, value in zip(columns, inputs[1:], strict=True):
        for part, start in zip(column, np.cumsum([0, *widths[:-1]]), strict=True):
            joined[str(part.name)] = str(value.name if value is not None else ""), int(start)
    attributes = {key: attribute(first, key, 0) for key in _SHARED} | {"N": sum(widths)}
    product = make_node("MatMulNBits", inputs, [f"{name}_joined"], domain=MICROSOFT, attributes=attributes)
    product.name = joined_name([str(node.name) for node in nodes])
    sizes = add_weight(model, graph, f"{name}_widths", np.asarray(widths, np.int64))
    names = [f"{node.outputs[0].name}_part" for node in nodes]
    split = make_node("Split", [product.outputs[0], sizes], names, attributes={"axis": -1})
    graph.insert_before(first, [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.shape, part.type = old.shape, old.type
        replace_value(old, part)
        graph.remove(node, safe=True)


def _stacked(model: ir.Model, graph: ir.Graph, columns: list[list[ir.Value]], latest: _Latest) -> list[ir.Value]:
    """Codes, scales and zero points, each one array with the rows of all parts."""
    tensors = [[v.const_value for v in column if v.const_value is not None] for column in columns]
    owner = object()

    def make() -> list[np.ndarray]:
        parts = zip(*tensors, strict=True)  # all arrays of one part together: they come of one rounding
        made = [[tensor.numpy() for tensor in part] for part in parts]
        return [np.concatenate(arrays) for arrays in zip(*made, strict=True)]

    def lazy(index: int) -> ir.LazyTensor:
        like, rows = tensors[index][0], sum(int(t.shape.numpy()[0]) for t in tensors[index])
        shape = ir.Shape([rows, *like.shape.numpy()[1:]])
        return ir.LazyTensor(lambda: ir.Tensor(latest.array(owner, index, make)), dtype=like.dtype, shape=shape)

    names = [joined_name([str(v.name) for v in column]) for column in columns]
    return [add_tensor(model, graph, name, lazy(index)) for index, name in enumerate(names)]

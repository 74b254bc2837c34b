# SPDX-License-Identifier: Apache-2.0
"""Reading and editing steps that every pass over an `onnx_ir` graph needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and of its subgraphs, in order."""
    yield from model.graph.all_nodes()


def label(node: ir.Node) -> str:
    """The name by which a report calls a node: its own, or that of its first output."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op_type))


def is_op(node: ir.Node | None, *types: str, domain: str = "") -> bool:
    return node is not None and node.op_type in types and node.domain in (domain, domain or "ai.onnx")


def producer(value: ir.Value | None, *types: str) -> ir.Node | None:
    """The node that makes `value`, if it is of one of the ONNX types."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *types) else None


def consumers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single reader of `value`; None when there are several or the graph itself returns it."""
    nodes = consumers(value)
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind `value` when it is fixed: an initializer that is no input, or a Constant node's output."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = producer(value, "Constant")
    if node is None:
        return None
    attribute = next(iter(node.attributes.values()), None)
    if attribute is None:
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        return np.asarray(attribute.as_tensor().numpy())
    if attribute.type == ir.AttributeType.SPARSE_TENSOR:
        return None
    floats = attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
    return np.asarray(attribute.value, np.float32 if floats else None)  # value_float is fp32, whatever Python has


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer with data that nobody can override from outside."""
    return value is not None and value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def scalar(value: ir.Value | None) -> float | None:
    if value is not None and value.const_value is not None and value.const_value.size != 1:
        return None  # without reading it
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def dims(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """The shape with symbolic sizes as strings; None when even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def initializers_of(model: ir.Model) -> dict[str, ir.Value]:
    """Every initializer with data, under a key for plans: its name, or `name#2`, ... where a subgraph repeats it."""
    found: dict[str, ir.Value] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            key, count = name, 2
            while key in found:
                key, count = f"{name}#{count}", count + 1
            if value.const_value is not None:
                found[key] = value
    return found


def fresh_name(model: ir.Model, wanted: str, graph: ir.Graph | None = None) -> str:
    """`wanted`, or `wanted_2`, ... if a weight of the main graph, or of `graph`, has that name already.

    Weights are kept by name, so that a second one would push out the first; `run_pass` sees to all other names.
    """
    names, candidate, count = {*model.graph.initializers, *(graph.initializers if graph else ())}, wanted, 2
    while candidate in names:
        candidate, count = f"{wanted}_{count}", count + 1
    return candidate


def add_weight(model: ir.Model, graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` as an initializer of `graph` under `name` (made unique)."""
    return add_tensor(model, graph, name, ir.Tensor(np.asarray(array, order="C")))


def add_tensor(model: ir.Model, graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register `tensor`, which may be computed when it is read, as an initializer under `name` (made unique)."""
    tensor.name = fresh_name(model, name, graph)
    value = ir.Value(
        name=tensor.name,
        const_value=tensor,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
    )
    graph.initializers.add(value)
    return value


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    output_names: Sequence[str],
    *,
    domain: str = "",
    attributes: dict[str, Any] | None = None,
) -> ir.Node:
    node = ir.node(op_type, list(inputs), attributes or {}, domain=domain, num_outputs=len(output_names))
    for value, name in zip(node.outputs, output_names, strict=True):
        value.name = name
    return node


class NewNodes:
    """New nodes, in order, named after what they are for."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(self, op: str, inputs: Sequence[ir.Value | None], part: str, **attributes: Any) -> ir.Value:
        self.nodes.append(make_node(op, inputs, [f"{self.prefix}_{part}"], attributes=attributes))
        return self.nodes[-1].outputs[0]


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, the graph's outputs included, read `new`, which takes over its name if it must."""
    if old.is_graph_output():
        final_name = old.name
        old.name = f"{final_name}_before"
        new.name = final_name
        new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_node(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` where `node` was; the first output of its last node takes over the first output of `node`.

    It takes over the name as well: a value that means the same is called the same, before and after a pass.
    """
    graph, name = node.graph, node.outputs[0].name
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, new)
    result = new[-1].outputs[0]
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    replace_value(node.outputs[0], result)
    graph.remove(node, safe=True)
    result.name = name


def drop_unused_weights(model: ir.Model) -> int:
    """Delete initializers that nothing reads; returns how many. A dead fp32 copy is how files grow after quantizing."""
    dropped = 0
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                dropped += 1
    return dropped

# SPDX-License-Identifier: Apache-2.0
"""Linear layers: several of one input as one product, and Gemm between reshapes as the product that it stands for.

A product that keeps the axes of its input needs no Reshape before and after it. That is as fast for large inputs and
faster for single tokens, most of all when it is quantized; and what reads the graph then sees one form of a layer.
Joining the products of one input (queries, keys and values) brings nothing that could be measured, in fp32, int8 or
int4 (benchmarks/fusion.py), so it is for runtimes and providers where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph import (
    add_tensor,
    add_weight,
    attribute,
    constant,
    consumers,
    dims,
    is_op,
    is_weight,
    make_node,
    only_consumer,
    producer,
    replace_node,
    replace_value,
)


@dataclass(frozen=True)
class FlatGemm:
    """Reshape(Gemm(Reshape(x, [rows, in]), W, b), [batch, length, out])."""

    data: ir.Value
    last: ir.Node


def match_gemm(node: ir.Node) -> FlatGemm | str | None:
    """A Gemm whose rows are the tokens of [batch, length, width]; GPT-2's layers are exported so."""
    if not is_op(node, "Gemm"):
        return None
    flat, split = producer(node.inputs[0], "Reshape"), only_consumer(node.outputs[0])
    data = flat.inputs[0] if flat is not None else None
    if data is None or split is None or not is_op(split, "Reshape"):
        return None
    before, rows, after = dims(data), dims(node.inputs[0]), dims(split.outputs[0])
    weight = dims(node.inputs[1])
    if before is None or rows is None or after is None or weight is None or len(before) != 3 or len(after) != 3:
        return None
    if before[2] != rows[1] or not isinstance(before[2], int) or before[:2] != after[:2] or after[2] != weight[1]:
        return None
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    if not plain or attribute(node, "transA", 0) or attribute(node, "transB", 0):
        return "Gemm with a factor, or a transposed one"
    return FlatGemm(data, split)


def write_gemm(node: ir.Node, match: FlatGemm) -> None:
    name = str(match.last.outputs[0].name)
    new = [make_node("MatMul", [match.data, node.inputs[1]], [f"{name}_product"])]
    new[0].outputs[0].shape, new[0].outputs[0].type = match.last.outputs[0].shape, match.last.outputs[0].type
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(make_node("Add", [new[0].outputs[0], node.inputs[2]], [f"{name}_biased"]))
    replace_node(match.last, new)


@dataclass(frozen=True)
class SharedInput:
    """Products of one input with different weights.

    Attributes:
        nodes: The MatMuls, in graph order.
        biases: For each, the Add behind it; empty when one of them has none.
    """

    nodes: tuple[ir.Node, ...]
    biases: tuple[ir.Node, ...]


def match_shared(node: ir.Node) -> SharedInput | str | None:
    """The products that can be made with this one, if it is the first of several."""
    if not _packable(node):
        return None
    assert node.inputs[0] is not None
    nodes = [n for n in consumers(node.inputs[0]) if n.graph is node.graph and n.inputs[0] is node.inputs[0]]
    nodes = [n for n in dict.fromkeys(nodes) if _packable(n)]
    nodes = _in_graph_order(nodes)
    if len(nodes) < 2 or nodes[0] is not node:
        return None
    if len({n.inputs[1].dtype for n in nodes if n.inputs[1] is not None}) != 1:
        return "their weights have different types"
    adds = [_bias_of(n) for n in nodes]
    biases = tuple(add for add in adds if add is not None)
    return SharedInput(tuple(nodes), biases if len(biases) == len(nodes) else ())


def _packable(node: ir.Node) -> bool:
    """MatMul with a matrix among the weights that nothing else reads."""
    if not is_op(node, "MatMul"):
        return False
    weight = node.inputs[1]
    return weight is not None and is_weight(weight) and len(dims(weight) or ()) == 2 and only_consumer(weight) is node


def _in_graph_order(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    if len(nodes) < 2 or nodes[0].graph is None:
        return list(nodes)
    wanted = set(nodes)
    return [node for node in nodes[0].graph if node in wanted]


def _bias_of(node: ir.Node) -> ir.Node | None:
    add, width = only_consumer(node.outputs[0]), (dims(node.inputs[1]) or (None,))[-1]
    if add is None or not is_op(add, "Add"):
        return None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    array = constant(other)
    return add if array is not None and array.shape == (width,) else None


def write_shared(model: ir.Model, match: SharedInput) -> None:
    """Split(MatMul(x, W) [+ b]), W and b the old ones side by side."""
    first, graph = match.nodes[0], match.nodes[0].graph
    assert isinstance(graph, ir.Graph)
    weights = [n.inputs[1] for n in match.nodes]
    name, widths = str(first.outputs[0].name), [int((dims(w) or (0,))[-1] or 0) for w in weights]
    packed = add_tensor(
        model,
        graph,
        joined_name([str(w.name) for w in weights if w is not None]),
        _side_by_side([w for w in weights if w is not None]),
    )
    new = [make_node("MatMul", [first.inputs[0], packed], [f"{name}_packed"])]
    if match.biases:
        vectors = [constant(_other(add, node)) for add, node in zip(match.biases, match.nodes, strict=True)]
        bias = add_weight(model, graph, f"{name}_bias", np.concatenate([v for v in vectors if v is not None]))
        new.append(make_node("Add", [new[0].outputs[0], bias], [f"{name}_biased"]))
    sizes = add_weight(model, graph, f"{name}_widths", np.asarray(widths, np.int64))
    olds = [node.outputs[0] for node in match.biases or match.nodes]
    names = [f"{old.name}_part" for old in olds]
    new.append(make_node("Split", [new[-1].outputs[0], sizes], names, attributes={"axis": -1}))
    graph.insert_before(first, new)
    for old, part in zip(olds, new[-1].outputs, strict=True):
        part.shape, part.type = old.shape, old.type
        replace_value(old, part)


def _other(add: ir.Node, node: ir.Node) -> ir.Value | None:
    return add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]


def joined_name(names: Sequence[str]) -> str:
    """`layers.0.self_attn.q_proj+k_proj+v_proj.weight.T`: the parts that differ, joined."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) != 1:
        return "+".join(".".join(p) for p in parts)
    return ".".join("+".join(dict.fromkeys(column)) for column in zip(*parts, strict=True))


def _side_by_side(weights: Sequence[ir.Value]) -> ir.TensorProtocol:
    """The weights joined along their last axis, when somebody reads them."""
    tensors = [w.const_value for w in weights if w.const_value is not None]
    rows = int(tensors[0].shape.numpy()[0])
    columns = sum(int(t.shape.numpy()[1]) for t in tensors)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([t.numpy() for t in tensors], axis=1))

    return ir.LazyTensor(evaluate, dtype=tensors[0].dtype, shape=ir.Shape([rows, columns]))

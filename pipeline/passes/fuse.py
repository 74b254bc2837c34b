# SPDX-License-Identifier: Apache-2.0
"""`fuse`: bring the graph into the shape that ONNX Runtime's CPU provider has its best kernels for.

Each rule is here because it was measured on BERT-base (benchmarks/bert_base.py), and does what the runtime's own
fusions at load time do not do, or do wrong:

attention       MatMul, scale, mask, Softmax, MatMul and the transposes around them, or the standard `Attention` of
                opset 23, become com.microsoft's MultiHeadAttention. ONNX Runtime's and onnxscript's fusers recognize
                neither form of the graphs that torch.export makes.
residual_sum    `LayerNormalization(Add(x, y))` becomes `LayerNormalization(Sum(x, y))`. The runtime would fuse the Add
                form into SkipLayerNormalization, whose CPU kernel takes four times as long as the two kernels that it
                replaces (7.6 ms against 1.8 ms over BERT-base at 1 x 128). `Sum` of two is the same standard operator
                and is left alone.
unpack_attention com.microsoft's `Attention`, which holds the query, key and value weights itself, becomes MatMul, Split
                and MultiHeadAttention, so that quantizers see the weights.

References: MultiHeadAttention and Attention in ONNX Runtime's ContribOperators.md; Attention-23 in ONNX's Operators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .attention import AttentionMatch, match_opset23, match_softmax
from .base import Left, Pass, Plan, register
from .graph import (
    add_weight,
    attribute,
    constant,
    dims,
    drop_unused_weights,
    is_op,
    label,
    make_node,
    nodes_of,
    producer,
    replace_value,
)

MICROSOFT = "com.microsoft"


@register("fuse")
class Fuse(Pass):
    """Settings: one switch a rule.

    Attributes:
        attention: Fuse attention into MultiHeadAttention.
        residual_sum: Keep residual additions out of the runtime's slower SkipLayerNormalization.
        unpack_attention: Take the weights out of com.microsoft's Attention.
    """

    may_be_idle = True

    attention: bool = True
    residual_sum: bool = True
    unpack_attention: bool = True

    def plan(self, model: ir.Model) -> Plan:
        plan = Plan()
        for node in nodes_of(model):
            for rule, wanted, matches in (
                ("attention", self.attention, _match_attention),
                ("residual_sum", self.residual_sum, _match_residual),
                ("unpack_attention", self.unpack_attention, _match_packed),
            ):
                found = matches(node) if wanted else None
                if found is None:
                    continue
                plan.seen += 1
                if isinstance(found, str):
                    plan.left.append(Left(label(node), found))
                else:
                    plan.actions.append({"rule": rule, "output": node.outputs[0].name})
        for action in plan.actions:
            plan.details[action["rule"]] = plan.details.get(action["rule"], 0) + 1
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        rules = {(a["rule"], a["output"]) for a in plan.actions}
        masks = _Masks(model)
        for node in list(nodes_of(model)):
            name = node.outputs[0].name if node.outputs else None
            if ("attention", name) in rules:
                match = _match_attention(node)
                if isinstance(match, AttentionMatch):
                    _write_attention(model, match, masks)
            elif ("residual_sum", name) in rules:
                _write_sum(node)
            elif ("unpack_attention", name) in rules:
                _write_unpacked(model, node)
        RemoveUnusedNodesPass()(model)
        drop_unused_weights(model)
        return model


def _match_attention(node: ir.Node) -> AttentionMatch | str | None:
    """The attention that `node` (a Softmax or an opset 23 Attention) belongs to, or why it cannot be fused."""
    if is_op(node, "Softmax"):
        return match_softmax(node)
    if is_op(node, "Attention"):
        return match_opset23(node)
    return None


class _Masks:
    """Score biases in the form that MultiHeadAttention reads, each made once for all layers that share it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.made: dict[tuple[object, ...], ir.Value] = {}

    def bias_for(self, match: AttentionMatch) -> ir.Value | None:
        """The mask as additive bias [batch or 1, heads or 1, query length, key length]."""
        if match.mask is None:
            return None
        query_length = (dims(match.query) or (None, None))[1]
        # Layers share a bias when their query lengths are the same symbol; an unknown length shares nothing
        key = (match.mask, match.last.graph, query_length if query_length is not None else match.query)
        if key not in self.made:
            self.made[key] = self._make(match)
        return self.made[key]

    def _make(self, match: AttentionMatch) -> ir.Value:
        mask, graph, name = match.mask, match.last.graph, f"{match.mask.name}_bias" if match.mask else "bias"
        assert mask is not None
        assert isinstance(graph, ir.Graph)
        nodes: list[ir.Node] = []
        dtype = match.query.dtype
        assert dtype is not None
        least = np.asarray(np.finfo(dtype.numpy()).min, dtype.numpy())
        lowest = add_weight(self.model, self.model.graph, f"{name}_lowest", least)
        if match.mask_is_boolean:
            zero = add_weight(self.model, self.model.graph, f"{name}_zero", np.zeros_like(least))
            nodes.append(make_node("Where", [mask, zero, lowest], [f"{name}_where"]))
        else:
            # -inf over a whole row makes the runtime's softmax NaN; the lowest finite number masks just as well
            nodes.append(make_node("Max", [mask, lowest], [f"{name}_finite"]))
        if not match.mask_has_all_rows:
            nodes += self._repeat_rows(match, nodes[-1].outputs[0], name)
        graph.insert_before(match.first, nodes)
        return nodes[-1].outputs[0]

    def _repeat_rows(self, match: AttentionMatch, bias: ir.Value, name: str) -> list[ir.Node]:
        """[b, h, 1 or queries, keys] -> [b, h, queries, keys]: the kernel does not broadcast the third axis."""
        one = add_weight(self.model, self.model.graph, f"{name}_one", np.ones(1, np.int64))
        length = make_node("Shape", [match.query], [f"{name}_length"], attributes={"start": 1, "end": 2})
        shape = make_node("Concat", [one, one, length.outputs[0], one], [f"{name}_shape"], attributes={"axis": 0})
        return [length, shape, make_node("Expand", [bias, shape.outputs[0]], [f"{name}_rows"])]


def _write_attention(model: ir.Model, match: AttentionMatch, masks: _Masks) -> None:
    graph = match.last.graph
    assert isinstance(graph, ir.Graph)
    old = match.output
    node = make_node(
        "MultiHeadAttention",
        [match.query, match.key, match.value, None, None, masks.bias_for(match)],
        [f"{old.name}_attention"],
        domain=MICROSOFT,
        attributes={"num_heads": match.heads, "scale": match.scale},
    )
    node.outputs[0].shape, node.outputs[0].type = old.shape, old.type
    graph.insert_before(match.last, node)
    replace_value(old, node.outputs[0])
    model.opset_imports[MICROSOFT] = 1


def _match_residual(node: ir.Node) -> ir.Node | str | None:
    """The Add in front of a LayerNormalization that normalizes the last axis, with nothing broadcast."""
    if not is_op(node, "LayerNormalization") or not _over_last_axis(node):
        return None  # the runtime's SkipLayerNormalization knows no other axis
    add = producer(node.inputs[0], "Add")
    if add is None:
        return None
    if any(constant(value) is not None for value in add.inputs):
        return "adds a constant, not a residual"
    return add


def _over_last_axis(node: ir.Node) -> bool:
    axis, shape = attribute(node, "axis", -1), dims(node.inputs[0])
    return bool(axis == -1 or (shape is not None and axis == len(shape) - 1))


def _write_sum(node: ir.Node) -> None:
    add = producer(node.inputs[0], "Add")
    if add is None:
        return
    graph = add.graph
    assert isinstance(graph, ir.Graph)
    total = make_node("Sum", list(add.inputs), [f"{add.outputs[0].name}_sum"])
    total.outputs[0].shape, total.outputs[0].type = add.outputs[0].shape, add.outputs[0].type
    graph.insert_before(add, total)
    replace_value(add.outputs[0], total.outputs[0])
    graph.remove(add, safe=True)


@dataclass(frozen=True)
class _Packed:
    """com.microsoft's Attention with its weight [hidden, 3 x hidden] as a constant."""

    node: ir.Node
    width: int


def _match_packed(node: ir.Node) -> _Packed | str | None:
    if not is_op(node, "Attention", domain=MICROSOFT):
        return None
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    shape = dims(inputs[1])
    sizes = attribute(node, "qkv_hidden_sizes", [])
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int):
        return "the weight's shape is not known"
    if inputs[4] is not None or inputs[6] is not None or len(node.outputs) > 1:
        return "keeps a cache of past keys"
    if sizes and len(set(sizes)) != 1:
        return "query, key and value have different widths"
    if attribute(node, "do_rotary", 0) or attribute(node, "unidirectional", 0):
        return "rotary or causal attention"
    mask = dims(inputs[3])
    if inputs[3] is not None and (mask is None or len(mask) != 2):
        return "its mask is not [batch, sequence]"
    return _Packed(node, shape[1] // 3)


def _write_unpacked(model: ir.Model, node: ir.Node) -> None:
    match, graph = _match_packed(node), node.graph
    assert isinstance(match, _Packed)
    assert isinstance(graph, ir.Graph)
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    name = str(node.outputs[0].name)
    projected = make_node("MatMul", [inputs[0], inputs[1]], [f"{name}_qkv"])
    new, packed = [projected], projected.outputs[0]
    if inputs[2] is not None:
        new.append(make_node("Add", [packed, inputs[2]], [f"{name}_qkv_bias"]))
        packed = new[-1].outputs[0]
    sizes = add_weight(model, graph, f"{name}_split", np.full(3, match.width, np.int64))
    new.append(make_node("Split", [packed, sizes], [f"{name}_{part}" for part in "qkv"], attributes={"axis": -1}))
    query, key, value = new[-1].outputs
    heads = int(attribute(node, "num_heads", 1))
    attributes: dict[str, int | float] = {"num_heads": heads}
    copied: tuple[tuple[str, Callable[[float], float]], ...] = (("scale", float), ("mask_filter_value", float))
    for key_name, convert in copied:
        if key_name in node.attributes:
            attributes[key_name] = convert(attribute(node, key_name, 0.0))
    new.append(
        make_node(
            "MultiHeadAttention",
            [query, key, value, None, inputs[3], inputs[5]],
            [f"{name}_attention"],
            domain=MICROSOFT,
            attributes=attributes,
        )
    )
    graph.insert_before(node, new)
    result = new[-1].outputs[0]
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    replace_value(node.outputs[0], result)
    graph.remove(node, safe=True)

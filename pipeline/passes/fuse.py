# SPDX-License-Identifier: Apache-2.0
"""`fuse`: bring the graph into the shape that ONNX Runtime's CPU provider has its best kernels for.

Each rule is here because it was measured on BERT-base (benchmarks/bert_base.py), and does what the runtime's own
fusions at load time do not do, or do wrong:

attention       MatMul, scale, mask, Softmax, MatMul and the transposes around them, or the standard `Attention` of
                opset 23, become com.microsoft's MultiHeadAttention. Of the graphs that torch.export makes, ONNX
                Runtime's own fuser recognizes no attention, and onnxscript's none of opset 23.
residual_sum    `LayerNormalization(Add(x, y))` becomes `LayerNormalization(Sum(x, y))`. The runtime would fuse the Add
                form into SkipLayerNormalization, whose CPU kernel is several times slower than the two kernels that it
                replaces: 24 of them on [1, 128, 768] take 6.6 ms against 1.9 (benchmarks/residual_norm.py). `Sum` of
                two is the same function, also standard, and is left alone.
unpack          com.microsoft's `Attention` and `EmbedLayerNormalization`, which hold weights themselves, become MatMul
                and Gather beside what is left of them, so that quantizers see the weights; `SkipLayerNormalization`
                becomes Sum and LayerNormalization, for the reason above. See `contrib`.

References: MultiHeadAttention and Attention in ONNX Runtime's ContribOperators.md; Attention-23 in ONNX's Operators.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..statistics import Calibration
from . import contrib
from .attention import AttentionMatch, match_opset23, match_softmax
from .base import Left, Pass, Plan, register
from .graph import (
    MICROSOFT,
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
    replace_node,
    replace_value,
)


@register("fuse")
class Fuse(Pass):
    """Settings: one switch a rule.

    Attributes:
        attention: Fuse attention into MultiHeadAttention.
        residual_sum: Keep residual additions out of the runtime's slower SkipLayerNormalization.
        unpack: Take com.microsoft's operators that hold weights, and its SkipLayerNormalization, apart.
    """

    may_be_idle = True

    attention: bool = True
    residual_sum: bool = True
    unpack: bool = True

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        opset = model.opset_imports.get("", 0)
        for node in nodes_of(model):
            for rule, found in self._matches(node):
                if found is None:
                    continue
                plan.seen += 1
                if rule in _NEED_OPSET_17 and opset < 17:
                    found = f"LayerNormalization needs opset 17, the graph has {opset}"
                if isinstance(found, str):
                    plan.left.append(Left(label(node), found))
                else:
                    plan.actions.append({"rule": rule, "output": node.outputs[0].name})
        for action in plan.actions:
            plan.details[action["rule"]] = plan.details.get(action["rule"], 0) + 1
        return plan

    def _matches(self, node: ir.Node) -> Iterator[tuple[str, object]]:
        """Each rule that is on, with what it makes of the node: a match, the reason why not, or None."""
        if self.attention:
            yield "attention", _match_attention(node)
        if self.residual_sum:
            yield "residual_sum", _match_residual(node)
        if self.unpack:
            yield "unpack_attention", contrib.match_attention(node)
            yield "unpack_embedding", contrib.match_embedding(node)
            yield "split_skip_norm", contrib.match_skip_norm(node)

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        rules = {a["output"]: a["rule"] for a in plan.actions}
        masks = _Masks(model)
        for node in list(nodes_of(model)):
            rule = rules.get(node.outputs[0].name) if node.outputs else None
            if rule == "attention":
                match = _match_attention(node)
                if isinstance(match, AttentionMatch):
                    _write_attention(model, match, masks)
            elif rule == "residual_sum":
                _write_sum(node)
            elif rule is not None:
                _UNPACK[rule](model, node)
        RemoveUnusedNodesPass()(model)
        drop_unused_weights(model)
        return model


_UNPACK = {
    "unpack_attention": contrib.write_attention,
    "unpack_embedding": contrib.write_embedding,
    "split_skip_norm": contrib.write_skip_norm,
}
_NEED_OPSET_17 = ("unpack_embedding", "split_skip_norm")


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
        sizes = make_node("Shape", [match.query], [f"{name}_sizes"])
        length = make_node("Gather", [sizes.outputs[0], one], [f"{name}_length"], attributes={"axis": 0})
        shape = make_node("Concat", [one, one, length.outputs[0], one], [f"{name}_shape"], attributes={"axis": 0})
        return [sizes, length, shape, make_node("Expand", [bias, shape.outputs[0]], [f"{name}_rows"])]


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
    replace_node(add, [make_node("Sum", list(add.inputs), [f"{add.outputs[0].name}_sum"])])

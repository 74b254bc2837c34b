# SPDX-License-Identifier: Apache-2.0
"""`fuse`: bring the graph into the shape that ONNX Runtime's CPU provider has its best kernels for.

Each rule that is on was measured faster (benchmarks/fusion.py, benchmarks/bert_base.py), and does what the runtime's
own fusions at load time do not do, or do wrong; they run in this order:

unpack          com.microsoft's `Attention` and `EmbedLayerNormalization`, which hold weights themselves, become MatMul
                and Gather beside what is left of them, so that quantizers see the weights; `SkipLayerNormalization`
                becomes Sum and LayerNormalization, for the reason below. See `contrib`.
masks           Attention masks without steps that change nothing: 3 to 13 % of a small decoder's time a token. See
                `fuse_masks`.
norms           Root mean square normalization in the form that the runtime has a kernel for, and LayerNormalization of
                what is written out in primitives. See `fuse_norms`.
rotary          Rotary position embedding as com.microsoft's RotaryEmbedding, on queries and keys as the projections
                leave them. See `fuse_rotary`.
grouped_heads   Products with keys and values that query heads share, without the copies. See `grouped_heads`.
attention       MatMul, scale, mask, Softmax, MatMul and the transposes around them, or the standard `Attention` of
                opset 23, become com.microsoft's MultiHeadAttention, with its cache where there is one. Of the graphs
                that torch.export makes, ONNX Runtime's own fuser recognizes no attention, and onnxscript's none of
                opset 23. See `attention`.
residual_sum    `LayerNormalization(Add(x, y))` becomes `LayerNormalization(Sum(x, y))`. The runtime would fuse the Add
                form into SkipLayerNormalization, whose CPU kernel is several times slower than the two kernels that it
                replaces: 24 of them on [1, 128, 768] take 6.6 ms against 1.9 (benchmarks/residual_norm.py). `Sum` of
                two is the same function, also standard, and is left alone.

gemm            Gemm between reshapes becomes MatMul and Add: as fast in fp32, and 4 to 10 % faster for few tokens when
                it is quantized. GPT-2's layers are exported so. See `fuse_projections`.

Off:

grouped_query   Attention with a cache becomes com.microsoft's GroupQueryAttention, which appends to the cache in place;
                it changes what callers may do, see `grouped_query`.
packed          Products of one input become one product and a Split: no faster, in fp32, int8 or int4, since
                `quantize_dynamic` quantizes a shared input once anyway; and weights that are joined are no longer the
                parameters that PyTorch knows, so that pruning cannot replay its plan there. See `fuse_projections`.

There is no rule for the GELU family: the runtime makes Gelu, BiasGelu, FastGelu and QuickGelu of all that torch writes.

References: MultiHeadAttention and Attention in ONNX Runtime's ContribOperators.md; Attention-23 in ONNX's Operators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..statistics import Calibration
from . import contrib
from .attention import AttentionMatch, match_opset23, match_softmax
from .attention_nodes import Biases, write_attention
from .base import Left, Pass, Plan, register
from .fuse_masks import match_mask, write_mask
from .fuse_norms import match_layer_norm, match_rms_norm, write_layer_norm, write_rms_norm
from .fuse_projections import match_gemm, match_shared, write_gemm, write_shared
from .fuse_rotary import Tables, match_rotary, write_rotary
from .graph import (
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
)
from .grouped_heads import match_grouped, write_grouped
from .grouped_query import confirm_causal, match_cached, refuse_lengths_of_caches, write_cached


@register("fuse")
class Fuse(Pass):
    """Settings: one switch a rule.

    Attributes:
        unpack: Take com.microsoft's operators that hold weights, and its SkipLayerNormalization, apart.
        masks: Shorten what computes attention masks.
        norms: Write normalizations in the form that the runtime has kernels for.
        rotary: Fuse rotary position embedding.
        grouped_heads: Multiply with shared keys and values without copying them.
        attention: Fuse attention into MultiHeadAttention.
        residual_sum: Keep residual additions out of the runtime's slower SkipLayerNormalization.
        grouped_query: Fuse attention with a cache into GroupQueryAttention, for caches that are updated in place.
        gemm: Write Gemm between reshapes as MatMul and Add.
        packed: Join products of one input.
    """

    may_be_idle = True

    unpack: bool = True
    masks: bool = True
    norms: bool = True
    rotary: bool = True
    grouped_heads: bool = True
    attention: bool = True
    residual_sum: bool = True
    gemm: bool = True
    grouped_query: bool = False
    packed: bool = False

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        # A rule works on what the rules before it leave, so the plan is made on a copy (which shares the tensors)
        plan = Plan()
        trial = model.clone()
        for rule in self._rules():
            for node, found in _matches(trial, rule):
                plan.seen += 1
                if isinstance(found, str):
                    plan.left.append(Left(label(node), found))
                else:
                    plan.actions.append({"rule": rule.name, "output": node.outputs[0].name})
        for action in plan.actions:
            plan.details[action["rule"]] = plan.details.get(action["rule"], 0) + 1
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        wanted = {(a["rule"], a["output"]) for a in plan.actions}
        for rule in self._rules():
            for _ in _matches(model, rule, wanted):
                pass
        # A cache that the operator puts in front of the fresh keys is there later than the Concat that did it before
        model.graph.sort()
        if self.grouped_query:
            refuse_lengths_of_caches(model)
        drop_unused_weights(model)
        return model

    def _rules(self) -> Iterator[_Rule]:
        """The rules that are on, in order."""
        return (rule for rule in _RULES if getattr(self, rule.setting))


@dataclass(frozen=True)
class _Rule:
    """One rewrite.

    Attributes:
        name: As the report counts it.
        setting: The switch that it belongs to.
        match: What the rule makes of a node: a match, the reason why it stays, or None where it is not about that node.
        write: Carries a match out; `state` is one dict a run, for what several matches share.
        confirm: What is left to find out about a match, with the same `state`: gives it back, or the reason.
        requires: An operator that it writes, and the operator set that has it.
    """

    name: str
    setting: str
    match: Callable[[ir.Node], Any]
    write: Callable[[ir.Model, ir.Node, Any, dict[str, Any]], None]
    confirm: Callable[[Any, dict[str, Any]], Any] | None = None
    requires: tuple[str, int] = ("", 0)


def _matches(
    model: ir.Model, rule: _Rule, wanted: set[tuple[str, str | None]] | None = None
) -> Iterator[tuple[ir.Node, Any]]:
    """Carry a rule out wherever it matches (and, if given, is `wanted`), telling of each node that it is about."""
    state: dict[str, Any] = {}
    wrote = False
    opset = model.opset_imports.get("", 0)
    for node in list(nodes_of(model)):
        if not node.outputs or (wanted is not None and (rule.name, node.outputs[0].name) not in wanted):
            continue
        found = rule.match(node) if node.graph is not None else None
        if found is None:
            continue
        if rule.confirm is not None and not isinstance(found, str):
            found = rule.confirm(found, state)
        if opset < rule.requires[1]:
            found = f"{rule.requires[0]} needs opset {rule.requires[1]}, the graph has {opset}"
        yield node, found
        if not isinstance(found, str):
            rule.write(model, node, found, state)
            wrote = True
    if wrote:  # else the next rule would count what nothing needs any more among the readers of a value
        RemoveUnusedNodesPass()(model)


def _match_attention(node: ir.Node) -> AttentionMatch | str | None:
    """The attention that `node` (a Softmax or an opset 23 Attention) belongs to, or why it cannot be fused."""
    if is_op(node, "Softmax"):
        return match_softmax(node)
    if is_op(node, "Attention"):
        return match_opset23(node)
    return None


def _write_attention(model: ir.Model, node: ir.Node, match: AttentionMatch, state: dict[str, Any]) -> None:
    write_attention(model, match, state.setdefault("biases", Biases(model)))


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


def _write_sum(add: ir.Node) -> None:
    replace_node(add, [make_node("Sum", list(add.inputs), [f"{add.outputs[0].name}_sum"])])


_LAYER_NORM = ("LayerNormalization", 17)

# Of the arguments, model, node, match and state, a rule takes those that it needs
_RULES = (
    _Rule("unpack_attention", "unpack", contrib.match_attention, lambda m, n, f, s: contrib.write_attention(m, n)),
    _Rule(
        "unpack_embedding", "unpack", contrib.match_embedding,
        lambda m, n, f, s: contrib.write_embedding(m, n), requires=_LAYER_NORM,
    ),
    _Rule(
        "split_skip_norm", "unpack", contrib.match_skip_norm,
        lambda m, n, f, s: contrib.write_skip_norm(m, n), requires=_LAYER_NORM,
    ),
    _Rule("mask", "masks", match_mask, lambda m, n, f, s: write_mask(m, n, f), requires=("Unsqueeze with axes", 13)),
    _Rule("rms_norm", "norms", match_rms_norm, lambda m, n, f, s: write_rms_norm(m, n, f)),
    _Rule("layer_norm", "norms", match_layer_norm, lambda m, n, f, s: write_layer_norm(m, n, f), requires=_LAYER_NORM),
    _Rule(
        "rotary", "rotary", match_rotary,
        lambda m, n, f, s: write_rotary(m, f, s.setdefault("tables", Tables(m))), requires=("Shape of a part", 15),
    ),
    _Rule(
        "grouped_query", "grouped_query", match_cached,
        lambda m, n, f, s: write_cached(m, f, s), confirm_causal, ("Shape of a part", 15),
    ),
    _Rule("grouped_heads", "grouped_heads", match_grouped, lambda m, n, f, s: write_grouped(m, n, f)),
    _Rule("gemm", "gemm", match_gemm, lambda m, n, f, s: write_gemm(n, f)),
    _Rule("attention", "attention", _match_attention, _write_attention),
    _Rule("residual_sum", "residual_sum", _match_residual, lambda m, n, f, s: _write_sum(f)),
    _Rule("packed", "packed", match_shared, lambda m, n, f, s: write_shared(m, f)),
)  # fmt: skip

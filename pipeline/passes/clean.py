# SPDX-License-Identifier: Apache-2.0
"""`clean`: the same function in fewer nodes, with parameter names kept and nothing of the build machine inside.

Folding, common subexpressions, dead code and inlining are onnxscript's and onnx-ir's passes. Our own are the steps that
they get wrong for this purpose: stale shapes are thrown away and inferred anew (torch leaves shapes of weights that its
optimizer transposed later, on which ONNX Runtime's quantizer then fails), and a transposed weight keeps the name of its
parameter with `.T` behind it, so that a plan on the graph can be replayed on the PyTorch module.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    InlinePass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
    TopologicalSortPass,
)

from ...exporters.graph_file import weight_bytes
from ...exporters.streamed_tensor import streamed
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import attribute, consumers, drop_unused_weights, fresh_name, is_op, is_weight, nodes_of
from .near_neutral import with_exact_constants
from .sequence_types import correct_sequence_types


@register("clean")
class Clean(Pass):
    """Settings: none yet. What it did is counted by comparing the graph before and after."""

    may_be_idle = True

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        # Folding is a fixed point of many small rules: its plan would be its result. The plan names the method alone,
        # and `apply` fills in what happened.
        return Plan(seen=len(model.graph))

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        nodes, weights = sum(1 for _ in nodes_of(model)), weight_bytes(model)
        model = _attempt(InlinePass(), model, plan)
        RemoveInitializersFromInputsPass()(model)
        _forget_origin(model)
        stale = _infer_shapes_anew(model)
        aliases = _merge_equal_weights(model)
        _remove_identities(model)
        model = _attempt(CommonSubexpressionEliminationPass(), model, plan)
        folded = _fold_transposed_weights(model)
        model = _attempt(_fold_constants, model, plan)
        _remove_identities(model)
        model = _attempt(CommonSubexpressionEliminationPass(), model, plan)
        RemoveUnusedNodesPass()(model)
        drop_unused_weights(model)
        aliases |= _merge_equal_weights(model)
        for finish in (RemoveUnusedOpsetsPass(), TopologicalSortPass(), NameFixPass()):
            finish(model)
        _forget_origin(model)
        plan.details = {
            "nodes_removed": nodes - sum(1 for _ in nodes_of(model)),
            "transposes_folded_into_weights": folded,
            "equal_weights_merged": len(aliases),
            "stale_shapes_dropped": stale,
            "weight_bytes_saved": weights - weight_bytes(model),
        }
        plan.actions = [{"kind": kind, "count": count} for kind, count in plan.details.items() if count]
        plan.details["merged_into"] = aliases
        return model


def _fold_constants(model: ir.Model) -> None:
    def shared_transpose(node: ir.Node) -> bool | None:
        """No to the Transpose of a weight that others read as it is: folded, the file would hold it twice."""
        weight = node.inputs[0] if is_op(node, "Transpose") else None
        return False if weight is not None and is_weight(weight) and len(consumers(weight)) > 1 else None

    def fold(model: ir.Model) -> None:
        onnxscript.optimizer.optimize_ir(model, num_iterations=4, should_fold=shared_transpose)

    with_exact_constants(model, fold)


_PATH = re.compile(r"(?:^|[\s\"'=:(\[,])(?:/[\w.@+-]+){2,}|[A-Za-z]:\\|\\\\\w")
"""An absolute path somewhere in a text, as Unix or Windows writes it."""


def _forget_origin(model: ir.Model) -> None:
    """Take out what tells of the machine and the code that made the graph.

    Torch puts stack traces with local paths there. The model's own entries (class names, strides) are what a consumer
    reads through its runtime, so of these only the ones with a path in them go.
    """
    ClearMetadataAndDocStringPass()(model)
    # The pass above leaves graphs without nodes, and everything that is neither graph nor node
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            _forget_value(value)
    for node in nodes_of(model):
        for value in node.outputs:
            _forget_value(value)
        for name, attr in list(node.attributes.items()):
            attr.doc_string = None
            if attr.type == ir.AttributeType.TENSOR and attr.value is not None:
                node.attributes[name] = ir.AttrTensor(name, _without_notes(attr.as_tensor()))
    model.producer_name, model.producer_version, model.doc_string = "onnxpress", None, None
    for key, text in list(model.metadata_props.items()):
        if _PATH.search(key) or _PATH.search(text):
            del model.metadata_props[key]


def _forget_value(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()
    if value.const_value is not None:
        value.const_value = _without_notes(value.const_value)


def _without_notes(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not tensor.doc_string and not tensor.metadata_props:
        return tensor
    if isinstance(tensor, ir.serde.TensorProtoTensor):  # written as it was read, notes and all
        if tensor.dtype == ir.DataType.STRING:
            return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape), name=tensor.name)
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    tensor.doc_string = None
    tensor.metadata_props.clear()
    return tensor


def _attempt(step: Callable[[ir.Model], object], model: ir.Model, plan: Plan) -> ir.Model:
    """Run a library step on a copy of the graph (tensors are shared), and keep the original if the step breaks.

    The step is then reported as left out, with its reason.
    """
    name = getattr(step, "__name__", type(step).__name__).strip("_")
    copy = model.clone()
    try:
        step(copy)
    except Exception as error:  # noqa: BLE001 - whatever it is, the graph before it is still good
        plan.left.append(Left(name, f"{type(error).__name__}: {error}"[:200]))
        return model
    return copy


def _remove_identities(model: ir.Model) -> None:
    """Let readers of an Identity read its input, except where it gives a graph its output.

    onnx-ir 1.1.0's own pass raises on, or breaks, an If with a branch that returns a value from outside (silero-vad).
    """
    for node in list(nodes_of(model)):
        if not is_op(node, "Identity") or node.inputs[0] is None:
            continue
        source, result, graph = node.inputs[0], node.outputs[0], node.graph
        assert isinstance(graph, ir.Graph)
        if result.is_graph_output():
            maker = source.producer()
            if maker is None or maker.graph is not graph or source.is_graph_output():
                continue  # a graph may not return what it does not make, nor the same value twice
            name, result.name = result.name, f"{result.name}_identity"
            source.name, source.shape, source.type = name, result.shape, result.type
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _infer_shapes_anew(model: ir.Model) -> int:
    """Let ONNX infer every shape from the graph as it is, and keep a declared one only where the two agree.

    Declared shapes are worth keeping, since torch names sizes (`sequence`) that ONNX can only number; but a stale one
    is an error that other tools trip over. Returns how many were stale.
    """
    declared: dict[ir.Value, ir.Shape] = {}
    for node in nodes_of(model):
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                declared[value] = value.shape
                value.shape = None
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    correct_sequence_types(model)
    stale = 0
    for value, shape in declared.items():
        if value.shape is None or _agree(shape, value.shape):
            merged = [
                new if isinstance(new, int) else old for old, new in zip(shape, value.shape or shape, strict=True)
            ]
            value.shape = ir.Shape(merged)
        else:
            stale += 1
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(value.const_value.shape.numpy())
    return stale


def _agree(one: ir.Shape, other: ir.Shape) -> bool:
    return len(one) == len(other) and all(
        a == b for a, b in zip(one, other, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def _fold_transposed_weights(model: ir.Model) -> int:
    """Transpose(W) -> W.T, where nothing else reads W.

    A weight that has other readers (the embedding that a masked-LM head reads transposed) stays one tensor with a
    Transpose: the file then holds it once, and the runtime folds it when it loads.
    """
    folded = 0
    for node in list(nodes_of(model)):
        if not is_op(node, "Transpose") or not is_weight(node.inputs[0]) or node.outputs[0].is_graph_output():
            continue
        weight, graph = node.inputs[0], node.graph
        assert isinstance(graph, ir.Graph)
        assert weight is not None
        assert weight.const_value is not None
        rank = len(weight.const_value.shape)
        permutation = list(attribute(node, "perm", range(rank)[::-1]))
        if permutation != list(range(rank))[::-1] or len(consumers(weight)) != 1 or weight.is_graph_output():
            continue
        home = weight.graph
        if not isinstance(home, ir.Graph):
            continue
        name = fresh_name(model, f"{weight.name}.T")
        tensor = _transposed(weight.const_value, name)
        new = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        home.initializers.add(new)
        node.outputs[0].replace_all_uses_with(new)
        graph.remove(node, safe=True)
        del home.initializers[str(weight.name)]
        folded += 1
    return folded


def _transposed(tensor: Any, name: str) -> ir.LazyTensor:
    """Transposed when it is read, so that the fp32 weights of a large model are not held twice."""
    in_file = streamed(tensor)
    if in_file is not None:
        return in_file.transposed(name)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=name)

    return ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(tuple(tensor.shape)[::-1]), name=name)


def _merge_equal_weights(model: ir.Model) -> dict[str, str]:
    """Keep the first of weights with equal type, shape and bytes; returns the name that went -> that which stayed."""
    aliases: dict[str, str] = {}
    alike: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_output() or value.is_graph_input():
            continue
        alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for values in alike.values():
        for group in _alike_at_a_glance(values):
            first: dict[bytes, ir.Value] = {}
            for value in group:
                kept = first.setdefault(_digest(value.const_value), value)
                if kept is not value:
                    value.replace_all_uses_with(kept)
                    del model.graph.initializers[str(value.name)]
                    aliases[str(value.name)] = str(kept.name)
    return aliases


def _alike_at_a_glance(values: list[ir.Value]) -> list[list[ir.Value]]:
    """Groups of two and more that may be equal: weights in files are told apart by samples, without reading them."""
    groups: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in values if len(values) > 1 else ():
        in_file = streamed(value.const_value)
        key = () if in_file is None else (in_file.sample(), in_file.turned, in_file.place.dtype)
        groups.setdefault(key, []).append(value)
    if len(groups) > 1 and () in groups:
        return [values]  # some are in memory, some not
    return [group for group in groups.values() if len(group) > 1]


def _digest(tensor: Any) -> bytes:
    """SHA-256 of the bytes that would be written."""
    in_file, digest = streamed(tensor), hashlib.sha256()
    if in_file is None:
        digest.update(tensor.tobytes())
        return digest.digest()
    for piece in in_file.pieces():
        digest.update(piece.view(np.uint8).data)
    return digest.digest()

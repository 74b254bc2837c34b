# SPDX-License-Identifier: Apache-2.0
"""`cast`: fp32 to fp16 throughout, with fp32 kept at the model's inputs and outputs.

Numbers beyond fp16 are brought to its ends instead of becoming infinity (the mask constant -3.4e38 becomes -65504), and
single numbers that would become 0 to its smallest (a 1e-9 that guards a division stays a guard). Both are counted in
the report. Operators that ONNX defines for fp32 only keep it, between two casts; so does the way from int8 products
back to floating point, whose int32 sums do not fit into fp16 before they are scaled.

Reference: type constraints of each operator in the ONNX specification (Operators.md) and in ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from ...contracts.errors import InputError
from .base import Left, Pass, Plan, register
from .graph import MICROSOFT, attribute, initializers_of, is_op, is_weight, label, make_node, nodes_of, producer

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class _Places:
    """The inputs and outputs of a node that stay fp32."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


_FLOAT32_ONLY: dict[str, _Places] = {
    "DequantizeLinear": _Places((1,), (0,)),
    "DynamicQuantizeLinear": _Places((0,), (1,)),
    "LayerNormalization": _Places((), (1, 2)),
    "NonMaxSuppression": _Places((0, 1, 3, 4)),
    "QLinearConv": _Places((1, 4, 6)),
    "QLinearMatMul": _Places((1, 4, 6)),
    "QuantizeLinear": _Places((0, 1)),
    "Range": _Places((0, 1, 2), (0,)),
    "Resize": _Places((2,)),
    "TfIdfVectorizer": _Places((), (0,)),
    "Upsample": _Places((1,)),
    **dict.fromkeys(("Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"), _Places((0,), (0,))),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "MelWeightMatrix"), _Places((), (0,))),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), _Places((), (0,))),
    "Multinomial": _Places((0,)),
}
"""Operators of the ONNX domain that take fp32 only, or lose what they were given (QuantizeLinear and Range in later
opsets), or have no fp16 kernel in ONNX Runtime (what makes random numbers and windows)."""

_TAKES_FLOAT16 = frozenset(
    (
        "Attention",
        "BiasGelu",
        "EmbedLayerNormalization",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "GroupQueryAttention",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    )
)
"""Operators of com.microsoft that are cast; other operators outside the ONNX domain keep fp32."""


@register("cast")
class CastPass(Pass):
    """Settings.

    Attributes:
        to: The type of weights and activations.
    """

    to: Literal["float16"] = "float16"

    def plan(self, model: ir.Model) -> Plan:
        plan = Plan()
        if model.functions:
            raise InputError("cast cannot look into local functions", next_step="Put the clean pass before it.")
        held = _held(model)
        for key, value in initializers_of(model).items():
            if value.const_value is None or value.const_value.dtype != FLOAT:
                continue
            plan.seen += 1
            if value.is_graph_input():
                plan.left.append(Left(key, "also an input of the graph; put the clean pass before"))
            elif _stays(value, held):
                plan.left.append(Left(key, "an output of the graph, or read by an operator that takes fp32 only"))
            else:
                plan.actions.append({"weight": key})
        for node in nodes_of(model):
            if is_op(node, "Constant") and _holds_float(node):
                plan.seen += 1
                plan.actions.append({"constant": label(node)})
        by_kind = [node for node in held if node.op_type in _FLOAT32_ONLY or _is_foreign(node)]
        plan.left += [Left(label(node), f"{node.op_type} stays in fp32") for node in by_kind]
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        chosen = {action["weight"] for action in plan.actions if "weight" in action}
        vetoed = {value for key, value in initializers_of(model).items() if key not in chosen}
        counts = {"clamped": 0, "raised_to_smallest": 0}
        # Constant nodes become initializers, so that what holds for one holds for the other
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        ends = {value for value in model.graph.outputs if value.dtype == FLOAT}
        _refuse_unknown_types(model)
        held = _held(model)
        stay = {value for value in vetoed if value.dtype == FLOAT}
        cast = 0
        for value in initializers_of(model).values():
            if value.const_value is None or value.const_value.dtype != FLOAT:
                continue
            if value in stay or _stays(value, held):
                stay.add(value)
            else:
                value.const_value = _cast_tensor(value.const_value, counts)
                value.type = ir.TensorType(FLOAT16)
                cast += 1
        stay |= {value for value in model.graph.inputs if value.dtype == FLOAT}
        stay |= {node.outputs[i] for node, places in held.items() for i in places.outputs if i < len(node.outputs)}
        for node in nodes_of(model):
            if node not in held:
                _cast_attributes(node, counts)
        _retype(model, stay)
        casts = _Casts()
        for node in list(nodes_of(model)):
            _connect(node, held.get(node, _Places()), stay, casts)
        _cast_outputs(model, ends, stay, casts)
        plan.details = {**counts, "weights_cast": cast}
        return model


def to_float16(array: np.ndarray, *, keep_nonzero: bool = True) -> tuple[np.ndarray, int, int]:
    """Round to fp16 without making infinities, nor new zeros.

    Args:
        array: float32, any shape. Its own infinities and NaN stay.
        keep_nonzero: Bring what would become zero to the smallest fp16 of its sign.

    Returns:
        The float16 array, how many values were brought to +-65504, and how many to the smallest fp16.
    """
    limits = np.finfo(np.float16)
    clamped = np.isfinite(array) & (np.abs(array) > limits.max)
    # Up to 65520 numpy rounds to the largest, beyond it to infinity; `clip` would take the infinities along
    result = np.where(clamped, np.copysign(np.float32(limits.max), array), array).astype(np.float16)
    vanished = (result == 0) & (array != 0) & keep_nonzero
    if vanished.any():
        result = np.where(vanished, np.copysign(limits.smallest_subnormal, result), result).astype(np.float16)
    return result, int(clamped.sum()), int(vanished.sum())


def _held(model: ir.Model) -> dict[ir.Node, _Places]:
    """Every node that keeps fp32 somewhere, and where."""
    held: dict[ir.Node, _Places] = {}
    for node in nodes_of(model):
        places = _places(node)
        if places is not None:
            held[node] = _Places(
                tuple(i for i in places.inputs if i < len(node.inputs) and _may_be_float(node, node.inputs[i])),
                tuple(i for i in places.outputs if i < len(node.outputs) and _may_be_float(node, node.outputs[i])),
            )
    return {node: places for node, places in held.items() if places.inputs or places.outputs}


def _is_foreign(node: ir.Node) -> bool:
    return bool(node.domain) and not (node.domain == MICROSOFT and node.op_type in _TAKES_FLOAT16)


def _refuse_unknown_types(model: ir.Model) -> None:
    for node in filter(_is_foreign, nodes_of(model)):
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.dtype is None:
                raise InputError(
                    f"cast does not know whether '{value.name}' at {node.domain}::{node.op_type} is fp32",
                    next_step="Declare its type in the graph's value_info, or leave the cast pass out.",
                )


def _places(node: ir.Node) -> _Places | None:
    if _is_foreign(node):
        return _Places(tuple(range(len(node.inputs))), tuple(range(len(node.outputs))))
    if not node.domain and node.op_type in _FLOAT32_ONLY:
        return _FLOAT32_ONLY[node.op_type]
    if _dequantizes(node):
        return _Places((), (0,))
    if _dequantizes_product(node):
        return _Places((0, 1), (0,))
    if is_op(node, "Gather") and is_weight(node.inputs[0]) and any(map(_dequantizes_product, node.successors())):
        return _Places((0,), (0,))  # the scales of an int8 embedding
    return None


def _dequantizes(node: ir.Node | None) -> bool:
    """Whether `node` brings the int32 sums of an int8 product, or the codes of an int8 embedding, to fp32."""
    if node is None or not is_op(node, "Cast") or node.attributes["to"].as_int() != int(FLOAT):
        return False
    maker = producer(node.inputs[0], "MatMulInteger", "ConvInteger", "Gather")
    if maker is None or maker.op_type != "Gather":
        return maker is not None
    codes = maker.inputs[0]
    return codes is not None and is_weight(codes) and codes.dtype in (ir.DataType.INT8, ir.DataType.UINT8)


def _dequantizes_product(node: ir.Node) -> bool:
    """Whether `node` multiplies by a scale of the activations, or scales what was cast from integers."""
    makers = [value.producer() for value in node.inputs if value is not None]
    return is_op(node, "Mul") and any(is_op(m, "DynamicQuantizeLinear") or _dequantizes(m) for m in makers)


def _may_be_float(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether a value at a place for fp32 is fp32: operators that also work on integers need it to be known."""
    if value is None:
        return False
    if value.dtype is None:
        return not node.domain and node.op_type not in ("QuantizeLinear", "Range")
    return isinstance(value.type, ir.TensorType | None) and value.dtype == FLOAT


def _stays(value: ir.Value, held: dict[ir.Node, _Places]) -> bool:
    at_an_end = value.is_graph_output() or value.is_graph_input()
    return at_an_end or any(use.node in held and use.idx in held[use.node].inputs for use in value.uses())


def _holds_float(constant: ir.Node) -> bool:
    attr = next(iter(constant.attributes.values()))
    if attr.type == ir.AttributeType.TENSOR:
        return attr.as_tensor().dtype == FLOAT
    return attr.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)


def _cast_tensor(tensor: ir.TensorProtocol, counts: dict[str, int]) -> ir.TensorProtocol:
    # Among many weights, one next to zero may well be zero; a number alone is there for a reason
    array, clamped, raised = to_float16(tensor.numpy(), keep_nonzero=tensor.size == 1)
    counts["clamped"] += clamped
    counts["raised_to_smallest"] += raised
    return ir.Tensor(array, name=tensor.name)


def _cast_attributes(node: ir.Node, counts: dict[str, int]) -> None:
    if node.domain:
        return
    name = {"Cast": "to", "SequenceEmpty": "dtype"}.get(node.op_type)
    if name and attribute(node, name, int(FLOAT)) == int(FLOAT):  # the default of SequenceEmpty
        node.attributes[name] = ir.AttrInt64(name, int(FLOAT16))
    if is_op(node, "ConstantOfShape") and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, np.float16)))
    for key, attr in list(node.attributes.items()):
        if attr.type == ir.AttributeType.TENSOR and attr.value is not None:
            tensor = attr.as_tensor()
            if tensor.dtype == FLOAT:
                node.attributes[key] = ir.AttrTensor(key, _cast_tensor(tensor, counts))
    if is_op(node, "Constant"):  # what could not be lifted, since the graph returns it
        for key in ("value_float", "value_floats"):
            if key in node.attributes:
                tensor = ir.Tensor(np.asarray(node.attributes.pop(key).value, np.float32))
                node.attributes["value"] = ir.AttrTensor("value", _cast_tensor(tensor, counts))


def _retype(model: ir.Model, stay: set[ir.Value]) -> None:
    """Declare fp16 what was declared fp32; a sequence of tensors is left to the runtime to infer."""
    values = [value for node in nodes_of(model) for value in node.outputs]
    values += [value for graph in model.graph.subgraphs() for value in graph.inputs]
    for value in values:
        if value.dtype == FLOAT and value not in stay:
            value.type = ir.TensorType(FLOAT16) if isinstance(value.type, ir.TensorType) else None


class _Casts:
    """Casts put into the graph, one for each value, type and graph that reads it."""

    def __init__(self) -> None:
        self.made: dict[tuple[ir.Value, ir.DataType, object], ir.Value] = {}

    def cast(self, value: ir.Value, to: ir.DataType, graph: ir.Graph) -> ir.Value:
        """`value` as `to`, cast where it is made, or at the start of `graph` if that is outside of it."""
        key = (value, to, graph)
        if key not in self.made:
            node = make_node("Cast", [value], [f"{value.name}_{to.name.lower()}"], attributes={"to": int(to)})
            node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(to)
            maker = value.producer()
            if maker is not None and maker.graph is graph:
                graph.insert_after(maker, node)
            elif len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
            self.made[key] = node.outputs[0]
        return self.made[key]


def _connect(node: ir.Node, places: _Places, stay: set[ir.Value], casts: _Casts) -> None:
    """Give every input of `node` the type that it takes."""
    assert isinstance(node.graph, ir.Graph)
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if value in stay and index not in places.inputs:
            node.replace_input_with(index, casts.cast(value, FLOAT16, node.graph))
        elif value not in stay and index in places.inputs:
            node.replace_input_with(index, casts.cast(value, FLOAT, node.graph))


def _cast_outputs(model: ir.Model, ends: set[ir.Value], stay: set[ir.Value], casts: _Casts) -> None:
    """fp32 where the model ends, fp16 where a subgraph ends."""
    for graph in model.graph.subgraphs():
        for index, value in enumerate(graph.outputs):
            if value in stay:
                graph.outputs[index] = casts.cast(value, FLOAT16, graph)
    for index, value in enumerate(model.graph.outputs):
        if value not in ends or value in stay:
            continue
        name = value.name
        value.name = f"{name}_float16"
        result = casts.cast(value, FLOAT, model.graph)
        result.name = name
        model.graph.outputs[index] = result

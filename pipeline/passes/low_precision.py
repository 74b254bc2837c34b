# SPDX-License-Identifier: Apache-2.0
"""fp16 and bf16: how numbers are rounded to them, and which places of which operators cannot take them.

Reference: IEEE 754-2019 binary16; bfloat16 as the ONNX specification has it (Cast-13): 8 bits of exponent, 7 of
fraction, both rounded to nearest, ties to even. Type constraints of each operator from its schema in the ONNX
specification (Operators.md), at the opset of the model, and from ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from ...contracts.errors import InputError
from ...exporters.streamed_tensor import streamed
from .graph import MICROSOFT, attribute, is_op, is_weight, label, nodes_of, producer

Precision = Literal["float16", "bfloat16"]

FLOAT = ir.DataType.FLOAT
DATA_TYPES: dict[str, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Places:
    """The inputs and outputs of a node that stay fp32."""

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


NOWHERE = Places()

Held = dict[ir.Node, Places]
"""Every node that keeps fp32 somewhere, and where."""

FLOAT32_ONLY: dict[str, Places] = {
    "DequantizeLinear": Places((1,), (0,)),
    "DynamicQuantizeLinear": Places((0,), (1,)),
    "LayerNormalization": Places((), (1, 2)),
    "NonMaxSuppression": Places((0, 1, 3, 4)),
    "QLinearConv": Places((1, 4, 6)),
    "QLinearMatMul": Places((1, 4, 6)),
    "QuantizeLinear": Places((0, 1)),
    "Range": Places((0, 1, 2), (0,)),
    "Resize": Places((2,)),
    "TfIdfVectorizer": Places((), (0,)),
    "Upsample": Places((1,)),
    **dict.fromkeys(("Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"), Places((0,), (0,))),
    **dict.fromkeys(("RandomNormal", "RandomUniform", "MelWeightMatrix"), Places((), (0,))),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), Places((), (0,))),
    "Multinomial": Places((0,)),
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

_TAKES_BFLOAT16 = _TAKES_FLOAT16 - {"EmbedLayerNormalization"}

CPU_BFLOAT16 = frozenset(
    (
        *("Cast", "Compress", "Concat", "ConcatFromSequence", "ConstantOfShape", "Flatten", "Gather", "GatherElements"),
        *("GatherND", "Identity", "If", "IsInf", "IsNaN", "LayerNormalization", "Loop", "Optional"),
        *("OptionalGetElement", "OptionalHasElement", "Reshape", "ReverseSequence", "Scan", "Scatter"),
        *("ScatterElements", "ScatterND", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
        *("SequenceInsert", "SequenceLength", "Shape", "Shrink", "Sign", "SimplifiedLayerNormalization", "Slice"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Split", "SplitToSequence", "Squeeze"),
        *("TensorScatter", "Transpose", "Unsqueeze"),
    )
)
"""Operators that ONNX Runtime 1.31.1 can run in bf16 on the CPU, from its own list of kernels: what moves data, and
norms. It puts casts around fp16 operators that it has no kernel for, not around bf16 ones: those do not load."""


def limits(to: Precision) -> tuple[float, float]:
    """The largest finite and the smallest positive number."""
    found = ml_dtypes.finfo(DATA_TYPES[to].numpy())  # type: ignore[no-untyped-call]
    return float(found.max), float(found.smallest_subnormal)


def round_to(array: np.ndarray, to: Precision, *, keep_nonzero: bool = True) -> tuple[np.ndarray, int, int]:
    """Round to nearest, ties to even, without making infinities, nor new zeros.

    Args:
        array: float32, any shape. Its own infinities and NaN stay.
        to: The type to round to.
        keep_nonzero: Bring what would become zero to the smallest number of its sign.

    Returns:
        The rounded array, how many values were brought to +-the end, and how many to the smallest number.
    """
    largest, smallest = limits(to)
    dtype = DATA_TYPES[to].numpy()
    if not keep_nonzero and array.size and -largest <= array.min() and array.max() <= largest:
        return array.astype(dtype), 0, 0  # nearly every weight: four times as fast
    clamped = np.isfinite(array) & (np.abs(array) > largest)
    # Up to half a step beyond the end rounds to it, the rest to infinity; `clip` would take the infinities along
    result = np.where(clamped, np.copysign(np.float32(largest), array), array).astype(dtype)
    vanished = (result == 0) & (array != 0) & keep_nonzero
    if vanished.any():
        result = np.where(vanished, np.copysign(np.float32(smallest), array), result).astype(dtype)
    return result, int(clamped.sum()), int(vanished.sum())


def held_by_kind(model: ir.Model, to: Precision) -> Held:
    """The nodes that cannot do with `to` everywhere, by their operators and the model's opset alone.

    Raises:
        InputError: It is not known of a value at an operator of another domain whether it is fp32.
    """
    opset = model.opset_imports.get("", 0)
    held: Held = {}
    for node in nodes_of(model):
        if is_foreign(node):
            _refuse_unknown_types(node)
        places = _places(node)
        if places is None and DATA_TYPES[to] == ir.DataType.BFLOAT16:
            places = _without_bfloat16(node, opset)
        if places is not None:
            held[node] = Places(
                tuple(i for i in places.inputs if i < len(node.inputs) and _may_be_float(node, node.inputs[i])),
                tuple(i for i in places.outputs if i < len(node.outputs) and _may_be_float(node, node.outputs[i])),
            )
    return {node: places for node, places in held.items() if places.inputs or places.outputs}


def with_kept(by_kind: Held, kept: Iterable[ir.Node]) -> Held:
    """Add nodes that stay fp32 throughout, together with what is inside their subgraphs.

    Raises:
        InputError: It is not known of one of their values whether it is fp32, or it is a sequence.
    """
    held = dict(by_kind)
    for node in kept:
        _refuse_unknown_types(node)
        if any(isinstance(value.type, ir.SequenceType | ir.OptionalType) for value in _values(node)):
            raise InputError(
                f"cast cannot keep {label(node)} in fp32: it handles a sequence",
                next_step="Leave it out of keep, or set mixed: false.",
            )
        for each in (node, *nodes_inside(node)):
            held[each] = Places(
                tuple(i for i, value in enumerate(each.inputs) if is_float(value)),
                tuple(i for i, value in enumerate(each.outputs) if is_float(value)),
            )
    return held


def nodes_inside(node: ir.Node) -> list[ir.Node]:
    """The nodes of all subgraphs of `node`, of any depth."""
    return [inner for graph in subgraphs_of(node) for inner in graph.all_nodes()]


def subgraphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs that `node` holds itself."""
    found: list[ir.Graph] = []
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            found.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            found += attr.as_graphs()
    return found


def stays(value: ir.Value, held: Held) -> bool:
    """Whether an fp32 activation is fp32 where it is made: at the graph's inputs, and at places that are held."""
    node = value.producer()
    return value.is_graph_input() if node is None else value.index() in held.get(node, NOWHERE).outputs


def low_uses(value: ir.Value, held: Held) -> list[tuple[ir.Node, int]]:
    """The readers of `value` that take it in the lower precision, and at which input."""
    return [(use.node, use.idx) for use in value.uses() if use.idx not in held.get(use.node, NOWHERE).inputs]


def is_float(value: ir.Value | None) -> bool:
    """Whether `value` is known to be a tensor of fp32."""
    return value is not None and value.dtype == FLOAT and isinstance(value.type, ir.TensorType | None)


def is_foreign(node: ir.Node) -> bool:
    return bool(node.domain) and not (node.domain == MICROSOFT and node.op_type in _TAKES_FLOAT16)


def _values(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]


def _refuse_unknown_types(node: ir.Node) -> None:
    for value in _values(node):
        if value.dtype is None:
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise InputError(
                f"cast does not know whether '{value.name}' at {operator} is fp32",
                next_step="Declare its type in the graph's value_info, or leave the cast pass out.",
            )


def needs_float32(weight: ir.Value) -> bool:
    """Whether an operator reads `weight` where it takes fp32 only, or may."""
    return any(use.idx in (_places(use.node) or NOWHERE).inputs for use in weight.uses())


def peak(weight: ir.Value) -> float:
    """The largest finite absolute value of a weight."""
    assert weight.const_value is not None
    in_file = streamed(weight.const_value)
    largest = 0.0
    for piece in [weight.const_value.numpy()] if in_file is None else in_file.pieces():
        array = np.abs(piece)
        largest = max(largest, float(np.max(array, initial=0, where=np.isfinite(array))))
    return largest


def why_held(node: ir.Node, to: Precision, opset: int) -> str:
    """The reason for the report why a node of `held_by_kind` keeps fp32; empty where it is not by its operator."""
    if is_foreign(node) or (not node.domain and node.op_type in FLOAT32_ONLY):
        return f"{node.op_type} stays in fp32"
    if _scatters_sums(node):
        return f"{node.op_type} sums in fp32"
    if to == "float16" or not _without_bfloat16(node, opset):
        return ""
    newer = () if node.domain else range(opset + 1, onnx.defs.onnx_opset_version() + 1)
    since = next((version for version in newer if not _refusing(node, version)), None)
    newest = f"{node.op_type} takes no bfloat16"
    return newest if since is None else f"{node.op_type} takes bfloat16 from opset {since} on, and this is {opset}"


def _places(node: ir.Node) -> Places | None:
    if is_foreign(node):
        return Places(tuple(range(len(node.inputs))), tuple(range(len(node.outputs))))
    if not node.domain and node.op_type in FLOAT32_ONLY:
        return FLOAT32_ONLY[node.op_type]
    if _scatters_sums(node):
        return Places((0, 2), (0,))
    if _dequantizes(node):
        return Places((), (0,))
    if _dequantizes_product(node):
        return Places((0, 1), (0,))
    if is_op(node, "Gather") and is_weight(node.inputs[0]) and any(map(_dequantizes_product, node.successors())):
        return Places((0,), (0,))  # the scales of an int8 embedding
    return None


def _scatters_sums(node: ir.Node) -> bool:
    """Whether values meet in one place, as the messages to a node of a graph do: ONNX Runtime's CPU kernel refuses."""
    if not (is_op(node, "ScatterND") or is_op(node, "ScatterElements")):
        return False
    return bool(attribute(node, "reduction", "none") != "none")


def _without_bfloat16(node: ir.Node, opset: int) -> Places | None:
    """The places of `node` that bf16 does not fit; None where it fits throughout."""
    if node.domain == MICROSOFT:
        everywhere = Places(tuple(range(len(node.inputs))), tuple(range(len(node.outputs))))
        return None if node.op_type in _TAKES_BFLOAT16 else everywhere
    return None if node.domain else _refusing(node, opset)


def _refusing(node: ir.Node, opset: int) -> Places | None:
    """The places whose formal parameter, at this opset, does not allow bf16."""
    if not onnx.defs.has(node.op_type):
        return None  # ONNX Runtime keeps a few operators of its own in the ONNX domain
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {t.type_param_str: "tensor(bfloat16)" in t.allowed_type_strs for t in schema.type_constraints}

    def refusing(formal: list[onnx.defs.OpSchema.FormalParameter], count: int) -> tuple[int, ...]:
        # The last parameter of a variadic operator stands for all that follow
        types = [formal[min(i, len(formal) - 1)].type_str for i in range(count)]
        return tuple(i for i, t in enumerate(types) if not allowed.get(t, "bfloat16" in t))

    inputs, outputs = refusing(schema.inputs, len(node.inputs)), refusing(schema.outputs, len(node.outputs))
    places = Places(
        tuple(i for i in inputs if is_float(node.inputs[i])), tuple(i for i in outputs if is_float(node.outputs[i]))
    )
    return places if places.inputs or places.outputs else None


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
    return is_float(value)

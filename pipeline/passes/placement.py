# SPDX-License-Identifier: Apache-2.0
"""Where a statically quantized graph has its integers: which products, which values, on which target.

Two kinds of values become integers. One is read as integers: a QuantizeLinear and DequantizeLinear pair stands before
the products that read it, and every other reader keeps the float. The other flows as integers: the pair stands right
behind the node that makes the value, and all readers read it, so that a chain of convolutions, additions and poolings
never leaves int8. What pays differs by target:

cpu        ONNX Runtime fuses a convolution only when its output is quantized, so integers flow from each convolution
           through activations, additions, concatenations and pooling. A MatMul of integers returns floats
           (MatMulIntegerToFloat), which is what LayerNormalization and GELU want to read anyway. Where the runtime
           makes a Gemm of MatMul and Add, the bias has to be an integer too: with one in floating point, the whole
           Gemm falls back to it.
openvino   Convolutions as on the CPU provider: measured as fast as pairs before each of them, or faster, and closer to
           the float graph. The scores of attention (query times key) become int8 as well, with the pairs before what
           only rearranges values, which the compiler then does in int8.
tensorrt   Pairs before every product, of two activations too, and before residual additions; all ranges symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from .base import Left
from .graph import attribute, constant, consumers, dims, is_op, is_weight, label, nodes_of, only_consumer, scalar
from .matrix_weights import WeightUse, weights_in_use, why_no_matrix

Target = Literal["cpu", "openvino", "tensorrt"]
Attention = Literal["none", "scores", "all"]

_ACTIVATIONS = ("Relu", "Clip")
"""Fused into the rounding of the convolution before them, where zero is the smallest value and integer."""
_REARRANGING = (
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Pad", "MaxPool", "Resize",
)  # fmt: skip
"""What only moves values, so that output and input share a scale."""
_COMPUTING = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid")
"""What has an integer kernel on the CPU provider, with a scale of its own at the output."""
_ONLY_BETWEEN = (*_REARRANGING, "Concat", "Sigmoid")
"""Of these, what is worth rounding only where integers go on: at the end it saves no pass over memory."""


@dataclass
class Product:
    """One product that is to run in integers.

    Attributes:
        node: MatMul, Gemm, Conv or ConvTranspose; or the Gather of an embedding.
        weight: Its weight; None for a product of two activations.
        axis: The axis of the weight that counts output channels (or rows).
        kind: `conv`, `scores` (of attention), or as in `WeightUse`.
        addition: On the CPU provider, what the runtime would merge with this node into a Gemm: the Add behind a
            MatMul, or the Gemm itself. None where it would not.
        bias: What is added, if that is a constant row, one number an output channel.
        input_scale: Of its input, once it is known.
    """

    node: ir.Node
    weight: ir.Value | None
    axis: int = 0
    kind: str = "product"
    addition: ir.Node | None = None
    bias: ir.Value | None = None
    input_scale: float | None = None

    @property
    def reads(self) -> list[tuple[ir.Node, int]]:
        """Where it reads activations as integers: (node, input index).

        Scores read query and key before their heads are split off, so that the splitting happens on integers.
        """
        if self.kind == "rows":
            return []
        places = [(self.node, index) for index in ((0, 1) if self.weight is None else (0,))]
        return [_before_rearranging(*place) for place in places] if self.kind == "scores" else places


@dataclass
class Placement:
    """The outcome.

    Attributes:
        products: In graph order, embeddings included.
        flowing: Values whose pair stands behind their maker; the value is the one they share their scale with (itself
            where it has its own).
        read: Values whose pair stands before some readers: value -> (node, input index).
        symmetric: Those of them that have to be int8 with zero in the middle.
        left: Products that stay in floating point, and why.
        seen: How many there are.
    """

    products: list[Product] = field(default_factory=list)
    flowing: dict[ir.Value, ir.Value] = field(default_factory=dict)
    read: dict[ir.Value, list[tuple[ir.Node, int]]] = field(default_factory=dict)
    symmetric: set[ir.Value] = field(default_factory=set)
    left: list[Left] = field(default_factory=list)
    seen: int = 0

    @property
    def measured(self) -> list[ir.Value]:
        """The values whose ranges are needed, once, in the order met."""
        values = [*self.flowing.values(), *(value for value in self.read if value not in self.flowing)]
        return list(dict.fromkeys(values))


def place(
    model: ir.Model,
    target: Target,
    *,
    attention: Attention,
    symmetric: bool,
    weight_problem: Callable[[ir.Value, list[WeightUse]], str | None],
    excluded: Callable[[ir.Node], str | None],
    unmeasured: Mapping[str, str],
) -> Placement:
    """Decide.

    Args:
        model: Left as it is.
        target: See this module's docstring.
        attention: Which products of two activations become integers.
        symmetric: Whether zero is in the middle of the integers that stand for activations.
        weight_problem: Why a weight cannot, if so.
        excluded: Why a node should not, if so.
        unmeasured: Values without a range, and why: nothing is rounded there.
    """
    found = Placement()
    _matrices(model, found, weight_problem, excluded)
    _convolutions(model, found, target, weight_problem, excluded)
    _activation_products(model, found, attention, excluded)
    _leave_unmeasured(found, target, symmetric, unmeasured)
    order = {node: index for index, node in enumerate(nodes_of(model))}
    found.products.sort(key=lambda product: order[product.node])
    found.left.sort(key=lambda left: left.node)
    if target != "tensorrt":
        _flow(model, found, symmetric, unmeasured)
    if target == "cpu":
        for product in found.products:
            product.addition, product.bias = _merged(product)
    for product in found.products:
        for node, index in product.reads:
            value = node.inputs[index]
            assert value is not None
            found.read.setdefault(value, []).append((node, index))
            if product.kind == "scores":
                found.symmetric.add(value)
    if target == "tensorrt":
        _residual_additions(model, found)
    return found


def _matrices(
    model: ir.Model,
    found: Placement,
    weight_problem: Callable[[ir.Value, list[WeightUse]], str | None],
    excluded: Callable[[ir.Node], str | None],
) -> None:
    for weight, uses in weights_in_use(model).items():
        readers = [use for use in uses if use.kind in ("product", "product_transposed", "rows")]
        found.seen += len(readers)
        reason = weight_problem(weight, uses) if readers else None
        if readers and not reason:
            reason = next((r for use in readers if (r := excluded(use.node))), None)
        if reason:
            found.left += [Left(label(use.node), reason) for use in readers]
        elif readers:
            found.products += [Product(use.node, weight, use.axis, use.kind) for use in readers]
        for use in uses:
            if use.kind == "other" and use.problem and is_op(use.node, "MatMul", "Gemm"):
                found.seen += 1
                found.left.append(Left(label(use.node), use.problem))


def _convolutions(
    model: ir.Model,
    found: Placement,
    target: Target,
    weight_problem: Callable[[ir.Value, list[WeightUse]], str | None],
    excluded: Callable[[ir.Node], str | None],
) -> None:
    for node in nodes_of(model):
        if not is_op(node, "Conv", "ConvTranspose"):
            continue
        found.seen += 1
        weight = node.inputs[1]
        axis = 0 if is_op(node, "Conv") else 1
        reason = excluded(node)
        if reason is None and (weight is None or not is_weight(weight)):
            reason = "the weight is not a constant of the graph"
        elif reason is None and is_op(node, "ConvTranspose") and target == "cpu":
            reason = "ONNX Runtime has no integer kernel for ConvTranspose on the CPU"
        elif reason is None and is_op(node, "ConvTranspose") and attribute(node, "group", 1) != 1:
            reason = "a grouped ConvTranspose has no axis of output channels"
        elif reason is None and weight is not None:
            others = [n for n in consumers(weight) if not is_op(n, node.op_type)]
            reason = f"the weight is also read by {others[0].op_type} in fp32" if others else None
            reason = reason or weight_problem(weight, [WeightUse(node, "conv", axis)])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if reason is None and bias is not None:
            reason = _bias_problem(bias)
        if reason is not None:
            found.left.append(Left(label(node), reason))
        else:
            found.products.append(Product(node, weight, axis, "conv", bias=bias))


def _bias_problem(bias: ir.Value) -> str | None:
    if not is_weight(bias):
        return "the bias is not a constant of the graph"
    assert bias.const_value is not None
    return None if np.isfinite(bias.const_value.numpy()).all() else "the bias holds NaN or infinity"


def _activation_products(
    model: ir.Model, found: Placement, attention: Attention, excluded: Callable[[ir.Node], str | None]
) -> None:
    for node in nodes_of(model):
        reason = why_no_matrix(node) if is_op(node, "MatMul", "Gemm") else None
        if reason is None:
            continue
        found.seen += 1
        scores = _are_scores(node)
        if reason == "both inputs are activations" and is_op(node, "MatMul"):
            reason = excluded(node)
            if reason is None and (attention == "none" or (attention == "scores" and not scores)):
                reason = "a product of two activations, in fp32 on this target"
        if reason is None:
            found.products.append(Product(node, None, kind="scores" if scores and attention == "scores" else "product"))
        else:
            found.left.append(Left(label(node), reason))


def _are_scores(node: ir.Node) -> bool:
    """Whether a Softmax follows, behind no more than scaling and masking."""
    value = node.outputs[0]
    for _ in range(4):
        readers = consumers(value)
        if len(readers) != 1:
            return False
        if is_op(readers[0], "Softmax"):
            return True
        if not is_op(readers[0], "Mul", "Div", "Add", "Where"):
            return False
        value = readers[0].outputs[0]
    return False


def _before_rearranging(node: ir.Node, index: int) -> tuple[ir.Node, int]:
    """The place where the value that arrives at (node, index) enters a chain of nodes that only rearrange it."""
    value = node.inputs[index]
    maker = value.producer() if value is not None else None
    while maker is not None and is_op(maker, "Reshape", "Transpose") and value is not None and only_consumer(value):
        node, index, value = maker, 0, maker.inputs[0]
        maker = value.producer() if value is not None else None
    return node, index


def _leave_unmeasured(found: Placement, target: Target, symmetric: bool, unmeasured: Mapping[str, str]) -> None:
    """Products whose inputs, or rounded outputs, have no range stay in floating point."""

    def problem(product: Product) -> str | None:
        values = [node.inputs[index] for node, index in product.reads]
        if target != "tensorrt" and product.kind == "conv":
            values.append(_rounded(product.node, symmetric))
        bad = next((str(v.name) for v in values if v is not None and v.name in unmeasured), None)
        return None if bad is None else f"'{bad}': {unmeasured[bad]}"

    reasons = {product.node: reason for product in found.products if (reason := problem(product))}
    # A weight is one tensor: where one of its readers stays fp32, all do
    shared = {p.weight: reasons[p.node] for p in found.products if p.node in reasons and p.kind != "conv" and p.weight}
    reasons |= {p.node: shared[p.weight] for p in found.products if p.weight in shared and p.node not in reasons}
    found.left += [Left(label(node), reason) for node, reason in reasons.items()]
    found.products = [product for product in found.products if product.node not in reasons]


def _merged(product: Product) -> tuple[ir.Node | None, ir.Value | None]:
    """The addition that the runtime would merge with this product, and its constant row; see `Product`."""
    node, weight = product.node, product.weight
    if product.kind not in ("product", "product_transposed") or weight is None:
        return None, product.bias
    if is_op(node, "Gemm"):
        added = node.inputs[2] if len(node.inputs) > 2 else None
        return (node if added is not None else None), _row(added, weight, product.axis)
    shape, addition = dims(node.inputs[0]), only_consumer(node.outputs[0])
    flat = shape is None or len(shape) == 2 or all(isinstance(dim, int) for dim in shape)
    if addition is None or not is_op(addition, "Add") or not flat:
        return None, None
    added = next((value for value in addition.inputs if value is not node.outputs[0]), None)
    row = _row(added, weight, product.axis)
    return addition, row if row is not None and len(dims(row) or ()) <= (2 if shape is None else len(shape)) else None


def _row(value: ir.Value | None, weight: ir.Value, axis: int) -> ir.Value | None:
    """`value`, if it is a constant with one finite number for each output channel of `weight`."""
    if value is None or not is_weight(value) or value.const_value is None or weight.const_value is None:
        return None
    array, channels = value.const_value.numpy(), weight.const_value.shape[axis]
    if array.ndim == 0 or (array.size, array.shape[-1]) != (channels, channels):
        return None
    return value if np.isfinite(array).all() else None


def _flow(model: ir.Model, found: Placement, symmetric: bool, unmeasured: Mapping[str, str]) -> None:
    """Mark what flows as integers on the CPU provider, from each convolution on."""
    convolutions = {product.node for product in found.products if product.kind == "conv"}
    fused: set[ir.Value] = set()  # what an activation takes over before it is rounded
    for node in model.graph:
        if not node.outputs or not node.inputs:
            continue
        source, result = node.inputs[0], node.outputs[0]
        gates = _gates(node, found, unmeasured)
        if node in convolutions or gates or _computes_on_integers(node, found):
            rounded = _rounded(node, symmetric)
            if rounded.name in unmeasured:
                continue
            if rounded is result:
                found.flowing[result] = result
            else:
                fused.add(result)
            for index, gate in gates:
                found.read.setdefault(gate, []).append((node, index))
        elif source in fused or (is_op(node, *_ACTIVATIONS) and source in found.flowing):
            if result.name not in unmeasured:
                found.flowing[result] = result
        elif source in found.flowing and _moves_only(node):
            found.flowing.update(dict.fromkeys(node.outputs, found.flowing[source]))
    _end_early(found)


def _computes_on_integers(node: ir.Node, found: Placement) -> bool:
    return is_op(node, *_COMPUTING) and all(value in found.flowing for value in node.inputs if value is not None)


def _rounded(node: ir.Node, symmetric: bool) -> ir.Value:
    """What is rounded when `node` computes in integers: its result, or that of the activation behind it."""
    reader = only_consumer(node.outputs[0])
    # With zero in the middle of the integers, they do not clip at zero as the activation does
    return reader.outputs[0] if reader is not None and _from_zero(reader) and not symmetric else node.outputs[0]


def _from_zero(node: ir.Node) -> bool:
    """Whether it is an activation whose smallest value is zero: the runtime drops it, as the integers begin there."""
    if not is_op(node, "Clip"):
        return is_op(node, *_ACTIVATIONS)
    low, high = (node.inputs[i] if len(node.inputs) > i else None for i in (1, 2))
    return scalar(low) == 0 and (high is None or (scalar(high) or 0) > 0)


def _gates(node: ir.Node, found: Placement, unmeasured: Mapping[str, str]) -> list[tuple[int, ir.Value]]:
    """The factor, one number a channel, that integers are multiplied with: rounding it costs nothing."""
    if not is_op(node, "Mul") or sum(value in found.flowing for value in node.inputs) != 1:
        return []
    index, value = next((i, v) for i, v in enumerate(node.inputs) if v not in found.flowing)
    shape = dims(value)
    if value is None or value.name in unmeasured or constant(value) is not None or value.dtype != ir.DataType.FLOAT:
        return []
    return [(index, value)] if shape is not None and len(shape) > 2 and all(dim == 1 for dim in shape[2:]) else []


def _end_early(found: Placement) -> None:
    """Take back what only floating point reads: a pair there costs two passes over memory and saves none."""
    products = {product.node for product in found.products} | {node for use in found.read.values() for node, _ in use}
    for value in list(reversed(found.flowing)):
        maker = value.producer()
        if maker is None or not is_op(maker, *_ONLY_BETWEEN):
            continue
        readers = [reader for result in maker.outputs for reader in consumers(result)]
        if not any(n in products or any(result in found.flowing for result in n.outputs) for n in readers):
            for result in maker.outputs:
                found.flowing.pop(result, None)


def _moves_only(node: ir.Node) -> bool:
    if is_op(node, "MaxPool"):
        return len([o for o in node.outputs if o.name]) == 1
    if is_op(node, "Pad"):
        # Zero is exact in every range; another filling would need a place in it
        filling = node.inputs[2] if len(node.inputs) > 2 else None
        return attribute(node, "mode", "constant") != "constant" or filling is None or _is_zero(filling)
    if is_op(node, "Resize"):
        crops = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        return attribute(node, "mode", "nearest") == "nearest" and not crops
    return is_op(node, *_REARRANGING)


def _is_zero(value: ir.Value) -> bool:
    return value.const_value is not None and not value.const_value.numpy().any()


def _residual_additions(model: ir.Model, found: Placement) -> None:
    """Quantize what additions between convolutions read: the branch that comes from far is then int8 in memory."""
    near = {product.node for product in found.products if product.kind == "conv"}
    if not near:
        return
    for node in model.graph:
        if not is_op(node, "Add") or len(dims(node.outputs[0]) or ()) != 4:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value in found.read:
                found.read[value].append((node, index))

# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a graph, and where each has its bias: for passes that give an output something constant back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from .folding import edit_constant
from .graph import (
    MICROSOFT,
    add_weight,
    attribute,
    constant,
    is_op,
    make_node,
    nodes_of,
    only_consumer,
    producer,
    replace_value,
)

CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass
class Layer:
    """A linear operation with constant weights, and where its bias is.

    Attributes:
        node: The product or convolution.
        output: What is measured: its result with the bias.
        axis: The channels' axis of `output`.
        bias: `float` is a constant that is added; `integers` the same behind a DequantizeLinear; `none`.
        reader: The node that reads the bias, and at which input.
        problem: Why it cannot be corrected.
        counterpart: Name of `output` in the graph before quantizing.
    """

    node: ir.Node
    output: ir.Value
    axis: int
    bias: Literal["float", "integers", "none"] = "none"
    reader: tuple[ir.Node, int] | None = None
    problem: str | None = None
    counterpart: str = ""

    @property
    def name(self) -> str:
        return str(self.output.name)


def find_layers(model: ir.Model) -> Iterator[Layer]:
    for node in nodes_of(model):
        if is_op(node, *CONVOLUTIONS):
            layer = _with_bias(Layer(node, node.outputs[0], 1), node, 2)
        elif is_op(node, "Gemm"):
            layer = _with_bias(Layer(node, node.outputs[0], -1), node, 2)
            if attribute(node, "beta", 1.0) == 0:
                layer.problem = "Gemm ignores its bias"
        elif is_op(node, "MatMul", "MatMulInteger") or is_op(node, "MatMulNBits", domain=MICROSOFT):
            layer = _product(node)
        else:
            continue
        if node.graph is not model.graph:
            layer.problem = "inside a subgraph: its values cannot be measured"
        elif not _is_fixed(node.inputs[1]):
            layer.problem = "both factors are activations"
        yield layer


def _product(node: ir.Node) -> Layer:
    """A matrix product: its own bias, or the Add behind it, past what turns its integers into numbers."""
    if node.op_type == "MatMulNBits" and len(node.inputs) > 5 and node.inputs[5] is not None:
        return _with_bias(Layer(node, node.outputs[0], -1), node, 5)
    value = node.outputs[0]
    while node.op_type == "MatMulInteger":
        reader = only_consumer(value)
        if reader is None or not is_op(reader, "Cast", "Mul"):
            break
        value = reader.outputs[0]
    add = only_consumer(value)
    if add is not None and is_op(add, "Add", "Sum") and len(add.inputs) == 2:
        for index in (0, 1):
            back = producer(add.inputs[index], "DequantizeLinear")
            array = constant(add.inputs[index] if back is None else back.inputs[0])
            if array is not None and array.size > 1 and array.size == array.shape[-1]:
                return _with_bias(Layer(node, add.outputs[0], -1), add, index)
    return Layer(node, value, -1)


def _with_bias(layer: Layer, node: ir.Node, index: int) -> Layer:
    bias = node.inputs[index] if index < len(node.inputs) else None
    if bias is None:
        return layer
    layer.reader = (node, index)
    back = producer(bias, "DequantizeLinear")
    if constant(bias) is not None:
        layer.bias = "float"
    elif back is not None and constant(back.inputs[0]) is not None and constant(back.inputs[1]) is not None:
        layer.bias = "integers"
        if len(bias.uses()) > 1:
            layer.problem = "its integer bias is shared with others"
    else:
        layer.problem = "its bias is no constant"
    return layer


def _is_fixed(value: ir.Value | None) -> bool:
    """Whether a value follows from constants alone, through what stands between stored and computed weights."""
    if value is None or constant(value) is not None:
        return True
    maker = value.producer()
    steps = ("DequantizeLinear", "Transpose", "Cast", "Reshape", "Mul", "Gather")
    return maker is not None and is_op(maker, *steps) and all(_is_fixed(v) for v in maker.inputs)


def add_to_bias(model: ir.Model, layer: Layer, shift: np.ndarray) -> None:
    """Add `shift`, float64 [C], to the layer's output by way of its bias."""
    if layer.bias == "none":
        _insert(model, layer, shift)
        return
    assert layer.reader is not None
    node, index = layer.reader
    factor = attribute(node, "beta", 1.0) if is_op(node, "Gemm") else 1.0
    if layer.bias == "float":
        edit_constant(model, [layer.reader], lambda bias: bias + shift / factor)
        return
    back = producer(node.inputs[index], "DequantizeLinear")
    assert back is not None
    step = np.asarray(constant(back.inputs[1]), np.float64)
    limits = np.iinfo(np.int32)
    edit_constant(
        model, [(back, 0)], lambda codes: np.clip(codes + np.rint(shift / factor / step), limits.min, limits.max)
    )


def _insert(model: ir.Model, layer: Layer, shift: np.ndarray) -> None:
    node, graph = layer.node, layer.node.graph
    assert isinstance(graph, ir.Graph)
    dtype = layer.output.dtype or ir.DataType.FLOAT
    bias = add_weight(model, graph, f"{layer.name}_bias", shift.astype(dtype.numpy()))
    if is_op(node, *CONVOLUTIONS, "Gemm"):
        node.resize_inputs(3)
        node.replace_input_with(2, _as_integers(model, node, bias) or bias)
        return
    maker = layer.output.producer()
    assert maker is not None
    add = make_node("Add", [layer.output, bias], [f"{layer.name}_corrected"])
    add.outputs[0].shape, add.outputs[0].type = layer.output.shape, layer.output.type
    graph.insert_after(maker, add)
    replace_value(layer.output, add.outputs[0])
    add.replace_input_with(0, layer.output)


def _as_integers(model: ir.Model, node: ir.Node, bias: ir.Value) -> ir.Value | None:
    """The bias of a convolution of integers: int32 in steps of input step x weight step; None for one of floats."""
    pairs = [producer(value, "DequantizeLinear") for value in node.inputs[:2]]
    steps = [constant(pair.inputs[1]) for pair in pairs if pair is not None]
    array = constant(bias)
    if len(steps) != 2 or steps[0] is None or steps[1] is None or array is None or steps[0].size != 1:
        return None
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    step = np.broadcast_to(np.asarray(steps[0].reshape(()) * steps[1], np.float32), array.shape)
    limits = np.iinfo(np.int32)
    codes = np.clip(np.rint(array / step.astype(np.float64)), limits.min, limits.max).astype(np.int32)
    inputs = [
        add_weight(model, graph, f"{bias.name}_int32", codes),
        add_weight(model, graph, f"{bias.name}_scale", step),
    ]
    back = make_node("DequantizeLinear", inputs, [f"{bias.name}_dequantized"], attributes={"axis": 0})
    graph.insert_before(node, back)
    return back.outputs[0]

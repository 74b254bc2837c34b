# SPDX-License-Identifier: Apache-2.0
"""Write a placement into the graph: pairs of QuantizeLinear and DequantizeLinear, and weights as integers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .graph import add_weight, attribute, consumers, is_op, make_node, producer, replace_node
from .matrix_weights import quantize_symmetric, transposed_once, write_gather
from .placement import Placement, Product


def write(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, tuple[float, np.ndarray]],
    *,
    per_channel: bool,
    bits: int,
    integer_bias: bool,
) -> None:
    """Carry out `placement`.

    Args:
        model: Changed in place; the caller sorts it and drops what is no longer read.
        placement: Of this very graph.
        ranges: Name of each measured value -> (scale, zero point in its integer type).
        per_channel: One weight scale an output channel.
        bits: Of the weights.
        integer_bias: Biases become int32, whose scale is the product of those of input and weight.
    """
    # Names now: values that the graph returns give theirs away
    sources = {value: str(root.name) for value, root in placement.flowing.items()}
    sources |= {value: str(value.name) for value in placement.read if value not in sources}
    weights = _Weights(model, per_channel, bits)
    groups = _by_weight(placement.products)
    for product in placement.products:
        source = product.node.inputs[0]
        if integer_bias and source in sources:
            product.input_scale = ranges[sources[source]][0]
    for weight, products in groups.items():
        if products[0].kind == "conv":
            weights.write_convolutions(weight, products)
    pairs = _Pairs(model, ranges)
    # Readers first, while their inputs are still the values that were placed
    for value, readers in placement.read.items():
        if value not in placement.flowing:
            pair = pairs.behind(value, sources[value])
            for node, index in readers:
                node.replace_input_with(index, pair)
    for value in placement.flowing:
        readers = [(use.node, use.idx) for use in value.uses()]
        returned = value.is_graph_output()
        pair = pairs.behind(value, sources[value])
        for node, index in readers:
            node.replace_input_with(index, pair)
        if returned:
            _return_instead(model, value, pair)
    for weight, products in groups.items():
        if products[0].kind != "conv":
            weights.write_matrix(weight, products)


def _by_weight(products: list[Product]) -> dict[ir.Value, list[Product]]:
    found: dict[ir.Value, list[Product]] = {}
    for product in products:
        if product.weight is not None:
            found.setdefault(product.weight, []).append(product)
    return found


def _return_instead(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    name, new.shape, new.type = old.name, old.shape, old.type
    old.name, new.name = f"{name}_float", name
    for index, value in enumerate(model.graph.outputs):
        if value is old:
            model.graph.outputs[index] = new


class _Pairs:
    """QuantizeLinear and DequantizeLinear behind values, one pair a value, scales shared by name."""

    def __init__(self, model: ir.Model, ranges: Mapping[str, tuple[float, np.ndarray]]) -> None:
        self.model, self.ranges = model, ranges
        self._constants: dict[str, tuple[ir.Value, ir.Value]] = {}

    def behind(self, value: ir.Value, source: str) -> ir.Value:
        """The dequantized twin of `value`, on the scale of the value that was called `source`."""
        graph, name = self.model.graph, str(value.name)
        scale, zero = self._scale(source)
        assert zero.dtype is not None
        maker = value.producer()
        quantize = self._pad_integers(maker, scale, zero)
        if quantize is None:
            quantize = make_node("QuantizeLinear", [value, scale, zero], [f"{name}_quantized"])
        integers = quantize.outputs[0]
        back = make_node("DequantizeLinear", [integers, scale, zero], [f"{name}_dequantized"])
        integers.shape, integers.type = value.shape, ir.TensorType(zero.dtype)
        back.outputs[0].shape, back.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        if maker is not None:
            graph.insert_after(maker, [quantize, back])
        else:
            graph.insert_before(graph[0], [quantize, back])
        return back.outputs[0]

    def _pad_integers(self, pad: ir.Node | None, scale: ir.Value, zero: ir.Value) -> ir.Node | None:
        """`pad` on integers, which ONNX Runtime does not make of pairs around it; None for every other node."""
        before = producer(pad.inputs[0], "DequantizeLinear") if pad is not None and is_op(pad, "Pad") else None
        if pad is None or before is None or before.inputs[1] is not scale:
            return None
        if zero.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
            return None
        inputs = [before.inputs[0], *pad.inputs[1:]] + [None] * (3 - len(pad.inputs))
        if attribute(pad, "mode", "constant") == "constant":
            inputs[2] = zero
        attributes = {key: value.value for key, value in pad.attributes.items()}
        return make_node("Pad", inputs, [f"{pad.outputs[0].name}_quantized"], attributes=attributes)

    def _scale(self, name: str) -> tuple[ir.Value, ir.Value]:
        if name not in self._constants:
            scale, zero = self.ranges[name]
            self._constants[name] = (
                add_weight(self.model, self.model.graph, f"{name}_scale", np.asarray(scale, np.float32)),
                add_weight(self.model, self.model.graph, f"{name}_zero_point", zero),
            )
        return self._constants[name]


class _Weights:
    """Weights as int8, and biases as int32, behind a DequantizeLinear."""

    def __init__(self, model: ir.Model, per_channel: bool, bits: int) -> None:
        self.model, self.per_channel, self.bits = model, per_channel, bits
        self._zeros: dict[tuple[object, ...], ir.Value] = {}

    def write_matrix(self, weight: ir.Value, readers: list[Product]) -> None:
        """One integer copy for all readers: transposed if every product reads it so, and no embedding does."""
        assert weight.const_value is not None
        home = weight.graph if isinstance(weight.graph, ir.Graph) else self.model.graph
        axis = readers[0].axis
        integers, scale = quantize_symmetric(
            weight.const_value.numpy(), axis=axis if self.per_channel else None, bits=self.bits
        )
        turn = all(reader.kind == "product_transposed" for reader in readers)
        stored = add_weight(self.model, home, f"{weight.name}_int8", integers.T if turn else integers)
        scales = add_weight(self.model, home, f"{weight.name}_scale", scale)
        rows: ir.Value | None = None
        for reader in readers:
            if reader.kind == "rows":
                if rows is None and self.per_channel:
                    rows = add_weight(self.model, home, f"{weight.name}_row_scale", scale.reshape(-1, 1))
                write_gather(reader.node, stored, scales if rows is None else rows, self.per_channel)
            else:
                matrix = stored if turn or reader.kind == "product" else transposed_once(home, stored)
                self._write_product(reader, self._dequantized(matrix, scales, 1, str(weight.name)), scale)
        weight.const_value = None if not weight.uses() else weight.const_value

    def _write_product(self, product: Product, matrix: ir.Value, scale: np.ndarray) -> None:
        node, addition = product.node, product.addition
        bias = self._integer_bias(product, scale)
        if is_op(node, "MatMul"):
            node.replace_input_with(1, matrix)
            if addition is None:
                return
            if bias is not None:
                addition.replace_input_with(next(i for i, v in enumerate(addition.inputs) if v is product.bias), bias)
            else:
                replace_node(addition, [make_node("Sum", list(addition.inputs), [f"{addition.outputs[0].name}_sum"])])
            return
        name, added = node.outputs[0].name, node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            new = [make_node("Gemm", [node.inputs[0], matrix, bias], [f"{name}_product"])]
        else:
            new = [make_node("MatMul", [node.inputs[0], matrix], [f"{name}_product"])]
            if added is not None:
                # Of an Add the runtime would make a Gemm again, whose bias is no integer; a Sum of two is the same
                op = "Add" if addition is None else "Sum"
                new.append(make_node(op, [new[0].outputs[0], added], [f"{name}_biased"]))
        new[0].name = node.name
        replace_node(node, new)

    def write_convolutions(self, weight: ir.Value, readers: list[Product]) -> None:
        """One integer copy for all convolutions that read a weight, and the bias of each."""
        assert weight.const_value is not None
        axis, array = readers[0].axis, weight.const_value.numpy()
        moved = np.moveaxis(array, axis, 0)
        flat = moved.reshape(moved.shape[0], -1)
        integers, scale = quantize_symmetric(flat, axis=0 if self.per_channel else None, bits=self.bits)
        wide = scale
        for reader in readers:
            least = self._least_scale(reader)
            wide = np.maximum(wide, least if self.per_channel else least.max()).astype(np.float32)
        if (wide > scale).any():
            scale = wide
            integers = np.rint(flat / (scale[:, None] if self.per_channel else scale)).astype(np.int8)
        integers = np.moveaxis(integers.reshape(moved.shape), 0, axis)
        stored = add_weight(self.model, self.model.graph, f"{weight.name}_int8", integers)
        scales = add_weight(self.model, self.model.graph, f"{weight.name}_scale", scale)
        matrix = self._dequantized(stored, scales, axis, str(weight.name))
        for reader in readers:
            reader.node.replace_input_with(1, matrix)
            bias = self._integer_bias(reader, scale)
            if bias is not None:
                reader.node.replace_input_with(2, bias)

    def _least_scale(self, product: Product) -> np.ndarray:
        """The finest weight scales, [channels] or [1], at which the bias fits in int32 and its scale in float32."""
        if product.bias is None or product.input_scale is None:
            return np.zeros(1)
        assert product.bias.const_value is not None
        size = np.abs(product.bias.const_value.numpy().astype(np.float64))
        # A channel of nearly zero weights has a scale so fine that its bias would overflow
        return np.asarray(np.maximum(size / 2**30, np.finfo(np.float32).tiny) / product.input_scale)

    def _integer_bias(self, product: Product, scale: np.ndarray) -> ir.Value | None:
        """DequantizeLinear of the bias as int32 [channels]; None without one, or where it does not fit."""
        bias, graph = product.bias, product.node.graph
        if bias is None or product.input_scale is None or bias.const_value is None:
            return None
        array = bias.const_value.numpy().astype(np.float64).reshape(-1)
        step = np.broadcast_to(np.asarray(scale * np.float32(product.input_scale), np.float32), array.shape)
        if (step < np.finfo(np.float32).tiny).any() or (np.abs(array) >= step * 2.0**31).any():
            return None
        assert isinstance(graph, ir.Graph)
        stored = add_weight(self.model, self.model.graph, f"{bias.name}_int32", np.rint(array / step).astype(np.int32))
        steps = add_weight(self.model, self.model.graph, f"{bias.name}_scale", step)
        zero = self._zero(array.shape, np.int32)
        back = make_node(
            "DequantizeLinear", [stored, steps, zero], [f"{bias.name}_dequantized"], attributes={"axis": 0}
        )
        back.outputs[0].shape, back.outputs[0].type = stored.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(product.node, back)
        return back.outputs[0]

    def _dequantized(self, stored: ir.Value, scales: ir.Value, axis: int, name: str) -> ir.Value:
        """DequantizeLinear(stored), made once for all readers."""
        for reader in consumers(stored):
            if is_op(reader, "DequantizeLinear"):
                return reader.outputs[0]
        assert scales.const_value is not None
        zero = self._zero(tuple(scales.const_value.shape.numpy()), np.int8)
        node = make_node("DequantizeLinear", [stored, scales, zero], [f"{name}_dequantized"], attributes={"axis": axis})
        node.outputs[0].shape, node.outputs[0].type = stored.shape, ir.TensorType(ir.DataType.FLOAT)
        maker = stored.producer()
        if maker is not None:
            self.model.graph.insert_after(maker, node)
        else:
            self.model.graph.insert_before(self.model.graph[0], node)
        return node.outputs[0]

    def _zero(self, shape: tuple[int, ...], dtype: type[np.integer]) -> ir.Value:
        """Zero points, which the runtime's fusions want to see though they are the default; shared by all."""
        if (shape, dtype) not in self._zeros:
            name = "_".join(["zero_point", np.dtype(dtype).name, *map(str, shape)])
            self._zeros[shape, dtype] = add_weight(self.model, self.model.graph, name, np.zeros(shape, dtype))
        return self._zeros[shape, dtype]

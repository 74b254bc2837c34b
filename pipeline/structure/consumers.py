# SPDX-License-Identifier: Apache-2.0
"""The linear layers that read the units of a group, and the Gram matrices of what they read.

A MatMul or Gemm reads vectors. A convolution reads patches: they are laid out by a convolution with a kernel of ones
and zeros in a copy of the graph, so that their Gram matrix is measured like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..passes.graph import attribute, constant, dims, is_op, is_weight
from ..passes.layer_inputs import inputs_of, rows_read
from ..passes.linear_layers import Layer, find_layers
from ..statistics import Calibration
from .groups import Group
from .surgeon import Linear


@dataclass(frozen=True)
class Consumer:
    """A weight whose input axis is cut with the group.

    Attributes:
        weight: The initializer.
        nodes: Who computes with it; several where a layer is shared.
        axis: Its input axis.
        layer: The one node with its bias; None where the bias cannot take up the mean.
        positions: Of each unit along `axis`, int64 [units, positions].
    """

    weight: ir.Value
    nodes: tuple[ir.Node, ...]
    axis: int
    layer: Layer | None
    positions: np.ndarray

    @property
    def name(self) -> str:
        return str(self.weight.name)

    def matrix(self) -> np.ndarray:
        """[K, N], float64."""
        assert self.weight.const_value is not None
        array = self.weight.const_value.numpy().astype(np.float64)
        moved = np.moveaxis(array, self.axis, 0) if array.ndim == 2 else np.moveaxis(array, 0, -1)
        return moved.reshape(-1, moved.shape[-1])

    def from_matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`, in the weight's own type."""
        assert self.weight.const_value is not None
        shape = tuple(int(n) for n in self.weight.const_value.shape.numpy())
        if len(shape) == 2:
            array = matrix if self.axis == 0 else matrix.T
        else:
            array = np.moveaxis(matrix.reshape(*shape[1:], shape[0]), -1, 0)
        return np.ascontiguousarray(array).astype(self.weight.const_value.dtype.numpy())

    def rows(self) -> np.ndarray:
        """Of each unit in `matrix`, int64 [units, rows]."""
        assert self.weight.const_value is not None
        shape = self.weight.const_value.shape.numpy()
        kernel = int(np.prod(shape[2:])) if len(shape) > 2 else 1
        spread = self.positions[:, :, None] * kernel + np.arange(kernel)
        return spread.reshape(len(self.positions), -1)

    def bias(self) -> np.ndarray | None:
        """float64 [N], zeros where a bias can be added; None where there is no place for one."""
        if self.layer is None:
            return None
        if self.layer.reader is None:
            return np.zeros(self.matrix().shape[1])
        node, index = self.layer.reader
        array = constant(node.inputs[index])
        return None if array is None else array.astype(np.float64).reshape(-1)


def consumers_of(model: ir.Model, group: Group) -> list[Consumer]:
    """The layers that read the group's units and can be refitted, in graph order."""
    layers = {layer.node: layer for layer in find_layers(model)}
    found = []
    for cut in group.cuts:
        value = model.graph.initializers.get(cut.tensor)
        if value is None or not is_weight(value):
            continue
        uses = list(value.uses())
        axes = {_input_axis(use.node, use.idx) for use in uses}
        if axes != {cut.axis}:
            continue
        nodes = tuple(use.node for use in uses)
        layer = layers.get(nodes[0]) if len(nodes) == 1 else None
        found.append(Consumer(value, nodes, cut.axis, _usable(layer), cut.positions))
    return found


def _usable(layer: Layer | None) -> Layer | None:
    """The layer, if its bias is a plain one of its own, or one can be given to it without a node more."""
    if layer is None or layer.problem is not None or layer.bias == "integers":
        return None
    if layer.reader is None:
        return layer if is_op(layer.node, "Conv", "Gemm") else None
    node, index = layer.reader
    bias = node.inputs[index]
    alone = bias is not None and len(bias.uses()) == 1
    plain = not is_op(node, "Gemm") or attribute(node, "beta", 1.0) == 1.0
    return layer if alone and plain else None


def _input_axis(node: ir.Node, index: int) -> int | None:
    """Which axis of its weight a node sums over, if it is a layer whose input can be measured."""
    shape = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    if index != 1 or shape is None:
        return None
    if is_op(node, "MatMul") and len(shape) == 2:
        return 0
    if is_op(node, "Gemm") and not attribute(node, "transA", 0) and attribute(node, "alpha", 1.0) == 1.0:
        return 1 if attribute(node, "transB", 0) else 0
    if is_op(node, "Conv") and attribute(node, "group", 1) == 1:
        return 1
    return None


def measure(model: ir.Model, consumers: Sequence[Consumer], calibration: Calibration, widest: int) -> dict[str, Linear]:
    """What the consumers read on the calibration data, by the weight's name.

    Args:
        model: The graph as it is now; stays as it is.
        consumers: Of this very model.
        calibration: Data without labels.
        widest: Layers with more inputs (times kernel) are left out: their Gram matrix would not fit.
    """
    copy = model.clone()
    values = {str(v.name): v for v in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    readings = [_reading(copy, c, values) for c in consumers if len(c.matrix()) <= widest]
    linear = {}
    for found in inputs_of(copy, readings, calibration, channels=True):
        if found.gram is not None and found.mean is not None and found.rows:
            for reading in found.layers:
                linear[reading.consumer.name] = _linear(reading.consumer, found.gram, found.rows, found.mean)
    return linear


@dataclass(frozen=True)
class _Reading:
    """A consumer, and the values of a copy of the graph that hold what it multiplies as rows."""

    consumer: Consumer
    inputs: tuple[ir.Value, ...]


def _reading(copy: ir.Model, consumer: Consumer, values: dict[str, ir.Value]) -> _Reading:
    inputs = []
    for node in consumer.nodes:
        value = values[str(node.inputs[0].name)]  # type: ignore[union-attr]
        if is_op(node, "Conv"):
            shape = [int(n) for n in consumer.weight.const_value.shape.numpy()]  # type: ignore[union-attr]
            plain = all(size == 1 for size in shape[2:]) and _keeps_places(node)
            width = int(np.prod(shape[1:]))
            kernels = None if plain else np.eye(width, dtype=np.float32).reshape(width, *shape[1:])
            value = rows_read(copy, node, value, f"{node.outputs[0].name}_rows", kernels)
        inputs.append(value)
    return _Reading(consumer, tuple(inputs))


def _linear(consumer: Consumer, gram: np.ndarray, count: int, mean: np.ndarray) -> Linear:
    matrix, rows, bias = consumer.matrix(), consumer.rows(), consumer.bias()
    if bias is None or len(bias) != matrix.shape[1]:
        return Linear(gram, matrix, rows)
    total = (count * mean).reshape(-1, 1)
    with_one = np.block([[gram, total], [total.T, np.full((1, 1), float(count))]])
    return Linear(with_one, np.concatenate([matrix, bias[None]]), rows, fixed=1)


def _keeps_places(node: ir.Node) -> bool:
    """Whether a pointwise convolution reads every position once."""
    strides, pads = attribute(node, "strides", ()), attribute(node, "pads", ())
    automatic = attribute(node, "auto_pad", "NOTSET")
    return all(s == 1 for s in strides) and not any(pads) and automatic in ("NOTSET", "VALID", b"NOTSET", b"VALID")

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

from ..passes.graph import add_weight, attribute, constant, dims, is_op, is_weight, make_node
from ..passes.linear_layers import Layer, find_layers
from ..statistics import Calibration, Gram, Wanted
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
    plans = {c.name: c for c in consumers if len(c.matrix()) <= widest}
    copy, names = _with_patches(model, plans)
    grams: dict[str, Gram] = {}
    means: dict[str, np.ndarray] = {}
    every = list(dict.fromkeys(name for many in names.values() for name in many))
    for group in calibration.gram_groups(copy, every):
        found = calibration.collect(copy, Wanted(grams=group, channels=dict.fromkeys(group, -1)))
        for name in group:
            if name in found.grams and name in found.channels and name not in found.missing:
                grams[name] = found.grams[name]
                means[name] = found.channels[name].mean
    linear = {}
    for weight, many in names.items():
        if all(name in grams and grams[name].rows for name in many):
            linear[weight] = _linear(plans[weight], [(grams[n], means[n]) for n in many])
    return linear


def _linear(consumer: Consumer, parts: Sequence[tuple[Gram, np.ndarray]]) -> Linear:
    matrix, rows, bias = consumer.matrix(), consumer.rows(), consumer.bias()
    gram = sum(part.matrix for part, _ in parts)
    assert isinstance(gram, np.ndarray)
    if bias is None or len(bias) != matrix.shape[1]:
        return Linear(gram, matrix, rows)
    count = float(sum(part.rows for part, _ in parts))
    total = np.asarray(sum(part.rows * mean for part, mean in parts)).reshape(-1, 1)
    with_one = np.block([[gram, total], [total.T, np.full((1, 1), count)]])
    return Linear(with_one, np.concatenate([matrix, bias[None]]), rows, fixed=1)


def _with_patches(model: ir.Model, consumers: dict[str, Consumer]) -> tuple[ir.Model, dict[str, list[str]]]:
    """A copy of the graph in which every convolution's patches are a value, and what each weight's nodes read."""
    copy = model.clone()
    weights = {str(name): value for name, value in copy.graph.initializers.items()}
    names: dict[str, list[str]] = {}
    place = {node: number for number, node in enumerate(copy.graph)}
    for name in consumers:
        read = []
        for node in sorted((use.node for use in weights[name].uses()), key=lambda node: place[node]):
            read.append(_patches(copy, node) if is_op(node, "Conv") else str(node.inputs[0].name))  # type: ignore[union-attr]
        names[name] = read
    return copy, names


def _patches(model: ir.Model, node: ir.Node) -> str:
    """Write what a convolution reads as rows, [..., channels x kernel], and return its name."""
    weight, data = node.inputs[1], node.inputs[0]
    assert weight is not None
    assert data is not None
    assert weight.const_value is not None
    shape = [int(n) for n in weight.const_value.shape.numpy()]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if all(size == 1 for size in shape[2:]) and _keeps_places(node):
        value, last = data, None
    else:
        width = int(np.prod(shape[1:]))
        kernel = np.eye(width, dtype=weight.const_value.dtype.numpy()).reshape(width, *shape[1:])
        ones = add_weight(model, graph, f"{node.outputs[0].name}_kernel", kernel)
        laid = make_node("Conv", [data, ones], [f"{node.outputs[0].name}_patches"])
        laid.attributes.update({name: a for name, a in node.attributes.items() if name != "group"})
        graph.insert_before(node, laid)
        value, last = laid.outputs[0], width
    order = [0, *range(2, len(shape)), 1]
    turned = make_node("Transpose", [value], [f"{node.outputs[0].name}_rows"], attributes={"perm": order})
    turned.outputs[0].type = data.type
    sizes: list[int | None] = [None] * (len(shape) - 1)
    turned.outputs[0].shape = ir.Shape([*sizes, last or shape[1]])
    graph.insert_before(node, turned)
    return str(turned.outputs[0].name)


def _keeps_places(node: ir.Node) -> bool:
    """Whether a pointwise convolution reads every position once."""
    strides, pads = attribute(node, "strides", ()), attribute(node, "pads", ())
    automatic = attribute(node, "auto_pad", "NOTSET")
    return all(s == 1 for s in strides) and not any(pads) and automatic in ("NOTSET", "VALID", b"NOTSET", b"VALID")

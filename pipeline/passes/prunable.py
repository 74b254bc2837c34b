# SPDX-License-Identifier: Apache-2.0
"""Weights whose single elements can be pruned: matrices, convolutions, embeddings; and the activations that they meet.

Every weight is looked at as a matrix [outputs, K]. K counts inputs; for a convolution, the elements of a patch: its
kernel's positions, and at each of them the channels, so that neighbours in N:M are channels, as hardware wants it.

What a convolution multiplies are patches. For one without groups they are made in the graph, by a convolution with
one-hot kernels and the same strides, padding and dilations, so that the Gram matrix of the patches is exact. Where that
would be too large, and for grouped convolutions, only the squared norm of each channel is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..quantization.gptq import Feedback, feedback_of
from ..statistics import Calibration
from .graph import attribute, initializers_of, is_op, is_weight, label, nodes_of, producer
from .layer_inputs import inputs_of, rows_read
from .matrix_weights import uses_of, weights_in_use, why_no_matrix, why_unfit

_MOST_PATCH = 2304
"""Elements of a patch (256 channels, 3 x 3) up to which its Gram matrix is measured."""

Kind = Literal["matrix", "convolution", "rows"]


@dataclass(eq=False)
class Prunable:
    """A weight.

    Attributes:
        key: Its name in plans.
        weight: float32.
        nodes: All of its readers (Transposes seen through).
        kind: By what it is read; `rows` by nothing but Gathers.
        axis: Of a matrix: which one counts outputs (or rows).
    """

    key: str
    weight: ir.Value
    nodes: list[ir.Node]
    kind: Kind
    axis: int = 0

    def array(self) -> np.ndarray:
        assert self.weight.const_value is not None
        return self.weight.const_value.numpy()

    def matrix(self) -> np.ndarray:
        """float32 [outputs, K]; a view where possible."""
        array = self.array()
        if self.kind == "convolution":
            return np.moveaxis(array, 1, -1).reshape(len(array), -1)
        return array if self.axis == 0 else array.T

    def as_stored(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix [outputs, K] in the weight's own layout."""
        if self.kind == "convolution":
            outputs, channels, *kernel = self.array().shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(outputs, *kernel, channels), -1, 1))
        return np.ascontiguousarray(matrix if self.axis == 0 else matrix.T)

    @property
    def neighbours(self) -> int:
        """Along how many inputs N:M runs before it begins anew."""
        shape = self.array().shape
        return int(shape[1] if self.kind != "matrix" else shape[1 - self.axis])

    @property
    def patches(self) -> bool:
        """Whether the Gram matrix of its patches is measured."""
        size = self.array()[0].size
        return size <= _MOST_PATCH and all(attribute(node, "group", 1) == 1 for node in self.nodes)


@dataclass(eq=False)
class Measured:
    """What data says about the input of some layers.

    Attributes:
        gram: float64 [K, K]; of a convolution whose patches are not measured, that of its channels [C, C].
        whole: Whether `gram` is that of all K.
        damping: See `feedback_of`.
    """

    gram: np.ndarray
    whole: bool
    damping: float

    @cached_property
    def feedback(self) -> Feedback | None:
        return feedback_of(self.gram, damping=self.damping)

    def norms(self, layer: Prunable) -> np.ndarray:
        """|| X_j || for each weight: float32, [1, K] or [outputs, K]."""
        norms = np.sqrt(np.diag(self.gram)).astype(np.float32)
        if self.whole:
            return norms[None]
        outputs, channels, *kernel = layer.array().shape
        groups = norms.reshape(-1, channels)
        tiled = np.tile(groups, (1, math.prod(kernel)))
        return np.repeat(tiled, outputs // len(groups), axis=0)


@dataclass
class _Reading:
    """A layer, and the values of a graph that are observed for it."""

    layer: Prunable
    inputs: tuple[ir.Value, ...]


def measured(
    model: ir.Model, layers: Sequence[Prunable], calibration: Calibration, damping: float
) -> Iterator[tuple[Prunable, Measured | str]]:
    """Measure the inputs of `layers` on the calibration data; for each, in some order, what was found or why not."""
    copy = model.clone()
    values = {str(v.name): v for v in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    made: dict[str, ir.Value] = {}
    readings = []
    for layer in layers:
        if layer.kind == "rows":
            yield layer, "an embedding is not multiplied by anything"
        elif any(node.graph is not model.graph or _input_name(node) not in values for node in layer.nodes):
            yield layer, "its input is inside a subgraph, or a constant"
        else:
            readings.append(_Reading(layer, _observed(copy, layer, values, made)))
    # What comes later is not run, and its weights need not be written
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(dict.fromkeys(value for reading in readings for value in reading.inputs))
    RemoveUnusedNodesPass()(copy)
    for inputs in inputs_of(copy, readings, calibration):
        whole = all(r.layer.kind == "matrix" or r.layer.patches for r in inputs.layers)
        found = None if inputs.gram is None else Measured(inputs.gram, whole, damping)
        for reading in inputs.layers:
            yield reading.layer, found or str(inputs.missing)


def _input_name(node: ir.Node) -> str:
    return str(node.inputs[0].name) if node.inputs[0] is not None else ""


def _observed(
    copy: ir.Model, layer: Prunable, values: dict[str, ir.Value], made: dict[str, ir.Value]
) -> tuple[ir.Value, ...]:
    """The values whose last axis meets the layer's weight, once each; those of convolutions are made in `copy`."""
    found = []
    for node in layer.nodes:
        value = values[_input_name(node)]
        if layer.kind == "convolution":
            value = _unfolded(copy, layer, node, value, made)
        found.append(value)
    return tuple(dict.fromkeys(found))


def _unfolded(copy: ir.Model, layer: Prunable, node: ir.Node, value: ir.Value, made: dict[str, ir.Value]) -> ir.Value:
    """Patches [batch, ..., K] of a convolution's input, or its channels [batch, ..., C]; once for each geometry."""
    _, channels, *kernel = layer.array().shape
    if not layer.patches:
        name, kernels = f"{value.name}_channels", None
    else:
        settings = [a for name, a in sorted(node.attributes.items()) if name not in ("group", "kernel_shape")]
        name = f"{value.name}_patches_{kernel}_{[(a.name, a.value) for a in settings]}"
        width = channels * math.prod(kernel)
        kernels = np.moveaxis(np.eye(width, dtype=np.float32).reshape(width, *kernel, channels), -1, 1)
    if name not in made:
        made[name] = rows_read(copy, node, value, name, kernels)
    return made[name]


def stages(model: ir.Model, layers: Sequence[Prunable]) -> Iterator[list[Prunable]]:
    """Cut front to back: no layer stands behind another of the same stage. Layers in subgraphs come last."""
    owner = {node: layer for layer in layers for node in layer.nodes}
    waiting = dict.fromkeys(layers)
    stage: list[Prunable] = []
    behind: set[ir.Value] = set()
    for node in model.graph:
        follows = any(value in behind for value in node.inputs) or (bool(behind) and _has_subgraph(node))
        layer = owner.get(node)
        if layer in waiting:
            assert layer is not None
            if follows:
                yield stage
                stage, behind = [], set()
            stage.append(layer)
            del waiting[layer]
        if follows or layer in stage:
            behind.update(node.outputs)
    if stage or waiting:
        yield stage + list(waiting)


def _has_subgraph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(a.type in kinds for a in node.attributes.values())


@dataclass(frozen=True)
class Choice:
    """Which weights are to be pruned: see the settings of `prune_magnitude`."""

    operators: Collection[str]
    exclude: tuple[str, ...]
    minimum_elements: int

    def find(self, model: ir.Model) -> Iterator[Prunable | tuple[list[ir.Node], str]]:
        """Every candidate: a layer, or nodes with the reason why their weight stays as it is."""
        keys = {value: key for key, value in initializers_of(model).items()}
        matrices, seen = weights_in_use(model), set()
        for node in nodes_of(model):
            for weight in _weights_of(node):
                if weight in seen or weight not in keys:
                    continue
                seen.add(weight)
                layer = self._matrix(weight, keys[weight]) if weight in matrices else _convolution(weight, keys[weight])
                if isinstance(layer, Prunable):
                    reason = self._why_not(layer)
                    yield layer if reason is None else (layer.nodes, reason)
                elif layer[0]:
                    yield layer
            reason = why_no_matrix(node) if is_op(node, "MatMul", "Gemm") else None
            if reason:
                yield [node], reason

    def _matrix(self, weight: ir.Value, key: str) -> Prunable | tuple[list[ir.Node], str]:
        uses = uses_of(weight)
        nodes = [use.node for use in uses if is_op(use.node, "MatMul", "Gemm", "Gather") and use.kind != "bias"]
        problem = next((use.problem for use in uses if use.problem), None)
        if problem or len({use.axis for use in uses}) > 1:
            return nodes, problem or "its readers see its inputs along different axes"
        products = [use.node for use in uses if use.kind != "rows"]
        return Prunable(key, weight, products or nodes, "matrix" if products else "rows", uses[0].axis)

    def _why_not(self, layer: Prunable) -> str | None:
        names = {str(layer.weight.name), *(label(node) for node in layer.nodes)}
        for node in (*layer.nodes, *(use.node for use in layer.weight.uses())):
            if node.op_type not in self.operators and node.op_type != "Transpose":
                return f"{node.op_type} is not among the operators to prune"
        if any(fnmatchcase(name, pattern) for pattern in self.exclude for name in names):
            return "excluded by name"
        return why_unfit(layer.weight, self.minimum_elements)


def _weights_of(node: ir.Node) -> Iterator[ir.Value]:
    """The weights that a node of the prunable types reads, a Transpose between them seen through."""
    is_conv = is_op(node, "Conv")
    positions = (0,) if is_op(node, "Gather") else (1,) if is_conv else (0, 1) if is_op(node, "MatMul", "Gemm") else ()
    for position in positions:
        turned = producer(node.inputs[position], "Transpose")
        value = node.inputs[position] if turned is None else turned.inputs[0]
        if value is not None and is_weight(value) and value.const_value is not None:
            rank = len(value.const_value.shape)
            if value.const_value.dtype.is_floating_point() and (rank >= 3 if is_conv else rank == 2):
                yield value


def _convolution(weight: ir.Value, key: str) -> Prunable | tuple[list[ir.Node], str]:
    nodes = [use.node for use in weight.uses()]
    if weight.is_graph_output():
        return nodes, "the weight is an output of the graph"
    if any(not is_op(use.node, "Conv") or use.idx != 1 for use in weight.uses()):
        return [node for node in nodes if is_op(node, "Conv")], "the weight is also read by others than convolutions"
    if len({attribute(node, "group", 1) for node in nodes}) > 1:
        return nodes, "the convolutions that share the weight differ in their groups"
    return Prunable(key, weight, nodes, "convolution")

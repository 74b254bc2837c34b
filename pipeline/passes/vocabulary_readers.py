# SPDX-License-Identifier: Apache-2.0
"""Where a graph depends on the vocabulary: the tables that token ids pick rows of, and layers that score all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..renumbering import TOKEN_IDS
from .base import Left
from .graph import attribute, constant, consumers, dims, is_op, is_weight, label, only_consumer, producer
from .matrix_weights import WeightUse, uses_of, weights_in_use

_SAME_IDS = ("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand")
_NOT_THE_IDS = ("Shape", "Size", "ArgMax", "ArgMin")
"""What these make of ids is the same for new ids, whose order is that of the old ones."""

_COMPARISONS = ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
_CLEAN_BEFORE = "put the clean pass before"


@dataclass
class OutputLayer:
    """A product that scores every token, up to the graph's output.

    Attributes:
        output: Name of the graph's output.
        weights: Name of each weight on the way to the axis that counts tokens.
        values: Names of the values on the way, whose last axis counts tokens.
    """

    output: str
    weights: dict[str, int] = field(default_factory=dict)
    values: list[str] = field(default_factory=list)


@dataclass
class VocabularyReaders:
    """All that has to change when token ids do.

    Attributes:
        tables: Weights of which token ids pick rows, [tokens, ...].
        comparisons: Nodes that compare token ids with constants, and the input that holds the constant.
        layers: See `OutputLayer`.
        problems: Nodes that make it impossible, and why.
    """

    tables: list[ir.Value] = field(default_factory=list)
    comparisons: list[tuple[ir.Node, int]] = field(default_factory=list)
    layers: list[OutputLayer] = field(default_factory=list)
    problems: list[Left] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Of the smallest table."""
        return min(_shape(table)[0] for table in self.tables)

    def compared_ids(self) -> set[int]:
        """The token ids that the graph itself knows."""
        arrays = (constant(node.inputs[index]) for node, index in self.comparisons)
        return {int(number) for array in arrays if array is not None for number in array.ravel()}


def vocabulary_readers(model: ir.Model) -> VocabularyReaders:
    """Follow the graph's input `input_ids` to all of its readers, and look for layers over the vocabulary."""
    found = VocabularyReaders()
    ids = next((value for value in model.graph.inputs if value.name == TOKEN_IDS), None)
    if ids is None:
        return found
    waiting, seen = [ids], {ids}
    while waiting:
        value = waiting.pop(0)
        if value.is_graph_output():
            found.problems.append(Left(str(value.name), "the graph returns the token ids"))
        for use in value.uses():
            if _carries_ids(use.node, use.idx):
                new = use.node.outputs[0]
                waiting += [new] if new not in seen else []
                seen.add(new)
            else:
                _classify(use.node, use.idx, found)
    _find_layers(model, found)
    return found


def _carries_ids(node: ir.Node, index: int) -> bool:
    if is_op(node, "Cast"):
        return ir.DataType(attribute(node, "to", 0)) in (ir.DataType.INT64, ir.DataType.INT32)
    return index == 0 and is_op(node, *_SAME_IDS, "Gather")


def _classify(node: ir.Node, index: int, found: VocabularyReaders) -> None:
    """Sort one reader of token ids in."""
    if is_op(node, *_NOT_THE_IDS):
        return
    if is_op(node, "Gather") and index == 1:
        table = node.inputs[0]
        if not is_weight(table):
            quantized = producer(table, "DequantizeLinear", "DynamicQuantizeLinear")
            reason = "put prune_vocabulary before quantizing" if quantized else _CLEAN_BEFORE
            found.problems.append(Left(label(node), f"what the token ids pick from is no weight; {reason}"))
        elif attribute(node, "axis", 0) != 0:
            found.problems.append(Left(label(node), "the token ids do not pick rows"))
        elif table is not None and table not in found.tables:
            found.tables.append(table)
    elif is_op(node, *_COMPARISONS) and constant(node.inputs[1 - index]) is not None:
        found.comparisons.append((node, 1 - index))
    else:
        found.problems.append(Left(label(node), f"{node.op_type} reads the token ids and would take them for others"))


def _find_layers(model: ir.Model, found: VocabularyReaders) -> None:
    sizes = {_shape(table)[0] for table in found.tables}
    for table in found.tables:
        for problem in _other_readers(table):
            found.problems.append(problem)
    for weight, uses in weights_in_use(model).items():
        for use in uses:
            tied = weight in found.tables and use.kind != "rows"
            if (tied or _shape(weight)[use.axis] in sizes) and use.kind.startswith("product") and not use.problem:
                layer = _followed(weight, use)
                if layer is not None:
                    found.layers.append(layer)
                elif tied:
                    reason = "the embedding is a product's weight too, whose result does not go straight to an output"
                    found.problems.append(Left(label(use.node), reason))
    known = {layer.output for layer in found.layers}
    for output in model.graph.outputs:
        if output.name not in known and (dims(output) or (None,))[-1] in sizes:
            reason = "the output counts as many as there are tokens, and the layer that makes it is not a plain product"
            found.problems.append(Left(str(output.name), f"{reason}; put prune_vocabulary before quantizing"))


def _other_readers(table: ir.Value) -> Iterator[Left]:
    """Readers of an embedding that are neither lookups by token ids nor products."""
    for use in uses_of(table) if len(_shape(table)) == 2 else [_lookup(node) for node in consumers(table)]:
        if use.problem or (use.kind == "rows" and not _looks_up_tokens(use.node)):
            yield Left(label(use.node), use.problem or "it picks rows of the embedding by other numbers than token ids")


def _lookup(node: ir.Node) -> WeightUse:
    problem = None if is_op(node, "Gather") else f"the embedding is also read by {node.op_type}"
    return WeightUse(node, "rows", 0, problem)


def _looks_up_tokens(node: ir.Node) -> bool:
    value = node.inputs[1]
    while value is not None and not value.is_graph_input():
        made = value.producer()
        if made is None or not _carries_ids(made, 0):
            return False
        value = made.inputs[0]
    return value is not None and value.name == TOKEN_IDS


def _shape(weight: ir.Value) -> tuple[int, ...]:
    assert weight.const_value is not None
    return tuple(weight.const_value.shape.numpy())


def _followed(weight: ir.Value, use: WeightUse) -> OutputLayer | None:
    """The layer from a product to the graph's output, or None if something else comes in between."""
    value, size = use.node.outputs[0], _shape(weight)[use.axis]
    layer = OutputLayer("", {str(weight.name): use.axis}, [str(value.name)])
    bias = use.node.inputs[2] if is_op(use.node, "Gemm") and len(use.node.inputs) > 2 else None
    if bias is not None and not _add_weight(layer, bias, size):
        return None
    while not value.is_graph_output():
        node = only_consumer(value)
        if node is None or not is_op(node, "Add", "Sum", "Mul", "Div", "Sub", "Cast", "Identity"):
            return None
        if not all(other is value or (other and _add_weight(layer, other, size)) for other in node.inputs):
            return None
        value = node.outputs[0]
        layer.values.append(str(value.name))
    layer.output = str(value.name)
    return None if value.uses() else layer


def _add_weight(layer: OutputLayer, value: ir.Value, size: int) -> bool:
    """Whether `value` is a number, or a weight with one number a token, which the layer then owns."""
    array = constant(value)
    if array is None:
        return False
    if array.size == 1:
        return True
    if not is_weight(value) or array.shape[-1] != size or len(set(consumers(value))) != 1:
        return False
    layer.weights[str(value.name)] = array.ndim - 1
    return True


def renumbered(array: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Old token ids, all of them kept, as new ones."""
    return np.searchsorted(kept, array)

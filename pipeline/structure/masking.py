# SPDX-License-Identifier: Apache-2.0
"""The same cut as a mask: nothing gets smaller, and what would be cut is zero. The oracle that slicing is held to.

Each value keeps its shape, and what would be cut of it is set to zero behind the operator that makes it. The one thing
that zeros alone cannot express is a mean over an axis that lost positions; it is taken over those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.graph import add_weight, attribute, is_op, make_node, replace_value
from .groups import Structure
from .units import Ids

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
          "SkipSimplifiedLayerNormalization")  # fmt: skip


def mask(structure: Structure, removed: Mapping[str, Sequence[int]]) -> ir.Model:
    """Mask units in the structure's own graph (in place), and return it.

    Outputs equal those of the cut graph to float tolerance; tests hold every rule to that.
    """
    masker = _Masker(structure, removed)
    for value, array in structure.walk.constants.items():
        masker.constant(value, array)
    for node in list(structure.model.graph):
        masker.node(node)
    return structure.model


def masked_weights(structure: Structure, removed: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Weight name to its array with zeros where the cut would be: what a PyTorch module's parameters are set to.

    Names are the parameters' own, with `.T` behind those that were transposed. It is the whole cut for all groups but
    those of kind `hidden`, which norms average over.
    """
    masker = _Masker(structure, removed)
    found = {}
    for value, array in structure.walk.constants.items():
        masked = masker.masked(array, structure.walk.axes[value] or [])
        if masked is not None:
            found[str(value.name)] = masked
    return found


class _Masker:
    def __init__(self, structure: Structure, removed: Mapping[str, Sequence[int]]) -> None:
        self.model, self.walk, self.axes = structure.model, structure.walk, dict(structure.walk.axes)
        self.kept = structure.kept(removed)

    def masked(self, array: np.ndarray, axes: Sequence[Ids | None]) -> np.ndarray | None:
        """The array with zeros; None if nothing of it goes."""
        result = None
        for axis, units in enumerate(axes):
            if units is not None and not (stay := self.kept(units)).all():
                result = np.array(array) if result is None else result
                np.moveaxis(result, axis, 0)[~stay] = 0
        return result

    def constant(self, value: ir.Value, array: np.ndarray) -> None:
        masked = self.masked(array, self.axes[value] or [])
        if masked is None:
            return
        if value.const_value is not None:
            value.const_value = ir.Tensor(masked, name=value.name)
        else:
            new = add_weight(self.model, self.model.graph, str(value.name), masked)
            self.axes[new] = self.axes[value]
            value.replace_all_uses_with(new)

    def node(self, node: ir.Node) -> None:
        if is_op(node, "ReduceMean"):
            self._mean(node)
        elif node.op_type in _NORMS:
            self._norm(node)
        elif node.op_type == "EmbedLayerNormalization":
            self._embedding(node)
        if node.graph is None:
            return
        for value in list(node.outputs):
            self._mask_value(value)

    def _mask_value(self, value: ir.Value) -> None:
        """Zeros along every axis whose length is the same in every run; an axis merged with the batch is in between."""
        own = self.axes.get(value) or []
        if value.dtype is not None and not value.dtype.is_floating_point():
            return
        fixed = [axis for axis in range(len(own)) if self.walk.fixed(value, axis)]
        for axis, units in enumerate(own):
            if units is not None and axis in fixed and not (stay := self.kept(units)).all():
                value = self._times(value, stay, axis, len(own))

    def _times(self, value: ir.Value, stay: np.ndarray, axis: int, rank: int) -> ir.Value:
        shape = [-1 if place == axis else 1 for place in range(rank)]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        graph = self.model.graph
        choice = add_weight(self.model, graph, f"{value.name}_mask", stay.reshape(shape))
        zero = add_weight(self.model, graph, f"{value.name}_zero", np.zeros([1] * rank, dtype))
        # Where, not a product: 0 / 0 and log 0 of what is masked must not come through
        new = make_node("Where", [choice, value, zero], [f"{value.name}_masked"])
        self._behind(value, new, 1)
        return new.outputs[0]

    def _behind(self, value: ir.Value, new: ir.Node, index: int = 0) -> None:
        """Put `new`, which reads `value` as input `index`, between it and all its readers."""
        maker = value.producer()
        assert maker is not None
        new.outputs[0].type, new.outputs[0].shape = value.type, value.shape
        self.axes[new.outputs[0]] = self.axes.get(value)
        self.model.graph.insert_after(maker, new)
        replace_value(value, new.outputs[0])
        new.replace_input_with(index, value)

    def _mean(self, node: ir.Node) -> None:
        """Sum of what stays, by its number."""
        data, out = self.axes.get(node.inputs[0]) or [], node.outputs[0]  # type: ignore[arg-type]
        share = np.prod([float(self.kept(u).mean()) for u in self._reduced(node, data) if u is not None])
        if share != 1:
            number = add_weight(self.model, self.model.graph, f"{out.name}_share", np.asarray(1 / share, np.float32))
            self._behind(out, make_node("Mul", [out, number], [f"{out.name}_of_kept"]))

    def _reduced(self, node: ir.Node, data: Sequence[Ids | None]) -> list[Ids | None]:
        axes = attribute(node, "axes", None)
        if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            assert node.inputs[1].const_value is not None
            axes = node.inputs[1].const_value.numpy().reshape(-1)
        return list(data) if axes is None else [data[int(axis)] for axis in axes if data]

    def _norm(self, node: ir.Node) -> None:
        """Spell the norm out, with means over what stays."""
        data = self.axes.get(node.outputs[0]) or []
        first = int(attribute(node, "axis", -1)) % len(data) if data else 0
        stays = [(axis, self.kept(units)) for axis, units in enumerate(data) if axis >= first and units is not None]
        if all(stay.all() for _, stay in stays):
            return
        writer = _Spelled(self.model, node)
        skip = node.op_type.startswith("Skip")
        x = writer.input(0)
        scales = node.inputs[1:3]
        if skip:
            x = writer.add("Add", [x, writer.input(1)])
            centred = node.op_type == "SkipLayerNormalization"
            scales = node.inputs[2:4] if centred else [node.inputs[2], None]
            extra = node.inputs[4:5] if centred else node.inputs[3:4]
            if extra and extra[0] is not None:
                x = writer.add("Add", [x, extra[0]])
        centred = node.op_type in ("LayerNormalization", "SkipLayerNormalization")
        y = self._normalized(writer, x, data, first, [*scales, None][:2], centred=centred)
        writer.finish(y, x if skip and len(node.outputs) == 4 else None)

    def _embedding(self, node: ir.Node) -> None:
        """Spell the sum of embeddings out, and the norm behind it."""
        data = self.axes.get(node.outputs[0]) or []
        if all(self.kept(units).all() for units in data if units is not None):
            return
        writer = _Spelled(self.model, node)
        words, segments = (node.inputs[index] for index in (0, 1))
        x = writer.add("Gather", [writer.input(2), words])
        places = node.inputs[8] if len(node.inputs) > 8 else None
        if places is None:
            shape = writer.add("Shape", [words])
            length = writer.add("Gather", [shape, writer.number(np.asarray(1, np.int64))])
            zero, one = (writer.number(np.asarray(n, np.int64)) for n in (0, 1))
            places = writer.add("Range", [zero, length, one])
        x = writer.add("Add", [x, writer.add("Gather", [writer.input(3), places])])
        if segments is not None:
            x = writer.add("Add", [x, writer.add("Gather", [writer.input(4), segments])])
        writer.finish(self._normalized(writer, x, data, 2, node.inputs[5:7], centred=True), None)

    def _normalized(
        self,
        writer: _Spelled,
        x: ir.Value,
        data: Sequence[Ids | None],
        first: int,
        scales: Sequence[ir.Value | None],
        *,
        centred: bool,
    ) -> ir.Value:
        mask = writer.number(self._mask_array(data))
        count = float(np.prod([self.kept(u).sum() if u is not None else 1 for u in data[first:]]))
        axes = list(range(first, len(data)))
        if centred:
            x = writer.add("Mul", [writer.add("Sub", [x, writer.mean(x, axes, count)]), mask])
        square = writer.mean(writer.add("Mul", [x, x]), axes, count)
        default = 1e-12 if writer.node.op_type.startswith(("Skip", "Embed")) else 1e-5
        epsilon = float(attribute(writer.node, "epsilon", default))
        root = writer.add("Sqrt", [writer.add("Add", [square, writer.number(np.asarray(epsilon, np.float32))])])
        y = writer.add("Mul", [writer.add("Div", [x, root]), scales[0]])
        if scales[1] is not None:
            y = writer.add("Add", [y, scales[1]])
        return writer.add("Mul", [y, mask])

    def _mask_array(self, data: Sequence[Ids | None]) -> np.ndarray:
        result = np.ones([1] * len(data), np.float32)
        for axis, units in enumerate(data):
            if units is not None:
                shape = [-1 if place == axis else 1 for place in range(len(data))]
                result = result * self.kept(units).reshape(shape).astype(np.float32)
        return result


class _Spelled:
    """Nodes in place of one node."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.model, self.node, self.count = model, node, 0

    def input(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value

    def _name(self) -> str:
        self.count += 1
        return f"{self.node.outputs[0].name}_spelled_{self.count}"

    def number(self, array: np.ndarray) -> ir.Value:
        return add_weight(self.model, self.model.graph, self._name(), array)

    def add(self, op: str, inputs: Sequence[Any], **attributes: Any) -> ir.Value:
        new = make_node(op, inputs, [self._name()], attributes=attributes)
        self.model.graph.insert_before(self.node, new)
        return new.outputs[0]

    def mean(self, value: ir.Value, axes: Sequence[int], count: float) -> ir.Value:
        if self.model.opset_imports.get("", 0) >= 13:
            total = self.add("ReduceSum", [value, self.number(np.asarray(axes, np.int64))], keepdims=1)
        else:
            total = self.add("ReduceSum", [value], axes=list(axes), keepdims=1)
        return self.add("Div", [total, self.number(np.asarray(count, np.float32))])

    def finish(self, result: ir.Value, total: ir.Value | None) -> None:
        old = self.node.outputs[0]
        result.type, result.shape = old.type, old.shape
        replace_value(old, result)
        if total is not None:
            self.node.outputs[3].replace_all_uses_with(total)
        if not any(value.uses() or value.is_graph_output() for value in self.node.outputs):
            self.model.graph.remove(self.node, safe=True)

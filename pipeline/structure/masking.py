# SPDX-License-Identifier: Apache-2.0
"""The same cut as a mask: nothing gets smaller, and what would be cut is zero. The oracle that slicing is held to.

Each value keeps its shape and is multiplied by zeros and ones behind the operator that makes it. The one thing that
zeros alone cannot express is a mean over an axis that lost positions; it is taken over those that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..passes.graph import add_weight, attribute, is_op, make_node
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
        self.model, self.axes = structure.model, structure.walk.axes
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
            value.replace_all_uses_with(add_weight(self.model, self.model.graph, str(value.name), masked))

    def node(self, node: ir.Node) -> None:
        if is_op(node, "ReduceMean"):
            self._mean(node)
        elif node.op_type in _NORMS:
            self._norm(node)
        if node.graph is None:
            return
        for value in list(node.outputs):
            self._mask_value(node, value)

    def _mask_value(self, after: ir.Node, value: ir.Value, axes: Sequence[Ids | None] | None = None) -> ir.Value:
        own = axes if axes is not None else self.axes.get(value) or []
        if value.dtype is not None and not value.dtype.is_floating_point():
            return value
        for axis, units in enumerate(own):
            if units is not None and not (stay := self.kept(units)).all():
                value = self._times(value, stay, axis, len(own))
        return value

    def _times(self, value: ir.Value, stay: np.ndarray, axis: int, rank: int) -> ir.Value:
        shape = [-1 if place == axis else 1 for place in range(rank)]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        factor = add_weight(self.model, self.model.graph, f"{value.name}_mask", stay.reshape(shape).astype(dtype))
        product = make_node("Mul", [value, factor], [f"{value.name}_masked"])
        self._behind(value, product)
        return product.outputs[0]

    def _behind(self, value: ir.Value, new: ir.Node) -> None:
        """Put `new`, which reads `value`, between it and all its readers."""
        maker = value.producer()
        assert maker is not None
        new.outputs[0].type, new.outputs[0].shape = value.type, value.shape
        self.model.graph.insert_after(maker, new)
        value.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
        new.replace_input_with(0, value)

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
        return list(data) if axes is None else [data[int(axis)] for axis in axes]

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
        total = x
        mask = self._mask_array(data, x)
        count = float(np.prod([self.kept(u).sum() if u is not None else 1 for u in data[first:]]))
        axes = list(range(first, len(data)))
        if centred:
            x = writer.add("Mul", [writer.add("Sub", [x, writer.mean(x, axes, count)]), writer.number(mask)])
        square = writer.mean(writer.add("Mul", [x, x]), axes, count)
        epsilon = float(attribute(node, "epsilon", 1e-5))
        root = writer.add("Sqrt", [writer.add("Add", [square, writer.number(np.asarray(epsilon, np.float32))])])
        y = writer.add("Mul", [writer.add("Div", [x, root]), scales[0]])
        if len(scales) > 1 and scales[1] is not None:
            y = writer.add("Add", [y, scales[1]])
        y = writer.add("Mul", [y, writer.number(mask)])
        writer.finish(y, total if skip and len(node.outputs) == 4 else None)

    def _mask_array(self, data: Sequence[Ids | None], value: ir.Value) -> np.ndarray:
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
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        if total is not None:
            self.node.outputs[3].replace_all_uses_with(total)
        self.model.graph.remove(self.node, safe=True)

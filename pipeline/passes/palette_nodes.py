# SPDX-License-Identifier: Apache-2.0
"""A weight as packed codes and a palette in the graph: looked up byte by byte, by standard operators of any opset.

    packed  uint8 -> Cast -> Gather(what each byte holds) -> codes -> Gather(palette) -> Reshape -> the weight

Codes take exactly their bits: those of 3, 5, 6 and 7 bits are split into parts of 4, 2 and 1 bit, each of which fills
its bytes. Where channels have palettes of their own, these stand behind each other and every channel adds where its own
begins. ONNX Runtime does all this once, when it loads the model, and computes in fp32; rows that a Gather picks stay
packed, and only what it picked is unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..quantization.codes import Plane, pack_plane
from .graph import NewNodes, add_weight, attribute, constant, is_op, replace_node

_PARTS = {4: Plane(16, 2), 2: Plane(4, 4), 1: Plane(2, 8)}


def planes_of(bits: int) -> tuple[Plane, ...]:
    """How codes of so many bits are cut: the planes count 1, then what the ones before them leave."""
    if bits == 8:
        return (Plane(256, 1),)
    found, done = [], 0
    for part, plane in _PARTS.items():
        if bits & part:
            found.append(Plane(plane.base, plane.per_byte, 1 << done))
            done += part
    return tuple(found)


def stored_bytes(shape: Sequence[int], bits: int, palettes: int, *, by_row: bool) -> int:
    """What codes and palettes take, without the few nodes and the tables that all weights share."""
    rows, columns = _layout(shape, by_row)
    codes = rows * sum(plane.bytes_for(columns) for plane in planes_of(bits))
    return codes + 4 * palettes * (1 << bits) + (0 if palettes == 1 else 4 * max(shape))


@dataclass(frozen=True)
class Coded:
    """A weight's codes.

    Attributes:
        codes: uint8, in the weight's shape.
        palettes: float32 [palettes, values]; one for all, or one for each group of channels.
        bits: Of a code.
        axis: The axis of the channels.
    """

    codes: np.ndarray
    palettes: np.ndarray
    bits: int
    axis: int

    def group_of_channels(self) -> np.ndarray:
        """Which palette each channel has, int [channels]."""
        channels = self.codes.shape[self.axis]
        length = -(-channels // len(self.palettes))
        return np.asarray(np.arange(channels) // length)

    def restored(self) -> np.ndarray:
        """The weight that the codes stand for, float32."""
        sizes = [1] * self.codes.ndim
        sizes[self.axis] = -1
        return np.asarray(self.palettes[self.group_of_channels().reshape(sizes), self.codes])


def write_palette(model: ir.Model, weight: ir.Value, coded: Coded) -> None:
    """Let all readers of `weight` read its codes; the old weight stays behind without readers."""
    picking = [use.node for use in weight.uses() if picks_rows(use.node, use.idx)]
    others = len(weight.uses()) > len(picking)
    writer = _Writer(model, weight, coded, by_row=bool(picking))
    for node in picking:
        writer.rows(node)
    if others:
        weight.replace_all_uses_with(writer.whole())


def picks_rows(node: ir.Node, index: int) -> bool:
    """Whether `node` is a Gather that takes whole rows of its input `index`, a matrix."""
    table = node.inputs[0] if is_op(node, "Gather") and index == 0 else None
    matrix = table is not None and table.const_value is not None and len(table.const_value.shape) == 2
    return matrix and attribute(node, "axis", 0) in (0, -2)


def _layout(shape: Sequence[int], by_row: bool) -> tuple[int, int]:
    """How the codes are packed: row by row where rows are picked, else one behind the other."""
    return (shape[0], shape[1]) if by_row else (1, int(np.prod(shape)))


class _Writer:
    """Writes one weight. What both forms of reading need is stored once."""

    def __init__(self, model: ir.Model, weight: ir.Value, coded: Coded, *, by_row: bool) -> None:
        self.model, self.name, self.coded, self.by_row = model, str(weight.name), coded, by_row
        self.home = weight.graph if isinstance(weight.graph, ir.Graph) else model.graph
        self.shape = coded.codes.shape
        self.layout = _layout(self.shape, by_row)
        self.made: dict[str, ir.Value] = {}

    def whole(self) -> ir.Value:
        """The weight as it was, unpacked in front of everything in its graph."""
        new = NewNodes(self.name)
        codes = self._codes(new, lambda value: value, lambda size: self._sizes(self.layout[0], size))
        if len(self.coded.palettes) > 1:
            codes = new.add("Reshape", [codes, self._sizes(*self.shape)], "shaped")
            sizes = [1] * len(self.shape)
            sizes[self.coded.axis] = -1
            codes = new.add("Add", [codes, self._stored("begins", self._begins().reshape(sizes))], "places")
        values = new.add("Gather", [self._palettes(), codes], "values", axis=0)
        if tuple(self.shape) != self.layout and len(self.coded.palettes) == 1:
            values = new.add("Reshape", [values, self._sizes(*self.shape)], "unpacked")
        values.shape, values.type = ir.Shape(self.shape), ir.TensorType(ir.DataType.FLOAT)
        first = self.home[0] if len(self.home) else None
        assert first is not None
        self.home.insert_before(first, new.nodes)
        return values

    def rows(self, node: ir.Node) -> None:
        """Replace a Gather of rows by one of packed rows."""
        new, indices = NewNodes(str(node.outputs[0].name)), node.inputs[1]
        shape = new.add("Shape", [indices], "shape")

        def picked(value: ir.Value) -> ir.Value:
            return new.add("Gather", [value, indices], "picked", axis=0)

        def target(size: int) -> ir.Value:
            return new.add("Concat", [shape, self._sizes(size)], "target", axis=0)

        codes = self._codes(new, picked, target)
        if len(self.coded.palettes) > 1:
            begins = self._begins()
            if self.coded.axis == 0:
                places = picked(self._stored("begins_of_rows", begins.reshape(-1, 1)))
            else:
                places = self._stored("begins_of_columns", begins)
            codes = new.add("Add", [codes, places], "places")
        new.add("Gather", [self._palettes(), codes], "values", axis=0)
        replace_node(node, new.nodes)

    def _codes(
        self, new: NewNodes, picked: Callable[[ir.Value], ir.Value], target: Callable[[int], ir.Value]
    ) -> ir.Value:
        """Nodes that turn bytes into codes.

        Args:
            new: Where the nodes go.
            picked: Selects rows of a stored array.
            target: The shape [rows, size], for a Reshape.

        Returns:
            int32 [rows, columns].
        """
        total: ir.Value | None = None
        columns = self.layout[1]
        for number, plane in enumerate(planes_of(self.coded.bits)):
            packed = picked(self._stored(f"packed_{number}", pack_plane(self.coded.codes.reshape(self.layout), plane)))
            digits = new.add("Cast", [packed], "bytes", to=int(ir.DataType.INT32))
            if plane.per_byte > 1:
                digits = new.add("Gather", [_table(self.model, plane), digits], "parts", axis=0)
                digits = new.add("Cast", [digits], "digits", to=int(ir.DataType.INT32))
                stored = plane.bytes_for(columns) * plane.per_byte
                digits = new.add("Reshape", [digits, target(stored)], "row")
                if stored > columns:
                    bounds = [self._sizes(n) for n in (0, columns, -1)]
                    digits = new.add("Slice", [digits, *bounds], "cut")
            total = digits if total is None else new.add("Add", [total, digits], "codes")
        assert total is not None
        return total

    def _palettes(self) -> ir.Value:
        return self._stored("palette", self.coded.palettes.reshape(-1))

    def _begins(self) -> np.ndarray:
        """Where each channel's palette begins, int32 [channels]."""
        return np.asarray(self.coded.group_of_channels() * self.coded.palettes.shape[1], np.int32)

    def _sizes(self, *sizes: int) -> ir.Value:
        return self._stored("_".join(map(str, ("shape", *sizes))), np.asarray(sizes, np.int64))

    def _stored(self, part: str, array: np.ndarray) -> ir.Value:
        """An initializer of the weight's own graph, made when it is first needed."""
        if part not in self.made:
            self.made[part] = add_weight(self.model, self.home, f"{self.name}_{part}", array)
        return self.made[part]


def _table(model: ir.Model, plane: Plane) -> ir.Value:
    """What each byte of a plane holds, uint8 [256, codes a byte]; one for all weights, in the main graph."""
    table = plane.table()
    name = f"onnxpress_codes_{plane.base}_{plane.weight}"
    known = model.graph.initializers.get(name)
    found = constant(known)
    if known is not None and found is not None and np.array_equal(found, table):
        return known
    return add_weight(model, model.graph, name, table)

# SPDX-License-Identifier: Apache-2.0
"""How a weight of few bits stands in the graph: three forms, and which of them a runtime computes with directly.

matmul_nbits    com.microsoft's MatMulNBits and GatherBlockQuantized, which ONNX Runtime computes from the packed bytes:
                8, 4 and 2 bits, blocks of 16 to 256 (a whole row in a Gather). Ternary and sign weights fit in 2 bits.
qdq             DequantizeLinear in blocks and MatMul, standard operators: 8 and 4 bits from opset 21 on, 2 bits from
                25, whole rows of 8 bits always. ONNX Runtime turns them into MatMulNBits when it loads them, and
                rounds activations as session.qdq_matmulnbits_accuracy_level says (4, to 8 bits, by default).
unpack          bytes looked up in a table of what they hold, then scaled: Gather, Sub, Mul, in any runtime and opset,
                in exactly as many bits as there are. ONNX Runtime does that once, when it loads the model, and computes
                in fp32: the file is small, memory and speed are those of fp32. Rows of a Gather stay packed.

References: MatMulNBits, GatherBlockQuantized in ONNX Runtime's ContribOperators.md; DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import onnx_ir as ir

from ..quantization.blocks import Grid, Rounded
from ..quantization.codes import WIDTHS, Bits, Width, pack, pack_plane
from .graph import MICROSOFT, NewNodes, add_tensor, add_weight, constant, is_op, make_node, replace_node
from .matrix_weights import WeightUse, drop_dead_transposes
from .weight_only_late import LateWeight

Form = Literal["matmul_nbits", "qdq", "unpack"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
_TWO_BIT_BLOCK = 128
"""ONNX Runtime has no fast kernel for 2 bits in larger blocks."""

_SIGNED = {8: ir.DataType.INT8, 4: ir.DataType.INT4, 2: ir.DataType.INT2}
_UNSIGNED = {8: ir.DataType.UINT8, 4: ir.DataType.UINT4, 2: ir.DataType.UINT2}


def form_for(wanted: str, grid: Grid, kinds: set[str], opset: int) -> Form:
    """The form in which weights of these bits are written.

    Args:
        wanted: The setting: `auto` or a form.
        grid: The integers.
        kinds: How the weight is read, see `WeightUse`.
        opset: Of the model's standard operators.
    """
    bits = grid.width.bits
    if wanted == "auto":
        return "matmul_nbits" if bits in (8, 4, 2) else "unpack"
    if wanted == "matmul_nbits":
        return "matmul_nbits"
    if wanted == "qdq" and "rows" not in kinds:
        needed: dict[Bits, int] = {8: 13 if grid.block is None else 21, 4: 21, 2: 25}
        return "qdq" if opset >= needed.get(bits, opset + 1) else "unpack"
    return "unpack"


def fills_zero_bytes(grid: Grid, columns: int, kinds: set[str]) -> bool:
    """Whether the zero points of a row end with a byte: GatherBlockQuantized misread others up to ONNX Runtime 1.23."""
    if "rows" not in kinds or not grid.width.uniform:
        return True
    blocks = -(-columns // _container_block(grid, columns, rows_only=kinds == {"rows"}))
    return blocks * int(grid.width.stored_bits) % 8 == 0


def write_weight(
    model: ir.Model,
    weight: ir.Value,
    uses: Sequence[WeightUse],
    rounded: Rounded | LateWeight,
    form: Form,
    *,
    accuracy_level: int,
) -> list[str]:
    """Let all readers of `weight` read its quantized form.

    Args:
        model: Changed in place; the old weight stays behind without readers.
        weight: float32 [in, out] or [out, in].
        uses: All of its readers, as `weights_in_use` finds them.
        rounded: [out, in], or [rows, columns] of an embedding; only matmul_nbits takes what is rounded later.
        form: See above.
        accuracy_level: Of MatMulNBits: 0 or 1 multiply in fp32, 4 rounds activations to 8 bits, block by block.

    Returns:
        By what each use is computed now.
    """
    kinds, late = {use.kind for use in uses}, rounded if isinstance(rounded, LateWeight) else None
    writer = {"matmul_nbits": _NativeWriter, "qdq": _QdqWriter, "unpack": _UnpackWriter}[form]
    written = writer(model, weight, late.sample() if late else cast(Rounded, rounded), kinds, accuracy_level)
    if late is not None:
        written.late, written.outputs = late, late.shape[0]
    computed = []
    for use in uses:
        if use.kind == "rows":
            written.rows(use.node)
            computed.append(written.rows_by)
        else:
            written.product(use.node)
            computed.append(written.product_by)
    drop_dead_transposes(weight)
    return computed


class _Writer:
    """Writes one weight. Initializers are made when the first reader needs them, and shared."""

    product_by = rows_by = ""
    late: LateWeight | None = None

    def __init__(
        self, model: ir.Model, weight: ir.Value, rounded: Rounded, kinds: set[str], accuracy_level: int
    ) -> None:
        self.model, self.name, self.rounded, self.kinds = model, str(weight.name), rounded, kinds
        self.home = weight.graph if isinstance(weight.graph, ir.Graph) else model.graph
        self.accuracy_level = accuracy_level
        self.made: dict[str, ir.Value] = {}
        self.outputs, self.columns = rounded.codes.shape

    def rows(self, node: ir.Node) -> None:
        """Replace a Gather."""
        raise NotImplementedError

    def product(self, node: ir.Node) -> None:
        """Replace a MatMul or Gemm."""
        raise NotImplementedError

    def stored(self, part: str, array: np.ndarray) -> ir.Value:
        """An initializer of the weight's own graph."""
        if part not in self.made:
            self.made[part] = add_weight(self.model, self.home, f"{self.name}_{part}", array)
        return self.made[part]

    def first(self, new: NewNodes, value: ir.Value, size: int, wanted: int) -> ir.Value:
        """The first `wanted` of `size` columns."""
        if size == wanted:
            return value
        ends = [np.asarray([n], np.int64) for n in (0, wanted, -1)]
        bounds = [self.stored(f"slice_{a[0]}", a) for a in ends]
        return new.add("Slice", [value, *bounds], "cut")

    def finish_product(self, node: ir.Node, new: list[ir.Node]) -> None:
        """Add the bias of a Gemm, and put the product in the node's place, named after its weight."""
        # A profile then says `encoder.layer.0.intermediate.dense.weight`, not `node_MatMulNBits_140`
        new[0].name = self.name
        if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
            new.append(make_node("Add", [new[-1].outputs[0], node.inputs[2]], [f"{node.outputs[0].name}_biased"]))
        replace_node(node, new)


@dataclass(frozen=True)
class _Container:
    """Codes as ONNX Runtime's operators store them: bits 8, 4 or 2, zero point in the middle unless given."""

    width: Width
    block: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def of(cls, rounded: Rounded, *, rows_only: bool) -> _Container:
        """Pad to whole blocks (to whole bytes where only a Gather reads), and repeat the scale of a whole row."""
        grid, columns = rounded.grid, rounded.codes.shape[1]
        width = grid.width if grid.width.uniform else WIDTHS[2]
        block = _container_block(grid, columns, rows_only=rows_only)
        blocks = -(-columns // block)
        codes = rounded.codes * np.uint8(grid.width.stride) + np.uint8(width.zero - grid.width.zero)
        whole = 8 // int(width.stored_bits) if rows_only else block
        codes = np.pad(codes, ((0, 0), (0, -columns % whole)), constant_values=width.zero)
        repeats = blocks // rounded.scales.shape[1]
        zeros = None if rounded.zeros is None else np.repeat(rounded.zeros, repeats, axis=1)
        return cls(width, block, codes, np.repeat(rounded.scales, repeats, axis=1), zeros)


def _container_block(grid: Grid, columns: int, *, rows_only: bool) -> int:
    """The block length written: a power of two from 16 on; a row with one scale is cut where blocks cannot hold it."""
    if grid.blocks(columns) > 1:
        return grid.length(columns)
    whole = max(_SMALLEST_BLOCK, 1 << (columns - 1).bit_length())
    if rows_only:
        return whole
    return min(whole, _TWO_BIT_BLOCK if not grid.width.uniform or grid.width.bits == 2 else _LARGEST_BLOCK)


class _NativeWriter(_Writer):
    product_by, rows_by = "MatMulNBits", "GatherBlockQuantized"

    def __init__(
        self, model: ir.Model, weight: ir.Value, rounded: Rounded, kinds: set[str], accuracy_level: int
    ) -> None:
        super().__init__(model, weight, rounded, kinds, accuracy_level)
        self.container = _Container.of(rounded, rows_only=kinds == {"rows"})
        self.arrays = self._arrays(rounded)
        model.opset_imports[MICROSOFT] = 1

    def product(self, node: ir.Node) -> None:
        box = self.container
        attributes = {
            "K": self.columns,
            "N": self.outputs,
            "bits": int(box.width.stored_bits),
            "block_size": box.block,
            "accuracy_level": self.accuracy_level,
        }
        inputs = [node.inputs[0], self._matrix(), *self._grids()]
        name = f"{node.outputs[0].name}_product"
        product = make_node("MatMulNBits", inputs, [name], domain=MICROSOFT, attributes=attributes)
        self.finish_product(node, [product])

    def rows(self, node: ir.Node) -> None:
        box, name = self.container, str(node.outputs[0].name)
        packed = self._stored("packed")  # before the scales, which are computed with it
        attributes = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": box.block,
            "bits": int(box.width.stored_bits),
        }
        inputs = [packed, node.inputs[1], *self._grids()]
        rows = make_node("GatherBlockQuantized", inputs, [f"{name}_rows"], domain=MICROSOFT, attributes=attributes)
        rows.name = self.name
        new = NewNodes(name)
        self.first(new, rows.outputs[0], box.codes.shape[1], self.columns)
        replace_node(node, [rows, *new.nodes])

    def _arrays(self, rounded: Rounded) -> dict[str, np.ndarray]:
        """What is stored, row by row: bytes [N, bytes] ([N, blocks, bytes] if no Gather reads them), scales, zeros."""
        box = _Container.of(rounded, rows_only=self.kinds == {"rows"})
        packed = pack(box.codes, box.width)
        if "rows" not in self.kinds:
            packed = packed.reshape(len(packed), *self._blocks())
        arrays = {"packed": packed, "scale": box.scales}
        return arrays if box.zeros is None else {**arrays, "zero_point": pack(box.zeros, box.width)}

    def _stored(self, part: str) -> ir.Value:
        if part not in self.made:
            if self.late is None:
                return self.stored(part, self.arrays[part])
            name, tensor = f"{self.name}_{part}", self.late.part(part, self._arrays)
            self.made[part] = add_tensor(self.model, self.home, name, tensor)
        return self.made[part]

    def _grids(self) -> list[ir.Value]:
        return [self._stored(part) for part in self.arrays if part != "packed"]

    def _blocks(self) -> tuple[int, int]:
        """Of a row: blocks, bytes of each."""
        box = self.container
        return box.scales.shape[1], box.block * int(box.width.stored_bits) // 8

    def _matrix(self) -> ir.Value:
        """[N, blocks, bytes of a block]; where a Gather reads the same bytes, reshaped."""
        if "rows" not in self.kinds:
            return self._stored("packed")
        if "matrix" not in self.made:
            target = self.stored("shape", np.asarray((self.outputs, *self._blocks()), np.int64))
            node = make_node("Reshape", [self._stored("packed"), target], [f"{self.name}_blocks"])
            self.home.insert_before(self.home[0], node)
            self.made["matrix"] = node.outputs[0]
        return self.made["matrix"]


class _QdqWriter(_Writer):
    product_by = "DequantizeLinear and MatMul (ONNX Runtime: MatMulNBits)"

    def product(self, node: ir.Node) -> None:
        product = make_node("MatMul", [node.inputs[0], self._matrix()], [f"{node.outputs[0].name}_product"])
        self.finish_product(node, [product])

    def _matrix(self) -> ir.Value:
        """DequantizeLinear of [in, out] codes, made once in front of the weight's graph."""
        if "matrix" in self.made:
            return self.made["matrix"]
        rounded, grid = self.rounded, self.rounded.grid
        bits = int(grid.width.stored_bits)
        if rounded.zeros is None:
            codes, types = rounded.codes.T.astype(np.int16) - grid.width.zero, _SIGNED
        else:
            codes, types = rounded.codes.T.astype(np.int16), _UNSIGNED
        per_row = grid.blocks(self.columns) == 1
        scales, zeros = rounded.scales.T, None if rounded.zeros is None else rounded.zeros.T
        if per_row:
            scales, zeros = scales[0], None if zeros is None else zeros[0]
        inputs = [self.stored("codes", codes.astype(types[bits].numpy())), self.stored("scale", scales)]
        if zeros is not None:
            inputs.append(self.stored("zero_point", zeros.astype(types[bits].numpy())))
        attributes = {"axis": 1} if per_row else {"axis": 0, "block_size": grid.length(self.columns)}
        node = make_node("DequantizeLinear", inputs, [f"{self.name}_dequantized"], attributes=attributes)
        self.home.insert_before(self.home[0], node)
        self.model.ir_version = max(self.model.ir_version or 0, {8: 7, 4: 10, 2: 13}[bits])
        self.made["matrix"] = node.outputs[0]
        return node.outputs[0]


class _UnpackWriter(_Writer):
    product_by = "unpacked when the model is loaded, then MatMul in fp32"
    rows_by = "Gather of packed rows, unpacked as they are read"

    def product(self, node: ir.Node) -> None:
        product = make_node("MatMul", [node.inputs[0], self._matrix()], [f"{node.outputs[0].name}_product"])
        self.finish_product(node, [product])

    def rows(self, node: ir.Node) -> None:
        new, indices = NewNodes(str(node.outputs[0].name)), node.inputs[1]
        shape = new.add("Shape", [indices], "shape")

        def picked(value: ir.Value) -> ir.Value:
            return new.add("Gather", [value, indices], "picked", axis=0)

        def target(*sizes: int) -> ir.Value:
            tail = self.stored("_".join(map(str, ("shape", *sizes))), np.asarray(sizes, np.int64))
            return new.add("Concat", [shape, tail], "target", axis=0)

        self._unpacked(new, picked, target)
        replace_node(node, new.nodes)

    def _matrix(self) -> ir.Value:
        """The weight as [in, out], unpacked once in front of its graph."""
        if "matrix" not in self.made:
            new = NewNodes(self.name)

            def target(*sizes: int) -> ir.Value:
                shape = (self.outputs, *sizes)
                return self.stored("_".join(map(str, ("shape", *shape))), np.asarray(shape, np.int64))

            weights = self._unpacked(new, lambda value: value, target)
            self.made["matrix"] = new.add("Transpose", [weights], "transposed", perm=[1, 0])
            self.home.insert_before(self.home[0], new.nodes)
        return self.made["matrix"]

    def _unpacked(
        self, new: NewNodes, picked: Callable[[ir.Value], ir.Value], target: Callable[..., ir.Value]
    ) -> ir.Value:
        """Nodes that turn bytes into weights.

        Args:
            new: Where the nodes go.
            picked: Selects rows of a stored array: [outputs, ...] becomes [rows, ...].
            target: The shape [rows, *sizes], for a Reshape.

        Returns:
            float32 [rows, columns].
        """
        rounded, blocks = self.rounded, self.rounded.scales.shape[1]
        length = rounded.grid.length(self.columns)
        codes = np.pad(rounded.codes, ((0, 0), (0, blocks * length - self.columns)))
        total: ir.Value | None = None
        for number in range(len(rounded.grid.width.planes)):
            digits = self._digits(number, codes, new, picked, target)
            total = digits if total is None else new.add("Add", [total, digits], "codes")
        assert total is not None
        if blocks > 1:
            total = new.add("Reshape", [total, target(blocks, length)], "blocks")
        shape = (self.outputs, blocks, 1) if blocks > 1 else (self.outputs, 1)
        if rounded.zeros is not None:
            zeros = picked(self.stored("zero_point", rounded.zeros.reshape(shape)))
            zeros = new.add("Cast", [zeros], "zeros", to=int(ir.DataType.FLOAT))
            total = new.add("Sub", [total, zeros], "centred")
        total = new.add("Mul", [total, picked(self.stored("scale", rounded.scales.reshape(shape)))], "scaled")
        if blocks > 1:
            total = new.add("Reshape", [total, target(blocks * length)], "dequantized")
        return self.first(new, total, blocks * length, self.columns)

    def _digits(
        self,
        number: int,
        codes: np.ndarray,
        new: NewNodes,
        picked: Callable[[ir.Value], ir.Value],
        target: Callable[..., ir.Value],
    ) -> ir.Value:
        """What one plane has to say about each weight, looked up byte by byte; float32 [rows, padded columns]."""
        width, columns = self.rounded.grid.width, codes.shape[1]
        plane = width.planes[number]
        packed = picked(self.stored(f"packed_{number}", pack_plane(codes, plane)))
        index = new.add("Cast", [packed], "bytes", to=int(ir.DataType.INT32))
        table = _table(self.model, width, number, centred=number == 0 and self.rounded.zeros is None)
        digits = new.add("Gather", [table, index], "digits", axis=0)
        if plane.per_byte == 1:
            return digits
        stored = plane.bytes_for(columns) * plane.per_byte
        return self.first(new, new.add("Reshape", [digits, target(stored)], "row"), stored, columns)


def _table(model: ir.Model, width: Width, number: int, *, centred: bool) -> ir.Value:
    """What each byte of a plane holds, float32 [256, codes a byte] (or [256]); one for all weights, in the main graph.

    Args:
        model: May have it already.
        width: The format.
        number: Which plane.
        centred: Whether the zero point has been taken off.
    """
    plane = width.planes[number]
    table = plane.table().astype(np.float32) * width.stride - (width.zero if centred else 0)
    table = table[:, 0] if plane.per_byte == 1 else table
    name = f"onnxpress_bytes_{width.bits}_{number}{'_centred' if centred else ''}"
    known = model.graph.initializers.get(name)
    found = constant(known)
    if known is not None and found is not None and np.array_equal(found, table):
        return known
    return add_weight(model, model.graph, name, table)

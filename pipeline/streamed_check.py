# SPDX-License-Identifier: Apache-2.0
"""Compares the weights of a written file with those it was made from, a piece at a time: for files larger than memory.

A weight that was stored as it is, or cast, has to be the same bit by bit. Of one in MatMulNBits' form every number is
compared with what its code, scale and zero point stand for. The same numbers, read as PyTorch's parameters, let the
original be run with the weights that the file really has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from ..contracts.errors import GateFailed
from ..exporters import graph_file
from ..exporters.streamed_tensor import PIECE, Place, StreamedTensor
from .passes.graph import MICROSOFT, attribute, consumers, is_op
from .passes.low_precision import Precision, round_to
from .passes.matrix_weights import weights_in_use
from .quantization.blocks import Grid, Rounded
from .quantization.codes import WIDTHS, Bits, unpack

_REPORT = "Nothing was accepted. Press it again, and report it if the message stays."


@dataclass
class WeightCheck:
    """What the comparison found.

    Attributes:
        identical: Weights of which every bit is that of the source, or of the source cast to their type.
        rounded: Weights of few bits.
        bytes_read: Of both files.
        worst_step: The largest distance of a rounded number from the source's, in steps of its scale; half a step is
            the most that rounding to nearest leaves, more where the search for scales has cut off outliers.
        signal, noise: Sums of squares of the rounded weights, and of what rounding changed.
    """

    identical: int = 0
    rounded: int = 0
    bytes_read: int = 0
    worst_step: float = 0.0
    signal: float = 0.0
    noise: float = 0.0

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"identical": self.identical, "rounded": self.rounded, "bytes_read": self.bytes_read}
        if self.rounded:
            decibel = 10 * float(np.log10(self.signal / self.noise)) if self.noise else None
            result |= {"worst_step": round(self.worst_step, 4), "sqnr_db": decibel and round(decibel, 2)}
        return result


@dataclass
class _Blocks:
    """A weight in MatMulNBits' form.

    Attributes:
        codes, scales, zeros: As stored, one row an output channel (or row of an embedding).
        grid: What the codes mean.
        shape: [rows, columns].
        first: Where the rows begin in what is stored: behind those of other weights, if they were joined.
    """

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    grid: Grid
    shape: tuple[int, int]
    first: int = 0

    def rows(self, start: int, stop: int) -> Rounded:
        columns = self.shape[1]
        start, stop = start + self.first, stop + self.first

        def packed(tensor: ir.TensorProtocol, count: int) -> np.ndarray:
            return unpack(_rows(tensor, start, stop).reshape(stop - start, -1), self.grid.width, count)

        scales = _rows(self.scales, start, stop)
        zeros = None if self.zeros is None else packed(self.zeros, scales.shape[1])
        return Rounded(packed(self.codes, columns), scales, zeros, self.grid)

    def strips(self) -> Iterator[tuple[int, Rounded]]:
        step = max(1, PIECE // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))


@dataclass
class WrittenWeights:
    """The weights of a file, beside those of the graph that it was made from.

    Attributes:
        file: As `graph_file.write` has written it.
        source: The graph before the pass that casts or rounds; its large weights are streamed.
        aliases: Name of a weight that was merged into another, to the name of that.
        joined: Name of a stored array that was put behind others, to the name of the whole and its first row there.
    """

    file: Path
    source: ir.Model
    aliases: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.written = graph_file.read(self.file)
        self.axes = {str(weight.name): uses[0].axis for weight, uses in weights_in_use(self.source).items()}

    def check(self) -> WeightCheck:
        """Compare all streamed weights.

        Raises:
            GateFailed: A weight is missing from the file, or differs more than its form allows.
        """
        found = WeightCheck()
        for name, value in self.source.graph.initializers.items():
            if not isinstance(value.const_value, StreamedTensor):
                continue
            stored = self.written.graph.initializers.get(name)
            if stored is not None and stored.const_value is not None:
                _same(name, value.const_value, stored.const_value, found)
            else:
                self._close(name, value.const_value, found)
        return found

    def parameter(self, name: str) -> np.ndarray | None:
        """What the file has for a parameter of the PyTorch module, float32 in its shape; None if it is not streamed."""
        name = next((n for n in (name, f"{name}.T") if n in self.source.graph.initializers or n in self.aliases), name)
        name = self.aliases.get(name, name)
        value = self.source.graph.initializers.get(name)
        if value is None or not isinstance(value.const_value, StreamedTensor):
            return None
        tensor = value.const_value
        stored = self.written.graph.initializers.get(name)
        if stored is not None and stored.const_value is not None:
            array = (_place(stored.const_value) or stored.const_value).numpy().astype(np.float32)
            return np.ascontiguousarray(array.T) if tensor.turned else array
        blocks = self._blocks(name)
        result = np.empty(blocks.shape, np.float32)
        for start, rounded in blocks.strips():
            part = rounded.dequantized()
            result[start : start + len(part)] = part
        by_rows = (self.axes[name] == 1) == tensor.turned  # the parameter has its output channels in front
        return result if by_rows else np.ascontiguousarray(result.T)

    def _close(self, name: str, tensor: StreamedTensor, found: WeightCheck) -> None:
        blocks = self._blocks(name)
        original = tensor if self.axes[name] == 0 else tensor.transposed()
        columns, limit = blocks.shape[1], 0.7 if blocks.grid.width.levels > 4 else 1.001
        pieces = original.pieces(max(1, PIECE // columns) * columns)
        for (_, rounded), piece in zip(blocks.strips(), pieces, strict=True):
            off = rounded.dequantized().reshape(-1)
            off -= piece
            length = rounded.grid.length(columns)
            signal, noise = _squares(piece, columns, length), _squares(off, columns, length)
            if not np.all(noise <= limit * signal + np.finfo(np.float32).tiny):
                raise GateFailed(f"the file's '{name}' is not the rounded weight of the source", next_step=_REPORT)
            found.signal += float(signal.sum(dtype=np.float64))
            found.noise += float(noise.sum(dtype=np.float64))
            step = np.repeat(np.abs(rounded.scales), length, axis=1)[:, :columns].reshape(-1)
            found.worst_step = max(found.worst_step, float(np.max(np.abs(off) / np.maximum(step, 1e-30), initial=0)))
        found.rounded += 1
        found.bytes_read += _stored_bytes(original) + blocks.codes.nbytes + blocks.scales.nbytes

    def _blocks(self, name: str) -> _Blocks:
        values = self.written.graph.initializers
        (packed_name, first), (scale_name, _), (zero_name, _) = (
            self.joined.get(f"{name}_{part}", (f"{name}_{part}", 0)) for part in ("packed", "scale", "zero_point")
        )
        packed = values.get(packed_name)
        if packed is None:
            raise GateFailed(f"the file lacks the weight '{name}'", next_step=_REPORT)
        readers = [
            n for use in consumers(packed) for n in (consumers(use.outputs[0]) if is_op(use, "Reshape") else [use])
        ]
        node = next(n for n in readers if n.domain == MICROSOFT)
        scale, zero = values[scale_name], values.get(zero_name)
        bits = cast(Bits, attribute(node, "bits", 4))
        grid = Grid(WIDTHS[bits], int(attribute(node, "block_size", 32)), symmetric=zero is None)
        tensor = self.source.graph.initializers[name].const_value
        assert tensor is not None
        rows, columns = tensor.shape.numpy() if self.axes[name] == 0 else tensor.shape.numpy()[::-1]
        codes, scales, zeros = packed.const_value, scale.const_value, None if zero is None else zero.const_value
        assert codes is not None
        assert scales is not None
        return _Blocks(codes, scales, zeros, grid, (int(rows), int(columns)), first)


def _rows(tensor: ir.TensorProtocol, start: int, stop: int) -> np.ndarray:
    in_file = _place(tensor)
    return tensor.numpy()[start:stop] if in_file is None else in_file.rows(start, stop)


def _squares(flat: np.ndarray, columns: int, length: int) -> np.ndarray:
    """Sum of squares of each block, or of each row where blocks do not divide it."""
    rows = flat.reshape(-1, columns if columns % length else length)
    return np.asarray(np.einsum("ij,ij->i", rows, rows))


def _place(tensor: ir.TensorProtocol | None) -> StreamedTensor | None:
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return StreamedTensor(Place(Path(tensor.path), tensor.offset or 0, tensor.dtype, tuple(tensor.shape.numpy())))


def _same(name: str, source: StreamedTensor, written: ir.TensorProtocol, found: WeightCheck) -> None:
    kinds = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    columns = int(source.shape.numpy()[-1]) if source.shape.numpy() else 1
    length = max(1, PIECE // columns) * columns
    in_file, kind = _place(written), kinds.get(written.dtype) if source.dtype == ir.DataType.FLOAT else None
    stored = [written.numpy().reshape(-1)] if in_file is None else in_file.pieces(length)
    for piece, other in zip(source.pieces(length), stored, strict=True):
        wanted = piece
        if kind is not None:
            wanted = round_to(piece, cast(Precision, kind), keep_nonzero=source.size == 1)[0]
        if wanted.dtype != other.dtype or not np.array_equal(wanted.view(np.uint8), other.view(np.uint8)):
            raise GateFailed(f"the file's '{name}' differs from the source's", next_step=_REPORT)
    found.identical += 1
    found.bytes_read += _stored_bytes(source) + written.nbytes


def _stored_bytes(tensor: StreamedTensor) -> int:
    return int(tensor.place.size * tensor.place.dtype.itemsize)

# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in a file until they are written: read a piece at a time, transposed and converted on the way.

A pass that changes a weight element by element puts a `StreamedTensor` with one more step in the weight's place; the
numbers are read, converted and written when the graph is, and never more than some pieces of them are in memory. They
are read, not mapped: pages of a map count as this process's memory for as long as they are mapped.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import onnx_ir as ir

from ..contracts.errors import InputError

STREAM_FROM = 1 << 20
"""Bytes from which on a weight in an `.onnx` file's external data is streamed; smaller ones are mapped."""

PIECE = 1 << 18
"""Elements that are read and converted at a time: some arrays of that size stay in the processor's cache."""

_STRIP = 64
"""Columns that are transposed at a time. Strides of a power of two let cache lines push each other out; a copy of a
narrow strip has none: 3 ns an element become 18 without it (measured, 11008 x 4096)."""

Convert = Callable[[np.ndarray, int], np.ndarray]
"""From a flat piece, and the index of its first element in the tensor, to the same elements of another type."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: little-endian, row-major.

    Attributes:
        path: The file.
        offset: Of the first byte.
        dtype: As stored; a whole number of bytes an element.
        shape: As stored.
    """

    path: Path
    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop`, flat.

        Raises:
            InputError: The file is gone, or has become shorter.
        """
        dtype = np.dtype(self.dtype.numpy())
        array = np.empty(stop - start, dtype)
        view = array.view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * dtype.itemsize)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise InputError(
                            f"{self.path.name} has become shorter while it was read", next_step="Copy the file again."
                        )
                    view = view[count:]
        except OSError as error:
            raise InputError(
                f"cannot read {self.path.name}: {error.strerror or error}", next_step="Copy the file again."
            ) from error
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


@dataclass(frozen=True)
class _Step:
    dtype: ir.DataType
    convert: Convert


class StreamedTensor(ir.LazyTensor):
    """A tensor in a file, maybe transposed, and what is done to each of its elements when it is read."""

    __slots__ = ("place", "steps", "turned")

    def __init__(
        self, place: Place, *, name: str | None = None, turned: bool = False, steps: tuple[_Step, ...] = ()
    ) -> None:
        """Args: `turned` transposes a matrix; `steps` are done in order."""
        self.place, self.turned, self.steps = place, turned, steps
        shape = place.shape[::-1] if turned else place.shape
        dtype = steps[-1].dtype if steps else place.dtype
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)

    def transposed(self, name: str | None = None) -> StreamedTensor:
        """The same matrix as [n, m] instead of [m, n]; its steps then see the elements in the other order."""
        if len(self.place.shape) != 2:
            raise ValueError("only a matrix can be transposed as it is read")
        return StreamedTensor(self.place, name=name or self.name, turned=not self.turned, steps=self.steps)

    def converted(self, dtype: ir.DataType, convert: Convert) -> StreamedTensor:
        """The same elements as `dtype`, of the same shape and name."""
        return StreamedTensor(
            self.place, name=self.name, turned=self.turned, steps=(*self.steps, _Step(dtype, convert))
        )

    def same_as(self, other: StreamedTensor) -> bool:
        """Whether both are the same bytes of the same file, seen in the same way."""
        return (self.place, self.turned, self.steps) == (other.place, other.turned, other.steps)

    def sample(self, count: int = 256) -> bytes:
        """Bytes of elements from all over the tensor as stored, for telling tensors apart without reading them."""
        step = max(1, self.place.size // 8)
        starts = range(0, self.place.size, step)
        return b"".join(self.place.read(s, min(s + count, self.place.size)).tobytes() for s in starts)

    def pieces(self, elements: int = PIECE, threads: int = 1) -> Iterator[np.ndarray]:
        """The tensor in row-major order, flat, whole rows at a time where it is transposed.

        A transposed matrix is read whole, in the type in which it is stored.
        """
        rows, columns = _as_matrix(tuple(self.shape.numpy()))
        step = max(1, elements // max(1, columns)) if self.turned else elements
        stops = rows if self.turned else self.place.size
        read: Callable[[int], np.ndarray]
        if self.turned:
            stored = self.place.read(0, self.place.size).reshape(self.place.shape)
            read = partial(_turned_strip, stored, step)
        else:
            read = self._straight(step)
        scale = columns if self.turned else 1
        yield from in_order(lambda s: self._convert(read(s), s * scale), range(0, stops, step), threads)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor that is not transposed."""
        if self.turned:
            raise ValueError("rows of a transposed matrix lie all over the file")
        width = self.place.size // max(1, self.place.shape[0])
        first = start * width
        flat = self._convert(self.place.read(first, stop * width), first)
        return flat.reshape(stop - start, *self.place.shape[1:])

    def tobytes(self) -> bytes:
        return self.numpy().tobytes()

    def tofile(self, file: BinaryIO) -> None:
        for piece in self.pieces(threads=_threads()):
            file.write(np.ascontiguousarray(piece).view(np.uint8).data)

    def numpy(self) -> np.ndarray:
        result = np.empty(self.shape.numpy(), self.dtype.numpy())
        flat, start = result.reshape(-1), 0
        for piece in self.pieces():
            flat[start : start + piece.size] = piece
            start += piece.size
        return result

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self.numpy(), dtype=self.dtype, name=self.name)

    def _straight(self, step: int) -> Callable[[int], np.ndarray]:
        return lambda start: self.place.read(start, min(start + step, self.place.size))

    def _convert(self, piece: np.ndarray, start: int) -> np.ndarray:
        for step in self.steps:
            piece = step.convert(piece, start)
        return piece


def streamed(tensor: ir.TensorProtocol | None) -> StreamedTensor | None:
    """`tensor` as one that is read a piece at a time; None where it is in memory already, or a small one of a file."""
    if isinstance(tensor, StreamedTensor):
        return tensor
    if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < STREAM_FROM:
        return None
    if float(tensor.dtype.itemsize).is_integer():
        place = Place(Path(tensor.path), tensor.offset or 0, tensor.dtype, tuple(tensor.shape.numpy()))
        return StreamedTensor(place, name=tensor.name)
    return None


def astype(dtype: ir.DataType) -> Convert:
    """A step that rounds to nearest, as numpy does."""
    wanted = dtype.numpy()
    return lambda piece, _: piece.astype(wanted)


def in_order(function: Callable[[_In], _Out], items: Iterable[_In], threads: int) -> Iterator[_Out]:
    """`map` over some threads, in order, not more than `threads` results ahead of what is taken."""
    if threads < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def _threads() -> int:
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _turned_strip(stored: np.ndarray, count: int, start: int) -> np.ndarray:
    """Rows `start` to `start + count` of the transposed matrix, flat."""
    stop = min(start + count, stored.shape[1])
    result = np.empty((stop - start, stored.shape[0]), stored.dtype)
    for first in range(start, stop, _STRIP):
        last = min(first + _STRIP, stop)
        result[first - start : last - start] = stored[:, first:last].copy().T
    return result.reshape(-1)

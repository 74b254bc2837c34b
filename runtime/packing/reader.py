# SPDX-License-Identifier: Apache-2.0
"""Unpacking a model: onto the disk, or into memory and from there into a session."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

from ...contracts.digest import sha256_of
from ...contracts.errors import InputError
from ..engine import Array
from ..machine import default_threads
from .chunks import in_order, unpack_chunk
from .codecs import Damaged
from .container import HEADER_BYTES, MAGIC, Chunk, Index, Range, damaged, read_index
from .writer import require_absent

if TYPE_CHECKING:
    from ..session import Session

_BLOCK = 4 << 20

_ALWAYS_FITS = 64 << 20
"""Bytes up to which nobody asks how much memory is free: that takes a tenth of the time of unpacking a small model."""


@dataclass(frozen=True)
class UnpackedModel:
    """A model in memory.

    Attributes:
        model: The bytes of the `.onnx` file, uint8 [size].
        external: Name that the model uses -> the bytes of an external data file, uint8 [size].
    """

    model: Array
    external: dict[str, Array]


def is_packed(path: str | Path) -> bool:
    """Whether a file begins as a packed model does; False where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def unpack(
    source: str | Path, target: str | Path | None = None, *, threads: int | None = None, force: bool = False
) -> list[Path]:
    """Write the model and its external data as they were, and return the files, the model first.

    Args:
        source: The packed file.
        target: The `.onnx` file; by default beside the packed one, under its old name. External data lies beside it
            under the name that the model uses.
        threads: One a usable physical core by default.
        force: Replace files that exist.

    Raises:
        InputError: It is no packed model or damaged, a file exists, or cannot be written. Nothing is left behind.
    """
    source = Path(source)
    with _opened(source) as packed:
        index = read_index(packed, source.name)
        target = source.with_name(index.files[0].name) if target is None else Path(target)
        targets = [target, *(target.parent / file.name for file in index.files[1:])]
        for file in targets:
            require_absent(file, force)
            if file.resolve() == source.resolve():
                raise InputError(f"{file.name} is what is to be unpacked", next_step="Choose another -o.")
        if len({file.resolve() for file in targets}) != len(targets):
            raise InputError(f"{target.name} is the name of its external data", next_step="Choose another -o.")
        folder = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(folder, ignore_errors=True)  # a killed run's files are not ours
            folder.mkdir(parents=True)
            _require_space(index, folder)
            with ExitStack() as stack:
                _fill(_Folder(index, folder, stack), index, packed, source.name, threads or default_threads())
            for number, file in reversed(list(enumerate(targets))):  # the model last: it is what is looked for
                file.parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / str(number), file)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"cannot write {target.name}: {reason}", next_step="Free some space or choose -o."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return targets


def unpack_to_memory(source: str | Path, *, threads: int | None = None) -> UnpackedModel:
    """Unpack a model into memory; no file is written.

    Raises:
        InputError: It is no packed model or damaged, or memory does not hold it.
    """
    source = Path(source)
    with _opened(source) as packed:
        index = read_index(packed, source.name)
        _require_memory(index, source.name)
        memory = _Memory(index)
        _fill(memory, index, packed, source.name, threads or default_threads())
    model, *external = memory.arrays
    return UnpackedModel(model, {file.name: data for file, data in zip(index.files[1:], external, strict=True)})


def load_packed(source: str | Path, *, provider: str = "cpu", threads: int | None = None) -> Session:
    """Load a packed model straight into a session; no file is written. `Session` itself takes packed files as well.

    Raises:
        InputError: It is no packed model or damaged, memory does not hold it, or as `Session`.
        MissingDependency: As `Session`.
    """
    from ..session import Session

    if not is_packed(source):
        raise InputError(f"{Path(source).name} is no packed model", next_step="Check the path.")
    return Session(source, provider=provider, threads=threads)


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {source.name}: {error.strerror}", next_step="Check the path.") from error


def _require_space(index: Index, folder: Path) -> None:
    """A few kilobytes can declare terabytes: they must not fill the disk before that is noticed."""
    needed = sum(file.size for file in index.files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"unpacked it takes {needed:,} bytes, and {free:,} are free", next_step="Free some space or choose -o."
        )


def _require_memory(index: Index, name: str) -> None:
    import psutil

    needed = sum(file.size for file in index.files)
    if needed > _ALWAYS_FITS and needed > (free := psutil.virtual_memory().available):
        raise InputError(
            f"{name} takes {needed:,} bytes of memory, and {free:,} are free",
            next_step=f"Unpack it to disk first: onnxpress unpack {name}",
        )


class _Target(Protocol):
    """Where the files go; they are told apart by their numbers."""

    def write(self, file: int, start: int, data: Array) -> None: ...

    def copy(self, part: Range, file: int, start: int) -> None: ...

    def sha256(self, file: int) -> str: ...


class _Memory:
    def __init__(self, index: Index) -> None:
        # numpy asks for huge pages; the first touch of small ones costs as much as all the rest
        self.arrays = [np.empty(file.size, np.uint8) for file in index.files]

    def write(self, file: int, start: int, data: Array) -> None:
        self.arrays[file][start : start + data.size] = data

    def copy(self, part: Range, file: int, start: int) -> None:
        self.write(file, start, self.arrays[part.file][part.start : part.start + part.length])

    def sha256(self, file: int) -> str:
        return hashlib.sha256(self.arrays[file].data).hexdigest()


class _Folder:
    """Files named by their numbers."""

    def __init__(self, index: Index, folder: Path, stack: ExitStack) -> None:
        self.paths = [folder / str(number) for number in range(len(index.files))]
        self._files: list[BinaryIO] = [stack.enter_context(path.open("w+b", buffering=0)) for path in self.paths]
        self._lock = Lock()  # a file has one position

    def write(self, file: int, start: int, data: Array) -> None:
        with self._lock:
            self._files[file].seek(start)
            view = data.data
            while view:
                view = view[self._files[file].write(view) :]

    def copy(self, part: Range, file: int, start: int) -> None:
        for at in range(0, part.length, _BLOCK):
            with self._lock:
                self._files[part.file].seek(part.start + at)
                data = self._files[part.file].read(min(_BLOCK, part.length - at))
            self.write(file, start + at, np.frombuffer(data, np.uint8))

    def sha256(self, file: int) -> str:
        return sha256_of([self.paths[file]])


def _fill(target: _Target, index: Index, packed: BinaryIO, name: str, threads: int) -> None:
    """Write all ranges of all files, then the copies, and compare the hashes."""

    def work(piece: tuple[Chunk, list[Range], bytes]) -> None:
        chunk, ranges, data = piece
        found, at = unpack_chunk(chunk, index.streams[chunk.stream].itemsize, data), 0
        for part in ranges:
            target.write(part.file, part.start, found[at : at + part.length])
            at += part.length

    try:
        for _ in in_order(work, _pieces(index, packed), threads):
            pass
    except Damaged as error:
        raise damaged(name, str(error)) from error
    for copy in index.copies:
        target.copy(copy.source, copy.file, copy.start)
    for number, file in enumerate(index.files):
        if target.sha256(number) != file.sha256:
            raise damaged(name, f"{file.name} does not come out as it was")


def _pieces(index: Index, packed: BinaryIO) -> Iterator[tuple[Chunk, list[Range], bytes]]:
    """Each chunk, the places that its bytes go to, and its packed bytes."""
    packed.seek(HEADER_BYTES)
    number = -1
    places: Iterator[Range] = iter(())
    rest: Range | None = None
    for chunk in index.chunks:
        if chunk.stream != number:
            number, places, rest = chunk.stream, iter(index.streams[chunk.stream].ranges), None
        ranges, left = [], chunk.size
        while left:
            part = rest or next(places)
            length = min(left, part.length)
            ranges.append(Range(part.file, part.start, length))
            rest = Range(part.file, part.start + length, part.length - length) if length < part.length else None
            left -= length
        yield chunk, ranges, packed.read(chunk.packed)

# SPDX-License-Identifier: Apache-2.0
"""Packing a model: read in chunks, packed in threads, written in order."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...contracts.digest import sha256_of
from ...contracts.errors import InputError
from ..machine import default_threads
from . import codecs
from .chunks import PackedChunk, in_order, pack_chunk
from .container import HEADER_BYTES, Index, PackedFile, Range, Stream, write_index
from .layout import Layout, layout_of

SUFFIX = ".pack"
CHUNK = 1 << 18
"""Bytes of a chunk before packing. It fits the cache of a core; and weights change their spread from layer to layer, so
that larger chunks were no smaller once packed (256 KiB against 1 and 4 MiB on ten models)."""


@dataclass(frozen=True)
class PackReport:
    """What packing has brought.

    Attributes:
        file: The packed file.
        bytes_before: Of the model and its external data.
        bytes_after: Of the packed file.
        repeated_bytes: Of tensors that another one equals.
        types: Element type (`other` for what is no tensor) -> bytes before, bytes after.
        seconds: What it took.
    """

    file: Path
    bytes_before: int
    bytes_after: int
    repeated_bytes: int
    types: dict[str, tuple[int, int]]
    seconds: float

    def summary(self) -> str:
        """The sizes in words: of the whole, then by element type."""
        share = 100 * self.bytes_after / self.bytes_before
        whole = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.1f} %) in {self.seconds:.1f} s"
        lines = [f"{self.file}: {whole}"]
        rows = sorted(self.types.items(), key=lambda row: -row[1][0])
        lines += [f"  {name:<10} {before:>15,} -> {after:>15,}" for name, (before, after) in rows]
        if self.repeated_bytes:
            lines.append(f"  {'repeated':<10} {self.repeated_bytes:>15,} -> {0:>15,}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.bytes_before / self.bytes_after,
            "repeated_bytes": self.repeated_bytes,
            "types": {name: {"before": b, "after": a} for name, (b, a) in self.types.items()},
            "seconds": self.seconds,
        }


def pack(
    source: str | Path,
    target: str | Path,
    *,
    codec: str = "auto",
    level: int = 19,
    threads: int | None = None,
    force: bool = False,
) -> PackReport:
    """Pack an `.onnx` file and its external data into one file.

    Memory stays within a few chunks of 256 KiB a thread, whatever the size of the model.

    Args:
        source: The model.
        target: The file to write; it is absent, as it was, or complete, whatever happens.
        codec: One of `CODECS`.
        level: Of zstandard, 1 to 22.
        threads: One a usable physical core by default.
        force: Replace a target that exists.

    Raises:
        InputError: The source is no ONNX model or not complete, the target exists or cannot be written, or an argument
            is out of range.
        MissingDependency: The codec is not installed.
    """
    started = time.perf_counter()
    source, target = Path(source), Path(target)
    codecs.require(codec)
    if not 1 <= level <= 22:
        raise InputError(f"level must be from 1 to 22, not {level}")
    if threads is not None and threads < 1:
        raise InputError(f"threads must be 1 or more, not {threads}")
    layout = layout_of(source)
    if any(target.resolve() == file.path.resolve() for file in layout.files):
        raise InputError(f"{target.name} is what is to be packed", next_step="Choose another -o.")
    require_absent(target, force)
    partial_file = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_file.open("wb") as out:
            index = _write(layout, out, partial(_packed, layout, codec, level), threads or default_threads())
            size = write_index(index, out)
        os.replace(partial_file, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {target.name}: {reason}", next_step="Free some space or choose -o.") from error
    finally:
        partial_file.unlink(missing_ok=True)
    return _report(index, target, size, time.perf_counter() - started)


def require_absent(target: Path, force: bool) -> None:
    """Raise InputError where something would be replaced that the user did not give up."""
    if target.is_dir():
        raise InputError(f"{target} is a folder", next_step="Name a file with -o.")
    if target.exists() and not force:
        raise InputError(f"{target} exists", next_step="Add --force to replace it.")


_Piece = tuple[int, bytes]
"""The number of a stream, and some of its bytes."""


def _packed(layout: Layout, codec: str, level: int, piece: _Piece) -> PackedChunk:
    number, data = piece
    return pack_chunk(number, layout.streams[number], data, codec, level)


def _write(layout: Layout, out: BinaryIO, work: Callable[[_Piece], PackedChunk], threads: int) -> Index:
    files = [PackedFile(file.name, file.size, sha256_of([file.path])) for file in layout.files]
    index = Index(files, layout.streams, layout.copies)
    out.write(bytes(HEADER_BYTES))
    with ExitStack() as stack:
        opened: list[BinaryIO] = [stack.enter_context(file.path.open("rb")) for file in layout.files]
        for packed in in_order(work, _pieces(layout, opened), threads):
            out.writelines(packed.parts)
            index.chunks.append(packed.chunk)
    return index


def _pieces(layout: Layout, opened: list[BinaryIO]) -> Iterator[_Piece]:
    for number, stream in enumerate(layout.streams):
        for ranges in _cut(stream):
            pieces = []
            for part in ranges:
                opened[part.file].seek(part.start)
                data = opened[part.file].read(part.length)
                if len(data) != part.length:
                    raise InputError(f"{layout.files[part.file].name} became shorter while it was read")
                pieces.append(data)
            yield number, b"".join(pieces)


def _cut(stream: Stream) -> Iterator[list[Range]]:
    """Cut a stream into chunks; a large tensor begins one of its own, since it may be pruned and the others not."""
    chunk: list[Range] = []
    held = 0
    for part in stream.ranges:
        if held >= CHUNK // 4 and part.length >= CHUNK // 4:
            yield chunk
            chunk, held = [], 0
        start, end = part.start, part.start + part.length
        while start < end:
            length = min(end - start, CHUNK - held)
            chunk.append(Range(part.file, start, length))
            start, held = start + length, held + length
            if held == CHUNK:
                yield chunk
                chunk, held = [], 0
    if chunk:
        yield chunk


def _report(index: Index, target: Path, size: int, seconds: float) -> PackReport:
    types: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for chunk in index.chunks:
        name = index.streams[chunk.stream].dtype or "other"
        before, after = types[name]
        types[name] = before + chunk.size, after + chunk.packed
    repeated = sum(copy.source.length for copy in index.copies)
    return PackReport(target, sum(f.size for f in index.files), size, repeated, dict(types), seconds)

# SPDX-License-Identifier: Apache-2.0
"""The packed file: a header, the chunks one after the other, and an index at the end.

header   36 bytes, little-endian: magic (8), version u32, offset u64, packed size u32 and unpacked size u32 of the
         index, CRC-32 of the packed index u32, CRC-32 of the header before it u32.
chunks   Each is the parts of one transform, each part packed by one codec. Nothing lies between them.
index    JSON, packed with zstandard if that is smaller: a list of these four.
         files    [name, size, sha256] each; the first is the model, the others its external data. Names are relative
                  to the model's folder, with `/`.
         streams  [dtype, bytes an element, [file, gap, length, file, gap, length, ...]]: the bytes of all tensors of
                  one type, or (dtype empty) all other bytes; a range begins `gap` bytes after the one before it in the
                  same stream and file ended.
         copies   [file, start, file, start, length]: bytes that lie at the second place as well as at the first.
         chunks   [stream, bytes, transform, elements kept, CRC-32 of the packed parts, codec, packed size, codec,
                  packed size, ...]: in order, they make up the streams one after the other.

What is read is hostile until it has been checked: ranges and copies must cover each file exactly once, the chunks must
make up the streams and end where the index begins, and every size is known before anything is allocated.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

from ...contracts.errors import InputError
from . import codecs
from .codecs import Damaged
from .transforms import TRANSFORMS

MAGIC = b"\x89ONXPK\r\n"  # begins like no text, and shows what a transfer as text does to line ends
VERSION = 1
HEADER = struct.Struct("<8sIQIII")
HEADER_BYTES = HEADER.size + 4

MAX_CHUNK = 16 << 20
_MAX_INDEX = 256 << 20
_MAX_ITEMSIZE = 16
_AGAIN = "Fetch the file again, or pack the model again."


class Range(NamedTuple):
    """Some bytes of one file, given by its place in the index."""

    file: int
    start: int
    length: int


@dataclass(frozen=True)
class Stream:
    """The bytes of all tensors of one type, in the order of `ranges`; `dtype` is empty for those of no tensor."""

    dtype: str
    itemsize: int
    ranges: tuple[Range, ...]

    @property
    def length(self) -> int:
        return sum(part.length for part in self.ranges)


@dataclass(frozen=True)
class Copy:
    """Bytes that equal those of a range."""

    source: Range
    file: int
    start: int


@dataclass(frozen=True)
class Chunk:
    """Some bytes of a stream, packed; `parts` holds the codec and the packed size of each."""

    stream: int
    size: int
    transform: int
    kept: int
    checksum: int
    parts: tuple[tuple[int, int], ...]

    @property
    def packed(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class PackedFile:
    """A file as it was: its name relative to the model's folder, its size, and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass
class Index:
    """All that a packed file says about itself."""

    files: list[PackedFile]
    streams: list[Stream]
    copies: list[Copy]
    chunks: list[Chunk] = field(default_factory=list)


def write_index(index: Index, out: BinaryIO) -> int:
    """Write the index at the end and the header at the beginning; return the bytes of the whole file."""
    text = json.dumps(_to_json(index), separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    _, packed = codecs.encode(text, "zstd", 19)
    offset = out.seek(0, 2)
    out.write(packed)
    header = HEADER.pack(MAGIC, VERSION, offset, len(packed), len(text), zlib.crc32(packed))
    out.seek(0)
    out.write(header + struct.pack("<I", zlib.crc32(header)))
    return offset + len(packed)


def read_index(source: BinaryIO, name: str) -> Index:
    """Read and check the index of a packed file.

    Args:
        source: The open file.
        name: What messages call it.

    Raises:
        InputError: It is no packed file, was written by a newer version, or is damaged.
    """
    size = source.seek(0, 2)
    source.seek(0)
    header = source.read(HEADER_BYTES)
    if header[: len(MAGIC)] != MAGIC:
        raise InputError(f"{name} is no packed model", next_step="Pack a model with: onnxpress pack model.onnx")
    try:
        offset, packed, unpacked, checksum = _header(header, size, name)
        source.seek(offset)
        data = source.read(packed)
        if zlib.crc32(data) != checksum:
            raise Damaged("its index was changed")
        number = codecs.RAW if packed == unpacked else codecs.ZSTD
        index = _from_json(json.loads(bytes(codecs.decode(number, data, unpacked))))
        _check(index, offset - HEADER_BYTES)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, struct.error) as error:
        why = str(error) if isinstance(error, Damaged) else "its index cannot be read"
        raise damaged(name, why) from error
    return index


def damaged(name: str, why: str) -> InputError:
    """The error for a packed file that is not as it was written."""
    return InputError(f"{name} is damaged: {why}", next_step=_AGAIN)


def _header(header: bytes, size: int, name: str) -> tuple[int, int, int, int]:
    _, version, offset, packed, unpacked, checksum = HEADER.unpack(header[: HEADER.size])
    if struct.pack("<I", zlib.crc32(header[: HEADER.size])) != header[HEADER.size :]:
        raise Damaged("its header was changed")
    if version != VERSION:
        raise InputError(
            f"{name} has version {version} of the format; this onnxpress reads {VERSION}",
            next_step="Install the version of onnxpress that packed it.",
        )
    if offset < HEADER_BYTES or offset + packed != size:
        raise Damaged("it is cut off")
    if unpacked > _MAX_INDEX or packed > unpacked:
        raise Damaged("its index is too large")
    return offset, packed, unpacked, checksum


def _to_json(index: Index) -> list[list[Any]]:
    return [
        [[file.name, file.size, file.sha256] for file in index.files],
        [[s.dtype, s.itemsize, list(_gaps(s.ranges))] for s in index.streams],
        [[c.source.file, c.source.start, c.file, c.start, c.source.length] for c in index.copies],
        [
            [c.stream, c.size, c.transform, c.kept, c.checksum, *(x for part in c.parts for x in part)]
            for c in index.chunks
        ],
    ]


def _gaps(ranges: tuple[Range, ...]) -> Iterator[int]:
    """Gaps repeat where offsets do not, so that they pack better."""
    ends: dict[int, int] = {}
    for part in ranges:
        yield from (part.file, part.start - ends.get(part.file, 0), part.length)
        ends[part.file] = part.start + part.length


def _from_json(data: list[list[Any]]) -> Index:
    listed_files, listed_streams, listed_copies, listed_chunks = data
    streams = []
    for dtype, itemsize, numbers in listed_streams:
        ends: dict[int, int] = {}
        ranges = []
        for file, gap, length in _by_threes(numbers):
            start = ends.get(file, 0) + gap
            ranges.append(Range(file, start, length))
            ends[file] = start + length
        streams.append(Stream(str(dtype), _whole(itemsize), tuple(ranges)))
    copies = [
        Copy(Range(_whole(file), _whole(start), _whole(length)), _whole(other), _whole(there))
        for file, start, other, there, length in listed_copies
    ]
    chunks = []
    for stream, size, transform, kept, checksum, *parts in listed_chunks:
        numbers = [_whole(number) for number in (stream, size, transform, kept, checksum, *parts)]
        pairs = tuple(zip(numbers[5::2], numbers[6::2], strict=True))
        chunks.append(Chunk(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], pairs))
    files = [PackedFile(safe_name(name), _whole(size), str(digest)) for name, size, digest in listed_files]
    return Index(files, streams, copies, chunks)


def _by_threes(numbers: list[Any]) -> Iterator[tuple[int, int, int]]:
    wholes = [_whole(number) for number in numbers]
    yield from zip(wholes[::3], wholes[1::3], wholes[2::3], strict=True)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0 or value >> 63:
        raise Damaged("its index holds a number that is none")
    return value


def safe_name(name: Any) -> str:
    """Return a relative path that stays in its folder on every system, or raise Damaged."""
    path, windows = PurePosixPath(str(name)), PureWindowsPath(str(name))
    plain = isinstance(name, str) and path.parts and str(path) == name and name.isprintable()
    if not plain or path.is_absolute() or ".." in path.parts or windows.anchor or "\\" in name or ":" in name:
        raise Damaged("it names a file outside its folder")
    return str(path)


def _check(index: Index, payload: int) -> None:
    names = [file.name for file in index.files]
    if not names or len(set(names)) != len(names) or len(PurePosixPath(names[0]).parts) != 1:
        raise Damaged("it names no model")
    if any(not 0 < stream.itemsize <= _MAX_ITEMSIZE for stream in index.streams):
        raise Damaged("an element has no such size")
    _check_cover(index)
    _check_chunks(index, payload)


def _check_cover(index: Index) -> None:
    """Every byte of every file comes from one range, or is a copy of a range."""
    stored = [part for stream in index.streams for part in stream.ranges]
    known = set(stored)
    if any(copy.source not in known for copy in index.copies):
        raise Damaged("it copies what it does not hold")
    placed = sorted(
        [(part.file, part.start, part.length) for part in stored]
        + [(copy.file, copy.start, copy.source.length) for copy in index.copies]
    )
    ends = [0] * len(index.files)
    for file, start, length in placed:
        if start != ends[file]:
            raise Damaged("its files are not complete")
        ends[file] = start + length
    if ends != [file.size for file in index.files]:
        raise Damaged("its files are not complete")


def _check_chunks(index: Index, payload: int) -> None:
    lengths = [0] * len(index.streams)
    order = [chunk.stream for chunk in index.chunks]
    for chunk in index.chunks:
        itemsize = index.streams[chunk.stream].itemsize
        transform = TRANSFORMS[chunk.transform] if chunk.transform < len(TRANSFORMS) else None
        if transform is None or not 0 < chunk.size <= MAX_CHUNK or chunk.size % itemsize:
            raise Damaged("a chunk cannot be")
        most = chunk.size // itemsize
        sizes = transform.sizes(chunk.size, itemsize, chunk.kept)
        packed = [length for _, length in chunk.parts]
        if (
            not (chunk.kept <= most if transform.sparse else chunk.kept == most)
            or len(packed) != len(sizes)
            or any(length > size for length, size in zip(packed, sizes, strict=True))
        ):
            raise Damaged("a chunk cannot be")
        lengths[chunk.stream] += chunk.size
    if order != sorted(order) or lengths != [stream.length for stream in index.streams]:
        raise Damaged("its chunks do not make up its files")
    if sum(chunk.packed for chunk in index.chunks) != payload:
        raise Damaged("its chunks do not fill it")

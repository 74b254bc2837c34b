# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a model belong to tensors of which type, and which of them are there twice.

The model's file is bytes here, not a graph: protobuf may write one graph in many ways, and what is unpacked must be
what was packed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...contracts.errors import InputError
from ..onnx_file import StoredTensor, stored_tensors
from .codecs import Damaged
from .container import Copy, Range, Stream, safe_name

ITEMSIZES = {
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2, "float32": 4, "int32": 4, "uint32": 4, "complex64": 4,
    "float64": 8, "int64": 8, "uint64": 8, "complex128": 8,
}  # fmt: skip
"""Bytes of what is split into planes; all other types are taken byte by byte (two of int4 in one)."""

_SMALLEST = 128
"""Bytes of a tensor from which it is worth an entry of its own in the index."""


@dataclass(frozen=True)
class SourceFile:
    """A file to be packed: the model, or external data of it under the name that the model uses."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Layout:
    """What is where."""

    files: list[SourceFile]
    streams: list[Stream]
    copies: list[Copy]


def layout_of(model: Path) -> Layout:
    """Find the tensors of a model and of its external data.

    Raises:
        InputError: It is no ONNX model, or its external data is missing, cut short or outside its folder.
    """
    if not model.is_file():
        raise InputError(f"no such file: {model.name}", next_step="Check the path.")
    tensors = stored_tensors(model)
    files = [SourceFile(model.name, model, model.stat().st_size)]
    numbers = {"": 0}
    for location in dict.fromkeys(t.location for t in tensors if t.location):
        file = _external(model, location)
        known = [other.name for other in files]
        if file.name not in known:  # it may be written in two ways, or be the model itself
            files.append(file)
        numbers[location] = known.index(file.name) if file.name in known else len(known)
    found: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for tensor in tensors:
        number = numbers[tensor.location]
        found[number].append((tensor.start, _end(tensor, files[number], model), tensor.dtype))
    streams: dict[str, list[Range]] = defaultdict(list)
    for number, file in enumerate(files):
        for start, end, dtype in _apart(found[number], file.size):
            streams[dtype].append(Range(number, start, end - start))
    return _without_repeats(files, streams)


def _external(model: Path, location: str) -> SourceFile:
    path = model.parent / location
    try:
        name = safe_name(str(PurePosixPath(location)))
        inside = path.resolve().is_relative_to(model.parent.resolve())
    except Damaged:
        inside = False
    if not inside:
        raise InputError(
            f"{model.name}: its external data points outside the model's folder",
            next_step="Put the data file beside the .onnx and refer to it by its name alone.",
        )
    if not path.is_file():
        raise InputError(
            f"{model.name}: its external data file {name} is missing", next_step="Copy it beside the .onnx."
        )
    return SourceFile(name, path, path.stat().st_size)


def _end(tensor: StoredTensor, file: SourceFile, model: Path) -> int:
    end = file.size if tensor.length is None else tensor.start + tensor.length
    if not 0 <= tensor.start <= end <= file.size:
        raise InputError(
            f"{model.name}: its external data file {file.name} is cut short", next_step="Copy the data file again."
        )
    return end


def _apart(found: list[tuple[int, int, str]], size: int) -> Iterator[tuple[int, int, str]]:
    """Tensors that are large enough, and what lies between them; of two that overlap, the one that begins first."""
    at = 0
    for start, end, dtype in sorted(found):
        if start < at or end - start < _SMALLEST or (end - start) % ITEMSIZES.get(dtype, 1):
            continue
        if start > at:
            yield at, start, ""
        yield start, end, dtype
        at = end
    if at < size:
        yield at, size, ""


def _without_repeats(files: list[SourceFile], streams: dict[str, list[Range]]) -> Layout:
    """Keep the first of several equal tensors: branches and tied weights hold the same values, far from each other."""
    lengths: dict[int, int] = defaultdict(int)
    for ranges in streams.values():
        for part in ranges:
            lengths[part.length] += part.length >= _SMALLEST
    firsts: dict[tuple[int, bytes], Range] = {}
    copies, kept = [], []
    for dtype, ranges in streams.items():
        own = []
        for part in ranges:
            first = part
            if lengths[part.length] > 1:
                first = firsts.setdefault((part.length, _digest(files[part.file].path, part)), part)
            if first is part:
                own.append(part)
            else:
                copies.append(Copy(first, part.file, part.start))
        if own:
            kept.append(Stream(dtype, ITEMSIZES.get(dtype, 1), tuple(own)))
    return Layout(files, kept, copies)


def _digest(path: Path, part: Range) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(part.start)
        left = part.length
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()

# SPDX-License-Identifier: Apache-2.0
"""One chunk there and back, and many of them in several threads with bounded memory."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ...contracts.errors import OnnxpressError
from ..engine import Array
from . import codecs
from .codecs import Damaged
from .container import Chunk, Stream
from .transforms import NONE, TRANSFORMS, Transform, candidates, forward, inverse

_NEAR = 1.04
"""Transforms whose estimate is within this factor of the best are all tried in full."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PackedChunk:
    """A chunk and its packed parts."""

    chunk: Chunk
    parts: list[bytes]


def pack_chunk(number: int, stream: Stream, data: bytes, codec: str, level: int) -> PackedChunk:
    """Pack some bytes of a stream with the transform that makes them smallest, and check that they come back."""
    chosen = _promising(data, stream, codec)
    best: PackedChunk | None = None
    for transform, kept, parts in chosen:
        packed = [codecs.encode(part, codec, level) for part in parts]
        if best is None or sum(len(p) for _, p in packed) < best.chunk.packed:
            blobs = [blob for _, blob in packed]
            sizes = tuple((coder, len(blob)) for coder, blob in packed)
            chunk = Chunk(number, len(data), transform.number, kept, _checksum(blobs), sizes)
            best = PackedChunk(chunk, blobs)
    assert best is not None
    if unpack_chunk(best.chunk, stream.itemsize, b"".join(best.parts)).tobytes() != data:
        raise OnnxpressError("a chunk does not come back as it was")
    return best


def unpack_chunk(chunk: Chunk, itemsize: int, packed: bytes) -> Array:
    """Return the bytes of a chunk whose place in the index has been checked, as uint8 [size].

    Raises:
        Damaged: They are not what was packed.
    """
    if len(packed) != chunk.packed or zlib.crc32(packed) != chunk.checksum:
        raise Damaged("its chunks were changed")
    transform = TRANSFORMS[chunk.transform]
    view, at, parts = memoryview(packed), 0, []
    for (coder, length), size in zip(chunk.parts, transform.sizes(chunk.size, itemsize, chunk.kept), strict=True):
        parts.append(codecs.decode(coder, view[at : at + length], size))
        at += length
    return inverse(transform, parts, chunk.size, itemsize)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Apply `work` in several threads and yield the results in order; no more than two items a thread are under way."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _promising(data: bytes, stream: Stream, codec: str) -> list[tuple[Transform, int, list[bytes]]]:
    """The transforms that may be best, applied; an estimate is enough to leave the others out."""
    transforms = [NONE] if codec == "raw" else candidates(data, stream.dtype, stream.itemsize)
    applied = [(transform, *forward(transform, data, stream.itemsize)) for transform in transforms]
    if len(applied) == 1 or codec not in ("auto", "zstd"):
        return applied
    estimates = [sum(codecs.estimate(part) for part in parts) for _, _, parts in applied]
    limit = _NEAR * min(estimates)
    return [one for one, estimate in zip(applied, estimates, strict=True) if estimate <= limit]


def _checksum(blobs: list[bytes]) -> int:
    checksum = 0
    for blob in blobs:
        checksum = zlib.crc32(blob, checksum)
    return checksum

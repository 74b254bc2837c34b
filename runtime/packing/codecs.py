# SPDX-License-Identifier: Apache-2.0
"""Entropy coders for one part of a chunk: zstandard, Huffman, LZW, or nothing where none of them pays.

zstandard (RFC 8878) is tried twice: at the level asked for, and with its match search as good as switched off. A plane
of exponents has no repeats that mean anything; what a high level finds there by chance costs more than Huffman codes
of the same bytes (36.8 instead of 38.5 % on a ResNet). Both decode alike.

`huffman` is DEFLATE without matches (RFC 1951, zlib's Z_HUFFMAN_ONLY): Huffman, A Method for the Construction of
Minimum-Redundancy Codes, 1952. `lzw` is Welch, A Technique for High-Performance Data Compression, 1984, with codes of
up to 12 bits as in TIFF. They are there to be compared with: zstandard is smaller than LZW and decodes several times as
fast as either.
"""

from __future__ import annotations

import threading
import zlib
from functools import cache
from typing import Any

from ...contracts.errors import InputError, MissingDependency, did_you_mean

CODECS = ("auto", "zstd", "huffman", "lzw", "raw")
"""What a user may ask for; `auto` is zstandard, which nothing else beat at its speed."""

RAW, ZSTD, HUFFMAN, LZW = range(4)
"""What a part is written with; the numbers stand in files."""

_PAYS = 0.996
"""A part that shrinks to no less than this is stored as it is: decoding would cost more than it brings."""

_local = threading.local()


class Damaged(ValueError):
    """Bytes that no encoder wrote."""


def require(codec: str) -> None:
    """Check that a codec exists and is installed.

    Raises:
        InputError: There is no such codec.
        MissingDependency: Its library is not installed.
    """
    if codec not in CODECS:
        raise InputError(f"unknown codec '{codec}'", next_step=did_you_mean(codec, CODECS))
    if codec == "lzw":
        _imagecodecs()
    elif codec in ("auto", "zstd"):
        _zstandard()


def encode(data: bytes, codec: str, level: int) -> tuple[int, bytes]:
    """Return the number of the codec that was used and what it made of the bytes."""
    if codec == "raw" or not data:
        return RAW, data
    number, packed = {"huffman": _huffman, "lzw": _lzw}.get(codec, _zstd)(data, level)
    return (number, packed) if len(packed) < _PAYS * len(data) else (RAW, data)


def estimate(data: bytes) -> int:
    """Return about how many bytes `encode` would make at a high level, two orders of magnitude sooner."""
    return min(len(data), len(_entropy_coded(data)), len(_compressor(3).compress(data)))


def decode(number: int, packed: bytes | memoryview, size: int) -> bytes | memoryview:
    """Return the `size` bytes that were encoded; never more, whatever the packed bytes say.

    Raises:
        Damaged: They are not what an encoder wrote.
        MissingDependency: The library of the codec is not installed.
    """
    if number == RAW:
        data: Any = packed
    elif number == ZSTD:
        data = _zstd_decoded(packed, size)
    elif number == HUFFMAN:
        data = _huffman_decoded(packed, size)
    elif number == LZW:
        data = _lzw_decoded(packed, size)
    else:
        raise Damaged(f"unknown codec {number}")
    if len(data) != size:
        raise Damaged("another size than declared")
    decoded: bytes | memoryview = data
    return decoded


def _zstd(data: bytes, level: int) -> tuple[int, bytes]:
    packed = _entropy_coded(data)
    quick = _compressor(min(3, level)).compress(data)
    packed = min(packed, quick, key=len)
    # Noise, such as the low bits of a mantissa: a high level takes a hundred times as long to find the same
    if level > 3 and len(packed) < _PAYS * len(data):
        packed = min(packed, _compressor(level).compress(data), key=len)
    return ZSTD, packed


def _zstd_decoded(packed: bytes | memoryview, size: int) -> bytes:
    zstandard = _zstandard()
    try:
        if zstandard.frame_content_size(packed) != size:  # else it would allocate what a hostile frame declares
            raise Damaged("another size than declared")
        if not hasattr(_local, "decompressor"):
            _local.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        decoded: bytes = _local.decompressor.decompress(packed, allow_extra_data=False)
        return decoded
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error


def _entropy_coded(data: bytes) -> bytes:
    """One frame of Huffman codes: matches of seven bytes or more, remembered in a table of 64 entries, hardly exist."""
    if not hasattr(_local, "entropy"):
        zstandard = _zstandard()
        options = {"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 6, "search_log": 1}
        parameters = zstandard.ZstdCompressionParameters.from_level(1, target_length=0, window_log=17, **options)
        _local.entropy = zstandard.ZstdCompressor(compression_params=parameters)
    packed: bytes = _local.entropy.compress(data)
    return packed


def _compressor(level: int) -> Any:
    """This thread's compressor: they are not to be shared."""
    compressors = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        compressors[level] = _zstandard().ZstdCompressor(level=level)
    return compressors[level]


def _huffman(data: bytes, level: int) -> tuple[int, bytes]:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return HUFFMAN, coder.compress(data) + coder.flush()


def _huffman_decoded(packed: bytes | memoryview, size: int) -> bytes:
    decoder = zlib.decompressobj(-15)
    try:
        data = decoder.decompress(packed, size + 1)
    except zlib.error as error:
        raise Damaged(str(error)) from error
    if not decoder.eof or decoder.unused_data:
        raise Damaged("cut off")
    return data


def _lzw(data: bytes, level: int) -> tuple[int, bytes]:
    packed: bytes = _imagecodecs().lzw_encode(data)
    return LZW, packed


def _lzw_decoded(packed: bytes | memoryview, size: int) -> bytes:
    library = _imagecodecs()
    try:
        data: bytes = library.lzw_decode(packed, out=size)
    except (library.LzwError, ValueError) as error:
        raise Damaged(str(error)) from error
    return data


@cache
def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingDependency("zstandard is not installed", next_step="pip install zstandard") from None
    return zstandard


@cache
def _imagecodecs() -> Any:
    try:
        import imagecodecs
    except ImportError:
        raise MissingDependency(
            "imagecodecs, which has LZW, is not installed", next_step='pip install "onnxpress[lzw]"'
        ) from None
    return imagecodecs

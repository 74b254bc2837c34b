# SPDX-License-Identifier: Apache-2.0
"""Lossless packing of an `.onnx` file and its external data: what is unpacked is the same, byte for byte.

Importing this imports nothing heavy; unpacking needs numpy and zstandard, and no ONNX library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...contracts.lazy import lazy_names

if TYPE_CHECKING:
    from .codecs import CODECS
    from .reader import UnpackedModel, is_packed, load_packed, unpack, unpack_to_memory
    from .writer import PackReport, pack

__all__ = [
    "CODECS",
    "PackReport",
    "UnpackedModel",
    "is_packed",
    "load_packed",
    "pack",
    "unpack",
    "unpack_to_memory",
]

__getattr__ = lazy_names(
    __name__,
    {
        "codecs": ("CODECS",),
        "writer": ("PackReport", "pack"),
        "reader": ("UnpackedModel", "is_packed", "load_packed", "unpack", "unpack_to_memory"),
    },
)

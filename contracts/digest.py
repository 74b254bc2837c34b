# SPDX-License-Identifier: Apache-2.0
"""Hashes of files, as the manifest and the checksums hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of(files: Iterable[str | Path]) -> str:
    """Return the SHA-256, in hexadecimal, of the files' contents one after the other, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()

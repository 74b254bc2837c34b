# SPDX-License-Identifier: Apache-2.0
"""The reading side of sbom.cdx.json: whether a bill of materials is that of the bundle in which it lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..contracts.errors import BundleError

SBOM = "sbom.cdx.json"
SBOM_PATH = "onnxpress:path"
"""The property that names a component's file in the bundle."""

_REMEDY = "Fetch the bundle again, or press it again."


def check_sbom(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Compare the hashes in sbom.cdx.json with the manifest's; returns how many. 0 where the bundle has none.

    Raises:
        BundleError: It cannot be read, names a file that the bundle lacks, or another hash, or lacks a model.
    """
    files = manifest.get("files") or {}
    if SBOM not in files:
        return 0
    try:
        data = json.loads((folder / SBOM).read_text("utf-8"))
        stated = dict(_files(data["metadata"]["component"]))
        models = [str(row["path"]) for row in (*manifest["variants"].values(), *manifest.get("companions", ()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{SBOM} is no bill of materials of this bundle", next_step=_REMEDY) from error
    for path in (*models, *stated):
        if path not in stated or path not in files:
            where = SBOM if path not in stated else "manifest.json"
            raise BundleError(f"{where} does not list {path}", next_step=_REMEDY)
        if stated[path] != files[path]["sha256"]:
            raise BundleError(f"{SBOM} has another hash for {path}", next_step=_REMEDY)
    return len(stated)


def _files(component: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and SHA-256 of every component below this one that stands for a file."""
    for part in component.get("components") or ():
        paths = [row["value"] for row in part.get("properties") or () if row["name"] == SBOM_PATH]
        hashes = [row["content"] for row in part.get("hashes") or () if row["alg"] == "SHA-256"]
        if paths and hashes:
            yield str(paths[0]), str(hashes[0])
        yield from _files(part)

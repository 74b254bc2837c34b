# SPDX-License-Identifier: Apache-2.0
"""The versions that a result depends on, read from package metadata, without importing anything heavy."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = (
    "onnxpress",
    "torch",
    "transformers",
    "optimum",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "numpy",
)


@cache
def versions() -> dict[str, str]:
    """Package name to version for what is installed, and `python`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found

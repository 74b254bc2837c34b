# SPDX-License-Identifier: Apache-2.0
"""What the tests of the JavaScript handoffs share: where the packages are, and a handoff written or checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from onnxpress.pipeline.handoff.handing import hand_off
from onnxpress.pipeline.handoff.node.packages import VARIABLE
from onnxpress.runtime.opened import Bundle

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".consumers" / "node_modules"
"""What scripts/consumers installs."""


def need_packages(patch: pytest.MonkeyPatch, names: Sequence[str]) -> Path:
    """Skip without Node or the packages; else let the checks find them."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    packages = Path(os.environ.get(VARIABLE, CACHE))
    missing = [name for name in names if not (packages / name / "package.json").is_file()]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: run scripts/consumers")
    patch.setenv(VARIABLE, str(packages))
    return packages


def handed(bundle: Bundle, to: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Hand a bundle off and return what handoff.json says, which must be what the verb returns."""
    report = hand_off(bundle.folder, to, folder / "handoff", **options)
    written: dict[str, Any] = json.loads((folder / "handoff" / "handoff.json").read_text("utf-8"))
    assert {**written, "folder": report["folder"]} == report
    return written


def broken(bundle: Bundle, folder: Path, output: str) -> None:
    """Change what the original is said to have answered in a handoff's golden samples: a check must now fail."""
    table, numbers = folder / "golden" / "tensors.txt", folder / "golden" / "tensors.bin"
    raw = bytearray(numbers.read_bytes())
    for line in table.read_text("utf-8").splitlines():
        _, kind, name, dtype, offset, *_ = line.split(" ")
        if (kind, name, dtype) == ("reference", output, "float32"):
            raw[int(offset) : int(offset) + 4] = b"\x00\x00\xc8\x42"  # 100.0
    numbers.write_bytes(raw)

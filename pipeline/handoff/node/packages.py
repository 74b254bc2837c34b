# SPDX-License-Identifier: Apache-2.0
"""The npm packages that a check runs on: found where the user has them, never downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..base import MissingTool, require_tool

VARIABLE = "ONNXPRESS_NODE_MODULES"
"""Names a `node_modules` folder that serves every handoff."""


def find_packages(folder: Path, names: Sequence[str]) -> Path | None:
    """The `node_modules` that has all of them: the handoff's own, else the one that the environment names."""
    places = [folder / "node_modules"]
    if named := os.environ.get(VARIABLE):
        places.append(Path(named).resolve())
    return next((p for p in places if all((p / name / "package.json").is_file() for name in names)), None)


def require_packages(folder: Path, names: Sequence[str], install: str) -> Path:
    """`find_packages`, or MissingTool with how to install them."""
    found = find_packages(folder, names)
    if found is None:
        raise MissingTool(
            f"the npm packages {', '.join(names)} are not installed",
            next_step=f"Run `{install}` in the folder, or let {VARIABLE} name a node_modules folder that has them.",
        )
    return found


def node() -> Path:
    """The program, or MissingTool."""
    return require_tool("node", "Install Node 20 or newer.")


def versions_of(packages: Path, names: Sequence[str]) -> dict[str, str]:
    """The version of each package."""
    return {name: json.loads((packages / name / "package.json").read_text("utf-8"))["version"] for name in names}


def workplace(folder: Path, scratch: Path, packages: Path) -> Path:
    """A folder in which a handoff's programs find their packages: the sources copied, all else linked.

    Node resolves a module from where it really lies, so the sources cannot be links.
    """
    place = scratch / "node"
    place.mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.is_file():
            (place / entry.name).write_bytes(entry.read_bytes())
        elif entry.name != "node_modules":
            (place / entry.name).symlink_to(entry.resolve(), target_is_directory=True)
    (place / "node_modules").symlink_to(packages.resolve(), target_is_directory=True)
    return place

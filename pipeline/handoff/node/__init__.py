# SPDX-License-Identifier: Apache-2.0
"""The bundle in Node: onnxruntime-node, with the tokenizer in JavaScript."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ....runtime.opened import Bundle
from ..base import Check, Target, copy_files, judge, render, run_tool
from . import packages
from .layout import SHARED, write_common

SOURCES = (*SHARED, "model.mjs", "check.mjs", "example.mjs", "package.json")
PACKAGES = ("onnxruntime-node", "@huggingface/tokenizers")


class Node(Target):
    """See the module."""

    name: ClassVar[str] = "node"
    summary: ClassVar[str] = "JavaScript on the server: onnxruntime-node"

    def write(self, bundle: Bundle, folder: Path) -> None:
        about = write_common(bundle, folder)
        here = Path(__file__).parent
        copy_files(here, folder, SOURCES)
        shutil.copyfile(here / "npmrc", folder / ".npmrc")  # under a name that npm does not read in our own folder
        (folder / "README.md").write_text(render(__name__, "README.md.j2", **readme_values(about)), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        return checked_in_node(bundle, folder, scratch, PACKAGES)


def checked_in_node(bundle: Bundle, folder: Path, scratch: Path, names: Sequence[str]) -> Check:
    """Run a handoff's check.mjs on the npm packages in `names`."""
    program = packages.node()
    found = packages.require_packages(folder, names, "npm install --ignore-scripts")
    place = packages.workplace(folder, scratch, found)
    versions = {"node": run_tool([program, "--version"], place).stdout.strip()}
    return judge(
        run_tool([program, "check.mjs"], place),
        [spec.name for spec in bundle.signature.outputs],
        command="npm install --ignore-scripts && npm run check",
        stages=("generated", "run"),
        versions=versions | packages.versions_of(found, names),
    )


def readme_values(about: dict[str, Any]) -> dict[str, Any]:
    """What a README of a JavaScript handoff fills in."""
    return {
        "name": about["name"],
        "task": about["task"],
        "model": about["model"],
        "tokenizer": about["tokenizer"],
        "decoder": bool(about["caches"]),
        "limit": about["maxLength"],
        "inputs": _listed(about["inputs"]),
        "outputs": _listed(about["outputs"]),
        "example": _example(about),
    }


def _example(about: dict[str, Any]) -> str:
    if about["caches"] and about["tokenizer"]:
        return 'for await (const piece of model.write("Once upon a time")) process.stdout.write(piece);'
    if about["tokenizer"]:
        return f'const {{ {about["outputs"][0]["name"]} }} = await model.runTexts(["first text", "second text"]);'
    first = about["inputs"][0]
    return f"const answers = await model.run({{ {first['name']}: /* nested numbers */ }});"


def _listed(specs: list[dict[str, Any]]) -> str:
    """`logits` float32 [batch, 2]; ...: the first few of a long list."""
    shown = [f"`{s['name']}` {s['dtype']} [{', '.join(map(str, s['shape']))}]" for s in specs[:6]]
    more = [f"and {len(specs) - 6} more"] if len(specs) > 6 else []
    return "; ".join(shown + more)


TARGETS: dict[str, Target] = {"node": Node()}

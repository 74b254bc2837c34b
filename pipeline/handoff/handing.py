# SPDX-License-Identifier: Apache-2.0
"""The verb `handoff`: verify the bundle, write the target's folder beside its place, check it, move it there."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ...contracts.errors import GateFailed, InputError, did_you_mean
from ...runtime.opened import Bundle
from ..bundle import Staging, inventory
from ..versions import versions
from . import TARGETS
from .base import FAILED, Check, MissingTool, Target, not_run

HANDOFF = "handoff.json"


def target_named(name: str) -> Target:
    """Return the target, or raise InputError with a suggestion."""
    if name not in TARGETS:
        raise InputError(f"unknown target '{name}'", next_step=did_you_mean(name, TARGETS))
    target: Target = import_module(f".{TARGETS[name]}", __package__).TARGETS[name]
    return target


def hand_off(
    folder: Path, to: str, output: Path | None = None, *, check: bool = False, force: bool = False
) -> dict[str, Any]:
    """Lay a bundle out for a consumer.

    Args:
        folder: The bundle; every file's hash is compared first.
        to: A key of `TARGETS`.
        output: The folder to write; BUNDLE-TARGET beside the bundle if absent.
        check: Also run the consumer on the golden samples.
        force: Replace a handoff that exists.

    Returns:
        What handoff.json holds, and `folder`.

    Raises:
        InputError: Unknown target, a target folder that exists, or a bundle that this consumer cannot run.
        BundleError: The bundle is not whole.
        GateFailed: The consumer's answers are not the golden ones; nothing was written.
    """
    target, bundle = target_named(to), Bundle(folder)
    place = output or folder.resolve().with_name(f"{folder.resolve().name}-{to}")
    with Staging(place, force=force, marker=HANDOFF) as staging:
        target.write(bundle, staging.folder)
        report = _describe(bundle, target, staging.folder)
        if check:
            result = _checked(target, bundle, staging)
            if result.status == FAILED:
                raise GateFailed(
                    f"the {to} consumer does not give the golden answers: {result.reason}",
                    next_step="Nothing was written. Run it without --check to look at the folder.",
                )
            report["check"] = result.to_json()
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (staging.folder / HANDOFF).write_text(text + "\n", "utf-8")
        for path in staging.folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
        staging.publish()
    return {**report, "folder": str(place)}


def _checked(target: Target, bundle: Bundle, staging: Staging) -> Check:
    try:
        return target.check(bundle, staging.folder, staging.scratch)
    except MissingTool as error:
        return not_run(f"{error.message}. {error.next_step}".strip())


def _describe(bundle: Bundle, target: Target, folder: Path) -> dict[str, Any]:
    """What handoff.json says: what this is, of which bundle, and what lies in it."""
    return {
        "schema_version": 1,
        "target": target.name,
        "bundle": {"name": bundle.name, "variant": bundle.variants[0], "sha256": bundle.sha256},
        "created_by": f"onnxpress {versions()['onnxpress']}",
        "task": bundle.task,
        "signature": bundle.signature.to_json(),
        "files": inventory(folder),
        "check": not_run("no check was asked for (--check)").to_json(),
    }

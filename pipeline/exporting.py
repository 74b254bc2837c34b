# SPDX-License-Identifier: Apache-2.0
"""The verb `export`: graphs alone, after the recipe's passes, each proven against the original."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..contracts.errors import InputError
from ..exporters import graph_file
from ..exporters.attempts import load_proven
from ..exporters.exported import ExportedModel
from ..exporters.streamed_checkpoint import folder_to_stream
from .inputs import comparison_cases
from .passes.base import run_pass
from .progress import Progress
from .proof import prove_export
from .recipe import Recipe
from .validate import Parity
from .verbs import reference_run


@dataclass
class _Proven:
    """One graph that agrees with its original, and where it waits."""

    exported: ExportedModel
    model: ir.Model
    parity: Parity
    draft: Path
    size: int

    def to_json(self, file: Path) -> dict[str, Any]:
        return {
            "file": str(file),
            "bytes": self.size,
            "nodes": len(self.model.graph),
            "task": self.exported.task,
            "export": self.exported.export_details,
            "signature": graph_file.signature_of(self.model).to_json(),
            "parity": self.parity.to_json(),
            "relative_error": self.parity.worst("relative_error", lowest=False),
        }


def export_file(
    source: str, output: Path, task: str | None, recipe: Recipe, *, force: bool, progress: Progress
) -> dict[str, Any]:
    """Write the graph after the recipe's passes to `output`, if it agrees with the original.

    Args:
        source: See `sources.load`.
        output: An `.onnx` file; or a folder, which a model of several graphs needs, for `NAME.onnx` of each.
        task: See `sources.load`.
        recipe: Its passes, its export settings and its tolerance are used.
        force: Replace files that exist.
        progress: Told about each stage.

    Returns:
        What `--json` prints; an encoder-decoder's encoder stands under `companions`.

    Raises:
        InputError, ExportError: Nothing is written then.
    """
    if output.suffix not in (".onnx", ""):
        raise InputError(f"{output} does not end in .onnx", next_step="Name the file, such as -o model.onnx.")
    if output.is_file() and not force:
        raise InputError(f"{output} exists", next_step="Add --force to replace it.")
    large = folder_to_stream(source, task, recipe.export.weights)
    if large is not None:
        from .streaming import export_streamed_file

        file = output if output.suffix else output / "model.onnx"
        _make_folder(file)
        return export_streamed_file(large, file, recipe, progress=progress)
    drafts = output.with_name(f".{output.name}.draft")
    try:
        proven = _prove(source, task, recipe, drafts, output, force=force, progress=progress)
        for part in proven:
            graph_file.into_place(part.draft.parent, _target(output, part.exported))
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
    main, *others = [part.to_json(_target(output, part.exported)) for part in proven]
    return {**main, **({"companions": others} if others else {})}


def _prove(
    source: str, task: str | None, recipe: Recipe, drafts: Path, output: Path, *, force: bool, progress: Progress
) -> list[_Proven]:
    """Export and compare all graphs of a source in a folder of drafts, one sub-folder each."""
    proven: list[_Proven] = []

    def prove(exported: ExportedModel) -> None:
        _check_target(exported, output, force=force)
        proven[:] = [_prove_part(part, recipe, drafts, output, progress) for part in (exported, *exported.companions)]

    progress("export", source)
    load_proven(source, task, recipe.export, prove, progress=progress)
    return proven


def _prove_part(exported: ExportedModel, recipe: Recipe, drafts: Path, output: Path, progress: Progress) -> _Proven:
    model = exported.model
    for settings in recipe.built_passes():
        model, _ = run_pass(settings, model)
    target = _target(output, exported)
    _make_folder(target)
    draft = drafts / exported.name / target.name
    draft.parent.mkdir(parents=True, exist_ok=True)
    size = graph_file.write(model, draft)
    progress("compare", f"{target.name} with the original")
    cases, tolerance = comparison_cases(exported, None), recipe.validation.export_tolerance
    parity = prove_export(exported, draft, reference_run(exported), cases, tolerance)
    return _Proven(exported, model, parity, draft, size)


def _target(output: Path, exported: ExportedModel) -> Path:
    return output if output.suffix else output / f"{exported.name}.onnx"


def _check_target(exported: ExportedModel, output: Path, *, force: bool) -> None:
    parts = (exported, *exported.companions)
    if len(parts) > 1 and output.suffix:
        names = ", ".join(f"{part.name}.onnx" for part in parts)
        raise InputError(
            f"{exported.source.name} becomes {len(parts)} graphs: {names}",
            next_step=f"Name a folder for them, such as -o {output.with_suffix('')}.",
        )
    taken = [file for part in parts if (file := _target(output, part)).exists()]
    if taken and not force:
        raise InputError(f"{taken[0]} exists", next_step="Add --force to replace it.")


def _make_folder(file: Path) -> None:
    """Make the folder that `file` will lie in."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {file}: {reason}", next_step="Choose another -o.") from error

# SPDX-License-Identifier: Apache-2.0
"""Backend `optimum`: optimum-onnx exports a transformers folder, and its graph is compared with ours' original.

optimum-onnx wants a transformers older than 4.58, so it lives in an environment of its own (`constraints-optimum.txt`,
see CONTRIBUTING.md) and is looked for in the present one alone.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..contracts.errors import ExportError, MissingDependency
from .blame import chain, first_line, quiet
from .exported import ExportedModel, SourceInfo
from .onnx_source import models_in, read_onnx, the_one_model
from .settings import ExportSettings
from .tokenizer import (
    INPUT_ORDER,
    TextInputs,
    class_names,
    load_tokenizer,
    longest_sequence,
    processor_files,
    read_config,
)
from .transformers_source import hash_weights, infer_task, load_reference

NAME = "optimum"

_ENVIRONMENT = (
    "python3 -m venv .venv-optimum && .venv-optimum/bin/pip install -c constraints-optimum.txt torch && "
    ".venv-optimum/bin/pip install -r constraints-optimum.txt && .venv-optimum/bin/pip install --no-deps -e ."
)


def available() -> bool:
    """Whether optimum-onnx is installed, and not plain optimum alone."""
    try:
        return importlib.util.find_spec("optimum.exporters.onnx") is not None
    except ModuleNotFoundError:
        return False


def export_by_optimum(folder: Path, name: str, task: str | None, settings: ExportSettings) -> ExportedModel:
    """Export the checkpoint in `folder` by optimum's `main_export`, for the same task as every other backend.

    Raises:
        MissingDependency: optimum-onnx is not installed.
        ExportError: optimum fails, writes several graphs, or one with other inputs or outputs than the original's.
    """
    if not available():
        raise MissingDependency(
            "backend 'optimum' needs optimum-onnx, which cannot be installed beside transformers 5",
            next_step=f"Make an environment for it: {_ENVIRONMENT}",
        )
    started = time.perf_counter()
    config = read_config(folder)
    task = task or infer_task(config, name).name
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as written:
        _export(_main_export(), folder, Path(written), task, settings.opset)
        if len(models_in(Path(written))) != 1:
            raise _failed(f"optimum writes {len(models_in(Path(written)))} graphs for {task}, not one")
        exported = read_onnx(the_one_model(Path(written)), task)
        _into_memory(exported.model)
    reference = load_reference(folder, task, settings)
    _refuse_other_names("inputs", [spec.name for spec in exported.signature.inputs], reference.input_names)
    _refuse_other_names("outputs", [spec.name for spec in exported.signature.outputs], reference.output_names)
    module: Any = reference.module
    model = getattr(module, "model", module)
    exported.source = SourceInfo(
        "transformers", name, hash_weights(folder), type(model).__name__, sum(p.numel() for p in model.parameters())
    )
    exported.reference, exported.original_file = reference, None
    _read_text(exported, folder, config)
    exported.processor_files = processor_files(folder)
    exported.id2label = class_names(config) if task.endswith("classification") else None
    exported.export_details = {
        "backend": NAME,
        "opset": exported.model.opset_imports.get("", settings.opset),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return exported


def _read_text(exported: ExportedModel, folder: Path, config: dict[str, Any]) -> None:
    """Take the tokenizer where the checkpoint has it: what optimum writes beside the graph is gone by now."""
    tokenizer = load_tokenizer(folder)
    dtypes = {spec.name: spec.dtype for spec in exported.signature.inputs}
    exported.max_length = longest_sequence(config, tokenizer)
    exported.tokenize = None
    if tokenizer is not None and set(dtypes) <= set(INPUT_ORDER):
        exported.tokenize = TextInputs(tokenizer, dtypes, exported.max_length)


def _main_export() -> Callable[..., None]:
    from optimum.exporters.onnx import main_export

    found: Callable[..., None] = main_export
    return found


def _export(main_export: Callable[..., None], folder: Path, target: Path, task: str, opset: int) -> None:
    try:
        with quiet():
            main_export(
                str(folder),
                target,
                task=task,
                opset=opset,
                dtype="fp32",
                local_files_only=True,
                library_name="transformers",
                do_validation=False,  # ours comes after, and does not let a difference pass as a warning
            )
    except Exception as error:  # whatever optimum and transformers raise
        cause = chain(error)[-1]
        raise _failed(f"optimum cannot export the model: {type(cause).__name__}: {first_line(cause)}") from error


def _into_memory(model: ir.Model) -> None:
    """Read the weights that lie in a file of their own, whose folder is about to go."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)


def _refuse_other_names(kind: str, got: Sequence[str], wanted: Sequence[str]) -> None:
    if set(got) != set(wanted):
        raise _failed(f"optimum's graph has the {kind} {', '.join(got)}, where the original has {', '.join(wanted)}")


def _failed(message: str) -> ExportError:
    error = ExportError(message, next_step="Use another backend: --set export.backend=auto.")
    error.backend = NAME
    return error

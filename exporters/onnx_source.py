# SPDX-License-Identifier: Apache-2.0
"""An `.onnx` file, or a folder that an exporter wrote around one: nothing to export, but to read and to name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError
from ..contracts.signature import Signature
from ..contracts.tasks import GENERIC, task_named
from .exported import ExportedModel, SourceInfo, Tokenize
from .graph_file import read, signature_of
from .tokenizer import (
    INPUT_ORDER,
    TextInputs,
    class_names,
    load_tokenizer,
    longest_sequence,
    processor_files,
    read_config,
)

if TYPE_CHECKING:
    import onnx_ir as ir


def read_onnx(path: Path, task: str | None) -> ExportedModel:
    """Read an `.onnx` file, with the tokenizer that lies beside it or above its `onnx` folder.

    Raises:
        InputError: It is no valid model, or what lies beside it cannot be read.
    """
    if task not in (None, GENERIC):
        task_named(task or "")
    model = read(path)
    signature = signature_of(model)
    exported = ExportedModel(
        model=model,
        signature=signature,
        task=task or GENERIC,
        source=SourceInfo(
            "onnx",
            path.name,
            _hash(path, model),
            model.graph.name,
            sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None),
        ),
        original_file=path.resolve(),
        export_details={"backend": "none", "opset": model.opset_imports.get("", None)},
    )
    folder = _processor_folder(path.resolve())
    if folder is not None:
        config = read_config(folder) if (folder / "config.json").is_file() else {}
        exported.id2label = _labels(signature, class_names(config), exported.task)
        tokenizer = load_tokenizer(folder)
        exported.processor_files = processor_files(folder)
        exported.max_length = longest_sequence(config, tokenizer)
        exported.tokenize = _tokenize(signature, tokenizer, exported.max_length)
    return exported


def models_in(folder: Path) -> list[Path]:
    """The `.onnx` files of a folder that optimum-cli (or the hub's layout, in `onnx/`) wrote.

    Empty where the folder holds PyTorch weights as well: these are the original then.
    """
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return []
    return sorted((*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")))


def the_one_model(folder: Path) -> Path:
    """The only `.onnx` of a folder.

    Raises:
        InputError: There are several: the parts of one model, or variants of it.
    """
    found = models_in(folder)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(file.relative_to(folder).as_posix() for file in found)
    raise InputError(
        f"{folder.resolve().name} holds {len(found)} .onnx files: {shown}",
        next_step=f"Name one of them, such as {folder / found[0].relative_to(folder)}.",
    )


def _hash(path: Path, model: ir.Model) -> str:
    """SHA-256 of the file and of its external data, in name order."""
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sha256_of((path, *sorted({Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)})))


def _processor_folder(path: Path) -> Path | None:
    """Where the tokenizer of an `.onnx` lies: beside it, or above the `onnx` folder that the hub's layout has."""
    candidates = [path.parent, path.parent.parent] if path.parent.name == "onnx" else [path.parent]
    return next((folder for folder in candidates if (folder / "tokenizer.json").is_file()), None)


def _tokenize(signature: Signature, tokenizer: Any, max_length: int | None) -> Tokenize | None:
    """The tokenizer as the graph's inputs want it, or None when they are not text of any length."""
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    free = all(not isinstance(dim, int) for spec in signature.inputs for dim in spec.shape)
    if tokenizer is None or not free or "input_ids" not in dtypes or not set(dtypes) <= set(INPUT_ORDER):
        return None
    return TextInputs(tokenizer, dtypes, max_length)


def _labels(signature: Signature, labels: dict[int, str] | None, task: str) -> dict[int, str] | None:
    """Class names, unless config.json's are those of another head than the graph's."""
    if labels is None or not (task == GENERIC or task.endswith("classification")):
        return None
    shape = signature.outputs[0].shape
    classes = shape[-1] if shape else None
    return labels if classes == len(labels) or (task != GENERIC and not isinstance(classes, int)) else None

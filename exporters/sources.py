# SPDX-License-Identifier: Apache-2.0
"""SOURCE on the command line: a transformers folder or hub id, `package.module:factory`, or an `.onnx` file."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError
from ..contracts.signature import Signature
from ..contracts.tasks import GENERIC, task_named
from .exported import ExportedModel, SourceInfo, Tokenize
from .settings import ExportSettings

if TYPE_CHECKING:
    import onnx_ir as ir

_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_PICKLES = {".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl", ".pickle"}


def load(source: str, task: str | None = None, settings: ExportSettings | None = None) -> ExportedModel:
    """Export `source`, or read it if it is an `.onnx` already.

    Args:
        source: See the module's first line.
        task: A name from `contracts.tasks`, for transformers sources; None asks the checkpoint.
        settings: How to export.

    Raises:
        InputError, ExportError: With one line that says what is wrong.
    """
    settings = settings or ExportSettings()
    path = Path(source)
    if path.suffix == ".onnx":
        return _from_onnx(path, task)
    if path.is_dir():
        return _from_folder(path, task, settings)
    if path.is_file():
        raise _refuse_file(path)
    if is_factory(source):
        if task not in (None, GENERIC):
            raise InputError(f"--task {task} needs a transformers source", next_step="Leave --task out.")
        from .factory_source import export_factory

        return export_factory(source, settings)
    if _HUB_ID.match(source) and not source.startswith((".", "~")):
        return _from_hub(source, task, settings)
    raise _missing(path)


def is_factory(source: str) -> bool:
    """Whether `source` reads `package.module:factory` and is no file of that name."""
    return bool(_FACTORY.match(source)) and not Path(source).exists()


def folder_of(source: str) -> Path:
    """The local folder behind a transformers source: itself, or the hub snapshot (downloaded if it must be)."""
    return Path(source) if Path(source).is_dir() else _snapshot(source)


def _from_folder(path: Path, task: str | None, settings: ExportSettings) -> ExportedModel:
    from .transformers_source import export_folder

    return export_folder(path, path.resolve().name, task, settings)


def _from_hub(source: str, task: str | None, settings: ExportSettings) -> ExportedModel:
    from .transformers_source import export_folder

    return export_folder(_snapshot(source), source, task, settings)


def _snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = source.partition("@")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"no folder '{source}' here and no model '{name}' on the hub",
            next_step=_neighbours(Path(source)) or "Check the spelling; a private model needs HF_TOKEN.",
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"the hub model '{name}' has no revision '{revision}'", next_step="Give a branch, a tag or a commit."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"no folder '{source}' here, and the hub model '{name}' is neither cached nor reachable",
            next_step=_neighbours(Path(source)) or "Check the path, or download the model first.",
        ) from error


def _from_onnx(path: Path, task: str | None) -> ExportedModel:
    from .graph_file import read, signature_of
    from .tokenizer import class_names, load_tokenizer, longest_sequence, processor_files, read_config

    if not path.exists():
        raise _missing(path)
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
    from .tokenizer import INPUT_ORDER, TextInputs

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


def _refuse_file(path: Path) -> InputError:
    if path.suffix in _PICKLES:
        return InputError(
            f"{path.name} would have to be unpickled, which can run any code, and holds no architecture",
            next_step="Pass the folder that save_pretrained wrote, or a package.module:factory that builds the model.",
        )
    return InputError(
        f"{path.name} is no source that onnxpress knows",
        next_step="Pass a transformers folder, a hub id, package.module:factory or an .onnx file.",
    )


def _missing(path: Path) -> InputError:
    return InputError(f"no such file or folder: {path}", next_step=_neighbours(path) or "Check the path.")


def _neighbours(path: Path) -> str:
    """`Did you mean 'models/bert'?`, for the first part of `path` that does not exist."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = [p.name for p in missing.parent.iterdir() if not p.name.startswith(".")]
    except OSError:
        return ""
    close = get_close_matches(missing.name, names, n=1, cutoff=0.5)
    return f"Did you mean '{os.fspath(missing.parent / close[0])}'?" if close else ""

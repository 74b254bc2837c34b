# SPDX-License-Identifier: Apache-2.0
"""SOURCE on the command line: what the user points at, told apart by its form and, for files, by its content.

./folder, owner/name@revision     a transformers checkpoint (config.json with `model_type`), or a timm one
package.module:factory            any nn.Module, built by the user's own function
timm:NAME, timm:NAME@weights      a model of the timm library
program.pt2                       a program that torch.export.save wrote
script.pt, script.ts              a TorchScript archive, with --inputs
model.onnx, ./folder              a graph that exists, also as the only one in a folder
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..contracts.errors import InputError
from ..contracts.tasks import GENERIC
from .settings import ExportSettings

if TYPE_CHECKING:
    from .exported import ExportedModel
    from .reference import TorchReference

_FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_TIMM = re.compile(r"^timm:[\w.-]+(@.+)?$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_PICKLES = {".pt", ".pth", ".th", ".bin", ".ckpt", ".pkl", ".pickle"}

Form = Literal["onnx", "onnx folder", "transformers", "timm", "timm folder", "program", "torchscript", "factory"]


def load(source: str, task: str | None = None, settings: ExportSettings | None = None) -> ExportedModel:
    """Export `source`, or read it if it is an `.onnx` already.

    Args:
        source: See the module's docstring.
        task: A name from `contracts.tasks`, for transformers sources; None asks the checkpoint.
        settings: How to export.

    Raises:
        InputError, ExportError, MissingDependency: With one line that says what is wrong.
    """
    settings = settings or ExportSettings()
    form, path = form_of(source, settings)
    _refuse_what_does_not_apply(source, form, task, settings)
    if form == "onnx folder":
        from .onnx_source import read_onnx, the_one_model

        return read_onnx(the_one_model(path), task)
    if form == "onnx":
        from .onnx_source import read_onnx

        return read_onnx(path, task)
    if form == "transformers" and settings.backend == "optimum":
        from .optimum_folder import export_by_optimum

        return export_by_optimum(path, _name_of(source, path), task, settings)
    if form == "transformers":
        from .transformers_source import export_folder

        return export_folder(path, _name_of(source, path), task, settings)
    if form == "timm folder":
        from .timm_source import export_timm_folder

        return export_timm_folder(path, _name_of(source, path), settings)
    if form == "timm":
        from .timm_source import export_timm

        return export_timm(source, settings)
    if form == "program":
        from .program_source import export_program

        return export_program(path, settings)
    if form == "torchscript":
        from .torchscript_source import export_torchscript

        return export_torchscript(path, settings)
    from .factory_source import export_factory

    return export_factory(source, settings)


def load_reference(source: str, task: str | None, settings: ExportSettings) -> TorchReference:
    """Load the PyTorch original alone, as `load` does: for measuring its load time and memory.

    Raises:
        InputError: There is none: the source is an `.onnx`.
    """
    form, path = form_of(source, settings)
    if form == "transformers":
        from . import transformers_source

        return transformers_source.load_reference(path, task, settings)
    if form == "timm folder":
        from .timm_source import original_of_folder

        return original_of_folder(path).reference()
    if form == "timm":
        from .timm_source import original_timm

        return original_timm(source).reference()
    if form == "program":
        from .program_source import original_program

        return original_program(path).reference()
    if form == "torchscript":
        from .torchscript_source import original_torchscript

        return original_torchscript(path, settings).reference()
    if form == "factory":
        from .factory_source import build

        return build(source).reference()
    raise InputError(f"{path.name} has no PyTorch original", next_step="Pass the source that it was made from.")


def form_of(source: str, settings: ExportSettings | None = None) -> tuple[Form, Path]:
    """What a source is, and the file or folder behind it (a hub model is downloaded if it must be).

    Raises:
        InputError: It is nothing that can be exported, with the reason and, for a slip of the pen, a suggestion.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        if not path.exists():
            raise _missing(path)
        return ("onnx folder" if path.is_dir() else "onnx"), path
    if path.is_dir():
        return _form_of_folder(path), path
    if path.is_file():
        return _form_of_file(path), path
    if _TIMM.match(source):
        return "timm", path
    if is_factory(source):
        return "factory", path
    if _HUB_ID.match(source) and not source.startswith((".", "~")):
        folder = _snapshot(source, code=bool(settings and settings.trust_remote_code))
        return _form_of_folder(folder), folder
    raise _missing(path)


def is_factory(source: str) -> bool:
    """Whether `source` reads `package.module:factory` and is no file of that name."""
    return bool(_FACTORY.match(source)) and not _TIMM.match(source) and not Path(source).exists()


def folder_of(source: str) -> Path:
    """The local folder behind a transformers source: itself, or the hub snapshot (downloaded if it must be)."""
    return Path(source) if Path(source).is_dir() else _snapshot(source)


def _name_of(source: str, path: Path) -> str:
    return path.resolve().name if Path(source).is_dir() else source


def _form_of_folder(folder: Path) -> Form:
    from .onnx_source import models_in
    from .timm_source import is_timm_folder

    if is_timm_folder(folder):
        return "timm folder"
    return "onnx folder" if models_in(folder) else "transformers"


def _form_of_file(path: Path) -> Form:
    from .archives import kind_of

    kind = kind_of(path)
    if kind == "program":
        return "program"
    if kind == "torchscript":
        return "torchscript"
    if kind == "pickle" or path.suffix in _PICKLES:
        raise InputError(
            f"{path.name} would have to be unpickled, which can run any code, and holds no architecture",
            next_step="Pass the folder that save_pretrained wrote, or a package.module:factory that builds the model.",
        )
    raise InputError(
        f"{path.name} is no source that onnxpress knows",
        next_step="Pass a transformers folder, a hub id, package.module:factory, a .pt2, a TorchScript archive or an "
        ".onnx file.",
    )


def _refuse_what_does_not_apply(source: str, form: Form, task: str | None, settings: ExportSettings) -> None:
    """An option that would be passed over in silence is a mistake in the making."""
    if task not in (None, GENERIC) and form not in ("transformers", "onnx", "onnx folder"):
        raise InputError(f"--task {task} needs a transformers source", next_step="Leave --task out.")
    if form != "torchscript":
        given = {
            "--inputs": settings.inputs,
            "export.dynamic_axes": settings.dynamic_axes,
            "export.submodule": settings.submodule,
        }
        option = next((name for name, value in given.items() if value), None)
        if option:
            raise InputError(
                f"{option} is for TorchScript archives, and {Path(source).name} is none", next_step="Leave it out."
            )


def _snapshot(source: str, *, code: bool = False) -> Path:
    """The hub's files behind an id; its Python files only where the user said that they may be run."""
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
    wanted += ["*.py"] if code else []
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

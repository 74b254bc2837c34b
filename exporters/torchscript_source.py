# SPDX-License-Identifier: Apache-2.0
"""A TorchScript archive (`torch.jit.save`), with example inputs from the user: it does not hold any.

Loading one runs none of its code, and its tensors are read by TorchScript's own unpickler, which makes nothing but
tensors. Calling it does run its code, and that has operators that write files, which are refused by name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError, did_you_mean
from .archives import names_in, read_member
from .arguments import CallForm, Flat, split
from .blame import quiet
from .exported import ExportedModel, SourceInfo
from .original import Original, check_dtype, export_original, original_axes, what
from .settings import ExportSettings

_TOUCHES_FILES = re.compile(r"(?:torch|aten|ops)\.(save|from_file)\(")
_PLAIN = {"int": int, "float": float, "bool": bool, "number": float, "str": str}


def export_torchscript(path: Path, settings: ExportSettings) -> ExportedModel:
    """Export an archive on the example inputs that `settings.inputs` names.

    Raises:
        InputError: The archive is damaged, or the inputs are missing or do not fit its `forward`.
        ExportError: An operator has no translation.
    """
    original = original_torchscript(path, settings)
    module = original.module.module
    source = SourceInfo(
        "torchscript", path.name, sha256_of([path]), original.architecture, sum(p.numel() for p in module.parameters())
    )
    only = "torchscript" if settings.backend == "auto" else settings.backend  # torch.export takes no script
    return export_original(original, source, settings.model_copy(update={"backend": only}))


def original_torchscript(path: Path, settings: ExportSettings) -> Original:
    """Load an archive, or the part of it that `settings.submodule` names, and its inputs."""
    archive = _load(path)
    module = _part(archive, settings.submodule, path.name)
    schema = module.forward.schema
    contract = f"It is called as forward({_shown(schema)})."
    if not settings.inputs:
        raise InputError(
            f"{path.name} is a TorchScript archive, which does not say how large its inputs are: "
            f"forward({_shown(schema)})",
            next_step="Add --inputs FILE.npz with an example array for each: numpy.savez(file, x=...); several files "
            "show which sizes vary.",
        )
    read = [_arguments(schema, _arrays(Path(file)), Path(file).name) for file in settings.inputs]
    forms = [_split(schema, values) for values in read]
    form = forms[0][0]
    for (other, _), file in zip(forms, settings.inputs, strict=True):
        if other != form:
            raise InputError(
                f"{Path(file).name} and {Path(settings.inputs[0]).name} differ in more than the sizes of tensors",
                next_step="Give the same arrays in each, with the same plain numbers.",
            )
    calls = [dict(zip(form.names, tensors, strict=True)) for _, tensors in forms]
    if not calls[0]:
        raise InputError(f"{path.name}: the inputs hold no tensor", next_step=contract)
    for name, tensor in calls[0].items():
        check_dtype(f"{path.name}: input '{name}'", tensor)
    axes, example = original_axes(path.name, calls, settings.dynamic_axes)
    known = calls if len(calls) > 1 else ()
    return Original(
        path.name, Flat(module, form), example, axes, known, contract, architecture=str(module.original_name)
    )


def _load(path: Path) -> Any:
    for name in names_in(path):
        inner = name.partition("/")[2]
        found = inner.startswith("code/") and inner.endswith(".py")
        match = _TOUCHES_FILES.search(read_member(path, inner).decode("utf-8", "replace")) if found else None
        if match:
            raise InputError(
                f"{path.name}: its code calls {match[1]}, which writes or maps files",
                next_step="Script the model without it.",
            )
    try:
        with quiet():
            return torch.jit.load(str(path), map_location="cpu").eval()
    except Exception as error:  # whatever the loader meets in the file
        raise InputError(f"{path.name} cannot be loaded: {what(error)}", next_step="Copy or save it again.") from error


def _part(archive: Any, name: str, file: str) -> Any:
    """The submodule of that name; the archive itself for an empty one."""
    parts = dict(archive.named_modules())
    if name not in parts:
        raise InputError(f"{file} has no submodule '{name}'", next_step=did_you_mean(name, [n for n in parts if n]))
    if not hasattr(parts[name], "forward"):
        raise InputError(f"{file}: submodule '{name}' has no forward", next_step="Choose another export.submodule.")
    return parts[name]


def _shown(schema: Any) -> str:
    return ", ".join(f"{a.name}: {a.type}" for a in schema.arguments if a.name != "self")


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {str(name): archive[name] for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"no such file of example inputs: {file}", next_step="Check the path.") from None
    except Exception as error:  # what numpy raises on other files, and on arrays of objects
        raise InputError(
            f"{file.name} is no .npz of plain arrays", next_step="Write it with numpy.savez(file, x=..., y=...)."
        ) from error


def _arguments(schema: Any, arrays: Mapping[str, np.ndarray], file: str) -> dict[str, Any]:
    """The arrays as what `forward` wants: tensors, lists of tensors (`x_0`, `x_1`), and plain numbers.

    Raises:
        InputError: An argument has no array, an array no argument, or the type is another.
    """
    values: dict[str, Any] = {}
    used: set[str] = set()
    for argument in (a for a in schema.arguments if a.name != "self"):
        name, kind = argument.name, str(argument.type).removeprefix("Optional[").removesuffix("]")
        numbered = [n for n in arrays if re.fullmatch(re.escape(name) + r"_\d+", n)]
        if name in arrays:
            used.add(name)
            values[name] = _value(arrays[name], kind, name, file)
        elif "List[Tensor" in str(argument.type) and numbered:
            used.update(numbered)
            ordered = sorted(numbered, key=lambda n: int(n.rsplit("_", 1)[1]))
            values[name] = [torch.from_numpy(arrays[n]) for n in ordered]
        elif not argument.has_default_value():
            raise InputError(
                f"{file} has no array '{name}' for forward({_shown(schema)})",
                next_step=f"It has: {', '.join(arrays) or 'none'}.",
            )
    unknown = sorted(set(arrays) - used)
    if unknown:
        known = [a.name for a in schema.arguments if a.name != "self"]
        raise InputError(f"{file}: '{unknown[0]}' is no argument of forward", next_step=did_you_mean(unknown[0], known))
    return values


def _split(schema: Any, values: Mapping[str, Any]) -> tuple[CallForm, list[torch.Tensor]]:
    """By position up to the first argument that is left to its default, by keyword from there."""
    names = [argument.name for argument in schema.arguments if argument.name != "self"]
    leading = list(itertools.takewhile(lambda name: name in values, names))
    keywords = {name: values[name] for name in names if name in values and name not in leading}
    return split(names, [values[name] for name in leading], keywords)


def _value(array: np.ndarray, kind: str, name: str, file: str) -> Any:
    if kind == "Tensor":
        if array.dtype.kind not in "fiub" or array.dtype in (np.uint16, np.uint32, np.uint64):
            raise InputError(f"{file}: '{name}' holds {array.dtype}", next_step="Use floats, integers or booleans.")
        return torch.from_numpy(np.ascontiguousarray(array))
    if kind in _PLAIN and array.ndim == 0:
        return _PLAIN[kind](array.item())
    raise InputError(
        f"{file}: forward wants '{name}' as {kind}, which an array of shape {list(array.shape)} cannot be",
        next_step="Wrap the model in one that takes tensors and plain numbers, and script that.",
    )

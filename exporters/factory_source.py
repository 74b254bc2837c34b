# SPDX-License-Identifier: Apache-2.0
"""`package.module:factory`: any `nn.Module`, built by the user's own function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ..contracts.errors import InputError, did_you_mean
from .arguments import CallForm, Flat, positional_names, split
from .exported import ExportedModel, SourceInfo
from .observed import observe
from .original import Original, check_dtype, export_original, original_axes, what
from .settings import ExportSettings

_CONTRACT = (
    "Return (module, inputs) or (module, inputs, dynamic_axes): inputs a dict of example tensors by name, or a "
    "function that calls the module."
)


def export_factory(spec: str, settings: ExportSettings) -> ExportedModel:
    """Call the factory and export what it returns.

    The factory takes no arguments and returns `(module, inputs)` or `(module, inputs, dynamic_axes)`. `inputs` is one
    of these:

    - a dict of example arguments by name, or a tuple of them in the order of `forward`'s parameters. They may hold
      dicts and lists of tensors, None and plain values; each tensor is an input, the rest becomes part of the graph;
    - a function that takes the module and calls it as its user does, once or several times:
      `lambda model: [model(photo, size=size) for photo, size in samples]`. What it was called with is what is
      exported, and the sizes that differ between its calls are dynamic. Comparisons use these very inputs.

    `dynamic_axes` maps input name to {axis: symbol}. Without it, axis 0 of every input is `batch`, unless several calls
    showed what varies; `{}` keeps all sizes fixed.

    Raises:
        InputError: The factory cannot be imported or called, or returns something else.
        ExportError: torch.export refuses the module.
    """
    original = build(spec)
    module = original.module.module
    parameters = sum(p.numel() for p in module.parameters())
    return export_original(original, SourceInfo("factory", spec, None, type(module).__name__, parameters), settings)


def build(spec: str) -> Original:
    """Import and call the factory; return the module in eval mode, its example inputs and its dynamic axes."""
    module_name, _, attribute = spec.partition(":")
    factory = _import(module_name, attribute)
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{spec} raises {what(error)}", next_step="Fix the factory and try again.") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise InputError(f"{spec} returns {type(made).__name__}, not (module, inputs)", next_step=_CONTRACT)
    module = made[0].eval().cpu()
    known: list[dict[str, torch.Tensor]] = []
    if callable(made[1]) and not isinstance(made[1], torch.Tensor):
        form, calls = _observed(spec, module, made[1])
        known = calls
    else:
        form, inputs = _given(spec, module, made[1])
        calls = [inputs]
    for name, tensor in calls[0].items():
        check_dtype(f"{spec}: input '{name}'", tensor)
    axes, example = original_axes(spec, calls, made[2] if len(made) == 3 else None)
    return Original(spec, Flat(module, form), example, axes, known, _CONTRACT)


def _observed(spec: str, module: torch.nn.Module, call: Any) -> tuple[CallForm, list[dict[str, torch.Tensor]]]:
    try:
        return observe(module, call, spec)
    except InputError:
        raise
    except Exception as error:  # the user's own code
        raise InputError(f"{spec}: the observed call raises {what(error)}", next_step=_CONTRACT) from error


def _import(module_name: str, attribute: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own file beside the command, as `python -m` would find it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"importing {module_name} raises {what(error)}", next_step="Install what it needs, or fix the import."
            ) from error
        files = get_close_matches(module_name, [path.stem for path in Path().glob("*.py")], n=1)
        raise InputError(
            f"cannot import {error.name}",
            next_step=f"Did you mean '{files[0]}'?" if files else "Check the spelling and the folder you are in.",
        ) from error
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"importing {module_name} raises {what(error)}", next_step="Fix it and try again.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise InputError(
            f"{module_name} has no function '{attribute}'", next_step=did_you_mean(attribute, functions) or _CONTRACT
        )
    return found


def _given(spec: str, module: torch.nn.Module, inputs: Any) -> tuple[CallForm, dict[str, torch.Tensor]]:
    """The form and the tensors of a call with the example inputs, in the order in which `forward` takes them."""
    parameters = inspect.signature(module.forward).parameters.values()
    places = positional_names(module)
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple | list):
        if len(inputs) > len(places) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise InputError(
                f"{spec}: {len(inputs)} example inputs for a forward that takes {len(places)}", next_step=_CONTRACT
            )
        form, tensors = split(places, inputs, {})
    elif isinstance(inputs, Mapping):
        known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        unknown = [str(name) for name in inputs if name not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise InputError(
                f"{spec}: input '{unknown[0]}' is no parameter of forward ({', '.join(known)})",
                next_step=did_you_mean(unknown[0], known) or _CONTRACT,
            )
        only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in inputs]
        keywords = {str(n): inputs[n] for n in (*known, *unknown) if n in inputs and n not in only}
        form, tensors = split(places, [inputs[n] for n in only], keywords)
    else:
        raise InputError(f"{spec}: the example inputs are {type(inputs).__name__}", next_step=_CONTRACT)
    if not tensors:
        raise InputError(f"{spec}: the example inputs hold no tensor", next_step=_CONTRACT)
    return form, dict(zip(form.names, tensors, strict=True))

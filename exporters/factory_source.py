# SPDX-License-Identifier: Apache-2.0
"""`package.module:factory`: any `nn.Module`, built by the user's own function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ..contracts.errors import InputError, did_you_mean
from ..contracts.tasks import GENERIC
from .dynamo import DynamicAxes, export_module, place
from .exported import ExportedModel, SourceInfo
from .graph_file import signature_of
from .reference import TorchReference, flat_outputs, named_outputs
from .settings import ExportSettings

_CONTRACT = "Return (module, inputs) or (module, inputs, dynamic_axes): inputs a dict of example tensors by name."


def export_factory(spec: str, settings: ExportSettings) -> ExportedModel:
    """Call the factory and export what it returns.

    The factory takes no arguments and returns `(module, inputs)` or `(module, inputs, dynamic_axes)`. `inputs` is a
    dict of example tensors, or a tuple that is named after `forward`'s parameters. `dynamic_axes` maps input name to
    {axis: symbol}; without it, axis 0 of every input is `batch`; `{}` keeps all sizes fixed.

    Raises:
        InputError: The factory cannot be imported or called, or returns something else.
        ExportError: torch.export refuses the module.
    """
    module, inputs, axes = build(spec)
    started = time.perf_counter()
    with torch.no_grad():
        try:
            outputs = dict(named_outputs(module(*inputs.values())))
        except Exception as error:  # the user's own code
            raise InputError(f"{spec}: calling the module fails: {_what(error)}", next_step=_CONTRACT) from error
    if not outputs:
        raise InputError(f"{spec}: the module returns no tensors", next_step=_CONTRACT)
    for name, tensor in outputs.items():
        _check_dtype(f"{spec}: output '{name}'", tensor)
    names = [f"{name}_output" if name in inputs else name for name in outputs]
    graph = export_module(
        _Flat(module), inputs, output_names=names, dynamic_axes=axes, opset=settings.opset, strip_prefix="module."
    )
    parameters = sum(p.numel() for p in module.parameters())
    return ExportedModel(
        model=graph,
        signature=signature_of(graph),
        task=GENERIC,
        source=SourceInfo("factory", spec, None, type(module).__name__, parameters),
        reference=TorchReference(module, list(inputs), names, name="pytorch-fp32"),
        fixed_inputs={name: tensor.numpy() for name, tensor in inputs.items()},
        export_details={
            "backend": "dynamo",
            "opset": settings.opset,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def build(spec: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], DynamicAxes]:
    """Import and call the factory; return the module in eval mode, its example inputs and its dynamic axes."""
    module_name, _, attribute = spec.partition(":")
    factory = _import(module_name, attribute)
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"{spec} raises {_what(error)}", next_step="Fix the factory and try again.") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise InputError(f"{spec} returns {type(made).__name__}, not (module, inputs)", next_step=_CONTRACT)
    module = made[0].eval().cpu()
    inputs = _named(spec, module, made[1])
    axes = _axes(spec, inputs, made[2] if len(made) == 3 else None)
    return module, {name: _widen(tensor, axes.get(name, {})) for name, tensor in inputs.items()}, axes


def _import(module_name: str, attribute: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own file beside the command, as `python -m` would find it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"importing {module_name} raises {_what(error)}", next_step="Install what it needs, or fix the import."
            ) from error
        files = get_close_matches(module_name, [path.stem for path in Path().glob("*.py")], n=1)
        raise InputError(
            f"cannot import {error.name}",
            next_step=f"Did you mean '{files[0]}'?" if files else "Check the spelling and the folder you are in.",
        ) from error
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"importing {module_name} raises {_what(error)}", next_step="Fix it and try again.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        functions = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise InputError(
            f"{module_name} has no function '{attribute}'", next_step=did_you_mean(attribute, functions) or _CONTRACT
        )
    return found


def _named(spec: str, module: torch.nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """The example inputs by name, in the order in which `forward` takes them."""
    kinds = {p.name: p.kind for p in inspect.signature(module.forward).parameters.values()}
    parameters = [
        n for n, k in kinds.items() if k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple | list):
        if inspect.Parameter.VAR_POSITIONAL in kinds.values():
            parameters += [f"input_{i}" for i in range(len(parameters), len(inputs))]
        if len(inputs) > len(parameters):
            raise InputError(
                f"{spec}: {len(inputs)} example inputs for a forward that takes {len(parameters)}", next_step=_CONTRACT
            )
        inputs = dict(zip(parameters, inputs, strict=False))
    if not isinstance(inputs, Mapping) or not inputs:
        raise InputError(f"{spec}: the example inputs are {type(inputs).__name__}", next_step=_CONTRACT)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{spec}: input '{name}' is {type(value).__name__}, not a tensor",
                next_step="Wrap the module so that forward takes tensors only.",
            )
        _check_dtype(f"{spec}: input '{name}'", value)
    if set(inputs) != set(parameters[: len(inputs)]):
        raise InputError(
            f"{spec}: inputs {', '.join(inputs)} are not the first parameters of forward ({', '.join(kinds)})",
            next_step="Name the inputs after forward's parameters, without gaps.",
        )
    return {name: inputs[name].detach().cpu() for name in parameters[: len(inputs)]}


def _check_dtype(what: str, tensor: torch.Tensor) -> None:
    """Refuse what has no counterpart in numpy or in ONNX, so that nobody could feed or read it."""
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or tensor.dtype == torch.bfloat16:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise InputError(
            f"{what} is {kind}, which cannot be passed to or from an ONNX graph",
            next_step="Wrap the module so that it takes and returns real, dense tensors, such as float32.",
        )


def _axes(spec: str, inputs: Mapping[str, torch.Tensor], asked: Any) -> DynamicAxes:
    """Check dynamic_axes, or make axis 0 of every input `batch`."""
    if asked is None:
        asked = {name: {0: "batch"} for name, tensor in inputs.items() if tensor.ndim}
    if not isinstance(asked, Mapping) or not all(isinstance(a, Mapping) for a in asked.values()):
        raise InputError(f"{spec}: dynamic_axes is not a dict of dicts", next_step="Write {'x': {0: 'batch'}}.")
    sizes: dict[str, int] = {}
    for name, axes in asked.items():
        if name not in inputs:
            raise InputError(f"{spec}: dynamic_axes names no input '{name}'", next_step=did_you_mean(str(name), inputs))
        shape = inputs[name].shape
        for axis, symbol in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < len(shape) or not isinstance(symbol, str):
                raise InputError(
                    f"{spec}: dynamic_axes has {axis!r}: {symbol!r} for '{name}', which has {len(shape)} axes",
                    next_step="Write {'x': {0: 'batch'}}, with axes counted from 0.",
                )
            if sizes.setdefault(symbol, shape[axis]) != shape[axis] or not shape[axis]:
                raise InputError(
                    f"{spec}: axis {axis} of '{name}' has size {shape[axis]}, where '{symbol}' is {sizes[symbol] or 1}",
                    next_step="Give axes that have one name one size, at least 1.",
                )
    return {str(name): dict(axes) for name, axes in asked.items()}


def _widen(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """Make every dynamic axis of an example at least 2 long: torch.export fixes sizes 0 and 1 for good."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor.contiguous()


class _Flat(torch.nn.Module):
    """Returns the module's tensors as a tuple, whatever container they come in."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat_outputs(self.module(*inputs)))


def _what(error: BaseException) -> str:
    """`ValueError: message (file.py line 3, in forward)`, with the innermost line of the user's code."""
    first = (str(error).splitlines() or [""])[0][:240]
    return f"{type(error).__name__}: {first}{place(error)}"

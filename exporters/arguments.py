# SPDX-License-Identifier: Apache-2.0
"""Arguments of any form as a list of named tensors, which is all that an ONNX graph can read, and back again.

A model may be called by keyword, with dicts and lists of tensors, with None and with plain numbers. The tensors become
inputs named after where they lie (`image`, `sizes_0`, `options_mask`); everything else is part of the graph.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..contracts.errors import InputError
from .reference import flat_outputs

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Slot:
    """Stands for one tensor in a form."""

    number: int


@dataclass(frozen=True)
class CallForm:
    """The arguments of a call with its tensors taken out.

    Attributes:
        positional: Arguments by position; a `_Slot` where a tensor was.
        keywords: Arguments by keyword.
        names: Input names, one a tensor, in order.
    """

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    names: tuple[str, ...]

    def filled(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call with these tensors."""
        return [_filled(v, tensors) for v in self.positional], {
            k: _filled(v, tensors) for k, v in self.keywords.items()
        }

    def constants(self) -> dict[str, Any]:
        """What is no tensor, by the name that an input there would have."""
        found: dict[str, Any] = {}
        for key, value in (*enumerate(self.positional), *self.keywords.items()):
            found.update(_constants(value, str(key)))
        return found


def split(
    parameters: Sequence[str], positional: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[CallForm, list[torch.Tensor]]:
    """Take the tensors out of the arguments of a call.

    Args:
        parameters: Names of the callee's positional parameters; arguments beyond them are called `input_2`.
        positional: Arguments by position.
        keywords: Arguments by keyword.

    Raises:
        InputError: An argument is neither a tensor, a plain value nor a dict, list or tuple of these.
    """
    taken = _Taken()
    names = [*parameters, *(f"input_{number}" for number in range(len(parameters), len(positional)))]
    form = [taken.form(value, name) for value, name in zip(positional, names, strict=False)]
    named = {key: taken.form(value, key) for key, value in keywords.items()}
    return CallForm(tuple(form), named, tuple(taken.tensors)), list(taken.tensors.values())


def positional_names(module: torch.nn.Module) -> list[str]:
    """The parameters of a module's `forward` that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


class _Taken:
    """The tensors found so far, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def form(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._slot(value, name)
        if isinstance(value, Mapping):
            return {key: self.form(item, f"{name}_{key}") for key, item in value.items()}
        if isinstance(value, tuple | list):
            items = [self.form(item, f"{name}_{number}") for number, item in enumerate(value)]
            if hasattr(value, "_fields"):  # a named tuple
                return type(value)(*items)
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, _CONSTANTS):
            return value
        raise InputError(
            f"input '{name}' is {type(value).__name__}, which holds no tensors that onnxpress can name",
            next_step="Wrap the module so that forward takes tensors, or dicts and lists of tensors.",
        )

    def _slot(self, tensor: torch.Tensor, name: str) -> _Slot:
        plain = re.sub(r"[^\w.]", "_", name)
        while plain in self.tensors:
            plain += "_"
        self.tensors[plain] = tensor.detach().cpu()
        return _Slot(len(self.tensors) - 1)


def _filled(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.number]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_filled(item, tensors) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _constants(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | tuple | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _constants(item, f"{name}_{key}")
    elif not isinstance(value, _Slot):
        yield name, value


class Flat(torch.nn.Module):
    """Calls a module with tensors alone, and returns its tensors as a tuple whatever container they come in."""

    def __init__(self, module: torch.nn.Module, form: CallForm) -> None:
        super().__init__()
        self.module = module
        self.form = form
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat_outputs(self.original(*inputs)))

    def original(self, *inputs: torch.Tensor) -> Any:
        """What the module itself returns."""
        positional, keywords = self.form.filled(inputs)
        return self.module(*positional, **keywords)

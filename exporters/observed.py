# SPDX-License-Identifier: Apache-2.0
"""What a model is called with, watched while its user calls it: inputs, and which of their sizes vary.

torch.onnx.InputObserver watches calls too and answers with a hint for each position. An ONNX signature needs what it
leaves out: names for inputs that lie in dicts and lists, one name for axes that vary together, and a refusal where
calls differ in more than sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..contracts.errors import InputError
from .arguments import CallForm, positional_names, split
from .finish import DynamicAxes

MOST_CALLS = 16
"""Calls of different sizes that are kept, as inputs to compare on."""

Tensors = dict[str, torch.Tensor]

_WHAT_TO_DO = "Call the module itself, `lambda model: model(x, mask=mask)`, with tensors of the sizes that you need."


def observe(
    module: torch.nn.Module, call: Callable[[torch.nn.Module], Any], spec: str
) -> tuple[CallForm, list[Tensors]]:
    """Let `call` run the module, and return the form of its calls and their tensors by name.

    Calls with sizes that were seen before are dropped, and those after `MOST_CALLS`.

    Args:
        module: In eval mode.
        call: Takes the module and calls it, once or several times.
        spec: What messages call the source.

    Raises:
        InputError: The module was not called, or its calls differ in more than sizes.
    """
    forms: list[CallForm] = []
    calls: list[Tensors] = []
    parameters = positional_names(module)

    def keep(_: torch.nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        form, tensors = split(parameters, positional, keywords)
        forms.append(form)
        named = {name: tensor.clone() for name, tensor in zip(form.names, tensors, strict=True)}
        if len(calls) < MOST_CALLS and all(_shapes(named) != _shapes(other) for other in calls):
            calls.append(named)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            call(module)
    finally:
        handle.remove()
    if not forms:
        raise InputError(f"{spec}: the observed function never calls the module", next_step=_WHAT_TO_DO)
    _require_one_form(forms, spec)
    _require_one_kind(calls, spec)
    return forms[0], calls


def _shapes(tensors: Tensors) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors.values()]


def _require_one_form(forms: Sequence[CallForm], spec: str) -> None:
    """Refuse calls of which one has an input or a plain value that another has not: a graph has one signature."""
    first = forms[0]
    for number, form in enumerate(forms[1:], start=2):
        if form == first:
            continue
        other = sorted(set(form.names) ^ set(first.names))
        if other:
            raise InputError(
                f"{spec}: input '{other[0]}' is given in one observed call and not in another (call {number})",
                next_step="Observe calls with the same inputs; export each form by a factory of its own.",
            )
        before, now = first.constants(), form.constants()
        changed = [key for key in (*before, *now) if before.get(key) != now.get(key)]
        raise InputError(
            f"{spec}: '{changed[0] if changed else 'an argument'}' differs between observed calls 1 and {number}, and "
            "is no tensor",
            next_step="What varies has to be a tensor; what is no tensor becomes part of the graph.",
        )


def _require_one_kind(calls: Sequence[Tensors], spec: str) -> None:
    for name in calls[0]:
        kinds = list(dict.fromkeys((c[name].ndim, str(c[name].dtype).removeprefix("torch.")) for c in calls))
        if len(kinds) > 1:
            (rank, dtype), (other_rank, other_dtype) = kinds[:2]
            raise InputError(
                f"{spec}: input '{name}' has {rank} axes of {dtype} in one observed call and {other_rank} axes of "
                f"{other_dtype} in another",
                next_step="Observe calls that differ in sizes alone.",
            )


def axes_that_vary(calls: Sequence[Tensors]) -> DynamicAxes:
    """The axes whose size is not the same in every call; those that vary together get one name.

    Axis 0 is called `batch`, axis 1 of token ids `sequence`, and others after their input and position (`image_2`).
    """
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for name, tensor in calls[0].items():
        for axis in range(tensor.ndim):
            sizes = tuple(call[name].shape[axis] for call in calls)
            if len(set(sizes)) > 1:
                groups.setdefault(sizes, []).append((name, axis))
    return named_axes(list(groups.values()))


def named_axes(groups: Sequence[Sequence[tuple[str, int]]]) -> DynamicAxes:
    """One name for each group of axes of one size.

    Args:
        groups: Each a list of (input name, axis).
    """
    axes: dict[str, dict[int, str]] = {}
    used: set[str] = set()
    for group in groups:
        symbol = _symbol(group)
        symbol = symbol if symbol not in used else "{}_{}".format(*group[0])
        used.add(symbol)
        for name, axis in group:
            axes.setdefault(name, {})[axis] = symbol
    return axes


def _symbol(group: Sequence[tuple[str, int]]) -> str:
    if any(axis == 0 for _, axis in group):
        return "batch"
    if any(axis == 1 and name in ("input_ids", "attention_mask") for name, axis in group):
        return "sequence"
    return "{}_{}".format(*group[0])


def example_of(calls: Sequence[Tensors], axes: DynamicAxes) -> Tensors:
    """The call to trace with: the one whose dynamic axes are longest at their shortest (0 and 1 are special)."""

    def shortest(call: Mapping[str, torch.Tensor]) -> int:
        return min((call[name].shape[axis] for name, of in axes.items() for axis in of), default=0)

    return max(calls, key=shortest)

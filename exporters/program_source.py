# SPDX-License-Identifier: Apache-2.0
"""A `.pt2` file: a program that `torch.export.save` wrote, with its weights, its sizes and its example inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..contracts.digest import sha256_of
from ..contracts.errors import InputError
from .arguments import CallForm, Flat, positional_names, split
from .blame import quiet
from .exported import ExportedModel, SourceInfo
from .observed import named_axes
from .original import Original, check_dtype, export_original, what, widened
from .program_checks import check_program
from .settings import ExportSettings

_CONTRACT = "Run the program in Python first: torch.export.load(file).module()(*inputs)."

Sizes = Mapping[str, tuple[Any, ...]]
"""Input name to the size of each axis: a number, or a sympy expression of the program's symbols."""


def export_program(path: Path, settings: ExportSettings) -> ExportedModel:
    """Export a program with the dynamic axes that it was saved with.

    Its own graph is what is compared with: the program's module, without the guards, whose code lies in the file.

    Raises:
        InputError: The file is damaged, of another version of torch, or would run code when it is loaded.
        ExportError: An operator has no translation.
    """
    original = original_program(path)
    module = original.module.module
    source = SourceInfo(
        "program",
        path.name,
        sha256_of([path]),
        original.architecture,
        sum(p.numel() for p in module.parameters()),
    )
    return export_original(original, source, settings)


def original_program(path: Path) -> Original:
    """Check and load a program; see `export_program`."""
    check_program(path)
    try:
        with quiet(), path.open("rb") as stream:
            program = torch.export.load(stream)
            module = program.module(check_guards=False)
    except Exception as error:  # whatever the loader meets in the file
        raise InputError(
            f"{path.name} cannot be loaded: {what(error)}", next_step="Save it again with this version of torch."
        ) from error
    for name in ("train", "eval"):  # refused by torch on the object itself, where everything is fixed already
        module.__dict__.pop(name, None)
    form, inputs = _example(program, module, path.name)
    sizes = _sizes(program, list(inputs))
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, shape in sizes.items():
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                groups.setdefault(str(size), []).append((name, axis))
    axes = named_axes(list(groups.values()))
    flat = Flat(module, form)
    calls = list(_calls(flat, inputs, sizes, _ranges(program)))
    example = {name: widened(tensor, axes.get(name, {})) for name, tensor in inputs.items()}
    return Original(path.name, flat, example, axes, calls, _CONTRACT, architecture=_class_name(program))


def _example(program: Any, module: torch.nn.Module, name: str) -> tuple[CallForm, dict[str, torch.Tensor]]:
    """The example inputs that were saved, or new ones of the sizes that the program declares."""
    from torch.utils import _pytree as pytree

    saved = program.example_inputs
    if not saved:
        saved = pytree.tree_unflatten(list(_made_up(program)), program.call_spec.in_spec)
    positional, keywords = saved
    form, tensors = split(positional_names(module), positional, keywords)
    if not tensors:
        raise InputError(f"{name}: the program takes no tensors", next_step=_CONTRACT)
    inputs = dict(zip(form.names, tensors, strict=True))
    for input_name, tensor in inputs.items():
        check_dtype(f"{name}: input '{input_name}'", tensor)
    return form, inputs


def _made_up(program: Any) -> Iterator[Any]:
    """Random floats, zeros for integers, and the constants that the program was exported with."""
    generator = torch.Generator().manual_seed(0)
    nodes = {node.name: node for node in program.graph.nodes}
    for argument in _arguments(program):
        if not hasattr(argument, "value"):
            meta = nodes[argument.name].meta["val"]
            shape = [int(size.node.hint or 2) if isinstance(size, torch.SymInt) else size for size in meta.shape]
            values = torch.randn(shape, generator=generator) if meta.dtype.is_floating_point else torch.zeros(shape)
            yield values.to(meta.dtype)
        else:
            yield argument.value


def _arguments(program: Any) -> list[Any]:
    """What the user passes, in order: tensors by the name of their node, constants by value."""
    specs = program.graph_signature.input_specs
    return [spec.arg for spec in specs if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT]


def _sizes(program: Any, names: list[str]) -> Sizes:
    nodes = {node.name: node for node in program.graph.nodes}
    shapes = [nodes[a.name].meta["val"].shape for a in _arguments(program) if not hasattr(a, "value")]
    return {
        name: tuple(size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in shape)
        for name, shape in zip(names, shapes, strict=True)
    }


def _ranges(program: Any) -> dict[str, tuple[int, int]]:
    """Symbol to the smallest and largest value that the program allows, from 1 to 2^16."""
    ranges = {}
    for symbol, allowed in program.range_constraints.items():
        low, high = str(allowed.lower), str(allowed.upper)  # sympy's infinity prints as int_oo
        ranges[str(symbol)] = (max(1, int(low)) if low.isdigit() else 1, int(high) if high.isdigit() else 2**16)
    return ranges


def _calls(
    module: Flat, inputs: Mapping[str, torch.Tensor], sizes: Sizes, ranges: Mapping[str, tuple[int, int]]
) -> Iterator[dict[str, torch.Tensor]]:
    """The example, and the example cut or repeated to other sizes that the program says it takes and does take."""
    yield dict(inputs)
    free = {symbol for shape in sizes.values() for size in shape for symbol in getattr(size, "free_symbols", ())}
    symbols = sorted(free, key=str)
    for wanted in (1, 3, 7) if symbols else ():
        chosen = {}
        for number, symbol in enumerate(symbols):
            low, high = ranges.get(str(symbol), (1, 64))
            chosen[symbol] = min(max(wanted + number % 3, low), high)
        call = dict(inputs)
        for name, shape in sizes.items():
            for axis, size in enumerate(shape):
                if not isinstance(size, int):
                    length = int(size.subs(chosen))
                    index = torch.arange(length) % max(1, call[name].shape[axis])
                    call[name] = call[name].index_select(axis, index)
        if all(tensor.shape == inputs[name].shape for name, tensor in call.items()):
            continue
        try:
            with torch.no_grad():
                module(*call.values())
        except Exception:  # noqa: BLE001 - sizes that the program refuses are none to compare on
            continue
        yield call


def _class_name(program: Any) -> str | None:
    """The class that was exported, as the first operator's origin records it."""
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for _, kind in stack.values():
            name = str(kind if isinstance(kind, str) else kind.__qualname__).rsplit(".", 1)[-1]
            return None if name.startswith("_empty_nn_module_stack") else name
    return None

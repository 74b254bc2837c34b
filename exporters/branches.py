# SPDX-License-Identifier: Apache-2.0
"""Where a module takes its path by the values of its inputs: what a recorded run cannot show.

The module runs once more, in eager mode, while every tensor that is computed from the inputs is marked; reading a
marked tensor in Python (`if x.sum() > 0`, `x.item()`, `x.tolist()`) is what is looked for. Shapes are no such reading,
and neither are constants of the module, such as a scale that it keeps in a buffer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .blame import NOT_THE_USERS

Line = tuple[str, int]
"""File and line."""

_READING: frozenset[Callable[..., Any]] = frozenset(
    function
    for name in ("bool", "int", "float", "index", "complex", "array", "contains")
    if (function := getattr(torch.Tensor, f"__{name}__", None)) is not None
) | {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy}


def values_read(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[Line, str]:
    """The lines that lead to each reading of the inputs' values, with the user's innermost as messages have it.

    Returns:
        Line of any function that was active to `model.py line 3, in forward`. Empty when the module fails.
    """
    marks = _Marks(inputs.values())
    readings = _Readings(marks)
    with contextlib.suppress(Exception), torch.no_grad(), marks, readings:
        module(*inputs.values())
    return readings.lines


class _Marks(TorchDispatchMode):
    """Marks the memory of every tensor that is computed from the inputs."""

    def __init__(self, inputs: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.memory: dict[int, Any] = {}  # held on to, so that its address is not given away again
        self.mark(inputs)

    def mark(self, values: Any) -> None:
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            self.memory[storage._cdata] = storage

    def marked(self, values: Any) -> bool:
        return any(tensor.untyped_storage()._cdata in self.memory for tensor in _tensors(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.marked((args, kwargs)):
            self.mark(result)
        return result


class _Readings(TorchFunctionMode):
    """Notes from where a marked tensor is read in Python."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks
        self.lines: dict[Line, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING and self.marks.marked(args):
            frames = list(_frames())
            user = next((f for f in frames if not NOT_THE_USERS.search(f[0])), frames[0])
            shown = f"{user[0].rpartition('/')[2]} line {user[1]}, in {user[2]}"
            self.lines |= {(file, line): shown for file, line, _ in frames}
        return func(*args, **(kwargs or {}))


def _frames() -> Iterator[tuple[str, int, str]]:
    """File, line and function of everything that is being called, the innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Every dense tensor in nested arguments."""
    if isinstance(values, torch.Tensor):
        if values.layout == torch.strided:
            yield values
    elif isinstance(values, Mapping):
        yield from _tensors(values.values())
    elif isinstance(values, Iterable) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)

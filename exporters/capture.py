# SPDX-License-Identifier: Apache-2.0
"""`torch.export` of a flat module, told what the caller knows, so that it has less to find out.

Without being told, torch gives every dynamic axis of every input a symbol of its own and learns in the course of the
trace that the batch of one is the batch of all; each size is a formula of more symbols until then, and formulas are
what tracing spends its time on. Nor does it know that nobody wants gradients: a model's own `torch.no_grad()` blocks
would each become a program of their own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.overrides import TorchFunctionMode

from .finish import DynamicAxes

WRAPPED = "original."
"""In front of the names of all parameters of a captured program."""


class _NoSwitching(TorchFunctionMode):
    """Leaves gradients off, whatever the model switches; without them its result is the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _SWITCH:
            return None
        return func(*args, **(kwargs or {}))


_SWITCH = getattr(torch._C, "_set_grad_enabled", None)


class Told(torch.nn.Module):
    """The module, preceded by what the names of the dynamic axes say: one symbol, one size.

    Args:
        original: Takes tensors in the order of `axes` and returns a tuple of tensors.
        axes: For each input {axis: symbol}.
        interpreted: Whether the tracer reads bytecode; it does not know function modes then.
    """

    def __init__(
        self, original: torch.nn.Module, axes: Sequence[Mapping[int, str]], *, interpreted: bool = False
    ) -> None:
        super().__init__()
        self.original, self.axes, self.interpreted = original, axes, interpreted
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> Any:
        sizes: dict[str, Any] = {}
        for tensor, axes in zip(inputs, self.axes, strict=True):
            for axis, symbol in axes.items():
                size = tensor.shape[axis]
                torch._check(size == sizes.setdefault(symbol, size))
        if self.interpreted:
            return self.original(*inputs)
        with _NoSwitching():
            return self.original(*inputs)


def capture(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes) -> Any:
    """Trace `module`; the parameters of the ExportedProgram are named below `WRAPPED`.

    It is run once on fake tensors and, if that fails, interpreted byte by byte, as `torch.onnx.export` does it too. An
    axis that the model fixes is an error at once: no way of tracing would free it.

    Raises:
        Exception: What the first way raises: torch's errors, or the model's own.
    """
    tensors, axes = tuple(inputs.values()), [dynamic_axes.get(name, {}) for name in inputs]
    shapes = tuple(dict.fromkeys(by_axis, torch.export.Dim.DYNAMIC) for by_axis in axes)
    try:
        return _traced(Told(module, axes), tensors, shapes, strict=False)
    except Exception as error:  # torch lets through whatever the user's code raises
        if "inferred a static shape" in str(error):
            raise
        with contextlib.suppress(Exception):
            return _traced(Told(module, axes, interpreted=True), tensors, shapes, strict=True)
        raise


def unwrap_names(model: ir.Model) -> None:
    """Take the wrapper's name off the parameters of a captured program's graph, in place."""
    for value in list(model.graph.initializers.values()):
        name = str(value.name)
        if name.startswith(WRAPPED):
            del model.graph.initializers[name]
            value.name = name.removeprefix(WRAPPED)
            if value.const_value is not None:
                value.const_value.name = value.name
            model.graph.initializers.add(value)


def _traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], shapes: Any, *, strict: bool) -> Any:
    """One of torch.onnx's own strategies, which prepare torch.export for what ONNX can and cannot do."""
    try:
        from torch.onnx._internal.exporter import _capture_strategies, _flags

        kind = "TorchExportStrictStrategy" if strict else "TorchExportNonStrictStrategy"
        strategy = getattr(_capture_strategies, kind)(verbose=False)
        run = _flags.set_onnx_exporting_flag(strategy)
        inspect.signature(strategy).bind(module, inputs, None, dynamic_shapes=(shapes,))
    except (ImportError, AttributeError, TypeError):
        return torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=strict)
    result = run(module, inputs, None, dynamic_shapes=(shapes,))
    if result.exported_program is None:
        raise result.exception
    return result.exported_program

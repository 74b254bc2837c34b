# SPDX-License-Identifier: Apache-2.0
"""A PyTorch module with example inputs, from wherever it came, on its way to an exported model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..contracts.errors import InputError, did_you_mean
from ..contracts.tasks import GENERIC
from .arguments import Flat
from .backends import chosen, export_with
from .blame import place
from .exported import ExportedModel, SourceInfo
from .finish import DynamicAxes
from .graph_file import signature_of
from .observed import axes_that_vary, example_of
from .reference import TorchReference, named_outputs
from .settings import ExportSettings


@dataclass(frozen=True)
class Original:
    """What can be exported and compared.

    Attributes:
        name: What messages call it.
        module: Takes tensors alone.
        inputs: Example inputs by name, in the order in which `module` takes them.
        axes: Those of their axes that vary.
        calls: Inputs that it is known to take, where there is more than the example.
        outputs: Names of the outputs, where their containers do not name them well.
        contract: What a source of this kind has to be, for error messages.
        architecture: The class's name, where the module does not tell.
        details: What the manifest should say of its export.
    """

    name: str
    module: Flat
    inputs: dict[str, torch.Tensor]
    axes: DynamicAxes
    calls: Sequence[Mapping[str, torch.Tensor]] = ()
    contract: str = ""
    architecture: str | None = None
    outputs: tuple[str, ...] = ()
    details: dict[str, object] = field(default_factory=dict)

    def reference(self, output_names: Sequence[str] | None = None) -> TorchReference:
        """The module as everything is compared with it; without output names for timing alone."""
        return TorchReference(self.module, list(self.inputs), output_names or [], name="pytorch-fp32")


def export_original(original: Original, source: SourceInfo, settings: ExportSettings) -> ExportedModel:
    """Trace a module.

    Raises:
        InputError: Calling it on its example inputs fails, or returns something else than tensors.
        ExportError: It cannot be traced.
    """
    started = time.perf_counter()
    names = output_names(original)
    inputs = {name: widened(tensor, original.axes.get(name, {})) for name, tensor in original.inputs.items()}
    graph = export_with(
        settings.backend,
        original.module,
        inputs,
        output_names=names,
        dynamic_axes=original.axes,
        opset=settings.opset,
        strip_prefix="module.",
    )
    return ExportedModel(
        model=graph,
        signature=signature_of(graph),
        task=GENERIC,
        source=source,
        reference=original.reference(names),
        fixed_inputs={name: tensor.numpy() for name, tensor in inputs.items()},
        known_inputs=tuple({name: tensor.numpy() for name, tensor in call.items()} for call in original.calls),
        export_details={
            "backend": chosen(settings.backend),
            "opset": settings.opset,
            **original.details,
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


def output_names(original: Original) -> list[str]:
    """Run the module on its example, and name its outputs after the containers in which they come."""
    with torch.no_grad():
        try:
            outputs, again = (_called(original) for _ in range(2))
        except Exception as error:  # the user's own code
            raise InputError(
                f"{original.name}: calling the module fails: {what(error)}", next_step=original.contract
            ) from error
    if not outputs:
        raise InputError(f"{original.name}: the module returns no tensors", next_step=original.contract)
    changing = next((name for name in outputs if not _close(outputs[name], again.get(name))), None)
    if changing is not None:
        raise InputError(
            f"{original.name}: output '{changing}' differs when the module is called again with the same inputs",
            next_step="Take what it draws at random, or keeps from call to call, as an input; return what it keeps.",
        )
    for name, tensor in outputs.items():
        check_dtype(f"{original.name}: output '{name}'", tensor)
    if len(original.outputs) == len(outputs):
        return list(original.outputs)
    return [f"{name}_output" if name in original.inputs else name for name in outputs]


def _called(original: Original) -> dict[str, torch.Tensor]:
    """The outputs for the example, on copies: a module may write into its inputs, and return what it keeps."""
    result = original.module.original(*(tensor.clone() for tensor in original.inputs.values()))
    return {name: tensor.clone() for name, tensor in named_outputs(result)}


def _close(first: torch.Tensor, second: torch.Tensor | None) -> bool:
    """Whether two results are one up to the order in which threads add."""
    if second is None or first.shape != second.shape or first.layout != torch.strided or first.is_quantized:
        return second is not None and first.shape == second.shape
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-5, equal_nan=True))


def check_dtype(subject: str, tensor: torch.Tensor) -> None:
    """Refuse what has no counterpart in numpy or in ONNX, so that nobody could feed or read it."""
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or tensor.dtype == torch.bfloat16:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise InputError(
            f"{subject} is {kind}, which cannot be passed to or from an ONNX graph",
            next_step="Wrap the module so that it takes and returns real, dense tensors, such as float32.",
        )


def original_axes(
    name: str, calls: Sequence[dict[str, torch.Tensor]], asked: Any
) -> tuple[DynamicAxes, dict[str, torch.Tensor]]:
    """The dynamic axes, and the example to trace with.

    Args:
        name: What messages call the source.
        calls: Inputs of one or several calls.
        asked: What the user says is dynamic; None takes what differs between the calls or, with one call, axis 0.

    Raises:
        InputError: `asked` does not fit the inputs.
    """
    varying = asked is None and len(calls) > 1
    axes = axes_that_vary(calls) if varying else _checked_axes(name, calls[0], asked)
    return axes, {name: widened(tensor, axes.get(name, {})) for name, tensor in example_of(calls, axes).items()}


def _checked_axes(spec: str, inputs: Mapping[str, torch.Tensor], asked: Any) -> DynamicAxes:
    """Check dynamic_axes, or make axis 0 of every input `batch`."""
    advice = "Give axes that have one name one size, at least 1."
    if asked is None:
        advice = "Say what varies: by dynamic_axes such as {'x': {0: 'batch'}}, or by calls of different sizes."
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
                    next_step=advice,
                )
    return {str(name): dict(axes) for name, axes in asked.items()}


def widened(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """Make every dynamic axis of an example at least 2 long: torch.export fixes sizes 0 and 1 for good."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor.contiguous()


def what(error: BaseException) -> str:
    """`ValueError: message (file.py line 3, in forward)`, with the innermost line of the user's code."""
    first = (str(error).splitlines() or [""])[0][:240]
    return f"{type(error).__name__}: {first}{place(error)}"

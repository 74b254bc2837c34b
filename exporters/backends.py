# SPDX-License-Identifier: Apache-2.0
"""The ways from a PyTorch module to a graph, behind one protocol; which is tried when is in `attempts`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..contracts.errors import ExportError, InputError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from .finish import DynamicAxes


class ExportModule(Protocol):
    """What every backend does.

    Args:
        module: In eval mode. Its `forward` takes the inputs in order and returns a tuple of tensors.
        inputs: Example tensors; sizes of dynamic axes must be at least 2 (sizes 0 and 1 are special to torch.export).
        output_names: One name an output tensor.
        dynamic_axes: Input name to {axis: symbol}; axes that share a symbol have one size.
        opset: ONNX operator set version.
        strip_prefix: Removed from the front of initializer names, for a module that was wrapped.

    Returns:
        An unoptimized graph: parameters under their PyTorch names and stored once, inputs and outputs as asked, sizes
        free where they were asked to be, no path of the machine.

    Raises:
        ExportError: The module cannot be exported; the message names the operator or line at fault.
        MissingDependency: The backend is not installed.
    """

    def __call__(
        self,
        module: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        *,
        output_names: Sequence[str],
        dynamic_axes: DynamicAxes,
        opset: int,
        strip_prefix: str = "",
    ) -> ir.Model: ...


@dataclass(frozen=True)
class Backend:
    """One way to export a module.

    Attributes:
        name: As the user writes it: `--set export.backend=NAME`.
        file: The module of this package that holds its `export_module`; imported when it is first used.
        about: What it is, in a line.
    """

    name: str
    file: str
    about: str

    @property
    def export_module(self) -> ExportModule:
        found: ExportModule = importlib.import_module(f".{self.file}", __package__).export_module
        return found


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("dynamo", "dynamo", "torch.export and torch's own translation"),
        Backend("transformers", "patched", "the same within the workarounds that transformers registers for ONNX"),
        Backend("torchscript", "torchscript", "the older exporter: a trace of one run, or a script with its branches"),
    )
}
"""Backends of single modules. `optimum` exports whole folders instead, see `optimum_folder`."""

DEFAULT = "dynamo"


_OPTIONAL = {"transformers": "patched", "optimum": "optimum_folder"}
"""Backends that need more than torch, and the module that says whether it is there."""


def is_available(name: str) -> bool:
    """Whether what a backend needs is installed."""
    file = _OPTIONAL.get(name)
    return file is None or bool(importlib.import_module(f".{file}", __package__).available())


def chosen(name: str) -> str:
    """The backend behind a setting: `auto` stands for the default until `attempts` has another try."""
    return DEFAULT if name == "auto" else name


def export_with(
    name: str,
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int,
    strip_prefix: str = "",
) -> ir.Model:
    """Export with the backend of that name; see `ExportModule`.

    Raises:
        InputError: No backend of that name exports a module.
        ExportError: As the backend raises it, with its name in `backend`.
    """
    backend = BACKENDS.get(chosen(name))
    if backend is None:
        raise InputError(
            f"backend '{name}' does not export single modules",
            next_step=f"Use --set export.backend=auto, or one of: {', '.join(BACKENDS)}.",
        )
    try:
        return backend.export_module(
            module,
            inputs,
            output_names=output_names,
            dynamic_axes=dynamic_axes,
            opset=opset,
            strip_prefix=strip_prefix,
        )
    except ExportError as error:
        error.backend = backend.name
        raise

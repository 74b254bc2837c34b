# SPDX-License-Identifier: Apache-2.0
"""torch.export and its translation within the workarounds that `transformers.exporters` registers for ONNX.

transformers (from 5.13 on) knows some sixty places where torch.export or the translation to ONNX stumbles over its
models, and for each a function that stands in, a repair of the traced program, a translation of its own, or a repair of
the graph. All of these are used here, on the flat module that every other backend gets; of transformers' own naming,
layout and caches nothing is. Its interface is young: what is not found is an error that another backend answers.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from ..contracts.errors import MissingDependency
from .blame import quiet
from .dynamo import explained, refuse_one_sided
from .finish import DynamicAxes, finish


@dataclass(frozen=True)
class _Workarounds:
    """What transformers registers, by what it is applied to."""

    during: Callable[[str], AbstractContextManager[None]]
    stateless: Callable[[torch.nn.Module], AbstractContextManager[None]]
    to_program: Callable[[str, Any], None]
    translations: Mapping[Any, Any]
    to_graph: Callable[[Any], None]


def available() -> bool:
    """Whether the installed transformers has what this backend takes from it."""
    return isinstance(_workarounds(), _Workarounds)


def export_module(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int,
    strip_prefix: str = "",
) -> ir.Model:
    """Trace `module` within transformers' workarounds; see `backends.ExportModule`.

    Raises:
        MissingDependency: transformers has no exporters, or others than the ones known here.
        ExportError: The module cannot be traced or translated all the same.
    """
    ours = _workarounds()
    if not isinstance(ours, _Workarounds):
        raise MissingDependency(
            f"backend 'transformers' finds no workarounds for ONNX in transformers {_version()} ({ours})",
            next_step='pip install "transformers>=5.13,<6"',
        )
    try:
        with quiet(), torch.no_grad(), ours.during("onnx"):
            with ours.during("dynamo"), ours.stateless(module), _sizes_of_one():
                program = torch.export.export(
                    module,
                    tuple(inputs.values()),
                    dynamic_shapes=_shapes(module, inputs, dynamic_axes),
                    strict=False,
                )
            ours.to_program("onnx", program.graph_module)
            made = torch.onnx.export(
                program,
                args=(),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                custom_translation_table=dict(ours.translations),
                optimize=False,
                verbose=False,
            )
            ours.to_graph(made)
    except Exception as error:  # torch lets through whatever the user's code raises
        raise explained(error, module, strip_prefix) from error
    assert made is not None
    refuse_one_sided(module, inputs, dynamic_axes, program)
    model: ir.Model = made.model
    finish(model, module, inputs, output_names=output_names, dynamic_axes=dynamic_axes, strip_prefix=strip_prefix)
    return model


def _workarounds() -> _Workarounds | str:
    """What transformers registers, or the name that is missing."""
    try:
        onnx = importlib.import_module("transformers.exporters.exporter_onnx")
        dynamo = importlib.import_module("transformers.exporters.exporter_dynamo")
        shared = importlib.import_module("transformers.exporters.utils")
        return _Workarounds(
            shared.apply_patches,
            dynamo.reset_model_state,
            shared.apply_fx_node_fixes,
            onnx._ONNX_TRANSLATION_TABLE,
            onnx.apply_onnx_ir_fixes,
        )
    except (ImportError, AttributeError) as error:
        return str(error)


def _shapes(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    shapes: tuple[Any, ...] = tuple(dict.fromkeys(dynamic_axes.get(name, {}), dynamic) for name in inputs)
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
        return (shapes,)  # `*inputs` is one parameter, and torch.export wants one entry a parameter
    return shapes


@contextlib.contextmanager
def _sizes_of_one() -> Iterator[None]:
    """Let a free size be 1 or 0 as well, as torch.onnx.export does when it traces itself; where torch knows how."""
    config: Any = getattr(torch.fx.experimental, "_config", None)
    if not hasattr(config, "backed_size_oblivious"):
        yield
        return
    with config.patch(backed_size_oblivious=True):
        yield


def _version() -> str:
    import transformers

    return str(transformers.__version__)

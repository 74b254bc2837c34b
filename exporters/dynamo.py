# SPDX-License-Identifier: Apache-2.0
"""`torch.export`-based ONNX export: an `nn.Module` becomes an `onnx_ir.Model` with the names that users know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ..contracts.errors import ExportError
from .aten_to_onnx import translate
from .blame import chain, first_line, part, place, quiet
from .capture import WRAPPED, capture, unwrap_names
from .finish import DynamicAxes, at_size, finish
from .packed import padded

DEFAULT_OPSET = 20


def export_module(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int = DEFAULT_OPSET,
    strip_prefix: str = "",
) -> ir.Model:
    """Trace `module` and return its graph, unoptimized, with parameter names kept and local paths removed.

    torch's own optimizer is left out on purpose: it folds `Transpose(weight)` into constants named `val_83`, and with
    the name goes the way back to the PyTorch parameter. The `clean` pass folds them under the parameter's name.

    Args:
        module: In eval mode. Its `forward` takes the inputs in order and returns a tuple of tensors.
        inputs: Example tensors; sizes of dynamic axes must be at least 2 (sizes 0 and 1 are special to torch.export).
        output_names: One name an output tensor.
        dynamic_axes: Input name to {axis: symbol}; axes that share a symbol have one size.
        opset: ONNX operator set version.
        strip_prefix: Removed from the front of initializer names, for a module that was wrapped.

    Raises:
        ExportError: torch.export or the translation failed; the message names the operator or line that did.
    """
    try:
        with quiet(), padded(module), torch.no_grad():
            program = capture(module, inputs, dynamic_axes)
            model = translate(program, opset=opset)
    except Exception as error:  # torch lets through whatever the user's code raises
        raise explained(error, module, strip_prefix) from error
    refuse_one_sided(module, inputs, dynamic_axes, program)
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    unwrap_names(model)
    finish(model, module, inputs, output_names=output_names, dynamic_axes=dynamic_axes, strip_prefix=strip_prefix)
    return model


def refuse_one_sided(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes, program: Any
) -> None:
    """Refuse a graph that follows one branch of `if x.shape[0] < 100:`, which torch.export accepts without a word.

    torch.export records the branch as an upper limit of the axis. Where the original refuses larger sizes too (an
    `assert length <= block_size`), the limit is the model's own and the graph is right. So it is where no text is as
    long: a table of sinusoidal positions that would grow for longer ones need not.
    """
    longest = _longest_text(module)
    nodes = {node.name: node for node in program.graph.nodes}
    for name, node_name in zip(inputs, program.graph_signature.user_inputs, strict=True):
        for axis, symbol in dynamic_axes.get(name, {}).items():
            size = nodes[node_name].meta["val"].shape[axis]
            allowed = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
            limit = str(getattr(allowed, "upper", ""))  # sympy's infinity prints as int_oo
            if (
                limit.isdigit()
                and int(limit) < (longest if symbol.endswith("sequence") else 2**20)
                and at_size(module, inputs, dynamic_axes, symbol, int(limit) + 1) is not None
            ):
                two_sided = ExportError(
                    f"the model takes another branch where '{symbol}' (axis {axis} of {name}) exceeds {limit}, and a "
                    "graph holds only one",
                    next_step="Remove the Python condition on the shape, or leave this axis out of dynamic_axes.",
                )
                two_sided.branches = True
                raise two_sided


def _longest_text(module: torch.nn.Module) -> int:
    """The longest text in tokens that the configuration of a transformers model speaks of; a million without one."""
    config = getattr(getattr(module, "model", None), "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) else 2**20


def explained(error: BaseException, module: torch.nn.Module, prefix: str = "") -> ExportError:
    """What torch.export or the translation raised, as one line for the user."""
    return ExportError(_explain(error, part(error, module, WRAPPED, prefix)), next_step=_advice(error))


def _explain(error: BaseException, where: str) -> str:
    """Find, in torch's page-long message, the line that says what is wrong and where in the user's code."""
    cause = chain(error)[-1]
    fixed = re.search(r"inferred a static shape of (\d+) for dimension inputs(\S+)\.shape\[(\d+)\]", str(cause))
    if fixed:
        return f"the model works only where axis {fixed[3]} of its input {fixed[2]} has size {fixed[1]}"
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(cause))
    if unknown:
        operator = unknown[1].replace(".", "::")
        return f"the operator {operator}{f' in {where}' if where else ''} has no translation to ONNX{place(error)}"
    what = f"{type(cause).__name__}: {first_line(cause)}"
    return f"torch.export cannot trace {where or 'the model'}: {what}{place(error)}"


def _advice(error: BaseException) -> str:
    text = "".join(f"{type(e).__name__}: {e}" for e in chain(error))
    if "inferred a static shape" in text:
        return (
            "The model fixes the size of this axis: do not write the size as a number, or leave it out of dynamic_axes."
        )
    if "data-dependent" in text or "GuardOnDataDependent" in text or "Could not guard" in text:
        return "Replace Python control flow that depends on tensor values by torch.where or torch.cond."
    if any(sign in text for sign in ("No ONNX function found", "DispatchError", "UnsupportedOperatorException")):
        return (
            "Rewrite the operator that is named with ones that ONNX has, or try a newer opset (--set export.opset=23)."
        )
    return "Run again with --debug for torch's full report."

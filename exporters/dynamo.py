# SPDX-License-Identifier: Apache-2.0
"""`torch.export`-based ONNX export: an `nn.Module` becomes an `onnx_ir.Model` with the names that users know."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from ..contracts.errors import ExportError
from .reference import flat_outputs

DEFAULT_OPSET = 20

DynamicAxes = Mapping[str, Mapping[int, str]]


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
    shapes: tuple[Any, ...] = tuple(dict(dynamic_axes.get(name, {})) for name in inputs)
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
        shapes = (shapes,)  # `*inputs` is one parameter, and torch.export wants one entry a parameter
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # dynamo lets through whatever the user's code raises
        raise ExportError(_explain(error), next_step=_advice(error)) from error
    assert program is not None
    _refuse_one_sided(module, inputs, dynamic_axes, program.exported_program)
    model: ir.Model = program.model
    _restore_names(model, module, strip_prefix, dynamic_axes)
    _name_outputs(model.graph, output_names)
    _free_output_sizes(model.graph, module, inputs, dynamic_axes)
    _clear_metadata(model)
    return model


def _refuse_one_sided(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes, program: Any
) -> None:
    """Refuse a graph that follows one branch of `if x.shape[0] < 100:`, which torch.export accepts without a word.

    torch.export records the branch as an upper limit of the axis. Where the original refuses larger sizes too (an
    `assert length <= block_size`), the limit is the model's own and the graph is right.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    for name, node_name in zip(inputs, program.graph_signature.user_inputs, strict=True):
        for axis, symbol in dynamic_axes.get(name, {}).items():
            size = nodes[node_name].meta["val"].shape[axis]
            allowed = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
            limit = str(getattr(allowed, "upper", ""))  # sympy's infinity prints as int_oo
            if (
                limit.isdigit()
                and int(limit) < 2**20
                and _at_size(module, inputs, dynamic_axes, symbol, int(limit) + 1) is not None
            ):
                raise ExportError(
                    f"the model takes another branch where '{symbol}' (axis {axis} of {name}) exceeds {limit}, and a "
                    "graph holds only one",
                    next_step="Remove the Python condition on the shape, or leave this axis out of dynamic_axes.",
                )


def _at_size(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes, symbol: str, size: int
) -> Any:
    """What the original returns for the example inputs repeated to `size` along every axis called `symbol`; or None."""
    resized = dict(inputs)
    for name, axes in dynamic_axes.items():
        for axis in (a for a, s in axes.items() if s == symbol):
            index = torch.arange(size) % resized[name].shape[axis]
            resized[name] = resized[name].index_select(axis, index)
    try:
        with torch.no_grad():
            return module(*resized.values())
    except Exception:  # noqa: BLE001 - any refusal by the user's code is an answer
        return None


def _free_output_sizes(
    graph: ir.Graph, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes
) -> None:
    """Take back an output size that torch declares as fixed although it follows an input's.

    Seen: the time axis of an LSTM's output has the length of the example for good.
    """
    for symbol in dict.fromkeys(s for axes in dynamic_axes.values() for s in axes.values()):
        size = next(inputs[n].shape[a] for n, axes in dynamic_axes.items() for a, s in axes.items() if s == symbol)
        found = _at_size(module, inputs, dynamic_axes, symbol, size + 1)
        for value, tensor in zip(graph.outputs, [] if found is None else flat_outputs(found), strict=False):
            if value.shape is None or len(value.shape) != tensor.dim():
                continue
            dims = [
                symbol if old == size and new == size + 1 else None if isinstance(old, int) and old != new else old
                for old, new in zip(value.shape, tensor.shape, strict=True)
            ]
            value.shape = ir.Shape(dims)


def _restore_names(model: ir.Model, module: torch.nn.Module, prefix: str, dynamic_axes: DynamicAxes) -> None:
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    # A tied weight has several names; torch.export takes the last one, PyTorch's own listings the first
    names = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    for value in list(model.graph.initializers.values()):
        name = names.get(str(value.name), str(value.name)).removeprefix(prefix)
        if name != value.name:
            del model.graph.initializers[str(value.name)]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            model.graph.initializers.add(value)
    for value in model.graph.inputs:
        axes = dynamic_axes.get(str(value.name), {})
        if value.shape is not None and axes:
            dims = [axes.get(axis, dim) for axis, dim in enumerate(value.shape)]
            value.shape = ir.Shape(dims)


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Name the outputs, without renaming an input, a weight or another output that is returned as it is.

    torch's `output_names` renames the value behind an output, whatever it is.
    """
    if len(names) != len(graph.outputs):
        raise ExportError(f"the graph has {len(graph.outputs)} outputs, but the model returns {len(names)}")
    seen: set[ir.Value] = set()
    for position, value in enumerate(list(graph.outputs)):
        if value.producer() is None or value in seen:
            identity = ir.node("Identity", [value])
            graph.append(identity)
            copy = identity.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            graph.outputs[position] = value = copy
        seen.add(value)
    taken = {*names, *(str(value.name) for value in graph.inputs)}
    used = taken | set(graph.initializers) | {str(v.name) for node in graph.all_nodes() for v in node.outputs}
    for node in graph.all_nodes():
        for inner in node.outputs:
            if inner.name in taken and inner not in seen:
                inner.name = next(n for i in range(len(used) + 1) if (n := f"{inner.name}_{i}") not in used)
                used.add(inner.name)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _clear_metadata(model: ir.Model) -> None:
    """Remove what torch notes on every node and value: its stack traces hold paths of this machine."""
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)):
        value.metadata_props.clear()  # the pass leaves these
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "onnxpress", None, None
    graph.name = "main"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's log lines and deprecations away from the user; its errors still come through.

    torch also prints the half-made graph to standard error before it raises, some hundred lines of it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the root last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _explain(error: BaseException) -> str:
    """Find, in torch's page-long message, the line that says what is wrong and where in the user's code."""
    chain = _chain(error)
    cause = chain[-1]
    fixed = re.search(r"inferred a static shape of (\d+) for dimension inputs(\S+)\.shape\[(\d+)\]", str(cause))
    if fixed:
        return f"the model works only where axis {fixed[3]} of its input {fixed[2]} has size {fixed[1]}"
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"torch.export cannot trace the model: {type(cause).__name__}: {first[:300]}{place(error)}"


_THIS_PACKAGE = str(Path(__file__).parent)
_NOT_THE_USERS = re.compile(r"/(torch|onnxscript|importlib)/|^<frozen|^" + re.escape(_THIS_PACKAGE))


def place(error: BaseException) -> str:
    """` (model.py line 3, in forward)`: the innermost line of the model's own code that an error names, or ``."""
    chain = _chain(error)
    # As torch quotes it: File "x.py", line 3, in forward
    quoted = [
        q for e in reversed(chain) for q in reversed(re.findall(r'File "([^"]+)", line (\d+), in ([^\s,]+)', str(e)))
    ]
    frames = [
        (frame.filename, str(frame.lineno), frame.name)
        for e in reversed(chain)
        for frame in reversed(traceback.extract_tb(e.__traceback__))
    ]
    for file, line, function in (*quoted, *frames):
        if not _NOT_THE_USERS.search(file):
            return f" ({Path(file).name} line {line}, in {function})"
    return ""


def _advice(error: BaseException) -> str:
    text = "".join(str(e) for e in _chain(error))
    if "inferred a static shape" in text:
        return (
            "The model fixes the size of this axis: do not write the size as a number, or leave it out of dynamic_axes."
        )
    if "data-dependent" in text or "GuardOnDataDependent" in text or "Could not guard" in text:
        return "Replace Python control flow that depends on tensor values by torch.where or torch.cond."
    if "No ONNX function found" in text or "DispatchError" in text:
        return (
            "Rewrite the operator that is named with ones that ONNX has, or try a newer opset (--set export.opset=23)."
        )
    return "Run again with --debug for torch's full report."

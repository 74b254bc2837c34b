# SPDX-License-Identifier: Apache-2.0
"""What every backend's graph gets last: PyTorch's names, the names asked for, free sizes, no trace of the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from ..contracts.errors import ExportError
from .reference import flat_outputs

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name to {axis: symbol}; axes that share a symbol have one size."""

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_FROM_VALUES = re.compile(r"\bz?uf?\d+\b")
"""torch.export's name of a size that depends on the values of inputs, as in `x[x > 0]`; alone or in a formula."""


def finish(
    model: ir.Model,
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    strip_prefix: str = "",
) -> None:
    """Turn what a tracer made of `module` into the graph that is promised, in place; see `backends.Backend`.

    Raises:
        ExportError: The graph does not have as many outputs as there are names.
    """
    _restore_names(model, module, strip_prefix)
    _name_sizes(model.graph, dynamic_axes)
    _name_outputs(model.graph, output_names)
    _free_output_sizes(model.graph, module, inputs, dynamic_axes)
    _clear_metadata(model)


def _restore_names(model: ir.Model, module: torch.nn.Module, prefix: str) -> None:
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


def _name_sizes(graph: ir.Graph, dynamic_axes: DynamicAxes) -> None:
    """Call sizes by the names asked for, in every shape where the tracer calls them `s77` or `2*s77`."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        axes = dynamic_axes.get(str(value.name), {})
        if value.shape is not None and axes:
            names |= {
                str(dim.value): axes[axis]
                for axis, dim in enumerate(value.shape)
                if axis in axes and isinstance(dim, ir.SymbolicDim) and _NAME.fullmatch(str(dim.value))
            }
            value.shape = ir.Shape([axes.get(axis, dim) for axis, dim in enumerate(value.shape)])
    names = {old: new for old, new in names.items() if old != new}
    for value in (v for node in graph.all_nodes() for v in node.outputs) if names else ():
        if value.shape is not None and not value.shape.is_static():
            dims = [
                _NAME.sub(lambda match: names.get(match[0], match[0]), str(dim.value))
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None
                else dim
                for dim in value.shape
            ]
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


def _free_output_sizes(
    graph: ir.Graph, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes
) -> None:
    """Take back an output size that torch declares as fixed, or gives a name, although it follows an input's.

    Seen: the time axis of an LSTM's output has the length of the example for good, or is `Transpose170_dim_1`.
    """
    symbols = list(dict.fromkeys(s for axes in dynamic_axes.values() for s in axes.values()))
    asked: list[torch.Tensor] | None = None
    if symbols and any(_foreign(dim, symbols) for value in graph.outputs for dim in value.shape or ()):
        with torch.no_grad():
            asked = flat_outputs(module(*inputs.values()))
    for symbol in symbols:
        size = next(inputs[n].shape[a] for n, axes in dynamic_axes.items() for a, s in axes.items() if s == symbol)
        found = at_size(module, inputs, dynamic_axes, symbol, size + 1)
        for index, tensor in enumerate([] if found is None else flat_outputs(found)):
            value = graph.outputs[index]
            if value.shape is None or len(value.shape) != tensor.dim():
                continue
            dims: list[int | str | ir.SymbolicDim | None] = list(value.shape)
            for axis, (old, new) in enumerate(zip(dims, tensor.shape, strict=True)):
                if _from_values(old, symbols):
                    continue  # it may equal an input's size here and not elsewhere
                before = asked[index].shape[axis] if asked is not None and _foreign(old, symbols) else old
                if before == size and new == size + 1:
                    dims[axis] = symbol
                elif isinstance(old, int) and old != new:
                    dims[axis] = None
            value.shape = ir.Shape(dims)
    for value in graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape([None if _from_values(dim, symbols) else dim for dim in value.shape])


def _from_values(dim: object, symbols: Sequence[str]) -> bool:
    """Whether a size depends on what the inputs hold."""
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return name is not None and name not in symbols and _FROM_VALUES.search(name) is not None


def _foreign(dim: object, symbols: Sequence[str]) -> bool:
    """Whether a size has a name that only the tracer knows."""
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    return name is not None and name not in symbols and not set(_NAME.findall(name)) <= set(symbols)


def at_size(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes, symbol: str, size: int
) -> Any:
    """What the original returns for the example inputs with `size` along every axis called `symbol`; or None."""
    return outputs_at(module, resized(inputs, dynamic_axes, symbol, size))


def outputs_at(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """What the original returns for these inputs, or None where it does not take them."""
    try:
        with torch.no_grad():
            return module(*inputs.values())
    except Exception:  # noqa: BLE001 - any refusal by the user's code is an answer
        return None


def resized(
    inputs: Mapping[str, torch.Tensor], dynamic_axes: DynamicAxes, symbol: str, size: int
) -> dict[str, torch.Tensor]:
    """The example inputs, repeated or cut to `size` along every axis called `symbol`."""
    changed = dict(inputs)
    for name, axes in dynamic_axes.items():
        for axis in (a for a, s in axes.items() if s == symbol):
            index = torch.arange(size) % changed[name].shape[axis]
            changed[name] = changed[name].index_select(axis, index)
    return changed


def _clear_metadata(model: ir.Model) -> None:
    """Remove what torch notes on every node and value: its stack traces hold paths of this machine."""
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)):
        value.metadata_props.clear()  # the pass leaves these
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "onnxpress", None, None
    graph.name = "main"

# SPDX-License-Identifier: Apache-2.0
"""torch's older exporter (`dynamo=False`): it records one run, or translates a script with its branches and loops.

It is deprecated, and knows operators that torch.export's translation lacks, and modules that torch.export refuses. A
recorded run says nothing of the paths that it did not take, so a module that chooses its path in Python is scripted
instead; where it cannot be scripted it is refused.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from ..contracts.errors import ExportError, InputError
from .blame import chain, first_line, place, quiet
from .branches import Line, values_read
from .finish import DynamicAxes, finish, outputs_at, resized
from .graph_file import at_least, read

NEWEST_OPSET = 20
"""The last that this exporter writes; ONNX's converter makes newer ones of it."""

_LARGER = 67
"""Size to trace at again, where the model asks for sizes in Python."""

Inputs = Mapping[str, torch.Tensor]
Translate = Callable[[torch.nn.Module, Inputs], tuple[ir.Model, set[Line]]]


def export_module(
    module: torch.nn.Module,
    inputs: Inputs,
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int,
    strip_prefix: str = "",
) -> ir.Model:
    """Trace or script `module`; see `backends.ExportModule`. It may be, or hold, a `torch.jit.ScriptModule`.

    Raises:
        ExportError: An operator has no translation, or the module takes its path by what only Python sees.
    """

    def translate(what: torch.nn.Module, examples: Inputs) -> tuple[ir.Model, set[Line]]:
        return _translated(what, examples, dynamic_axes, min(opset, NEWEST_OPSET))

    try:
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            model, _ = translate(_as_script(module, inputs), inputs)
        else:
            model = _traced_or_scripted(module, inputs, dynamic_axes, translate)
        model = at_least(model, opset, "the traced graph")
    except ExportError:
        raise
    except InputError as error:
        raise ExportError(error.message, next_step=f"Try --set export.opset={NEWEST_OPSET}.") from error
    except Exception as error:  # the tracer lets through whatever the user's code raises
        raise ExportError(_explain(error), next_step=_advice(error)) from error
    finish(model, module, inputs, output_names=output_names, dynamic_axes=dynamic_axes, strip_prefix=strip_prefix)
    return model


def _traced_or_scripted(module: torch.nn.Module, inputs: Inputs, axes: DynamicAxes, translate: Translate) -> ir.Model:
    """The recorded run if it stands for all others, or else the script."""
    reason: Exception | None
    try:
        model, doubts = translate(module, inputs)
        reason = _one_sided(module, inputs, axes, model, doubts, translate) if doubts else None
        if reason is None:
            return model
    except Exception as error:  # noqa: BLE001 - raised below, unless the script can be translated
        reason = error
    for script in _scripts(module, inputs):
        with contextlib.suppress(Exception):
            return translate(script, inputs)[0]
    raise reason


def _one_sided(
    module: torch.nn.Module, inputs: Inputs, axes: DynamicAxes, model: ir.Model, doubts: set[Line], translate: Translate
) -> ExportError | None:
    """Why the recorded run does not stand for others; None where it does.

    Args:
        doubts: The lines where the tracer saw a tensor (or a size, which it treats as one) become a Python value.
    """
    where = next((shown for line, shown in values_read(module, inputs).items() if line in doubts), None)
    if where is not None:
        return ExportError(
            f"the model reads values of its inputs in Python ({where}), and a trace holds only one case",
            next_step="Replace it by torch.where, or make the module fit for torch.jit.script.",
        )
    for what, larger in _larger(module, inputs, axes):
        if _steps(translate(module, larger)[0]) != _steps(model):
            return ExportError(
                f"the model takes another path at {what}, and a trace holds only one",
                next_step="Remove the Python condition on the shape, or leave this axis out of dynamic_axes.",
            )
    return None


def _larger(module: torch.nn.Module, inputs: Inputs, axes: DynamicAxes) -> Iterator[tuple[str, Inputs]]:
    """Larger inputs that the module takes, and how to call them: a larger batch, and all other sizes larger together.

    Together, because they may depend on each other: a mask that is as long as what was read before and what is new.
    """
    sizes = {s: inputs[n].shape[a] for n, named in axes.items() for a, s in named.items()}
    batch = {named[0] for named in axes.values() if 0 in named}
    for group in (*({symbol} for symbol in batch), set(sizes) - batch):
        smallest = min((sizes[symbol] for symbol in group), default=0)
        for times in (max(2, -(-_LARGER // smallest)), 2) if smallest else ():
            larger = inputs
            for symbol in sorted(group):
                larger = resized(larger, axes, symbol, times * sizes[symbol])
            if outputs_at(module, larger) is not None:
                yield ", ".join(f"{symbol} = {times * sizes[symbol]}" for symbol in sorted(group)), larger
                break


def _steps(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def _as_script(module: torch.nn.Module, inputs: Inputs) -> torch.nn.Module:
    """A module that is a script already, or one around scripts: its own few lines are traced, theirs are kept."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    with quiet(), _doubts() as doubts, torch.no_grad():
        traced: torch.nn.Module = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)
    if doubts:
        file, line = min(doubts)
        raise ExportError(
            f"the code around the script takes its path in Python ({Path(file).name} line {line}), which a trace loses",
            next_step="Script the whole module.",
        )
    return traced


@contextlib.contextmanager
def _doubts() -> Iterator[set[Line]]:
    """Collect the lines where the tracer warns that a value becomes a constant."""
    lines: set[Line] = set()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", torch.jit.TracerWarning)
        yield lines
    lines |= {(w.filename, w.lineno) for w in seen}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep from the terminal the graph that torch prints before it raises: from C++, past Python's own streams."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "wb"))
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(sink.fileno(), number)
        yield


def _scripts(module: torch.nn.Module, inputs: Inputs) -> Iterator[torch.nn.Module]:
    """The module as a script or, where it is only wrapped in what cannot be one, with its parts as scripts."""

    def whole() -> torch.nn.Module:
        script: torch.nn.Module = torch.jit.script(module)
        return script

    def wrapped() -> torch.nn.Module:
        wrapper = copy.copy(module)
        wrapper._modules = dict(module._modules)
        for name, part in module.named_children():
            setattr(wrapper, name, torch.jit.script(part))
        return _as_script(wrapper, inputs)

    for way in (whole, wrapped):
        script = None
        with contextlib.suppress(Exception), quiet():
            script = way()
        if script is not None:
            yield script


def _translated(module: torch.nn.Module, inputs: Inputs, axes: DynamicAxes, opset: int) -> tuple[ir.Model, set[Line]]:
    """The graph as torch writes it, and the lines that the tracer had doubts about.

    The weights never go through the file: the graph gets the module's own tensors.
    """
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        file = Path(folder) / "model.onnx"
        with quiet(), _silent(), _doubts() as doubts, torch.no_grad():
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=list(inputs),
                dynamic_axes={name: dict(named) for name, named in axes.items() if named},
                export_params=False,
                keep_initializers_as_inputs=False,
                do_constant_folding=False,
                # The module is in eval mode as it is; torch's EVAL also folds weights, which then lose their names
                training=torch.onnx.TrainingMode.PRESERVE,
            )
        model = read(file)
    _give_weights(model.graph, module, inputs)
    return model, doubts


def _give_weights(graph: ir.Graph, module: torch.nn.Module, inputs: Inputs) -> None:
    """Turn the inputs that stand for parameters and buffers into initializers."""
    tensors = dict(module.named_buffers(remove_duplicate=False)) | dict(module.named_parameters(remove_duplicate=False))
    for value in list(graph.inputs)[len(inputs) :]:
        name = str(value.name)
        if name not in tensors:
            raise ExportError(f"the trace has an input '{name}' that is no weight of the model")
        value.const_value = TorchTensor(tensors[name].detach(), name=name)
        graph.inputs.remove(value)
        graph.initializers.add(value)


def _explain(error: BaseException) -> str:
    cause = chain(error)[-1]
    return f"TorchScript cannot export the model: {type(cause).__name__}: {first_line(cause)}{place(error)}"


def _advice(error: BaseException) -> str:
    if "UnsupportedOperatorError" in {type(each).__name__ for each in chain(error)}:
        return "Rewrite the operator that is named with ones that ONNX has."
    return "Run again with --debug for torch's full report."

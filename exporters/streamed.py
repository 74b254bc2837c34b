# SPDX-License-Identifier: Apache-2.0
"""Export of a model that is larger than memory: traced without weights, which the graph then reads from the checkpoint.

    with without_weights():
        model = AutoModelForCausalLM.from_config(config)
    fake_weights(model)
    graph = export_module(...)                      as for any other module; the trace sees shapes alone
    give_weights(graph, model, Checkpoint.open(folder))
    with weights_as_called(model, checkpoint):      the original in PyTorch, with one layer's weights in memory
        model(...)

Nothing is read before a pass or the writer asks for it, and then a piece at a time (see `streamed_tensor`). What is no
parameter (the frequencies of rotary embeddings, masks) is computed for real when the model is built.

Reference: fake tensors, in PyTorch's documentation of torch.compiler ("Fake tensor").
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..contracts.errors import ExportError, InputError
from .dynamo import export_module
from .families.traced import Traced, plain_kernels
from .streamed_checkpoint import Checkpoint
from .tokenizer import quiet_transformers


@dataclass
class StreamedExport:
    """A graph whose weights are still in the checkpoint, and the original, which can be run from there.

    Attributes:
        graph: Unoptimized, fp32; large initializers are `StreamedTensor`s.
        traced: What was traced; its `reference` runs within `weights_as_called` only.
        model: The transformers model.
        checkpoint: Its weights.
        details: For the manifest.
    """

    graph: ir.Model
    traced: Traced
    model: torch.nn.Module
    checkpoint: Checkpoint
    details: dict[str, Any]


def export_streamed(
    folder: Path, auto_class: str, trace: Callable[[torch.nn.Module], Traced], *, opset: int
) -> StreamedExport:
    """Export a transformers model without loading its weights.

    Args:
        folder: config.json and safetensors.
        auto_class: Name of the transformers class that builds the model from its configuration.
        trace: From the model to what is traced; it may call the model, which then computes shapes alone.
        opset: Of the graph.

    Raises:
        InputError: Configuration and weights do not fit together; see `Checkpoint.open` and `give_weights`.
        ExportError: torch.export refuses the model.
    """
    import transformers

    started = time.perf_counter()
    checkpoint = Checkpoint.open(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with without_weights(), quiet_transformers(), torch.no_grad():
            model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0][:240]
        raise InputError(f"cannot build {checkpoint.name}: {first}", next_step="Check its config.json.") from error
    model.eval()
    fake_weights(model)
    match_keys(model, checkpoint)  # before the minutes that tracing takes
    load_buffers(model, checkpoint)
    with plain_kernels(model):
        traced = trace(model)
        graph = export_module(
            traced.module,
            traced.examples,
            output_names=traced.outputs,
            dynamic_axes=traced.axes,
            opset=opset,
            strip_prefix=traced.prefix,
        )
    traced.finish(graph)
    details = give_weights(graph, model, checkpoint)
    details = {"backend": "dynamo", "opset": opset, "weights": "streamed", **details, **traced.details}
    details["seconds"] = round(time.perf_counter() - started, 3)
    return StreamedExport(graph, traced, model, checkpoint, details)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within the block, a parameter that a module registers keeps its shape and type and loses its memory.

    Buffers stay: they are small, and computed, not loaded.
    """
    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and param.device.type != "meta":
            # Initialization, which comes next, then has nothing to fill
            self._parameters[name] = torch.nn.Parameter(param.detach().to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original


def fake_weights(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give a module that was built `without_weights` parameters that calculate shapes, and pass for ones on the CPU.

    Args:
        module: Changed in place. Parameters that are shared stay shared.
        dtype: Of the floating point parameters, whatever the configuration says.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                with mode:
                    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=kind, device="cpu")
                fakes[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
            part._parameters[name] = fakes[id(parameter)]


@contextlib.contextmanager
def weights_as_called(
    model: torch.nn.Module, checkpoint: Checkpoint, read: Callable[[str], np.ndarray | None] | None = None
) -> Iterator[None]:
    """Within the block, `model` runs in fp32 although it has no weights: each part reads its own when it is called.

    Not more than one part's parameters are in memory (of Llama, the embedding's: vocabulary x width x 4 bytes).

    Args:
        model: With `fake_weights`.
        checkpoint: See `give_weights`.
        read: By parameter name; what it returns stands for the checkpoint's numbers, such as those that a quantized
            graph has. None: the checkpoint's.
    """
    keys, fakes = match_keys(model, checkpoint), dict[tuple[torch.nn.Module, str], torch.nn.Parameter]()

    def load(part: torch.nn.Module, prefix: str) -> None:
        for own, parameter in part._parameters.items():
            if parameter is not None:
                name, fakes[part, own] = prefix + own, parameter
                array = read(name) if read is not None else None
                if array is None:
                    array = checkpoint.tensor(keys[name], ir.DataType.FLOAT).numpy()
                part._parameters[own] = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)

    def let_go(part: torch.nn.Module, *_: object) -> None:
        for own in part._parameters:
            if (part, own) in fakes:
                part._parameters[own] = fakes[part, own]

    handles = []
    for name, part in model.named_modules():
        if any(parameter is not None for parameter in part._parameters.values()):
            prefix = f"{name}." if name else ""
            handles.append(part.register_forward_pre_hook(lambda m, _, p=prefix: load(m, p)))
            handles.append(part.register_forward_hook(let_go, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def give_weights(graph: ir.Model, model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Let every initializer that stands for a parameter of `model` read from `checkpoint`.

    Args:
        graph: What `export_module` made of `model`; initializers are named as its parameters. Changed in place.
        model: Built `without_weights`.
        checkpoint: Holds the parameters under their names, or below or above the model's base prefix.

    Returns:
        For the manifest: bytes streamed, and names in the checkpoint that the model has no use for.

    Raises:
        InputError: A parameter is missing or has another shape, or the checkpoint has more of the model's layers than
            the configuration says.
        ExportError: A parameter was changed during the trace, so that its value is not the checkpoint's.
    """
    keys = match_keys(model, checkpoint)
    used = 0
    for value in graph.graph.initializers.values():
        tensor, name = value.const_value, str(value.name)
        if not isinstance(getattr(tensor, "raw", None), FakeTensor):
            continue
        if name not in keys:
            raise ExportError(
                f"'{name}' in the graph is no parameter of {checkpoint.name}",
                next_step="Export it with --set export.weights=memory.",
            )
        assert tensor is not None
        streamed = checkpoint.tensor(keys[name], tensor.dtype, name)
        value.const_value = streamed
        used += int(checkpoint[keys[name]].size * checkpoint[keys[name]].dtype.itemsize)
    known = set(keys.values()) | {name for name, _ in model.named_buffers()}
    return {"streamed_bytes": used, "unused_weights": sorted(set(checkpoint) - known)}


def load_buffers(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the buffers that belong to the checkpoint (running means, for one) with its numbers; they are small.

    Raises:
        InputError: One has another shape there.
    """
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept and name in checkpoint:
            array = checkpoint.tensor(name, checkpoint[name].dtype).numpy()
            if array.shape != tuple(buffer.shape):
                raise _misshapen(name, array.shape, buffer, checkpoint)
            wide = array.astype(np.float32) if array.dtype.kind not in "iub" else array
            buffer.copy_(torch.from_numpy(wide))


def match_keys(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name of each parameter (of shared ones, each of its names) to its name in the checkpoint.

    Raises:
        InputError: See `give_weights`.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    together: dict[int, list[str]] = {}
    for name, parameter in names.items():
        together.setdefault(id(parameter), []).append(name)
    keys: dict[str, str] = {}
    for name, parameter in names.items():
        tries = [t for n in together[id(parameter)] for t in (n, n.removeprefix(prefix), prefix + n)]
        found = next((t for t in tries if t in checkpoint), None)
        if found is None:
            raise _missing(name, checkpoint)
        if checkpoint[found].shape != tuple(parameter.shape):
            raise _misshapen(found, checkpoint[found].shape, parameter, checkpoint)
        keys[name] = found
    _refuse_left_layers(keys, checkpoint)
    return keys


def _misshapen(name: str, stored: tuple[int, ...], asked: torch.Tensor, checkpoint: Checkpoint) -> InputError:
    return InputError(
        f"{checkpoint.name}: {name} is {list(stored)} in the weights, but {list(asked.shape)} by config.json",
        next_step="Use the config.json that was saved with these weights.",
    )


def _missing(name: str, checkpoint: Checkpoint) -> InputError:
    alike = _pattern(name)
    if any(_pattern(key) == alike for key in checkpoint):
        return InputError(
            f"{checkpoint.name} lacks {name}, though it has others of the kind",
            next_step="Use the config.json that was saved with these weights, or download them again.",
        )
    return InputError(
        f"{checkpoint.name} has no weights for {name}",
        next_step="Choose the --task that the checkpoint was trained for; if transformers renames or joins weights "
        "when it loads them, use --set export.weights=memory.",
    )


def _refuse_left_layers(keys: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """More layers in the weights than in the configuration would be dropped without a word."""
    used = set(keys.values())
    patterns = {_pattern(key) for key in used}
    for key in checkpoint:
        if key not in used and re.search(r"\d", key) and _pattern(key) in patterns:
            raise InputError(
                f"{checkpoint.name} holds {key}, of which config.json knows nothing",
                next_step="Use the config.json that was saved with these weights.",
            )


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)

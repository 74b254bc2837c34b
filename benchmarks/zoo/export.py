# SPDX-License-Identifier: Apache-2.0
"""How a PyTorch module becomes a file of the collection: torch's two exporters, ours, and weights that matter.

Weights as a constructor leaves them hide mistakes: a BatchNormalization of mean 0, variance 1, weight 1 and bias 0
gives the same output whichever of its channels was cut. `spread` replaces all of them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onnxpress.exporters import graph_file
from onnxpress.exporters.dynamo import export_module

Axes = Mapping[str, Mapping[int, str]]


def spread(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, so that every channel of every layer is seen in the output, each to another degree."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Sequence[int], low: float, high: float) -> torch.Tensor:
        return torch.rand(tuple(shape), generator=generator) * (high - low) + low

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if parameter.dim() < 2 and last.startswith("bias"):
                parameter.copy_(drawn(parameter.shape, -0.3, 0.3))
            elif parameter.dim() < 2:
                parameter.copy_(drawn(parameter.shape, 0.6, 1.4))
            else:
                # Kaiming's size, and outputs of different sizes, as training leaves them
                stacked = parameter.dim() == 3 and last != "weight"  # a matrix an expert, not a filter a channel
                incoming = parameter.shape[1] if stacked else parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator) / incoming**0.5
                rows = drawn(parameter.shape[:1], 0.5, 1.7).reshape(-1, *[1] * (parameter.dim() - 1))
                parameter.copy_(noise * rows)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(drawn(buffer.shape, -0.3, 0.3))
            elif name.endswith("running_var"):
                buffer.copy_(drawn(buffer.shape, 0.4, 1.6))
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) / 2)
    return module.eval()


def by_dynamo(
    module: nn.Module, feeds: Mapping[str, np.ndarray], file: Path, *, opset: int, axes: Axes, outputs: Sequence[str]
) -> Path:
    """`torch.onnx.export(dynamo=True)` as torch's documentation shows, with torch's own optimizer."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, _tensors(feeds), dynamo=True, opset_version=opset, input_names=list(feeds),
            output_names=list(outputs), dynamic_shapes=_shapes(module, list(feeds), axes), verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(os.fspath(file))
    return file


def by_torchscript(
    module: nn.Module, feeds: Mapping[str, np.ndarray], file: Path, *, opset: int, axes: Axes, outputs: Sequence[str],
    keep_normalization: bool = False,
) -> Path:  # fmt: skip
    """`torch.onnx.export(dynamo=False)`, which knows old operator sets.

    Args:
        keep_normalization: Leave BatchNormalization as nodes: it is folded into the convolutions otherwise.
    """
    mode = torch.onnx.TrainingMode.PRESERVE if keep_normalization else torch.onnx.TrainingMode.EVAL
    dynamic = {name: dict(found) for name, found in axes.items()}
    dynamic |= {name: {0: "batch"} for name in outputs}
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module, _tensors(feeds), os.fspath(file), dynamo=False, opset_version=opset, input_names=list(feeds),
            output_names=list(outputs), dynamic_axes=dynamic, training=mode,
        )  # fmt: skip
    return file


def by_onnxpress(
    module: nn.Module, feeds: Mapping[str, np.ndarray], file: Path, *, opset: int, axes: Axes, outputs: Sequence[str]
) -> Path:
    """Our own exporter, before any pass."""
    tensors = dict(zip(feeds, _tensors(feeds), strict=True))
    model = export_module(module, tensors, output_names=outputs, dynamic_axes=axes, opset=opset)
    graph_file.write(model, file)
    return file


def _shapes(module: nn.Module, names: Sequence[str], axes: Axes) -> tuple[Any, ...]:
    """One entry a parameter, as torch wants it, of which `*tensors` is one."""
    shapes = tuple(dict(axes.get(name, {})) for name in names)
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    single = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:single], shapes[single:])


def _tensors(feeds: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in feeds.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines and warnings of other people's tools; their errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

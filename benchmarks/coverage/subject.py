# SPDX-License-Identifier: Apache-2.0
"""A tiny model of a type, with weights that matter, as the folder that save_pretrained writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from onnxpress.contracts.tasks import GENERATION, Task

from .shrink import tiny_config
from .walk import classes_of

CLASSIFICATION = "text-classification"

LARGEST = 5_000_000
"""Parameters: what is larger was not shrunk as it should be, and would make the sweep slow."""


def build(model_type: str, task: Task) -> Any:
    """The model, in eval mode, with weights drawn from seed 0.

    Raises:
        ValueError: It is larger than `LARGEST`.
        Exception: Whatever transformers says about a type that cannot be built: a library that is missing, settings
            without a default.
    """
    auto_class, _ = classes_of(model_type, task)
    config = configure(model_type, task)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto_class.from_config(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"the tiny configuration makes a model of {parameters:,} parameters")
    torch.manual_seed(0)
    return draw_weights(auto_class.from_config(config).eval())


def configure(model_type: str, task: Task) -> Any:
    """The tiny configuration, with what the task needs beside it."""
    config = tiny_config(model_type)
    _, model_class = classes_of(model_type, task)
    config.architectures = [model_class]
    if task.name == GENERATION and hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT's kind reads both ways otherwise, and has no cache
    text = config.get_text_config()
    if task.name == CLASSIFICATION and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # decoders look for the last token that is no padding
    return config


def draw_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw weights anew, so that each is seen in the output.

    As a constructor leaves them, biases are 0, norms and BatchNorms the identity, and some layers as good as absent
    (LayerScale at 1e-5): a graph that forgets one of them would agree with PyTorch all the same. Parameters of other
    shapes are only shaken: a state-space model's decay rates are no place for any number.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like.dtype)

    def normal(like: torch.Tensor, deviation: float) -> torch.Tensor:
        return (torch.randn(like.shape, generator=generator) * deviation).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(drawn(module.running_mean, -0.3, 0.3))
                module.running_var.copy_(drawn(module.running_var, 0.5, 1.5))
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.add_(drawn(parameter, -0.1, 0.1))
            elif float(parameter.std()) < 0.05:
                incoming = max(8, parameter[0].numel())
                parameter.add_(normal(parameter, incoming**-0.5))
    return model


def save(model: Any, folder: Path) -> None:
    """config.json and model.safetensors, as a user's folder has them."""
    model.save_pretrained(folder)

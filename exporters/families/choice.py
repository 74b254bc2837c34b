# SPDX-License-Identifier: Apache-2.0
"""Which kind a model is, and so what is traced."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...contracts.tasks import FEATURES, Task
from ..encoder import PoolingPlan
from .decoder import trace_cached
from .encoder_decoder import trace_encoder_decoder
from .forward import trace_forward
from .text_encoder import input_names, returns, trace_text_encoder
from .traced import Traced

_OTHER_SENSES = {"pixel_values", "input_values", "input_features", "bbox", "past_values"}
"""Parameters of models that read more than text, or something else."""


def traces_of(
    model: torch.nn.Module,
    task: Task,
    *,
    pooling: PoolingPlan,
    tokenizer: Any,
    preprocessor: Mapping[str, Any],
    max_length: int | None,
    cache: bool = True,
) -> list[Traced]:
    """What to trace for a model and its task; the graph that is called most often comes first.

    Args:
        model: In eval mode, in the form in which it is traced (see `traced.plain_kernels`).
        task: What it is exported for.
        pooling: For feature-extraction, how token vectors become one.
        tokenizer: Of its folder, or None.
        preprocessor: preprocessor_config.json of its folder, or empty.
        max_length: Longest text in tokens, or None.
        cache: Whether models that generate keep a cache.

    Raises:
        ExportError, InputError: The model does not fit any kind, or fails.
    """
    parameters = set(inspect.signature(model.forward).parameters)
    reads_from_encoder = _is_encoder_decoder(model) and "decoder_input_ids" in parameters
    if task.generates and cache and reads_from_encoder:
        return trace_encoder_decoder(model, preprocessor)
    text_only = "input_ids" in parameters and not parameters & _OTHER_SENSES
    if task.generates and cache and text_only:
        decoder = trace_cached(model)
        if decoder is not None:
            return [decoder]  # others keep nothing between calls, and read the whole text in each
    if text_only and task.name != "multiple-choice" and not (task.name == FEATURES and reads_from_encoder):
        names = input_names(model, tokenizer)
        if task.name != FEATURES or pooling.kind != "none" or returns(model, names, task.outputs):
            return [trace_text_encoder(model, task, pooling, names, max_length)]
    return [trace_forward(model, task, preprocessor)]


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))

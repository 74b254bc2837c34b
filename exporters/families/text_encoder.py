# SPDX-License-Identifier: Apache-2.0
"""A text encoder: tokenizer inputs in, vectors or scores out, with as little mask arithmetic as the model allows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...contracts.errors import ExportError, InputError
from ...contracts.tasks import Task
from ..blame import place
from ..encoder import Encoder, PoolingPlan
from ..tokenizer import INPUT_ORDER
from .examples import Examples
from .traced import Traced


def input_names(model: Any, tokenizer: Any) -> list[str]:
    """Which of the tokenizer's inputs the model reads, in the graph's order.

    Raises:
        ExportError: It reads no text.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    if tokenizer is not None:
        accepted &= {"input_ids", "attention_mask", *tokenizer.model_input_names}
    elif getattr(getattr(model, "config", None), "type_vocab_size", 0) < 2:
        accepted.discard("token_type_ids")
    names = [n for n in INPUT_ORDER if n in accepted]
    if "input_ids" not in names:
        raise ExportError(
            f"{type(model).__name__} does not read input_ids", next_step="Write a factory: package.module:factory."
        )
    return names


def trace_text_encoder(
    model: torch.nn.Module, task: Task, pooling: PoolingPlan, names: Sequence[str], max_length: int | None
) -> Traced:
    """What to trace for a text encoder.

    Args:
        model: In eval mode.
        task: One with named outputs.
        pooling: How token vectors become one.
        names: From `input_names`.
        max_length: Longest text in tokens, or None.

    Raises:
        InputError: The model fails in PyTorch already.
    """
    reference = Encoder(model, pooling, task.outputs)
    examples = _example(model, names)
    _check_it_runs(reference, examples)
    module = _with_broadcast_mask(reference, names, max_length)
    return Traced(
        name="model",
        reference=reference,
        inputs=names,
        outputs=pooling.output_names(task),
        module=module,
        examples=examples,
        axes={name: {0: "batch", 1: "sequence"} for name in names},
        details={
            "pooling": pooling.kind,
            "mask": "broadcast" if module.broadcast_mask else "as the model builds it",
        },
    )


def _example(model: Any, names: Sequence[str], length: int = 7) -> dict[str, torch.Tensor]:
    """Two sequences, one of them padded on the right; the numbers only have to be valid token ids."""
    ids = Examples(model).tokens((2, length), model.config.get_text_config())
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    padding = getattr(model.config, "pad_token_id", None)
    if isinstance(padding, int):
        ids[1, -2:] = padding
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {n: values[n] for n in names}


def returns(model: Any, names: Sequence[str], outputs: Sequence[str]) -> bool:
    """Whether the model returns these outputs, or fails, which is for others to say."""
    try:
        with torch.no_grad():
            result = model(**_example(model, names), return_dict=True)
    except Exception:  # noqa: BLE001 - whatever the model's code raises
        return True
    return all(name in result for name in outputs)


def _check_it_runs(encoder: Encoder, examples: Mapping[str, torch.Tensor]) -> None:
    """Tell a checkpoint whose own PyTorch code fails from one that cannot be exported."""
    try:
        with torch.no_grad():
            encoder(*examples.values())
    except Exception as error:  # whatever the model's code raises
        first = (str(error).splitlines() or [""])[0][:240]
        raise InputError(
            f"{type(encoder.model).__name__} fails in PyTorch already: {type(error).__name__}: {first}{place(error)}",
            next_step="Check that config.json, the weights and --task belong together.",
        ) from error


def _with_broadcast_mask(encoder: Encoder, names: Sequence[str], max_length: int | None) -> Encoder:
    """Hand the model a ready `[batch, 1, 1, sequence]` mask if it proves to give the same outputs.

    transformers builds `[batch, 1, sequence, sequence]` with index arithmetic that ONNX keeps as a dozen nodes; most
    encoders take a ready mask as it is. Whether this one does is measured here, not looked up, except for attention
    within a window: it shows only in texts longer than the window, so a config that speaks of one settles it.
    """
    if "attention_mask" not in names or _has_window(encoder.model):
        return encoder
    candidate = Encoder(encoder.model, encoder.pooling, encoder.outputs, broadcast_mask=True)
    for length in (7, min(max_length or 200, 200)):
        examples = _example(encoder.model, names, length)
        keep = examples["attention_mask"].bool()
        try:
            with torch.no_grad():
                wanted, got = encoder(*examples.values()), candidate(*examples.values())
        except Exception:  # noqa: BLE001 - a model that cannot take the mask may fail in any way; the plain one remains
            return encoder
        for a, b in zip(wanted, got, strict=True):
            if a.shape != b.shape:
                return encoder
            if a.shape[:2] == keep.shape:
                a, b = a[keep], b[keep]
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max())):
                return encoder
    return candidate


def _has_window(model: Any) -> bool:
    """Whether some layer attends to a part of the sequence only, as far as the configuration tells."""
    config: dict[str, Any] = model.config.to_dict()
    words = ("window", "local_attention", "attention_chunk")
    return any(layer != "full_attention" for layer in config.get("layer_types") or ()) or any(
        value for key, value in config.items() if any(word in key for word in words)
    )

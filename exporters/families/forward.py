# SPDX-License-Identifier: Apache-2.0
"""A model that is called once: images, sound, several kinds of input, and what is no plain text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...contracts.errors import ExportError
from ...contracts.tasks import Task
from ..reference import named_outputs
from .examples import Example, Examples, inputs_for, with_image_tokens
from .traced import Traced

_NOT_RESULTS = ("loss", "past_key_values", "cache_params", "hidden_states", "attentions", "mems")
"""Fields of a model's output, whole or at the end of their names, that nobody reads in deployment."""


class Forward(torch.nn.Module):
    """Calls the model with named tensors and returns the outputs that are wanted, in order."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor for each name of `inputs`."""
        results = results_of(self.model(**dict(zip(self.inputs, inputs, strict=True)), return_dict=True))
        return tuple(results[name] for name in self.outputs)


def results_of(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model's output that are results, by name; a field with several gets numbers."""
    fields = output if isinstance(output, Mapping) else {"output": output}
    kept = {
        name: value
        for name, value in fields.items()
        if value is not None and not any(name == word or name.endswith(f"_{word}") for word in _NOT_RESULTS)
    }
    try:
        return dict(named_outputs(kept))
    except TypeError as error:
        raise ExportError(f"the model's output cannot become tensors: {error}", next_step="Write a factory.") from error


def trace_forward(model: torch.nn.Module, task: Task, preprocessor: Mapping[str, Any]) -> Traced:
    """What to trace for a model that is called once.

    Raises:
        ExportError: Its inputs are not known here, or it lacks an output of the task.
        InputError: It fails in PyTorch already.
    """
    choices = 3 if task.name == "multiple-choice" else 0
    examples = inputs_for(model, task.inputs, Examples(model, preprocessor, choices=choices))
    tensors = {name: example.tensor for name, example in examples.items()}
    with torch.no_grad():
        results = results_of(model(**tensors, return_dict=True))
    missing = [name for name in task.outputs if name not in results]
    outputs = task.outputs if task.outputs and not missing else tuple(results)
    if not outputs:
        raise ExportError(f"{type(model).__name__} returns no tensors", next_step="Choose another --task.")
    module = Forward(model, list(tensors), outputs)
    names = [f"{name}_output" if name in tensors else name for name in outputs]
    axes = {name: example.axes for name, example in examples.items()}
    return Traced("model", module, list(tensors), names, module, tensors, axes)


def sample_inputs(
    model: Any, preprocessor: Mapping[str, Any], names: Sequence[str], traced: Mapping[str, torch.Tensor]
) -> tuple[dict[str, np.ndarray], ...]:
    """Inputs of several sizes, with padding, that the original takes: to compare on.

    Args:
        model: The original.
        preprocessor: See `Examples`.
        names: The graph's inputs.
        traced: What it was traced with.
    """
    samples: list[dict[str, np.ndarray]] = []
    for seed, (batch, length) in enumerate(((1, 5), (3, 12))):
        make = Examples(model, preprocessor, seed=seed + 1, batch=batch, length=length)
        examples = {name: example for name in names if (example := make.make(name)) is not None}
        if set(examples) != set(names) or not all(_fits(examples[name], traced[name]) for name in names):
            return ({name: tensor.numpy() for name, tensor in traced.items()},)
        examples = with_image_tokens(model, examples, make)
        tensors = {name: examples[name].tensor for name in names}
        if batch > 1 and "input_ids" in tensors and "attention_mask" in tensors:
            tensors["attention_mask"] = tensors["attention_mask"].clone()
            tensors["attention_mask"][0, -2:] = 0
        samples.append({name: tensor.numpy() for name, tensor in tensors.items()})
    return tuple(samples)


def _fits(example: Example, traced: torch.Tensor) -> bool:
    """Whether an example has the layout of the one that was traced: the same sizes where none is open."""
    shape = example.tensor.shape
    return len(shape) == traced.ndim and all(
        size == traced.shape[axis] for axis, size in enumerate(shape) if axis not in example.axes
    )

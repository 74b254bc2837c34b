# SPDX-License-Identifier: Apache-2.0
"""The tasks that onnxpress can export and evaluate, under the ecosystem's names."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError, did_you_mean


@dataclass(frozen=True)
class Task:
    """What a task means for the exporter and for the evaluation.

    Attributes:
        name: The name, as the hub and optimum write it.
        auto_class: The transformers class that loads a model for it.
        outputs: Output names in the graph, in order.
        token_level: Whether each output has a sequence axis, so that padding must not be compared.
    """

    name: str
    auto_class: str
    outputs: tuple[str, ...]
    token_level: bool


FEATURES = "feature-extraction"
"""The task whose outputs are vectors, not choices."""

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(FEATURES, "AutoModel", ("last_hidden_state",), True),
        Task("text-classification", "AutoModelForSequenceClassification", ("logits",), False),
        Task("token-classification", "AutoModelForTokenClassification", ("logits",), True),
        Task("fill-mask", "AutoModelForMaskedLM", ("logits",), True),
        Task("question-answering", "AutoModelForQuestionAnswering", ("start_logits", "end_logits"), True),
    )
}

GENERIC = "generic"
"""The task of a plain `nn.Module` or an `.onnx` file about which nothing more is known."""


def task_named(name: str) -> Task:
    """Return the task, or raise InputError with a suggestion."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task '{name}'", next_step=did_you_mean(name, TASKS)) from None

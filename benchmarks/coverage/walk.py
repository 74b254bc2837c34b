# SPDX-License-Identifier: Apache-2.0
"""Which trials there are: every model type of every auto class that a task names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from onnxpress.contracts.tasks import FEATURES, TASKS, Task

Trial = tuple[str, str]
"""Model type and task."""


def trials() -> list[Trial]:
    """All of them, ordered so that a sweep that is stopped early has seen as many model types as it could.

    First one task for each model type, the one that says most about it (a cache, a head) rather than its bare vectors;
    then a second for those that have two, and so on.
    """
    tasks: dict[str, list[str]] = {}
    for task in sorted(TASKS.values(), key=lambda t: (t.name == FEATURES, not t.generates)):
        for model_type in model_types(task):
            tasks.setdefault(model_type, []).append(task.name)
    rounds = zip_longest(*([(model_type, name) for name in names] for model_type, names in sorted(tasks.items())))
    return [trial for turn in rounds for trial in turn if trial is not None]


def model_types(task: Task) -> Iterator[str]:
    """The model types that one of the task's auto classes loads, each once."""
    seen: set[str] = set()
    for auto_class in task.auto_classes:
        for model_type in _class_names(auto_class):
            if model_type not in seen:
                seen.add(model_type)
                yield model_type


def classes_of(model_type: str, task: Task) -> tuple[Any, str]:
    """The first of the task's auto classes that knows the model type, and the model class that it stands for.

    Where an auto class knows several, as for Funnel with and without its decoder, this is the first.
    """
    import transformers

    auto_class = next(name for name in task.auto_classes if model_type in _class_names(name))
    known = _class_names(auto_class)[model_type]
    return getattr(transformers, auto_class), known if isinstance(known, str) else known[0]


def _class_names(auto_class: str) -> Mapping[str, Any]:
    import transformers

    names: Mapping[str, Any] = getattr(transformers, auto_class)._model_mapping._model_mapping
    return names

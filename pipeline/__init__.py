# SPDX-License-Identifier: Apache-2.0
"""From a source to a validated, measured bundle: recipes, passes, gates, the command line.

Importing this imports nothing heavy; each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Dataset, Example, load_dataset
    from .passes.base import Pass, PassReport, all_passes, run_pass
    from .pressing import Outcome, press
    from .recipe import Recipe, load_recipe
    from .validate import Parity, compare

__all__ = [
    "Dataset",
    "Example",
    "Outcome",
    "Parity",
    "Pass",
    "PassReport",
    "Recipe",
    "all_passes",
    "compare",
    "load_dataset",
    "load_recipe",
    "press",
    "run_pass",
]

_HOME = {
    "data": ("Dataset", "Example", "load_dataset"),
    "passes.base": ("Pass", "PassReport", "all_passes", "run_pass"),
    "pressing": ("Outcome", "press"),
    "recipe": ("Recipe", "load_recipe"),
    "validate": ("Parity", "compare"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

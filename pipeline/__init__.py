# SPDX-License-Identifier: Apache-2.0
"""From a source to a validated, measured bundle: recipes, passes, gates, the command line.

Importing this imports nothing heavy; each name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contracts.lazy import lazy_names

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

__getattr__ = lazy_names(
    __name__,
    {
        "data": ("Dataset", "Example", "load_dataset"),
        "passes.base": ("Pass", "PassReport", "all_passes", "run_pass"),
        "pressing": ("Outcome", "press"),
        "recipe": ("Recipe", "load_recipe"),
        "validate": ("Parity", "compare"),
    },
)

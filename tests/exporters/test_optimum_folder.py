# SPDX-License-Identifier: Apache-2.0
"""Backend `optimum`, with a stand-in for optimum-onnx: that cannot be installed where these tests run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models

from onnxpress.contracts.errors import ExportError, InputError, MissingDependency
from onnxpress.exporters import graph_file, optimum_folder, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.settings import ExportSettings

SETTINGS = ExportSettings(backend="optimum")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportedModel]:
    """A tiny checkpoint, and the graph that another backend makes of it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "bert"
    tiny_models.build(folder, "bert", "AutoModelForSequenceClassification")
    return folder, sources.load(str(folder), None, ExportSettings(backend="torchscript"))


@pytest.fixture
def optimum(ours: tuple[Path, ExportedModel], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Let `main_export` write these models; returns what it is called with."""

    def install(**files: ir.Model) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def main_export(source: str, output: Path, **options: Any) -> None:
            calls.append({"source": source, **options})
            for name, model in files.items():
                graph_file.write(model, output / f"{name}.onnx")
            if not files:
                raise ValueError("Trying to export a bert2 model, that is a custom architecture\nand more")

        monkeypatch.setattr(optimum_folder, "available", lambda: True)
        monkeypatch.setattr(optimum_folder, "_main_export", lambda: main_export)
        return calls

    return install


def test_the_graph_is_optimums_and_the_rest_is_ours(
    ours: tuple[Path, ExportedModel], optimum: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = ours
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 1000)  # the weights' file goes with the temporary folder
    [called] = [optimum(model=other.model)]
    exported = sources.load(str(folder), None, SETTINGS)
    assert called == [
        {
            "source": str(folder),
            "task": "text-classification",
            "opset": 20,
            "dtype": "fp32",
            "local_files_only": True,
            "library_name": "transformers",
            "do_validation": False,
        }
    ]
    assert exported.export_details["backend"] == "optimum"
    for name in ("task", "source", "id2label", "processor_files", "max_length", "signature", "original_file"):
        assert getattr(exported, name) == getattr(other, name), name
    feeds = tiny_models.batch(exported, 2, 9, padding="left")
    assert exported.reference is not None
    wanted = exported.reference.run(feeds)
    graph_file.write(exported.model, folder.parent / "again.onnx")
    session = tiny_models.session(exported, folder.parent)
    for name, array in tiny_models.run(session, feeds).items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-5)


def test_another_signature(ours: tuple[Path, ExportedModel], optimum: Callable[..., list[dict[str, Any]]]) -> None:
    folder, other = ours
    model = other.model.clone()
    model.graph.outputs[0].name = "scores"
    optimum(model=model)
    with pytest.raises(ExportError, match="has the outputs scores, where the original has logits") as caught:
        sources.load(str(folder), None, SETTINGS)
    assert caught.value.backend == "optimum"


def test_several_graphs(ours: tuple[Path, ExportedModel], optimum: Callable[..., list[dict[str, Any]]]) -> None:
    folder, other = ours
    optimum(encoder_model=other.model, decoder_model=other.model)
    with pytest.raises(ExportError, match="optimum writes 2 graphs for text-classification, not one"):
        sources.load(str(folder), None, SETTINGS)


def test_what_optimum_raises(ours: tuple[Path, ExportedModel], optimum: Callable[..., list[dict[str, Any]]]) -> None:
    optimum()
    with pytest.raises(ExportError, match=r"optimum cannot export the model: ValueError: Trying .* architecture$"):
        sources.load(str(ours[0]), None, SETTINGS)


def test_where_it_is_not_installed(ours: tuple[Path, ExportedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimum_folder, "available", lambda: False)
    with pytest.raises(MissingDependency, match="cannot be installed beside transformers 5") as caught:
        sources.load(str(ours[0]), None, SETTINGS)
    assert caught.value.exit_code == 5
    lock = Path(__file__).parents[2] / "constraints-optimum.txt"
    assert lock.name in caught.value.next_step
    pinned = dict(line.split("==") for line in lock.read_text("utf-8").splitlines() if "==" in line)
    assert pinned["optimum-onnx"] == "0.1.0"
    assert pinned["transformers"] < "4.58"


def test_plain_optimum_is_not_enough() -> None:
    pytest.importorskip("optimum")
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = bool(version("optimum-onnx"))
    except PackageNotFoundError:
        installed = False
    assert optimum_folder.available() is installed


def test_it_exports_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    with pytest.raises(InputError, match="backend 'optimum' does not export single modules"):
        sources.load("branching:by_size", None, SETTINGS)

# SPDX-License-Identifier: Apache-2.0
"""Models of timm, by a stand-in for the library where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import nn

from onnxpress.contracts.errors import InputError, MissingDependency
from onnxpress.exporters import ExportSettings, sources
from onnxpress.exporters.timm_source import is_timm_folder


class Net(nn.Module):
    """As far as needed what timm's models are: a classifier by name, or features without one."""

    pretrained_cfg = {"input_size": (3, 8, 8), "classifier": "fc"}  # noqa: RUF012

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.conv(x).mean((2, 3)))
        return result


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    library: Any = ModuleType("timm")

    def create_model(name: str, *, pretrained: bool, exportable: bool, **arguments: Any) -> nn.Module:
        assert exportable
        if pretrained:
            raise OSError("no network")
        return Net(**arguments)

    library.is_model = lambda name: name == "tinynet"
    library.list_models = lambda: ["tinynet", "othernet"]
    library.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", library)
    return library  # type: ignore[return-value]


def weights(path: Path, classes: int = 3) -> Path:
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(Net(classes).state_dict(), path)
    return path


def folder_of_timm(folder: Path, **config: Any) -> Path:
    weights(folder / "model.safetensors")
    settings = {"architecture": "tinynet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 10, 12]}, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def refusal(source: str) -> str:
    with pytest.raises(InputError) as caught:
        sources.load_reference(source, None, ExportSettings())
    return f"{caught.value} {caught.value.next_step}"


@pytest.mark.usefixtures("timm")
class TestStandIn:
    def test_a_folder(self, tmp_path: Path) -> None:
        folder = folder_of_timm(tmp_path / "net", label_names=["cat", "dog", "eel"], model_args={"num_classes": 3})
        exported = sources.load(str(folder))
        [images], [logits] = exported.signature.inputs, exported.signature.outputs
        assert (images.name, images.shape) == ("pixel_values", ("batch", 3, 10, 12))
        assert (logits.name, logits.shape) == ("logits", ("batch", 3))
        assert set(exported.model.graph.initializers) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
        assert exported.id2label == {0: "cat", 1: "dog", 2: "eel"}
        assert list(exported.processor_files) == ["config.json"]
        assert (exported.source.kind, exported.source.name, exported.source.architecture) == ("timm", "net", "Net")
        feeds = {"pixel_values": np.random.default_rng(0).standard_normal((3, 3, 10, 12)).astype(np.float32)}
        got = tiny_models.run(tiny_models.session(exported, tmp_path), feeds)
        assert exported.reference is not None
        np.testing.assert_allclose(got["logits"], exported.reference.run(feeds)["logits"], atol=1e-6)

    def test_a_name_with_weights(self, tmp_path: Path) -> None:
        file = weights(tmp_path / "mine.safetensors", classes=7)
        reference = sources.load_reference(f"timm:tinynet.in1k@{file}", None, ExportSettings())
        feeds = {"pixel_values": np.zeros((2, 3, 8, 8), np.float32)}
        assert reference.call(feeds)[0].shape == (2, 7)
        assert sources.form_of(f"timm:tinynet@{file}")[0] == "timm"

    def test_the_manifest_holds_no_path(self, tmp_path: Path) -> None:
        exported = sources.load(f"timm:tinynet@{weights(tmp_path / 'm.safetensors', classes=0)}")
        assert exported.source.name == "timm:tinynet@m.safetensors"
        assert [spec.name for spec in exported.signature.outputs] == ["features"]

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("timm:tinnet", "timm has no model 'tinnet' Did you mean 'tinynet'?"),
            ("timm:tinynet", "timm has no weights for 'tinynet' here, and cannot fetch them (OSError) Fetch them once"),
            ("timm:tinynet@no.safetensors", "no such file of weights: no.safetensors"),
            ("timm:tinynet@bad.safetensors", "bad.safetensors is no readable .safetensors file"),
            ("timm:tinynet@other.safetensors", "other.safetensors does not fit timm's tinynet: "),
        ],
    )
    def test_refusals(self, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("bad.safetensors").write_bytes(b"nothing")
        save_file({"other": torch.ones(2)}, "other.safetensors")
        assert said in refusal(source)

    def test_a_task_is_for_others(self) -> None:
        with pytest.raises(InputError, match="--task fill-mask needs a transformers source"):
            sources.load("timm:tinynet", task="fill-mask")


def test_what_a_timm_folder_is(tmp_path: Path) -> None:
    assert is_timm_folder(folder_of_timm(tmp_path / "a"))
    assert not is_timm_folder(folder_of_timm(tmp_path / "b", model_type="bert"))
    assert not is_timm_folder(folder_of_timm(tmp_path / "c", architecture=["BertModel"]))
    (tmp_path / "c" / "config.json").write_text("[")
    assert not is_timm_folder(tmp_path / "c")
    assert not is_timm_folder(tmp_path / "nowhere")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for source in (f"timm:tinynet@{weights(tmp_path / 'm.safetensors')}", str(folder_of_timm(tmp_path / "net"))):
        with pytest.raises(MissingDependency, match="timm is not installed") as caught:
            sources.load(source)
        assert (caught.value.exit_code, caught.value.next_step) == (5, "pip install timm")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_the_library_itself(tmp_path: Path) -> None:
    import timm as library  # type: ignore[import-not-found]

    model = library.create_model("test_resnet", pretrained=False, num_classes=5)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    exported = sources.load(f"timm:test_resnet@{tmp_path / 'm.safetensors'}")
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal((3, 3, 160, 160)).astype(np.float32)}
    got = tiny_models.run(tiny_models.session(exported, tmp_path), feeds)
    assert exported.reference is not None
    np.testing.assert_allclose(got["logits"], exported.reference.run(feeds)["logits"], atol=1e-5)

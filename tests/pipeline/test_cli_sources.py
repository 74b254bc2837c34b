# SPDX-License-Identifier: Apache-2.0
"""Sources other than transformers folders and `.onnx` files, through the command line: exit code and exact line."""

from __future__ import annotations

import json
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from .conftest import Run
from .samples import FAST


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.ts, net.pt2, a.npz, b.npz, weights.pt."""
    folder = tmp_path_factory.mktemp("files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Net().eval()).save(str(folder / "net.ts"))
    shapes = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(
        torch.export.export(Net().eval(), (torch.randn(2, 8),), dynamic_shapes=shapes), folder / "net.pt2"
    )
    for name, batch in (("a", 2), ("b", 5)):
        np.savez(folder / f"{name}.npz", x=np.ones((batch, 8), np.float32))
    torch.save({"w": torch.ones(2)}, folder / "weights.pt")
    return folder


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


@pytest.mark.usefixtures("unprobed", "here")
def test_a_script_is_pressed_and_its_bundle_holds_no_path(onnxpress: Run, files: Path, tmp_path: Path) -> None:
    inputs = [word for name in ("a", "b") for word in ("--inputs", files / f"{name}.npz")]
    words = ["press", "net.ts", *inputs, "--recipe", "fp32", *FAST, "-o", tmp_path / "out"]
    result = onnxpress(*words)
    assert result.code == 0, result.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert manifest["source"]["kind"] == "torchscript"
    assert [row["case"] for row in manifest["parity_cases"]] == ["call 1, 2x8", "call 2, 5x8"]
    recipe = (tmp_path / "out" / "recipe.yaml").read_text("utf-8")
    assert "a.npz" in recipe
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or str(files).encode() not in file.read_bytes(), file.name


@pytest.mark.usefixtures("here")
def test_a_program_is_exported_and_validated(onnxpress: Run, tmp_path: Path) -> None:
    result = onnxpress("export", "net.pt2", "-o", tmp_path / "net.onnx", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["signature"]["inputs"][0]["shape"] == ["batch", 8]
    assert onnxpress("validate", "net.pt2", tmp_path / "net.onnx", "--gate", "cosine >= 0.9999").code == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        (2, ["net.ts"], "net.ts is a TorchScript archive, which does not say how large its inputs are: "
         "forward(x: Tensor). Add --inputs FILE.npz with an example array for each"),
        (2, ["net.ts", "--inputs", "c.npz"], "no such file of example inputs: c.npz. Check the path."),
        (2, ["net.pt2", "--inputs", "a.npz"], "--inputs is for TorchScript archives, and net.pt2 is none. Leave"),
        (2, ["weights.pt"], "weights.pt would have to be unpickled, which can run any code, and holds no arch"),
        (2, ["net.ts", "--inputs", "a.npz", "--set", "export.submodule=liner"],
         "net.ts has no submodule 'liner'. Did you mean 'linear'?"),
        (2, ["net.pt2", "--task", "fill-mask"], "--task fill-mask needs a transformers source. Leave --task out."),
        (2, ["net.ts", "--set", "export.dynamic_axes={x: {0: 7}}"], "fp32: export.dynamic_axes.x.0: Input should be a"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(onnxpress: Run, tmp_path: Path, code: int, words: list[str], line: str) -> None:
    result = onnxpress("export", *words, "-o", tmp_path / "out.onnx")
    assert (result.code, result.out) == (code, "")
    assert result.error.startswith(f"onnxpress: {line}")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("here")
def test_a_truncated_program(onnxpress: Run, files: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes((files / "net.pt2").read_bytes()[:-50])
    result = onnxpress("export", tmp_path / "cut.pt2", "-o", tmp_path / "out.onnx")
    assert result.code == 2
    assert result.error.startswith("onnxpress: cut.pt2 is cut short or damaged: ")
    assert result.error.endswith("Copy or save the file again.")


@pytest.mark.usefixtures("here")
def test_a_program_with_an_operator_of_somebody_s(onnxpress: Run, files: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(files / "net.pt2") as old, zipfile.ZipFile(tmp_path / "net.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(
                name, old.read(name).replace(b"torch.ops.aten.linear.default", b"torch.ops.mylib.linear.default")
            )
    result = onnxpress("export", tmp_path / "net.pt2", "-o", tmp_path / "out.onnx")
    assert (result.code, result.error) == (
        4,
        "onnxpress: net.pt2 calls 'mylib::linear', which is no operator that ONNX could have. "
        "Rewrite the model with PyTorch's own operators and export it again.",
    )


def test_a_library_that_is_not_installed(onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = onnxpress("export", "timm:resnet18", "-o", tmp_path / "out.onnx")
    assert result.code == 5
    assert result.error.startswith("onnxpress: timm is not installed (")
    assert result.error.endswith("pip install timm")


def test_own_code_needs_its_flag(onnxpress: Run, tmp_path: Path) -> None:
    config = {"model_type": "counting", "architectures": ["Counting"], "auto_map": {
        "AutoConfig": "counting.CountingConfig", "AutoModelForMaskedLM": "counting.Counting"}}  # fmt: skip
    folder = tmp_path / "counting"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "counting.py").write_text("raise RuntimeError('it ran')")
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    result = onnxpress("export", folder, "-o", tmp_path / "out.onnx")
    assert (result.code, result.error) == (
        2,
        "onnxpress: counting needs the Python code in its folder to load. "
        "Read that code, then add --trust-remote-code; or pass a package.module:factory of your own.",
    )


@pytest.mark.parametrize(
    ("source", "folder"),
    [("net.pt2", "net-fp32"), ("a/b.ts", "b-fp32"), ("timm:resnet18.a1_in1k", "timm.resnet18.a1_in1k-fp32"),
     ("timm:resnet18@here/w.safetensors", "timm.resnet18-fp32")],
)  # fmt: skip
def test_the_default_folder(source: str, folder: str) -> None:
    from onnxpress.pipeline.cli import _name_of

    assert _name_of(source, "fp32") == folder

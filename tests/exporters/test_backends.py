# SPDX-License-Identifier: Apache-2.0
"""Every backend, the same promise: names, sizes, weights stored once, and PyTorch's numbers at any size."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
import torch
from branching import BySize, Flat
from torch import nn

from onnxpress.contracts.errors import ExportError, InputError, MissingDependency
from onnxpress.exporters import patched
from onnxpress.exporters.backends import BACKENDS, chosen, export_with, is_available
from onnxpress.exporters.graph_file import write
from onnxpress.runtime.session import Session


class Text(nn.Module):
    """Tied weights, a mask, a reshape that depends on two free sizes, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.norm(self.embedding(ids))
        heads = hidden.reshape(*ids.shape, 2, 3).transpose(1, 2)
        scores = torch.matmul(heads, heads.transpose(2, 3)).masked_fill(mask[:, None, None] == 0, -1e4)
        mixed = torch.matmul(scores.softmax(-1), heads).transpose(1, 2).reshape(*ids.shape, 6)
        return self.head(mixed), mixed.mean(1)


AXES = {name: {0: "batch", 1: "sequence"} for name in ("ids", "mask")}


def feeds(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 + 1 :] = 0
    return {"ids": torch.randint(0, 9, (batch, length), generator=generator), "mask": mask}


def agrees(model: ir.Model, module: nn.Module, cases: list[Mapping[str, torch.Tensor]], folder: Path) -> None:
    write(model, folder / "model.onnx")
    session = Session(folder / "model.onnx", threads=1)
    for case in cases:
        with torch.no_grad():
            wanted = module(*case.values())
        got = session.run({name: tensor.numpy() for name, tensor in case.items()})
        for tensor, array in zip(wanted, got.values(), strict=True):
            np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_promise(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not is_available(name):
        pytest.skip(f"{name} is not installed")
    module = Text().eval()
    inputs, outputs = feeds(2, 5), ["logits", "pooled"]
    model = export_with(name, module, inputs, output_names=outputs, dynamic_axes=AXES, opset=20)
    graph = model.graph
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["ids", "mask", "logits", "pooled"]
    assert [str(v.shape) for v in (*graph.inputs, *graph.outputs)] == [
        "[batch,sequence]",
        "[batch,sequence]",
        "[batch,sequence,9]",
        "[batch,6]",
    ]
    named = {str(v.name) for v in graph.initializers.values() if v.const_value is not None and v.const_value.size > 5}
    assert named == {"embedding.weight", "norm.weight", "norm.bias", "head.bias"}
    assert model.opset_imports[""] == 20
    assert model.producer_name == "onnxpress"
    assert not any(node.metadata_props or node.doc_string for node in graph.all_nodes())
    agrees(model, module, [feeds(2, 5), feeds(1, 1), feeds(3, 8)], tmp_path)
    assert capfd.readouterr() == ("", "")


class TestTransformers:
    def test_the_workarounds_are_in_force_and_taken_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`torch.where` with a bool and an int is one of the places that transformers mends."""
        pytest.importorskip("transformers.exporters")
        shared = importlib.import_module("transformers.exporters.utils")
        before = torch.where
        seen = []

        class Looks(nn.Module):
            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
                seen.append(torch.where is before)
                return (torch.where(x > 0, x, -x),)

        inputs, axes = {"x": torch.randn(2, 4)}, {"x": {0: "batch"}}
        model = export_with("transformers", Looks(), inputs, output_names=["y"], dynamic_axes=axes, opset=20)
        assert not seen[0]
        assert torch.where is before
        assert [str(v.shape) for v in model.graph.outputs] == ["[batch,4]"]
        assert any(path == "torch" and name == "where" for path, name, _ in shared._PATCHES["onnx"])

    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("exporter_onnx", "_ONNX_TRANSLATION_TABLE"),
            ("exporter_onnx", "apply_onnx_ir_fixes"),
            ("utils", "apply_patches"),
            ("utils", "apply_fx_node_fixes"),
            ("exporter_dynamo", "reset_model_state"),
        ],
    )
    def test_a_version_without_them(self, file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers.exporters")
        assert is_available("transformers")
        monkeypatch.delattr(importlib.import_module(f"transformers.exporters.{file}"), name)
        self.refused(name)

    def test_a_version_from_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in [m for m in sys.modules if m.startswith("transformers.exporters")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "transformers.exporters", ModuleType("transformers.exporters"))
        self.refused("not a package")

    def refused(self, reason: str) -> None:
        assert not patched.available()
        with pytest.raises(MissingDependency, match=f"finds no workarounds for ONNX in transformers .*{reason}") as it:
            export_with("transformers", nn.ReLU(), {"x": torch.randn(2)}, output_names=["y"], dynamic_axes={}, opset=20)
        assert it.value.next_step == 'pip install "transformers>=5.13,<6"'


class TestChoice:
    def test_auto_means_the_default_here(self) -> None:
        assert chosen("auto") == "dynamo"
        assert [chosen(name) for name in BACKENDS] == list(BACKENDS)

    @pytest.mark.parametrize("name", ["optimum", "onnx"])
    def test_no_backend_of_modules(self, name: str) -> None:
        with pytest.raises(InputError, match=f"backend '{name}' does not export single modules") as caught:
            export_with(name, nn.ReLU(), {}, output_names=[], dynamic_axes={}, opset=20)
        assert "dynamo, transformers, torchscript" in caught.value.next_step

    def test_an_error_says_whose_it_is(self) -> None:
        inputs, axes = {"x": torch.randn(2, 4)}, {"x": {0: "batch"}}
        with pytest.raises(ExportError) as caught:
            export_with("dynamo", Flat(BySize()), inputs, output_names=["y"], dynamic_axes=axes, opset=20)
        assert caught.value.backend == "dynamo"
        assert caught.value.branches

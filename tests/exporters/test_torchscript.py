# SPDX-License-Identifier: Apache-2.0
"""The older exporter: names, sizes and weights as from every backend, and no path that was not taken is lost."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from branching import ByConstant, BySize, ByValue, Flat, Unscriptable
from torch import nn

from onnxpress.contracts.errors import ExportError
from onnxpress.exporters.graph_file import write
from onnxpress.exporters.torchscript import export_module
from onnxpress.runtime.session import Session

BATCH = {"x": {0: "batch"}}


def export(module: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None, opset: int = 20) -> ir.Model:
    inputs = inputs or {"x": torch.randn(2, 4)}
    return export_module(
        Flat(module.eval()), inputs, output_names=["y"], dynamic_axes=BATCH, opset=opset, strip_prefix="module."
    )


def agrees(model: ir.Model, module: nn.Module, folder: Path, *inputs: torch.Tensor) -> None:
    write(model, folder / "model.onnx")
    session = Session(folder / "model.onnx", threads=1)
    for x in inputs:
        with torch.no_grad():
            wanted = module(x).numpy()
        np.testing.assert_allclose(session.run({"x": x.numpy()})["y"], wanted, rtol=1e-5, atol=1e-6)


def steps(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


class TestGraph:
    def test_weights_keep_their_names_and_are_not_folded(self, tmp_path: Path) -> None:
        module = nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(10, 3)).eval()
        module[1].running_mean += torch.arange(5)
        model = export(module, {"x": torch.randn(2, 3, 4)})
        assert {"0.weight", "0.bias", "1.running_mean", "3.weight", "3.bias"} <= set(model.graph.initializers)
        assert [str(v.shape) for v in (*model.graph.inputs, *model.graph.outputs)] == ["[batch,3,4]", "[batch,3]"]
        assert "BatchNormalization" in steps(model)
        agrees(model, module, tmp_path, torch.randn(1, 3, 4), torch.randn(5, 3, 4))

    def test_weights_are_the_modules_own_memory(self) -> None:
        module = nn.Linear(4, 3)
        weight = export(module).graph.initializers["weight"].const_value
        assert weight is not None
        assert weight.numpy().ctypes.data == module.weight.data_ptr()

    def test_sizes_of_a_recurrent_layer_are_free(self, tmp_path: Path) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(3, 5, batch_first=True)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden: torch.Tensor = self.lstm(x)[0]
                return hidden

        module = Last().eval()
        axes = {"x": {0: "batch", 1: "time"}}
        model = export_module(
            Flat(module), {"x": torch.randn(2, 4, 3)}, output_names=["y"], dynamic_axes=axes, opset=18
        )
        assert str(model.graph.outputs[0].shape) == "[batch,time,5]"
        agrees(model, module, tmp_path, torch.randn(1, 9, 3), torch.randn(3, 1, 3))

    @pytest.mark.parametrize("opset", [18, 20, 23])
    def test_opset_is_honoured(self, opset: int, tmp_path: Path) -> None:
        module = nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).eval()
        model = export(module, opset=opset)
        assert model.opset_imports[""] == opset
        agrees(model, module, tmp_path, torch.randn(3, 4))

    def test_silence(self, capfd: pytest.CaptureFixture[str]) -> None:
        """torch prints the graph from C++ when an operator has no translation, past Python's streams."""

        class Spectrum(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.fft.rfft(x).abs()

        with pytest.raises(ExportError, match="operator 'aten::fft_rfft'") as caught:
            export(Spectrum())
        assert caught.value.next_step.startswith("Rewrite the operator")
        export(nn.Linear(4, 4))
        assert capfd.readouterr() == ("", "")


class TestBranches:
    @pytest.mark.parametrize("wrap", [lambda m: m, torch.jit.script], ids=["module", "script"])
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_by_value(self, wrap: type[nn.Module], tmp_path: Path) -> None:
        module = ByValue().eval()
        model = export(wrap(module))
        assert steps(model).count("If") == 1
        assert set(model.graph.initializers) == {"linear.weight", "linear.bias", "scale"}
        agrees(model, module, tmp_path, torch.ones(3, 4), -torch.ones(3, 4))

    def test_by_size(self, tmp_path: Path) -> None:
        model = export(BySize())
        assert "If" in steps(model)
        agrees(model, BySize(), tmp_path, torch.randn(3, 4), torch.randn(51, 4))

    def test_by_a_constant_is_one_path(self, tmp_path: Path) -> None:
        model = export(ByConstant())
        assert "If" not in steps(model)
        agrees(model, ByConstant(), tmp_path, torch.randn(3, 4))

    @pytest.mark.parametrize(
        ("inner", "message"),
        [
            (ByValue(), r"reads values of its inputs in Python \(branching.py line \d+, in forward\)"),
            (BySize(), "takes another path at batch = 68"),
        ],
    )
    def test_what_cannot_be_scripted_is_refused(self, inner: nn.Module, message: str) -> None:
        with pytest.raises(ExportError, match=message) as caught:
            export(Unscriptable(inner))
        assert caught.value.next_step

    def test_a_script_in_code_that_branches_itself(self) -> None:
        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.script = torch.jit.script(nn.ReLU())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                result: torch.Tensor = self.script(x)
                return result if x.sum() > 0 else -result

        with pytest.warns(DeprecationWarning, match="torch.jit.script"):
            module = Around()
        with pytest.raises(ExportError, match=r"the code around the script takes its path in Python"):
            export(module)

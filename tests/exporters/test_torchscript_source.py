# SPDX-License-Identifier: Apache-2.0
"""TorchScript archives: told from pickles, exported on the user's arrays, with their branches and without guessing."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import ExportSettings, sources
from onnxpress.pipeline.inputs import comparison_cases
from onnxpress.pipeline.recipe import load_recipe

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
SILERO = ASSETS / "silero_vad" / "silero_vad.jit"


class Net(nn.Module):
    """Takes a branch by the values of its input, which a trace could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(
        self, x: torch.Tensor, rate: int, weights: list[torch.Tensor], bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x) * rate + weights[0] + weights[1]
        if bias is not None:
            y = y + bias
        if bool(x.sum() > 0):
            y = y * 2
        return y, y.sum(1)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x, 1, [x[:, :3], x[:, :3]])[0]


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module.eval()).save(str(path))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return script(Net(), tmp_path_factory.mktemp("scripts") / "net.pt")


def arrays(path: Path, batch: int = 2, **more: Any) -> str:
    rng = np.random.default_rng(batch)

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    given = {"x": floats(batch, 4), "rate": np.array(3), "weights_0": floats(batch, 3), "weights_1": floats(3), **more}
    np.savez(path, **{name: value for name, value in given.items() if value is not None})
    return str(path)


class TestExport:
    def test_a_branch_on_values(self, archive: Path, tmp_path: Path) -> None:
        inputs = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz", 5)
        exported = sources.load(str(archive), settings=ExportSettings(inputs=inputs))
        assert [(s.name, s.shape) for s in exported.signature.inputs] == [
            ("x", ("batch", 4)), ("weights_0", ("batch", 3)), ("weights_1", (3,)),
        ]  # fmt: skip
        assert [s.name for s in exported.signature.outputs] == ["output_0", "output_1"]
        assert {"linear.weight", "linear.bias"} <= set(exported.model.graph.initializers)
        assert "If" in {node.op_type for node in exported.model.graph.all_nodes()}
        assert (exported.source.kind, exported.source.architecture) == ("torchscript", "Net")
        assert exported.export_details["backend"] == "torchscript"
        runner = tiny_models.session(exported, tmp_path)
        cases = comparison_cases(exported, None)
        assert [case.feeds["x"].shape[0] for case in cases] == [2, 5]
        for feeds in [case.feeds | {"x": sign * abs(case.feeds["x"])} for case in cases for sign in (1, -1)]:
            assert exported.reference is not None
            wanted, got = exported.reference.run(feeds), tiny_models.run(runner, feeds)
            for name in wanted:
                np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5)

    def test_axes_that_are_asked_for(self, archive: Path, tmp_path: Path) -> None:
        axes = {"x": {0: "rows"}, "weights_0": {0: "rows"}}
        settings = ExportSettings(inputs=(arrays(tmp_path / "a.npz"),), dynamic_axes=axes)
        exported = sources.load(str(archive), settings=settings)
        assert exported.signature.inputs[0].shape == ("rows", 4)
        assert exported.signature.inputs[2].shape == (3,)

    def test_a_part_of_an_archive(self, tmp_path: Path) -> None:
        path = script(Outer(), tmp_path / "outer.ts")
        settings = ExportSettings(submodule="inner", inputs=(arrays(tmp_path / "a.npz"),), dynamic_axes={})
        reference = sources.load_reference(str(path), None, settings)
        assert reference.input_names == ("x", "weights_0", "weights_1")
        with pytest.raises(InputError, match="no submodule 'iner'") as caught:
            sources.load(str(path), settings=settings.model_copy(update={"submodule": "iner"}))
        assert caught.value.next_step == "Did you mean 'inner'?"

    def test_a_recipe_keeps_the_files_names_and_no_folder(self, tmp_path: Path) -> None:
        recipe = load_recipe("fp32", [f'export.inputs=["{tmp_path}/a.npz"]'])
        assert recipe.export.inputs == (f"{tmp_path}/a.npz",)
        assert recipe.to_json()["export"]["inputs"] == ["a.npz"]
        assert str(tmp_path) not in recipe.to_yaml()
        again = ExportSettings.model_validate_json(recipe.export.model_dump_json(context={"paths": True}))
        assert again.inputs == (f"{tmp_path}/a.npz",)


class TestRefusals:
    def refusal(self, archive: Path, *inputs: str) -> str:
        with pytest.raises(InputError) as caught:
            sources.load(str(archive), settings=ExportSettings(inputs=inputs))
        assert caught.value.next_step
        return f"{caught.value} {caught.value.next_step}"

    def test_without_inputs(self, archive: Path) -> None:
        said = self.refusal(archive)
        assert "does not say how large its inputs are: forward(x: Tensor, rate: int, weights: List[Tensor]" in said
        assert "Add --inputs FILE.npz" in said

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"x": None}, "has no array 'x' for forward("),
            ({"biass": np.ones(3)}, "'biass' is no argument of forward Did you mean 'bias'?"),
            ({"rate": np.ones(3)}, "forward wants 'rate' as int, which an array of shape [3] cannot be"),
            ({"x": np.array(["a"])}, "'x' holds <U1"),
            ({"x": np.ones((2, 4), np.complex64)}, "'x' holds complex64"),
            (
                {"x": np.ones((2, 5), np.float32), "weights_1": np.ones((2, 3))},
                "calling the module fails: RuntimeError",
            ),
            ({}, "axis 0 of 'weights_1' has size 3, where 'batch' is 2 Say what varies"),
            ({"x": np.array([None, {}])}, "a.npz is no .npz of plain arrays"),
        ],
    )
    def test_arrays_that_do_not_fit(self, archive: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
        assert said in self.refusal(archive, arrays(tmp_path / "a.npz", **more))

    def test_files_that_are_none(self, archive: Path, tmp_path: Path) -> None:
        assert "no such file of example inputs" in self.refusal(archive, str(tmp_path / "c.npz"))
        (tmp_path / "d.npz").write_bytes(b"nothing")
        assert "d.npz is no .npz of plain arrays" in self.refusal(archive, str(tmp_path / "d.npz"))
        files = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz", rate=np.array(4))
        assert "b.npz and a.npz differ in more than the sizes of tensors" in self.refusal(archive, *files)

    def test_code_that_writes_files(self, tmp_path: Path) -> None:
        class Writer(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                torch.save(x, "trace")
                return x

        path = script(Writer(), tmp_path / "writer.pt")
        assert "its code calls save, which writes or maps files" in self.refusal(path)

    def test_a_pickle_of_the_same_suffix(self, tmp_path: Path) -> None:
        torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
        assert "would have to be unpickled, which can run any code" in self.refusal(tmp_path / "weights.pt")

    def test_a_truncated_archive(self, archive: Path, tmp_path: Path) -> None:
        (tmp_path / "cut.pt").write_bytes(archive.read_bytes()[:-30])
        assert "cut.pt is cut short or damaged" in self.refusal(tmp_path / "cut.pt")


@pytest.mark.skipif(not SILERO.is_file(), reason=f"no Silero VAD under {ASSETS}")
def test_a_published_archive(tmp_path: Path) -> None:
    """silero_vad: a convolution, an LSTM cell and branches; its outer module keeps the state to itself."""
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        frames = rng.standard_normal((batch, 576)).astype(np.float32)
        np.savez(tmp_path / f"{batch}.npz", x=frames, state=np.zeros((2, batch, 128), np.float32))
    files = tuple(str(tmp_path / f"{batch}.npz") for batch in (1, 3))
    exported = sources.load(str(SILERO), settings=ExportSettings(submodule="_model", inputs=files))
    assert [(s.name, s.shape) for s in exported.signature.inputs] == [
        ("x", ("batch", 576)),
        ("state", (2, "batch", 128)),
    ]
    assert exported.source.architecture == "VADRNNJIT"
    runner = tiny_models.session(exported, tmp_path)
    for feeds in exported.known_inputs:
        assert exported.reference is not None
        wanted, got = exported.reference.run(feeds), tiny_models.run(runner, feeds)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""`.pt2` files: exported with their own sizes, and refused where loading them would run anything."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

from onnxpress.contracts.errors import ExportError, InputError, OnnxpressError
from onnxpress.exporters import ExportSettings, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.program_source import original_program
from onnxpress.pipeline.inputs import comparison_cases

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.shift = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: torch.Tensor, options: dict[str, Any], *, mask: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.linear(x) * self.scale + self.shift
        assert mask is not None
        return {"y": y * mask, "blocks": [x.sum(-1), options["a"] + 1]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    batch, time = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("time", max=64)
    arguments = torch.randn(2, 5, 4), {"a": torch.randn(2, 3), "k": 2}
    shapes = {"x": {0: batch, 1: time}, "options": {"a": {0: batch}, "k": None}, "mask": {0: batch, 1: time}}
    program = torch.export.export(Net().eval(), arguments, {"mask": torch.ones(2, 5, 1)}, dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def exported(saved: Path) -> ExportedModel:
    return sources.load(str(saved))


Change = Callable[[str, bytes], bytes | None]


def rewritten(saved: Path, target: Path, change: Change, **more: bytes) -> Path:
    """The same archive with changed members, or without those for which the change is None."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        for full in old.namelist():
            content = change(full.partition("/")[2], old.read(full))
            if content is not None:
                new.writestr(full, content)
        for name, content in more.items():
            new.writestr(f"net/{name}", content)
    return target


def replaced(member: str, old: str, new: str) -> Change:
    def change(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return change


class TestExport:
    def test_names_and_sizes(self, exported: ExportedModel) -> None:
        assert [(s.name, s.shape) for s in exported.signature.inputs] == [
            ("x", ("batch", "x_1", 4)), ("options_a", ("batch", 3)), ("mask", ("batch", "x_1", 1)),
        ]  # fmt: skip
        assert [s.name for s in exported.signature.outputs] == ["y", "blocks_0", "blocks_1"]
        assert {"linear.weight", "linear.bias", "scale", "shift"} <= set(exported.model.graph.initializers)
        assert (exported.source.kind, exported.source.name, exported.source.architecture) == (
            "program",
            "net.pt2",
            "Net",
        )
        assert exported.source.parameters == 15

    def test_it_computes_what_the_program_computes_at_sizes_that_it_takes(
        self, exported: ExportedModel, tmp_path: Path
    ) -> None:
        runner = tiny_models.session(exported, tmp_path)
        cases = comparison_cases(exported, None)
        batches = {case.feeds["x"].shape[0] for case in cases}
        assert len(cases) >= 3
        assert min(batches) == 2, "1 is below the program's own limit"
        for case in cases:
            assert exported.reference is not None
            wanted, got = exported.reference.run(case.feeds), tiny_models.run(runner, case.feeds)
            assert list(wanted) == list(got)
            for name in wanted:
                np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6)

    def test_a_size_that_is_a_multiple_of_a_symbol(self, tmp_path: Path) -> None:
        class Blocks(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.reshape(-1, 8).sum(1)

        shapes = {"x": {0: 8 * torch.export.Dim("blocks")}}
        torch.export.save(
            torch.export.export(Blocks(), (torch.randn(16),), dynamic_shapes=shapes), tmp_path / "blocks.pt2"
        )
        original = original_program(tmp_path / "blocks.pt2")
        assert original.axes == {"x": {0: "batch"}}
        assert sorted(len(call["x"]) for call in original.calls) == [16, 24, 56]

    def test_the_reference_alone(self, saved: Path) -> None:
        reference = sources.load_reference(str(saved), None, ExportSettings())
        assert reference.input_names == ("x", "options_a", "mask")

    def test_a_program_under_another_suffix(self, saved: Path, tmp_path: Path) -> None:
        other = tmp_path / "net.pt"
        other.write_bytes(saved.read_bytes())
        assert sources.form_of(str(other)) == ("program", other)


class Payload:
    """What an attacker saves: unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class TestRefusals:
    def refusal(self, path: Path, kind: type[OnnxpressError] = InputError) -> str:
        with pytest.raises(kind) as caught:
            original_program(path)
        assert caught.value.next_step
        return str(caught.value)

    @pytest.mark.parametrize(
        ("member", "old", "new", "said"),
        [
            (WEIGHTS, '"use_pickle": false', '"use_pickle": true', "'linear.weight' would have to be unpickled"),
            (WEIGHTS, '"weight_0"', '"custom_obj_0"', "'linear.weight' would have to be unpickled"),
            (MODEL, '"major": 8', '"major": 9', "in format 9"),
            (MODEL, "integer=True)", "integer=print(1))", "which is more than arithmetic"),
            (MODEL, "Symbol('", "eval('", "which is more than arithmetic"),
            (MODEL, "Symbol('", "().__class__.x('", "which is more than arithmetic"),
            (MODEL, "builtins.dict", "default_factory_module", "imported by name"),
            (MODEL, '"graph_module"', '"graph_modul"', "cannot be loaded"),
            (WEIGHTS, "{", "", "is no JSON"),
        ],
    )
    def test_text_that_torch_would_run_or_cannot_read(
        self, saved: Path, tmp_path: Path, member: str, old: str, new: str, said: str
    ) -> None:
        assert said in self.refusal(rewritten(saved, tmp_path / "net.pt2", replaced(member, old, new)))

    @pytest.mark.parametrize(
        "target",
        ["torch.os.system", "torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.load",
         "torch.ops.load_library.__call__", "_operator.methodcaller", "torch.ops.mylib.secret.default"],
    )  # fmt: skip
    def test_operators_that_are_none(self, saved: Path, tmp_path: Path, target: str) -> None:
        path = rewritten(saved, tmp_path / "net.pt2", replaced(MODEL, "torch.ops.aten.linear.default", target))
        assert "no operator that ONNX could have" in self.refusal(path, ExportError)
        if "mylib" in target:
            assert "'mylib::secret'" in self.refusal(path, ExportError)

    def test_a_pickle_among_the_example_inputs_runs_nothing(self, saved: Path, tmp_path: Path) -> None:
        stream, trace = io.BytesIO(), tmp_path / "it-ran"
        torch.save({"x": Payload(trace)}, stream)
        path = rewritten(
            saved, tmp_path / "net.pt2", lambda n, c: stream.getvalue() if n.startswith("data/sample_inputs") else c
        )
        assert "example inputs would have to be unpickled" in self.refusal(path)
        assert not trace.exists()

    def test_weights_in_the_old_pickled_form(self, saved: Path, tmp_path: Path) -> None:
        path = rewritten(saved, tmp_path / "net.pt2", lambda n, c: c, **{"data/weights/model.pt": b"x"})
        assert "would have to be unpickled" in self.refusal(path)

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
    def test_a_truncated_file(self, saved: Path, tmp_path: Path, share: float) -> None:
        path, whole = tmp_path / "cut.pt2", saved.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"cut.pt2 is cut short or damaged"):
            sources.load(str(path))

    def test_a_flipped_byte(self, saved: Path, tmp_path: Path) -> None:
        whole = bytearray(saved.read_bytes())
        with zipfile.ZipFile(saved) as archive:
            place = next(info for info in archive.infolist() if info.filename.endswith(MODEL))
        whole[place.header_offset + 300] ^= 255
        (tmp_path / "net.pt2").write_bytes(whole)
        assert "models/model.json is damaged" in self.refusal(tmp_path / "net.pt2")

    def test_a_zip_that_is_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "photos.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("cat.jpg", b"meow")
        with pytest.raises(InputError, match=r"photos.pt2 is no source that onnxpress knows"):
            sources.load(str(path))

    def test_what_torch_2_7_wrote(self, tmp_path: Path) -> None:
        path = tmp_path / "old.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("serialized_exported_program.json", json.dumps({}))
        with pytest.raises(InputError, match=r"in the form of torch 2.7 and older"):
            sources.load(str(path))

    def test_what_aotinductor_compiled(self, tmp_path: Path) -> None:
        path = tmp_path / "compiled.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("compiled/archive_format", b"pt2")
            archive.writestr("compiled/data/aotinductor/model/model.so", b"\x7fELF")
        with pytest.raises(InputError, match=r"compiled.pt2 holds no program") as caught:
            sources.load(str(path))
        assert "machine code" in caught.value.next_step

    def test_options_that_are_for_others(self, saved: Path) -> None:
        with pytest.raises(InputError, match=r"--inputs is for TorchScript archives, and net.pt2 is none"):
            sources.load(str(saved), settings=ExportSettings(inputs=("x.npz",)))
        with pytest.raises(InputError, match="needs a transformers source"):
            sources.load(str(saved), task="fill-mask")

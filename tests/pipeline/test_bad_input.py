# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: each its exit code and one line, nothing on standard output, the target as it was."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from .conftest import Run
from .samples import FAST, HERE, NET, model_from, write_net

Kept = Callable[[], None]


@pytest.fixture
def refused(onnxpress: Run, bundle: Path, kept: Kept) -> Callable[..., str]:
    """Press onto a bundle that is there; return the error line after checking everything that must hold."""

    def check(code: int, *words: object, force: bool = True) -> str:
        options = ["--force"] if force else []
        result = onnxpress("press", *words, *FAST, *options, "-o", bundle)
        assert (result.code, result.out) == (code, ""), result.err
        kept()
        as_json = onnxpress("press", *words, *FAST, *options, "-o", bundle, "--json")
        told = json.loads(as_json.out)
        assert (as_json.code, told["exit_code"]) == (code, code)
        line = f"onnxpress: {told['error']}"
        assert result.error == as_json.error == f"{line}{'' if line[-1] in '.?' else '.'} {told['next_step']}".rstrip()
        kept()
        return result.error.removeprefix("onnxpress: ")

    return check


def test_a_missing_file(refused: Callable[..., str], net: Path) -> None:
    wrong = net.with_name("nte.onnx")
    assert refused(2, wrong) == f"no such file or folder: {wrong}. Did you mean '{net}'?"


def test_a_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert refused(2, tmp_path / "a" / "model").startswith("no such file or folder: ")


def test_a_hub_id_that_is_not_cached(refused: Callable[..., str]) -> None:
    line = refused(2, "nobody/no-such-model")
    assert line.startswith("no folder 'nobody/no-such-model' here, and the hub model 'nobody/no-such-model' is neither")


def test_a_file_that_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "notes.docx"
    path.write_text("hello")
    assert refused(2, path).startswith("notes.docx is no source that onnxpress knows. Pass a transformers folder")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_weights_that_would_have_to_be_unpickled(refused: Callable[..., str], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x80\x04cos\nsystem\n")
    line = refused(2, path)
    assert line.startswith(f"weights{suffix} would have to be unpickled, which can run any code")


class _Payload:
    """What an attacker puts into a checkpoint: unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_transformers_folder_with_a_pickle_in_it_runs_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    import torch

    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 99, "hidden_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"weights": _Payload(trace)}, folder / "pytorch_model.bin")
    line = refused(2, folder, "--task", "feature-extraction")
    assert line.startswith("model: its weights file would have to be unpickled, which can run any code")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("task", "next_step"),
    [("text-clasification", "Did you mean 'text-classification'?"), ("xyz", "Known: audio-classification, audio-")],
)
def test_a_wrong_task(refused: Callable[..., str], net: Path, task: str, next_step: str) -> None:
    assert refused(2, net, "--task", task).startswith(f"unknown task '{task}'. {next_step}")


def test_a_task_for_a_factory(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    assert refused(2, "factories:mlp", "--task", "fill-mask").startswith("--task fill-mask needs a transformers source")


@pytest.mark.parametrize(
    ("source", "line"),
    [("factoris:mlp", "cannot import factoris."),
     ("factories:mpl", "factories has no function 'mpl'. Did you mean 'mlp'?"),
     ("factories:broken", "factories:broken raises ValueError: no weights today (factories.py line ")],
)  # fmt: skip
def test_a_wrong_factory(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, source: str, line: str) -> None:
    monkeypatch.chdir(HERE)
    assert refused(2, source).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\npases: []\n", "r.yaml: unknown key 'pases'. Did you mean 'passes'?"),
        ("name: x\nexport: {opset: new}\n", "r.yaml: export.opset: Input should be a valid integer"),
        ("name: x\npasses: [{pass: quantise}]\n", "unknown pass 'quantise'. "),
        ("name: x\n\tpasses: []\n", "r.yaml line 2: not valid YAML. Check the indentation."),
        ("- clean\n", "r.yaml: a recipe is a mapping of keys. Start from: onnxpress recipes fp32"),
    ],
)
def test_a_wrong_recipe(refused: Callable[..., str], net: Path, tmp_path: Path, text: str, line: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, "utf-8")
    assert refused(2, net, "--recipe", recipe).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--recipe", "int8"], "unknown recipe 'int8'. Did you mean 'int8-dynamic'?"),
        (["--set", "export.opset"], "--set export.opset: not of the form key=value. Example: --set export.opset=20"),
        (["--set", "passes.9.x=1"], "--set passes.9: no such pass. This recipe has 0 (clean), 1 (fuse), 2 (quantize_"),
        (["--set", "export.opset=3"], "int8-dynamic: export.opset: Input should be greater than or equal to 18 (got"),
        (["--gate", "size_rato >= 2"], "gate 'size_rato >= 2': unknown name. Did you mean 'size_ratio'?"),
        (["--gate", "smaller"], "gate 'smaller' is not of the form name <= number. Example: size_ratio >= 3.8"),
        (["--gate", "accuracy_drop <= 1"],
         "gate 'accuracy_drop <= 1' needs evaluation data. Add --evaluation DATA, with labels."),
        (["--provider", "cdua"], "unknown provider 'cdua'. Did you mean 'cuda'?"),
        (["--evaluation", ""], "is a folder. Point at a data file in it."),
        (["--evaluation", "nothing.tsv"], "no such data file: nothing.tsv."),
    ],
)  # fmt: skip
def test_a_wrong_option(refused: Callable[..., str], net: Path, words: list[str], line: str) -> None:
    assert line in refused(2, net, *words)


def test_a_provider_that_is_not_installed(refused: Callable[..., str], net: Path) -> None:
    line = refused(5, net, "--provider", "coreml")
    assert line.startswith("the installed onnxruntime has no provider 'coreml' (it has: cpu")
    assert line.endswith("Install a build of onnxruntime with the CoreMLExecutionProvider.")


def test_onnxruntime_that_is_not_installed(
    refused: Callable[..., str], net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused(5, net) == 'onnxruntime is not installed. pip install "onnxpress[cpu]"'


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("dev.tsv", "good\t1\nbad\n", "dev.tsv line 2"),
        ("dev.csv", 'text,label\n"good,1\n', "dev.csv line "),
        ("dev.jsonl", '{"text": "good", "label": 1}\n{"text": \n', "dev.jsonl line 2"),
        ("dev.conll", "EU B-ORG\nrejects\n", "dev.conll line 2"),
    ],
)
def test_a_broken_row_of_the_data(
    refused: Callable[..., str], net: Path, tmp_path: Path, name: str, text: str, line: str
) -> None:
    data = tmp_path / name
    data.write_text(text, "utf-8")
    assert refused(2, net, "--evaluation", data).startswith(line)


def test_data_of_another_kind(refused: Callable[..., str], net: Path, tmp_path: Path) -> None:
    data = tmp_path / "dev.tsv"
    data.write_text("good\t1\nbad\t0\n", "utf-8")
    assert refused(2, net, "--evaluation", data).startswith("net.onnx has no tokenizer, so it cannot read texts.")
    np.savez(tmp_path / "dev.npz", y=np.zeros((4, 64), np.float32))
    assert refused(2, net, "--evaluation", tmp_path / "dev.npz").startswith("dev.npz has no array for input 'x'.")


def test_calibration_data_that_nothing_needs(refused: Callable[..., str], net: Path, arrays: Path) -> None:
    assert refused(2, net, "--calibration", arrays).startswith("recipe int8-dynamic needs no calibration data.")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x08\x0a" + b"\xff" * 40])
def test_a_corrupt_onnx_file(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    line = refused(2, path)
    assert line.startswith("bad.onnx ")
    assert str(tmp_path) not in line


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_onnx_file(refused: Callable[..., str], net: Path, tmp_path: Path, share: float) -> None:
    whole = net.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refused(2, path).startswith("cut.onnx ")


def test_an_invalid_graph(refused: Callable[..., str], tmp_path: Path) -> None:
    path = write_net(tmp_path / "odd.onnx", NET.replace("Relu(biased)", "Rleu(biased)"))
    assert refused(2, path).startswith("odd.onnx is not valid ONNX: No Op registered for Rleu")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "a/../../secret.bin"])
def test_external_data_outside_the_folder(refused: Callable[..., str], tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64 * 128 * 4))
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (folder / "link.bin").symlink_to(secret)
    _with_external_data(folder / "net.onnx", location)
    line = refused(2, folder / "net.onnx")
    assert line.startswith("net.onnx: the external data of 'w1' points outside the model's folder.")


@pytest.mark.parametrize(("size", "told"), [(None, "is missing"), (100, "is cut short at 'w1'")])
def test_external_data_that_is_not_all_there(
    refused: Callable[..., str], tmp_path: Path, size: int | None, told: str
) -> None:
    _with_external_data(tmp_path / "net.onnx", "net.bin")
    if size is not None:
        (tmp_path / "net.bin").write_bytes(bytes(size))
    assert refused(2, tmp_path / "net.onnx").startswith(f"net.onnx: its external data file net.bin {told}.")


def _with_external_data(path: Path, location: str) -> None:
    proto = ir.to_proto(model_from(NET))
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w1")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(proto.SerializeToString())


def test_a_pass_with_nothing_to_do(refused: Callable[..., str], tmp_path: Path) -> None:
    small = write_net(
        tmp_path / "small.onnx",
        """<ir_version: 10, opset_import: ["": 20]> net (float[batch, 4] x, float[4, 4] w1) => (float[batch, 4] y)
        { y = MatMul(x, w1) }""",
    )
    line = refused(2, small)
    assert line.startswith("pass quantize_dynamic has nothing to do on this model (1 candidates")
    assert line.endswith("Leave the pass out of the recipe.")


def test_a_target_that_exists(refused: Callable[..., str], net: Path) -> None:
    assert refused(2, net, force=False) == "bundle exists. Add --force to replace it, or choose another -o."


@pytest.mark.parametrize("force", [True, False])
def test_a_target_that_is_no_bundle_is_never_replaced(onnxpress: Run, net: Path, tmp_path: Path, force: bool) -> None:
    photos = tmp_path / "target" / "photos"
    photos.mkdir(parents=True)
    (photos / "cat.jpg").write_bytes(b"meow")
    file = tmp_path / "target" / "thesis.doc"
    file.write_bytes(b"years of work")
    for target, content in ((photos, photos / "cat.jpg"), (file, file)):
        before = content.read_bytes()
        result = onnxpress("press", net, "-o", target, *(["--force"] if force else []))
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            f"onnxpress: {target.name} exists and is not a bundle; it will not be replaced. Choose another -o.\n"
        )
        assert content.read_bytes() == before
    assert sorted(p.name for p in photos.parent.iterdir()) == ["photos", "thesis.doc"]


@pytest.mark.usefixtures("unprobed")
def test_an_empty_folder_may_be_filled(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    (tmp_path / "target" / "out").mkdir(parents=True)
    assert onnxpress("press", net, *FAST, "-o", tmp_path / "target" / "out").code == 0
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["file/out", "x" * 300])
def test_a_target_that_cannot_be_written(onnxpress: Run, net: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = onnxpress("press", net, "-o", tmp_path / target)
    assert (result.code, result.out) == (2, "")
    assert result.error.startswith(f"onnxpress: cannot write {Path(target).name}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_made_for_a_press_that_fails_are_gone_again(onnxpress: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nothing")
    assert onnxpress("press", bad, "-o", tmp_path / "new" / "deep" / "out").code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["bad.onnx"]

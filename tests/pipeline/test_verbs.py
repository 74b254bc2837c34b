# SPDX-License-Identifier: Apache-2.0
"""export, validate, benchmark and inspect: one stage each, on files and on bundles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from onnxpress.exporters import graph_file
from onnxpress.runtime.session import Session

from .conftest import Run, snapshot
from .samples import FAST, HERE, write_net


def test_export_writes_a_proven_graph_and_nothing_else(
    onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    out = tmp_path / "models" / "mlp.onnx"
    result = onnxpress("export", "factories:mlp", "-o", out)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out}: {out.stat().st_size:,} bytes, ")
    assert [p.name for p in out.parent.iterdir()] == ["mlp.onnx"]
    answer = Session(out).run({"input": np.ones((3, 64), np.float32)})
    assert answer["output"].shape == (3, 8)
    before = out.read_bytes()
    again = onnxpress("export", "factories:mlp", "-o", out)
    assert (again.code, again.out, again.err) == (2, "", f"onnxpress: {out} exists. Add --force to replace it.\n")
    shown = json.loads(onnxpress("export", "factories:mlp", "-o", out, "--force", "--json").out)
    assert (shown["file"], shown["bytes"], shown["task"]) == (str(out), len(before), "generic")
    assert out.read_bytes() == before


def test_export_of_an_onnx_file_cleans_it(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    assert onnxpress("export", net, "-o", tmp_path / "clean.onnx").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["clean.onnx"]


@pytest.mark.parametrize(
    ("target", "line"),
    [("net.pb", "does not end in .onnx. Name the file, such as -o model.onnx."),
     ("file/net.onnx", "File exists. Choose another -o.")],
)  # fmt: skip
def test_export_to_a_wrong_place(onnxpress: Run, net: Path, tmp_path: Path, target: str, line: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    result = onnxpress("export", net, "-o", tmp_path / target)
    assert (result.code, result.out) == (2, "")
    assert result.error.endswith(line)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_export_that_fails_leaves_the_old_file(
    onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "net.onnx"
    out.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    result = onnxpress("export", net, "-o", out, "--force")
    assert (result.code, result.out) == (2, "")
    assert "No space left on device" in result.error
    assert snapshot(tmp_path) == {"net.onnx": b"old"}


def test_a_wrong_export_is_refused_with_4(
    onnxpress: Run, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = graph_file.read(write_net(tmp_path / "other.onnx", seed=1))
    monkeypatch.setattr("onnxpress.pipeline.exporting.run_pass", lambda settings, model: (other, None))
    result = onnxpress("export", net, "-o", tmp_path / "out.onnx")
    assert (result.code, result.out) == (4, "")
    assert result.error.startswith("onnxpress: the exported graph is wrong: output 'logits' departs")
    assert [p.name for p in tmp_path.iterdir()] == ["other.onnx"]


def test_validate_a_bundle_against_its_source(onnxpress: Run, net: Path, finished: Path, arrays: Path) -> None:
    words = [
        "validate",
        net,
        finished,
        "--evaluation",
        arrays,
        "--gate",
        "cosine >= 0.99",
        "--gate",
        "accuracy_drop<=9",
    ]
    result = onnxpress(*words)
    assert result.code == 0, result.err
    for word in ("logits", "data, batch 4", "accuracy", "cosine >= 0.99", "passed"):
        assert word in result.out
    shown = json.loads(onnxpress(*words, "--json").out)
    assert [gate["passed"] for gate in shown["gates"]] == [True, True]
    assert shown["metrics"]["accuracy"]["reference"] == 75.0
    manifest = json.loads((finished / "manifest.json").read_text("utf-8"))
    assert shown["parity"] == manifest["parity"]


def test_validate_a_file_against_itself_is_exact(onnxpress: Run, net: Path) -> None:
    shown = json.loads(onnxpress("validate", net, net, "--gate", "sqnr_db >= 100", "--json").out)
    assert shown["parity"]["logits"]["max_abs_error"] == 0.0
    assert shown["gates"] == [{"expression": "sqnr_db >= 100", "value": None, "passed": True}]


def test_validate_refuses_with_3_and_the_measured_value(onnxpress: Run, net: Path, finished: Path) -> None:
    result = onnxpress("validate", net, finished, "--gate", "sqnr_db >= 100")
    assert result.code == 3
    assert result.error.startswith("onnxpress: refused: sqnr_db >= 100 (measured 4")
    told = json.loads(onnxpress("validate", net, finished, "--gate", "sqnr_db >= 100", "--json").out)
    assert (told["exit_code"], told["gates"][0]["passed"]) == (3, False)


@pytest.mark.parametrize(
    ("gate", "line"),
    [("size_ratio >= 2", "gate 'size_ratio >= 2' is not measured by validate. Use: onnxpress press."),
     ("f1 >= 2", "gate 'f1 >= 2' needs evaluation data. Add --evaluation DATA, with labels."),
     ("cosin >= 2", "gate 'cosin >= 2': unknown name. Did you mean 'cosine'?")],
)  # fmt: skip
def test_validate_refuses_gates_that_it_cannot_judge(onnxpress: Run, net: Path, gate: str, line: str) -> None:
    result = onnxpress("validate", net, net, "--gate", gate)
    assert (result.code, result.out, result.error) == (2, "", f"onnxpress: {line}")


def test_validate_models_that_do_not_belong_together(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> o (float[batch, 64] x) => (float[batch, 64] logits)
    { logits = Relu(x) }"""
    result = onnxpress("validate", net, write_net(tmp_path / "other.onnx", text))
    assert (result.code, result.out) == (4, "")
    assert "output 'logits' is [2, 8] in the original and shape [2, 64] in the graph" in result.error


def test_benchmark_with_and_without_a_reference(onnxpress: Run, net: Path, finished: Path) -> None:
    shown = json.loads(onnxpress("benchmark", finished, "--reference", net, *FAST, "--json").out)
    assert [(row["variant"], row["setting"]) for row in shown["benchmarks"]] == [
        ("onnx-original", "latency"), ("net", "latency"), ("onnx-original", "throughput"), ("net", "throughput"),
    ]  # fmt: skip
    alone = json.loads(onnxpress("benchmark", net, *FAST, "--json").out)
    assert [row["variant"] for row in alone["benchmarks"]] == ["net.onnx", "net.onnx"]
    table = onnxpress("benchmark", finished, *FAST)
    assert table.code == 0
    assert "p95 ms" in table.out


def test_benchmark_a_factory_s_export_against_pytorch(
    onnxpress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    text = """<ir_version: 10, opset_import: ["": 20]>
    mlp (float[batch, 64] input, float[64, 8] w1) => (float[batch, 8] output) { output = MatMul(input, w1) }"""
    model = write_net(tmp_path / "mlp.onnx", text)
    rows = json.loads(onnxpress("benchmark", model, "--reference", "factories:mlp", *FAST, "--json").out)["benchmarks"]
    assert [row["variant"] for row in rows] == ["pytorch-fp32", "mlp.onnx"] * 2
    assert rows[0]["ratio_to_reference"]["median"] == 1.0


def test_inspect_names_what_could_be_pruned_and_what_stays(onnxpress: Run, net: Path) -> None:
    shown = json.loads(onnxpress("inspect", net, "--groups", "--json").out)
    (group,) = shown["groups"]
    assert (group["name"], group["kind"], group["units"]) == ("w1:1", "neurons", 128)
    assert [cut["tensor"] for cut in group["cuts"]] == ["w1", "b1", "w2"]
    assert {"name": "w2:1", "units": 8, "node": "logits", "reason": "it is an output of the graph"} in shown["stays"]
    text = onnxpress("inspect", net, "--groups").out
    assert "Groups that can be pruned" in text
    assert "it is an output of the graph (logits)" in text
    assert "groups" not in json.loads(onnxpress("inspect", net, "--json").out)


def test_inspect_a_file_and_a_bundle(onnxpress: Run, net: Path, finished: Path) -> None:
    shown = json.loads(onnxpress("inspect", net, "--json").out)
    assert (shown["file"], shown["bytes"], shown["nodes"]) == ("net.onnx", net.stat().st_size, 5)
    assert shown["operators"] == {"Add": 2, "MatMul": 2, "Relu": 1}
    assert shown["weight_bytes"] == {"float": 4 * (64 * 128 + 128 + 128 * 8 + 8)}
    assert shown["largest_weights"][0] == {"name": "w1", "bytes": 32768, "type": "float 64x128"}
    text = onnxpress("inspect", finished)
    assert text.code == 0
    assert text.out.startswith("model_quantized.onnx  0.0 MB, 9 nodes, opset ai.onnx 20")
    assert "int8 64x128" in text.out


def test_a_path_that_is_not_there(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.onnx"
    for words in (["inspect", absent], ["benchmark", absent], ["validate", net, absent]):
        result = onnxpress(*words)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"onnxpress: no such file or bundle: {absent}. Check the path.\n"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"variants": {"x": {"path": "../../secret.onnx"}}}, "its model lies outside the bundle. Press it again."),
        ({"variants": {"x": {"path": "/etc/hostname"}}}, "its model lies outside the bundle. Press it again."),
        ({"variants": {}}, "its manifest names no model. Press it again."),
        ({"variants": None}, "its manifest names no model. Press it again."),
        ({"variants": {"x": {}}}, "its manifest names no model. Press it again."),
        ({"variants": ["x"]}, "its manifest names no model. Press it again."),
        ({"schema_version": 9}, "Install the version of onnxpress that wrote the bundle."),
    ],
)
def test_a_manifest_that_was_made_to_mislead(
    onnxpress: Run, bundle: Path, change: dict[str, object], line: str
) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    result = onnxpress("inspect", bundle)
    assert (result.code, result.out) == (2, "")
    assert result.error.endswith(line)


def test_a_folder_without_a_manifest(onnxpress: Run, tmp_path: Path) -> None:
    result = onnxpress("inspect", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert result.error.startswith("onnxpress: manifest.json is missing from the bundle")


def test_a_corrupt_candidate(onnxpress: Run, net: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(net.read_bytes()[:1000])
    for words in (["inspect", cut], ["benchmark", cut], ["validate", net, cut]):
        result = onnxpress(*words)
        assert (result.code, result.out) == (2, "")
        assert result.error.startswith("onnxpress: cut.onnx ")

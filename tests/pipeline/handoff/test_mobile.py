# SPDX-License-Identifier: Apache-2.0
"""The .ort files really run, in Python and in C++; what is said of Swift and Kotlin is that they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff import mobile
from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN, MissingTool
from onnxpress.pipeline.handoff.mobile import TARGETS, ort_files
from onnxpress.pipeline.handoff.mobile.partitions import Partition, partitions_of, table
from onnxpress.runtime.opened import Bundle

from ..samples import model_from
from .native_cases import ODD, Built, build, need, need_onnxruntime, outputs_of

SWIFT, KOTLIN = TARGETS["swift"], TARGETS["kotlin"]


@pytest.fixture(scope="module")
def swift(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """With the C++ consumer where it can be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "Debug")
        return build(SWIFT, decoder_bundle, tmp_path_factory.mktemp("swift"))


def test_both_ort_files_of_a_language_model_run(swift: Built, decoder_bundle: Bundle) -> None:
    check = swift.check
    assert (check.status, check.done) == (NOT_RUN, ("generated",)), check.reason
    assert "nothing was compiled" in check.reason
    assert set(check.worst) == set(outputs_of(decoder_bundle))
    assert max(check.from_python.values()) < 1e-4


def test_the_cpp_consumer_ran_them_too(swift: Built) -> None:
    need("cmake", "c++")
    need_onnxruntime()
    assert "so did the C++ consumer" in swift.check.reason


def test_nothing_tells_where_it_was_made(swift: Built) -> None:
    for path in swift.folder.rglob("*"):
        assert path.is_dir() or ODD.encode() not in path.read_bytes(), path.name


def test_operators_and_types_are_listed(swift: Built) -> None:
    for name in ort_files.CONFIGS:
        lines = (swift.folder / "ort" / name).read_text("utf-8").splitlines()
        assert lines[0].startswith("# ")
        assert all(line.count(";") >= 2 for line in lines[1:])
        assert any(line.startswith("ai.onnx;") and "MatMul" in line for line in lines)
        assert '"inputs"' in "".join(lines), "types are listed as well"


def test_android_has_the_same_model_and_a_test(
    vision_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_headers(scratch: Path) -> Path:
        raise MissingTool("no headers here")

    monkeypatch.setattr(mobile, "runtime_root", no_headers)
    built = build(KOTLIN, vision_bundle, tmp_path)
    assert built.check.status == NOT_RUN
    assert "(the C++ consumer did not: no headers here)" in built.check.reason
    names = {path.relative_to(built.folder).as_posix() for path in built.folder.rglob("*") if path.is_file()}
    assert {
        "src/main/assets/model.ort",
        "ort/model.with_runtime_opt.ort",
        "src/main/kotlin/model/Model.kt",
        "src/test/kotlin/model/GoldenTest.kt",
        "golden/tensors.txt",
        "text/preprocessor_config.json",
        "PARTITIONS.md",
    } <= names
    partitions = json.loads((built.folder / "partitions.json").read_text("utf-8"))["partitions"]
    assert len(partitions) == 6
    assert all(p["supported"] <= p["nodes"] and p["advice"] in ("yes", "maybe", "no") for p in partitions)
    (built.folder / "src" / "main" / "assets" / "model.ort").write_bytes(
        (built.folder / "ort" / "model.with_runtime_opt.ort").read_bytes()
    )
    monkeypatch.setattr(type(vision_bundle), "tolerance", lambda *_: -1.0)
    check = KOTLIN.check(vision_bundle, built.folder, built.scratch)
    assert check.status == FAILED
    assert "does not give the golden answers" in check.reason


CHAIN = """
<ir_version: 10, opset_import: ["": 20]>
chain (float[2, 64] x, float[64, 8] w1) => (float[2, 8] y)
{
    a = MatMul(x, w1)
    b = Relu(a)
    c = Hardmax(b)
    y = Add(c, b)
}
"""


def test_partitions_are_counted(tmp_path: Path) -> None:
    """Hardmax is known to none of them: the processor takes it, and what follows it is a second piece."""
    graph_file.write(model_from(CHAIN), tmp_path / "model.onnx")
    found = partitions_of(tmp_path / "model.onnx")
    assert len(found) == 6
    for partition in found:
        assert (partition.nodes, partition.supported, partition.partitions, partition.largest) == (4, 3, 2, 2)
        assert partition.unsupported == ("ai.onnx:Hardmax",)
    rows = table(found).splitlines()
    assert rows[2] == "| NNAPI | as they are | 3 of 4 | 2 | 2 | no | Hardmax |"
    assert len({row.count("|") for row in rows}) == 1


def test_a_partition_without_unknown_operators() -> None:
    whole = Partition("NNAPI", True, 3, 3, 1, 3, (), "yes")
    assert table([whole]).splitlines()[-1] == "| NNAPI | all fixed | 3 of 3 | 1 | 3 | yes | - |"


@pytest.mark.parametrize(
    ("target", "dtype"), [(SWIFT, "float16"), (SWIFT, "float64"), (KOTLIN, "uint32"), (KOTLIN, "uint64")]
)
def test_types_that_a_language_has_no_tensors_of(target: Any, dtype: str, text_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(text_bundle.folder, check=False)
    bundle.__dict__["signature"] = Signature((TensorSpec("n", dtype, ()),), ())
    with pytest.raises(InputError, match=f"'n' is {dtype}"):
        target.write(bundle, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_too_large_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    with pytest.raises(InputError, match="refuses the model"):
        ort_files.write_ort(model, tmp_path / "ort")
    monkeypatch.setattr(ort_files, "_LARGEST", 8)
    with pytest.raises(InputError, match="holds less than 2"):
        ort_files.write_ort(model, tmp_path / "ort")

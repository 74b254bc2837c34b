# SPDX-License-Identifier: Apache-2.0
"""The Java consumer is compiled; without ONNX Runtime's jar its check runs on a stand-in and claims nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN, PASSED, MissingTool, judge, run_tool
from onnxpress.pipeline.handoff.java import JAR, TARGETS, require_java_types
from onnxpress.runtime.opened import Bundle

from .native_cases import Built, build, changed, every_type, need, outputs_of

JAVA = TARGETS["java"]


@pytest.fixture(scope="module")
def built(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    need("javac", "java")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(JAR, raising=False)
        patch.setenv("JDK_JAVAC_OPTIONS", "-Xlint:all -Werror")
        return build(JAVA, decoder_bundle, tmp_path_factory.mktemp("java"))


def test_it_compiles_and_claims_no_more(built: Built) -> None:
    check = built.check
    assert (check.status, check.done) == (NOT_RUN, ("generated", "compiled")), check.reason
    assert JAR in check.reason
    assert "stand-in" in check.reason
    assert dict(check.worst) == {}


@pytest.mark.parametrize("change", [None, "answer", "line"])
def test_golden_samples_are_read_and_compared(built: Built, change: str | None, tmp_path: Path) -> None:
    outputs = every_type(tmp_path)
    if change == "answer":
        lines = (tmp_path / "golden" / "tensors.txt").read_text("utf-8").splitlines()
        offset = next(int(line.split()[4]) for line in lines if "reference out/a.b/float32" in line)
        numbers = tmp_path / "golden" / "tensors.bin"
        raw = bytearray(numbers.read_bytes())
        raw[offset : offset + 4] = b"\x00\x00\xc8\x42"  # 100.0
        numbers.write_bytes(raw)
    if change == "line":
        changed(tmp_path, lambda line: line.replace(" - 2 2 3", " - 2 2"))
    done = run_tool(["java", "-cp", built.scratch / "classes", "model.Replay"], tmp_path)
    check = judge(done, outputs, command="", stages=(), versions={})
    if change is None:
        assert check.status == PASSED, check.reason
        assert set(check.worst.values()) == {0.0} == set(check.from_python.values())
    elif change == "answer":
        assert (check.status, check.worst["out/a.b/float32"]) == (FAILED, 101.5)
    else:
        assert "golden/tensors.txt is damaged" in done.stderr


def test_a_jar_that_is_not_there(text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("javac")
    monkeypatch.setenv(JAR, str(tmp_path / "none.jar"))
    with pytest.raises(MissingTool, match="names no file"):
        JAVA.check(text_bundle, tmp_path, tmp_path)


def test_types_that_java_has_no_tensors_of(text_bundle: Bundle) -> None:
    require_java_types(text_bundle)
    bundle = Bundle(text_bundle.folder, check=False)
    bundle.__dict__["signature"] = Signature((TensorSpec("n", "uint32", ()),), ())
    with pytest.raises(InputError, match="'n' is uint32"):
        require_java_types(bundle)


def test_the_folder_is_a_gradle_project(built: Built, decoder_bundle: Bundle) -> None:
    names = {path.relative_to(built.folder).as_posix() for path in built.folder.rglob("*")}
    assert {"build.gradle.kts", "gradle.properties", "src/main/java/model/Example.java"} <= names
    assert not [name for name in names if "ai/onnxruntime" in name]
    assert outputs_of(decoder_bundle)[0] == "logits"

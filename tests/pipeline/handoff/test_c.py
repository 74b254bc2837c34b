# SPDX-License-Identifier: Apache-2.0
"""The C consumer is compiled with warnings as errors and sanitizers, and really runs: every kind of model and type."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.pipeline.handoff.base import FAILED, PASSED
from onnxpress.pipeline.handoff.c import TARGETS
from onnxpress.runtime.opened import Bundle

from .javascript import broken
from .native_cases import Built, build, changed, every_type, need, need_onnxruntime, outputs_of, sanitizers

C = TARGETS["c"]


@pytest.fixture(scope="module")
def built(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    need("cmake", "cc")
    need_onnxruntime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "Debug")
        patch.setenv("CFLAGS", f"-Werror -Wshadow {sanitizers('cc')}")
        return build(C, decoder_bundle, tmp_path_factory.mktemp("c"))


def test_a_language_model_is_run(built: Built, decoder_bundle: Bundle) -> None:
    check = built.check
    assert (check.status, check.done) == (PASSED, ("generated", "compiled", "run")), check.reason
    assert set(check.worst) == set(outputs_of(decoder_bundle))
    assert max(check.from_python.values()) < 1e-5


@pytest.mark.parametrize("name", ["text_bundle", "vision_bundle"])
def test_every_kind_of_model_is_run(
    name: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The image's example is the one that fills an array in a loop: it is compiled as well."""
    bundle: Bundle = request.getfixturevalue(name)
    if name == "vision_bundle":
        monkeypatch.setenv("CFLAGS", "-Werror")
        assert build(C, bundle, tmp_path).check.status == PASSED
        return
    C.write(bundle, tmp_path)
    check = built.run(tmp_path, outputs_of(bundle))
    assert check.status == PASSED, check.reason
    assert max(check.from_python.values()) < 1e-5


def test_every_type_passes_through(built: Built, tmp_path: Path) -> None:
    check = built.run(tmp_path, every_type(tmp_path))
    assert check.status == PASSED, check.reason
    assert set(check.worst.values()) == {0.0} == set(check.from_python.values())


def test_a_wrong_answer_fails(built: Built, text_bundle: Bundle, tmp_path: Path) -> None:
    C.write(text_bundle, tmp_path)
    broken(text_bundle, tmp_path, "logits")
    check = built.run(tmp_path, outputs_of(text_bundle))
    assert (check.status, check.worst["logits"] > 90) == (FAILED, True)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("input in/a.b/int32 int32", "input in/a.b/other int32", "input 'in/a.b/int32' is missing"),
        ("input in/a.b/int32 int32 ", "input in/a.b/int32 uint32 ", "'in/a.b/int32' has another type"),
        ("input in/a.b/int32 int32 ", "input in/a.b/int32 text ", "'in/a.b/int32' has another type"),
        (" - 2 2 3", " - 2 3 3", "has another type, shape or size"),
        (" - 2 2 3", " - 2 2", "golden/tensors.txt is damaged"),
        (" - 2 2 3", " - 9 2 3", "too many axes"),
    ],
)
def test_wrong_inputs_are_named(built: Built, tmp_path: Path, old: str, new: str, told: str) -> None:
    every_type(tmp_path)
    changed(tmp_path, lambda line: line.replace(old, new))
    code, message = built.told(tmp_path)
    assert code == 2
    assert told in message


def test_a_missing_model_is_said(built: Built, tmp_path: Path) -> None:
    code, message = built.told(tmp_path)
    assert code == 2
    assert "model.onnx" in message


def test_code_that_does_not_compile_fails_the_check(text_bundle: Bundle, tmp_path: Path) -> None:
    need("cmake", "cc")
    need_onnxruntime()
    (tmp_path / "handoff").mkdir()
    (tmp_path / "scratch").mkdir()
    C.write(text_bundle, tmp_path / "handoff")
    (tmp_path / "handoff" / "example.c").write_text("int main(void) { return nothing; }\n", "utf-8")
    check = C.check(text_bundle, tmp_path / "handoff", tmp_path / "scratch")
    assert (check.status, check.done) == (FAILED, ("generated",))
    assert check.reason.startswith("example.c:1:")

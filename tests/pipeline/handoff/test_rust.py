# SPDX-License-Identifier: Apache-2.0
"""The Rust consumer is compiled and really runs; its own unit tests pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.pipeline.handoff.base import FAILED, PASSED, run_tool
from onnxpress.pipeline.handoff.native import runtime_root
from onnxpress.pipeline.handoff.rust import TARGETS
from onnxpress.runtime.opened import Bundle

from .javascript import broken
from .native_cases import Built, build, changed, every_type, need, need_onnxruntime, outputs_of

RUST = TARGETS["rust"]
PROGRAM = "target/debug/check"


@pytest.fixture(scope="module")
def built(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    need("cargo", "cc", "ar")
    need_onnxruntime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUSTFLAGS", "-D warnings")
        return build(RUST, decoder_bundle, tmp_path_factory.mktemp("rust"))


def test_a_language_model_is_run(built: Built, decoder_bundle: Bundle) -> None:
    check = built.check
    assert (check.status, check.done) == (PASSED, ("generated", "compiled", "run")), check.reason
    assert set(check.worst) == set(outputs_of(decoder_bundle))
    assert max(check.from_python.values()) < 1e-5
    assert check.versions["cargo"][0].isdigit()


@pytest.mark.parametrize("name", ["text_bundle", "vision_bundle"])
def test_every_kind_of_model_is_run(name: str, built: Built, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    RUST.write(bundle, tmp_path)
    check = built.run(tmp_path, outputs_of(bundle), PROGRAM)
    assert check.status == PASSED, check.reason
    assert max(check.from_python.values()) < 1e-5


def test_every_type_passes_through(built: Built, tmp_path: Path) -> None:
    check = built.run(tmp_path, every_type(tmp_path), PROGRAM)
    assert check.status == PASSED, check.reason
    assert set(check.worst.values()) == {0.0} == set(check.from_python.values())


def test_a_wrong_answer_fails(built: Built, text_bundle: Bundle, tmp_path: Path) -> None:
    RUST.write(text_bundle, tmp_path)
    broken(text_bundle, tmp_path, "logits")
    check = built.run(tmp_path, outputs_of(text_bundle), PROGRAM)
    assert (check.status, check.worst["logits"] > 90) == (FAILED, True)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("input in/a.b/int32 int32", "input in/a.b/other int32", "input 'in/a.b/int32' is missing"),
        ("input in/a.b/int32 int32 ", "input in/a.b/int32 uint32 ", "'in/a.b/int32' has another type"),
        (" - 2 2 3", " - 2 3 3", "tensors.txt is damaged"),
    ],
)
def test_wrong_inputs_are_named(built: Built, tmp_path: Path, old: str, new: str, told: str) -> None:
    every_type(tmp_path)
    changed(tmp_path, lambda line: line.replace(old, new))
    code, message = built.told(tmp_path, PROGRAM)
    assert code == 1
    assert told in message


def test_its_own_tests_pass(built: Built) -> None:
    more = {
        "ONNXRUNTIME_ROOT": str(runtime_root(built.scratch)),
        "CARGO_TARGET_DIR": str(built.scratch / "target"),
        "RUSTFLAGS": "-D warnings",
    }
    done = run_tool(["cargo", "test", "--offline", "--locked", "--lib"], built.folder, more=more)
    assert done.returncode == 0, done.stderr
    assert "test result: ok. 5 passed" in done.stdout


def test_code_that_does_not_compile_fails_the_check(text_bundle: Bundle, tmp_path: Path) -> None:
    need("cargo", "cc", "ar")
    need_onnxruntime()
    (tmp_path / "handoff").mkdir()
    (tmp_path / "scratch").mkdir()
    RUST.write(text_bundle, tmp_path / "handoff")
    (tmp_path / "handoff" / "src" / "golden.rs").write_text("nothing!\n", "utf-8")
    check = RUST.check(text_bundle, tmp_path / "handoff", tmp_path / "scratch")
    assert (check.status, check.done) == (FAILED, ("generated",))
    assert check.reason.startswith("error")

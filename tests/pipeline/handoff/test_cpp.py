# SPDX-License-Identifier: Apache-2.0
"""The C++ consumer is compiled with warnings as errors and sanitizers, and really runs: every model and type."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.decoding import Decoding
from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.handoff import native
from onnxpress.pipeline.handoff.base import FAILED, PASSED, MissingTool
from onnxpress.pipeline.handoff.cpp import TARGETS
from onnxpress.pipeline.handoff.cpp.generation import decoding_of, greedy
from onnxpress.pipeline.handoff.example_inputs import ExampleInput, example_inputs, one_line
from onnxpress.pipeline.handoff.handing import target_named
from onnxpress.pipeline.handoff.model_files import lay_out
from onnxpress.runtime.opened import Bundle

from .javascript import broken, handed
from .native_cases import Built, build, changed, every_type, need, need_onnxruntime, outputs_of, sanitizers

CPP = TARGETS["cpp"]


@pytest.fixture(scope="module")
def built(decoder_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The language model's handoff; its check program runs any handoff."""
    need("cmake", "c++")
    need_onnxruntime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_BUILD_TYPE", "Debug")
        patch.setenv("CXXFLAGS", f"-Werror {sanitizers('c++')}")
        return build(CPP, decoder_bundle, tmp_path_factory.mktemp("cpp"))


def test_a_language_model_is_run_and_its_tokens_generated(built: Built, decoder_bundle: Bundle) -> None:
    check = built.check
    assert (check.status, check.done) == (PASSED, ("generated", "compiled", "run")), check.reason
    assert set(check.worst) == {*outputs_of(decoder_bundle), "generated_tokens"}
    assert check.from_python["generated_tokens"] == 0
    assert max(check.from_python.values()) < 1e-5
    assert check.versions["onnxruntime"].startswith("1.")
    assert "generate.cpp" in {path.name for path in built.folder.iterdir()}


@pytest.mark.parametrize("name", ["text_bundle", "vision_bundle"])
def test_every_kind_of_model_is_run(name: str, built: Built, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    CPP.write(bundle, tmp_path)
    check = built.run(tmp_path, outputs_of(bundle))
    assert check.status == PASSED, check.reason
    assert max(check.from_python.values()) < 1e-5
    assert not (tmp_path / "generate.cpp").exists()


def test_every_type_passes_through(built: Built, tmp_path: Path) -> None:
    check = built.run(tmp_path, every_type(tmp_path))
    assert check.status == PASSED, check.reason
    assert set(check.worst.values()) == {0.0} == set(check.from_python.values())


def test_a_wrong_answer_fails(built: Built, decoder_bundle: Bundle, tmp_path: Path) -> None:
    CPP.write(decoder_bundle, tmp_path)
    broken(decoder_bundle, tmp_path, "logits")
    check = built.run(tmp_path, outputs_of(decoder_bundle))
    assert check.status == FAILED
    assert check.worst["logits"] > 90
    tokens = tmp_path / "golden" / "generation.txt"
    words = tokens.read_text("utf-8").splitlines()
    tokens.write_text("\n".join([words[0], words[1] + " 5", *words[2:]]), "utf-8")
    generated = built.run(tmp_path, ["generated_tokens"], "build/generate")
    assert (generated.status, generated.worst["generated_tokens"]) == (FAILED, 1)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("input in/a.b/int32 int32", "input in/a.b/other int32", "input 'in/a.b/int32' is missing"),
        ("input in/a.b/int32 int32 ", "input in/a.b/int32 uint32 ", "is uint32 [2, 3]: the model wants int32 [?, 3]"),
        ("input in/a.b/int32 int32 ", "input in/a.b/int32 text ", "tensors of text are not handled here"),
        (" - 2 2 3", " - 2 3 3", "bytes do not fill a tensor of shape [3, 3]"),
        (" - 2 2 3", " - 2 2", "golden/tensors.txt is damaged"),
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


def test_greedy_tokens_are_those_without_a_cache(decoder_bundle: Bundle) -> None:
    decoding, session = decoding_of(decoder_bundle), decoder_bundle.session(threads=1)
    assert decoding is not None
    tokens = [5, 7, 11]
    answer = greedy(session, decoding, tokens, 6, [])
    for token in answer:
        outputs = session.run(decoding.feeds(np.array([tokens])))
        assert token == outputs["logits"][0, -1].argmax()
        tokens.append(token)
    assert greedy(session, decoding, [5, 7, 11], 6, [answer[1]]) == answer[: answer.index(answer[1]) + 1]


def test_only_a_language_model_with_a_cache_is_decoded(text_bundle: Bundle, decoder_bundle: Bundle) -> None:
    assert decoding_of(text_bundle) is None
    assert isinstance(decoding_of(decoder_bundle), Decoding)


def test_examples_are_one_row(vision_bundle: Bundle, decoder_bundle: Bundle) -> None:
    (image,) = example_inputs(vision_bundle)
    assert (image.shape, image.size, image.numbers, image.fill) == ((1, 3, 16, 16), 768, None, 0.5)
    by_name = {example.name: example for example in example_inputs(decoder_bundle)}
    assert by_name["input_ids"].shape[0] == 1
    assert by_name["input_ids"].listed().count(",") == by_name["input_ids"].size - 1
    assert by_name["past_key_values.0.key"].size == 0
    floats = ExampleInput("x", "float32", "[3]", (3,), 3, (1.0, 0.1, 1e-20), 0.5)
    assert floats.listed() == "1.0, 0.1, 1e-20"


def test_names_cannot_leave_their_comment_or_string(decoder_bundle: Bundle, tmp_path: Path) -> None:
    assert one_line("a\nint b;\u2028\t c") == "a int b; c"
    bundle = Bundle(decoder_bundle.folder, check=False)
    bundle.manifest["name"] = 'x\n#error "out"\r*/'
    bundle.manifest["signature"]["inputs"][0]["shape"] = ["batch\n#error", "sequence"]
    for target in (CPP, target_named("c"), target_named("rust"), target_named("java"), target_named("csharp")):
        folder = tmp_path / target.name
        folder.mkdir()
        target.write(bundle, folder)
        sources = [p for p in folder.rglob("*") if p.suffix in (".cpp", ".c", ".rs", ".java", ".cs")]
        lines = [line.strip() for path in sources for line in path.read_text("utf-8").splitlines()]
        assert not [line for line in lines if line.startswith("#error")]
        assert all(line.startswith("//") for line in lines if "out" in line and "#error" in line)


def test_headers_that_are_missing_or_too_new(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_PLACES", ())
    monkeypatch.delenv(native.INCLUDE, raising=False)
    with pytest.raises(MissingTool, match="headers of ONNX Runtime are not"):
        native.headers()
    report = handed(text_bundle, "cpp", tmp_path, check=True)
    assert (report["check"]["status"], report["check"]["done"]) == ("not run", ["generated"])
    assert native.INCLUDE in report["check"]["reason"]
    include = tmp_path / "include" / "onnxruntime"
    include.mkdir(parents=True)
    (include / native.HEADER).write_text("#define ORT_API_VERSION 999\n", "utf-8")
    monkeypatch.setenv(native.INCLUDE, str(include.parent))
    assert native.headers() == include
    with pytest.raises(MissingTool, match=r"headers are of ONNX Runtime 1\.999, newer than the library"):
        native.runtime_root(tmp_path)
    (include / native.HEADER).write_text("\n", "utf-8")
    with pytest.raises(MissingTool, match="does not say which version"):
        native.runtime_root(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda manifest: manifest.update(companions=[{"name": "encoder_model"}]), "models of one graph"),
        (lambda manifest: manifest["signature"]["inputs"][0].update(dtype="string"), "tensors of numbers only"),
        (lambda manifest: manifest["signature"]["outputs"][0].update(dtype="seq(...)"), "tensors of numbers only"),
    ],
)
def test_models_that_it_cannot_run_are_refused(text_bundle: Bundle, tmp_path: Path, change: Any, told: str) -> None:
    folder = Path(shutil.copytree(text_bundle.folder, tmp_path / "bundle"))
    bundle = Bundle(folder)
    change(bundle.manifest)
    with pytest.raises(InputError, match=told):
        lay_out(bundle, tmp_path / "handoff")

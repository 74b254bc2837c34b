# SPDX-License-Identifier: Apache-2.0
"""transformers.js really loads the layout: pipelines, tokenizer, image processor and `generate` answer as Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff.base import FAILED
from onnxpress.pipeline.handoff.handing import target_named
from onnxpress.pipeline.handoff.transformers_js import PACKAGES
from onnxpress.pipeline.handoff.transformers_js import layout as laid_out
from onnxpress.pipeline.handoff.transformers_js.expected import generation, image
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.session import Session

from ..samples import model_from
from .javascript import broken, handed, need_packages


class Like(Bundle):
    """A bundle with another manifest, configuration or signature than it has."""

    def __init__(self, other: Bundle, **changes: Any) -> None:
        super().__init__(other.folder)
        self.__dict__.update({"config": other.config, "signature": other.signature, **changes})


def _layout(folder: Path) -> Path:
    return folder / "handoff" / "model"


def test_every_pipeline_says_what_python_says(
    text_bundle: Bundle,
    vision_bundle: Bundle,
    decoder_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_packages(monkeypatch, PACKAGES)
    for bundle in (text_bundle, vision_bundle, decoder_bundle):
        check = handed(bundle, "transformers.js", tmp_path / bundle.task, check=True)["check"]
        assert check["status"] == "passed", check
        assert check["done"] == ["generated", "run"]
        assert max(check["from_python"].values()) < 1e-5
    assert json.loads((tmp_path / "text-generation/handoff/golden/generation.json").read_text("utf-8"))
    assert json.loads((tmp_path / "image-classification/handoff/golden/images.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("generation.json", lambda rows: rows[0]["tokens"].__setitem__(1, 7), "token 1 is"),
        ("generation.json", lambda rows: rows[0]["ids"].__setitem__(1, 7), "prompt"),
        ("texts.json", lambda rows: rows[-1]["ids"].__setitem__(0, 7), "token ids"),
    ],
)
def test_what_python_did_not_say_fails(
    file: str, change: Any, reason: str, decoder_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_packages(monkeypatch, PACKAGES)
    handed(decoder_bundle, "transformers.js", tmp_path)
    path = tmp_path / "handoff" / "golden" / file
    rows = json.loads(path.read_text("utf-8"))
    change(rows)
    path.write_text(json.dumps(rows), "utf-8")
    check = target_named("transformers.js").check(decoder_bundle, tmp_path / "handoff", tmp_path / "scratch")
    assert check.status == FAILED
    assert reason in check.reason


def test_wrong_scores_of_an_image_fail(vision_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_packages(monkeypatch, PACKAGES)
    handed(vision_bundle, "transformers.js", tmp_path)
    path = tmp_path / "handoff" / "golden" / "images.json"
    rows = json.loads(path.read_text("utf-8"))
    rows[0]["scores"].reverse()
    path.write_text(json.dumps(rows), "utf-8")
    broken(vision_bundle, tmp_path / "handoff", "logits")
    check = target_named("transformers.js").check(vision_bundle, tmp_path / "handoff", tmp_path / "scratch")
    assert check.status == FAILED
    assert check.worst["logits"] > 90


def test_the_layout_is_the_hubs(text_bundle: Bundle, tmp_path: Path) -> None:
    handed(text_bundle, "transformers.js", tmp_path)
    layout = _layout(tmp_path)
    assert (layout / "onnx" / "model_quantized.onnx").read_bytes() == text_bundle.model_file().read_bytes()
    config = json.loads((layout / "config.json").read_text("utf-8"))
    assert config.pop("transformers.js_config") == {"dtype": "q8"}
    assert config == text_bundle.config
    assert json.loads((layout / "tokenizer_config.json").read_text("utf-8"))["model_max_length"] == 40
    assert "{%" not in (tmp_path / "handoff" / "README.md").read_text("utf-8")


def test_a_decoders_cache_has_the_batch_that_transformers_js_knows(decoder_bundle: Bundle, tmp_path: Path) -> None:
    """And the graph is the same otherwise: it answers the same to the last bit."""
    handed(decoder_bundle, "transformers.js", tmp_path)
    file = _layout(tmp_path) / "onnx" / "model.onnx"
    shapes = {spec.name: spec.shape for spec in Session(file).signature.inputs}
    assert shapes["past_key_values.0.key"] == ("batch_size", 2, "past_sequence", 8)
    assert shapes["input_ids"] == ("batch_size", "sequence")
    inputs = dict(decoder_bundle.golden[0].inputs)
    ours, theirs = decoder_bundle.session().run(inputs), Session(file).run(inputs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_greedy_tokens_are_those_of_the_whole_sequence(decoder_bundle: Bundle) -> None:
    """What the check compares with, against a session that sees every token at once and no cache."""
    (row,) = generation(decoder_bundle)
    from onnxpress.contracts.decoding import Decoding

    decoding, ids = Decoding.of(decoder_bundle.signature), list(row["ids"])
    assert decoding is not None
    session = decoder_bundle.session(threads=1)
    for token, margin in zip(row["tokens"], row["margins"], strict=True):
        logits = session.run(decoding.feeds(np.asarray([ids])))["logits"][0, -1]
        assert int(logits.argmax()) == token
        assert np.diff(np.sort(logits)[-2:])[0] == pytest.approx(margin, abs=1e-4)
        ids.append(token)


def test_an_images_numbers_are_transformers_own(vision_bundle: Bundle, tmp_path: Path) -> None:
    import transformers

    (row,) = image(vision_bundle, tmp_path)
    pixels = np.frombuffer((tmp_path / row["file"]).read_bytes(), np.uint8).reshape(row["height"], row["width"], 3)
    processor = transformers.AutoImageProcessor.from_pretrained(vision_bundle.folder)
    wanted = processor(images=pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    np.testing.assert_allclose(np.asarray(row["pixels"]), wanted, atol=1e-6)


def test_weights_beside_the_graph_keep_a_name_that_it_finds(text_bundle: Bundle, tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["": 20]> g (float[batch, 64] x, float[64, 128] w1) => (float[batch, 128] y) '
    )
    graph_file.write(model_from(text + "{ y = MatMul(x, w1) }"), tmp_path / "model_odd.onnx", external_from=0)
    assert laid_out._data_type(tmp_path / "model_odd.onnx", {}) == "fp32"
    assert laid_out._data_type(tmp_path / "model_q4.onnx", {}) == "q4"
    assert laid_out._data_type(tmp_path / "model_q4.onnx", {"q4": "x"}) == "fp32"
    for name in ("model_odd.onnx", "model.onnx"):
        (tmp_path / name[:-5]).mkdir()
        assert laid_out._place(text_bundle, tmp_path / "model_odd.onnx", tmp_path / name[:-5] / name)
        assert {file.name for file in (tmp_path / name[:-5]).iterdir()} == {name, f"{name}_data"}
        x = np.ones((1, 64), np.float32)
        (answer,) = Session(tmp_path / name[:-5] / name).run({"x": x}).values()
        (wanted,) = Session(tmp_path / "model_odd.onnx").run({"x": x}).values()
        np.testing.assert_array_equal(answer, wanted)


def test_what_it_cannot_read_is_refused_with_the_reason(
    text_bundle: Bundle, vision_bundle: Bundle, decoder_bundle: Bundle
) -> None:
    def refused(bundle: Bundle) -> str:
        with pytest.raises(InputError) as raised:
            laid_out.require_what_it_reads(bundle)
        assert raised.value.next_step
        return raised.value.message

    assert "config.json" in refused(Like(text_bundle, config={}))
    assert "encoder-decoder" in refused(Like(text_bundle, manifest={**text_bundle.manifest, "companions": [{}]}))
    text_inputs = Signature(text_bundle.signature.inputs, vision_bundle.signature.outputs)
    assert "tokenizer.json" in refused(Like(vision_bundle, signature=text_inputs))
    assert "preprocessor_config.json" in refused(Like(text_bundle, signature=vision_bundle.signature))
    state = TensorSpec("past_recurrent.0", "float32", ("batch", 2, 4)), TensorSpec("present_recurrent.0", "float32", ())
    inputs, outputs = decoder_bundle.signature.inputs, decoder_bundle.signature.outputs
    stateful = Signature((*inputs, state[0]), (*outputs, state[1]))
    assert "past_recurrent.0" in refused(Like(decoder_bundle, signature=stateful))
    laid_out.require_what_it_reads(
        Like(decoder_bundle, signature=stateful, config={**decoder_bundle.config, "model_type": "qwen3_next"})
    )


def test_embeddings_are_not_given_to_a_pipeline_that_would_pool_them_again(text_bundle: Bundle) -> None:
    def pipeline(task: str, output: str) -> str | None:
        signature = Signature(text_bundle.signature.inputs, (TensorSpec(output, "float32", ("batch", 32)),))
        return laid_out.pipeline_for(
            Like(text_bundle, manifest={**text_bundle.manifest, "task": task}, signature=signature)
        )

    assert pipeline("feature-extraction", "sentence_embedding") is None
    assert pipeline("feature-extraction", "last_hidden_state") == "feature-extraction"
    assert pipeline("semantic-segmentation", "logits") == "image-segmentation"
    assert pipeline("generic", "y") is None


def test_a_processor_of_transformers_5_is_written_as_the_file_that_is_looked_for(
    vision_bundle: Bundle, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vision_bundle.folder, tmp_path / "bundle"))
    settings = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}), "utf-8")
    bundle = Bundle(folder, check=False)
    laid_out.require_what_it_reads(bundle)
    laid_out.write_model(bundle, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "preprocessor_config.json").read_text("utf-8")) == settings

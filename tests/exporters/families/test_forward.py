# SPDX-License-Identifier: Apache-2.0
"""Models that are called once: exported from a folder, and compared with the original."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_configs import CONVOLUTIONS, TEXT, VISION, tiny
from transformers.modeling_outputs import ImageClassifierOutput

from onnxpress.contracts.errors import ExportError, InputError
from onnxpress.contracts.tasks import TASKS
from onnxpress.exporters import graph_file, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.families.forward import results_of
from onnxpress.pipeline.inputs import comparison_cases
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.validate import Parity, compare
from onnxpress.runtime.session import Session

SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("image-classification", {**VISION, "num_labels": 3}),
    "clip": (
        "zero-shot-image-classification",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 12},
    ),
    "wav2vec2": ("automatic-speech-recognition", {**TEXT, **CONVOLUTIONS}),
}
"""Model type: its task, and a small configuration."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, ExportedModel] = {}

    def get(model_type: str) -> ExportedModel:
        if model_type not in made:
            task, changes = SUBJECTS[model_type]
            folder = tmp_path_factory.mktemp("forward") / model_type
            torch.manual_seed(0)
            tiny(model_type, task, **changes).save_pretrained(folder)
            made[model_type] = sources.load(str(folder), task)
        return made[model_type]

    return get


def parity(exported: ExportedModel, folder: Path) -> Parity:
    cleaned, _ = run_pass(Clean(), exported.model.clone())
    graph_file.write(cleaned, folder / "model.onnx")
    assert exported.reference is not None
    return compare(exported.reference.run, Session(folder / "model.onnx").run, comparison_cases(exported, None))


@pytest.mark.parametrize("model_type", list(SUBJECTS))
def test_it_is_the_original(exported: Any, model_type: str, tmp_path: Path) -> None:
    result = parity(exported(model_type), tmp_path)
    assert result.outputs
    assert len({case["case"] for case in result.cases}) >= 2
    worst = result.worst("relative_error", lowest=False)
    assert worst is not None
    assert worst < 1e-5


def test_images_keep_their_size_and_batches_are_open(exported: Any) -> None:
    signature = exported("vit").signature
    assert [(s.name, s.shape) for s in signature.inputs] == [("pixel_values", ("batch", 3, 16, 16))]
    assert [(s.name, s.shape) for s in signature.outputs] == [("logits", ("batch", 3))]


def test_classes_have_names(exported: Any) -> None:
    assert exported("vit").id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_every_result_of_image_and_text(exported: Any) -> None:
    outputs = [spec.name for spec in exported("clip").signature.outputs]
    assert {"logits_per_image", "logits_per_text", "text_embeds", "image_embeds"} <= set(outputs)
    assert not any("hidden_states" in name or "attentions" in name for name in outputs)


def test_it_is_compared_on_texts_with_padding(exported: Any) -> None:
    masks = [np.asarray(feeds["attention_mask"]) for feeds in exported("clip").known_inputs]
    assert {mask.shape for mask in masks} == {(1, 5), (3, 12)}
    assert any((mask == 0).any() for mask in masks)


def test_the_length_of_sound_is_open(exported: Any, tmp_path: Path) -> None:
    it = exported("wav2vec2")
    assert it.signature.inputs[0].shape == ("batch", "samples")
    cleaned, _ = run_pass(Clean(), it.model.clone())
    graph_file.write(cleaned, tmp_path / "model.onnx")
    sound = np.random.default_rng(0).standard_normal((1, 3001)).astype(np.float32)
    wanted, got = (run({"input_values": sound}) for run in (it.reference.run, Session(tmp_path / "model.onnx").run))
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-5)


def test_a_broken_preprocessor_file_is_named(tmp_path: Path) -> None:
    tiny("vit", "image-classification", **VISION).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config.json cannot be read"):
        sources.load(str(tmp_path / "vit"), "image-classification")


def test_results_leave_out_what_nobody_reads() -> None:
    one = torch.zeros(1)
    output = ImageClassifierOutput(loss=one, logits=one, hidden_states=(one, one), attentions=(one,))
    assert list(results_of(output)) == ["logits"]
    assert list(results_of({"a": (one, one), "encoder_hidden_states": (one,)})) == ["a_0", "a_1"]


def test_results_that_are_no_tensors() -> None:
    with pytest.raises(ExportError, match="cannot become tensors"):
        results_of({"text": "no"})


def test_every_task_has_classes_in_transformers() -> None:
    for task in TASKS.values():
        assert all(hasattr(transformers, name) for name in task.auto_classes), task.name
    json.dumps([vars(task) for task in TASKS.values()])

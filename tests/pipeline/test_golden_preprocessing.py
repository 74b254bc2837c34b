# SPDX-License-Identifier: Apache-2.0
"""The numbers in a bundle give what transformers' own processors give, or the bundle says that they do not."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.exporters.exported import ExportedModel
from onnxpress.pipeline.golden_preprocessing import clips, picture, preprocessing_warnings, write_preprocessing
from onnxpress.runtime.audio import AudioSteps, read_wav
from onnxpress.runtime.golden_inputs import check_preprocessing
from onnxpress.runtime.images import ImageSteps

from .samples import exported

IMAGE = (TensorSpec("pixel_values", "float32", ("batch", 3, "height", "width")),)
SOUND = (TensorSpec("input_values", "float32", ("batch", "samples")),)
FEATURES = (TensorSpec("input_features", "float32", ("batch", "bands", "frames")),)


def stand_in(signature: Signature) -> ExportedModel:
    """A model of which only the outside counts."""
    return exported({spec.name: (spec.dtype, spec.shape) for spec in signature.inputs})


def source(folder: Path, inputs: tuple[TensorSpec, ...], kind: str, **settings: Any) -> ExportedModel:
    key = "feature_extractor_type" if kind.endswith("FeatureExtractor") else "image_processor_type"
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({key: kind, **settings}))
    found = stand_in(Signature(inputs, ()))
    found.processor_files = {file.name: file}
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return folder


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "preprocessing.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTImageProcessor", {"size": {"height": 30, "width": 40}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 36}}),
        ("DeiTImageProcessor", {"size": {"height": 48, "width": 48}, "crop_size": {"height": 39, "width": 40}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 40}}),
        ("SiglipImageProcessor", {"size": {"height": 30, "width": 30}, "resample": 1}),
        ("BitImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 64, "width": 19}}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 32}}),
    ],
)
def test_pictures_are_prepared_bit_for_bit(kind: str, settings: dict[str, Any], tmp_path: Path, out: Path) -> None:
    facts = write_preprocessing(out, source(tmp_path, IMAGE, kind, **settings))
    assert facts is not None
    assert facts["difference"] == 0.0
    assert preprocessing_warnings(facts) == []
    assert check_preprocessing(out, {"preprocessing": facts}) == {"pixel_values": 0.0}
    golden = load_file(out / "golden" / "preprocessing.safetensors")
    file = Image.open(io.BytesIO((out / "golden" / "picture.png").read_bytes()))
    assert np.array_equal(np.asarray(file), golden["landscape/picture"])
    made = ImageSteps(read(out))((out / "golden" / "picture.png").read_bytes())
    assert np.array_equal(made, golden["landscape/pixel_values"])


@pytest.mark.parametrize(
    ("inputs", "kind", "settings"),
    [
        (SOUND, "Wav2Vec2FeatureExtractor", {"return_attention_mask": False}),
        (
            (*SOUND, TensorSpec("attention_mask", "int64", ("batch", "samples"))),
            "Wav2Vec2FeatureExtractor",
            {"return_attention_mask": True, "sampling_rate": 4000},
        ),
        (SOUND, "Wav2Vec2FeatureExtractor", {"do_normalize": False}),
        (FEATURES, "WhisperFeatureExtractor", {"chunk_length": 2, "feature_size": 40}),
    ],
)
def test_sound_is_prepared_alike(
    inputs: tuple[TensorSpec, ...], kind: str, settings: dict[str, Any], tmp_path: Path, out: Path
) -> None:
    facts = write_preprocessing(out, source(tmp_path, inputs, kind, **settings))
    assert facts is not None
    assert facts["golden"], facts
    assert facts["difference"] <= (1e-3 if kind.startswith("Whisper") else 0)
    worst = check_preprocessing(out, {"preprocessing": facts})
    assert set(worst) == {spec.name for spec in inputs}
    numbers = read(out)
    clip = read_wav((out / "golden" / "clip.wav").read_bytes(), numbers["sampling_rate"])
    golden = load_file(out / "golden" / "preprocessing.safetensors")
    assert np.array_equal(clip, golden["tone/clip"])
    made = AudioSteps(numbers, out)([clip])[inputs[0].name][0]
    np.testing.assert_allclose(made, golden[f"tone/{inputs[0].name}"], atol=facts["tolerance"])


@pytest.mark.parametrize(
    ("inputs", "kind", "words"),
    [
        (IMAGE, "EfficientNetImageProcessor", "does more than its settings say: a difference of 1"),
        (IMAGE, "DetrImageProcessor", "pads pictures"),
        (SOUND, "EncodecFeatureExtractor", r"gives \[1, 1, 24000\], not \[1, 24000\]"),
        (
            (TensorSpec("pixel_values", "float32", ("batch", 3, 30, 30)),),
            "ViTImageProcessor",
            r"gives \[1, 3, 224, 224\] for 'pixel_values', the graph takes \['batch', 3, 30, 30\]",
        ),
    ],
)
def test_what_the_numbers_do_not_say_is_refused_in_the_bundle(
    inputs: tuple[TensorSpec, ...], kind: str, words: str, tmp_path: Path, out: Path
) -> None:
    facts = write_preprocessing(out, source(tmp_path, inputs, kind))
    assert facts is not None
    assert re.search(words, facts["refused"])
    assert read(out)["refused"] == facts["refused"]
    assert len(preprocessing_warnings(facts)) == 1
    assert not (out / "golden").exists()


def test_timm_without_its_transforms_is_marked_not_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxpress.exporters.preprocessor._timm_transforms", lambda config: None)
    found = stand_in(Signature(IMAGE, ()))
    mean = {"mean": [0.5] * 3, "std": [0.5] * 3}
    found.image_settings = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 1.0, **mean}
    facts = write_preprocessing(out, found)
    assert facts is not None
    assert facts["golden"] is None
    assert preprocessing_warnings(facts) == [
        "How inputs are prepared was not compared with the source: the source's own transforms are not installed here: "
        "not compared."
    ]
    assert ImageSteps(read(out))(picture(70, 90)).shape == (3, 64, 64)


def test_a_model_of_texts_has_none(tmp_path: Path, out: Path) -> None:
    ids = (TensorSpec("input_ids", "int64", ("batch", "sequence")),)
    assert write_preprocessing(out, source(tmp_path, ids, "ViTImageProcessor")) is None
    assert write_preprocessing(out, stand_in(Signature(IMAGE, ()))) is None
    assert list(out.iterdir()) == []


def test_the_examples_are_the_same_everywhere() -> None:
    """Golden files must not depend on the machine: these sums were written down once."""
    assert int(picture(150, 200).astype(np.int64).sum()) == 11_663_887
    tone = clips(16000)["tone"]
    assert np.array_equal(tone * 32768, np.round(tone * 32768)), "as a 16-bit file has them"

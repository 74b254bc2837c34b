# SPDX-License-Identifier: Apache-2.0
"""Settings of processors as numbers, and the settings that numbers cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.exporters.preprocessor import Unsaid, preprocessing_of, timm_preprocessing

PIXELS = {"pixel_values"}


def write(folder: Path, kind: str, **settings: Any) -> Path:
    key = "feature_extractor_type" if kind.endswith("FeatureExtractor") else "image_processor_type"
    (folder / "preprocessor_config.json").write_text(json.dumps({key: kind, **settings}))
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    found = preprocessing_of(folder, PIXELS)
    assert found is not None
    return list(found.numbers["steps"])


def test_an_exact_size(tmp_path: Path) -> None:
    folder = write(tmp_path, "ViTImageProcessor", size={"height": 30, "width": 40}, image_mean=[0.1, 0.2, 0.3])
    resize, rescale, normalize = steps(folder)
    assert resize == {"step": "resize", "height": 30, "width": 40, "resample": "bilinear"}
    assert rescale["factor"] == 1 / 255
    assert normalize == {"step": "normalize", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}


def test_the_shorter_edge_and_the_middle(tmp_path: Path) -> None:
    resize, crop = steps(write(tmp_path, "CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=30))[:2]
    assert resize == {"step": "resize", "shortest_edge": 32, "resample": "bicubic"}
    assert crop == {"step": "crop", "height": 30, "width": 30, "rounding": "floor"}


@pytest.mark.parametrize("edge", [224, 384])
def test_convnext_crops_below_384(edge: int, tmp_path: Path) -> None:
    found = steps(write(tmp_path, "ConvNextImageProcessor", size={"shortest_edge": edge}, crop_pct=0.875))
    if edge == 224:
        assert [step["step"] for step in found[:2]] == ["resize", "crop"]
        assert found[0]["shortest_edge"] == 256
    else:
        assert found[0] == {"step": "resize", "height": 384, "width": 384, "resample": "bicubic"}


def test_what_is_switched_off_is_no_step(tmp_path: Path) -> None:
    folder = write(tmp_path, "ViTImageProcessor", do_resize=False, do_normalize=False)
    assert [step["step"] for step in steps(folder)] == ["rescale"]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("DetrImageProcessor", {}, "pads pictures"),
        ("ViTImageProcessor", {"size": {"shortest_edge": 9, "longest_edge": 99}}, "longest_edge and shortest_edge"),
        ("ViTImageProcessor", {"image_mean": [0.5]}, "1 channels"),
        ("ViTImageProcessor", {"resample": 99}, "settings of another form"),
        ("DonutImageProcessor", {"do_pad": False, "size": {"shortest_edge": 9, "longest_edge": 9}}, "given by longest"),
        ("NoSuchImageProcessor", {}, "cannot be loaded"),
    ],
)
def test_what_numbers_cannot_say_is_told(kind: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(Unsaid, match=words):
        preprocessing_of(write(tmp_path, kind, **settings), PIXELS)


def test_a_model_that_reads_neither_has_none(tmp_path: Path) -> None:
    assert preprocessing_of(write(tmp_path, "ViTImageProcessor"), {"input_ids"}) is None


def test_waveforms(tmp_path: Path) -> None:
    folder = write(tmp_path, "Wav2Vec2FeatureExtractor", return_attention_mask=True, do_normalize=True)
    found = preprocessing_of(folder, {"input_values", "attention_mask"})
    assert found is not None
    assert found.numbers["inputs"] == ["input_values", "attention_mask"]
    assert (found.numbers["normalize"], found.numbers["normalize_padding"]) == (True, False)
    folder = write(tmp_path, "Wav2Vec2FeatureExtractor", return_attention_mask=False)
    plain = preprocessing_of(folder, {"input_values"})
    assert plain is not None
    assert plain.numbers["normalize_padding"] is True


def test_spectra_bring_their_filters(tmp_path: Path) -> None:
    folder = write(tmp_path, "WhisperFeatureExtractor", feature_size=20, n_fft=64, hop_length=16, chunk_length=1)
    found = preprocessing_of(folder, {"input_features", "decoder_input_ids"})
    assert found is not None
    assert (found.numbers["samples"], found.numbers["hop"], found.numbers["n_fft"]) == (16000, 16, 64)
    assert found.files["mel_filters.npy"].shape == (33, 20)
    assert found.files["mel_filters.npy"].dtype == np.float32


def test_noise_and_other_extractors_are_told(tmp_path: Path) -> None:
    with pytest.raises(Unsaid, match="adds noise"):
        preprocessing_of(write(tmp_path, "WhisperFeatureExtractor", dither=1e-4), {"input_features"})
    with pytest.raises(Unsaid, match="in a way of its own"):
        preprocessing_of(write(tmp_path, "ClapFeatureExtractor"), {"input_features"})


TIMM: dict[str, Any] = {
    "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
}  # fmt: skip


def test_timm_resizes_and_crops() -> None:
    resize, crop, *_ = timm_preprocessing(TIMM).numbers["steps"]
    assert resize == {"step": "resize", "shortest_edge": 248, "resample": "bicubic"}
    assert crop == {"step": "crop", "height": 224, "width": 224, "rounding": "half_even"}
    squashed = timm_preprocessing({**TIMM, "crop_mode": "squash"}).numbers["steps"][0]
    assert squashed == {"step": "resize", "height": 248, "width": 248, "resample": "bicubic"}


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "border"},
        {"interpolation": "random"},
        {"input_size": [1, 28, 28]},
        {"input_size": [3, 224, 160]},
        {"mean": None},
        {"input_size": None},
    ],
)
def test_what_timm_asks_beyond_is_told(changes: dict[str, Any]) -> None:
    with pytest.raises(Unsaid):
        timm_preprocessing({**TIMM, **changes})

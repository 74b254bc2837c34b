# SPDX-License-Identifier: Apache-2.0
"""Golden texts, pictures and clips: read again they agree, and where they do not, the check says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from onnxpress.contracts.errors import BundleError, GateFailed
from onnxpress.runtime.golden_inputs import GOLDEN_ARRAYS, GOLDEN_TOKENS, check_preprocessing, check_tokens

TOKENS = {"tokenizer": {"json": True, "golden": GOLDEN_TOKENS, "differs": {}}}


def write_tokens(folder: Path, **changes: Any) -> None:
    words = {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    tokenizer.save(str(folder / "tokenizer.json"))
    sample = {
        "name": "both", "texts": ["a b a", "b"], "pairs": None, "limit": 2, "input_ids": [[2, 3], [3, 0]],
        "attention_mask": [[1, 1], [1, 0]], "token_type_ids": [[0, 0], [0, 0]],
    } | changes  # fmt: skip
    (folder / "golden").mkdir(exist_ok=True)
    (folder / GOLDEN_TOKENS).write_text(json.dumps({"tokenizer": "Words", "samples": [sample]}))


def test_golden_texts_that_are_read_alike_are_counted(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    assert check_tokens(tmp_path, TOKENS) == 1
    assert check_tokens(tmp_path, {}) == 0
    assert check_tokens(tmp_path, {"tokenizer": {"json": False, "reason": "Python"}}) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": [[2, 2], [3, 0]]}, r"'both' differently: input_ids\[0\]\[1\] is 3 instead of 2"),
        ({"attention_mask": [[1, 1], [1, 1]]}, r"attention_mask\[1\]\[1\] is 0 instead of 1"),
        ({"limit": None}, r"input_ids\[0\] has 3 tokens instead of 2"),
        ({"texts": ["a b a"]}, "input_ids has 1 rows instead of 2"),
    ],
)
def test_a_text_that_is_read_differently_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_tokens(tmp_path, **changes)
    with pytest.raises(GateFailed, match=words):
        check_tokens(tmp_path, TOKENS)
    told = {"tokenizer": {**TOKENS["tokenizer"], "differs": {"both": "known"}}}
    assert check_tokens(tmp_path, told) == 0, "the manifest says so"


@pytest.mark.parametrize("text", ["", "{}", '{"samples": 3}', '{"samples": [{}]}', "[]"])
def test_golden_texts_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    write_tokens(tmp_path)
    (tmp_path / GOLDEN_TOKENS).write_text(text)
    with pytest.raises(BundleError, match=r"tokens\.json cannot be read"):
        check_tokens(tmp_path, TOKENS)


IMAGE = {"preprocessing": {"kind": "image", "golden": GOLDEN_ARRAYS, "tolerance": 0.01}}
AUDIO = {"preprocessing": {"kind": "audio", "golden": GOLDEN_ARRAYS, "tolerance": 0.01}}


def write_picture(folder: Path, shift: float = 0.0) -> None:
    numbers = {
        "kind": "image", "input": "pixels", "channels": "RGB", "layout": "NCHW", "dtype": "float32",
        "steps": [{"step": "rescale", "factor": 0.5}],
    }  # fmt: skip
    (folder / "preprocessing.json").write_text(json.dumps(numbers))
    picture = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    pixels = picture.transpose(2, 0, 1).astype(np.float32) / 2 + np.float32(shift)
    (folder / "golden").mkdir(exist_ok=True)
    save_file({"a/picture": picture, "a/pixels": np.ascontiguousarray(pixels)}, folder / GOLDEN_ARRAYS)


def test_golden_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path)
    assert check_preprocessing(tmp_path, IMAGE) == {"pixels": 0.0}
    assert check_preprocessing(tmp_path, {}) == {}
    assert check_preprocessing(tmp_path, {"preprocessing": {"kind": "image", "refused": "it pads"}}) == {}
    write_picture(tmp_path, 0.5)
    with pytest.raises(GateFailed, match=r"golden image gives another 'pixels': by 0\.5, tolerance 0\.01"):
        check_preprocessing(tmp_path, IMAGE)


def test_golden_clips(tmp_path: Path) -> None:
    numbers = {
        "kind": "audio", "form": "waveform", "inputs": ["sound"], "sampling_rate": 10, "normalize": False,
        "padding_value": 0.0,
    }  # fmt: skip
    (tmp_path / "preprocessing.json").write_text(json.dumps(numbers))
    (tmp_path / "golden").mkdir()
    clip = np.linspace(-1, 1, 9, dtype=np.float32)
    save_file({"a/clip": clip, "a/sound": clip + np.float32(0.005)}, tmp_path / GOLDEN_ARRAYS)
    assert check_preprocessing(tmp_path, AUDIO)["sound"] == pytest.approx(0.005, abs=1e-6)
    save_file({"a/clip": clip, "a/sound": clip[:8]}, tmp_path / GOLDEN_ARRAYS)
    with pytest.raises(GateFailed, match="by inf"):
        check_preprocessing(tmp_path, AUDIO)


@pytest.mark.parametrize(
    "facts", [3, "golden", {"golden": GOLDEN_ARRAYS}, {"golden": GOLDEN_ARRAYS, "tolerance": "all"}]
)
def test_a_manifest_that_says_something_else(facts: Any, tmp_path: Path) -> None:
    write_picture(tmp_path)
    with pytest.raises(BundleError):
        check_preprocessing(tmp_path, {"preprocessing": facts})
    with pytest.raises(BundleError):
        check_tokens(tmp_path, {"tokenizer": facts})


def test_golden_arrays_of_another_kind(tmp_path: Path) -> None:
    write_picture(tmp_path)
    save_file({"a/clip": np.zeros(3, np.float32)}, tmp_path / GOLDEN_ARRAYS)
    with pytest.raises(BundleError, match="does not fit"):
        check_preprocessing(tmp_path, IMAGE)


@pytest.mark.parametrize("name", ["preprocessing.json", GOLDEN_ARRAYS])
def test_golden_pictures_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    write_picture(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(BundleError):
        check_preprocessing(tmp_path, IMAGE)

# SPDX-License-Identifier: Apache-2.0
"""Tiny bundles that every handoff is tried on, pressed once a test run: text, images, a decoder with a cache.

conftest.py makes fixtures of them; a module that imported them itself would press them again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxpress.runtime.opened import Bundle

from ..conftest import strip_probes
from ..samples import quick_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "exporters"))

import tiny_models

DECODER: dict[str, Any] = {
    "vocab_size": 290,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "tie_word_embeddings": True,
}
VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "num_labels": 3,
}
IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _pressed(folder: Path, source: Path, recipe: str, **options: Any) -> Bundle:
    from onnxpress.pipeline.pressing import press

    with pytest.MonkeyPatch.context() as patch:
        strip_probes(patch)
        settings = {"benchmark.max_seconds": 0.01}  # after one round: nobody reads these timings
        outcome = press(str(source), quick_recipe(recipe, **settings), folder / "bundle", **options)
    assert outcome.folder is not None, outcome.manifest["gates"]
    return Bundle(outcome.folder)


def _text_model(folder: Path, auto_class: str, **changes: Any) -> Path:
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, **changes}
    return tiny_models.build(folder / "source", "bert", auto_class, **changes)


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A classifier of texts with a WordPiece tokenizer and three labels, int8; not to be changed."""
    folder = tmp_path_factory.mktemp("text")
    return _pressed(folder, _text_model(folder, "AutoModelForSequenceClassification"), "int8-dynamic")


@pytest.fixture(scope="session")
def vision_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A classifier of images, 16 x 16, fp32; not to be changed."""
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.OWN_NAMES, "vit", VISION)
        source = tiny_models.build(folder / "source", "vit", "AutoModelForImageClassification", tokenizer=False)
    (source / "preprocessor_config.json").write_text(json.dumps(IMAGES), "utf-8")
    return _pressed(folder, source, "fp32")


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A causal language model with a cache, grouped heads and a byte-level BPE tokenizer, fp32; not to be changed."""
    folder = tmp_path_factory.mktemp("decoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.OWN_NAMES, "llama", DECODER)
        source = tiny_models.build(folder / "source", "llama", "AutoModelForCausalLM", tokenizer=False)
    tiny_models.write_byte_tokenizer(source, prefix_space=False)
    return _pressed(folder, source, "fp32")

# SPDX-License-Identifier: Apache-2.0
"""What the model card says beside the table: licence, limits, how inputs are made and how all of it is checked."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models

from onnxpress.pipeline.report import render_card

from .test_report import ATTACK, python_of, sample

TOKENIZER = {"json": True, "origin": "source", "golden": "golden/tokens.json", "samples": 14, "differs": {}}


@pytest.fixture
def manifest() -> dict[str, Any]:
    return sample()


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("stated", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("mit", {"license": "mit"}),
        ("Our own 1.0", {"license": "other", "license_name": "Our own 1.0"}),
        (None, {}),
    ],
)
def test_the_licence_is_one_that_the_hub_takes(
    stated: str | None, front: dict[str, str], manifest: dict[str, Any]
) -> None:
    manifest["source"]["license"] = stated
    found = yaml.safe_load(render_card(manifest).split("---\n")[1])
    assert {key: value for key, value in found.items() if key.startswith("license")} == front


def test_limits(manifest: dict[str, Any]) -> None:
    manifest["max_length"] = 256
    told = section(render_card(manifest), "Limits")
    assert "sentence\\_embedding differs from the original's by 0.0123 at most, cosine 0.9981, where measured." in told
    assert "Texts are cut at 256 tokens." in told
    assert "the machine was busy" in told
    manifest["signature"]["inputs"] = [{"name": "pixels", "dtype": "float32", "shape": [1, 3, 32, 32]}]
    told = section(render_card(manifest), "Limits")
    assert "pixels has one size: 1 x 3 x 32 x 32." in told
    assert "cut at" not in told
    manifest["parity"] = {f"present.{i}": manifest["parity"]["sentence_embedding"] for i in range(9)}
    assert section(render_card(manifest), "Limits").count("differs from") == 3


def test_inputs(manifest: dict[str, Any]) -> None:
    assert "## Inputs" not in render_card(manifest)
    manifest["tokenizer"] = {**TOKENIZER, "differs": {"emoji": "input_ids[0][2] is 3 instead of 4"}}
    manifest["preprocessing"] = {
        "file": "preprocessing.json", "kind": "image", "golden": "golden/preprocessing.safetensors", "difference": 0.0,
        "tolerance": 0.01,
    }  # fmt: skip
    told = section(render_card(manifest), "Inputs")
    assert "13 of 14 texts in golden/tokens.json" in told
    assert "Image: the numbers in preprocessing.json, held against the source's own processor" in told
    manifest["tokenizer"] = {"json": False, "reason": "X is written in Python"}
    manifest["preprocessing"] = {"file": "preprocessing.json", "kind": "audio", "refused": "it adds noise"}
    told = section(render_card(manifest), "Inputs")
    assert "Text: X is written in Python." in told
    assert "Audio: it adds noise; prepare inputs with the source's own code." in told


def test_the_code_pads_as_the_bundle_s_tokenizer_does(manifest: dict[str, Any]) -> None:
    manifest["tokenizer"] = TOKENIZER
    assert "no_padding" not in render_card(manifest)
    for spec in manifest["signature"]["inputs"]:
        spec["shape"] = ["batch", 5]
    line = next(line for line in python_of(render_card(manifest)).splitlines() if "enable_padding" in line)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 7, "a": 1}, unk_token="a"))
    tokenizer.enable_padding(direction="left", pad_id=7, pad_token="<pad>")
    exec(line, {"tokenizer": tokenizer})
    assert tokenizer.encode("a").ids == [7, 7, 7, 7, 1]


def test_how_to_check_it(manifest: dict[str, Any]) -> None:
    told = section(render_card(manifest), "Check it")
    for words in ("onnxpress verify . ", "--public-key", "sha256sum -c SHA256SUMS", "sbom.cdx.json"):
        assert words in told
    assert "\n\n\n" not in render_card(manifest)


def test_what_a_source_says_stays_text(manifest: dict[str, Any]) -> None:
    manifest["source"]["license"] = ATTACK
    manifest["tokenizer"] = {"json": False, "reason": ATTACK}
    card = render_card(manifest)
    assert yaml.safe_load(card.split("---\n")[1])["license_name"] == ATTACK
    assert "<script>" not in section(card, "Inputs")


def test_a_model_of_pictures_names_what_makes_its_arrays(manifest: dict[str, Any]) -> None:
    del manifest["files"]["tokenizer.json"]
    manifest["signature"]["inputs"] = [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 32, 32]}]
    manifest["preprocessing"] = {"file": "preprocessing.json", "kind": "image", "golden": None, "reason": "no timm"}
    card = render_card(manifest)
    assert "`onnxpress.runtime.images.ImageEncoder` makes them" in card
    assert "No tokenizer belongs" not in card
    assert "not compared with the source's own code" in section(card, "Inputs")
    manifest["preprocessing"] = {"file": "preprocessing.json", "kind": "image", "refused": "it pads"}
    assert "put your own arrays" in render_card(manifest)

# SPDX-License-Identifier: Apache-2.0
"""A press that cuts the vocabulary: the bundle's tokenizer and model fit each other, and later passes fit both."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from onnxpress.exporters import graph_file, sources
from onnxpress.exporters.tokenizer import load_tokenizer
from onnxpress.pipeline.data import load_dataset
from onnxpress.pipeline.pressing import Outcome, press
from onnxpress.pipeline.recipe import Recipe
from onnxpress.runtime.bundle import verify
from onnxpress.runtime.session import Session

from ..exporters import tiny_models
from .conftest import Run, strip_probes

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
TRAIN = ["the cat sat on a mat", "a dog sat", "good dog"]
QUICK = ("--set", "benchmark.rounds=5", "--set", "benchmark.max_seconds=0.2", "--set", "benchmark.threads=1")
DEV = [("the cat sat", "0"), ("a dog was bad", "1"), ("who sat where ?", "2"), ("good mat", "0")]


def recipe_of(*passes: dict[str, Any], gates: tuple[str, ...] = ()) -> Recipe:
    quick = {"rounds": 5, "max_seconds": 0.5, "threads": 1}
    names = ({"pass": "clean"}, *passes)
    return Recipe.model_validate({"name": "cut", "passes": names, "gates": gates, "benchmark": quick})


def pressed(folder: Path, source: Path, recipe: Recipe, dev: str) -> Outcome:
    (folder / "train.txt").write_text("".join(f"{line}\n" for line in TRAIN), "utf-8")
    (folder / "dev.tsv").write_text(dev, "utf-8")
    data = load_dataset(str(folder / "train.txt")), load_dataset(str(folder / "dev.tsv"))
    with pytest.MonkeyPatch.context() as patched:
        strip_probes(patched)
        return press(str(source), recipe, folder / "out", calibration=data[0], evaluation=data[1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Outcome]:
    """An `.onnx` with its tokenizer beside it, which takes no export; behind the cut, int8 by calibration.

    RoBERTa numbers positions from where token ids are not the padding's.
    """
    folder = tmp_path_factory.mktemp("vocabulary")
    source = tiny_models.build(folder / "model", "roberta", "AutoModelForSequenceClassification", num_hidden_layers=1)
    source = source / "model.onnx"
    graph_file.write(sources.load(str(source.parent)).model, source)
    passes = ({"pass": "prune_vocabulary"}, {"pass": "fuse"}, {"pass": "quantize_static", "minimum_elements": 64})
    rounding = ({"pass": "correct_bias"},)
    dev = "".join(f"{text}\t{label}\n" for text, label in DEV)
    recipe = recipe_of(*passes, *rounding, gates=("size_ratio > 1.2", "cosine >= 0.9", "accuracy_drop <= 60"))
    return folder / "out", source, pressed(folder, source, recipe, dev)


def test_the_bundle_is_complete_and_small(classifier: tuple[Path, Path, Outcome]) -> None:
    bundle, source, outcome = classifier
    assert outcome.accepted
    verify(bundle)
    facts = outcome.manifest["vocabulary"]
    kept = facts["tokens_after"]
    assert kept < facts["tokens_before"] < tiny_models.VOCABULARY
    (report,) = [entry for entry in outcome.manifest["passes"] if entry["pass"] == "prune_vocabulary"]
    assert report["details"]["tokens_after"] == kept
    assert report["bytes_before"] - report["bytes_after"] == (tiny_models.VOCABULARY - kept) * 32 * 4
    assert "renumbering" not in report
    assert json.loads((bundle / "config.json").read_text("utf-8"))["vocab_size"] == kept
    assert json.loads((source.parent / "config.json").read_text("utf-8"))["vocab_size"] == tiny_models.VOCABULARY
    model = graph_file.read(bundle / "onnx" / "model.onnx")
    sizes = {tuple(v.const_value.shape) for v in model.graph.initializers.values() if v.const_value is not None}
    assert (kept, 32) in {tuple(map(int, shape)) for shape in sizes}
    assert {"quantize_static", "correct_bias"} <= {entry["pass"] for entry in outcome.manifest["passes"]}


def test_golden_inputs_are_what_the_bundles_own_tokenizer_makes(classifier: tuple[Path, Path, Outcome]) -> None:
    bundle, _, _ = classifier
    tokenizer = load_tokenizer(bundle)
    inputs = load_file(bundle / "golden" / "inputs.safetensors")
    samples = json.loads((bundle / "golden" / "golden.json").read_text("utf-8"))["samples"]
    assert len(samples) == 6
    for index, sample in enumerate(samples):
        ids = tokenizer([sample["text"]], truncation=True, max_length=39)["input_ids"]
        assert inputs[f"{index}/input_ids"].tolist() == ids


def test_texts_are_read_as_before_or_in_smaller_pieces(classifier: tuple[Path, Path, Outcome]) -> None:
    _, _, outcome = classifier
    readings = outcome.manifest["vocabulary"]["readings"]
    assert readings["calibration"]["as_before"] == readings["calibration"]["texts"] == len(TRAIN)
    assert readings["evaluation"]["as_before"] == 2, "'was', 'bad', 'who', 'where' are not in the calibration data"
    assert readings["evaluation"]["tokens_after"] > readings["evaluation"]["tokens_before"]
    assert any("2 of 4 (evaluation)" in line for line in outcome.manifest["warnings"])


def test_validate_and_benchmark_know_the_bundles_own_ids(
    classifier: tuple[Path, Path, Outcome], onnxpress: Run, tmp_path: Path
) -> None:
    bundle, source, outcome = classifier
    dev = bundle.parent / "dev.tsv"
    for candidate in (bundle, bundle / "onnx" / "model.onnx"):
        result = onnxpress("validate", source, candidate, "--evaluation", dev, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert found["parity"] == outcome.manifest["parity"]
        assert found["metrics"] == outcome.manifest["metrics"]
    timed = onnxpress("benchmark", bundle, "--reference", source, *QUICK, "--json")
    assert timed.code == 0, timed.err


def test_a_masked_language_model_with_its_output_layer(tmp_path: Path) -> None:
    source = tiny_models.build(tmp_path / "model", "distilbert", "AutoModelForMaskedLM", n_layers=1)
    recipe = recipe_of({"pass": "prune_vocabulary", "cut_output": True}, gates=("max_abs_error < 1e-4",))
    outcome = pressed(tmp_path, source, recipe, "".join(f"{text}\t{label}\n" for text, label in DEV[:1]))
    assert outcome.accepted
    kept = outcome.manifest["vocabulary"]["tokens_after"]
    assert outcome.manifest["signature"]["outputs"][0]["shape"][-1] == kept
    assert outcome.manifest["metrics"]["top1_agreement_with_reference"]["candidate"] == 100.0
    bundle, text = tmp_path / "out", ["the cat sat on a mat"]
    feeds = {k: np.array(v) for k, v in load_tokenizer(bundle)(text, return_token_type_ids=False).items()}
    logits = Session(bundle / "onnx" / "model.onnx").run(feeds)["logits"]
    assert logits.shape == (1, feeds["input_ids"].shape[1], kept)
    names = {number: token for token, number in load_tokenizer(bundle).get_vocab().items()}
    whole = load_tokenizer(source)
    assert len(names) == kept
    assert [names[n] for n in feeds["input_ids"][0]] == whole.convert_ids_to_tokens(whole(text)["input_ids"][0])


@pytest.mark.skipif(not (ASSETS / "minilm-sst2").is_dir(), reason="the fine-tuned MiniLM is not here")
def test_a_published_word_piece_vocabulary_on_real_sentences(tmp_path: Path) -> None:
    """The tokenizer alone: a press of this model takes minutes, see benchmarks/vocabulary.py."""
    from onnxpress.exporters.tokenizer import processor_files
    from onnxpress.exporters.vocabulary import read_vocabulary
    from onnxpress.exporters.vocabulary_cut import cut_files

    files = processor_files(ASSETS / "minilm-sst2")
    sentences = [line.split("\t")[0] for line in (ASSETS / "data_sst2/train.tsv").read_text("utf-8").splitlines()[:500]]
    whole = load_tokenizer(ASSETS / "minilm-sst2")
    before = whole(sentences)["input_ids"]
    vocabulary = read_vocabulary(files)
    kept = sorted(vocabulary.closed({number for row in before for number in row}))
    assert 4_000 < len(kept) < 9_000
    cut_files(files, kept, tmp_path / "cut")
    after = load_tokenizer(tmp_path / "cut")(sentences)["input_ids"]
    assert [[kept[number] for number in row] for row in after] == before

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in shards, and those that bring their own Python code."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import tiny_models
import transformers

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import ExportSettings, sources

CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class CountingConfig(PretrainedConfig):
    model_type = "counting"
    def __init__(self, vocab_size=99, hidden_size=8, **others):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**others)

class CountingClassifier(PreTrainedModel):
    config_class = CountingConfig
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
    def forward(self, input_ids, attention_mask=None, return_dict=True):
        mask = attention_mask.unsqueeze(-1).to(self.embeddings.weight.dtype)
        vectors = (self.embeddings(input_ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(vectors))
"""


def refusal(folder: Path, settings: ExportSettings | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        sources.load(str(folder), settings=settings)
    assert caught.value.next_step
    return caught.value


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "bert"
    tiny_models.build(folder, "bert", "AutoModelForSequenceClassification", num_hidden_layers=1, tokenizer=False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


class TestShards:
    def test_they_are_read_and_hashed_together(self, sharded: Path) -> None:
        reference = sources.load_reference(str(sharded), None, ExportSettings())
        ids = np.ones((1, 4), np.int64)
        assert reference.run(dict.fromkeys(reference.input_names, ids))["logits"].shape == (1, 3)

    @pytest.mark.parametrize("kept", [None, 100, -7])
    def test_one_that_is_missing_or_cut_short_is_named(self, sharded: Path, tmp_path: Path, kept: int | None) -> None:
        folder = Path(shutil.copytree(sharded, tmp_path / "bert"))
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        content = shard.read_bytes()
        shard.unlink()
        if kept is not None:
            shard.write_bytes(content[:kept])
        error = refusal(folder)
        assert shard.name in str(error)
        assert ("missing" if kept is None else "cut short") in str(error)
        assert error.next_step == "Download or save the checkpoint again."

    def test_an_index_that_is_none(self, sharded: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(sharded, tmp_path / "bert"))
        (folder / "model.safetensors.index.json").write_text("{")
        assert "model.safetensors.index.json is not a list of shards" in str(refusal(folder))


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with its own modeling file, which leaves a trace when it is run; transformers' copies go elsewhere."""
    modules, path = set(sys.modules), list(sys.path)
    for place in ("transformers.dynamic_module_utils", "transformers.utils.hub", "transformers.utils"):
        if hasattr(sys.modules.get(place), "HF_MODULES_CACHE"):
            monkeypatch.setattr(f"{place}.HF_MODULES_CACHE", str(tmp_path / "copies"))
    monkeypatch.syspath_prepend(str(tmp_path / "written"))
    (tmp_path / "written").mkdir()
    code = tmp_path / "written" / "counting_model.py"
    code.write_text(dedent(CODE))
    import counting_model  # type: ignore[import-not-found]

    counting_model.CountingConfig.register_for_auto_class()
    counting_model.CountingClassifier.register_for_auto_class("AutoModelForSequenceClassification")
    folder = tmp_path / "counting"
    counting_model.CountingClassifier(counting_model.CountingConfig(num_labels=3)).save_pretrained(folder)
    tiny_models.write_tokenizer(folder, token_types=False)
    copy = folder / "counting_model.py"
    copy.write_text(f"import pathlib\npathlib.Path({os.fspath(tmp_path / 'it-ran')!r}).touch()\n" + copy.read_text())
    yield folder
    for name in set(sys.modules) - modules:
        if name.startswith(("counting_model", "transformers_modules")):
            del sys.modules[name]
    sys.path[:] = path


class TestOwnCode:
    def test_it_is_not_run_unless_it_is_trusted(self, own_code: Path) -> None:
        error = refusal(own_code)
        assert str(error) == "counting needs the Python code in its folder to load"
        assert "--trust-remote-code" in error.next_step
        assert not (own_code.parent / "it-ran").exists()

    def test_with_trust_it_is_exported_for_the_task_of_its_class(self, own_code: Path, tmp_path: Path) -> None:
        exported = sources.load(str(own_code), settings=ExportSettings(trust_remote_code=True))
        assert (own_code.parent / "it-ran").exists()
        assert exported.task == "text-classification"
        assert exported.source.architecture == "CountingClassifier"
        assert [spec.name for spec in exported.signature.inputs] == ["input_ids", "attention_mask"]
        assert exported.tokenize is not None
        assert exported.reference is not None
        feeds = exported.tokenize(["the cat", "a dog sat"])
        got = tiny_models.run(tiny_models.session(exported, tmp_path), feeds)
        np.testing.assert_allclose(got["logits"], exported.reference.run(feeds)["logits"], atol=1e-6)

# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx.parser
import pytest
import tiny_models
from huggingface_hub import errors as hub_errors

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import ExportSettings, sources

TEXT_MODEL = """
<ir_version: 8, opset_import: ["": 18]>
main (int64[N, S] attention_mask, INT[N, S] input_ids) => (float[N, S] logits)
{ ids = Cast<to = 1>(input_ids)  mask = Cast<to = 1>(attention_mask)  logits = Mul(ids, mask) }
"""


def text_model(path: Path, text: str = TEXT_MODEL, dtype: str = "int64") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(onnx.parser.parse_model(text.replace("INT", dtype)).SerializeToString())
    return path


def refusal(source: str, **more: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        sources.load(source, **more)
    assert caught.value.next_step
    assert caught.value.exit_code == 2
    return caught.value


class TestPaths:
    @pytest.mark.parametrize(
        ("wanted", "suggested"),
        [
            ("modles/bert", "models"),
            ("models/brt", "models/bert"),
            ("models/brt/onnx/model.onnx", "models/bert"),
            ("models/bert/modle.onnx", "models/bert/model.onnx"),
        ],
    )
    def test_misspelt(self, wanted: str, suggested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text_model(tmp_path / "models/bert/model.onnx")
        (tmp_path / "models/.brt").mkdir()
        monkeypatch.chdir(tmp_path)
        assert refusal(wanted).next_step == f"Did you mean '{suggested}'?"
        assert refusal(str(tmp_path / wanted)).next_step == f"Did you mean '{tmp_path / suggested}'?"

    def test_nothing_similar(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        error = refusal("./nothing.onnx")
        assert "no such file or folder: nothing.onnx" in str(error)
        assert error.next_step == "Check the path."
        assert refusal("/no/such/folder/at/all").next_step

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.pkl"])
    def test_pickles_are_not_opened(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"cos\nsystem\n")
        assert "unpickled, which can run any code" in str(refusal(str(tmp_path / name)))

    def test_other_files_and_empty_folders(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").touch()
        assert "is no source that onnxpress knows" in str(refusal(str(tmp_path / "model.gguf")))
        assert "has no config.json" in str(refusal(str(tmp_path)))
        (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and no more")
        assert "model.gguf is cut short or damaged" in str(refusal(str(tmp_path / "model.gguf")))

    @pytest.mark.parametrize("name", ["mod el.onnx", "modèle-模型.onnx", "a'b\"c.onnx", "[x] {y}.onnx", "-o.onnx"])
    def test_names_with_odd_characters(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text_model(tmp_path / name)
        monkeypatch.chdir(tmp_path)
        assert sources.load(name).source.name == name

    def test_the_name_is_the_folders_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "my-model").mkdir()
        monkeypatch.chdir(tmp_path / "my-model")
        monkeypatch.setattr(
            "onnxpress.exporters.transformers_source.export_folder", lambda folder, name, task, settings: name
        )
        assert sources.load(".") == "my-model"


class TestHub:
    def test_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        error = refusal("no-such-owner/no-such-model")
        assert "neither cached nor reachable" in str(error)

    def test_a_path_that_looks_like_an_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models/bert").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert refusal("models/brt").next_step == "Did you mean 'models/bert'?"

    def test_revision_and_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def download(name: str, **options: Any) -> str:
            asked.update(options, name=name)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(
            "onnxpress.exporters.transformers_source.export_folder", lambda folder, name, task, settings: (folder, name)
        )
        monkeypatch.chdir(tmp_path)
        loaded: Any = sources.load("owner/model@v1.0/x")
        assert loaded == (tmp_path, "owner/model@v1.0/x")
        assert (asked["name"], asked["revision"]) == ("owner/model", "v1.0/x")
        assert not any(
            pattern.endswith((".bin", ".pt", ".py", "*")) and pattern != "1_Pooling/*"
            for pattern in asked["allow_patterns"]
        )
        sources.load("owner/model")
        assert asked["revision"] is None
        assert "*.py" not in asked["allow_patterns"]
        sources.load("owner/model", settings=ExportSettings(trust_remote_code=True))
        assert "*.py" in asked["allow_patterns"]
        assert sources.folder_of("owner/model") == tmp_path
        assert sources.folder_of(str(tmp_path)) == tmp_path

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (hub_errors.RepositoryNotFoundError, "no model 'owner/model' on the hub"),
            (hub_errors.GatedRepoError, "no model 'owner/model' on the hub"),
            (hub_errors.RevisionNotFoundError, "has no revision 'v9'"),
            (hub_errors.HfHubHTTPError, "neither cached nor reachable"),
            (hub_errors.OfflineModeIsEnabled, "neither cached nor reachable"),
            (TimeoutError, "neither cached nor reachable"),
        ],
    )
    def test_what_the_hub_answers(
        self, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def download(name: str, **options: Any) -> str:
            raise error.__new__(error)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        assert said in str(refusal("owner/model@v9"))

    def test_no_valid_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "no model" in str(refusal("owner--x/model..y"))


class TestOnnx:
    def test_plain(self, tmp_path: Path) -> None:
        path = text_model(tmp_path / "model.onnx")
        loaded = sources.load(str(path))
        assert loaded.task == "generic"
        assert loaded.reference is loaded.tokenize is loaded.max_length is loaded.id2label is None
        assert loaded.processor_files == {}
        assert loaded.original_file == path
        assert loaded.source.to_json() == {
            "kind": "onnx",
            "name": "model.onnx",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "architecture": "main",
            "parameters": 0,
        }

    def test_task_is_checked(self, tmp_path: Path) -> None:
        path = str(text_model(tmp_path / "model.onnx"))
        assert sources.load(path, task="fill-mask").task == "fill-mask"
        assert "Did you mean 'fill-mask'?" in refusal(path, task="fillmask").next_step

    @pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
    @pytest.mark.parametrize("dtype", ["int64", "int32"])
    def test_processor_files_beside_it_or_above_onnx(self, place: str, dtype: str, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        config = {"model_type": "roberta", "max_position_embeddings": 42, "pad_token_id": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = sources.load(str(text_model(tmp_path / place, dtype=dtype)))
        assert set(loaded.processor_files) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
        assert loaded.max_length == 40
        assert loaded.tokenize is not None
        feeds = loaded.tokenize(["the cat", "a dog sat"])
        assert list(feeds) == ["attention_mask", "input_ids"]
        assert feeds["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
        assert feeds["input_ids"].dtype == dtype
        assert loaded.tokenize(["cat " * 90])["input_ids"].shape == (1, 40)

    def test_a_tokenizer_above_another_folder_is_not_taken(self, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        assert sources.load(str(text_model(tmp_path / "models/model.onnx"))).tokenize is None

    def test_without_a_config(self, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path, model_max_length=16)
        loaded = sources.load(str(text_model(tmp_path / "model.onnx")))
        assert loaded.tokenize is not None
        assert loaded.max_length == 16
        (tmp_path / "config.json").write_text("{")
        assert "config.json is not JSON" in str(refusal(str(tmp_path / "model.onnx")))

    @pytest.mark.parametrize(
        "change", [("input_ids", "pixels"), ("int64[N, S] attention_mask", "int64[2, 8] attention_mask")]
    )
    def test_a_graph_that_reads_no_text_of_any_length(self, change: tuple[str, str], tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        loaded = sources.load(str(text_model(tmp_path / "model.onnx", TEXT_MODEL.replace(*change))))
        assert loaded.tokenize is None
        assert loaded.processor_files

    def test_a_tokenizer_without_padding_takes_one_text_at_a_time(self, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path, pad_token=None)
        loaded = sources.load(str(text_model(tmp_path / "model.onnx")))
        assert loaded.tokenize is not None
        assert loaded.tokenize(["a cat"])["input_ids"].shape == (1, 4)
        with pytest.raises(InputError, match="no padding token"):
            loaded.tokenize(["a cat", "a"])
        with pytest.raises(InputError, match="no padding token"):
            loaded.tokenize(["a cat"], max_length=9)

    @pytest.mark.parametrize(
        ("labels", "classes", "task", "kept"),
        [
            ({"0": "no", "1": "yes"}, "2", None, True),
            ({"0": "no", "1": "yes"}, "384", None, False),
            ({"0": "no", "1": "yes"}, "S", None, False),
            ({"0": "no", "1": "yes"}, "S", "text-classification", True),
            ({"0": "no", "1": "yes"}, "2", "feature-extraction", False),
            ({}, "2", "text-classification", False),
        ],
    )
    def test_labels(self, labels: dict[str, str], classes: str, task: str | None, kept: bool, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
        model = TEXT_MODEL.replace("float[N, S] logits", f"float[N, {classes}] logits")
        loaded = sources.load(str(text_model(tmp_path / "model.onnx", model)), task=task)
        assert loaded.id2label == ({0: "no", 1: "yes"} if kept else None)

    def test_labels_of_another_kind(self, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        path = text_model(tmp_path / "model.onnx")
        for labels in (["no", "yes"], {"a": "b"}):
            (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
            assert "id2label" in str(refusal(str(path)))

    @pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
    def test_a_folder_that_optimum_wrote(self, place: str, tmp_path: Path) -> None:
        tiny_models.write_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": {"0": "no", "1": "yes"}}))
        (tmp_path / "ort_config.json").write_text("{}")
        text_model(tmp_path / place, TEXT_MODEL.replace("float[N, S] logits", "float[N, 2] logits"))
        loaded = sources.load(str(tmp_path))
        assert (loaded.source.kind, loaded.source.name) == ("onnx", "model.onnx")
        assert loaded.tokenize is not None
        assert loaded.id2label == {0: "no", 1: "yes"}
        assert loaded.original_file == tmp_path / place

    def test_a_folder_of_several_parts(self, tmp_path: Path) -> None:
        parts = ["decoder_model", "decoder_model_merged", "decoder_with_past_model", "encoder_model"]
        for part in parts:
            text_model(tmp_path / f"{part}.onnx")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
        error = refusal(str(tmp_path))
        assert f"holds 4 .onnx files: {', '.join(f'{part}.onnx' for part in parts)}" in str(error)
        assert error.next_step == f"Name one of them, such as {tmp_path / 'decoder_model.onnx'}."
        assert sources.load(str(tmp_path / "encoder_model.onnx")).source.name == "encoder_model.onnx"

    def test_beside_weights_a_graph_is_not_the_original(self, tmp_path: Path) -> None:
        text_model(tmp_path / "onnx/model.onnx")
        (tmp_path / "model.safetensors").touch()
        assert sources.form_of(str(tmp_path))[0] == "transformers"

    def test_what_was_exported_can_be_read_back(
        self, subject: Callable[[str], tiny_models.Subject], tmp_path: Path
    ) -> None:
        it = subject("roberta classes")
        folder = shutil.copytree(it.folder, tmp_path / "bundle")
        loaded = sources.load(str(folder / "model.onnx"))
        assert loaded.signature == it.exported.signature
        assert loaded.max_length == it.exported.max_length
        assert loaded.id2label == it.exported.id2label
        assert loaded.tokenize is not None
        assert it.exported.tokenize is not None
        np.testing.assert_array_equal(
            loaded.tokenize(["a cat"])["input_ids"], it.exported.tokenize(["a cat"])["input_ids"]
        )


class TestProbe:
    def probe(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "onnxpress.exporters.probe", *arguments, "--inputs", "inputs.npz"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)

    def test_transformers(self, tmp_path: Path) -> None:
        folder = tiny_models.build(tmp_path / "m", "distilbert", "AutoModel", n_layers=1)
        ids = np.ones((1, 4), np.int64)
        np.savez(tmp_path / "inputs.npz", input_ids=ids, attention_mask=ids)
        done = self.probe(tmp_path, str(folder), "--task", "feature-extraction", "--settings", '{"pooling": "mean"}')
        assert done.returncode == 0, done.stderr
        line = json.loads(done.stdout)
        assert set(line) == {"load_ms", "peak_rss_mb"}
        assert 0 < line["load_ms"] < 60_000
        assert 100 < line["peak_rss_mb"] < 2000

    def test_factory_in_bfloat16(self, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(
            "import torch\ndef make(): return torch.nn.Linear(1024, 65536), torch.randn(1, 1024)\n"  # 256 MiB
        )
        np.savez(tmp_path / "inputs.npz", input=np.ones((1, 1024), np.float32))
        done = self.probe(tmp_path, "mine:make", "--task", "generic", "--bfloat16")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["peak_rss_mb"] > 350

    def test_failure_is_one_line(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "inputs.npz", input=np.ones(1))
        done = self.probe(tmp_path, "no_such_module:make")
        assert done.returncode == 2
        assert done.stderr.strip() == "cannot import no_such_module Check the spelling and the folder you are in."

# SPDX-License-Identifier: Apache-2.0
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import SUBJECTS, Subject

from onnxpress.contracts.errors import ExportError, InputError
from onnxpress.contracts.tasks import TASKS
from onnxpress.exporters.graph_file import operator_counts
from onnxpress.exporters.settings import ExportSettings
from onnxpress.exporters.tokenizer import TextInputs, load_tokenizer
from onnxpress.exporters.transformers_source import export_folder, hash_weights, infer_task, load_reference

Get = Callable[[str], Subject]
SETTINGS = ExportSettings()

TOKEN_TYPES = {"bert sentences", "deberta-v2 pairs", "albert masks", "electra answers"}
OUTPUTS = {
    "bert sentences": {"sentence_embedding": ("batch", 32)},
    "mpnet cls": {"sentence_embedding": ("batch", 32)},
    "modernbert tokens": {"last_hidden_state": ("batch", "sequence", 32)},
    "roberta classes": {"logits": ("batch", 3)},
    "deberta-v2 pairs": {"logits": ("batch", 3)},
    "distilbert words": {"logits": ("batch", "sequence", 3)},
    "xlm-roberta words": {"logits": ("batch", "sequence", 3)},
    "albert masks": {"logits": ("batch", "sequence", tiny_models.VOCABULARY)},
    "electra answers": {"start_logits": ("batch", "sequence"), "end_logits": ("batch", "sequence")},
}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny_models.build(tmp_path / "bert", "bert", "AutoModelForSequenceClassification", num_hidden_layers=1)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(folder: Path, task: str | None = None, error: type[InputError | ExportError] = InputError) -> str:
    """The one line, with the next step, that a folder is refused with."""
    with pytest.raises(error) as caught:
        export_folder(folder, folder.name, task, SETTINGS)
    assert caught.value.next_step
    assert "Traceback" not in str(caught.value)
    return f"{caught.value} {caught.value.next_step}"


class TestGraph:
    @pytest.mark.parametrize("name", SUBJECTS)
    def test_onnx_runtime_agrees_with_pytorch(self, name: str, subject: Get) -> None:
        it = subject(name)
        longest = it.exported.max_length
        assert longest is not None
        for rows, length, padding in ((1, 1, "none"), (3, 17, "right"), (2, 9, "left"), (1, longest, "none")):
            feeds = tiny_models.batch(it.exported, rows, length, padding=padding)
            assert it.exported.reference is not None
            wanted, got = it.exported.reference.run(feeds), tiny_models.run(it.session, feeds)
            assert list(got) == list(wanted)
            for output in wanted:
                assert tiny_models.distance(wanted[output], got[output], feeds["attention_mask"]) < 1e-5, (rows, output)

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_reference_is_what_transformers_computes(self, name: str, subject: Get) -> None:
        import transformers

        it = subject(name)
        model = getattr(transformers, it.auto_class).from_pretrained(it.folder).eval()
        feeds = tiny_models.batch(it.exported, 3, 17, padding="right")
        with torch.no_grad():
            result = model(**{n: torch.from_numpy(a) for n, a in feeds.items()})
        assert it.exported.reference is not None
        got = it.exported.reference.run(feeds)
        if "sentence_embedding" not in got:
            for output, array in got.items():
                np.testing.assert_allclose(array, result[output].numpy(), atol=1e-6)
            return
        tokens, mask = result["last_hidden_state"].numpy(), feeds["attention_mask"][..., None]
        if name == "mpnet cls":
            wanted = tokens[:, 0]
        else:
            wanted = (tokens * mask).sum(1) / mask.sum(1)
            wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(got["sentence_embedding"], wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_names_and_axes(self, name: str, subject: Get) -> None:
        it = subject(name)
        signature = it.exported.signature
        third = ["token_type_ids"] if name in TOKEN_TYPES else []
        assert [s.name for s in signature.inputs] == ["input_ids", "attention_mask", *third]
        assert all(s.shape == ("batch", "sequence") and s.dtype == "int64" for s in signature.inputs)
        assert {s.name: s.shape for s in signature.outputs} == OUTPUTS[name]
        assert all(s.dtype == "float32" for s in signature.outputs)
        assert it.exported.task == infer_task(json.loads((it.folder / "config.json").read_text()), name).name

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_weights_keep_the_names_of_the_checkpoint(self, name: str, subject: Get) -> None:
        it = subject(name)
        reference: Any = it.exported.reference
        model: torch.nn.Module = reference.module.model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # Scalars that the model's own code makes while it is traced have no name there
        weights = {n: v for n, v in it.exported.model.graph.initializers.items() if "lifted_tensor" not in n}
        assert set(weights) <= set(tensors)
        for key, value in weights.items():
            assert value.const_value is not None
            np.testing.assert_array_equal(value.const_value.numpy(), tensors[key].detach().numpy())
        unused = [n for n, _ in model.named_parameters() if n not in weights]
        assert all("pooler" in n for n in unused), unused

    @pytest.mark.parametrize("name", SUBJECTS)
    def test_nothing_of_this_machine_is_in_the_file(self, name: str, subject: Get) -> None:
        it = subject(name)
        written = (it.folder / "model.onnx").read_bytes()
        for trace in (b"/work", b"/tmp", b"/home", b"site-packages", b".py", b"pkg.torch", b"stack_trace"):
            assert trace not in written, trace
        assert str(Path.home()).encode() not in written or Path.home() == Path("/")

    def test_attention_is_plain_and_a_tied_head_is_stored_once(self, subject: Get) -> None:
        albert = subject("albert masks").exported
        assert operator_counts(albert.model)["Softmax"] == 2
        assert "IsNaN" not in operator_counts(albert.model)
        tied = [n for n, v in albert.model.graph.initializers.items() if v.shape == (tiny_models.VOCABULARY, 16)]
        assert tied == ["albert.embeddings.word_embeddings.weight"]

    def test_attention_within_a_window_keeps_its_own_mask(self, subject: Get) -> None:
        """With a ready mask, every token would see all others: right at length 7, wrong beyond the window."""
        assert subject("modernbert tokens").exported.export_details["mask"] == "as the model builds it"
        assert subject("roberta classes").exported.export_details["mask"] == "broadcast"

    @pytest.mark.parametrize("opset", [18, 23])
    def test_opset_is_honoured(self, opset: int, bert: Path) -> None:
        exported = export_folder(bert, "bert", None, ExportSettings(opset=opset))
        assert exported.model.opset_imports == {"": opset}
        assert exported.export_details["opset"] == opset
        session = tiny_models.session(exported, bert)
        assert exported.reference is not None
        feeds = tiny_models.batch(exported, 3, 17, padding="right")
        got, wanted = tiny_models.run(session, feeds), exported.reference.run(feeds)
        assert tiny_models.distance(wanted["logits"], got["logits"]) < 1e-5

    @pytest.mark.parametrize("opset", [17, 25, 0])
    def test_other_opsets_are_refused(self, opset: int) -> None:
        with pytest.raises(ValueError):
            ExportSettings(opset=opset)

    def test_what_is_said_about_the_source(self, subject: Get) -> None:
        it = subject("roberta classes")
        source = it.exported.source.to_json()
        assert source["kind"] == "transformers"
        assert source["architecture"] == "RobertaForSequenceClassification"
        assert source["sha256"] == hash_weights(it.folder)
        assert source["parameters"] > 1000
        assert str(it.folder.parent) not in json.dumps(source)
        assert set(it.exported.processor_files) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
        assert it.exported.fixed_inputs is None
        assert it.exported.export_details["backend"] == "dynamo"


class TestTokenizer:
    def test_pairs_carry_token_types(self, subject: Get) -> None:
        tokenize = subject("deberta-v2 pairs").exported.tokenize
        assert tokenize is not None
        feeds = tokenize(["the cat", "a dog"], ["good", "was bad ."])
        assert list(feeds) == ["input_ids", "attention_mask", "token_type_ids"]
        assert feeds["input_ids"].shape == (2, 8)
        assert feeds["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
        assert all(a.dtype == np.int64 for a in feeds.values())

    def test_padding_and_truncation(self, subject: Get) -> None:
        exported = subject("roberta classes").exported
        assert exported.max_length == 39  # 40 positions, the first of which belongs to padding
        tokenize = exported.tokenize
        assert tokenize is not None
        assert tokenize(["cat " * 100])["input_ids"].shape == (1, 39)
        assert tokenize(["cat"], max_length=12)["input_ids"].shape == (1, 12)
        assert tokenize(["cat"], max_length=12)["attention_mask"].sum() == 3
        assert tokenize(["cat"], max_length=1000)["input_ids"].shape == (1, 39)
        assert tokenize([""])["input_ids"].shape == (1, 2)
        assert list(tokenize(["cat"])) == ["input_ids", "attention_mask"]

    def test_words_give_the_position_of_their_first_token(self, subject: Get) -> None:
        tokenize = subject("distilbert words").exported.tokenize
        assert tokenize is not None
        feeds, firsts = tokenize.words([["the", "cats", "sat"], ["dog"], []])
        assert firsts == [[1, 2, 4], [1], []]
        assert feeds["input_ids"].shape == (3, 6)
        _, firsts = tokenize.words([["cat"] * 60])
        assert firsts[0][37:] == [38, *[None] * 22]

    @pytest.mark.parametrize("prefix_space", [False, True])
    def test_words_of_a_byte_level_tokenizer_keep_their_spaces(self, prefix_space: bool, tmp_path: Path) -> None:
        tiny_models.write_byte_tokenizer(tmp_path, prefix_space=prefix_space)
        tokenize = TextInputs(load_tokenizer(tmp_path), {"input_ids": "int64"}, None)
        feeds, firsts = tokenize.words([["the", "cat", "sat"], ["dog"]])
        np.testing.assert_array_equal(feeds["input_ids"][:1], tokenize(["the cat sat"])["input_ids"])
        assert firsts == [[0, 1, 2], [0]]

    def test_a_model_without_a_tokenizer_reads_arrays(self, tmp_path: Path) -> None:
        folder = tiny_models.build(tmp_path / "m", "distilbert", "AutoModel", tokenizer=False, n_layers=1)
        exported = export_folder(folder, "m", None, SETTINGS)
        assert exported.tokenize is None
        assert [s.name for s in exported.signature.inputs] == ["input_ids", "attention_mask"]
        assert exported.id2label is None

    def test_broken_tokenizer(self, bert: Path) -> None:
        (bert / "tokenizer.json").write_text("{")
        assert "cannot load the tokenizer of bert" in refusal(bert)

    def test_labels(self, subject: Get) -> None:
        assert subject("roberta classes").exported.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert subject("electra answers").exported.id2label is None


class TestTask:
    @pytest.mark.parametrize(
        ("architecture", "task"),
        [
            ("BertModel", "feature-extraction"),
            ("MPNetModel", "feature-extraction"),
            ("RobertaForSequenceClassification", "text-classification"),
            ("DistilBertForTokenClassification", "token-classification"),
            ("ElectraForQuestionAnswering", "question-answering"),
            ("ModernBertForMaskedLM", "fill-mask"),
            ("GPT2LMHeadModel", "text-generation"),
            ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
            ("Wav2Vec2ForCTC", "automatic-speech-recognition"),
            ("T5ForConditionalGeneration", "text2text-generation"),
            ("ViTForImageClassification", "image-classification"),
        ],
    )
    def test_inferred_from_the_class(self, architecture: str, task: str) -> None:
        assert infer_task({"architectures": [architecture]}, "m") is TASKS[task]

    @pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], [3], ["logging"], "BertModel"])
    def test_cannot_tell(self, architectures: Any) -> None:
        with pytest.raises(InputError, match="cannot tell the task of m") as caught:
            infer_task({"architectures": architectures}, "m")
        assert "--task" in caught.value.next_step

    @pytest.mark.parametrize("architecture", ["SpeechT5ForTextToSpeech", "BertForNextSentencePrediction"])
    def test_not_supported_yet(self, architecture: str) -> None:
        with pytest.raises(InputError, match="cannot be exported yet"):
            infer_task({"architectures": [architecture]}, "m")

    def test_a_head_without_weights_is_named(self, tmp_path: Path) -> None:
        folder = tiny_models.build(tmp_path / "m", "distilbert", "AutoModel", n_layers=1)
        said = refusal(folder, "text-classification")
        assert "no weights for text-classification: classifier.bias" in said
        assert "--task" in said

    def test_unknown_task_suggests(self, bert: Path) -> None:
        assert "Did you mean 'text-classification'?" in refusal(bert, "text-clasification")

    def test_a_model_whose_inputs_are_not_known(self, tmp_path: Path) -> None:
        import transformers

        config = transformers.DecisionTransformerConfig(state_dim=3, act_dim=2, hidden_size=8, n_layer=1, n_head=2)
        transformers.DecisionTransformerModel(config).save_pretrained(tmp_path / "m")
        assert "reads 'states', for which no example can be made here" in refusal(
            tmp_path / "m", "feature-extraction", ExportError
        )


class TestBrokenFolders:
    def test_no_config(self, bert: Path) -> None:
        (bert / "config.json").unlink()
        assert "bert has no config.json" in refusal(bert)

    @pytest.mark.parametrize("text", ["{", "[]", "\x00"])
    def test_broken_config(self, text: str, bert: Path) -> None:
        (bert / "config.json").write_text(text)
        assert "bert/config.json is not" in refusal(bert)

    @pytest.mark.parametrize("model_type", ["no-such-model", ...])
    def test_unknown_model_type(self, model_type: Any, bert: Path) -> None:
        edit_config(bert, model_type=model_type)
        assert "cannot load bert" in refusal(bert)

    def test_code_in_the_folder_is_not_run(self, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        trace = tmp_path / "ran"
        (bert / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
        mapping = {
            "AutoConfig": "own.C",
            "AutoModelForSequenceClassification": "own.M",
            "AutoTokenizer": ["own.T", None],
        }
        edit_config(bert, model_type="own-model", auto_map=mapping)
        assert "needs the Python code in its folder" in refusal(bert)
        assert not trace.exists()
        assert sys.stdin.tell() == 0

    def test_no_weights(self, bert: Path) -> None:
        (bert / "model.safetensors").unlink()
        assert "bert holds no weights" in refusal(bert)

    def test_a_plain_pickled_state_dict_loads(self, bert: Path) -> None:
        from safetensors.torch import load_file

        wanted = load_reference(bert, None, SETTINGS)
        torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
        (bert / "model.safetensors").unlink()
        assert hash_weights(bert)
        got = load_reference(bert, None, SETTINGS)
        feeds = {n: np.ones((1, 3), np.int64) for n in wanted.input_names}
        np.testing.assert_allclose(got.run(feeds)["logits"], wanted.run(feeds)["logits"], atol=1e-6)

    def test_a_pickle_with_code_is_not_run(self, bert: Path, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "attacked",)

        (bert / "model.safetensors").unlink()
        torch.save({"weight": Attack()}, bert / "pytorch_model.bin")
        assert "unpickled, which can run any code" in refusal(bert)
        assert not (tmp_path / "attacked").exists()

    @pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
    def test_truncated_weights(self, keep: float, bert: Path) -> None:
        file = bert / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
        assert "cannot load bert" in refusal(bert)

    def test_weights_of_another_size(self, bert: Path) -> None:
        edit_config(bert, intermediate_size=41)
        wanted = "bert: bert.encoder.layer.0.intermediate.dense.bias is [37] in the weights, but [41] by config.json"
        assert wanted in refusal(bert)

    def test_missing_shard(self, bert: Path) -> None:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
        (bert / "model.safetensors").unlink()
        model.save_pretrained(bert, max_shard_size="10KB")
        shards = sorted(bert.glob("*.safetensors"))
        assert len(shards) > 2
        load_reference(bert, None, SETTINGS)
        shards[1].unlink()
        assert "model-00002-of" in refusal(bert)

    def test_a_model_that_fails_in_pytorch(self, tmp_path: Path) -> None:
        """Three labels where question answering unpacks two."""
        folder = tiny_models.build(tmp_path / "m", "electra", "AutoModelForQuestionAnswering", num_hidden_layers=1)
        said = refusal(folder)
        assert "fails in PyTorch already: ValueError: too many values" in said
        assert "modeling_electra.py line" in said


class TestHash:
    def test_stable_and_sensitive(self, bert: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(bert, tmp_path / "elsewhere")
        first = hash_weights(bert)
        assert first == hash_weights(copy)
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (copy / "model.safetensors").write_bytes(data)
        assert first != hash_weights(copy)
        assert hash_weights(tmp_path) is None

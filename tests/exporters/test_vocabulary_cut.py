# SPDX-License-Identifier: Apache-2.0
"""Every file beside a model after its vocabulary was cut: new ids everywhere, nothing of the old ones left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import SPECIAL, text_of
from tokenizers import Tokenizer, processors

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import Signature
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.exporters.tokenizer import TextInputs, load_tokenizer, processor_files
from onnxpress.exporters.vocabulary import Vocabulary, read_vocabulary
from onnxpress.exporters.vocabulary_cut import cut_exported, cut_files, cut_tokenizer

NAMED = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def write_folder(folder: Path, name: str, **others: Any) -> dict[str, Path]:
    """A folder with one of the tiny tokenizers, in which the special tokens come last among the ids it is asked for."""
    folder.mkdir()
    vocabulary = Vocabulary(text_of(name))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    config["added_tokens_decoder"] = {
        str(vocabulary.ids[token]): {"content": token, "special": True} for token in SPECIAL
    }
    files = {"tokenizer.json": vocabulary.data, "tokenizer_config.json": config, **others}
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, "utf-8")
    return processor_files(folder)


def kept_ids(files: dict[str, Path], *words: str) -> list[int]:
    vocabulary = read_vocabulary(files)
    return sorted(vocabulary.closed(vocabulary.ids[word] for word in words))


def as_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_word_piece_files(tmp_path: Path) -> None:
    ids = Vocabulary(text_of("WordPiece")).ids
    lines = "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__))
    config = {"model_type": "bert", "vocab_size": 500, "type_vocab_size": 2, "pad_token_id": 0, "eos_token_id": 9999}
    config["text_config"] = {"vocab_size": 500, "sep_token_id": ids["[SEP]"]}
    generation = {"eos_token_id": [ids["[SEP]"], ids["the"]], "suppress_tokens": [ids["cat"], ids["other"]]}
    special_map = {"unk_token": "[UNK]"}
    files = write_folder(
        tmp_path / "whole",
        "WordPiece",
        **{"vocab.txt": lines, "config.json": config, "generation_config.json": generation},
        **{"special_tokens_map.json": special_map, "added_tokens.json": {"[MASK]": ids["[MASK]"]}},
    )
    kept = kept_ids(files, "cat")
    cut = cut_files(files, kept, tmp_path / "cut")
    new = {old: number for number, old in enumerate(kept)}
    assert set(cut) == set(files)
    written = Vocabulary(cut["tokenizer.json"].read_text("utf-8"))
    assert written.ids == {token: new[number] for token, number in ids.items() if number in new}
    assert "other" not in written.ids
    assert cut["tokenizer.json"].stat().st_size < files["tokenizer.json"].stat().st_size
    assert cut["vocab.txt"].read_text("utf-8").split("\n")[:-1] == sorted(written.ids, key=written.ids.__getitem__)
    found = as_json(cut["config.json"])
    assert found["vocab_size"] == found["text_config"]["vocab_size"] == len(kept)
    assert (found["type_vocab_size"], found["pad_token_id"], found["eos_token_id"]) == (2, 0, None)
    assert found["text_config"]["sep_token_id"] == written.ids["[SEP]"]
    assert as_json(cut["generation_config.json"]) == {
        "eos_token_id": [written.ids["[SEP]"], written.ids["the"]],
        "suppress_tokens": [written.ids["cat"]],
    }
    assert as_json(cut["special_tokens_map.json"]) == special_map
    assert as_json(cut["added_tokens.json"]) == {"[MASK]": written.ids["[MASK]"]}


def test_byte_pair_files(tmp_path: Path) -> None:
    whole = Vocabulary(text_of("BPE, bytes"))
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in whole.model["merges"])
    files = write_folder(
        tmp_path / "whole",
        "BPE, bytes",
        **{"vocab.json": whole.model["vocab"], "merges.txt": merges, "tokenizer.model": "x"},
    )
    cut = cut_files(files, kept_ids(files, "Ġtheatre", "Ġcat"), tmp_path / "cut")
    assert "tokenizer.model" not in cut, "it would still hold every token"
    model = as_json(cut["tokenizer.json"])["model"]
    assert as_json(cut["vocab.json"]) == model["vocab"]
    assert 0 < len(model["merges"]) < len(whole.model["merges"])
    assert cut["merges.txt"].read_text("utf-8").split("\n") == [
        "#version: 0.2", *(f"{left} {right}" for left, right in model["merges"]), ""
    ]  # fmt: skip
    assert all({left, right, left + right} <= set(model["vocab"]) for left, right in model["merges"])
    tokenizer = Tokenizer.from_file(str(cut["tokenizer.json"]))
    assert tokenizer.token_to_id("<extra>") == len(model["vocab"])
    assert tokenizer.encode("a<extra>").tokens == ["[CLS]", "a", "<extra>", "[SEP]"]


def test_transformers_reads_the_cut_folder_as_before(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "whole", "Unigram")
    signature, source = Signature((), ()), SourceInfo("transformers", "whole", None, None, None)
    tokenize = TextInputs(load_tokenizer(tmp_path / "whole"), {"input_ids": "int64", "attention_mask": "int64"}, 20)
    exported = ExportedModel(None, signature, "x", source, processor_files=files, tokenize=tokenize)  # type: ignore[arg-type]
    before = tokenize(["the cat sat", "a theatre"])
    kept = kept_ids(files)
    kept = sorted({*kept, *before["input_ids"].ravel().tolist()})
    pressed = cut_exported(exported, kept, tmp_path / "cut")
    assert exported.processor_files == files
    assert pressed.tokenize is not None
    after = pressed.tokenize(["the cat sat", "a theatre"])
    assert [[kept[n] for n in row] for row in after["input_ids"].tolist()] == before["input_ids"].tolist()
    assert after["attention_mask"].tolist() == before["attention_mask"].tolist()
    assert pressed.tokenize(["the theatre " * 20])["input_ids"].shape == (1, 20)
    assert len(pressed.tokenize.tokenizer) == len(kept)  # type: ignore[attr-defined]


def test_a_token_that_only_transformers_knows_is_refused(tmp_path: Path) -> None:
    """It would be given the id behind the last row of the cut embedding."""
    files = write_folder(tmp_path / "whole", "Unigram")
    settings = as_json(files["tokenizer_config.json"])
    files["tokenizer_config.json"].write_text(json.dumps({**settings, "mask_token": "<new>"}), "utf-8")
    tokenize = TextInputs(load_tokenizer(tmp_path / "whole"), {"input_ids": "int64"}, 20)
    source = SourceInfo("transformers", "whole", None, None, None)
    exported = ExportedModel(None, Signature((), ()), "x", source, processor_files=files, tokenize=tokenize)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="transformers finds") as caught:
        cut_exported(exported, kept_ids(files), tmp_path / "cut")
    assert "save_pretrained" in caught.value.next_step


@pytest.mark.parametrize("maker", [processors.BertProcessing, processors.RobertaProcessing])
def test_the_other_post_processors_and_padding(maker: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(text_of("WordPiece"))
    # A pad token that is not among the first ids has to move
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("there"), pad_token="there")
    sides = [(token, tokenizer.token_to_id(token)) for token in ("town", "best")]
    tokenizer.post_processor = processors.Sequence([maker(*sides), processors.ByteLevel()])
    vocabulary = Vocabulary(tokenizer.to_str())
    kept = sorted(vocabulary.essential())
    assert {number for _, number in sides} < set(kept)
    smaller = Tokenizer.from_str(json.dumps(cut_tokenizer(vocabulary, {old: new for new, old in enumerate(kept)})))
    before, after = tokenizer.encode_batch(["a", "a b c"]), smaller.encode_batch(["a", "a b c"])
    assert [[kept[number] for number in row.ids] for row in after] == [row.ids for row in before]
    assert after[0].tokens[-1] == "there"


def test_merges_of_older_files_are_text(tmp_path: Path) -> None:
    data = json.loads(text_of("BPE, ends"))
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    vocabulary = Vocabulary(json.dumps(data))
    kept = sorted(vocabulary.closed({vocabulary.ids["the</w>"]}))
    cut = cut_tokenizer(vocabulary, {old: new for new, old in enumerate(kept)})
    assert Tokenizer.from_str(json.dumps(cut)).encode("the", add_special_tokens=False).tokens == ["the</w>"]


def test_a_special_token_cannot_be_left_out() -> None:
    vocabulary = Vocabulary(text_of("WordPiece"))
    kept = sorted(vocabulary.essential() - {vocabulary.ids["[MASK]"]})
    with pytest.raises(InputError, match=r"cannot do without '\[MASK\]'"):
        cut_tokenizer(vocabulary, {old: new for new, old in enumerate(kept)})


def test_a_post_processor_with_an_id_of_no_token_is_refused() -> None:
    data = json.loads(text_of("WordPiece"))
    data["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [100_000]
    vocabulary = Vocabulary(json.dumps(data))
    new_ids = {old: new for new, old in enumerate(sorted(vocabulary.essential()))}
    with pytest.raises(InputError, match=r"post_processor names id 100000, which no token has"):
        cut_tokenizer(vocabulary, new_ids)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    files = write_folder(tmp_path / "whole", "WordPiece", **{"config.json": "{", "added_tokens.json": "[]"})
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        read_vocabulary(files)

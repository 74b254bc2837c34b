# SPDX-License-Identifier: Apache-2.0
"""What a part of a vocabulary must hold: texts of kept tokens are read as before, all others are still read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import MAKERS, SENTENCES, text_of
from tokenizers import Tokenizer

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.vocabulary import Vocabulary, read_vocabulary
from onnxpress.exporters.vocabulary_cut import cut_tokenizer

every_tokenizer = pytest.mark.parametrize("name", MAKERS)
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
texts = st.one_of(
    st.lists(st.sampled_from([*WORDS, "thethe", "bananabanana", "aaaaaaa", "zebra", "🦓", "[SEP]"]), max_size=6).map(
        " ".join
    ),
    st.text("abnthes 'ï他é,x\n", max_size=24),
)


@cache
def whole(name: str) -> tuple[Vocabulary, Tokenizer]:
    return Vocabulary(text_of(name)), Tokenizer.from_str(text_of(name))


def cut(vocabulary: Vocabulary, wanted: set[int]) -> tuple[Tokenizer, list[int]]:
    """The tokenizer over what has to stay for `wanted`, and the old id of each of its ids."""
    kept = sorted(vocabulary.closed(wanted))
    data = cut_tokenizer(vocabulary, {old: new for new, old in enumerate(kept)})
    return Tokenizer.from_str(json.dumps(data)), kept


@every_tokenizer
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_texts_of_kept_tokens_are_read_as_before(name: str, data: st.DataObject) -> None:
    vocabulary, tokenizer = whole(name)
    text = data.draw(texts)
    before = tokenizer.encode(text)
    others = data.draw(st.sets(st.sampled_from(sorted(vocabulary.ids.values())), max_size=12))
    smaller, kept = cut(vocabulary, {*before.ids, *others})
    after = smaller.encode(text)
    if vocabulary.kind == "WordPiece" and vocabulary.unknown in before.ids:
        return  # a word that the whole vocabulary cannot read may be readable in other pieces
    assert [kept[number] for number in after.ids] == before.ids
    assert after.tokens == before.tokens
    assert after.offsets == before.offsets


@every_tokenizer
@settings(max_examples=20, deadline=None)
@given(text=texts, pair=texts)
def test_every_other_text_is_still_read(name: str, text: str, pair: str) -> None:
    vocabulary, tokenizer = whole(name)
    smaller, kept = cut(vocabulary, set())
    assert len(kept) < len(vocabulary.ids)
    after, before = smaller.encode(text, pair), tokenizer.encode(text, pair)
    assert after.tokens[0] == before.tokens[0]
    assert max(after.ids) < len(kept)
    if name.startswith("BPE, bytes"):
        assert smaller.decode(after.ids) == tokenizer.decode(before.ids), "bytes can write any text"


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("WordLevel",)])
def test_single_characters_are_enough_for_known_scripts(name: str) -> None:
    vocabulary, tokenizer = whole(name)
    smaller, kept = cut(vocabulary, set())
    text = "the other cats theatre"
    assert vocabulary.unknown not in [kept[number] for number in smaller.encode(text).ids]
    assert len(smaller.encode(text).ids) > len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("name", ["BPE, bytes", "BPE, ends", "BPE, continued"])
def test_ancestors_are_those_that_merging_makes(name: str) -> None:
    """Some merge makes every kept token out of two kept ones, down to single characters."""
    vocabulary, _ = whole(name)
    prefix = vocabulary.model.get("continuing_subword_prefix") or ""
    merged = 0
    for token in vocabulary.ids:
        closed = vocabulary.closed({vocabulary.ids[token]})
        parts = [
            (left, right)
            for left, right in map(tuple, vocabulary.model["merges"])
            if left + right.removeprefix(prefix) == token
        ]
        if not parts:
            continue
        merged += 1
        assert any(vocabulary.ids[left] in closed and vocabulary.ids[right] in closed for left, right in parts)
    assert merged > 20


def test_nothing_is_kept_without_need() -> None:
    vocabulary, _ = whole("BPE, bytes")
    names = {number: token for token, number in vocabulary.ids.items()}
    closed = {names[number] for number in vocabulary.closed({vocabulary.ids["Ġtheatre"]})}
    longer = {token for token in closed if len(token) > 1 and not token.startswith(("[", "<"))}
    assert "Ġtheatre" in longer
    assert all(token in "Ġtheatre" for token in longer)
    assert "cat" not in longer


def test_essential_tokens_of_every_kind() -> None:
    names = {name: set(whole(name)[0].ids) & _names(whole(name)[0], whole(name)[0].essential()) for name in MAKERS}
    for name, kept in names.items():
        assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= kept, name
    assert {"t", "##t", "他"} <= names["WordPiece"]
    assert "the" not in names["WordPiece"]
    assert len([token for token in names["BPE, bytes"] if len(token) == 1]) == 256
    assert "<extra>" in names["BPE, bytes"]
    assert {"t", "t</w>"} <= names["BPE, ends"]
    assert {"t", "##t"} <= names["BPE, continued"]
    assert {"▁", "t"} <= names["Unigram"]
    assert "the" not in names["WordLevel"]


def _names(vocabulary: Vocabulary, numbers: set[int]) -> set[str]:
    return {token for token, number in vocabulary.ids.items() if number in numbers}


def test_the_lowest_score_of_unigram_stays_since_unknown_characters_cost_it() -> None:
    pieces = [["[UNK]", 0.0], ["a", -2.0], ["b", -2.5], ["ab", -3.0], ["axb", -14.0], ["seldom", -20.0]]
    text = json.dumps({**json.loads(text_of("Unigram")), "added_tokens": [], "post_processor": None})
    data = json.loads(text)
    data["model"] |= {"vocab": pieces, "unk_id": 0}
    vocabulary = Vocabulary(json.dumps(data))
    assert 5 in vocabulary.essential()
    tokenizer = Tokenizer.from_str(json.dumps(data))
    smaller, _ = cut(vocabulary, set(tokenizer.encode("axb").ids))
    assert smaller.encode("axb").tokens == tokenizer.encode("axb").tokens


def test_bytes_stand_for_characters_that_have_no_token() -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {token: 256 + i for i, token in enumerate(["<unk>", "a", "b", "ab", "aba"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b", "ab a"], "unk_token": "<unk>", "byte_fallback": True}
    data = {"version": "1.0", "added_tokens": [], "model": model}
    vocabulary, tokenizer = Vocabulary(json.dumps(data)), Tokenizer.from_str(json.dumps(data))
    assert {*range(256), vocab["<unk>"], vocab["a"]} <= vocabulary.essential()
    smaller, kept = cut(vocabulary, {vocab["aba"]})
    assert vocab["ab"] in kept
    assert smaller.encode("abaé").tokens == tokenizer.encode("abaé").tokens == ["aba", "<0xC3>", "<0xA9>"]
    smaller, kept = cut(vocabulary, {vocab["ab"]})
    assert vocab["aba"] not in kept
    assert smaller.encode("abaé").tokens == ["ab", "a", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}, "has no unknown token"),
        ({"model": {"type": "Mystery", "vocab": {}}}, "cannot be read"),
        ({"model": None}, "cannot be read"),
    ],
)
def test_tokenizers_that_cannot_be_cut_are_refused(change: dict[str, Any], message: str) -> None:
    data = {**json.loads(text_of("WordLevel")), "added_tokens": [], "post_processor": None, **change}
    with pytest.raises(InputError, match=message):
        Vocabulary(json.dumps(data))


def test_a_binary_of_sentencepiece_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(InputError, match=r"only tokenizer.model lies beside the model") as caught:
        read_vocabulary({"tokenizer.model": tmp_path / "tokenizer.model"})
    assert "save_pretrained" in caught.value.next_step
    with pytest.raises(InputError, match=r"no tokenizer.json lies"):
        read_vocabulary({})


def test_what_a_configuration_mentions_stays(tmp_path: Path) -> None:
    vocabulary, _ = whole("WordLevel")
    words = ["theatre", "town", "best", "northern", "hats"]
    theatre, town = (vocabulary.ids[word] for word in words[:2])
    (tmp_path / "tokenizer.json").write_text(text_of("WordLevel"), "utf-8")
    config = {"pad_token_id": 0, "eos_token_id": [3, theatre], "sep_token_id": None, "text": {"bos_token_id": town}}
    tokenizer = {"mask_token": {"content": "best"}, "extra_special_tokens": ["northern"], "eos_token": None}
    others = {"config.json": config, "tokenizer_config.json": tokenizer, "special_tokens_map.json": {"x_token": "hats"}}
    for name, content in others.items():
        (tmp_path / name).write_text(json.dumps(content), "utf-8")
    found = read_vocabulary({name: tmp_path / name for name in ("tokenizer.json", *others)})
    assert set(words) <= _names(found, found.essential())
    assert not set(words) & _names(vocabulary, vocabulary.essential())

# SPDX-License-Identifier: Apache-2.0
"""Beam search finds the sequences that transformers' `generate` finds; encoder-decoders write what it writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Language, sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.generation import Sampling
from onnxpress.runtime.generation.beams import Search
from onnxpress.runtime.generation.processors import log_softmax

EOS = 2
"""With this token some texts end, and others do not."""
BATCH = sequences(3, (6, 3, 8))


def generated(model: Any, prompts: list[list[int]], steps: int, **more: Any) -> list[list[int]]:
    """transformers' new tokens of each prompt, without what follows an end token."""
    import torch

    width, left = max(map(len, prompts)), not model.config.is_encoder_decoder
    fill = [[0] * (width - len(p)) for p in prompts]
    rows = [zeros + p if left else p + zeros for zeros, p in zip(fill, prompts, strict=True)]
    ones = [[1] * len(p) for p in prompts]
    masks = [zeros + o if left else o + zeros for zeros, o in zip(fill, ones, strict=True)]
    with torch.no_grad():
        result = model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(masks), max_new_tokens=steps, do_sample=False,
            eos_token_id=EOS, **more,
        )  # fmt: skip
    tokens = result[:, width if left else 1 :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else _stripped(row) for row in tokens]


def _stripped(row: list[int]) -> list[int]:
    """Without padding behind: a text that stopped at its limit has none."""
    while row and row[-1] == 0:
        row = row[:-1]
    return row


def found(subject: Language, prompts: list[list[int]], steps: int, **more: Any) -> list[list[int]]:
    generator = subject.generator()
    asked = Sampling(max_new_tokens=steps, eos=(EOS,), **more)
    return [_stripped(list(text.tokens)) for text in generator.generate(prompts, asked)]


SEARCHES = [
    {"beams": 2},
    {"beams": 4, "early_stopping": True},
    {"beams": 3, "length_penalty": 2.0},
    {"beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"beams": 3, "length_penalty": 0.7, "early_stopping": "never"},
    {"beams": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
]


@pytest.fixture(params=["bart", "gpt2"])
def subject(request: pytest.FixtureRequest, language: Callable[[str], Language]) -> Language:
    made = language(request.param)
    made.model.generation_config.forced_eos_token_id = None
    return made


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_sequences_are_those_of_generate(subject: Language, search: dict[str, Any]) -> None:
    theirs = {name: value for name, value in search.items() if name != "beams"}
    expected = generated(subject.model, BATCH, 12, num_beams=search["beams"], **theirs)
    assert found(subject, BATCH, 12, **search) == expected


def test_a_search_finds_other_texts_than_greed_and_some_of_them_end(subject: Language) -> None:
    """Without this, the test above would compare little."""
    greedy, searched = found(subject, BATCH, 12), found(subject, BATCH, 12, beams=4)
    assert greedy != searched
    if subject.model.config.is_encoder_decoder:
        assert searched != found(subject, BATCH, 12, beams=4, length_penalty=2.0)
    assert {row[-1] == EOS for row in searched} == {True, False}


def test_greedy_tokens_are_those_of_generate(subject: Language) -> None:
    got = found(subject, BATCH, 12)
    assert got == generated(subject.model, BATCH, 12)
    assert len({token for row in got for token in row}) > 2


def test_a_batch_is_searched_as_each_prompt_alone(subject: Language) -> None:
    together = found(subject, BATCH, 10, beams=3)
    assert together == [found(subject, [prompt], 10, beams=3)[0] for prompt in BATCH]


def test_first_and_last_tokens_of_an_encoder_decoder_are_forced(language: Callable[[str], Language]) -> None:
    bart = language("bart")
    rules: dict[str, Any] = {"forced_bos_token_id": 7, "forced_eos_token_id": EOS, "min_new_tokens": 4}
    for beams in (1, 3):
        expected = generated(bart.model, BATCH, 8, num_beams=beams, **rules)
        assert found(bart, BATCH, 8, beams=beams, forced_bos=7, forced_eos=(EOS,), min_new_tokens=4) == expected
        assert all(row[0] == 7 and row[-1] == EOS and len(row) > 4 for row in expected)


def test_an_encoder_may_be_given_arrays(language: Callable[[str], Language]) -> None:
    generator, row = language("bart").generator(), BATCH[0]
    arrays = {"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), np.int64)}
    asked = Sampling(max_new_tokens=6)
    stream = generator.stream(arrays, asked)
    assert [token for chunk in stream for token in chunk.tokens] == list(generator.generate([row], asked)[0].tokens)
    assert stream.usage.prompt_tokens == (0,)
    with pytest.raises(InputError, match="a prompt has to have the arrays input_ids, attention_mask"):
        generator.stream({"input_ids": arrays["input_ids"]})
    with pytest.raises(InputError, match="arrays have several shapes"):
        generator.stream_batch([arrays, {name: array[:, :3] for name, array in arrays.items()}])
    with pytest.raises(InputError, match="not text"):
        generator.stream_batch([arrays, row])


def test_a_decoder_stops_where_its_positions_end(language: Callable[[str], Language]) -> None:
    texts = language("bart").generator().generate([BATCH[0]], Sampling(max_new_tokens=500))
    assert len(texts[0].tokens) == 39  # of 40, the first is the token that it begins with


def test_beams_yield_one_chunk_a_row_and_can_be_cancelled(language: Callable[[str], Language]) -> None:
    generator = language("gpt2").generator()
    asked = Sampling(max_new_tokens=5, beams=2, eos=(EOS,))
    chunks = [*generator.stream_batch(BATCH, asked)]
    assert [chunk.row for chunk in chunks] == [0, 1, 2]
    assert all(chunk.finish in ("eos", "length") for chunk in chunks)
    stream = generator.stream_batch(BATCH, asked)
    stream.close()
    assert [*stream] == []
    with pytest.raises(InputError, match="stop strings need"):
        generator.stream([5], asked.changed(stop="x"))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 1.0]))
def test_beams_enough_find_the_best_of_all_texts(seed: int, penalty: float) -> None:
    """A model over 3 tokens, the last of which ends a text: with a beam for each prefix the search is exhaustive."""
    size, limit, end = 3, 3, 2
    table = np.random.default_rng(seed).standard_normal((size**limit * 2, size)).astype(np.float32)
    asked = Sampling(beams=9, eos=(end,), length_penalty=penalty, early_stopping="never")

    def likely(text: tuple[int, ...]) -> np.ndarray:
        row: np.ndarray = log_softmax(table[None, sum((token + 1) * size**i for i, token in enumerate(text))])[0]
        return row

    search, texts = Search(asked, limit), [()] * 9
    while not search.over:
        search.advance(np.stack([likely(text) for text in texts]))
        texts = [(*texts[p], int(t)) for p, t in zip(search.parents, search.tokens, strict=True)]
    scores = {}
    for length in range(1, limit + 1):
        for text in itertools.product(range(size), repeat=length):
            if end not in text[:-1] and (text[-1] == end or length == limit):
                total = sum(likely(text[:i])[token] for i, token in enumerate(text))
                scores[text] = total / length**penalty
    assert scores[search.result().tokens] == pytest.approx(max(scores.values()), abs=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""The rules of choosing against transformers' own classes, on random logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.runtime.generation.choosing import Chooser, History, Rules
from onnxpress.runtime.generation.processors import candidates, draw, forbid, highest, log_softmax, softmax
from onnxpress.runtime.generation.sampling import Sampling

ROWS, SIZE, LENGTH = 3, 40, 9


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, SIZE)).astype(np.float32) * 3


def texts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 100).integers(0, 8, (ROWS, LENGTH))


def theirs(scores: np.ndarray, text: np.ndarray, *processors: Any) -> np.ndarray:
    import torch

    given = torch.from_numpy(scores.copy())
    for processor in processors:
        given = processor(torch.from_numpy(text), given)
    found: np.ndarray = given.numpy()
    return found


def ours(scores: np.ndarray, text: np.ndarray, *, new: int = 0, limit: int = 50, **rules: Any) -> np.ndarray:
    """After the rules, with the last `new` tokens of the text chosen before."""
    prompts = text[:, : text.shape[1] - new].tolist()
    made = Rules(Sampling(**rules), prompts, SIZE, [limit] * ROWS)
    for place in range(text.shape[1] - new, text.shape[1]):
        made.chose(text[:, place])
    changed = scores.copy()
    made(changed)
    return changed


@pytest.mark.parametrize("penalty", [0.6, 1.3])
@pytest.mark.parametrize("new", [0, 4])
def test_repetition_penalty(penalty: float, new: int) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    expected = theirs(logits(), texts(), RepetitionPenaltyLogitsProcessor(penalty))
    np.testing.assert_array_equal(ours(logits(), texts(), new=new, repetition_penalty=penalty), expected)
    assert (expected != logits()).any()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_repeated_ngrams(size: int, seed: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    expected = theirs(logits(), texts(seed), NoRepeatNGramLogitsProcessor(size))
    np.testing.assert_array_equal(ours(logits(), texts(seed), new=3, no_repeat_ngram_size=size), expected)


@pytest.mark.parametrize("new", [0, 1, 2])
def test_tokens_that_are_forced_and_forbidden(new: int) -> None:
    import transformers as t

    length = LENGTH - new
    for rules, processor in (
        ({"eos": (3, 5), "min_new_tokens": 2}, t.MinNewTokensLengthLogitsProcessor(length, 2, [3, 5])),
        ({"suppress": (4, 9)}, t.SuppressTokensLogitsProcessor([4, 9])),
        ({"begin_suppress": (4, 9)}, t.SuppressTokensAtBeginLogitsProcessor([4, 9], length)),
        ({"forced_eos": (6,), "limit": 3}, t.ForcedEOSTokenLogitsProcessor(length + 3, 6)),
    ):
        found = ours(logits(), texts(), new=new, **rules)
        np.testing.assert_array_equal(found, theirs(logits(), texts(), processor), err_msg=str(rules))
    start = texts()[:, : 1 + new]
    forced = theirs(logits(), start, t.ForcedBOSTokenLogitsProcessor(7))
    np.testing.assert_array_equal(ours(logits(), start, new=new, forced_bos=7), forced)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 100]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    ties=st.booleans(),
)
def test_what_is_drawn_among(seed: int, temperature: float, top_k: int, top_p: float, min_p: float, ties: bool) -> None:
    import torch
    import transformers as t

    scores = np.round(logits(seed)) if ties else logits(seed)
    scores[0, :5] = -np.inf
    chain: list[Any] = [t.TemperatureLogitsWarper(temperature)]
    chain += [t.TopKLogitsWarper(top_k)] if top_k else []
    chain += [t.TopPLogitsWarper(top_p)] if top_p < 1 and not ties else []  # which of equal ones stays is left open
    chain += [t.MinPLogitsWarper(min_p)] if min_p else []
    expected = torch.from_numpy(theirs(scores, texts(), *chain)).softmax(-1).numpy()
    for row in range(ROWS):
        tokens, likely = candidates(
            scores[row], temperature=temperature, top_k=top_k, top_p=1.0 if ties else top_p, min_p=min_p
        )
        dense = np.zeros(SIZE, np.float32)
        dense[tokens] = likely
        np.testing.assert_allclose(dense, expected[row], atol=1e-6)
        assert len(set(tokens.tolist())) == len(tokens)


def test_the_order_is_transformers() -> None:
    """A penalty after temperature, or top-p before top-k, would leave other numbers."""
    import torch
    import transformers as t

    chain = [
        t.RepetitionPenaltyLogitsProcessor(1.5), t.NoRepeatNGramLogitsProcessor(2), t.TemperatureLogitsWarper(0.7),
        t.TopKLogitsWarper(12), t.TopPLogitsWarper(0.8), t.MinPLogitsWarper(0.05),
    ]  # fmt: skip
    expected = torch.from_numpy(theirs(logits(), texts(), *chain)).softmax(-1).numpy()
    scores = ours(logits(), texts(), new=2, repetition_penalty=1.5, no_repeat_ngram_size=2)
    for row in range(ROWS):
        tokens, likely = candidates(scores[row], temperature=0.7, top_k=12, top_p=0.8, min_p=0.05)
        np.testing.assert_allclose(likely, expected[row][tokens], atol=1e-6)
        assert likely.sum() == pytest.approx(1)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_drawn_tokens_come_as_often_as_they_are_likely(seed: int) -> None:
    likely = softmax(np.random.default_rng(seed).standard_normal(6).astype(np.float32))
    tokens = np.arange(10, 16)
    uniform = (np.arange(2000) + 0.5) / 2000
    counts = np.bincount([draw(tokens, likely, value) - 10 for value in uniform], minlength=6)
    np.testing.assert_allclose(counts / 2000, likely, atol=1e-3)
    assert draw(tokens, likely, 1.0) == 15


def test_where_everything_is_forbidden_something_is_chosen() -> None:
    scores = np.full((1, SIZE), -np.inf, np.float32)
    for temperature in (0.0, 1.0):
        chooser = Chooser(Sampling(temperature=temperature), [[1]], SIZE, [5])
        assert 0 <= int(chooser(scores.copy())[0]) < SIZE


def test_tokens_beyond_the_vocabulary_are_passed_over() -> None:
    scores = logits()
    forbid(scores, (SIZE, SIZE + 5))
    assert np.isfinite(scores).all()
    assert History([[1, SIZE + 3]], SIZE).seen.sum() == 1


def test_a_long_history_keeps_all_of_a_text() -> None:
    history = History([[1, 2], [3]], SIZE)
    for token in range(600):
        history.append(np.array([token % SIZE, 5]))
    assert history.text(0).tolist() == [1, 2] + [token % SIZE for token in range(600)]
    assert history.text(1).tolist() == [3] + [5] * 600
    history.follow(np.array([1, 1]))
    assert history.text(0).tolist() == history.text(1).tolist()
    assert history.seen[0].nonzero()[0].tolist() == [3, 5]


def test_log_softmax() -> None:
    import torch

    np.testing.assert_allclose(log_softmax(logits()), torch.from_numpy(logits()).log_softmax(-1).numpy(), atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 3000), count=st.integers(1, 60), seed=st.integers(0, 99), ties=st.booleans())
def test_the_highest_scores(size: int, count: int, seed: int, ties: bool) -> None:
    scores = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    scores = np.round(scores) if ties else scores
    scores[::7] = -np.inf
    least = np.sort(scores)[::-1][min(count, size) - 1]
    np.testing.assert_array_equal(highest(scores, count), np.flatnonzero(scores >= least))


def test_a_large_vocabulary_is_drawn_from_as_a_small_one() -> None:
    """Where the likeliest thousand are not enough for top-p, all are looked at."""
    import torch
    from transformers import TopPLogitsWarper

    for spread, top_p in ((0.1, 0.9), (3.0, 0.9), (3.0, 0.99)):
        scores = (np.random.default_rng(1).standard_normal((1, 20_000)) * spread).astype(np.float32)
        expected = torch.from_numpy(theirs(scores, texts(), TopPLogitsWarper(top_p))).softmax(-1).numpy()[0]
        tokens, likely = candidates(scores[0], temperature=1.0, top_k=0, top_p=top_p, min_p=0.0)
        assert abs(len(tokens) - (expected > 0).sum()) <= 2  # float32 sums of 20,000 numbers
        np.testing.assert_allclose(likely, expected[tokens], rtol=1e-3)


def test_logits_that_are_no_numbers() -> None:
    scores = logits()
    scores[1, 3] = np.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(OnnxpressError, match="the model's logits are NaN"):
            Chooser(Sampling(temperature=temperature, top_k=0), [[1]] * ROWS, SIZE, [5] * ROWS)(scores.copy())

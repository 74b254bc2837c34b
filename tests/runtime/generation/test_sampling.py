# SPDX-License-Identifier: Apache-2.0
"""What a `Sampling` refuses, and what it takes from generation_config.json."""

from __future__ import annotations

from typing import Any

import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.generation import Sampling
from onnxpress.runtime.generation.sampling import DEFAULT_NEW_TOKENS, sampling_of, token_of


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"temperature": -0.1}, "temperature has to be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature has to be"),
        ({"temperature": "hot"}, "temperature has to be"),
        ({"top_p": 0.0}, "top_p has to be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p has to be above 0 and at most 1"),
        ({"min_p": -1}, "min_p has to be at least 0"),
        ({"top_k": -1}, "top_k has to be a whole number from 0"),
        ({"top_k": 1.5}, "top_k has to be a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty has to be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens has to be a whole number from 1"),
        ({"max_new_tokens": True}, "max_new_tokens has to be a whole number"),
        ({"seed": -1}, "seed has to be"),
        ({"beams": 0}, "beams has to be"),
        ({"length_penalty": float("inf")}, "length_penalty has to be a number"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"beams": 2, "temperature": 0.5}, "beam search draws nothing"),
        ({"early_stopping": "sometimes"}, "early_stopping is true, false or 'never'"),
    ],
)
def test_values_outside_their_range(values: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Sampling(**values)
    with pytest.raises(InputError, match=what):
        Sampling().changed(**values)


def test_a_change_leaves_the_rest() -> None:
    first = Sampling(top_k=3, seed=4)
    assert first.changed(temperature=0.5, top_k=None, stop="x") == Sampling(
        top_k=3, seed=4, temperature=0.5, stop=("x",)
    )
    assert first.changed(stop=["a", "b"]).stop == ("a", "b")
    assert Sampling(beams=4).changed(temperature=0.5).beams == 1
    assert Sampling(beams=4).changed(temperature=0).beams == 4
    with pytest.raises(InputError, match="there is no 'topp'") as refused:
        first.changed(topp=1)
    assert "top_p" in refused.value.next_step


def test_the_defaults_are_transformers() -> None:
    import transformers

    names = ("top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "length_penalty", "early_stopping")
    theirs = transformers.GenerationConfig._get_default_generation_params()
    assert sampling_of({}, {}) == Sampling()
    assert {name: getattr(Sampling(), name) for name in names} == {name: theirs[name] for name in names}
    assert theirs["do_sample"] is False
    assert Sampling().greedy


def test_a_generation_config_is_followed() -> None:
    asked = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": [7, 9], "max_new_tokens": 12,
        "suppress_tokens": [1], "forced_eos_token_id": 2, "stop_strings": "END",
    }  # fmt: skip
    assert sampling_of(asked, {"eos_token_id": 3}) == Sampling(
        temperature=0.6, top_p=0.9, top_k=20, eos=(7, 9), max_new_tokens=12, suppress=(1,), forced_eos=(2,),
        stop=("END",),
    )  # fmt: skip
    assert sampling_of({"temperature": 0.6}, {}).greedy  # without do_sample, transformers draws nothing either
    assert sampling_of({"do_sample": True}, {}).temperature == 1


def test_lengths_of_an_encoder_decoder_count_its_first_token() -> None:
    bart = {"max_length": 20, "min_length": 5, "num_beams": 4, "early_stopping": True, "forced_bos_token_id": 0}
    found = sampling_of(bart, {}, encoder_decoder=True)
    assert (found.max_new_tokens, found.min_new_tokens, found.beams, found.forced_bos) == (19, 4, 4, 0)
    assert found.early_stopping is True
    alone = sampling_of(bart, {})
    assert (alone.max_new_tokens, alone.min_new_tokens, alone.forced_bos) == (DEFAULT_NEW_TOKENS, 0, None)


def test_config_json_is_asked_where_there_is_no_generation_config() -> None:
    config = {"eos_token_id": 3, "text_config": {"bos_token_id": 4}, "top_k": 7}
    assert sampling_of({}, config) == Sampling(eos=(3,), top_k=7)
    assert sampling_of({"top_p": 0.5}, config) == Sampling(eos=(3,), top_p=0.5)
    assert token_of("bos_token_id", {}, config) == 4
    assert token_of("bos_token_id", {"bos_token_id": [5, 6]}, config) == 5
    assert token_of("pad_token_id", {}, config) is None

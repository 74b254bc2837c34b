# SPDX-License-Identifier: Apache-2.0
"""How a decoder is fed, from the names of its inputs and outputs alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxpress.contracts.decoding import Decoding, growing_axis, positions, present_of
from onnxpress.contracts.signature import Signature, TensorSpec

KEYS = ("batch", 2, "past_sequence", 4)


def _decoder(*, states: bool = False, tokens: bool = True, optional: bool = True) -> Signature:
    inputs = [TensorSpec("input_ids", "int64", ("batch", "sequence"))]
    if optional:
        inputs += [
            TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            TensorSpec("num_logits_to_keep", "int64", ()),
        ]
    caches = [TensorSpec("past_key_values.0.key", "float32", KEYS)] if tokens else []
    caches += [TensorSpec("past_conv.1", "float32", ("batch", 6, 3))] if states else []
    outputs = [TensorSpec("logits", "float32", ("batch", "kept", 9))]
    outputs += [TensorSpec(present_of(spec.name) or "", "float32", spec.shape) for spec in caches]
    return Signature(tuple(inputs + caches), tuple(outputs))


def _of(signature: Signature) -> Decoding:
    found = Decoding.of(signature)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.11.decoder.value", "present.11.decoder.value"),
        ("past_key_values.2.indexer", "present.2.indexer"),
        ("past_conv.3", "present_conv.3"),
        ("past_recurrent.3.1", "present_recurrent.3.1"),
        ("attention_mask", None),
        ("past_values", None),
    ],
)
def test_a_past_is_replaced_by_its_present(past: str, present: str | None) -> None:
    assert present_of(past) == present


def test_a_graph_without_a_cache_is_no_decoder() -> None:
    assert Decoding.of(_decoder(tokens=False)) is None
    signature = _decoder()
    assert Decoding.of(Signature(signature.inputs, signature.outputs[:1])) is None  # in, but never out
    assert Decoding.of(Signature(signature.inputs[1:], signature.outputs)) is None  # reads no tokens


def test_the_first_call_has_an_empty_cache_and_counts_every_token() -> None:
    decoding = _of(_decoder(states=True))
    feeds = decoding.feeds(np.array([[5, 6, 7], [8, 9, 1]]))
    assert list(feeds) == [spec.name for spec in _decoder(states=True).inputs]
    assert feeds["past_key_values.0.key"].shape == (2, 2, 0, 4)
    assert feeds["past_conv.1"].shape == (2, 6, 3)
    assert not feeds["past_conv.1"].any()
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert feeds["num_logits_to_keep"].shape == ()
    assert all(feeds[spec.name].dtype == spec.dtype for spec in _decoder(states=True).inputs)


def test_a_later_call_reads_the_last_ones_outputs() -> None:
    decoding = _of(_decoder())
    cache = decoding.next_cache({"logits": np.zeros((2, 1, 9)), "present.0.key": np.ones((2, 2, 5, 4))})
    assert decoding.past_length(cache) == 5
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    feeds = decoding.feeds(np.array([[3], [4]]), mask, cache, keep=1)
    assert feeds["position_ids"].tolist() == [[3], [5]]  # padding on the left takes no position
    assert feeds["num_logits_to_keep"] == 1
    assert np.array_equal(feeds["past_key_values.0.key"], np.ones((2, 2, 5, 4)))
    assert decoding.feeds(np.array([[3], [4]]), cache=cache)["attention_mask"].shape == (2, 6)


def test_only_what_the_graph_reads_is_fed() -> None:
    assert list(_of(_decoder(optional=False)).feeds(np.array([[5]]))) == ["input_ids", "past_key_values.0.key"]


def test_states_alone_do_not_tell_how_many_tokens_there_were() -> None:
    decoding = _of(_decoder(states=True, tokens=False))
    cache = decoding.empty_cache(2)
    assert decoding.past_length(cache) == 0
    assert decoding.feeds(np.array([[5], [6]]), cache=cache)["attention_mask"].shape == (2, 1)
    assert growing_axis(decoding.caches[0]) is None


@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 1)))
def test_tokens_that_count_are_numbered_from_zero_without_gaps(mask: np.ndarray) -> None:
    for row, numbers in zip(mask, positions(mask), strict=True):
        assert numbers[row == 1].tolist() == list(range(int(row.sum())))
        assert numbers.min() >= 0

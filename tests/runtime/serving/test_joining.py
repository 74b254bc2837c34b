# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.runtime.serving.joining import Joining, bucket

Arrays = Mapping[str, np.ndarray]
TABLE = np.random.default_rng(0).normal(size=(50, 4))


def spec(name: str, *shape: int | str | None, dtype: str = "int64") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


IDS, MASK = spec("input_ids", "batch", "sequence"), spec("attention_mask", "batch", "sequence")
POOLED, TOKENS = spec("logits", "batch", 4, dtype="float32"), spec("tokens", "batch", "sequence", 4, dtype="float32")
TEXT = Signature((IDS, MASK), (POOLED, TOKENS))


def model(feeds: Arrays) -> dict[str, np.ndarray]:
    """Rows by themselves; what is masked counts for nothing."""
    tokens = TABLE[feeds["input_ids"]] * feeds["attention_mask"][..., None]
    return {"logits": tokens.sum(1), "tokens": tokens}


def text(rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
    return {"input_ids": rng.integers(1, 50, (rows, length)), "attention_mask": np.ones((rows, length), np.int64)}


@pytest.mark.parametrize(
    ("signature", "batched", "padded"),
    [
        (TEXT, True, True),
        (Signature((IDS, MASK), (spec("y", "batch", None),)), True, False),  # an axis that nobody knows
        (Signature((IDS, MASK), (spec("y", "batch", "sequence", "sequence"),)), True, False),
        (Signature((IDS,), (POOLED,)), True, False),  # without a mask padding would count
        (Signature((IDS, MASK, spec("boxes", "batch", "sequence", 4)), (POOLED,)), True, False),
        (Signature((IDS, MASK), (spec("y", "rows", 2),)), False, False),
        (Signature((spec("x", 1, 3),), (spec("y", 1, 3),)), False, False),
        (Signature((spec("x", "batch"), spec("scale")), (spec("y", "batch"),)), False, False),
    ],
)
def test_what_a_signature_allows(signature: Signature, batched: bool, padded: bool) -> None:
    joining = Joining.of(signature, pad=0)
    assert (joining.batched, bool(joining.fill)) == (batched, padded)
    assert not Joining.of(signature).fill


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(33, 36)), min_size=1, max_size=6), st.booleans())
def test_joined_requests_get_what_they_get_alone(sizes: list[tuple[int, int]], left: bool) -> None:
    rng = np.random.default_rng(0)
    joining = Joining.of(TEXT, pad=0, left=left)
    requests = [text(rng, rows, length) for rows, length in sizes]
    assert len({joining.key(feeds) for feeds in requests}) == 1
    answers = joining.split(model(joining.join(requests)), requests)
    for feeds, answer in zip(requests, answers, strict=True):
        for name, expected in model(feeds).items():
            assert answer[name].shape == expected.shape
            np.testing.assert_allclose(answer[name], expected, atol=1e-12)


def test_padding_stands_where_it_should() -> None:
    rng = np.random.default_rng(0)
    short, long = text(rng, 1, 2), text(rng, 1, 4)
    right = Joining.of(TEXT, pad=7).join([short, long])["input_ids"][0]
    left = Joining.of(TEXT, pad=7, left=True).join([short, long])
    assert right[2:].tolist() == [7, 7]
    assert left["input_ids"][0, :2].tolist() == [7, 7]
    assert left["attention_mask"][0].tolist() == [0, 0, 1, 1]


@given(st.integers(1, 5000))
def test_buckets_are_narrow(length: int) -> None:
    top = bucket(length)
    assert length <= top <= length + max(3, length // 8)
    assert bucket(top) == top
    assert bucket(length + 1) >= top


def test_only_equal_shapes_are_joined_without_padding() -> None:
    joining = Joining.of(Signature((spec("x", "batch", "width"),), (spec("y", "batch"),)))
    assert joining.key({"x": np.zeros((2, 3))}) == joining.key({"x": np.zeros((5, 3))})
    assert joining.key({"x": np.zeros((2, 3))}) != joining.key({"x": np.zeros((2, 4))})

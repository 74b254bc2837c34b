# SPDX-License-Identifier: Apache-2.0
"""Each codec gives back what it was given, shrinks what can be shrunk, and survives bytes that nobody encoded."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing_samples import KINDS, values

from onnxpress.contracts.errors import InputError, MissingDependency
from onnxpress.runtime.packing import CODECS, codecs

every_codec = pytest.mark.parametrize("codec", CODECS)


@every_codec
@given(st.binary(max_size=300) | st.builds(values, st.sampled_from(KINDS), st.integers(0, 9000), st.integers(0, 3)))
def test_there_and_back(codec: str, data: bytes) -> None:
    number, packed = codecs.encode(data, codec, 3)
    assert bytes(codecs.decode(number, packed, len(data))) == data
    assert len(packed) <= len(data)


@pytest.mark.parametrize("codec", ["auto", "zstd", "huffman", "lzw"])
def test_what_can_shrink_does_and_noise_stays_as_it_is(codec: str) -> None:
    skewed = np.random.default_rng(0).binomial(8, 0.5, 100_000).astype(np.uint8).tobytes()
    number, packed = codecs.encode(skewed, codec, 19)
    assert number == {"huffman": codecs.HUFFMAN, "lzw": codecs.LZW}.get(codec, codecs.ZSTD)
    assert len(packed) < 0.48 * len(skewed)
    noise = values("noise", 100_000, 0)
    assert codecs.encode(noise, codec, 19) == (codecs.RAW, noise)


def test_zstandard_reaches_the_entropy_of_bytes_without_repeats() -> None:
    data = np.random.default_rng(0).binomial(20, 0.4, 1 << 17).astype(np.uint8)
    share = np.bincount(data) / data.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum() / 8
    for level in (1, 19):
        packed = codecs.encode(data.tobytes(), "zstd", level)[1]
        assert entropy * data.size < len(packed) < 1.02 * entropy * data.size


@given(st.sampled_from([codecs.RAW, codecs.ZSTD, codecs.HUFFMAN, codecs.LZW, 9]), st.binary(max_size=60))
def test_any_bytes_decode_to_the_size_or_are_refused(number: int, noise: bytes) -> None:
    with contextlib.suppress(codecs.Damaged):
        assert len(codecs.decode(number, noise, 40)) == 40


@pytest.mark.parametrize("codec", ["zstd", "huffman"])
def test_no_more_comes_out_than_was_declared(codec: str) -> None:
    number, bomb = codecs.encode(bytes(50_000_000), codec, 3)
    assert len(bomb) < 8_000_000
    with pytest.raises(codecs.Damaged):
        codecs.decode(number, bomb, 100)


def test_unknown_and_missing_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown codec 'huff'"):
        codecs.require("huff")
    for codec in CODECS:
        codecs.require(codec)
    codecs._imagecodecs.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(MissingDependency, match="not installed") as caught:
        codecs.require("lzw")
    assert caught.value.next_step == 'pip install "onnxpress[lzw]"'
    codecs._imagecodecs.cache_clear()

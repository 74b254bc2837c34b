# SPDX-License-Identifier: Apache-2.0
"""Text in pieces is the text, and no piece shows half of anything."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from writing_bundles import byte_tokenizer

from onnxpress.runtime.generation.detokenizing import Detokenizer, StopText

CHARACTERS = st.text(st.sampled_from("ab z.é\u200d中😀👩🏽\n") | st.characters(exclude_categories=["Cs"]), max_size=30)


def sentence_piece() -> Tokenizer:
    """Words with a sign for the space before them, and single bytes for all that is no word, as Llama 2 has it."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "\u2581ab", "ab", "c", "\u2581c"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, PIECES = byte_tokenizer(), sentence_piece()


def pieces(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@settings(deadline=None)
@given(text=CHARACTERS, before=CHARACTERS)
def test_bytes_become_the_text(text: str, before: str) -> None:
    ids, prompt = BYTES.encode(text).ids, BYTES.encode(before).ids
    found = pieces(BYTES, ids, prompt)
    assert "".join(found) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert found[-1] == ""  # nothing waits at the end of a whole character
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)


WORDS = st.lists(st.sampled_from([257, 258, 259, 260, 261]) | st.sampled_from("é中😀a"), min_size=1, max_size=40)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_pieces_of_sentences_become_the_text(words: list[int | str], before: list[int | str]) -> None:
    def ids(some: list[int | str]) -> list[int]:
        return [i for word in some for i in ([word] if isinstance(word, int) else [1 + b for b in word.encode()])]

    whole = PIECES.decode([258, *ids(before), *ids(words)])
    assert "".join(pieces(PIECES, ids(words), [258, *ids(before)])) == whole[len(PIECES.decode([258, *ids(before)])) :]


def test_the_space_between_prompt_and_text_stays() -> None:
    assert pieces(PIECES, [258, 261], [258]) == [" ab", " c", ""]
    assert pieces(PIECES, [258, 261]) == ["ab", " c", ""]


@settings(deadline=None)
@given(st.lists(st.integers(128, 255), min_size=1, max_size=60))
def test_bytes_that_are_no_text_do_not_wait_forever(values: list[int]) -> None:
    letters = {ord(c) if ord(c) < 256 else -1: c for c in BYTES.get_vocab() if len(c) == 1}
    ids = [BYTES.token_to_id(letters[value]) for value in values if value in letters]
    detokenizer, waiting = Detokenizer(BYTES.decode), 0
    for token in ids:
        waiting = 0 if detokenizer.push(token) else waiting + 1
        # A half that was given up may become a character after all, which takes its place: that adds nothing
        assert waiting < 16
        assert len(detokenizer._window) < 48


def test_only_the_last_tokens_are_decoded() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(BYTES.decode(list(ids)))

    detokenizer = Detokenizer(decode, BYTES.encode("a" * 500).ids)
    text = "né 😀" * 200
    assert "".join(detokenizer.push(token) for token in BYTES.encode(text).ids) == text
    assert longest < 48


@settings(deadline=None)
@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_a_stop_string_is_found_wherever_the_text_is_cut(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    looking, shown, stopped = StopText(stop), "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = looking.push(text[start:end])
        shown += piece
        if stopped:
            break
    if not stopped:
        shown += looking.finish()
    assert stopped == any(word in text for word in stop)
    assert not any(word in shown for word in stop)
    assert text.startswith(shown)
    if not stopped:
        assert shown == text


@pytest.mark.parametrize(("pushed", "shown"), [(["ab", "c"], ["a", ""]), (["b", "b"], ["", "b"]), (["x"], ["x"])])
def test_the_beginning_of_a_stop_string_waits(pushed: list[str], shown: list[str]) -> None:
    looking = StopText(["bc"])
    assert [looking.push(piece)[0] for piece in pushed] == shown

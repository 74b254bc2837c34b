# SPDX-License-Identifier: Apache-2.0
"""Tokens to text as they come: never half a character, never the beginning of what may become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""

_BEFORE, _MOST = 8, 32
"""Tokens of context, which is cut down to the first when it has reached the second. A decoder drops the space before
the first token that it sees, so the first is never a new one."""

_HALF = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not one yet."""

_LONGEST = 8
"""Tokens that one character may take; a character has four bytes, and no token has none."""


class Detokenizer:
    """One text's tokens in, its text out; only the last few tokens are decoded each time.

    Args:
        decode: The tokenizer's.
        prompt: What comes before; its last tokens are context and are not handed out.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._shown = _context(decode, prompt)
        self._pieces = [len(self._window)]
        self._waiting = 0

    def push(self, token: int) -> str:
        """The text that is certain now; empty where a character is not finished."""
        self._window.append(token)
        self._waiting += 1
        text = self._decode(self._window)
        if text.endswith(_HALF) and self._waiting < _LONGEST:
            return ""
        return self._hand_out(text)

    def finish(self) -> str:
        """What was waited for in vain."""
        return self._hand_out(self._decode(self._window)) if self._waiting else ""

    def _hand_out(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        self._pieces.append(self._waiting)
        self._waiting = 0
        if len(self._window) >= _MOST:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Forget old context, whole pieces of it, so that what is left does not begin within a character."""
        while len(self._window) - self._pieces[0] >= _BEFORE:
            del self._window[: self._pieces.pop(0)]
        self._shown = self._decode(self._window)


def _context(decode: Decode, prompt: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of the prompt, from the beginning of a character, and their text."""
    for length in range(_BEFORE, _BEFORE + 4):
        window = list(prompt[-length:])
        text = decode(window) if window else ""
        if not text.startswith(_HALF):
            break
    return window, text


class StopText:
    """Looks for stop strings in text that comes in pieces.

    Args:
        stop: The strings; none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown, and whether a stop string was found: what lies before it is shown, then."""
        self._held += text
        found = [place for word in self._stop if (place := self._held.find(word)) >= 0]
        if found:
            return self._held[: min(found)], True
        length = self._begun()
        shown, self._held = self._held[: len(self._held) - length], self._held[len(self._held) - length :]
        return shown, False

    def finish(self) -> str:
        """What was held back and has become no stop string."""
        shown, self._held = self._held, ""
        return shown

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(word) for word in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-length:]) for word in self._stop):
                return length
        return 0

# SPDX-License-Identifier: Apache-2.0
"""A strict reader of protobuf's text format without a schema: what was written is read back before it is handed over.

Grammar: protobuf.dev/reference/protobuf/textformat-spec, without extensions, `Any` and numbers in octal. Each field
becomes a list, since the text does not say whether it is repeated; a bare word (`KIND_CPU`, `true`) stays a string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ....contracts.errors import InputError

Value = str | int | float | dict[str, list["Value"]]
Message = dict[str, list[Value]]

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<number>-?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?)
    |(?P<string>"(?:[^"\\\n]|\\["\\/bfnrtu])*")
    |(?P<sign>[:{}\[\],;])""",
    re.VERBOSE,
)


def read(text: str) -> Message:
    """Parse a message.

    Raises:
        InputError: It is no text format; says in which line.
    """
    return _Reader(text).message("")


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0

    def message(self, end: str) -> Message:
        """The fields up to the closing sign, or to the end of the file for the outermost message."""
        fields: Message = {}
        while self._peek() != ("sign", end) and self._peek()[0] != "end":
            name = self._take("word")
            colon = self._skip(":")
            fields.setdefault(name, []).extend(self._values(colon=colon))
            if not self._skip(","):
                self._skip(";")
        if end:
            self._take("sign", end)
        elif self._peek()[0] != "end":
            raise self._wrong()
        return fields

    def _values(self, *, colon: bool) -> list[Value]:
        if not self._skip("["):
            return [self._value(colon=colon)]
        values: list[Value] = []
        while not self._skip("]"):
            if values:
                self._take("sign", ",")
            values.append(self._value(colon=colon))
        return values

    def _value(self, *, colon: bool) -> Value:
        if self._skip("{"):
            return self.message("}")
        kind, text = self._peek()
        if not colon or kind not in ("word", "number", "string"):  # only a message may do without its colon
            raise self._wrong()
        self._at += 1
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        return str(json.loads(text)) if kind == "string" else text

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at][:2]

    def _skip(self, sign: str) -> bool:
        found = self._peek() == ("sign", sign)
        self._at += found
        return found

    def _take(self, kind: str, text: str | None = None) -> str:
        found = self._peek()
        if found[0] != kind or text not in (None, found[1]):
            raise self._wrong()
        self._at += 1
        return found[1]

    def _wrong(self) -> InputError:
        kind, text, line = self._tokens[self._at]
        return InputError(f"line {line} of the configuration: unexpected {text or kind}")


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InputError(f"line {line} of the configuration: unexpected {text[at]!r}")
        if match.lastgroup != "space":
            yield str(match.lastgroup), match[0], line
        line += match[0].count("\n")
        at = match.end()
    yield "end", "", line

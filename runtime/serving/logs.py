# SPDX-License-Identifier: Apache-2.0
"""One JSON object a line for every request and every alert: never what was sent, never what was answered."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from ...contracts.errors import InputError
from .events import Answer

STDERR = "-"

to_json = json.JSONEncoder(separators=(",", ":")).encode
"""`json.dumps` would build an encoder for each line."""


class RequestLog:
    """The log.

    Args:
        where: A file to append to, or `STDERR`.

    Attributes:
        failing: Why it is not written to any more; empty while it is.

    Raises:
        InputError: The file cannot be opened.
    """

    def __init__(self, where: str | Path) -> None:
        self.failing = ""
        self._lines: list[str] = []
        self._own = str(where) != STDERR
        try:
            self._file: TextIO = open(where, "a", encoding="ascii") if self._own else sys.stderr  # noqa: SIM115
        except OSError as error:
            raise InputError(f"the log {where} cannot be opened: {error.strerror}") from error

    def answered(self, answer: Answer, when: float) -> None:
        """Log a request."""
        self.event(
            "request",
            when,
            {
                "request": answer.request_id[:200],
                "model": answer.model[:200],
                "bundle": answer.bundle,
                "route": answer.route,
                "status": answer.status,
                "error": answer.error[:500] or None,
                "rows": answer.rows,
                "queued_ms": _rounded(answer.queued_ms),
                "computed_ms": _rounded(answer.computed_ms),
                "total_ms": _rounded(answer.total_ms),
            },
        )

    def event(self, event: str, when: float, fields: Mapping[str, Any]) -> None:
        """Log anything else; fields that are None are left out."""
        record = {"time": moment(when), "event": event}
        record.update((key, value) for key, value in fields.items() if value is not None)
        self._lines.append(to_json(record))

    def write(self) -> None:
        """Write what waits. A log that cannot be written stops no server: what waits is then lost."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
            self.failing = ""
        except (OSError, ValueError) as error:
            self.failing = str(error)

    def close(self) -> None:
        """Write what waits and close the file."""
        self.write()
        if self._own:
            self._file.close()


def moment(when: float) -> str:
    """Unix time as ISO 8601 in UTC, to the millisecond."""
    second, part = divmod(int(when * 1000), 1000)
    return f"{_second(second)}.{part:03d}+00:00"


@lru_cache(8)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 3)

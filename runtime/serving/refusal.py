# SPDX-License-Identifier: Apache-2.0
"""A request that is answered with an error: raised anywhere, written out in one place."""

from __future__ import annotations

CLOSED = 499
"""The client has gone; nobody reads the answer (nginx's number)."""


class Refusal(Exception):
    """An HTTP error with one line for the client.

    Args:
        status: HTTP status.
        message: What is wrong, in one line, in the client's words.
        retry_after: Seconds after which it may be tried again.
        close: The connection ends with the answer, for a body that was not read.
    """

    def __init__(self, status: int, message: str, *, retry_after: float | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())[:1000]
        self.retry_after = retry_after
        self.close = close


class NotFinite(Refusal):
    """An output that JSON cannot hold: told to whoever watches the outputs all the same.

    Args:
        name: The output.
        status: 422 for tensors that the client made, 500 for a model that answers a text or a picture so.
    """

    def __init__(self, name: str, status: int = 422) -> None:
        advice = ": ask for binary data" if status == 422 else ""
        super().__init__(status, f"output '{name}' has values that are not finite{advice}")

# SPDX-License-Identifier: Apache-2.0
"""What the server tells those who watch it: metrics, logs, the audit and the monitor of its outputs.

The server calls an observer on its event loop, in the order of the events: an observer returns at once, and does what
takes longer elsewhere. An observer that fails does not fail the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from ..opened import Bundle


@dataclass(frozen=True)
class Answer:
    """One request that is over, however it ended.

    Attributes:
        request_id: The client's `X-Request-Id` or `id`, or one that the server made.
        model: Under which name it was asked for; empty where no model was reached.
        bundle: SHA-256 that names the bundle that answered; empty where none did.
        route: `infer`, `predict` (text or image in), `generate`.
        status: HTTP status; 499 where the client had gone.
        error: What went wrong, in one line, or empty.
        rows: Rows of the batch that were this request's.
        queued_ms: Milliseconds from arrival to the start of its batch; None where it never ran.
        computed_ms: Milliseconds that its batch took; None likewise.
        total_ms: Milliseconds from the request's last byte to the answer's first.
        inputs: What the model read for this request, and nothing of its neighbours in the batch; padded as it was run.
            Of a request that was run in parts, such as texts of several lengths, the names of each further part end in
            `@` and the number of its first row.
        outputs: What it answered; empty for an error, but for the one that an output is not finite.
    """

    request_id: str
    model: str
    bundle: str
    route: str
    status: int
    error: str = ""
    rows: int = 0
    queued_ms: float | None = None
    computed_ms: float | None = None
    total_ms: float = 0.0
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)


class Observer(Protocol):
    """Watches the server."""

    def loaded(self, model: str, bundle: Bundle, version: str, milliseconds: float) -> None:
        """A model answers from now on with this bundle: at the start, and after each reload.

        `milliseconds` is what opening it and loading its session took.
        """
        ...

    def queued(self, model: str, depth: int) -> None:
        """The number of requests that wait for a batch has changed."""
        ...

    def ran(self, model: str, rows: int, milliseconds: float) -> None:
        """A batch of `rows` rows was run."""
        ...

    def answered(self, answer: Answer) -> None:
        """A request is over."""
        ...

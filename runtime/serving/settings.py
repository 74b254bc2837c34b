# SPDX-License-Identifier: Apache-2.0
"""What an operator may set: every limit of the server in one place, each with a default that is safe to keep."""

from __future__ import annotations

from dataclasses import dataclass

from ...contracts.errors import InputError
from ..machine import usable_cores

EXACT, TOLERANCE, NEVER = JOIN = ("exact", "tolerance", "never")

_ON_CPU = ("cpu", "openvino", "xnnpack", "dnnl")


@dataclass(frozen=True)
class Settings:
    """Limits and ways of a server.

    Attributes:
        provider: What runs the models; see `runtime.session.PROVIDERS`.
        threads: Threads that one operator may use. If None, batches run side by side on one core each, which does more
            in a second, and a request beside which nothing runs gets all cores where that is measured to be faster
            (for models up to 256 MiB, which are then in memory twice).
        workers: Batches of one model that may run at the same time, each in a thread of its own; as many as the cores
            allow if None, and one where the provider is no CPU.
        join: Which requests may share a run. `exact`: those whose answers stay what they are alone, up to the rounding
            of floats, as golden samples show at loading; `tolerance`: those whose answers stay within the tolerance
            that the bundle states; `never`: none. The rows of one request run together as it sent them.
        max_batch: Most rows in one batch.
        max_wait_ms: How long a batch that is not full waits for more rows once the model is free. 0 starts it at once:
            rows that arrive while a batch runs make up the next one, which costs an idle server nothing.
        queue: Requests of one model that may wait; the next is refused with 503.
        deadline_ms: A request that has no answer by then gets 504, and never runs if it has not begun; 0 is no limit.
            A client may ask for less with `X-Deadline-Ms`.
        pad: Join texts of similar length into one batch by padding, where the golden samples show that `join`
            allows it. False joins equal lengths only.
        max_body_mb: Largest request body, MiB.
        max_buffered_mb: Bodies of all requests together, MiB; beyond it 503.
        max_elements: Most elements of all input tensors of a request.
        max_texts: Most texts in a request.
        max_text_characters: Longest text.
        max_tokens: Longest text in tokens, where the model itself has no limit.
        max_new_tokens: Most tokens that one generation may write.
        max_in_flight: Requests that may be anywhere between their first byte and their answer; beyond it 503.
        header_seconds: How long a client may take to send a request's head.
        body_seconds: How long it may take to send the body.
        idle_seconds: How long a connection without a request is kept.
        drain_seconds: How long a stopping server finishes what it has accepted.
        reload_seconds: How often a changed bundle is looked for; 0 never.
        allow_not_finite: Take NaN and infinity as inputs (they can only come in binary tensors).
        api_key: What clients have to send as `Authorization: Bearer KEY` or `X-Api-Key: KEY`; None asks for none.
    """

    provider: str = "cpu"
    threads: int | None = None
    workers: int | None = None
    join: str = EXACT
    max_batch: int = 16
    max_wait_ms: float = 0.0
    queue: int = 256
    deadline_ms: float = 30_000.0
    pad: bool = True
    max_body_mb: float = 32.0
    max_buffered_mb: float = 256.0
    max_elements: int = 16_000_000
    max_texts: int = 256
    max_text_characters: int = 200_000
    max_tokens: int = 8192
    max_new_tokens: int = 4096
    max_in_flight: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    drain_seconds: float = 30.0
    reload_seconds: float = 2.0
    allow_not_finite: bool = False
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.join not in JOIN:
            raise InputError(f"join is to be one of {', '.join(JOIN)}, not '{self.join}'")
        for name in ("threads", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}")
        for name in ("max_batch", "queue", "max_elements", "max_texts", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("max_wait_ms", "deadline_ms", "reload_seconds", "drain_seconds"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative")
        for name in ("max_body_mb", "max_buffered_mb", "header_seconds", "body_seconds", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive")
        if self.api_key is not None and not self.api_key.strip():
            raise InputError("the API key is empty", next_step="Write a key, or leave it out.")

    @property
    def session_threads(self) -> int | None:
        """Threads of a session; None leaves them to it."""
        return 1 if self.threads is None and self.provider in _ON_CPU else self.threads

    @property
    def batch_workers(self) -> int:
        """Workers of a model."""
        if self.workers is not None:
            return self.workers
        return max(1, usable_cores() // (self.session_threads or 1)) if self.provider in _ON_CPU else 1

    @property
    def max_body(self) -> int:
        """Largest request body, bytes."""
        return int(self.max_body_mb * 2**20)

    @property
    def max_buffered(self) -> int:
        """All bodies together, bytes."""
        return int(self.max_buffered_mb * 2**20)

# SPDX-License-Identifier: Apache-2.0
"""A light client: keep-alive connections over asyncio's protocols, each with one request in flight.

Requests are bytes made beforehand, so that the client costs the machine little (it says how much). Answers are kept and
compared after the measurement.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Answered:
    """One answer: which request it was for, when it was sent and read whole (seconds), status and body."""

    number: int
    sent: float
    done: float
    status: int
    body: bytes
    head: bytes = b""


@dataclass
class Measured:
    """What one load came to.

    Attributes:
        rate: Answers with 200 a second.
        p50, p99: Milliseconds.
        failed: Answers with another status, and connections that broke.
        sampled: About 500 of the answers.
        client_share: Share of one core that the client took.
        answers: All of them, those of the warm-up too.
    """

    rate: float
    p50: float
    p99: float
    failed: int
    sampled: list[Answered] = field(default_factory=list)
    client_share: float = 0.0
    answers: int = 0


def http(path: str, body: bytes, more: str = "") -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One keep-alive connection. `send` a request; `on_answer` hears of its answer, or of None when it broke."""

    def __init__(self, on_answer: Callable[[Connection, Answered | None], None]) -> None:
        self._on_answer = on_answer
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body, self._end = 0, 0
        self._number, self._sent, self._waiting = -1, 0.0, False

    def send(self, number: int, request: bytes) -> None:
        assert self._transport is not None
        self._number, self._waiting = number, True
        self._sent = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        self._waiting = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._body:
            self._body = self._buffer.find(b"\r\n\r\n") + 4
            if self._body < 4:
                self._body = 0
                return
            self._end = self._body + _content_length(bytes(self._buffer[: self._body]))
        if len(self._buffer) < self._end:
            return
        if len(self._buffer) > self._end or not self._waiting:
            raise RuntimeError("more was answered than was asked")
        now, raw = time.perf_counter(), bytes(self._buffer)
        head, body = raw[: self._body], raw[self._body :]
        self._buffer.clear()
        self._body, self._waiting = 0, False
        self._on_answer(self, Answered(self._number, self._sent, now, int(head[9:12]), body, head))

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            self._waiting = False
            self._on_answer(self, None)


async def connect(port: int, count: int, on_answer: Callable[[Connection, Answered | None], None]) -> list[Connection]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Connection(on_answer), "127.0.0.1", port) for _ in range(count)]
    return [protocol for _, protocol in made]


def load(port: int, requests: Sequence[bytes], *, clients: int, seconds: float, warm_up: float) -> Measured:
    """Keep `clients` requests in flight for a while, and measure after the warm-up."""
    return asyncio.run(_load(port, requests, clients, seconds, warm_up))


async def _load(port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_up: float) -> Measured:
    over = asyncio.Event()
    done: list[Answered] = []
    broken, turn = 0, itertools.cycle(range(len(requests)))
    start = time.perf_counter() + warm_up
    end = start + seconds

    def on_answer(connection: Connection, answer: Answered | None) -> None:
        nonlocal broken
        if answer is None:
            broken += 1
            over.set()
            return
        done.append(answer)
        if answer.done < end:
            number = next(turn)
            connection.send(number, requests[number])
        else:
            over.set()

    connections = await connect(port, clients, on_answer)
    gc.collect()
    gc.freeze()
    for connection in connections:
        number = next(turn)
        connection.send(number, requests[number])
    await asyncio.sleep(warm_up)
    before = time.process_time()
    await asyncio.wait_for(over.wait(), seconds + 60)
    share = (time.process_time() - before) / (time.perf_counter() - start)
    for connection in connections:
        connection.close()
    gc.unfreeze()
    inside = [answer for answer in done if start <= answer.done <= end]
    good = [answer for answer in inside if answer.status == 200]
    spent = np.array([(answer.done - answer.sent) * 1e3 for answer in good] or [np.nan])
    p50, p99 = np.percentile(spent, (50, 99))
    failed = len(inside) - len(good) + broken
    return Measured(
        len(good) / seconds, float(p50), float(p99), failed, good[:: max(1, len(good) // 500)], share, len(done)
    )


def _content_length(head: bytes) -> int:
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        raise RuntimeError(f"an answer without a length: {head[:200]!r}")
    return int(lower[at + 17 : lower.index(b"\r\n", at + 2)])

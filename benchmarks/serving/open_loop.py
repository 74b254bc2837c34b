# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive at their own times (Poisson), whatever the server does, and a book of what became of each."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .client import Answered, Connection, connect, http
from .workload import Workload, v2_body, v2_logits

_DIGITS = 10


@dataclass
class Book:
    """What became of the requests.

    Attributes:
        sent: Requests sent.
        right: Answered with 200, with their own id and their own row's logits.
        wrong: Answered with 200 otherwise; what was wrong with the first ones.
        refused: Answered with 503 and Retry-After.
        other: Other statuses, and 503 without Retry-After.
        broken: Connections that ended without an answer.
        unsent: Arrivals for which no connection was free.
        accepted: Ids answered with 200.
        milliseconds: Of the requests answered with 200.
    """

    sent: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    other: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    unsent: int = 0
    accepted: list[str] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return self.right + len(self.wrong) + self.refused + self.other.total()


class Requests:
    """Numbered requests for the rows of a workload, made without encoding the row again.

    Args:
        work: The rows.
        path: Where they are posted to.
        prefix: Begins each id, so that several clients do not share any.
    """

    def __init__(self, work: Workload, path: str, prefix: str) -> None:
        self._work, self._prefix = work, prefix
        mark = self.identity(0)
        header = f"X-Request-Id: {mark}\r\n"
        self._parts = [http(path, v2_body(row, mark), header).split(mark.encode()) for row in work.rows]

    def identity(self, number: int) -> str:
        return f"{self._prefix}{number:0{_DIGITS}d}"

    def make(self, number: int) -> bytes:
        return self.identity(number).encode().join(self._parts[number % len(self._parts)])

    def judge(self, answer: Answered, book: Book) -> None:
        """Enter an answer into the book."""
        if answer.status == 503 and b"\r\nretry-after:" in answer.head.lower():
            book.refused += 1
        elif answer.status != 200:
            book.other[answer.status] += 1
        else:
            data, identity = json.loads(answer.body), self.identity(answer.number)
            book.accepted.append(identity)
            book.milliseconds.append((answer.done - answer.sent) * 1e3)
            if data.get("id") != identity:
                book.wrong.append(f"{identity} got the answer of {data.get('id')}")
            elif not self._work.is_right(answer.number % len(self._work.rows), v2_logits(data)):
                book.wrong.append(f"{identity} got {v2_logits(data)}")
            else:
                book.right += 1


async def arrive(
    port: int, requests: Requests, book: Book, *, rate: float, seconds: float, connections: int, seed: int = 0
) -> None:
    """Send requests at `rate` a second for a while, then wait for the last answers."""
    idle: list[Connection] = []
    flying: set[Connection] = set()

    def on_answer(connection: Connection, answer: Answered | None) -> None:
        flying.discard(connection)
        if answer is None:
            book.broken += 1
            return
        requests.judge(answer, book)
        closing = b"\r\nconnection: close" in answer.head.lower()
        if closing:
            connection.close()
        else:
            idle.append(connection)

    idle += await connect(port, connections, on_answer)
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 100)
    due = start = time.perf_counter()
    for gap in gaps:
        due += gap
        if due > start + seconds:
            break
        if (late := due - time.perf_counter()) > 0:
            await asyncio.sleep(late)
        elif book.sent % 32 == 0:
            await asyncio.sleep(0)  # let answers in
        if len(idle) + len(flying) < connections // 2:
            idle += await _again(port, connections - len(idle) - len(flying), on_answer)
        if not idle:
            book.unsent += 1
            continue
        connection = idle.pop(0)
        flying.add(connection)
        connection.send(book.sent, requests.make(book.sent))
        book.sent += 1
    end = time.perf_counter() + 60
    while flying and time.perf_counter() < end:
        await asyncio.sleep(0.05)
    for connection in [*idle, *flying]:
        connection.close()


async def _again(port: int, count: int, on_answer: object) -> Sequence[Connection]:
    """New connections in place of closed ones; none where the server is not there."""
    try:
        return await connect(port, count, on_answer)  # type: ignore[arg-type]
    except OSError:
        await asyncio.sleep(0.1)
        return []

# SPDX-License-Identifier: Apache-2.0
"""Requests of one model, joined into batches while it is busy, and run in worker threads beside the event loop.

Nothing waits for a timer: a free worker takes the oldest request and every other one that fits to it, so an idle
server adds no delay, and under load the batches grow by themselves (the "natural" batching of databases' group
commit). ONNX Runtime releases the GIL while it computes. Workers take their next batch themselves, without a round
trip over the event loop, so that the model is not idle while the loop reads and writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...contracts.errors import InputError, OnnxpressError
from .joining import Joining, Key
from .refusal import Refusal

_LOG = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray], Sequence[str] | None], Arrays]


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a request.

    Attributes:
        inputs: What the model read for it, padded as it was run.
        outputs: What it answered.
        rows: Rows of the request.
        queued_ms: From the moment it was handed in until its batch began.
        computed_ms: What the batch took.
    """

    inputs: Arrays
    outputs: Arrays
    rows: int
    queued_ms: float
    computed_ms: float


@dataclass(eq=False, slots=True)
class _Job:
    feeds: Mapping[str, np.ndarray]
    names: tuple[str, ...] | None
    rows: int
    key: Key
    future: asyncio.Future[Ran]
    arrived: float
    deadline: float | None
    gone: bool = False


@dataclass(eq=False, slots=True)
class _Batch:
    jobs: list[_Job]
    results: list[Ran | BaseException] = field(default_factory=list)
    rows: int = 0
    milliseconds: float = 0.0
    alone: bool = False


class Batcher:
    """The queue of one loaded model. Made and used on an event loop.

    Args:
        run: Runs the model; called from worker threads.
        joining: What may be joined.
        run_alone: The same for a batch beside which nothing runs or waits, with all cores; `run` if absent.
        max_batch: Most rows in a batch.
        queue: Most requests that wait.
        max_wait_ms: How long a batch that is not full may wait for more.
        workers: Batches that run at the same time.
        on_depth: Told how many requests wait, whenever that changes.
        on_ran: Told rows and milliseconds of every batch.
    """

    def __init__(
        self,
        run: Run,
        joining: Joining,
        *,
        run_alone: Run | None = None,
        max_batch: int = 16,
        queue: int = 256,
        max_wait_ms: float = 0.0,
        workers: int = 1,
        on_depth: Callable[[int], None] | None = None,
        on_ran: Callable[[int, float], None] | None = None,
    ) -> None:
        self._run, self._run_alone, self.joining = run, run_alone or run, joining
        self._max_batch, self._limit = max_batch, queue
        self._wait = max_wait_ms / 1e3 if joining.shared else 0.0  # who runs alone need not wait for company
        self._on_depth, self._on_ran = on_depth, on_ran
        self._loop = asyncio.get_running_loop()
        self._pending: deque[_Job] = deque()
        self._ready = threading.Condition()
        self._closing = False
        self._running = 0
        self._seconds_a_job = 0.01
        self._threads = [
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return len(self._pending)

    async def submit(
        self, feeds: Mapping[str, np.ndarray], names: tuple[str, ...] | None = None, deadline: float | None = None
    ) -> Ran:
        """Run a request, with others where that is possible. Cancelling the caller takes it out of the queue.

        Args:
            feeds: Input name to array, as the graph takes them.
            names: Outputs that are wanted; all for None.
            deadline: On the clock of `time.perf_counter`; None for no limit.

        Raises:
            Refusal: 503 with a full queue or while closing, 504 after the deadline, 400 for values that the model
                refuses, 500 where it failed.
        """
        rows = self.joining.rows(feeds)
        if rows > self._max_batch:
            return await self._in_parts(feeds, names, deadline, rows)
        arrived = time.perf_counter()
        if self._closing or len(self._pending) >= self._limit:
            raise self._busy()
        if deadline is not None and arrived >= deadline:
            raise _late()
        job = _Job(feeds, names, rows, self.joining.key(feeds), self._loop.create_future(), arrived, deadline)
        timer = None if deadline is None else self._loop.call_later(deadline - arrived, self._expire, job)
        with self._ready:
            self._pending.append(job)
            self._ready.notify()
        if self._on_depth:
            self._on_depth(len(self._pending))
        try:
            return await job.future
        except asyncio.CancelledError:
            self._remove(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def close(self) -> None:
        """Answer what waits, then end the workers."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)

    async def _in_parts(
        self, feeds: Mapping[str, np.ndarray], names: tuple[str, ...] | None, deadline: float | None, rows: int
    ) -> Ran:
        """A request of more rows than a batch has, as several: memory stays bounded by the batch."""
        slices = [slice(start, start + self._max_batch) for start in range(0, rows, self._max_batch)]
        parts = []
        for part in slices:  # one after the other: a large request takes one place in the queue, not all
            parts.append(await self.submit({name: array[part] for name, array in feeds.items()}, names, deadline))
        joined = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
        computed = sum(part.computed_ms for part in parts)
        return Ran(dict(feeds), joined, rows, parts[0].queued_ms, computed)

    def _busy(self) -> Refusal:
        seconds = max(1.0, math.ceil(len(self._pending) * self._seconds_a_job))
        return Refusal(503, "the queue of this model is full; try again later", retry_after=seconds)

    def _expire(self, job: _Job) -> None:
        if not job.future.done():
            job.future.set_exception(_late())
            self._remove(job)

    def _remove(self, job: _Job) -> None:
        job.gone = True
        with self._ready, contextlib.suppress(ValueError):  # a worker may have it already
            self._pending.remove(job)
        if self._on_depth:
            self._on_depth(len(self._pending))

    # ---- in the worker threads ----

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            self._run_and_tell(batch)

    def _run_and_tell(self, batch: _Batch) -> None:
        started = time.perf_counter()
        try:
            batch.results = self._results(batch, started)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the requests have to hear of it
            batch.results = [error] * len(batch.jobs)
        batch.milliseconds = (time.perf_counter() - started) * 1e3
        with self._ready:  # before it is told: who asks again at once shall find nothing running
            self._running -= 1
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left who waits
            self._loop.call_soon_threadsafe(self._deliver, batch)

    def _take(self) -> _Batch | None:
        """Wait for work; return the next batch, or None at the end."""
        with self._ready:
            while True:
                while not self._pending:
                    if self._closing:
                        return None
                    self._ready.wait()
                jobs = self._fitting()
                if not jobs:
                    continue
                rows = sum(job.rows for job in jobs)
                patience = jobs[0].arrived + self._wait - time.perf_counter()
                if self._wait and patience > 0 and rows < self._max_batch and not self._closing:
                    self._ready.wait(patience)
                    continue
                if len(jobs) == 1:
                    self._pending.popleft()
                else:
                    taken = set(map(id, jobs))
                    self._pending = deque(job for job in self._pending if id(job) not in taken)
                self._running += 1
                if self._pending:
                    self._ready.notify()
                return _Batch(jobs, rows=rows, alone=self._running == 1 and not self._pending)

    def _fitting(self) -> list[_Job]:
        """The oldest request, and those that can be joined with it, as they came; what is late is dropped."""
        now = time.perf_counter()
        while self._pending and (self._pending[0].gone or _is_late(self._pending[0], now)):
            self._pending.popleft()  # the timer on the loop answers it
        if not self._pending:
            return []
        jobs, first = [self._pending[0]], self._pending[0]
        rows = first.rows
        if self.joining.shared:
            for job in list(self._pending)[1:]:
                if rows >= self._max_batch:
                    break
                if job.key == first.key and rows + job.rows <= self._max_batch and not _is_late(job, now):
                    jobs.append(job)
                    rows += job.rows
        return jobs

    def _results(self, batch: _Batch, started: float) -> list[Ran | BaseException]:
        """Run a batch; where it fails, run each request alone, so that one bad request fails alone."""
        jobs = batch.jobs
        try:
            feeds = self.joining.join([job.feeds for job in jobs])
            outputs = (self._run_alone if batch.alone else self._run)(feeds, _wanted(jobs))
            parts = self.joining.split(outputs, [job.feeds for job in jobs])
        except OnnxpressError as error:
            if len(jobs) == 1:
                return [error]
            return [self._results(_Batch([job]), started)[0] for job in jobs]
        computed, results, start = (time.perf_counter() - started) * 1e3, list[Ran | BaseException](), 0
        for job, part in zip(jobs, parts, strict=True):
            stop = start + job.rows
            fed = feeds if len(jobs) == 1 else {name: array[start:stop] for name, array in feeds.items()}
            wanted = part if job.names is None else {name: part[name] for name in job.names}
            results.append(Ran(fed, wanted, job.rows, (started - job.arrived) * 1e3, computed))
            start = stop
        return results

    # ---- back on the event loop ----

    def _deliver(self, batch: _Batch) -> None:
        self._seconds_a_job += 0.1 * (batch.milliseconds / 1e3 / len(batch.jobs) - self._seconds_a_job)
        if self._on_ran:
            self._on_ran(batch.rows, batch.milliseconds)
        if self._on_depth:
            self._on_depth(len(self._pending))
        for job, result in zip(batch.jobs, batch.results, strict=True):
            if job.future.done():  # late, or cancelled
                continue
            if isinstance(result, Ran):
                job.future.set_result(result)
            else:
                job.future.set_exception(_refusal(result))


def _wanted(jobs: Sequence[_Job]) -> list[str] | None:
    """The outputs that any request of a batch asks for; None for all."""
    names: dict[str, None] = {}
    for job in jobs:
        if job.names is None:
            return None
        names.update(dict.fromkeys(job.names))
    return list(names)


def _refusal(error: BaseException) -> Refusal:
    if isinstance(error, InputError):
        return Refusal(400, str(error))
    if isinstance(error, OnnxpressError):
        return Refusal(500, str(error))
    _LOG.error("a batch failed", exc_info=error)
    return Refusal(500, "internal error")


def _late() -> Refusal:
    return Refusal(504, "the deadline of this request has passed")


def _is_late(job: _Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline

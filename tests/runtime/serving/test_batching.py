# SPDX-License-Identifier: Apache-2.0
import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError, OnnxpressError
from onnxpress.runtime.serving.batching import Batcher, Ran
from onnxpress.runtime.serving.joining import Joining
from onnxpress.runtime.serving.refusal import Refusal

ROWS = Joining(batched=True)


class Model:
    """y = 2 x; waits for `go`; fails where a row holds what it is told to fail at."""

    def __init__(self, *, waits: bool = True) -> None:
        self.batches: list[list[float]] = []
        self.go, self.running = threading.Event(), threading.Event()
        self.fails: dict[float, Exception] = {}
        if not waits:
            self.go.set()

    def __call__(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        rows = feeds["x"][:, 0].tolist()
        self.batches.append(rows)
        self.running.set()
        assert self.go.wait(10)
        for value, error in self.fails.items():
            if value in rows:
                raise error
        return {"y": feeds["x"] * 2, "z": feeds["x"]}


def x(*values: float, width: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.array([[value] * width for value in values], np.float32)}


def runs(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 15))

    run.__name__ = test.__name__
    return run


async def busy(model: Model, batcher: Batcher) -> asyncio.Task[Ran]:
    """Let the model be in the middle of a batch."""
    first = asyncio.create_task(batcher.submit(x(0)))
    while not model.running.is_set():
        await asyncio.sleep(0.001)
    return first


async def waiting(batcher: Batcher, depth: int) -> None:
    while batcher.depth < depth:
        await asyncio.sleep(0.001)


@runs
async def test_what_comes_while_the_model_runs_is_one_batch() -> None:
    model = Model()
    batcher = Batcher(model, ROWS)
    tasks = [await busy(model, batcher)]
    tasks += [asyncio.create_task(batcher.submit(x(*range(start, start + 2)))) for start in (1, 3, 5)]
    await waiting(batcher, 3)
    model.go.set()
    answers = await asyncio.gather(*tasks)
    assert model.batches == [[0], [1, 2, 3, 4, 5, 6]]
    assert [answer.outputs["y"][:, 0].tolist() for answer in answers] == [[0], [2, 4], [6, 8], [10, 12]]
    assert [answer.inputs["x"][:, 0].tolist() for answer in answers] == [[0], [1, 2], [3, 4], [5, 6]]
    assert [answer.rows for answer in answers] == [1, 2, 2, 2]
    await batcher.close()


@runs
async def test_batches_hold_no_more_than_they_may_and_only_what_fits() -> None:
    model = Model()
    batcher = Batcher(model, ROWS, max_batch=3)
    tasks = [await busy(model, batcher)]
    tasks += [asyncio.create_task(batcher.submit(x(i, width=1 + i % 2))) for i in range(1, 8)]
    await waiting(batcher, 7)
    model.go.set()
    await asyncio.gather(*tasks)
    assert model.batches == [[0], [1, 3, 5], [2, 4, 6], [7]]  # the oldest first, with what fits to it
    await batcher.close()


@runs
async def test_a_large_request_is_run_in_parts() -> None:
    model = Model(waits=False)
    batcher = Batcher(model, ROWS, max_batch=3)
    answer = await batcher.submit(x(*range(8)))
    assert model.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert answer.outputs["y"][:, 0].tolist() == [2 * i for i in range(8)]
    await batcher.close()


@runs
async def test_requests_that_cannot_be_joined_run_alone() -> None:
    model = Model()
    batcher = Batcher(model, Joining())
    tasks = [await busy(model, batcher), *(asyncio.create_task(batcher.submit(x(i, i))) for i in (1, 2))]
    await waiting(batcher, 2)
    model.go.set()
    await asyncio.gather(*tasks)
    assert model.batches == [[0], [1, 1], [2, 2]]
    await batcher.close()


@runs
async def test_only_the_outputs_that_somebody_wants_are_made() -> None:
    asked = []

    def run(feeds: Mapping[str, np.ndarray], names: Sequence[str] | None) -> dict[str, np.ndarray]:
        asked.append(names)
        return {name: feeds["x"] for name in names or ("y", "z")}

    batcher = Batcher(run, ROWS)
    assert list((await batcher.submit(x(1), ("z",))).outputs) == ["z"]
    assert list((await batcher.submit(x(1))).outputs) == ["y", "z"]
    assert asked == [["z"], None]
    await batcher.close()


@runs
async def test_a_bad_request_fails_alone() -> None:
    model = Model()
    model.fails = {2: InputError("index out of range"), 3: OnnxpressError("broken")}
    batcher = Batcher(model, ROWS)
    tasks = [await busy(model, batcher), *(asyncio.create_task(batcher.submit(x(i))) for i in (1, 2, 3, 4))]
    await waiting(batcher, 4)
    model.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(answer, "status", 200) for answer in answers] == [200, 200, 400, 500, 200]
    assert model.batches == [[0], [1, 2, 3, 4], [1], [2], [3], [4]]
    await batcher.close()


@runs
async def test_a_bug_in_the_model_is_told_and_the_worker_goes_on() -> None:
    model = Model(waits=False)
    model.fails = {1: ZeroDivisionError("secret")}
    batcher = Batcher(model, ROWS)
    with pytest.raises(Refusal, match=r"^internal error$"):
        await batcher.submit(x(1))
    assert (await batcher.submit(x(2))).outputs["y"].tolist() == [[4]]
    await batcher.close()


@runs
async def test_a_full_queue_refuses() -> None:
    model = Model()
    batcher = Batcher(model, ROWS, queue=2)
    tasks = [await busy(model, batcher), *(asyncio.create_task(batcher.submit(x(i))) for i in (1, 2))]
    await waiting(batcher, 2)
    with pytest.raises(Refusal) as error:
        await batcher.submit(x(3))
    assert error.value.status == 503
    assert error.value.retry_after is not None
    assert error.value.retry_after >= 1
    model.go.set()
    assert len(await asyncio.gather(*tasks)) == 3
    await batcher.close()


@runs
async def test_what_is_late_is_answered_in_time_and_never_runs() -> None:
    model = Model()
    batcher = Batcher(model, ROWS)
    first = await busy(model, batcher)
    late = asyncio.create_task(batcher.submit(x(1), deadline=time.perf_counter() + 0.02))
    patient = asyncio.create_task(batcher.submit(x(2), deadline=time.perf_counter() + 60))
    with pytest.raises(Refusal) as error:
        await late
    assert error.value.status == 504
    assert batcher.depth == 1
    with pytest.raises(Refusal):
        await batcher.submit(x(3), deadline=time.perf_counter() - 1)
    model.go.set()
    await asyncio.gather(first, patient)
    assert model.batches == [[0], [2]]
    await batcher.close()


@runs
async def test_who_gives_up_is_taken_out_of_the_queue() -> None:
    model = Model()
    depths: list[int] = []
    batcher = Batcher(model, ROWS, on_depth=depths.append)
    first = await busy(model, batcher)
    gone = asyncio.create_task(batcher.submit(x(1)))
    await waiting(batcher, 1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert batcher.depth == 0
    model.go.set()
    await first
    assert model.batches == [[0]]
    assert depths[-1] == 0
    await batcher.close()


@runs
async def test_a_batch_waits_for_more_only_where_it_is_told_to() -> None:
    model = Model(waits=False)
    ran: list[int] = []
    batcher = Batcher(model, ROWS, max_batch=2, max_wait_ms=10_000, on_ran=lambda rows, _: ran.append(rows))
    one = asyncio.create_task(batcher.submit(x(1)))
    await asyncio.sleep(0.05)
    assert not one.done()
    await asyncio.gather(one, batcher.submit(x(2)))  # full, so it starts
    assert ran == [2]
    await batcher.close()


@runs
async def test_several_workers_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)

    def run(feeds: Mapping[str, np.ndarray], names: Sequence[str] | None) -> dict[str, np.ndarray]:
        both.wait()
        return {"y": feeds["x"]}

    batcher = Batcher(run, Joining(), workers=2)
    await asyncio.gather(batcher.submit(x(1)), batcher.submit(x(2)))
    await batcher.close()


@runs
async def test_closing_answers_what_was_accepted_and_refuses_the_rest() -> None:
    model = Model()
    batcher = Batcher(model, ROWS)
    tasks = [await busy(model, batcher), asyncio.create_task(batcher.submit(x(1)))]
    await waiting(batcher, 1)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(Refusal):
        await batcher.submit(x(2))
    model.go.set()
    await asyncio.gather(*tasks, closing)
    assert model.batches == [[0], [1]]


@runs
async def test_every_request_of_a_storm_gets_its_own_answer() -> None:
    model = Model(waits=False)
    batcher = Batcher(model, ROWS, max_batch=4, queue=10_000, workers=2)

    async def one(i: int) -> bool:
        answer = await batcher.submit(x(*[float(i)] * (1 + i % 3), width=1 + i % 2))
        return answer.outputs["y"].tolist() == [[2.0 * i] * (1 + i % 2)] * (1 + i % 3)

    assert all(await asyncio.gather(*(one(i) for i in range(500))))
    await batcher.close()


@runs
async def test_only_a_batch_beside_which_nothing_runs_or_waits_gets_all_cores() -> None:
    alone: list[float] = []
    model = Model()

    def run_alone(feeds: Mapping[str, np.ndarray], names: Sequence[str] | None) -> dict[str, np.ndarray]:
        alone.extend(feeds["x"][:, 0].tolist())
        return model(feeds, names)

    batcher = Batcher(model, Joining(), run_alone=run_alone, workers=2)
    tasks = [await busy(model, batcher)]
    tasks += [asyncio.create_task(batcher.submit(x(i))) for i in (1, 2, 3)]
    await waiting(batcher, 2)
    model.go.set()
    await asyncio.gather(*tasks)
    assert alone == [0] or alone == [0, 3]  # the last may begin when the others have ended
    while batcher._running:
        await asyncio.sleep(0.001)
    await batcher.submit(x(4))
    assert alone[-1] == 4
    await batcher.close()

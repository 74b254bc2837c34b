# SPDX-License-Identifier: Apache-2.0
"""Interleaved measurement: every variant gets the same input in every round, and is compared within the round.

A machine that slows down for a second slows down all variants of that second, so it moves their latencies but hardly
their ratios. Measuring one variant after the other would have charged it to one of them.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..contracts.errors import InputError
from .session import Array

MIN_ROUNDS = 5
"""A setting is measured this often even when its time has run out: below it an interval says nothing."""

_SETTLE_SECONDS = 0.01
_PROBE_TIMEOUT_SECONDS = 300.0
_RESAMPLES = 2000
_SEED = 0

Row = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Contender:
    """Something that runs the model.

    Attributes:
        variant: Its name in the report (`pytorch`, `onnx-fp32`, `model_quantized`).
        provider: What it runs on (`torch`, `cpu`, `cuda`, ...).
        run: Takes the named inputs of one turn and returns when the outputs are there; what it returns is ignored.
        probe: Command line that, in a fresh process, loads the model, runs one input and prints
            `{"load_ms": ..., "peak_rss_mb": ...}` as its last line. See `onnxpress.runtime.probe.command`.
    """

    variant: str
    provider: str
    run: Callable[[dict[str, Array]], object]
    probe: Sequence[str] | None = None


@dataclass(frozen=True)
class Setting:
    """One kind of input.

    Attributes:
        name: Its name in the report (`single`, `batch`).
        batch: Samples in each turn, for the throughput.
        shape: What a reader should know: `1 x own length (7-63)`, `8 x 128`.
        feeds: Round i uses `feeds[i % len(feeds)]`, the same for all contenders.
    """

    name: str
    batch: int
    shape: str
    feeds: Sequence[dict[str, Array]]


@dataclass(frozen=True)
class Measurement:
    """What one contender did in one setting.

    Attributes:
        provider, variant, setting, batch, shape: From the contender and the setting.
        threads: As the caller configured the contenders.
        rounds: Rounds measured; fewer than asked for when the time ran out.
        latency_ms: `p50`, `p95` and `min` over the rounds.
        ratio_to_reference: `median` over the rounds of the reference's time divided by this one's (above 1 is faster
            than the reference), with `low` and `high`, the 95 % bootstrap interval of that median.
        throughput_per_s: Samples a second at the median latency.
        load_ms: Milliseconds to load the model in a fresh process; None without a probe.
        peak_rss_mb: Peak resident memory of that process in MiB; None without a probe.
        note: Why a probe gave nothing; None when all is well.
        first_run_ms: Median over the shapes of the inputs of the first run at each, in the warm-up: some engines make
            their kernels for a shape when they meet it, and `latency_ms` is free of that. None without a warm-up.
    """

    provider: str
    variant: str
    threads: int
    setting: str
    batch: int
    shape: str
    rounds: int
    latency_ms: dict[str, float]
    ratio_to_reference: dict[str, float]
    throughput_per_s: float
    load_ms: float | None = None
    peak_rss_mb: float | None = None
    note: str | None = None
    first_run_ms: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    contenders: Sequence[Contender],
    settings: Sequence[Setting],
    *,
    rounds: int = 30,
    max_seconds: float = 60.0,
    warmup: int = 3,
    threads: int,
    burst: int = 1,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure all contenders in all settings, taking turns, and then probe each once.

    Args:
        contenders: The first one is the reference.
        settings: Measured one after the other.
        rounds: Turns of each contender in each setting.
        max_seconds: Time for one setting, warm-up included. When it is over the current round is finished, and at
            least `MIN_ROUNDS` (or `rounds`, if smaller) are made.
        warmup: Turns of each contender before the clock counts; one for each shape of the inputs if that is more, as
            far as half the time goes. 0 turns the warm-up off.
        threads: Recorded, and given to the probes as OMP_NUM_THREADS; it configures no contender.
        burst: Runs in a turn, the last of which is timed. With 1 each contender finds the processor's caches as the
            others (and the pause between turns) left them, as a service with rare requests does; with more it finds
            its own weights there, as a busy one does.
        progress: Called with one line as each stage begins.

    Returns:
        One measurement for each setting and contender, in that order.

    Raises:
        InputError: No contender, no setting, a setting without inputs, or `rounds` or `burst` below 1.
    """
    if not contenders or not settings or rounds < 1 or burst < 1:
        raise InputError("a benchmark needs a contender, a setting and a round, at least one of each")
    for setting in settings:
        if not setting.feeds:
            raise InputError(f"setting '{setting.name}' has no inputs to measure with")
    say = progress or (lambda line: None)
    measured = []
    for setting in settings:
        say(f"measuring {setting.name} ({setting.shape}): {', '.join(c.variant for c in contenders)}")
        deadline = time.perf_counter() + max_seconds
        first = _warm_up(contenders, setting, warmup, deadline - max_seconds / 2)
        times = _take_turns(contenders, setting, rounds, deadline, burst)
        rows = [_summary(c, setting, threads, times[:, i], times[:, 0]) for i, c in enumerate(contenders)]
        measured.append([replace(row, first_run_ms=ms) for row, ms in zip(rows, first, strict=True)])
    found = []
    for contender in contenders:  # after all timing, one at a time: a probe must not share the cores with a turn
        if contender.probe is not None:
            say(f"loading {contender.variant} in a fresh process")
        found.append(_probe(contender, threads))
    return [replace(m, **probed) for row in measured for m, probed in zip(row, found, strict=True)]


def ratio_interval(reference_ms: Row, contender_ms: Row) -> dict[str, float]:
    """Compare two contenders round by round.

    Args:
        reference_ms: Times of the reference, float64 `[rounds]`.
        contender_ms: Times of the contender in the same rounds, float64 `[rounds]`.

    Returns:
        `median` of `reference_ms / contender_ms`, and `low` and `high`: the percentile bootstrap interval at 95 % of
        that median (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3), with a fixed seed.
    """
    ratios = reference_ms / contender_ms
    draws = np.random.default_rng(_SEED).integers(0, len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def _warm_up(contenders: Sequence[Contender], setting: Setting, warmup: int, deadline: float) -> list[float | None]:
    """Let every contender meet every shape once, and take at least `warmup` turns; return each one's `first_run_ms`."""
    if warmup == 0:
        return [None] * len(contenders)
    shapes: dict[tuple[object, ...], dict[str, Array]] = {}
    for feeds in setting.feeds:
        shapes.setdefault(tuple((name, array.shape) for name, array in feeds.items()), feeds)
    first: list[list[float]] = []
    for feeds in shapes.values():
        if not first or time.perf_counter() < deadline:
            first.append([_turn(contender, feeds) for contender in contenders])
    for turn in range(len(first), warmup):
        for contender in contenders:
            contender.run(setting.feeds[turn % len(setting.feeds)])
    return [float(np.median(times)) for times in zip(*first, strict=True)]


def _take_turns(contenders: Sequence[Contender], setting: Setting, rounds: int, deadline: float, burst: int) -> Row:
    """Return the milliseconds of every turn, float64 `[rounds made, contenders]`."""
    times: list[list[float]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of a turn would be charged to whoever has it
    try:
        while len(times) < rounds and (len(times) < MIN_ROUNDS or time.perf_counter() < deadline):
            feeds = setting.feeds[len(times) % len(setting.feeds)]
            times.append([_turn(contender, feeds, burst) for contender in contenders])
    finally:
        if collecting:
            gc.enable()
    return np.array(times, dtype=np.float64)


def _turn(contender: Contender, feeds: dict[str, Array], burst: int = 1) -> float:
    """Return the milliseconds of one turn."""
    # The worker threads of whoever ran before (OpenMP, a session's pool) spin on the cores for a moment after they
    # have finished, PyTorch's for 5 to 7 ms (benchmarks/idle_threads.py); let them go idle, so that nobody pays for a
    # neighbour.
    time.sleep(_SETTLE_SECONDS)
    for _ in range(burst - 1):
        contender.run(feeds)
    start = time.perf_counter_ns()
    contender.run(feeds)
    return (time.perf_counter_ns() - start) / 1e6


def _summary(contender: Contender, setting: Setting, threads: int, own_ms: Row, reference_ms: Row) -> Measurement:
    p50, p95 = (float(value) for value in np.percentile(own_ms, [50, 95]))
    return Measurement(
        provider=contender.provider,
        variant=contender.variant,
        threads=threads,
        setting=setting.name,
        batch=setting.batch,
        shape=setting.shape,
        rounds=len(own_ms),
        latency_ms={"p50": p50, "p95": p95, "min": float(own_ms.min())},
        ratio_to_reference=ratio_interval(reference_ms, own_ms),
        throughput_per_s=setting.batch / p50 * 1e3,
    )


def _probe(contender: Contender, threads: int) -> dict[str, Any]:
    """Return `load_ms` and `peak_rss_mb` from the contender's probe, or a `note` (without paths: it is published)."""
    if contender.probe is None:
        return {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            list(contender.probe), env=environment, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"note": f"the probe did not finish in {_PROBE_TIMEOUT_SECONDS:.0f} s"}
    except OSError:
        return {"note": "the probe could not be started"}
    if done.returncode != 0:
        return {"note": f"the probe ended with exit code {done.returncode}"}
    try:
        printed = json.loads(done.stdout.strip().splitlines()[-1])
        return {"load_ms": float(printed["load_ms"]), "peak_rss_mb": float(printed["peak_rss_mb"])}
    except (IndexError, KeyError, TypeError, ValueError):
        return {"note": "the probe did not print its measurement"}

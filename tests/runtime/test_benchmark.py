# SPDX-License-Identifier: Apache-2.0
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.runtime import Contender, Session, Setting, measure
from onnxpress.runtime.benchmark import MIN_ROUNDS, _summary, ratio_interval
from onnxpress.runtime.probe import command

Feeds = dict[str, np.ndarray]


def inputs(count: int) -> list[Feeds]:
    return [{"x": np.array([i])} for i in range(count)]


def recorder(calls: list[tuple[str, int]], name: str) -> Callable[[Feeds], None]:
    return lambda feeds: calls.append((name, int(feeds["x"][0])))


def test_turns_are_interleaved_and_share_the_input() -> None:
    calls: list[tuple[str, int]] = []
    contenders = [Contender(name, "cpu", recorder(calls, name)) for name in "ABC"]
    measure(contenders, [Setting("s", 1, "1", inputs(2))], rounds=6, warmup=1, threads=1)
    expected = [(name, turn) for turn in [0, 0, 1, 0, 1, 0, 1] for name in "ABC"]  # the warm-up, then six rounds
    assert calls == expected


def test_a_burst_is_timed_by_its_last_run() -> None:
    """The first run of a turn is slow here, as with cold caches: only a burst leaves it out."""
    calls: list[tuple[str, int]] = []

    def run(feeds: Feeds) -> None:
        if len(calls) % 3 == 0:
            time.sleep(0.2)
        calls.append(("A", int(feeds["x"][0])))

    setting = Setting("s", 1, "1", inputs(2))
    (warm,) = measure([Contender("A", "cpu", run)], [setting], rounds=2, warmup=0, threads=1, burst=3)
    assert [turn for _, turn in calls] == [0, 0, 0, 1, 1, 1]
    calls.clear()
    (cold,) = measure([Contender("A", "cpu", run)], [setting], rounds=1, warmup=0, threads=1)
    assert warm.latency_ms["p50"] < cold.latency_ms["p50"]
    with pytest.raises(InputError):
        measure([Contender("A", "cpu", run)], [setting], rounds=1, threads=1, burst=0)


def test_the_warm_up_meets_every_shape_once() -> None:
    """An engine that makes kernels for each shape it meets: that time is told apart from the latency."""
    seen: dict[str, list[int]] = {"A": [], "B": []}

    def engine(name: str, cost: float) -> Callable[[Feeds], None]:
        def run(feeds: Feeds) -> None:
            length = feeds["x"].shape[0]
            if length not in seen[name]:
                time.sleep(cost)
            seen[name].append(length)

        return run

    feeds = [{"x": np.zeros(length)} for length in (3, 5, 3, 7, 7)]
    contenders = [Contender("A", "cpu", engine("A", 0.0)), Contender("B", "cpu", engine("B", 0.03))]
    a, b = measure(contenders, [Setting("s", 1, "own", feeds)], rounds=5, warmup=2, threads=1)
    assert seen["A"] == seen["B"] == [3, 5, 7, 3, 5, 3, 7, 7]
    assert a.first_run_ms is not None
    assert b.first_run_ms is not None
    assert b.first_run_ms >= 30
    (none,) = measure(contenders[:1], [Setting("s", 1, "own", feeds)], rounds=2, warmup=0, threads=1)
    assert none.first_run_ms is None


def test_a_warm_up_without_time_stops_after_one_shape() -> None:
    calls: list[tuple[str, int]] = []
    feeds = [{"x": np.full(length, length)} for length in (1, 2, 3)]
    contenders = [Contender("A", "cpu", recorder(calls, "A"))]
    measure(contenders, [Setting("s", 1, "1", feeds)], rounds=1, max_seconds=0, warmup=1, threads=1)
    assert [length for _, length in calls] == [1, 1]


def test_each_setting_and_contender_is_reported_in_order() -> None:
    settings = [Setting("one", 1, "1 x 4", inputs(1)), Setting("eight", 8, "8 x 4", inputs(1))]
    contenders = [Contender("ref", "torch", lambda feeds: None), Contender("int8", "cpu", lambda feeds: None)]
    lines: list[str] = []
    found = measure(contenders, settings, rounds=5, warmup=0, threads=3, progress=lines.append)
    assert [(m.setting, m.batch, m.shape, m.variant, m.provider) for m in found] == [
        ("one", 1, "1 x 4", "ref", "torch"),
        ("one", 1, "1 x 4", "int8", "cpu"),
        ("eight", 8, "8 x 4", "ref", "torch"),
        ("eight", 8, "8 x 4", "int8", "cpu"),
    ]
    assert {m.threads for m in found} == {3}
    assert found[0].ratio_to_reference == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found[0].load_ms is None
    assert found[0].note is None
    assert any("eight" in line for line in lines)
    json.dumps([m.to_json() for m in found], allow_nan=False)


def test_time_limit_stops_after_a_full_round() -> None:
    calls: list[tuple[str, int]] = []
    contenders = [Contender(name, "cpu", recorder(calls, name)) for name in "AB"]
    found = measure(contenders, [Setting("s", 1, "1", inputs(1))], rounds=500, max_seconds=0, warmup=0, threads=1)
    assert [m.rounds for m in found] == [MIN_ROUNDS, MIN_ROUNDS]
    assert len(calls) == 2 * MIN_ROUNDS
    few = measure(contenders, [Setting("s", 1, "1", inputs(1))], rounds=2, max_seconds=0, warmup=0, threads=1)
    assert few[0].rounds == 2


def test_no_collection_during_turns_and_the_setting_is_restored() -> None:
    collecting: list[bool] = []
    contender = Contender("A", "cpu", lambda feeds: collecting.append(gc.isenabled()))
    assert gc.isenabled()
    measure([contender], [Setting("s", 1, "1", inputs(1))], rounds=5, warmup=0, threads=1)
    assert collecting == [False] * 5
    assert gc.isenabled()

    def fail(feeds: Feeds) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure([Contender("A", "cpu", fail)], [Setting("s", 1, "1", inputs(1))], warmup=0, threads=1)
    assert gc.isenabled()


def test_numbers_by_hand() -> None:
    reference = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    own = np.array([5.0, 5.0, 10.0, 10.0, 25.0])  # ratios 2, 4, 3, 4, 2
    row = _summary(Contender("v", "cpu", print), Setting("s", 8, "8", []), 2, own, reference)
    assert row.ratio_to_reference["median"] == 3.0
    assert row.latency_ms == {"p50": 10.0, "p95": pytest.approx(22.0), "min": 5.0}
    assert row.throughput_per_s == pytest.approx(800.0)
    assert row.rounds == 5


def test_ratio_is_taken_within_rounds() -> None:
    """The machine slows down tenfold for two rounds: the ratio of medians would be 3.25, the paired one stays 2."""
    reference = np.array([10.0, 10.0, 100.0, 100.0])
    own = np.array([5.0, 5.0, 50.0, 50.0])
    assert ratio_interval(reference, own) == {"median": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize("rounds", [1, 2, 5, 30])
def test_interval_holds_the_median_and_repeats(rounds: int) -> None:
    for seed in range(20):
        draws = np.random.default_rng(seed)
        reference, own = draws.lognormal(2, 0.3, rounds), draws.lognormal(1, 0.5, rounds)
        found = ratio_interval(reference, own)
        assert found["low"] <= found["median"] <= found["high"]
        assert found == ratio_interval(reference, own)


def test_interval_narrows_with_rounds() -> None:
    draws = np.random.default_rng(7)
    few, many = (ratio_interval(draws.lognormal(1, 0.3, n), np.ones(n)) for n in (10, 1000))
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 2


def test_nothing_to_measure_is_an_error() -> None:
    contender, setting = Contender("A", "cpu", print), Setting("s", 1, "1", inputs(1))
    with pytest.raises(InputError):
        measure([], [setting], threads=1)
    with pytest.raises(InputError):
        measure([contender], [], threads=1)
    with pytest.raises(InputError):
        measure([contender], [setting], rounds=0, threads=1)
    with pytest.raises(InputError, match="'empty'"):
        measure([contender], [Setting("empty", 1, "1", [])], threads=1)


def test_probe_comes_after_all_timing_with_the_threads(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = (
        "import json, os, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'P');"
        "print('noise'); print(json.dumps({'load_ms': 4, 'peak_rss_mb': float(os.environ['OMP_NUM_THREADS'])}))"
    )
    seen.write_text("")
    contender = Contender(
        "A", "cpu", lambda feeds: seen.write_text(seen.read_text() + "T"), [sys.executable, "-c", code, str(seen)]
    )
    settings = [Setting("one", 1, "1", inputs(1)), Setting("two", 1, "1", inputs(1))]
    found = measure([contender], settings, rounds=2, warmup=0, threads=7)
    assert seen.read_text() == "TTTTP"
    assert [(m.load_ms, m.peak_rss_mb, m.note) for m in found] == [(4.0, 7.0, None)] * 2


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("raise SystemExit(9)", "exit code 9"),
        ("print('no json')", "did not print"),
        ("pass", "did not print"),
        ("print([1])", "did not print"),
        ("print('{\"load_ms\": 1}')", "did not print"),
        ("import time; time.sleep(60)", "did not finish"),
    ],
)
def test_failed_probe_leaves_a_note(code: str, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep" in code:
        monkeypatch.setattr("onnxpress.runtime.benchmark._PROBE_TIMEOUT_SECONDS", 0.2)
    contender = Contender("A", "cpu", lambda feeds: None, [sys.executable, "-c", code])
    (found,) = measure([contender], [Setting("s", 1, "1", inputs(1))], rounds=1, warmup=0, threads=1)
    assert found.load_ms is None
    assert found.peak_rss_mb is None
    assert note in str(found.note)


def test_probe_that_cannot_start_leaves_a_note(tmp_path: Path) -> None:
    contender = Contender("A", "cpu", lambda feeds: None, [str(tmp_path / "absent")])
    (found,) = measure([contender], [Setting("s", 1, "1", inputs(1))], rounds=1, warmup=0, threads=1)
    assert "could not be started" in str(found.note)
    assert str(tmp_path) not in str(found.note)


def test_a_session_against_itself_with_its_probe(tiny: Path, feeds: Feeds, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **feeds)
    session = Session(tiny, threads=1)
    probe = command(tiny, tmp_path / "inputs.npz", threads=1)
    contenders = [Contender("a", "cpu", session.run), Contender("b", "cpu", session.run, probe)]
    first, second = measure(contenders, [Setting("s", 3, "3 x 4", [feeds])], rounds=5, threads=1)
    assert first.load_ms is None
    assert second.note is None
    assert second.load_ms is not None
    assert second.peak_rss_mb is not None

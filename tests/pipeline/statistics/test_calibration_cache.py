# SPDX-License-Identifier: Apache-2.0
"""Calibration in pieces: groups that fit in memory, results that are kept, and runs that were interrupted."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.progress import Progress
from onnxpress.pipeline.statistics import Calibration, Statistics, Wanted
from onnxpress.pipeline.statistics import calibration as module

from .encoder import NAMES, SHAPES, Feeds, batches_of, calibration, encoder, everything, model_of, padded

ALL = everything(*NAMES)


class Sessions(Progress):
    """Counts the runs over the data."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, stage: str, detail: str = "") -> None:
        self.lines.append(f"{stage}: {detail}")


def equal(one: Statistics, other: Statistics) -> bool:
    left, right = one.to_arrays(), other.to_arrays()
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the model was run")

    monkeypatch.setattr(module, "Session", refuse)


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("limit", [1, 2000])
def test_a_small_memory_limit_makes_groups_with_the_same_result(limit: int, padding: bool) -> None:
    data = padded("left") if padding else batches_of(*SHAPES)
    sessions = Sessions()
    whole = calibration(data).collect(encoder(), ALL)
    parted = calibration(data, memory_limit=limit, progress=sessions).collect(encoder(), ALL)
    assert equal(whole, parted)
    assert len(sessions.lines) == {1: 3, 2000: 2}[limit]


def test_one_run_answers_all_that_is_reduced_in_the_graph() -> None:
    sessions = Sessions()
    calibration(batches_of(*SHAPES), memory_limit=1, progress=sessions).collect(encoder(), Wanted(NAMES))
    assert sessions.lines == ["calibrate: 3 values on 4 batches"]


def test_gram_groups_fit_the_limit_together_and_keep_the_order() -> None:
    model = encoder()
    names = ["y", "x", "biased", "scores"]
    sizes = {"y": 16 * 36, "biased": 16 * 36, "x": 16 * 16, "scores": 0}
    for limit in (1, 16 * 16, 16 * 52, 1 << 20):
        groups = calibration(batches_of((1, 2)), memory_limit=limit).gram_groups(model, [*names, "y"])
        assert [name for group in groups for name in group] == names
        assert all(len(group) == 1 or sum(sizes[name] for name in group) <= limit for group in groups)
    assert groups == [names]


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """The batches are made when they are asked for, so that only what calibration keeps is left to see."""

    class Made(Sequence[Feeds]):
        def __init__(self, count: int) -> None:
            self.count = count

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: Any) -> Any:
            if not 0 <= index < self.count:
                raise IndexError
            return batches_of((8, 64), seed=index)[0]

    model = encoder()
    peaks = []
    for count in (4, 40):
        together = calibration(Made(count))
        tracemalloc.start()
        together.collect(model, everything("x", "y", "biased", row_count=16))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one = 8 * 64 * 16 * 4
    assert peaks[1] < peaks[0] + 4 * one  # 36 more batches, of which none may stay; Python itself keeps some bytes
    assert peaks[0] > one, "the values of a batch were fetched"


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 1 << 30])
@pytest.mark.parametrize("padding", [True, False])
def test_the_second_time_nothing_is_run(
    tmp_path: Path, limit: int, padding: bool, request: pytest.FixtureRequest
) -> None:
    data = padded("right") if padding else batches_of(*SHAPES)
    wanted = everything(*NAMES, "whole")
    first = calibration(data, cache=tmp_path / "kept", memory_limit=limit).collect(encoder(), wanted)
    assert first.missing == {"whole": "int64, not floating point"}
    assert len(list((tmp_path / "kept").iterdir())) == 1, "what groups left behind is gone"
    request.getfixturevalue("no_session")
    second = calibration(data, cache=tmp_path / "kept").collect(encoder(), wanted)
    assert equal(first, second)
    third = calibration(list(data), cache=tmp_path / "kept").collect(encoder(), everything(*NAMES[::-1]))
    assert third.ranges == first.ranges


def test_infinity_is_remembered(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = model_of('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Exp(x) }')
    data = [{"x": np.array([1000.0, 1], np.float32)}]
    first = calibration(data, cache=tmp_path).collect(model, Wanted(["x", "y"]))
    request.getfixturevalue("no_session")
    assert equal(calibration(data, cache=tmp_path).collect(model, Wanted(["x", "y"])), first)
    assert first.missing == {"y": "reaches infinity on calibration batch 1"}


def _other_weight(model: ir.Model) -> None:
    value = model.graph.initializers["w1"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0, 0] += 1
    value.const_value = ir.tensor(array, name="w1")


def _other_node(model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Abs"


def _nothing(model: ir.Model) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "data", "wanted", "options"),
    [
        (_other_weight, None, ALL, {}),
        (_other_node, None, ALL, {}),
        (_nothing, batches_of(*SHAPES, seed=1), ALL, {}),
        (_nothing, batches_of(*SHAPES[:3]), ALL, {}),
        (_nothing, None, everything(*NAMES, row_count=3), {}),
        (_nothing, None, everything(*NAMES, axis=1), {}),
        (_nothing, padded("left"), ALL, {"mask": "no such input"}),
    ],
    ids=["weight", "node", "data", "less data", "rows", "axis", "mask"],
)
def test_another_model_data_or_question_is_measured_anew(
    tmp_path: Path, change: Any, data: Any, wanted: Wanted, options: Any
) -> None:
    calibration(batches_of(*SHAPES), cache=tmp_path).collect(encoder(), ALL)
    calibration(padded("left"), cache=tmp_path).collect(encoder(), ALL)
    model = encoder()
    change(model)
    fresh, sessions = Calibration(data or batches_of(*SHAPES), threads=1, **options), Sessions()
    kept = calibration(data or batches_of(*SHAPES), cache=tmp_path, progress=sessions, **options)
    assert equal(kept.collect(model, wanted), fresh.collect(model, wanted))
    assert len(sessions.lines) == 1
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "other arrays"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: str) -> None:
    data = batches_of(*SHAPES)
    first = calibration(data, cache=tmp_path).collect(encoder(), ALL)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        place = content.index(first.rows["x"][0].tobytes())
        content[place] ^= 255
    if damage == "other arrays":
        np.savez(file, done=np.asarray(len(data)), **{"ranges|low": np.zeros(3), "ranges|top|y": np.zeros(3)})
    else:
        written = {"empty": b"", "garbage": b"no zip" * 9, "cut": bytes(content[:-300]), "flipped": bytes(content)}
        file.write_bytes(written[damage])
    assert equal(calibration(data, cache=tmp_path).collect(encoder(), ALL), first)
    assert equal(calibration(data, cache=tmp_path).collect(encoder(), ALL), first)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Saves after each batch; runs of the model count down, and the last one is cut short."""
    left = [1 << 30]
    real = module.Session

    class Counting(real):  # type: ignore[misc, valid-type]
        def run(self, *arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted
            return super().run(*arguments, **options)

    monkeypatch.setattr(module, "Session", Counting)
    monkeypatch.setattr(module, "_SAVE_EVERY_SECONDS", 0.0)
    return left


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, interrupting: list[int], after: int) -> None:
    data, wanted = batches_of(*SHAPES), Wanted(NAMES, (), dict.fromkeys(NAMES, -1), NAMES)
    whole = calibration(data).collect(encoder(), wanted)
    interrupting[0] = after
    with pytest.raises(Interrupted):
        calibration(data, cache=tmp_path).collect(encoder(), wanted)
    interrupting[0] = 4 - after
    assert equal(calibration(data, cache=tmp_path).collect(encoder(), wanted), whole)
    assert interrupting[0] == 0, "the batches before it were not run again"


def test_an_interrupted_run_in_groups(tmp_path: Path, interrupting: list[int]) -> None:
    data = padded("holes")
    whole = calibration(data, memory_limit=1).collect(encoder(), ALL)
    interrupting[0] = 1 + 4 + 2
    with pytest.raises(Interrupted):
        calibration(data, cache=tmp_path, memory_limit=1).collect(encoder(), ALL)
    interrupting[0] = 1 + 2 + 4
    assert equal(calibration(data, cache=tmp_path, memory_limit=1).collect(encoder(), ALL), whole)
    assert interrupting[0] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep calibration results in") as caught:
        calibration(batches_of((1, 2)), cache=tmp_path / "file" / "folder").collect(encoder(), ALL)
    assert "Choose another folder" in caught.value.next_step


def test_statistics_survive_a_file_whatever_the_names() -> None:
    names = ["/encoder/layer.0/MatMul|output:0", "ünï", "a b", ""]
    wanted = Wanted(["y"], ["y"], {"y": -1}, ["y"], ["y"])
    found = calibration(batches_of((2, 3))).collect(encoder(), wanted)
    many = Statistics(missing={"gone": "inside a subgraph"})
    for name in names:
        for kind in ("ranges", "histograms", "channels", "grams", "rows"):
            getattr(many, kind)[name] = getattr(found, kind)["y"]
    assert equal(Statistics.from_arrays(many.to_arrays()), many)
    assert Statistics.from_arrays(many.to_arrays()).missing == many.missing

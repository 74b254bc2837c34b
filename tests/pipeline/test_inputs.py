# SPDX-License-Identifier: Apache-2.0
"""The inputs that are compared and timed: shapes, padding on either side, and what a fixed batch asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.data import Dataset
from onnxpress.pipeline.data_files import Example
from onnxpress.pipeline.inputs import (
    HARD_TEXTS,
    Case,
    benchmark_settings,
    calibration_batches,
    comparison_cases,
    dataset_texts,
    golden_cases,
    shaped_inputs,
    stack,
)
from onnxpress.pipeline.recipe import BenchmarkSettings, CalibrationSettings

from .samples import TEXT_INPUTS, LetterTokenizer, exported

LONGEST = max(map(len, HARD_TEXTS)) + 2
SETTINGS = BenchmarkSettings(rounds=5)


def _arrays(count: int, shape: tuple[int, ...] = (3,), name: str = "x") -> Dataset:
    rows = [Example(arrays={name: np.full(shape, i, np.float64)}) for i in range(count)]
    return Dataset(tuple(rows), "arrays", "dev.npz", "0" * 64)


def _texts(*texts: str) -> Dataset:
    return Dataset(tuple(Example(text=t) for t in texts), "text", "dev.tsv", "0" * 64)


def _reader(limit: int = 500, *, special: bool = True) -> Any:
    tokenize = LetterTokenizer(limit, special=special)
    return exported(TEXT_INPUTS, task="text-classification", tokenize=tokenize, max_length=limit)


def _cases_by_name(cases: list[Case]) -> dict[str, Case]:
    assert len({case.name for case in cases}) == len(cases)
    return {case.name: case for case in cases}


def test_the_hard_texts_are_hard() -> None:
    joined = "".join(HARD_TEXTS)
    assert "" in HARD_TEXTS
    for letter in ("ä", "Ω", "模", "안", "👍🏽", "😀", "\N{HORIZONTAL ELLIPSIS}"):
        assert letter in joined


def test_text_cases_have_several_shapes_an_empty_text_one_token_and_padding_on_both_sides() -> None:
    cases = _cases_by_name(comparison_cases(_reader(), None))
    assert cases["empty text"].feeds["input_ids"].shape == (1, 2)
    assert cases["1 token"].feeds["input_ids"].shape == (1, 1)
    assert f"5 x {LONGEST} tokens, padded right" in cases
    assert f"5 x {LONGEST} tokens, padded left" in cases
    assert len({case.feeds["input_ids"].shape for case in cases.values()}) >= 4
    for case in cases.values():
        assert set(case.feeds) == {"input_ids", "attention_mask"}


def test_left_padding_really_moves_the_padding_and_changes_nothing_else() -> None:
    cases = _cases_by_name(comparison_cases(_reader(), None))
    right, left = (cases[f"5 x {LONGEST} tokens, padded {side}"].feeds for side in ("right", "left"))
    assert not np.array_equal(left["attention_mask"], right["attention_mask"])
    for row in range(5):
        count = int(right["attention_mask"][row].sum())
        assert right["attention_mask"][row, :count].all()
        assert left["attention_mask"][row, LONGEST - count :].all()
        assert not left["attention_mask"][row, : LONGEST - count].any()
        assert np.array_equal(left["input_ids"][row, LONGEST - count :], right["input_ids"][row, :count])
        assert not left["input_ids"][row, : LONGEST - count].any()


def test_a_tokenizer_without_special_tokens_makes_no_case_of_no_tokens() -> None:
    reader = _reader(special=False)
    for case in [*comparison_cases(reader, None), *golden_cases(reader, None)]:
        assert all(array.size for array in case.feeds.values())


def test_golden_samples_are_one_for_each_hard_text_and_carry_it() -> None:
    cases = golden_cases(_reader(), None)
    assert [case.text for case in cases] == list(HARD_TEXTS)
    assert all(case.feeds["input_ids"].shape[0] == 1 for case in cases)


def test_array_cases_come_from_the_data_in_the_dtype_of_the_model() -> None:
    model = exported({"x": ("float32", ("batch", 3))})
    cases = comparison_cases(model, _arrays(9))
    assert [case.feeds["x"].shape for case in cases] == [(1, 3), (4, 3)]
    assert cases[1].feeds["x"].dtype == np.float32
    assert cases[1].feeds["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert [case.feeds["x"].shape for case in comparison_cases(model, _arrays(1))] == [(1, 3)]
    assert len(golden_cases(model, _arrays(9))) == 2


@pytest.mark.parametrize("fixed", [1, 4])
def test_a_fixed_batch_is_filled_everywhere(fixed: int) -> None:
    model = exported({"x": ("float32", (fixed, 3))})
    assert [case.feeds["x"].shape for case in comparison_cases(model, _arrays(9))] == [(fixed, 3)]
    for data in (_arrays(9), None):
        (setting,) = benchmark_settings(model, data, SETTINGS)
        assert (setting.name, setting.batch) == ("latency", fixed)
        assert {feeds["x"].shape for feeds in setting.feeds} == {(fixed, 3)}


def test_data_that_does_not_fill_a_fixed_batch_is_refused() -> None:
    model = exported({"x": ("float32", (4, 3))})
    with pytest.raises(InputError, match=r"dev.npz has 3 examples, the model reads batches of 4"):
        comparison_cases(model, _arrays(3))
    with pytest.raises(InputError, match=r"dev.npz has 3 examples, the model reads batches of 4"):
        benchmark_settings(model, _arrays(3), SETTINGS)


@pytest.mark.parametrize("axis", ["batch", "N", "batch_size", None])
def test_the_batch_is_the_first_axis_whatever_its_name(axis: str | None) -> None:
    model = exported({"x": ("float32", (axis, 3)), "y": ("float32", (axis, 5, None))})
    latency, throughput = benchmark_settings(model, None, SETTINGS)
    assert (latency.name, latency.batch, latency.shape) == ("latency", 1, "1x3, 1x5x2")
    assert (throughput.name, throughput.batch, throughput.shape) == ("throughput", 8, "8x3, 8x5x2")
    assert len({feeds["x"].shape[0] for case in comparison_cases(model, None) for feeds in [case.feeds]}) >= 2


def test_array_settings_take_the_data_one_by_one_and_then_in_a_batch() -> None:
    model = exported({"x": ("float32", ("batch", 3))})
    latency, throughput = benchmark_settings(model, _arrays(20), SETTINGS)
    assert [feeds["x"][0, 0] for feeds in latency.feeds] == [0, 1, 2, 3, 4]
    assert (throughput.batch, throughput.shape) == (8, "8x3")
    assert benchmark_settings(model, _arrays(6), SETTINGS)[1].batch == 6


def test_text_settings_are_batch_1_at_own_lengths_and_8_by_128_with_every_token_real() -> None:
    latency, throughput = benchmark_settings(_reader(), _texts("a", "bcd", "efghi", "", "jk", "l", "m"), SETTINGS)
    assert [feeds["input_ids"].shape for feeds in latency.feeds] == [(1, 3), (1, 5), (1, 7), (1, 2), (1, 4)]
    assert (latency.batch, latency.shape) == (1, "1 x own length (2-7 tokens)")
    assert (throughput.batch, throughput.shape) == (8, "8 x 128 tokens")
    assert throughput.feeds[0]["attention_mask"].shape == (8, 128)
    assert throughput.feeds[0]["attention_mask"].all()


def test_a_model_with_few_positions_is_timed_at_what_it_can_read() -> None:
    throughput = benchmark_settings(_reader(limit=64), None, SETTINGS)[1]
    assert throughput.shape == "8 x 64 tokens"
    wide = BenchmarkSettings(batch=3, sequence=16)
    assert benchmark_settings(_reader(), None, wide)[1].shape == "3 x 16 tokens"


def test_texts_of_every_kind_of_data() -> None:
    assert dataset_texts(None) == ([t for t in HARD_TEXTS if t], None)
    pairs = Dataset((Example(text="a", text_pair="b"), Example(text="c", text_pair="d")), "pairs", "p", "")
    assert dataset_texts(pairs) == (["a", "c"], ["b", "d"])
    words = Dataset((Example(words=("New", "York")),), "words", "w", "")
    assert dataset_texts(words) == (["New York"], None)
    with pytest.raises(InputError, match="this model reads text, the data holds arrays"):
        dataset_texts(_arrays(1))


def test_a_pair_is_timed_as_a_pair() -> None:
    pairs = Dataset((Example(text="a", text_pair="bb"),), "pairs", "p", "")
    (feeds,) = benchmark_settings(_reader(), pairs, SETTINGS)[0].feeds
    assert feeds["input_ids"].shape == (1, 2 + len("a|bb"))


def test_arrays_that_do_not_fit_say_which() -> None:
    model = exported({"x": ("float32", ("batch", 3)), "y": ("int64", ("batch",))})
    with pytest.raises(InputError, match=r"dev\.npz has no array for input 'y'") as caught:
        stack(model.signature, _arrays(2), 0, 2)
    assert caught.value.next_step == "It has: x. Name the arrays after the inputs."
    uneven = Dataset((*_arrays(1).examples, *_arrays(1, (4,)).examples), "arrays", "dev.npz", "")
    with pytest.raises(InputError, match="examples of 'x' differ in shape"):
        stack(exported({"x": ("float32", ("batch", None))}).signature, uneven, 0, 2)


def test_random_inputs_follow_the_signature_and_the_example() -> None:
    spec = {
        "x": ("float32", ("batch", 3, "time")),
        "ids": ("int64", ("batch", "time")),
        "attention_mask": ("int64", ("batch", "time")),
        "flag": ("bool", ("batch",)),
        "half": ("float16", (None, 2)),
        "scale": ("float32", ()),
    }
    example = {"ids": np.array([[3, 9]]), "x": np.full((1, 3, 2), 100.0, np.float32)}
    feeds = shaped_inputs(exported(spec, fixed_inputs=example), {"batch": 4, "time": 50}, seed=1)
    for name, (dtype, _) in spec.items():
        assert feeds[name].dtype == dtype
    assert feeds["x"].shape == (4, 3, 50)
    assert abs(feeds["x"].mean() - 100) < 1
    assert (feeds["ids"].min(), feeds["ids"].max()) == (3, 9)
    assert feeds["attention_mask"].all()
    assert feeds["scale"].shape == ()
    again = shaped_inputs(exported(spec, fixed_inputs=example), {"batch": 4, "time": 50}, seed=1)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)


def test_an_input_of_strings_needs_an_example() -> None:
    with pytest.raises(InputError, match="input 'text' is text"):
        shaped_inputs(exported({"text": ("string", ("batch",))}), {}, seed=0)


def test_numbers_that_point_into_another_input_stay_within_it_at_every_size() -> None:
    """Edges name nodes, lengths count steps; ids point into a table, whose size has nothing to do with an input's."""
    spec = {
        "features": ("float32", ("nodes", 3)),
        "edges": ("int64", (2, "edges")),
        "lengths": ("int64", ("batch",)),
        "ids": ("int64", ("batch", "nodes")),
    }
    example = {
        "features": np.zeros((6, 3), np.float32),
        "edges": np.array([[0, 5, 2], [1, 1, 1]]),
        "lengths": np.array([6, 2]),
        "ids": np.array([[90, 91, 92, 93, 94, 95]] * 2),
    }
    for nodes in (1, 2, 6, 50):
        for seed in range(5):
            sizes = {"nodes": nodes, "edges": 40, "batch": 7}
            feeds = shaped_inputs(exported(spec, fixed_inputs=example), sizes, seed=seed)
            assert 0 <= feeds["edges"].min() <= feeds["edges"].max() < min(nodes, 6)
            assert feeds["lengths"].max() <= nodes
            assert feeds["ids"].min() >= 90


def test_examples_without_elements() -> None:
    spec = {"x": ("float32", ("batch", 0)), "ids": ("int64", ("batch", 0))}
    example = {"x": np.zeros((2, 0), np.float32), "ids": np.zeros((2, 0), np.int64)}
    feeds = shaped_inputs(exported(spec, fixed_inputs=example), {"batch": 4}, seed=0)
    assert (feeds["x"].shape, feeds["ids"].shape) == ((4, 0), (4, 0))


def test_sizes_that_the_original_refuses_are_replaced_by_others() -> None:
    class Reference:
        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if feeds["x"].shape[1] < 4:
                raise InputError("kernel size can't be greater than actual input size")
            return {"y": feeds["x"]}

    model = exported({"x": ("float32", ("batch", "height"))}, fixed_inputs={"x": np.zeros((2, 9), np.float32)})
    model.reference = Reference()
    cases = comparison_cases(model, None)
    assert [case.feeds["x"].shape for case in cases] == [(5, 4), (2, 9), (3, 10)]
    model.fixed_inputs = None
    assert [case.feeds["x"].shape for case in comparison_cases(model, None)] == [(5, 4)]


def test_a_graph_of_fixed_sizes_has_one_case() -> None:
    (case,) = comparison_cases(exported({"x": ("float32", (2, 3))}), None)
    assert case.name == "fixed shape"


# --- calibration ------------------------------------------------------------------------------------------------------

CALIBRATION = CalibrationSettings(examples=100, batch=3)


def test_texts_of_one_length_stand_together_without_padding() -> None:
    texts = ["a", "bc", "d", "ef", "ghi", "j", "k", ""]
    batches = calibration_batches(_reader(), _texts(*texts), CALIBRATION)
    assert [feeds["input_ids"].shape for feeds in batches] == [(3, 3), (1, 3), (2, 4), (1, 5), (1, 2)]
    assert all(feeds["attention_mask"].all() for feeds in batches)
    read = sorted(tuple(row) for feeds in batches for row in feeds["input_ids"].tolist())
    assert read == sorted((1, *(3 + ord(letter) for letter in text), 2) for text in texts)


def test_texts_without_a_token_are_left_out_and_none_at_all_is_an_error() -> None:
    reader = _reader(special=False)
    batches = calibration_batches(reader, _texts("", "ab", ""), CALIBRATION)
    assert [feeds["input_ids"].shape for feeds in batches] == [(1, 2)]
    with pytest.raises(InputError, match=r"dev\.tsv holds no example with anything to read"):
        calibration_batches(reader, _texts("", ""), CALIBRATION)


def test_no_more_examples_than_wanted_and_the_same_each_time() -> None:
    data = _texts(*(chr(97 + i) for i in range(20)))
    few = CalibrationSettings(examples=6, batch=4)
    first, second = (calibration_batches(_reader(), data, few) for _ in range(2))
    assert [feeds["input_ids"].shape for feeds in first] == [(4, 3), (2, 3)]
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


def test_pairs_are_read_as_pairs() -> None:
    pairs = Dataset((Example(text="a", text_pair="bb"), Example(text="cc", text_pair="d")), "pairs", "p", "")
    (feeds,) = calibration_batches(_reader(), pairs, CALIBRATION)
    assert feeds["input_ids"].shape == (2, 2 + len("a|bb"))


def test_arrays_are_stacked_in_the_dtype_of_the_model_by_shape() -> None:
    model = exported({"x": ("float32", ("batch", None))})
    rows = [*_arrays(4).examples, *_arrays(2, (5,)).examples, *_arrays(1).examples]
    batches = calibration_batches(model, Dataset(tuple(rows), "arrays", "dev.npz", ""), CALIBRATION)
    assert [(feeds["x"].shape, feeds["x"].dtype) for feeds in batches] == [
        ((3, 3), np.float32), ((2, 3), np.float32), ((2, 5), np.float32),
    ]  # fmt: skip
    assert batches[0]["x"][:, 0].tolist() == [0, 1, 2]


def test_a_fixed_batch_is_filled_or_left_out() -> None:
    model = exported({"x": ("float32", (4, 3))})
    assert [f["x"].shape for f in calibration_batches(model, _arrays(11), CALIBRATION)] == [(4, 3), (4, 3)]
    with pytest.raises(InputError, match=r"dev\.npz: no batch of 4 examples of one shape") as caught:
        calibration_batches(model, _arrays(3), CALIBRATION)
    assert "at least 4" in caught.value.next_step


@pytest.mark.parametrize("name", ["sequence", None])
def test_arrays_that_were_padded_lose_their_padding(name: str | None) -> None:
    """Along every axis of the mask's length, and no other that has the same size by chance, or no name either."""
    shapes: dict[str, tuple[str, tuple[Any, ...]]] = {
        "input_ids": ("int64", (None if name is None else "batch", name)),
        "attention_mask": ("int64", (None if name is None else "batch", name)),
        "features": ("float32", (None if name is None else "batch", name, 4)),
        "other": ("float32", (None if name is None else "batch", 4)),
    }
    rows = []
    for length in (4, 2, 3, 2):
        mask = (np.arange(4) < length).astype(np.int64)
        features = np.broadcast_to(np.arange(4.0)[:, None], (4, 4)).copy()
        rows.append(
            Example(arrays={"input_ids": 7 * mask, "attention_mask": mask, "features": features, "other": np.ones(4)})
        )
    batches = calibration_batches(exported(shapes), Dataset(tuple(rows), "arrays", "d.npz", ""), CALIBRATION)
    assert [f["input_ids"].shape for f in batches] == [(1, 4), (2, 2), (1, 3)]
    assert all(feeds["attention_mask"].all() for feeds in batches)
    assert [f["features"].shape for f in batches] == [(1, 4, 4), (2, 2, 4), (1, 3, 4)]
    assert batches[1]["features"][0, :, 0].tolist() == [0, 1]
    assert [f["other"].shape for f in batches] == [(1, 4), (2, 4), (1, 4)]


@pytest.mark.parametrize("mask", [[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
def test_padding_that_is_not_at_the_end_stays_for_the_mask_to_tell(mask: list[int]) -> None:
    rows = (Example(arrays={"input_ids": np.arange(4), "attention_mask": np.array(mask)}),)
    (feeds,) = calibration_batches(exported(TEXT_INPUTS), Dataset(rows, "arrays", "d.npz", ""), CALIBRATION)
    assert feeds["input_ids"].tolist() == [[0, 1, 2, 3]]


def test_a_fixed_length_keeps_its_padding() -> None:
    shapes: dict[str, tuple[str, tuple[Any, ...]]] = {n: ("int64", ("batch", 4)) for n in TEXT_INPUTS}
    rows = (Example(arrays={"input_ids": np.arange(4), "attention_mask": np.array([1, 1, 0, 0])}),)
    (feeds,) = calibration_batches(exported(shapes), Dataset(rows, "arrays", "d.npz", ""), CALIBRATION)
    assert feeds["input_ids"].shape == (1, 4)


def test_data_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"net\.onnx has no tokenizer, so it cannot read texts") as caught:
        calibration_batches(exported({"x": ("float32", ("batch", 3))}), _texts("a"), CALIBRATION)
    assert "one array an input" in caught.value.next_step
    with pytest.raises(InputError, match="this model reads text, the data holds arrays"):
        calibration_batches(_reader(), _arrays(2), CALIBRATION)
    with pytest.raises(InputError, match=r"dev\.npz has no array for input 'y'"):
        calibration_batches(exported({"y": ("float32", ("batch", 3))}), _arrays(2), CALIBRATION)

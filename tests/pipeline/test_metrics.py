# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand and naive implementations; broken outputs never give a good number."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline import metrics
from onnxpress.pipeline.metrics import (
    ErrorAccumulator,
    accuracy,
    cosine_rows,
    entity_f1,
    json_number,
    neighbour_accuracy,
    spearman,
    tensor_errors,
    top1_agreement,
)

NAN, INF = math.nan, math.inf
few = settings(max_examples=60, deadline=None)


def test_accuracy_is_in_percent_and_the_first_of_equal_logits_counts():
    assert accuracy([[1.0, 2.0], [3.0, 0.0], [5.0, 5.0]], [1, 1, 0]) == pytest.approx(200 / 3)


def test_accuracy_counts_a_row_with_nan_as_wrong_although_argmax_points_at_the_nan():
    assert accuracy([[0.0, NAN], [0.0, 1.0]], [1, 1]) == 50.0
    assert accuracy([[0.0, INF], [-INF, 1.0]], [1, 1]) == 100.0


@pytest.mark.parametrize(("shape", "labels"), [((2, 3), 3), ((4,), 4), ((0, 3), 0), ((2, 0), 2)])
def test_accuracy_refuses_shapes_that_do_not_match(shape, labels):
    with pytest.raises(ValueError):
        accuracy(np.zeros(shape), np.zeros(labels, np.int64))


def test_top1_agreement_of_any_rank_counts_rows_and_nan_disagrees_with_itself():
    a = np.array([[[1.0, 2.0, 0.0], [9.0, 1.0, 1.0]], [[0.0, 0.0, 1.0], [NAN, 0.0, 0.0]]])
    b = np.array([[[1.0, 7.0, 0.0], [1.0, 9.0, 1.0]], [[0.0, 0.0, 2.0], [NAN, 0.0, 0.0]]])
    assert top1_agreement(a, b) == 50.0
    with pytest.raises(ValueError):
        top1_agreement(a, b[0])
    with pytest.raises(ValueError):
        top1_agreement(a[:0], b[:0])


# Entities worked out by hand from conlleval's rules: (tags, [(type, first, last), ...])
ENTITIES = [
    ("O O", []),
    ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
    ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),  # IOB1 writes the same entities so
    ("I-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),  # IOB1: B- only between neighbours
    ("I-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
    ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
    ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("S-PER S-PER I-PER", [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2)]),
    ("B-PER I-PER E-PER E-PER", [("PER", 0, 2), ("PER", 3, 3)]),
    ("E-PER I-PER B-PER", [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2)]),
    ("B I O I", [("", 0, 1), ("", 3, 3)]),
    ("B-a-b I-a-b I-a", [("a-b", 0, 1), ("a", 2, 2)]),
]


@pytest.mark.parametrize(("tags", "entities"), ENTITIES)
def test_entities_follow_conlleval(tags, entities):
    assert list(metrics._entities(tags.split())) == entities


def test_entity_f1_of_seqevals_own_example_is_one_half():
    gold = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_f1(found, gold) == 50.0


def test_entity_f1_weighs_precision_and_recall():
    # 1 of 3 found entities is right, 1 of 2 wanted ones was found: 2 * (1/3) * (1/2) / (1/3 + 1/2) = 0.4
    assert entity_f1([["B-A", "B-A", "B-B"]], [["B-A", "O", "B-A"]]) == pytest.approx(40.0)


def test_entity_f1_does_not_join_sentences_nor_mistake_one_for_another():
    assert entity_f1([["I-A"], ["I-A"]], [["I-A"], ["B-A"]]) == 100.0
    assert entity_f1([["I-A"], ["O"]], [["O"], ["I-A"]]) == 0.0


def test_entity_f1_agrees_between_iob1_and_iob2():
    iob1 = [["I-A", "I-A", "B-A", "O", "I-B"]]
    iob2 = [["B-A", "I-A", "B-A", "O", "B-B"]]
    assert entity_f1(iob1, iob2) == entity_f1(iob2, iob1) == 100.0


def test_entity_f1_without_entities_is_zero():
    assert entity_f1([["O"]], [["O"]]) == entity_f1([], []) == 0.0


@pytest.mark.parametrize("tag", ["LABEL_0", "L-PER", "b-PER", "", "PER", "B_PER"])
def test_entity_f1_refuses_what_is_no_tag(tag):
    with pytest.raises(InputError, match="entity tag") as caught:
        entity_f1([["O", tag]], [["O", "O"]])
    assert "id2label" in caught.value.next_step


def test_entity_f1_refuses_lengths_that_differ():
    with pytest.raises(ValueError):
        entity_f1([["O"]], [["O", "O"]])
    with pytest.raises(ValueError):
        entity_f1([["O"]], [["O"], ["O"]])


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == 1.0
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0
    # ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8, abs=1e-15)
    # ranks 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    assert spearman([0, 1, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5), abs=1e-15)
    assert spearman([-INF, 0, INF], [1, 2, 3]) == 1.0


@pytest.mark.parametrize(("x", "y"), [([], []), ([1], [1]), ([1, 1], [1, 2]), ([1, 2], [3, 3]), ([1, NAN], [1, 2])])
def test_spearman_without_a_correlation_is_nan(x, y):
    assert math.isnan(spearman(x, y))


def test_spearman_refuses_shapes_that_differ():
    with pytest.raises(ValueError):
        spearman([1, 2], [1, 2, 3])


def naive_ranks(values):
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


@few
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_spearman_is_pearson_of_the_ranks(pairs):
    x, y = (list(column) for column in zip(*pairs, strict=True))
    rank_x, rank_y = np.array(naive_ranks(x)), np.array(naive_ranks(y))
    if np.ptp(rank_x) == 0 or np.ptp(rank_y) == 0:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(np.corrcoef(rank_x, rank_y)[0, 1], abs=1e-12)


def test_cosine_rows_by_hand():
    a = [[1, 0], [1, 1], [0, 0], [0, 0], [1e200, 0], [1e-200, 1e-200], [NAN, 1], [INF, 1]]
    b = [[0, 2], [3, 3], [0, 0], [1, 0], [-1e300, 0], [1, 0], [1, 1], [1, 1]]
    found = cosine_rows(a, b)
    assert found[:6] == pytest.approx([0, 1, 1, 0, -1, math.sqrt(0.5)], abs=1e-15)
    assert np.isnan(found[6:]).all()
    assert cosine_rows(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0,)
    assert cosine_rows(np.array([[6e4, 6e4]], np.float16), np.array([[6e4, 6e4]], np.float16)) == pytest.approx([1.0])
    with pytest.raises(ValueError):
        cosine_rows([[1, 2]], [[1, 2], [3, 4]])


def test_neighbour_accuracy_by_hand():
    rows = [[1, 0], [2, 0.1], [0, 1], [0.1, 2], [-1, 0]]  # 0-1 and 2-3 are neighbours; 4's are 2 at cosine 0
    assert neighbour_accuracy(rows, ["x", "x", "y", "y", "y"]) == 100.0
    assert neighbour_accuracy(rows, ["x", "x", "y", "y", "x"]) == 80.0
    assert neighbour_accuracy(rows, ["x", "y", "x", "y", "z"]) == 0.0


def test_neighbour_accuracy_takes_the_lowest_index_of_equal_cosines():
    rows = [[1, 0], [2, 0], [3, 0]]  # 0's nearest is 1, that of 1 and 2 is 0
    assert neighbour_accuracy(rows, [0, 1, 1]) == 0.0
    assert neighbour_accuracy(rows, [0, 0, 1]) == pytest.approx(200 / 3)


def test_neighbour_accuracy_never_credits_a_row_that_is_not_finite():
    rows = [[NAN, 1], [1, 0], [1, 0], [INF, 0]]
    assert neighbour_accuracy(rows, [0, 0, 0, 0]) == 50.0
    assert neighbour_accuracy([[NAN], [1.0]], [0, 0]) == 0.0


@pytest.mark.parametrize(("rows", "labels"), [(np.zeros((1, 2)), [0]), (np.zeros(3), [0] * 3), (np.ones((3, 1)), [0])])
def test_neighbour_accuracy_refuses_other_shapes(rows, labels):
    with pytest.raises(ValueError):
        neighbour_accuracy(rows, labels)


def naive_neighbour_accuracy(rows, labels):
    def cosine(a, b):
        norms = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
        return sum(v * w for v, w in zip(a, b, strict=True)) / norms if norms else 0.0

    hits = 0
    for i, row in enumerate(rows):
        best, nearest = -2.0, -1
        for j, other in enumerate(rows):
            if j != i and cosine(row, other) > best + 1e-9:  # cosines of small integers are equal or further apart
                best, nearest = cosine(row, other), j
        hits += labels[nearest] == labels[i]
    return 100.0 * hits / len(rows)


@few
@given(
    st.lists(
        st.tuples(st.lists(st.integers(-3, 3), min_size=3, max_size=3), st.integers(0, 2)), min_size=2, max_size=12
    ),
    st.integers(1, 13),
)
def test_neighbour_accuracy_equals_a_double_loop_for_any_chunk(examples, chunk):
    rows, labels = zip(*examples, strict=True)
    wanted = naive_neighbour_accuracy(rows, labels)
    assert neighbour_accuracy(rows, labels, chunk=chunk) == neighbour_accuracy(rows, labels) == wanted


def test_tensor_errors_by_hand():
    reference = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    candidate = np.array([[3.0, 0.5], [0.0, 3.0]], np.float32)
    found = tensor_errors(reference, candidate)
    assert found == {
        "max_abs_error": 1.0,
        "mean_abs_error": 0.375,
        "relative_error": pytest.approx(math.sqrt(1.25) / 5, abs=1e-15),
        "sqnr_db": pytest.approx(10 * math.log10(25 / 1.25), abs=1e-12),
        "cosine": pytest.approx(21 / (5 * math.sqrt(18.25)), abs=1e-15),
        "top1_agreement": 100.0,
        "elements": 4,
        "reference_nonfinite": 0,
        "candidate_nonfinite": 0,
    }


def distances(reference, candidate, mask=None):
    found = tensor_errors(reference, candidate, mask)
    return [found[name] for name in ("max_abs_error", "mean_abs_error", "relative_error", "sqnr_db", "cosine")]


IDENTICAL = [0, 0, 0, INF, 1]
BROKEN = [INF, INF, INF, -INF, -1]


@pytest.mark.parametrize(
    ("reference", "candidate", "wanted"),
    [
        ([1.0, 2.0], [1.0, 2.0], IDENTICAL),
        ([0.0, 0.0], [0.0, -0.0], IDENTICAL),
        ([0.0, 0.0], [1.0, 0.0], [1, 0.5, INF, -INF, 0]),
        ([1.0, 0.0], [0.0, 0.0], [1, 0.5, 1, 0, 0]),
        ([1.0, 1.0], [1.0, NAN], BROKEN),
        ([1.0, 1.0], [1.0, INF], BROKEN),
        ([1.0, NAN], [1.0, 1.0], BROKEN),
        ([1.0, NAN], [1.0, NAN], BROKEN),
        ([1.0, INF], [1.0, -INF], BROKEN),
        ([1.0, INF], [1.0, 1e300], BROKEN),
        ([1.0, -INF], [1.0, -INF], IDENTICAL),
        ([2.0, -INF], [1.0, -INF], [1, 0.5, 0.5, 10 * math.log10(4), 1]),
        ([1, 2], [1, 2], IDENTICAL),
        ([True, False], [True, True], [1, 0.5, 1, 0, 1 / math.sqrt(2)]),
        ([1e200, 0.0], [1e200, 0.0], IDENTICAL),
        ([1e200, 0.0], [2e200, 0.0], [1e200, 5e199, INF, -INF, -1]),
        ([1e-200, 1e-200], [0.0, 1e-200], [1e-200, 5e-201, INF, -INF, 0]),
        ([-1e308], [1e308], [INF, INF, INF, -INF, -1]),
    ],
)
def test_distances_at_the_limits(reference, candidate, wanted):
    assert distances(np.array(reference), np.array(candidate)) == pytest.approx(wanted, abs=1e-15)


def test_a_huge_reference_does_not_hide_a_small_error_behind_an_infinite_signal():
    found = tensor_errors([1e200, 1.0], [1e200, 3.0])
    assert math.isfinite(found["sqnr_db"])
    assert found["relative_error"] > 0
    assert found["cosine"] == -1


def test_half_precision_does_not_overflow():
    reference = np.full(1000, 60000, np.float16)
    candidate = np.full(1000, -60000, np.float16)
    assert distances(reference, candidate) == pytest.approx([120000, 120000, 2, 10 * math.log10(0.25), -1])


def test_of_nothing_every_error_is_nan_and_passes_no_gate():
    empty = [tensor_errors(np.zeros((0, 4)), np.zeros((0, 4))), tensor_errors([1.0], [2.0], [False])]
    for found in [*empty, ErrorAccumulator().result()]:
        assert found["elements"] == 0
        assert found["top1_agreement"] is None
        assert math.isnan(found["max_abs_error"])
        assert not found["sqnr_db"] > 0


def test_counts_of_nonfinite_values():
    found = tensor_errors([1.0, INF, NAN, 1.0], [NAN, INF, NAN, INF])
    assert (found["reference_nonfinite"], found["candidate_nonfinite"]) == (2, 4)


def test_only_masked_in_positions_are_compared():
    reference = np.arange(12.0).reshape(2, 3, 2)
    candidate = reference.copy()
    candidate[0, 2] = NAN
    candidate[1, 1:] = [[99, 0], [99, 0]]
    found = tensor_errors(reference, candidate, np.array([[True, True, False], [True, False, False]]))
    assert found["sqnr_db"] == INF
    assert (found["elements"], found["top1_agreement"], found["candidate_nonfinite"]) == (6, 100.0, 0)
    repeated = tensor_errors(reference, candidate, np.array([[True, False, False]]))
    assert (repeated["elements"], repeated["max_abs_error"]) == (4, 0)


def test_a_mask_of_the_last_axis_restricts_where_the_highest_value_may_be():
    reference, candidate = np.array([[1.0, 5.0, 9.0]]), np.array([[1.0, 5.0, 0.0]])
    assert tensor_errors(reference, candidate)["top1_agreement"] == 0.0
    assert tensor_errors(reference, candidate, np.array([[True, True, False]]))["top1_agreement"] == 100.0


@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
def test_top1_agreement_is_none_without_rows_of_two(shape):
    assert tensor_errors(np.ones(shape), np.ones(shape))["top1_agreement"] is None


@pytest.mark.parametrize(
    ("reference", "candidate", "mask"),
    [
        ([1.0, 2.0], [1.0], None),
        (["a"], ["b"], None),
        ([1j], [1j], None),
        ([1.0], [1.0], [1]),
        ([1.0], [1.0], [[True]]),
        ([[1.0], [2.0]], [[1.0], [2.0]], [True, True, False]),
    ],
)
def test_tensor_errors_refuses_what_cannot_be_compared(reference, candidate, mask):
    with pytest.raises(ValueError):
        tensor_errors(np.array(reference), np.array(candidate), mask)


values = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([NAN, INF, -INF]), st.floats(-1e3, 1e3, width=32))
rows = st.lists(st.tuples(*[values] * 6, *[st.booleans()] * 3), max_size=12)


@few
@given(rows, st.lists(st.integers(0, 12), max_size=3), st.sampled_from([1, 3, 2**20]))
def test_batches_merge_to_the_same_result_as_their_concatenation(rows, cuts, chunk):
    table = np.array(rows, np.float64).reshape(-1, 9)
    reference, candidate, mask = table[:, :3], table[:, 3:6], table[:, 6:] > 0
    merged = ErrorAccumulator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK", chunk)
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(table)], strict=True):
            merged.add(reference[start:stop], candidate[start:stop], mask[start:stop])
    whole = tensor_errors(reference, candidate, mask)
    found = merged.result()
    for name in ("max_abs_error", "top1_agreement", "elements", "reference_nonfinite", "candidate_nonfinite"):
        np.testing.assert_equal(found.pop(name), whole.pop(name))
    assert found == pytest.approx(whole, rel=1e-10, abs=1e-10, nan_ok=True)


@few
@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=1, max_size=20))
def test_distances_equal_a_plain_loop(pairs):
    noise = sum((a - b) ** 2 for a, b in pairs)
    signal = sum(a * a for a, _ in pairs)
    found = tensor_errors([a for a, _ in pairs], [b for _, b in pairs])
    assert found["max_abs_error"] == max(abs(a - b) for a, b in pairs)
    assert found["mean_abs_error"] == sum(abs(a - b) for a, b in pairs) / len(pairs)
    if noise and signal:
        assert found["relative_error"] == pytest.approx(math.sqrt(noise / signal), rel=1e-12)
        assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), rel=1e-12, abs=1e-12)


def test_json_number_holds_every_result():
    assert [json_number(v) for v in (1.5, 0, None, INF, NAN)] == [1.5, 0, None, None, None]
    assert json_number(-INF) == -sys.float_info.max
    broken = {k: json_number(v) for k, v in tensor_errors([1.0], [NAN]).items()}
    assert json.loads(json.dumps(broken, allow_nan=False))["sqnr_db"] < -1e300

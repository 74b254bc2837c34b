# SPDX-License-Identifier: Apache-2.0
"""The budget is spent where it costs least: exactly, held to trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxpress.pipeline.structure.budget import Level, choose, level_sizes


def brute_force(levels: dict[str, list[Level]], wanted: float) -> float:
    errors = [sum(one.error for one in picked) for picked in product(*levels.values())
              if sum(one.saving for one in picked) >= wanted]  # fmt: skip
    return min(errors)


groups = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 50)), min_size=1, max_size=4),
    min_size=1,
)


@example({"a": [(1, 26)], "b": [(1, 28)], "c": [(1, 3), (2, 18)], "d": [(1, 47)]}, 0.875)  # a coarse grid misses it
@given(groups, st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_choice_is_the_best(raw: dict[str, list[tuple[int, int]]], share: float) -> None:
    levels = {
        name: [Level(0, 0.0, 0.0), *(Level(i + 1, float(e), float(s)) for i, (e, s) in enumerate(many))]
        for name, many in raw.items()
    }
    most = sum(max(level.saving for level in many) for many in levels.values())
    # A tenth of a unit below: savings are rounded down to a grid, which must not exclude the exact sum
    wanted = max(0.5, round(share * most)) - 0.1
    found = choose(levels, wanted)
    assert found is not None
    picked = [next(level for level in levels[name] if level.removed == count) for name, count in found.items()]
    assert sum(level.saving for level in picked) >= wanted
    assert sum(level.error for level in picked) == pytest.approx(brute_force(levels, wanted))


def test_too_much_is_not_found() -> None:
    assert choose({"a": [Level(0, 0, 0), Level(1, 1, 0.2)]}, 0.3) is None


def test_an_expensive_group_is_spared() -> None:
    cheap = [Level(n, 0.01 * n, 0.1 * n) for n in range(5)]
    dear = [Level(n, 1.0 * n, 0.1 * n) for n in range(5)]
    assert choose({"cheap": cheap, "dear": dear}, 0.35) == {"cheap": 4, "dear": 0}


@pytest.mark.parametrize(
    ("size", "multiple", "minimum", "left"),
    [
        (32, 8, 0.1, [32, 24, 16, 8]),
        (64, 16, 0.5, [64, 48, 32]),
        (12, 1, 0.1, [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2]),
        (12, 8, 0.1, [12, 8]),
        (100, 8, 0.5, [100, 96, 88, 80, 72, 64, 56]),
        (16, 16, 0.1, [16, 8]),
        (3, 8, 0.1, [3, 2, 1]),
        (2, 8, 0.1, [2, 1]),
    ],
)
def test_sizes_that_kernels_like(size: int, multiple: int, minimum: float, left: list[int]) -> None:
    assert [size - n for n in level_sizes(size, multiple, minimum)] == left


def test_wide_groups_offer_few_sizes() -> None:
    sizes = level_sizes(30000, 8, 0.1)
    assert len(sizes) <= 49
    assert sizes[0] == 0
    assert all((30000 - n) % 8 == 0 for n in sizes)

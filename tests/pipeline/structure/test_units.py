# SPDX-License-Identifier: Apache-2.0
"""Classes of tied units, against a union-find that takes one tie at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.pipeline.structure.units import Units


def naive_classes(count: int, ties: list[tuple[int, int]]) -> list[int]:
    """The smallest unit of each unit's class."""
    classes = [{unit} for unit in range(count)]
    for one, other in ties:
        joined = classes[one] | classes[other]
        for unit in joined:
            classes[unit] = joined
    return [min(members) for members in classes]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(
    st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=40))))  # fmt: skip
def test_classes_are_those_of_a_union_find(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, ties = case
    units = Units()
    units.fresh(count)
    for one, other in ties:
        units.tie(np.asarray([one]), np.asarray([other]))
    assert units.classes().tolist() == naive_classes(count, ties)


def test_a_long_chain_in_the_worst_order_is_one_class() -> None:
    units = Units()
    ids = units.fresh(1000)
    units.tie(ids[:-1], ids[1:])
    assert not units.classes().any()


def test_tie_broadcasts_and_close_keeps_each_unit_once() -> None:
    units = Units()
    rows, heads = units.fresh(6), units.fresh(3)
    units.tie(rows.reshape(3, 2), heads[:, None])
    assert units.classes().tolist() == [0, 0, 2, 2, 4, 4, 0, 2, 4]
    units.close(np.asarray([4, 4, 1]), "node", "why")
    units.close(None, "node", "nothing to close")
    (closed,) = units.closed
    assert (closed.node, closed.reason, closed.units.tolist()) == ("node", "why", [1, 4])
    assert units.fresh(2).tolist() == [9, 10]

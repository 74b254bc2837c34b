# SPDX-License-Identifier: Apache-2.0
"""Rules of lookups by several numbers at once, and of products in whole numbers that are rounded as they come.

DynamicQuantizeLinear takes its scale from the largest and smallest element and zero, so that what is cut, which would
be zero under a mask, has no part in it.

Reference: GatherND-13, ScatterND-18, DynamicQuantizeLinear-11, MatMulInteger-10 in ONNX's Operators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..passes.graph import attribute
from .rules import matrix_product, unknown
from .walk import Axes, Walk, rule


@rule("GatherND")
def _gather_many(walk: Walk, node: ir.Node) -> list[Axes | None]:
    found = _looked_up(walk, node)
    if found is None or attribute(node, "batch_dims", 0):
        return unknown(walk, node, "GatherND of an unknown form")
    where, _, rest = found
    return [[*where, *rest]]


@rule("ScatterND")
def _scatter(walk: Walk, node: ir.Node) -> list[Axes | None]:
    found, updates = _looked_up(walk, node), walk.of(node.inputs[2])
    if found is None or updates is None or attribute(node, "reduction", "none") not in ("none", "add"):
        return unknown(walk, node, "ScatterND of an unknown form")
    where, first, rest = found
    for units in updates[: len(where)]:
        walk.close(node, units, "rows are written by their number")
    for place, (own, new) in enumerate(zip(rest, updates[len(where) :], strict=True)):
        if own is not None or new is not None:
            rest[place] = walk.tie(node, own, new)
    return [[*first, *rest]]


def _looked_up(walk: Walk, node: ir.Node) -> tuple[Axes, Axes, Axes] | None:
    """Axes of the indices, of the data by which it is looked up, and of the rest; None if not known."""
    data, indices = walk.of(node.inputs[0]), walk.of(node.inputs[1])
    if data is None or indices is None:
        return None
    count = walk.size(node.inputs[1], -1)
    if count is None or not walk.fixed(node.inputs[1], -1) or count > len(data):  # type: ignore[arg-type]
        return None
    for units in (*data[:count], *indices):
        walk.close(node, units, "rows are looked up by their number")
    return list(indices[:-1]), list(data[:count]), list(data[count:])


@rule("DynamicQuantizeLinear")
def _rounded_as_it_comes(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data = walk.of(node.inputs[0])
    return [data, [], []] if data is not None else unknown(walk, node, "data of unknown rank")


@rule("MatMulInteger")
def _integer_product(walk: Walk, node: ir.Node) -> Sequence[Axes | None]:
    found = matrix_product(walk, node)
    columns, offsets = walk.of(node.inputs[1]), walk.of(walk.input(node, 3))
    rows = walk.of(walk.input(node, 2))
    if rows:
        walk.close(node, rows[-1], "rows with zero points of their own")
    several = bool(offsets) and walk.size(node.inputs[3], -1) != 1
    if several and columns and offsets and (columns[-1] is not None or offsets[-1] is not None):
        walk.tie(node, columns[-1], offsets[-1])
    return found

# SPDX-License-Identifier: Apache-2.0
"""Rules of LSTM, GRU and RNN: a hidden unit is cut with its gates, its recurrent column and its state.

Both directions have the same number of hidden units, and lose the same ones.

Reference: LSTM-22, GRU-22, RNN-22 in ONNX's Operators.md: weights are [directions, gates x hidden, ...].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..passes.graph import attribute
from .rules import contract, unknown
from .units import Ids
from .walk import Axes, Walk, rule

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM", "GRU", "RNN")
def _recurrent(walk: Walk, node: ir.Node) -> list[Axes | None]:
    data, weight, again = (walk.of(walk.input(node, index)) for index in range(3))
    if data is None or weight is None or again is None or again[2] is None:
        return unknown(walk, node, f"{node.op_type} without constant weights")
    hidden, gates = again[2], _GATES[node.op_type]
    contract(walk, node, data[-1], weight[2])
    for stacked, rows in ((weight[1], gates), (again[1], gates), (_last(walk, node, 3), 2 * gates)):
        _stacked(walk, node, stacked, rows, hidden)
    if node.op_type == "LSTM":
        _stacked(walk, node, _last(walk, node, 7), 3, hidden)
    for index in (1, 2, 3, 7):
        axes = walk.of(walk.input(node, index))
        walk.close(node, axes[0] if axes else None, "it counts directions")
    steps, batch = (1, 0) if attribute(node, "layout", 0) else (0, 1)
    walk.close(node, data[steps], "it counts steps in time")
    for index in (5, 6) if node.op_type == "LSTM" else (5,):
        state = walk.of(walk.input(node, index))
        if state is not None:
            walk.tie(node, hidden, state[-1])
            for units in (state[0], state[1], data[batch]):
                walk.close(node, units, "it counts directions or samples")
    walk.count_attribute(node, "hidden_size", hidden)
    return _outputs(node, data, hidden)


def _last(walk: Walk, node: ir.Node, index: int) -> Ids | None:
    axes = walk.of(walk.input(node, index))
    return axes[-1] if axes else None


def _stacked(walk: Walk, node: ir.Node, stacked: Ids | None, rows: int, hidden: Ids) -> None:
    """Tie [rows x hidden] to the hidden units."""
    if stacked is None:
        return
    if len(stacked) != rows * len(hidden):
        walk.close(node, stacked, "gates of another size")
        walk.close(node, hidden, "gates of another size")
        return
    walk.units.tie(stacked.reshape(rows, -1), np.broadcast_to(hidden, (rows, len(hidden))))


def _outputs(node: ir.Node, data: Axes, hidden: Ids) -> list[Axes | None]:
    if attribute(node, "layout", 0):
        outputs: list[Axes | None] = [[data[0], data[1], None, hidden], [data[0], None, hidden]]
    else:
        outputs = [[data[0], None, data[1], hidden], [None, data[1], hidden]]
    return [*outputs, outputs[1]][: len(node.outputs)]

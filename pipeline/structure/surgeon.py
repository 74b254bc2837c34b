# SPDX-License-Identifier: Apache-2.0
"""Which inputs of linear layers can go at least cost, and what the rest of the weights becomes.

A layer computes X W. Without some of its inputs it computes X_S W', and the best W' follows from the Gram matrix alone:

    W' = (X_S^T X_S + lambda I)^-1 X_S^T X W        (ridge regression)

`Surgeon` removes units one small batch after the other, each time those whose loss costs least when all others make up
for it: with H = X^T X + lambda I, losing the rows B of W costs tr(W_B^T [(H^-1)_BB]^-1 W_B), and the update is
W -= (H^-1)_:B [(H^-1)_BB]^-1 W_B. A unit is one input (a neuron) or several (a head, a channel under a kernel); where
several layers read the same units, their costs are added, each relative to what its layer puts out.

References: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon" (1993); Kurtic et
al., "ZipLM: inference-aware structured pruning of language models" (arXiv 2302.04089), for whole structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 96
"""A group is taken down in about so many batches: fewer are faster, more see dependencies between units earlier."""


@dataclass(frozen=True)
class Linear:
    """What a layer says about its inputs.

    Attributes:
        gram: X^T X over the calibration data, float64 [K, K]; with a bias a last row and column for a constant 1.
        weight: float64 [K, N], with a bias as the last row.
        rows: Which rows belong to each unit, int64 [units, rows of a unit].
        fixed: Rows at the end that always stay: 1 with a bias, else 0.
    """

    gram: np.ndarray
    weight: np.ndarray
    rows: np.ndarray
    fixed: int = 0

    def energy(self) -> float:
        """What the layer puts out: the sum of squares about the mean where a bias could hold the mean."""
        gram = self.gram[: -self.fixed, : -self.fixed] if self.fixed else self.gram
        weight = self.weight[: -self.fixed] if self.fixed else self.weight
        if self.fixed:
            total = self.gram[-1, :-1]
            gram = gram - np.outer(total, total) / max(self.gram[-1, -1], 1.0)
        return max(float(np.einsum("kn,kn->", weight, gram @ weight)), 1e-30)


@dataclass(frozen=True)
class Removal:
    """The way down.

    Attributes:
        order: All units that may go, in the order in which they go.
        errors: float64 [units + 1]: relative squared error of the layers' outputs, in the mean, after so many.
        snapshots: Removed units to the layers' weights then, [K, N] each, zero in the rows that are gone.
    """

    order: np.ndarray
    errors: np.ndarray
    snapshots: dict[int, list[np.ndarray]]


class Surgeon:
    """Takes units away from the layers that read them.

    Args:
        layers: All linear readers of the units.
        damping: lambda, relative to the mean of the Gram matrix's diagonal.
    """

    def __init__(self, layers: Sequence[Linear], damping: float = 0.01) -> None:
        self.units = len(layers[0].rows)
        self._states = [_State(layer, damping) for layer in layers]
        self._share = [1 / (layer.energy() * len(layers)) for layer in layers]

    def remove(self, until: int, snapshots: Sequence[int] = (), *, steps: int = STEPS) -> Removal:
        """Remove `until` units, and keep the weights as they are after each number in `snapshots`."""
        alive = np.arange(self.units)
        order: list[int] = []
        errors = np.zeros(until + 1)
        kept: dict[int, list[np.ndarray]] = {}
        stops = sorted({*[s for s in snapshots if s <= until], until})
        batch = max(1, until // steps)
        while len(order) < until:
            nearest = next(stop for stop in stops if stop > len(order))
            count = min(batch, nearest - len(order))
            scores = np.zeros(len(alive))
            for state, share in zip(self._states, self._share, strict=True):
                scores += share * state.costs(alive)
            chosen = alive[np.argsort(scores, kind="stable")[:count]]
            before = errors[len(order)]
            cost = sum(share * s.take(chosen) for s, share in zip(self._states, self._share, strict=True))
            errors[len(order) : len(order) + count + 1] = np.linspace(before, before + cost, count + 1)
            order += chosen.tolist()
            alive = np.setdiff1d(alive, chosen)
            if len(order) in stops:
                kept[len(order)] = [state.weights() for state in self._states]
        if 0 in stops:
            kept[0] = [state.weights() for state in self._states]
        return Removal(np.asarray(order, np.int64), errors, kept)


class _State:
    """One layer on the way down; matrices shrink as rows go, so that later steps cost less."""

    def __init__(self, layer: Linear, damping: float) -> None:
        size, free = len(layer.gram), len(layer.gram) - layer.fixed
        hessian = np.array(layer.gram, np.float64)
        hessian[np.arange(free), np.arange(free)] += _ridge(layer.gram, layer.fixed, damping)
        if layer.fixed:
            hessian[free:, free:] += 1e-12
        self._inverse = np.linalg.inv(hessian)
        self._weight = np.array(layer.weight, np.float64)
        self._shape = self._weight.shape
        self._rows = layer.rows
        self._place = np.arange(size)  # where each original row is now
        self._live = np.arange(size)  # which original rows there still are
        self._dead = np.zeros(size, bool)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """What losing each unit alone would cost, float64 [units]."""
        rows = self._place[self._rows[units]]
        if rows.shape[1] == 1:
            rows = rows[:, 0]
            squares: np.ndarray = np.square(self._weight[rows]).sum(axis=1)
            return np.asarray(squares / np.maximum(np.diagonal(self._inverse)[rows], 1e-30))
        blocks = self._inverse[rows[:, :, None], rows[:, None, :]]
        weights = self._weight[rows]
        return np.asarray(np.einsum("ubn,ubn->u", weights, np.linalg.solve(blocks, weights)))

    def take(self, units: np.ndarray) -> float:
        """Remove units, let the others make up for them, and return the cost."""
        rows = self._place[self._rows[units].reshape(-1)]
        block, lost = self._inverse[np.ix_(rows, rows)], self._weight[rows]
        columns = self._inverse[:, rows]
        answer = np.linalg.solve(block, np.concatenate([lost, columns.T], axis=1))
        cost = float(np.einsum("bn,bn->", lost, answer[:, : lost.shape[1]]))
        self._weight -= columns @ answer[:, : lost.shape[1]]
        self._inverse -= columns @ answer[:, lost.shape[1] :]
        self._weight[rows] = 0
        self._dead[rows] = True
        if 5 * np.count_nonzero(self._dead) > len(
            self._dead
        ):  # rows that are gone are zero: dropping them is for speed
            self._shrink()
        return max(cost, 0.0)

    def _shrink(self) -> None:
        stay = np.flatnonzero(~self._dead)
        self._weight, self._inverse = self._weight[stay], np.ascontiguousarray(self._inverse[np.ix_(stay, stay)])
        self._live, self._dead = self._live[stay], np.zeros(len(stay), bool)
        self._place[:] = -1
        self._place[self._live] = np.arange(len(self._live))

    def weights(self) -> np.ndarray:
        full = np.zeros(self._shape)
        full[self._live] = self._weight
        return full


def _ridge(gram: np.ndarray, fixed: int, damping: float) -> float:
    """lambda: a share of the mean of the diagonal, without the constant 1."""
    free = len(gram) - fixed
    return max(damping * float(np.trace(gram[:free, :free])) / max(free, 1), 1e-12)


def refit(layer: Linear, removed: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """The best weights without some units, float64 [K, N] with zeros in their rows: ridge regression at once."""
    gone = layer.rows[removed].reshape(-1)
    stay = np.setdiff1d(np.arange(len(layer.gram)), gone)
    hessian = layer.gram[np.ix_(stay, stay)].copy()
    free = len(stay) - layer.fixed
    ridge = _ridge(layer.gram, layer.fixed, damping)
    hessian[np.arange(free), np.arange(free)] += ridge
    target = layer.gram[stay] @ layer.weight
    # What is pulled towards zero is the change, not the weight
    target[:free] += ridge * layer.weight[stay[:free]]
    found = np.zeros_like(layer.weight)
    found[stay] = np.linalg.solve(hessian, target)
    return found


def relative_error(layer: Linear, weight: np.ndarray) -> float:
    """||X (W' - W)||^2 by the energy of X W."""
    change = weight - layer.weight
    return float(np.einsum("kn,kn->", change, layer.gram @ change)) / layer.energy()


def static_costs(layers: Sequence[Linear], rule: str) -> np.ndarray:
    """What a unit is worth without looking at the others, float64 [units].

    `magnitude` is the sum of squares of its weights; `activation` that of its weights times its inputs (Wanda, Sun et
    al., arXiv 2306.11695, for whole rows).
    """
    total = np.zeros(len(layers[0].rows))
    for layer in layers:
        squares = np.square(layer.weight).sum(axis=1)
        if rule == "activation":
            squares = squares * np.diagonal(layer.gram)
        total += squares[layer.rows].sum(axis=1) / max(float(squares.sum()), 1e-30)
    return total

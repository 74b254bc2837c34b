# SPDX-License-Identifier: Apache-2.0
"""SparseGPT against its definition, against masks alone, and against least squares."""

import numpy as np
import pytest

from onnxpress.pipeline.quantization.gptq import Feedback, feedback_of, output_error
from onnxpress.pipeline.sparsity.masks import Pattern, keep_largest, keep_largest_in_rows, keep_pattern
from onnxpress.pipeline.sparsity.sparsegpt import prune_sparsegpt

TARGETS = [0.5, 0.75, Pattern(2, 4)]


def gram_of(channels: int, rows: int = 1024, seed: int = 0) -> np.ndarray:
    """Of activations whose channels go together, as those of real layers do."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((channels, channels)) * np.exp(-np.arange(channels) / (channels / 5))[:, None]
    x = random.standard_normal((rows, channels)) @ mix / np.sqrt(channels)
    x += 0.05 * random.standard_normal((rows, channels))
    gram: np.ndarray = x.T @ x
    return gram


def normal(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def feedback(gram: np.ndarray, damping: float = 0.01) -> Feedback:
    found = feedback_of(gram, damping=damping)
    assert found is not None
    return found


def error(pruned: np.ndarray, matrix: np.ndarray, gram: np.ndarray) -> float:
    return float(output_error(pruned - matrix, gram).sum())


def by_definition(matrix: np.ndarray, gram: np.ndarray, target: float | Pattern, block: int) -> np.ndarray:
    """Optimal Brain Surgeon, one channel after the other: the inverse Hessian of those to come, float64."""
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    inverse = np.linalg.inv(hessian)
    weights, keep = matrix.astype(np.float64), np.ones(matrix.shape, bool)
    step = target.group if isinstance(target, Pattern) else block
    for i in range(matrix.shape[1]):
        if i % step == 0:
            end = min(i + step, matrix.shape[1])
            # What the k-th costs when all before it in the block are fixed
            later, costs = inverse.copy(), []
            for k in range(end - i):
                costs.append(later[k, k])
                later -= np.outer(later[:, k], later[k]) / later[k, k] if k < end - i - 1 else 0
            scores = weights[:, i:end] ** 2 / np.array(costs)
            if isinstance(target, Pattern):
                keep[:, i:end] = keep_pattern(scores, target)
            else:
                keep[:, i:end] = keep_largest(scores, round(target * scores.size))
        gone = np.where(keep[:, i], 0, weights[:, i])
        weights[:, i:] -= np.outer(gone, inverse[0] / inverse[0, 0])
        weights[:, i] = np.where(keep[:, i], weights[:, i], 0)
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return weights


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("block", [16, 128])
def test_it_is_the_definition(target: float | Pattern, block: int) -> None:
    gram, matrix = gram_of(40), normal(12, 40)
    expected = by_definition(matrix, gram, target, block)
    got = prune_sparsegpt(matrix, feedback(gram), target, block=block)
    np.testing.assert_array_equal(got == 0, expected == 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_it_beats_masks_alone_and_not_least_squares(target: float | Pattern) -> None:
    gram, matrix = gram_of(128), normal(64, 128)
    pruned = prune_sparsegpt(matrix, feedback(gram), target)
    wanda = np.abs(matrix) * np.sqrt(np.diag(gram)).astype(np.float32)
    if isinstance(target, Pattern):
        masks = [keep_pattern(scores, target) for scores in (np.abs(matrix), wanda)]
    else:
        rows = keep_largest_in_rows(wanda, round(target * 128))
        masks = [keep_largest(np.abs(matrix), round(target * matrix.size)), rows]
    assert all(mask.sum() == np.count_nonzero(pruned) for mask in masks)
    best = min(error(np.where(mask, matrix, 0), matrix, gram) for mask in masks)
    assert error(pruned, matrix, gram) < 0.7 * best
    # The same zeros without the update, and with the best update that there is
    assert error(pruned, matrix, gram) < error(np.where(pruned != 0, matrix, 0), matrix, gram)
    assert error(pruned, matrix, gram) >= error(refitted(pruned, matrix, gram), matrix, gram)


def refitted(pruned: np.ndarray, matrix: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Each row's least-squares optimum for its own zeros."""
    result = np.zeros(matrix.shape)
    for row, (kept, wanted) in enumerate(zip(pruned != 0, matrix, strict=True)):
        result[row, kept] = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept] @ wanted)
    return result


def test_where_all_that_goes_comes_first_it_is_least_squares() -> None:
    """Nothing that stays was fixed before the last weight went: the update is then the exact optimum."""
    gram, matrix = gram_of(32), normal(8, 32)
    matrix[:, :16] *= 1e-3
    pruned = prune_sparsegpt(matrix, feedback(gram, damping=1e-9), 0.5)
    assert (pruned[:, :16] == 0).all()
    np.testing.assert_allclose(pruned, refitted(pruned, matrix, gram), rtol=0, atol=1e-4)


def test_neighbours_in_a_pattern_stand_in_for_each_other() -> None:
    """Two channels that are always equal: what is cut from one goes to the other, and the output does not change."""
    x = np.repeat(np.random.default_rng(0).standard_normal((500, 16)), 2, axis=1)
    gram, matrix = x.T @ x, normal(8, 32)
    pruned = prune_sparsegpt(matrix, feedback(gram, damping=1e-6), Pattern(1, 2))
    assert (np.count_nonzero(pruned.reshape(-1, 2), axis=1) == 1).all()
    assert error(pruned, matrix, gram) < 1e-6 * error(np.zeros_like(matrix), matrix, gram)


def test_channels_that_are_always_zero_go_first() -> None:
    gram, matrix = gram_of(32), normal(16, 32)
    gram[8:24], gram[:, 8:24] = 0, 0
    pruned = prune_sparsegpt(matrix, feedback(gram), 0.5)
    np.testing.assert_array_equal(pruned[:, 8:24], 0)
    np.testing.assert_array_equal(np.delete(pruned, range(8, 24), 1), np.delete(matrix, range(8, 24), 1))


@pytest.mark.parametrize("columns", [3, 100, 130, 300])
def test_any_width_loses_its_share(columns: int) -> None:
    gram, matrix = gram_of(columns), normal(10, columns)
    given = matrix.copy()
    pruned = prune_sparsegpt(matrix, feedback(gram), 0.6)
    assert abs(np.count_nonzero(pruned == 0) - 6 * columns) <= 3
    np.testing.assert_array_equal(matrix, given)
    transposed = np.asfortranarray(matrix)
    np.testing.assert_array_equal(prune_sparsegpt(transposed, feedback(gram), 0.6), pruned)
    np.testing.assert_array_equal(transposed, given)

# SPDX-License-Identifier: Apache-2.0
"""What reads a group: its weights as matrices, and Gram matrices held to the data itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

sys.path.append(str(Path(__file__).parents[1] / "passes"))
from pass_tools import model_from, normal

from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.structure import Group, analyze
from onnxpress.pipeline.structure.consumers import Consumer, consumers_of, measure

Array = np.ndarray

PERCEPTRON = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 4] x, float[4, 6] w1, float[6] b1, float[6, 3] w2, float[3] b2) => (float[b, 3] y)
{
    h = MatMul(x, w1)
    i = Add(h, b1)
    j = Relu(i)
    k = MatMul(j, w2)
    y = Add(k, b2)
}
"""
GEMM = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 4] x, float[6, 4] w1, float[6] b1, float[3, 6] w2, float[3] b2) => (float[b, 3] y)
{
    h = Gemm<transB = 1>(x, w1, b1)
    j = Relu(h)
    y = Gemm<transB = 1>(j, w2, b2)
}
"""
CONVOLUTION = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 2, 6, 5] x, float[4, 2, 3, 3] w1, float[3, 4, 3, 2] w2) => (float[b, 3, p, q] y)
{
    h = Conv<pads = [1, 1, 1, 1]>(x, w1)
    j = Relu(h)
    y = Conv<strides = [2, 1], pads = [1, 0, 0, 1]>(j, w2)
}
"""
POINTWISE = CONVOLUTION.replace("3, 4, 3, 2] w2", "3, 4, 1, 1] w2").replace(
    "strides = [2, 1], pads = [1, 0, 0, 1]", "group = 1"
)


def weights(text: str) -> dict[str, Array]:
    shapes = {
        "w1": {PERCEPTRON: (4, 6), GEMM: (6, 4)}.get(text, (4, 2, 3, 3)),
        "w2": {PERCEPTRON: (6, 3), GEMM: (3, 6), CONVOLUTION: (3, 4, 3, 2)}.get(text, (3, 4, 1, 1)),
    }
    if text in (PERCEPTRON, GEMM):
        shapes |= {"b1": (6,), "b2": (3,)}
    return {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def prepared(text: str) -> tuple[ir.Model, Group, Consumer]:
    model = model_from(text, weights(text))
    group = analyze(model).groups[0]
    (consumer,) = consumers_of(model, group)
    return model, group, consumer


@pytest.mark.parametrize("text", [PERCEPTRON, GEMM, CONVOLUTION, POINTWISE])
def test_a_weight_as_a_matrix_and_back(text: str) -> None:
    _, group, consumer = prepared(text)
    assert consumer.name == "w2"
    matrix = consumer.matrix()
    np.testing.assert_array_equal(consumer.from_matrix(matrix), weights(text)["w2"])
    rows = consumer.rows()
    assert rows.shape == (group.size, len(matrix) // group.size)
    assert sorted(rows.reshape(-1).tolist()) == list(range(len(matrix)))
    # Zeroing the rows of a unit zeroes that unit's slice of the weight
    matrix[rows[1]] = 0
    slices = np.moveaxis(consumer.from_matrix(matrix), consumer.axis, 0)
    assert not slices[1].any()
    assert all(slices[unit].all() for unit in (0, 2, 3))


@pytest.mark.parametrize("text", [PERCEPTRON, GEMM])
def test_the_gram_matrix_of_vectors(text: str) -> None:
    model, _, consumer = prepared(text)
    x = normal(50, 4, seed=5)
    own = weights(text)
    first = own["w1"] if text == PERCEPTRON else own["w1"].T
    hidden = np.maximum(x @ first + own["b1"], 0)
    found = measure(model, [consumer], Calibration([{"x": x[:20]}, {"x": x[20:]}], threads=1), 64)["w2"]
    seen = np.concatenate([hidden, np.ones((50, 1))], axis=1)
    np.testing.assert_allclose(found.gram, seen.T @ seen, rtol=1e-4)
    np.testing.assert_array_equal(found.weight[-1], own["b2"].astype(np.float64))
    assert found.fixed == 1


@pytest.mark.parametrize("text", [CONVOLUTION, POINTWISE])
def test_the_gram_matrix_of_patches(text: str) -> None:
    """What a convolution puts out is its patches times its matrix: their Gram matrix is known through the output."""
    import onnxruntime as ort

    model, _, consumer = prepared(text)
    x = normal(3, 2, 6, 5, seed=5)
    found = measure(model, [consumer], Calibration([{"x": x}], threads=1), 64)["w2"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    flat = np.moveaxis(y, 1, -1).reshape(-1, 3).astype(np.float64)
    matrix = consumer.matrix()
    assert found.fixed == 1  # a bias can be added to a convolution
    assert found.gram[-1, -1] == len(flat)
    np.testing.assert_allclose(matrix.T @ found.gram[:-1, :-1] @ matrix, flat.T @ flat, rtol=1e-4)
    np.testing.assert_allclose(found.gram[-1, :-1] @ matrix, flat.sum(axis=0), rtol=1e-3, atol=1e-3)


def test_too_wide_layers_are_left_out() -> None:
    model, _, consumer = prepared(PERCEPTRON)
    assert measure(model, [consumer], Calibration([{"x": normal(5, 4)}], threads=1), 5) == {}


def test_a_bias_that_others_read_is_not_moved() -> None:
    shared = PERCEPTRON.replace("y = Add(k, b2)", "m = Add(k, b2)\n    y = Add(m, b2)")
    model = model_from(shared, weights(PERCEPTRON))
    (consumer,) = consumers_of(model, analyze(model).groups[0])
    assert consumer.bias() is None

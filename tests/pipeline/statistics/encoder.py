# SPDX-License-Identifier: Apache-2.0
"""A graph with values of every shape, batches with and without padding, and exact statistics to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest

from onnxpress.pipeline.statistics import Calibration, Histogram, Statistics, Wanted

Feeds = dict[str, np.ndarray]
ENCODER = """
<ir_version: 10, opset_import: ["": {opset}]>
g (float[batch, sequence, 4] x, int64[batch, sequence] attention_mask, float[4, 6] w1, float[6] b1)
  => (float[batch, sequence, 6] y)
{{
    product = MatMul(x, w1)
    biased = Add(product, b1)
    y = Relu(biased)
    turned = Transpose<perm = [0, 2, 1]>(y)
    scores = MatMul(y, turned)
    heads = Unsqueeze(scores, one)
    flat = Reshape(y, tokens)
    sized = Abs(biased)
    narrow = Cast<to = 10>(biased)
    whole = Cast<to = 7>(y)
    yes = Cast<to = 9>(y)
    pooled = Slice(biased, first, last, second, stride)
    kept = Squeeze(pooled, second)
}}
"""
NAMES = ["x", "biased", "y"]


def model_of(text: str, *, seed: int = 0, **weights: Any) -> ir.Model:
    """Parse; inputs named like a weight become one, and shapes are inferred as exporters do."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(seed)
    for value in [v for v in model.graph.inputs if v.name and v.name[0] in "wb" and v.name[1:].isdigit()]:
        weights[str(value.name)] = rng.standard_normal([int(d) for d in value.shape or ()]).astype(np.float32)
        model.graph.inputs.remove(value)
    for name, array in weights.items():
        found = [v for node in model.graph for v in node.inputs if v is not None and v.name == name]
        value = found[0]
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers.add(value)
    inferred: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    return inferred


def encoder(opset: int = 20) -> ir.Model:
    text = ENCODER.format(opset=opset)
    ints = ("one", [1]), ("tokens", [-1, 6]), ("first", [0]), ("last", [1]), ("second", [1]), ("stride", [1])
    declared = " ".join(f"{name} = Constant<value_ints = {numbers}>()" for name, numbers in ints)
    return model_of(text.replace("{\n", "{\n    " + declared + "\n", 1))


def batches_of(*shapes: tuple[int, int], seed: int = 0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.standard_normal((*shape, 4)).astype(np.float32), "attention_mask": np.ones(shape, np.int64)}
        for shape in shapes
    ]


SHAPES = [(2, 5), (1, 3), (4, 7), (3, 1)]


def padded(side: str, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Feeds]:
    """Batches whose padding holds numbers that would ruin every statistic."""
    rng = np.random.default_rng(7)
    found = batches_of(*shapes)
    for feeds in found:
        mask = feeds["attention_mask"]
        for row, length in enumerate(rng.integers(1, mask.shape[1] + 1, len(mask))):
            cut = {
                "right": slice(length, None),
                "left": slice(None, mask.shape[1] - length),
                "holes": slice(1, None, 2),
            }
            mask[row, cut[side]] = 0
        feeds["x"][mask == 0] = 1e4
    return found


def calibration(batches: Sequence[Feeds], **options: Any) -> Calibration:
    return Calibration(batches, threads=1, **options)


def everything(*names: str, axis: int = -1, row_count: int = 512) -> Wanted:
    return Wanted(names, names, dict.fromkeys(names, axis), names, names, row_count)


def values(model: ir.Model, batches: Sequence[Feeds], name: str) -> list[np.ndarray]:
    """What a value is on each batch, as float32, read from the graph itself."""
    copy = model.clone()
    if name in {v.name for v in copy.graph.inputs}:
        return [feeds[name].astype(np.float32) for feeds in batches]
    value = next(v for node in copy.graph for v in node.outputs if v.name == name)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(value)
    return [out[name].astype(np.float32) for out in calibration(batches).run(copy)]


def rows_of(arrays: Sequence[np.ndarray], keeps: Sequence[np.ndarray | None], axis: int = -1) -> np.ndarray:
    """[rows, C] of all batches; `keeps` are over all axes but that of the channels."""
    found = []
    for array, keep in zip(arrays, keeps, strict=True):
        moved = np.moveaxis(array, axis, -1)
        found.append(moved.reshape(-1, moved.shape[-1]) if keep is None else moved[keep])
    return np.concatenate(found).astype(np.float64)


def compare(found: Statistics, name: str, arrays: Sequence[np.ndarray], rows: np.ndarray, wanted: Wanted) -> None:
    """All statistics of one value against exact ones; `arrays` hold what counts, batch by batch."""
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    if name in wanted.ranges:
        span = found.ranges[name]
        assert (span.low, span.high, span.batches) == (flat.min(), flat.max(), len(arrays))
        assert span.average_low == pytest.approx(np.mean([a.min() for a in arrays]))
        assert span.average_high == pytest.approx(np.mean([a.max() for a in arrays]))
    if name in wanted.histograms:
        exact = Histogram()
        exact.add(flat)
        assert np.array_equal(found.histograms[name].counts, exact.counts)
        assert (found.histograms[name].exponent, found.histograms[name].first) == (exact.exponent, exact.first)
    if name in wanted.channels:
        channels = found.channels[name]
        assert channels.rows == len(rows)
        np.testing.assert_array_equal(channels.peak, np.abs(rows).max(0))
        np.testing.assert_allclose(channels.mean, rows.mean(0), atol=1e-5 * np.abs(rows).mean())
        np.testing.assert_allclose(channels.mean_abs, np.abs(rows).mean(0), rtol=1e-5)
    if name in wanted.grams:
        gram = found.grams[name]
        assert gram.rows == len(rows)
        assert gram.matrix.dtype == np.float64
        np.testing.assert_allclose(gram.matrix, rows.T @ rows, rtol=1e-5, atol=1e-5 * np.abs(rows.T @ rows).max())
    if name in wanted.rows:
        assert found.rows[name].dtype == np.float32
        assert len(found.rows[name]) <= wanted.row_count
        everyone = {row.tobytes() for row in rows.astype(np.float32)}
        assert {row.tobytes() for row in found.rows[name]} <= everyone

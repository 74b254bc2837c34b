# SPDX-License-Identifier: Apache-2.0
"""The oracle of structure: a cut graph must give what the uncut one gives with the same units masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from onnxpress.exporters import graph_file
from onnxpress.exporters.graph_file import weight_bytes
from onnxpress.pipeline.structure import Structure, analyze, mask

from ..samples import model_from

Feeds = dict[str, np.ndarray]
Removed = Mapping[str, Sequence[int]]
BATCHES = (2, 3)


def graph_of(text: str) -> ir.Model:
    """A model from text (see `samples.model_from`) with the shapes that ONNX infers."""
    model = model_from(text)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model


def kinds(structure: Structure) -> dict[str, list[int]]:
    """Kind to the sizes of its groups."""
    found: dict[str, list[int]] = {}
    for group in structure.groups:
        found.setdefault(group.kind, []).append(group.size)
    return {kind: sorted(sizes) for kind, sizes in sorted(found.items())}


def feeds_for(model: ir.Model, batch: int, seed: int = 0) -> Feeds:
    """Inputs of the stated shapes; an open first size is the batch, any other 5."""
    rng, feeds = np.random.default_rng(seed), {}
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else 5 if axis else batch for axis, size in enumerate(value.shape or ())]
        assert value.dtype is not None
        if value.dtype.is_floating_point():
            feeds[str(value.name)] = rng.standard_normal(sizes).astype(value.dtype.numpy())
        else:
            feeds[str(value.name)] = rng.integers(0, 3, sizes).astype(value.dtype.numpy())
    return feeds


def runner(model: ir.Model, file: Path) -> onnxruntime.InferenceSession:
    """Through a file, so that ONNX's checker has its say."""
    graph_file.write(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Fusions round the cut and the masked graph differently
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def some(structure: Structure, seed: int, share: float = 0.4) -> dict[str, list[int]]:
    """Random units of every group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: sorted(rng.choice(group.size, max(1, int(group.size * share)), replace=False).tolist())
        for group in structure.groups
    }


def check(
    model: ir.Model, folder: Path, *, removals: int = 2, open_caches: bool = False, inert: bool = False
) -> Structure:
    """Hold every group alone, and all together, to the oracle; returns the structure of the whole graph.

    With `inert` there are units that the outputs do not depend on.
    """
    structure = analyze(model, open_caches=open_caches)
    together = [some(structure, seed) for seed in range(removals)]
    alone = [{name: units} for removed in together for name, units in removed.items()] if len(together[0]) > 1 else []
    whole = runner(model, folder / "whole.onnx")
    for removed in (*alone, *together):
        if removed:
            check_cut(model, whole, removed, folder, open_caches=open_caches, inert=inert)
    return structure


def check_cut(
    model: ir.Model,
    whole: onnxruntime.InferenceSession,
    removed: Removed,
    folder: Path,
    *,
    open_caches: bool = False,
    inert: bool = False,
) -> None:
    small, zeroed = model.clone(), model.clone()
    structure = analyze(small, open_caches=open_caches)
    kept = structure.kept(removed)
    axes = {str(v.name): structure.walk.axes[v] or [] for v in (*small.graph.inputs, *small.graph.outputs)}
    structure.cut(removed)
    mask(analyze(zeroed, open_caches=open_caches), removed)
    assert weight_bytes(small) < weight_bytes(model), removed
    cut, masked = runner(small, folder / "cut.onnx"), runner(zeroed, folder / "masked.onnx")

    def narrowed(name: str, array: np.ndarray) -> np.ndarray:
        for axis, units in enumerate(axes[name]):
            if units is not None:
                array = np.compress(kept(units), array, axis=axis)
        return array

    for batch in BATCHES:
        feeds = feeds_for(model, batch, seed=batch)
        names = [output.name for output in whole.get_outputs()]
        before, wanted = whole.run(names, feeds), masked.run(names, feeds)
        got = cut.run(names, {name: narrowed(name, array) for name, array in feeds.items()})
        for name, one, other in zip(names, got, wanted, strict=True):
            other = narrowed(name, other)
            assert one.shape == other.shape, (removed, name)
            assert np.isfinite(one).all(), (removed, name)
            tolerance = 1e-5 * max(1.0, float(np.abs(other).max()))
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=str(removed))
        changed = any(not np.array_equal(a, b) for a, b in zip(before, wanted, strict=True))
        assert inert or changed, f"{removed} changed nothing"

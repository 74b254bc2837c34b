# SPDX-License-Identifier: Apache-2.0
"""What the tests of the pipeline press: small graphs as ONNX text, and stand-ins for an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.pipeline.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
QUICK = ["benchmark.rounds=5", "benchmark.max_seconds=2"]
FAST = [word for setting in QUICK for word in ("--set", setting)]
"""Timing is not what these tests are about."""

NET = """
<ir_version: 10, opset_import: ["": 20]>
net (float[batch, 64] x, float[64, 128] w1, float[128] b1, float[128, 8] w2, float[8] b2) => (float[batch, 8] logits)
{
    hidden = MatMul(x, w1)
    biased = Add(hidden, b1)
    active = Relu(biased)
    scores = MatMul(active, w2)
    logits = Add(scores, b2)
}
"""
"""64 -> 128 -> 8: one weight is large enough to be quantized, one is not."""


def model_from(text: str, *, seed: int = 0) -> ir.Model:
    """Parse ONNX text; inputs named w or b and a number become weights, random and the same on every machine."""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(seed)
    for value in [v for v in model.graph.inputs if v.name and v.name[0] in "wb" and v.name[1:].isdigit()]:
        assert value.shape is not None
        values = rng.standard_normal([int(dim) for dim in value.shape]) / 4
        value.const_value = ir.tensor(values.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    return model


def write_net(path: Path, text: str = NET, *, seed: int = 0) -> Path:
    graph_file.write(model_from(text, seed=seed), path)
    return path


def write_arrays(path: Path, count: int = 32, **extra: np.ndarray) -> Path:
    """Evaluation data for NET: random inputs, labelled by what the net itself answers, every fourth one wrongly."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((count, 64)).astype(np.float32)
    weights = {v.name: v.const_value.numpy() for v in model_from(NET).graph.initializers.values() if v.const_value}
    logits = np.maximum(x @ weights["w1"] + weights["b1"], 0) @ weights["w2"] + weights["b2"]
    labels = logits.argmax(1)
    labels[::4] = (labels[::4] + 1) % 8
    np.savez(path, x=x, labels=labels, **extra)  # type: ignore[arg-type]
    return path


def quick_recipe(name: str = "int8-dynamic", gates: Sequence[str] = (), **sections: Any) -> Recipe:
    return load_recipe(name, [*QUICK, *(f"{key}={value}" for key, value in sections.items())], gates)


def exported(
    inputs: Mapping[str, tuple[str, tuple[Any, ...]]], *, task: str = "generic", **fields: Any
) -> ExportedModel:
    """An exported model of which only the outside is needed: name -> (dtype, shape)."""
    specs = tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in inputs.items())
    model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=10)
    return ExportedModel(model, Signature(specs, ()), task, SourceInfo("onnx", "net.onnx", None, None, None), **fields)


TEXT_INPUTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "input_ids": ("int64", ("batch", "sequence")),
    "attention_mask": ("int64", ("batch", "sequence")),
}


class LetterTokenizer:
    """One token a character between 1 ([CLS]) and 2 ([SEP]), 0 for padding; records every batch of texts."""

    def __init__(self, limit: int = 64, *, special: bool = True) -> None:
        self.limit, self.special = limit, special
        self.calls: list[tuple[str, ...]] = []

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        self.calls.append(tuple(texts))
        joined = [text + (f"|{pairs[i]}" if pairs is not None else "") for i, text in enumerate(texts)]
        return self._pad([self._ids(text) for text in joined], max_length)

    def words(self, sentences: Sequence[Sequence[str]]) -> tuple[dict[str, np.ndarray], list[list[int | None]]]:
        rows, firsts = [], []
        for sentence in sentences:
            starts = np.cumsum([1, *(len(word) for word in sentence)])[:-1]
            firsts.append([int(s) if s < self.limit - 1 else None for s in starts])
            rows.append(self._ids("".join(sentence)))
        return self._pad(rows, None), firsts

    def _ids(self, text: str) -> list[int]:
        ids = [3 + ord(letter) % 1000 for letter in text][: self.limit - 2 * self.special]
        return [1, *ids, 2] if self.special else ids

    def _pad(self, rows: list[list[int]], length: int | None) -> dict[str, np.ndarray]:
        width = length or max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros_like(ids)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = values[:width]
            mask[row, : len(values)] = 1
        return {"input_ids": ids, "attention_mask": mask}

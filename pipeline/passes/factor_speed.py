# SPDX-License-Identifier: Apache-2.0
"""Is one layer faster as two? Timed on the provider, alone, at the shape that its input has on real data.

Fewer multiply-adds are no promise: two thin products write and read a result in between, and kernels are at their best
when all sizes are large. What surrounds the layer (a fused activation, a cold cache) is not timed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...exporters import graph_file
from ...runtime.benchmark import Contender, Setting, measure
from ...runtime.machine import default_threads
from ...runtime.session import Session
from .factor_layers import Layer, write_factors
from .graph import add_weight, drop_unused_weights, make_node

_ROUNDS, _MOST_SECONDS = 15, 3.0


@dataclass
class Stopwatch:
    """Times layers against their factors, each kind and size once.

    Attributes:
        provider: Short name of the execution provider.
        threads: By default one a usable core.
    """

    provider: str = "cpu"
    threads: int | None = None
    _known: dict[object, float] = field(default_factory=dict)

    def ratio(self, layer: Layer, rank: int, shape: tuple[int, ...]) -> float:
        """How many times as fast the two factors are as the layer: the median of interleaved runs.

        Args:
            layer: A product or a convolution.
            rank: Of the factors.
            shape: Of the layer's input.
        """
        attributes = layer.nodes[0].attributes if layer.kind == "conv" else {}
        key = (layer.kind, layer.shape, rank, shape, str(sorted((name, str(a)) for name, a in attributes.items())))
        if key not in self._known:
            self._known[key] = self._measured(layer, rank, shape)
        return self._known[key]

    def _measured(self, layer: Layer, rank: int, shape: tuple[int, ...]) -> float:
        random = np.random.default_rng(0)
        model, alone = _alone(layer, shape)
        rows, columns = layer.shape
        with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
            whole = self._session(model, Path(folder) / "whole.onnx")
            write_factors(model, alone, *(random.random(s, np.float32) for s in ((rows, rank), (rank, columns))))
            drop_unused_weights(model)
            thin = self._session(model, Path(folder) / "thin.onnx")
        contenders = [Contender("whole", self.provider, whole.run), Contender("thin", self.provider, thin.run)]
        feeds = {"x": random.random(shape, np.float32)}
        setting = Setting(layer.key, shape[0], " x ".join(map(str, shape)), [feeds])
        threads = self.threads or default_threads()
        found = measure(contenders, [setting], rounds=_ROUNDS, max_seconds=_MOST_SECONDS, threads=threads)
        return float(found[1].ratio_to_reference["median"])

    def _session(self, model: ir.Model, file: Path) -> Session:
        graph_file.write(model, file)
        return Session(file, provider=self.provider, threads=self.threads)


def _alone(layer: Layer, shape: tuple[int, ...]) -> tuple[ir.Model, Layer]:
    """A graph of this layer alone; its numbers do not matter, zeros might."""
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="layer")
    model = ir.Model(graph, ir_version=10)
    random = np.random.default_rng(1)
    convolution = layer.kind == "conv"
    assert layer.weight.const_value is not None
    size = tuple(int(n) for n in layer.weight.const_value.shape.numpy()) if convolution else layer.shape
    weight = add_weight(model, graph, "w", random.random(size, np.float32))
    attributes = dict(layer.nodes[0].attributes) if convolution else {}
    node = make_node("Conv" if convolution else "MatMul", [x, weight], ["y"], attributes=attributes)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return model, Layer("w", weight, layer.kind, 0, [node])

# SPDX-License-Identifier: Apache-2.0
"""A residual addition and its LayerNormalization: as ONNX Runtime fuses them, and as `fuse` keeps them apart.

    .venv/bin/python benchmarks/residual_norm.py [--rounds 200]

24 of them in a row, [1, 128, 768] and [8, 128, 768], as in BERT-base. The runtime turns Add and LayerNormalization into
SkipLayerNormalization; it leaves Sum, which is the same function of two inputs, alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx_ir as ir
from markdown import interval, table

from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.runtime.benchmark import Contender, Setting, measure
from onnxpress.runtime.machine import default_threads
from onnxpress.runtime.session import Session

LAYERS, WIDTH = 24, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    threads = default_threads()
    fused, _ = run_pass(Fuse(), stack())
    sessions = {
        "Add, which the runtime fuses": Session(ir.to_proto(stack()).SerializeToString(), threads=threads),
        "Sum, as onnxpress writes it": Session(ir.to_proto(fused).SerializeToString(), threads=threads),
    }
    contenders = [Contender(name, "cpu", session.run) for name, session in sessions.items()]
    rng = np.random.default_rng(0)
    settings = []
    for batch in (1, 8):
        feeds = {"x": rng.standard_normal((batch, 128, WIDTH)).astype(np.float32)}
        settings.append(Setting(f"{batch}", batch, f"{batch} x 128 x {WIDTH}", [feeds]))
    rows = []
    for m in measure(contenders, settings, rounds=options.rounds, max_seconds=60, threads=threads):
        rows.append((m.shape, m.variant, f"{m.latency_ms['p50']:.2f}", interval(m.ratio_to_reference)))
    print(table(f"{LAYERS} residual additions with normalization", ("input", "form", "p50 ms", "x (95 %)"), rows))


def stack() -> ir.Model:
    """x -> LayerNormalization(x + r), 24 times; r is a second activation."""
    values = [ir.Value(name="x", shape=ir.Shape(["b", 128, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))]
    scale = ir.Value(name="scale", const_value=ir.Tensor(np.ones(WIDTH, np.float32), name="scale"))
    scale.shape, scale.type = ir.Shape([WIDTH]), ir.TensorType(ir.DataType.FLOAT)
    nodes = []
    residual = ir.node("Neg", [values[0]])
    residual.outputs[0].name = "residual"
    nodes.append(residual)
    for layer in range(LAYERS):
        add = ir.node("Add", [values[-1], residual.outputs[0]])
        norm = ir.node("LayerNormalization", [add.outputs[0], scale], {"axis": -1})
        add.outputs[0].name, norm.outputs[0].name = f"sum_{layer}", f"norm_{layer}"
        nodes += [add, norm]
        values.append(norm.outputs[0])
    values[-1].shape, values[-1].type = values[0].shape, values[0].type
    graph = ir.Graph([values[0]], [values[-1]], nodes=nodes, initializers=[scale], opset_imports={"": 17}, name="main")
    return ir.Model(graph, ir_version=10)


if __name__ == "__main__":
    main()

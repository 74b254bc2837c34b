# SPDX-License-Identifier: Apache-2.0
"""A collection of different graphs, on which passes can be shown to work beyond the models that they were written for.

`GRAPHS` is name -> Graph: real files and weights (where they are present), small networks with random weights from
torch's two exporters and ours, graphs fused by optimizers, and graphs in ONNX's text form, from opset 8 to 24.

    .venv/bin/python benchmarks/zoo/__main__.py --list
    .venv/bin/python benchmarks/zoo/__main__.py --check [NAME ...]
"""

from __future__ import annotations

from zoo import exported, fused, onnx_text, published
from zoo.graph import Graph as Graph

GRAPHS: dict[str, Graph] = {
    graph.name: graph for graph in (*published.GRAPHS, *onnx_text.GRAPHS, *exported.GRAPHS, *fused.GRAPHS)
}
"""All that can be built here, by name."""

# SPDX-License-Identifier: Apache-2.0
"""Graph networks trained on Cora: accuracy in PyTorch and as pressed graphs, size, and the time for the whole graph.

    .venv/bin/python benchmarks/graphs.py [--rounds 15] [--threads N] [--quick] [--write]

GCN, GraphSAGE and GAT of `examples/architectures/graphs.py`, 200 epochs each. They are exported at an example of 60
nodes and run on all 2,708 with 10,556 edges: the number of nodes and edges is dynamic. `--quick` trains for 20 epochs
and makes three rounds.

Prediction, before anything was measured: fp16 loses nothing, int8 at most 0.5 points, since the margin of a node's
class comes from the sum over its neighbours, where rounding errors average out. The file is all first layer (1,433
words), so int8 is close to 4 times smaller. Time goes to the first layer's product over 2,708 x 1,433 features, 99 %
of them zeros, which only a dense kernel sees; int8 should make it 2 times faster where the processor has VNNI.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from markdown import environment, interval, table, write_section
from peers import cora

from onnxpress.exporters import graph_file, sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.settings import ExportSettings
from onnxpress.pipeline.metrics import accuracy
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.recipe import load_recipe
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.benchmark import Contender, Setting, measure
from onnxpress.runtime.machine import default_threads, machine
from onnxpress.runtime.session import Session

TITLES = {"gcn": "GCN", "sage": "GraphSAGE", "gat": "GAT"}
RECIPES = ("fp32", "fp16", "int8-dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="20 epochs, three rounds")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.quick:
        cora.EPOCHS = 20
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in TITLES:
            print(f"... {TITLES[name]}", file=sys.stderr, flush=True)
            rows += rows_of(name, Path(folder), 3 if options.quick else options.rounds, options.threads)
    columns = ("network", "variant", "accuracy, %", "kB", "p50 ms", "x PyTorch fp32 (95 %)", "largest error of a logit")
    title = f"**Cora, test set of 1,000 papers** ({options.threads} threads, interleaved; 2,708 nodes, 10,556 edges)"
    text = f"{table(title, columns, rows)}\n\n{environment(machine(), versions(), ('torch', 'onnxruntime'))}"
    print(text)
    if options.write:
        write_section("graphs", text)


def rows_of(name: str, folder: Path, rounds: int, threads: int) -> list[tuple[object, ...]]:
    data = cora.load()
    exported = sources.load(f"peers.cora:{name}", None, ExportSettings())
    reference = exported.reference
    assert reference is not None
    feeds = {"features": data.features.numpy(), "edges": data.edges.numpy()}
    runs, sizes = {"PyTorch": reference.run}, {"PyTorch": sum(a.numel() * 4 for a in reference.module.parameters())}
    for recipe in RECIPES:
        file = folder / f"{name}-{recipe}.onnx"
        sizes[recipe] = graph_file.write(pressed(exported, recipe), file)
        runs[recipe] = Session(file, threads=threads).run
    contenders = [Contender(variant, "cpu", run) for variant, run in runs.items()]
    times = measure(contenders, [Setting("all", 1, "Cora", [feeds])], rounds=rounds, max_seconds=60, threads=threads)
    output = next(iter(reference.run(feeds)))
    wanted = reference.run(feeds)[output]
    rows: list[tuple[object, ...]] = []
    for measured in times:
        logits = np.asarray(runs[measured.variant](feeds)[output], np.float32)
        found = accuracy(logits[data.test.numpy()], data.labels[data.test].numpy())
        error = np.abs(logits - wanted).max() / np.abs(wanted).max()
        rows.append(
            (
                TITLES[name],
                measured.variant,
                f"{found:.1f}",
                f"{sizes[measured.variant] / 1e3:.0f}",
                f"{measured.latency_ms['p50']:.1f}",
                interval(measured.ratio_to_reference),
                f"{error:.1e}",
            )
        )
    return rows


def pressed(exported: ExportedModel, recipe: str) -> ir.Model:
    model = exported.model.clone()
    for settings in load_recipe(recipe).built_passes():
        model, _ = run_pass(settings, model)
    return model


if __name__ == "__main__":
    main()

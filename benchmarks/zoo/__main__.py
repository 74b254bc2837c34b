# SPDX-License-Identifier: Apache-2.0
"""Lists the graphs of the collection, or builds each and runs it.

    .venv/bin/python benchmarks/zoo/__main__.py --list
    .venv/bin/python benchmarks/zoo/__main__.py --check [NAME ...]

A graph is in order when `graph_file.read` takes it, ONNX Runtime loads it as built and as read, both give the same, the
outputs are finite and follow the inputs, at batch 1 and 3 or at its fixed batch. Ends with 1 if one is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx_ir as ir
import onnxruntime

from onnxpress.exporters import graph_file
from zoo import GRAPHS
from zoo.graph import Feeds, Graph

_TOLERANCE = 1e-3
"""Of the largest output. Upgrading a graph to another operator set may change the order of sums, nothing else."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print names, operator sets and descriptions")
    parser.add_argument("--check", nargs="*", metavar="NAME", help="build and run these; all, if none is named")
    options = parser.parse_args()
    if options.check is None or options.list:
        for graph in GRAPHS.values():
            print(f"{graph.name:24} opset {graph.opset:2}  {graph.description}")
        opsets = sorted({graph.opset for graph in GRAPHS.values()})
        print(f"{len(GRAPHS)} graphs, opsets {', '.join(map(str, opsets))}")
        return 0
    unknown = [name for name in options.check if name not in GRAPHS]
    if unknown:
        parser.error(f"no such graph: {', '.join(unknown)}")
    return check([GRAPHS[name] for name in options.check or GRAPHS])


def check(graphs: Sequence[Graph]) -> int:
    """Print a line a graph; returns the exit code."""
    failed = []
    for graph in graphs:
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = examine(graph, Path(folder))
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are still of interest
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found = f"FAILS: {type(error).__name__}: {lines[0][:300] if lines else ''}"
            failed.append(graph.name)
        print(f"{graph.name:24} opset {graph.opset:2}  {found}  {time.perf_counter() - started:.1f} s", flush=True)
    print(f"{len(graphs) - len(failed)} of {len(graphs)} in order{': not ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


def examine(graph: Graph, folder: Path) -> str:
    """Build one graph and run it; returns what is in it.

    Raises:
        ValueError: Something about it is not as it should be.
    """
    file = graph.build(folder)
    opset = ir.load(file).opset_imports[""]
    if opset != graph.opset:
        raise ValueError(f"it is of opset {opset}")
    model = graph_file.read(file)
    counts = graph_file.operator_counts(model)
    parameters = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    again = folder / "read.onnx"
    graph_file.write(model, again)
    built, read = _session(file), _session(again)
    for batch in graph.batches:
        first, second = (_run(built, graph.feeds(batch, seed)) for seed in (0, 1))
        _compare(first, _run(read, graph.feeds(batch, 0)))
        if any(np.array_equal(first[name], second[name]) for name in first):
            raise ValueError(f"an output does not depend on the inputs at batch {batch}")
    nodes = sum(counts.values())
    runs = " and ".join(map(str, graph.batches))
    return f"{nodes:4} nodes {len(counts):3} operators {parameters:9,} parameters  ok at batch {runs}"


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _compare(wanted: Feeds, got: Feeds) -> None:
    """As built and as read must agree, and be numbers."""
    for name, array in wanted.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
        difference = float(np.abs(array - got[name]).max() / max(np.abs(array).max(), 1e-6))
        if difference > _TOLERANCE:
            raise ValueError(f"{name} differs by {difference:.1e} after reading")


if __name__ == "__main__":
    sys.exit(main())

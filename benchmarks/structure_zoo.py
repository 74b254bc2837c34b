# SPDX-License-Identifier: Apache-2.0
"""Structured pruning on every graph of the collection, held to the same cut as a mask.

    .venv/bin/python benchmarks/structure_zoo.py [NAME ...] [--quick] [--write]

Every graph is cleaned and loses 25 % of the units of each of its groups by `prune_structured` (by magnitude, without
refitting: what is shown here is that the cut is right, not that it is wise). Then every group alone, and all together,
are cut out of one copy and masked in another, and the outputs of the two are compared at every batch size of the graph.
Ends with 1 if any of them differ, or a cut graph does not load. `--quick` compares all groups together only.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from markdown import table, write_section
from zoo import GRAPHS
from zoo.graph import Feeds, Graph

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes.base import Plan, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.prune_structured import PruneStructured
from onnxpress.pipeline.statistics import Calibration
from onnxpress.pipeline.structure import KINDS, analyze, mask

SETTINGS = PruneStructured(ratio=0.25, importance="magnitude", repair=False, multiple=1, channel_multiple=1)
EVERY_KIND = PruneStructured(
    ratio=0.25, importance="magnitude", repair=False, multiple=1, channel_multiple=1, kinds=KINDS
)
"""For graphs in which nothing can be cut but what norms average over."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Of the largest output; the second for graphs that compute in fp16."""

COLUMNS = ("graph", "opset", "groups", "multiply-adds before", "after", "goes", "largest difference")
Removed = dict[str, list[int]]


@dataclass(frozen=True)
class Row:
    """What became of one graph.

    Attributes:
        graph: Which.
        groups: Kind to how many groups were cut.
        before: Multiply-adds at the first batch size.
        after: The same of the cut graph.
        difference: Largest difference between cut and masked outputs, relative to the largest output.
        refused: Why nothing was cut.
        wrong: What is not as it should be.
    """

    graph: Graph
    groups: Mapping[str, int]
    before: int = 0
    after: int = 0
    difference: float = 0.0
    refused: str = ""
    wrong: str = ""

    def cells(self) -> list[str]:
        if self.refused or self.wrong:
            return [self.graph.name, str(self.graph.opset), self.wrong or f"refused: {self.refused}", "", "", "", ""]
        groups = ", ".join(f"{count} {kind}" for kind, count in self.groups.items())
        saved = f"{1 - self.after / self.before:.0%}" if self.before else "-"
        numbers = [f"{self.before:,}", f"{self.after:,}", saved, f"{self.difference:.0e}"]
        return [self.graph.name, str(self.graph.opset), groups, *numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="graphs of the collection; all, if none is named")
    parser.add_argument("--quick", action="store_true", help="compare all groups together, not each alone")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in GRAPHS]
    if unknown:
        parser.error(f"no such graph: {', '.join(unknown)}")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.names or GRAPHS:
        started = time.perf_counter()
        rows.append(row_of(GRAPHS[name], alone=not options.quick))
        print(
            *(cell for cell in rows[-1].cells() if cell), f"{time.perf_counter() - started:.1f} s", sep="  ", flush=True
        )
    cut = table("25 % of every group, by magnitude.", COLUMNS, [row.cells() for row in rows])
    text = f"{summary(rows)}\n\n<details><summary>Each graph</summary>\n\n{cut}\n\n</details>"
    print(f"\n{text}")
    if options.write:
        write_section("structure-zoo", text)
    return 1 if any(row.wrong for row in rows) else 0


def summary(rows: Sequence[Row]) -> str:
    refused, wrong = sum(bool(row.refused) for row in rows), sum(bool(row.wrong) for row in rows)
    groups = sum(sum(row.groups.values()) for row in rows)
    pruned = len(rows) - refused - wrong
    return f"{pruned} of {len(rows)} graphs pruned ({groups} groups), {refused} refused with a reason, {wrong} wrong."


def row_of(graph: Graph, *, alone: bool) -> Row:
    """Prune one graph and compare; whatever goes wrong is in the row."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model, _ = run_pass(Clean(), graph_file.read(graph.build(Path(folder))))
            return pruned(graph, model, Path(folder), alone=alone)
        except InputError as error:
            return Row(graph, {}, refused=str(error).partition("(")[2].rpartition(")")[0] or str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other graphs are still of interest
            lines = str(error).splitlines() or [""]
            return Row(graph, {}, wrong=f"FAILS: {type(error).__name__}: {lines[0][:200]}")


def pruned(graph: Graph, model: ir.Model, folder: Path, *, alone: bool) -> Row:
    """Prune a cleaned graph.

    Raises:
        InputError: There is nothing to prune.
    """
    settings = SETTINGS if any(g.kind in SETTINGS.kinds for g in analyze(model).groups) else EVERY_KIND
    plan = settings.plan(model)
    removed = removals(plan)
    cut, _ = run_pass(settings, model.clone())
    kinds = Counter(str(action["kind"]) for action in plan.actions)
    whole = session(model, folder / "whole.onnx")
    feeds = [fitting(whole, graph.feeds(batch, seed=3)) for batch in graph.batches]
    tolerance = (
        HALF_TOLERANCE if ir.DataType.FLOAT16 in {v.dtype for v in model.graph.initializers.values()} else TOLERANCE
    )
    worst = compare(model, cut, removed, feeds, folder)
    for name, units in removed.items() if alone and len(removed) > 1 else ():
        small = model.clone()
        analyze(small).cut({name: units})
        worst = max(worst, compare(model, small, {name: units}, feeds, folder))
    wrong = f"WRONG: differs by {worst:.1e}" if not worst <= tolerance else ""
    before, after = (products(one, feeds[0]) for one in (model, cut))
    return Row(graph, dict(sorted(kinds.items())), before, after, worst, wrong=wrong)


def removals(plan: Plan) -> Removed:
    found = {}
    for action in plan.actions:
        kept = plan.arrays[f"kept|{action['group']}"]
        found[str(action["group"])] = np.setdiff1d(np.arange(action["units"]), kept).tolist()
    return {name: units for name, units in found.items() if units}


def compare(model: ir.Model, cut: ir.Model, removed: Removed, feeds: Sequence[Feeds], folder: Path) -> float:
    """Largest difference between a cut graph and the whole one with the same units masked; inf where shapes differ."""
    masked = session(mask(analyze(model.clone()), removed), folder / "masked.onnx")
    small = session(cut, folder / "cut.onnx")
    worst = 0.0
    for batch in feeds:
        for got, wanted in zip(small.run(None, batch), masked.run(None, batch), strict=True):
            if got.shape != wanted.shape or not np.isfinite(got).all():
                return float("inf")
            scale = max(float(np.abs(wanted).max(initial=0)), 1e-6)
            worst = max(worst, float(np.abs(got.astype(np.float64) - wanted).max(initial=0)) / scale)
    return worst


def session(model: ir.Model, file: Path) -> onnxruntime.InferenceSession:
    """Through a file, so that ONNX's checker has its say."""
    graph_file.write(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def fitting(runner: onnxruntime.InferenceSession, feeds: Feeds) -> Feeds:
    """Without the inputs that cleaning has found to be unused."""
    names = {value.name for value in runner.get_inputs()}
    return {name: array for name, array in feeds.items() if name in names}


def products(model: ir.Model, feeds: Feeds) -> int:
    """Multiply-adds of one run."""
    shapes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    return sum(multiply_adds(model, shapes).values())


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Every model of ONNX's own test set, read, cleaned, fused and written again: does it still compute the same?

    .venv/bin/python benchmarks/onnx_forms.py [--quick] [--write] [--list]

The set is part of the onnx package (`onnx.backend.test`): some 2,000 small models, one for each operator and its
options, with their bodies as functions, control flow, sequences, opsets 6 to the newest. A model counts where ONNX
Runtime itself runs the original on the test's inputs; then each step's file has to give the same outputs, bit for bit
or within float rounding. `--quick` takes every twentieth; `--list` names what differs or is refused.

Prediction, before anything was measured: all that ONNX Runtime runs comes out the same, save operators drawn at random.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from markdown import environment, table, write_section
from onnx.backend.test.loader import load_model_tests

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.exporters import graph_file
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Dropout",
}
STEPS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "read and written": lambda model: model,
    "cleaned": lambda model: run_pass(Clean(optional=True), model)[0],
    "cleaned and fused": lambda model: run_pass(Fuse(optional=True), run_pass(Clean(optional=True), model)[0])[0],
}


def outputs_of(file: Path, feeds: dict[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # what is judged is our graph
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def same(wanted: Any, got: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return isinstance(got, list | tuple) and len(wanted) == len(got) and all(map(same, wanted, got))
    if wanted is None or got is None:
        return wanted is got
    a, b = np.asarray(wanted), np.asarray(got)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind not in "fc":
        return bool((a == b).all())
    near = max(1e-4, 16 * float(np.finfo(a.dtype).eps))
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    return bool(np.allclose(a, b, rtol=near, atol=near / 10 * max(scale, 1e-3), equal_nan=True))


def feeds_of(case: Any, model: onnx.ModelProto) -> dict[str, Any]:
    """The first data set of a test, by the names of the graph's inputs."""
    names = [value.name for value in model.graph.input if value.name not in {i.name for i in model.graph.initializer}]
    if case.data_sets:
        return dict(zip(names, case.data_sets[0][0], strict=False))
    folder = next(Path(case.model_dir).glob("test_data_set_*"))
    feeds: dict[str, Any] = {}
    for number, name in enumerate(names):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((folder / f"input_{number}.pb").read_bytes())
        feeds[name] = onnx.numpy_helper.to_array(tensor)
    return feeds


def judge(case: Any, folder: Path) -> dict[str, str]:
    """Step to `same`, or what else happened; empty where ONNX Runtime does not run the original."""
    model = case.model if case.model is not None else onnx.load(Path(case.model_dir) / "model.onnx")
    original = folder / "original.onnx"
    original.write_bytes(model.SerializeToString())
    if any(node.op_type in RANDOM for node in model.graph.node):
        return {}
    try:
        feeds = feeds_of(case, model)
        wanted = outputs_of(original, feeds)
    except Exception:  # noqa: BLE001 - not of the runtime's repertoire
        return {}
    found: dict[str, str] = {}
    for step, apply in STEPS.items():
        try:
            graph_file.write(apply(graph_file.read(original)), folder / "after.onnx")
            got = outputs_of(folder / "after.onnx", feeds)
            found[step] = "same" if same(wanted, got) else "differs"
        except OnnxpressError as error:
            found[step] = f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - to be listed
            found[step] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    for option in ("--quick", "--write", "--list"):
        parser.add_argument(option, action="store_true")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as scratch:
        cases = [case for kind in KINDS for case in load_model_tests(kind=kind)]
        for case in cases[:: 20 if chosen.quick else 1]:
            for step, verdict in judge(case, Path(scratch)).items():
                counts[step][verdict.partition(":")[0]] += 1
                if chosen.list and verdict != "same":
                    print(f"{case.name}: {step}: {verdict}")
    rows = [
        [step, sum(count.values()), *(count[word] for word in ("same", "differs", "refused", "fails"))]
        for step, count in counts.items()
    ]
    text = table(
        f"**Models of ONNX's own test set** ({len(cases)}, of which ONNX Runtime runs so many)",
        ["after being", "models", "same outputs", "other outputs", "refused", "fail"],
        rows,
    )
    text += "\n\n" + environment(machine(), versions(), ["onnx", "onnxruntime"])
    print(text)
    if chosen.write:
        write_section("onnx-forms", text)


if __name__ == "__main__":
    main()

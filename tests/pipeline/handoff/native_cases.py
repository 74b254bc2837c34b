# SPDX-License-Identifier: Apache-2.0
"""What the tests of compiled consumers share: what they need, a model of every type, and golden samples damaged."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff.base import Check, MissingTool, Target, judge, run_tool
from onnxpress.pipeline.handoff.golden import write_golden
from onnxpress.pipeline.handoff.native import headers, library
from onnxpress.runtime.opened import Bundle, GoldenSample
from onnxpress.runtime.session import Session

from ..samples import model_from

ODD = "übung 他"
"""A folder's name that no consumer may stumble over."""

_ONNX_TYPES = {
    "float32": "float", "float64": "double", "float16": "float16", "int64": "int64", "int32": "int32",
    "int16": "int16", "int8": "int8", "uint64": "uint64", "uint32": "uint32", "uint16": "uint16", "uint8": "uint8",
    "bool": "bool",
}  # fmt: skip


def need(*programs: str) -> None:
    """Skip where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def need_onnxruntime() -> None:
    """Skip without the headers of ONNX Runtime or a library to link with."""
    try:
        headers()
        library()
    except MissingTool as error:
        pytest.skip(error.message)


@functools.cache
def sanitizers(compiler: str) -> str:
    """The flags that make a program stop at its first wrong access or undefined step; empty where it has none."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "main.c"
        source.write_text("int main(void) { return 0; }\n", "utf-8")
        built = subprocess.run([compiler, *flags.split(), source, "-o", source.with_suffix("")], capture_output=True)
        ran = built.returncode == 0 and subprocess.run([source.with_suffix("")], capture_output=True).returncode == 0
    return flags if ran else ""


@dataclass(frozen=True)
class Built:
    """A consumer, handed off with a model and compiled, and what its check said of that model."""

    target: Target
    folder: Path
    scratch: Path
    check: Check

    def run(self, folder: Path, outputs: list[str], program: str = "build/check") -> Check:
        """Run the check program in another handoff's folder."""
        done = run_tool([self.scratch / program], folder)
        return judge(done, outputs, command="", stages=("run",), versions={})

    def told(self, folder: Path, program: str = "build/check") -> tuple[int, str]:
        """Exit code and standard error of the check program."""
        done = run_tool([self.scratch / program], folder)
        return done.returncode, done.stderr.strip()


def build(target: Target, bundle: Bundle, place: Path) -> Built:
    """Hand a bundle off and let its check compile and run it."""
    folder, scratch = place / ODD / "handoff", place / ODD / "scratch"
    folder.mkdir(parents=True)
    scratch.mkdir()
    target.write(bundle, folder)
    return Built(target, folder, scratch, target.check(bundle, folder, scratch))


def outputs_of(bundle: Bundle) -> list[str]:
    return [spec.name for spec in bundle.signature.outputs]


def every_type(folder: Path, left_out: frozenset[str] = frozenset()) -> list[str]:
    """A model that hands through a tensor of every type, a scalar and an empty one, and its golden samples.

    The names hold slashes and dots. Returns the outputs' names.
    """
    kinds = {name: onnx for name, onnx in _ONNX_TYPES.items() if name not in left_out}
    inputs = ", ".join(f"{onnx}[n, 3] i_{name}" for name, onnx in kinds.items())
    outputs = ", ".join(f"{onnx}[n, 3] o_{name}" for name, onnx in kinds.items())
    body = "\n".join(f"    o_{name} = Identity(i_{name})" for name in kinds)
    model = model_from(
        f'<ir_version: 10, opset_import: ["": 20]>\nall ({inputs}, int64 i_scalar, float[1, m, 4] i_empty)'
        f" => ({outputs}, int64 o_scalar, float[1, m, 4] o_empty)\n"
        f"{{\n{body}\n    o_scalar = Identity(i_scalar)\n    o_empty = Identity(i_empty)\n}}\n"
    )
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.name = value.name.replace("i_", "in/a.b/").replace("o_", "out/a.b/")
    path = folder / "model" / "model.onnx"
    path.parent.mkdir(parents=True)
    graph_file.write(model, path)
    samples = []
    for number, rows in enumerate((2, 0)):
        values = {name: _numbers(name, rows) for name in kinds}
        values |= {"scalar": np.array(7 - number), "empty": np.zeros((1, 0, 4), np.float32)}
        feeds = {f"in/a.b/{name}": value for name, value in values.items()}
        answers = {f"out/a.b/{name}": value for name, value in values.items()}
        samples.append(GoldenSample(str(number), None, feeds, answers))
    stand_in = SimpleNamespace(
        golden=samples, tolerance=lambda name, variant: 0.0, session=lambda variant: Session(path, threads=1)
    )
    write_golden(cast(Any, stand_in), folder / "golden")
    return [f"out/a.b/{name}" for name in (*kinds, "scalar", "empty")]


def _numbers(dtype: str, rows: int) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return np.array([[-1.5, 65504.0, 2.0**-24], [np.inf, np.nan, -0.0]], kind)[:rows]
    if kind.kind == "b":
        return np.array([[True, False, True], [False, True, False]])[:rows]
    limits = np.iinfo(kind)
    low, high = max(limits.min, -(2**53)), min(limits.max, 2**53)  # a double holds these
    return np.array([[low, high, 1], [0, 2, 3]], kind)[:rows]


def changed(folder: Path, change: Callable[[str], str]) -> None:
    """Rewrite each line of golden/tensors.txt."""
    table = folder / "golden" / "tensors.txt"
    lines = table.read_text("utf-8").splitlines()
    table.write_text("".join(change(line) + "\n" for line in lines), "utf-8")

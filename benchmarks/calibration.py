# SPDX-License-Identifier: Apache-2.0
"""Percentile calibration: peak memory and time against ONNX Runtime's calibrator, and ranges against exact ones.

    .venv/bin/python benchmarks/calibration.py [--samples 10 20 40 80] [--write]

The model is an MLP of 8 MatMuls (256 -> 1024 -> 256 ...); a sample is a batch of 8 sequences. Each run is a process of
its own that reports its highest resident memory and the range of every MatMul's input. Ours is given sequences of 64 to
256 steps; ONNX Runtime's calibrator fails on those (the error is shown) and is given 256 steps each, as is ours for
comparison. Exact ranges are `numpy.quantile` over all activations of all samples together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from markdown import environment, table, write_section

from onnxpress.contracts.process import peak_rss_mib
from onnxpress.pipeline.versions import versions
from onnxpress.runtime.machine import machine

LAYERS, WIDTH, HIDDEN, ROWS, STEPS, PERCENTILE = 8, 256, 1024, 8, 256, 99.99


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--child", nargs=3, metavar=("WHO", "SAMPLES", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, samples, model = options.child
        print(json.dumps(CHILDREN[who](Path(model), int(samples))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "mlp.onnx")
        rows = [row(model, samples) for samples in options.samples]
        variable = child("ort-variable", 2, model)
    columns = ["samples", "ours, 64–256 steps", "ours, 256 steps", "ONNX Runtime, 256 steps", "ratio", "bins off exact"]
    text = table("Percentile calibration: peak memory of the process in MiB (seconds).", columns, rows)
    text += f"\n\nONNX Runtime on sequences of different lengths: {variable.get('error', 'works')}.\n\n"
    text += environment(machine(), versions(), ["onnxruntime", "numpy"])
    print(text)
    if options.write:
        write_section("calibration", text)


def row(model: Path, samples: int) -> list[object]:
    ours, fixed, theirs = (child(who, samples, model) for who in ("ours", "ours-fixed", "ort"))
    exact = child("exact", samples, model)["ranges"]
    off = max(
        abs(found[end] - exact[name][end]) / ours["widths"][name]
        for name, found in ours["ranges"].items()
        for end in (0, 1)
    )
    cells = [f"{run['mib']:.0f} ({run['seconds']:.1f})" for run in (ours, fixed, theirs)]
    return [samples, *cells, f"{theirs['mib'] / fixed['mib']:.1f} x", f"{off:.2f}"]


def child(who: str, samples: int, model: Path) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", who, str(samples), str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_model(path: Path) -> Path:
    """An MLP whose activations have long tails, as those of transformers do."""
    rng = np.random.default_rng(0)
    lines, weights, value = [], [], "x"
    for layer in range(LAYERS):
        shape = (WIDTH, HIDDEN) if layer % 2 == 0 else (HIDDEN, WIDTH)
        weights.append(onnx.numpy_helper.from_array(make_weight(rng, shape), f"w{layer}"))
        out = "y" if layer == LAYERS - 1 else f"r{layer}"
        lines.append(f"m{layer} = MatMul({value}, w{layer}) {out} = LeakyRelu<alpha=0.1>(m{layer})")
        value = out
    body = " ".join(lines)
    text = f'<ir_version: 8, opset_import: ["": 17]> mlp (float[b,s,{WIDTH}] x) => (float[b,s,{WIDTH}] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(weights)
    onnx.save(model, path)
    return path


def make_weight(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.standard_t(5, shape) / np.sqrt(shape[0])).astype(np.float32)


class Batches(Sequence[dict[str, np.ndarray]]):
    """Samples that are made when they are asked for: holding them is not what is measured."""

    def __init__(self, samples: int, *, variable: bool) -> None:
        self.samples, self.variable = samples, variable

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        if not 0 <= index < self.samples:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        steps = int(rng.integers(64, STEPS + 1)) if self.variable and index else STEPS  # the first is the longest
        return {"x": rng.standard_normal((ROWS, steps, WIDTH)).astype(np.float32)}


def products() -> list[str]:
    return ["x", *(f"r{layer}" for layer in range(LAYERS - 1))]


def measured(started: float, **more: object) -> dict[str, object]:
    return {"mib": peak_rss_mib(), "seconds": time.perf_counter() - started, **more}


def ours(model: Path, samples: int, *, variable: bool = True) -> dict[str, object]:
    from onnxpress.exporters import graph_file
    from onnxpress.pipeline.statistics import Calibration, Wanted
    from onnxpress.pipeline.statistics.ranges import activation_range

    graph = graph_file.read(model)
    started = time.perf_counter()
    found = Calibration(Batches(samples, variable=variable), threads=2).collect(graph, Wanted(histograms=products()))
    ranges = {n: activation_range(found, n, "percentile", percentile=PERCENTILE) for n in products()}
    return measured(started, ranges=ranges, widths={n: found.histograms[n].width for n in products()})


def onnx_runtime(model: Path, samples: int, *, variable: bool = False) -> dict[str, object]:
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.data = iter(Batches(samples, variable=variable))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.data, None)

    started = time.perf_counter()
    calibrator = create_calibrator(
        str(model),
        ["MatMul"],
        augmented_model_path=str(model.with_name("augmented.onnx")),
        calibrate_method=CalibrationMethod.Percentile,
        extra_options={"percentile": PERCENTILE, "num_bins": 2048},
    )
    try:
        calibrator.collect_data(Reader())
        calibrator.compute_data()
    except Exception as error:  # noqa: BLE001 - whatever it raises is the result
        return measured(started, error=f"{type(error).__name__}: {str(error).splitlines()[0][:92]}")
    return measured(started)


def exact(model: Path, samples: int) -> dict[str, object]:
    """Every activation of every sample at once, one tensor at a time, sorted."""
    import onnxruntime as ort

    graph = onnx.load(model)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in products()[1:])
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    started, ranges = time.perf_counter(), {}
    tail = (100 - PERCENTILE) / 200
    for name in products():
        parts = [f["x"] if name == "x" else session.run([name], f)[0] for f in Batches(samples, variable=True)]
        together = np.concatenate([part.reshape(-1) for part in parts])
        ranges[name] = [float(q) for q in np.quantile(together, [tail, 1 - tail])]
    return measured(started, ranges=ranges)


CHILDREN = {
    "ours": ours,
    "ours-fixed": lambda model, samples: ours(model, samples, variable=False),
    "ort": onnx_runtime,
    "ort-variable": lambda model, samples: onnx_runtime(model, samples, variable=True),
    "exact": exact,
}

if __name__ == "__main__":
    main()

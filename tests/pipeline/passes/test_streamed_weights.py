# SPDX-License-Identifier: Apache-2.0
"""Passes over weights in a file: the results are those of memory, each is read once, and a file is whole or absent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import model_from, normal

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file
from onnxpress.exporters.streamed_tensor import Place, StreamedTensor, astype
from onnxpress.pipeline.passes.base import Pass, PassReport, run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.pipeline.passes.weight_only_late import Latest

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (int64[batch, s] ids, float[520, 64] e, float[640, 64] up, float[64, 640] down, float[64, 300] straight,
   float[640] bias) => (float[batch, s, 300] y, float[batch, s, 520] logits) {
    h = Gather(e, ids)
    ut = Transpose<perm = [1, 0]>(up)
    a = MatMul(h, ut)
    b = Add(a, bias)
    dt = Transpose<perm = [1, 0]>(down)
    d = MatMul(b, dt)
    y = MatMul(d, straight)
    et = Transpose<perm = [1, 0]>(e)
    logits = MatMul(d, et)
}"""
"""An embedding that is tied to the head, two weights stored as PyTorch has them, and one as ONNX has."""

SHAPES = {"e": (520, 64), "up": (640, 64), "down": (64, 640), "straight": (64, 300), "bias": (640,)}


def in_memory(scale: float = 1.0) -> ir.Model:
    weights = {name: normal(*shape, seed=i, scale=scale) for i, (name, shape) in enumerate(SHAPES.items())}
    return model_from(TEXT, {n: w.astype(ml_dtypes.bfloat16).astype(np.float32) for n, w in weights.items()})


def in_file(folder: Path, model: ir.Model) -> ir.Model:
    """The same model, its weights in bf16 in a file."""
    with (folder / "weights").open("wb") as file:
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            array = value.const_value.numpy().astype(ml_dtypes.bfloat16)
            place = Place(folder / "weights", file.tell(), ir.DataType.BFLOAT16, array.shape)
            file.write(array.tobytes())
            tensor = StreamedTensor(place, name=name)
            value.const_value = tensor.converted(ir.DataType.FLOAT, astype(ir.DataType.FLOAT))
    return model


def pressed(model: ir.Model, *passes: Pass) -> tuple[ir.Model, list[PassReport]]:
    reports = []
    for settings in passes:
        model, report = run_pass(settings, model)
        reports.append(report)
    return model, reports


def everything(file: Path) -> dict[str, Any]:
    """Nodes and weights of a written file, apart from where they lie."""
    model = graph_file.read(file)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        "nodes": [ir.to_proto(node).SerializeToString() for node in model.graph],
        "weights": {name: tensor.tobytes() for name, tensor in tensors.items() if tensor is not None},
    }


QUANTIZE = QuantizeWeights(minimum_elements=0, gather_bits=8, clip_search=False)


@pytest.mark.parametrize(
    "passes",
    [
        (Clean(),),
        (Clean(), CastPass()),
        (Clean(), CastPass(to="bfloat16", storage_only=True)),
        (Clean(), QUANTIZE),
        (Clean(), QuantizeWeights(minimum_elements=0)),
        (Clean(), QuantizeWeights(minimum_elements=0, bits=2, symmetric=True)),
        (Clean(), QuantizeWeights(minimum_elements=0, bits=8, group_size=None)),
        (Clean(), QuantizeWeights(minimum_elements=0, method="hqq")),
        (Clean(), QuantizeWeights(minimum_elements=0, format="unpack")),
        (CastPass(),),
        (QUANTIZE,),
    ],
    ids=lambda passes: "-".join(p.name for p in passes),
)
def test_the_same_file_as_from_memory(tmp_path: Path, passes: tuple[Pass, ...]) -> None:
    plain, _ = pressed(in_memory(), *passes)
    graph_file.write(plain, tmp_path / "plain.onnx")
    streamed, reports = pressed(in_file(tmp_path, in_memory()), *passes)
    graph_file.write(streamed, tmp_path / "streamed.onnx", external_from=0)
    assert (tmp_path / "streamed.onnx_data").is_file()
    assert everything(tmp_path / "streamed.onnx") == everything(tmp_path / "plain.onnx")
    assert reports[-1].changed


def test_the_report_is_the_same_once_the_file_is_written(tmp_path: Path) -> None:
    _, plain = pressed(in_memory(), Clean(), QUANTIZE)
    streamed, reports = pressed(in_file(tmp_path, in_memory()), Clean(), QUANTIZE)
    assert "weight_sqnr_db" not in reports[1].details["layers"]["e"]
    graph_file.write(streamed, tmp_path / "m.onnx", external_from=0)
    for name, layer in plain[1].details["layers"].items():
        ours = reports[1].details["layers"][name]
        assert ours.pop("weight_sqnr_db") == pytest.approx(layer.pop("weight_sqnr_db"), abs=0.02)
        assert ours == layer
    assert {**reports[1].details, "layers": None} == {**plain[1].details, "layers": None}
    assert json.dumps(reports[1].to_json())


def test_clamped_numbers_are_counted_when_they_are_written_and_once(tmp_path: Path) -> None:
    model = in_file(tmp_path, in_memory(scale=2e4))
    plain, theirs = pressed(in_memory(scale=2e4), CastPass())
    streamed, reports = pressed(model, CastPass())
    assert reports[0].details["clamped_when_written"] == 0
    for name in ("a.onnx", "b.onnx"):
        graph_file.write(streamed, tmp_path / name, external_from=0)
    graph_file.write(plain, tmp_path / "plain.onnx")
    assert reports[0].details["clamped_when_written"] == theirs[0].details["clamped"] > 5
    assert everything(tmp_path / "b.onnx") == everything(tmp_path / "plain.onnx")


@pytest.mark.parametrize("last", [CastPass(), QUANTIZE], ids=["cast", "quantize"])
def test_every_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Pass) -> None:
    model, read = in_file(tmp_path, in_memory()), 0
    original = Place.read

    def counted(place: Place, start: int, stop: int) -> np.ndarray:
        nonlocal read
        read += stop - start
        return original(place, start, stop)

    monkeypatch.setattr(Place, "read", counted)
    model, _ = pressed(model, Clean(), last)
    looked_at = read
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert looked_at < total / 4  # biases are
    graph_file.write(model, tmp_path / "m.onnx", external_from=0)
    assert read - looked_at <= total


def test_equal_weights_in_files_are_merged(tmp_path: Path) -> None:
    text = TEXT.replace("float[64, 640] down", "float[640, 64] down").replace(
        "dt = Transpose<perm = [1, 0]>(down)", "dd = Transpose<perm = [1, 0]>(down) dt = Transpose<perm = [1, 0]>(dd)"
    )
    weights = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights["down"] = weights["up"]
    twice = in_file(tmp_path, model_from(text, weights))
    twice, reports = pressed(twice, Clean())
    assert reports[0].details["merged_into"] == {"down": "up"}


def test_numbers_that_cannot_be_rounded(tmp_path: Path) -> None:
    model = in_memory()
    up = model.graph.initializers["up"]
    assert up.const_value is not None
    broken = up.const_value.numpy().copy()
    broken[3, 3] = np.inf
    up.const_value = ir.Tensor(broken, name="up")
    streamed, _ = pressed(in_file(tmp_path, model), Clean(), QUANTIZE)
    with pytest.raises(InputError, match=r"'up\.T' holds NaN or infinity"):
        graph_file.write(streamed, tmp_path / "m.onnx", external_from=0)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_data_of_an_onnx_file_is_streamed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxpress.exporters.streamed_tensor.STREAM_FROM", 1000)
    graph_file.write(in_memory(), tmp_path / "source.onnx", external_from=0)
    model, reports = pressed(graph_file.read(tmp_path / "source.onnx"), Clean(), CastPass())
    assert isinstance(model.graph.initializers["up.T"].const_value, StreamedTensor)
    graph_file.write(model, tmp_path / "m.onnx", external_from=0)
    plain, _ = pressed(in_memory(), Clean(), CastPass())
    graph_file.write(plain, tmp_path / "plain.onnx")
    assert everything(tmp_path / "m.onnx") == everything(tmp_path / "plain.onnx")
    assert reports[1].details["clamped_when_written"] == 0


def test_one_result_is_kept_at_a_time(tmp_path: Path) -> None:
    model, _ = pressed(in_file(tmp_path, in_memory()), Clean(), QUANTIZE)
    parts = [v.const_value for n, v in model.graph.initializers.items() if n.startswith(("up.T_", "down.T_"))]
    closures = [part.raw.__closure__ for part in parts if isinstance(part, ir.LazyTensor)]
    latest = {
        id(c.latest): c.latest
        for cells in closures
        for cell in cells or ()
        if hasattr(c := cell.cell_contents, "latest")
    }
    (kept,) = latest.values()
    assert isinstance(kept, Latest)
    assert kept.arrays == {}
    for part in parts:
        assert part is not None
        assert part.numpy().shape == tuple(part.shape.numpy())
        assert set(kept.arrays) == {"packed", "scale", "zero_point"}


CHILD = """
import sys, json, os
from pathlib import Path
import onnx_ir as ir, onnx.parser
from onnxpress.contracts.process import peak_rss_mib
from onnxpress.exporters import graph_file
from onnxpress.exporters.streamed_tensor import Place, StreamedTensor, astype
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights

kind, source, target, layers = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
width, inner = 1024, 4096
inputs, nodes = ["float[n, 1024] h0"], []
for i in range(layers):
    inputs += [f"float[4096, 1024] u{i}", f"float[1024, 4096] d{i}"]
    nodes += [f"a{i} = Transpose(u{i}) b{i} = MatMul(h{i}, a{i}) r{i} = Relu(b{i})"]
    nodes += [f"c{i} = Transpose(d{i}) h{i + 1} = MatMul(r{i}, c{i})"]
text = '<ir_version: 10, opset_import: ["": 20]> g (' + ", ".join(inputs)
text += f") => (float[n, 1024] h{layers}) {{" + " ".join(nodes) + "}"
model = ir.from_proto(onnx.parser.parse_model(text))
for place, value in enumerate(list(model.graph.inputs)[1:]):
    model.graph.inputs.remove(value)
    shape = tuple(value.shape.numpy())
    tensor = StreamedTensor(Place(source, place * 2 * width * inner, ir.DataType.BFLOAT16, shape), name=value.name)
    value.const_value = tensor.converted(ir.DataType.FLOAT, astype(ir.DataType.FLOAT))
    model.graph.register_initializer(value)
before = peak_rss_mib()
last = CastPass() if kind == "cast" else QuantizeWeights(clip_search=False)
for settings in (Clean(), last):
    model, _ = run_pass(settings, model)
written = graph_file.write(model, target, external_from=0)
print(json.dumps({"growth": peak_rss_mib() - before, "written": written}))
"""

LAYERS = 8
BYTES = LAYERS * 2 * 2 * 1024 * 4096  # 134 MB in bf16, 268 MB in fp32


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for the child: a hole in a file, apart from some numbers at its beginning and a byte for each matrix."""
    path = tmp_path_factory.mktemp("numbers") / "weights"
    with path.open("wb") as file:
        file.write(normal(1 << 16, scale=0.02).astype(ml_dtypes.bfloat16).tobytes())
        for matrix in range(LAYERS * 2):
            file.seek(matrix * 2 * 1024 * 4096)
            file.write(bytes([matrix + 1, 0x3C]))
        file.truncate(BYTES)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("kind", "share"), [("cast", 1.0), ("quantize", 0.32)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, numbers: Path, kind: str, share: float) -> None:
    arguments = [sys.executable, "-c", CHILD, kind, str(numbers), str(tmp_path / "m.onnx"), str(LAYERS)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["written"] == pytest.approx(BYTES * share, rel=0.02)
    assert found["growth"] < 100, found


@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL")
def test_a_kill_leaves_no_half_file(tmp_path: Path, numbers: Path) -> None:
    target = tmp_path / "m.onnx"
    arguments = [sys.executable, "-c", CHILD, "cast", str(numbers), str(target), str(LAYERS)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not _being_written(tmp_path):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".m.onnx.partial"]
    graph_file.write(in_memory(), target, external_from=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx_data"]
    assert everything(target)["nodes"]


def _being_written(folder: Path) -> bool:
    try:
        return any(file.stat().st_size > 1 << 20 for file in folder.glob(".m.onnx.partial/**/m.onnx_data"))
    except OSError:
        return False

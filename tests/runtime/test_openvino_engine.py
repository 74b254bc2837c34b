# SPDX-License-Identifier: Apache-2.0
"""Provider `openvino`: what a session on ONNX Runtime gives, with OpenVINO's own runtime behind it."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import InputError, MissingDependency, OnnxpressError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.runtime import Session, available_providers, openvino_engine, operators_after_optimization, profile
from onnxpress.runtime.openvino_engine import OpenVinoEngine, reason
from onnxpress.runtime.probe import main as probe_main

pytest.importorskip("openvino", reason="needs the extra openvino")

ANSWER = [[2, 4], [11, 13], [0, 0]]


def parse(text: str) -> bytes:
    model: bytes = onnx.parser.parse_model(text).SerializeToString()
    return model


def graph(body: str, opset: int = 18, more: str = "") -> bytes:
    return parse(f'<ir_version: 9, opset_import: ["": {opset}{more}]> {body}')


def session(model: Path | bytes, threads: int = 1) -> Session:
    return Session(model, provider="openvino", threads=threads)


def test_answer_and_signature_are_those_of_the_other_engine(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    ours, other = session(tiny), Session(tiny, threads=1)
    assert ours.run(feeds)["y"].tolist() == ANSWER
    assert ours.signature == other.signature
    assert (ours.provider, ours.threads) == ("openvino", 1)
    assert ours.load_ms > 0
    assert "openvino" in available_providers()


def test_bytes_do_as_well(tiny_bytes: bytes, feeds: dict[str, np.ndarray]) -> None:
    assert session(tiny_bytes).run(feeds, ["y"])["y"].tolist() == ANSWER
    assert list(session(tiny_bytes).run(feeds, [])) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, ["'x' is missing", "float32 [batch, 4]"]),
        ({"bais": np.zeros(3, np.int64)}, ["no input 'bais'"]),
        ({"x": np.zeros((3, 4))}, ["'x' is float64 [3, 4]", "float32 [batch, 4]"]),
        ({"x": np.zeros((3, 5), np.float32)}, ["'x' is float32 [3, 5]", "float32 [batch, 4]"]),
    ],
)
def test_wrong_input_is_named_in_one_line(
    tiny: Path, feeds: dict[str, np.ndarray], change: dict[str, np.ndarray], words: list[str]
) -> None:
    changed = {name: array for name, array in {**feeds, **change}.items() if array is not None}
    with pytest.raises(InputError) as caught:
        session(tiny).run(changed)
    assert all(word in caught.value.message for word in words), caught.value.message
    with pytest.raises(InputError, match="no output 'z'"):
        session(tiny).run(feeds, ["z"])


def test_shapes_may_change_from_run_to_run(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    ours = session(tiny)
    for rows in [3, 1, 5, 3]:
        given = {"bias": feeds["bias"][:1].repeat(rows), "x": np.ones((4, rows), np.float32).T}
        assert ours.run(given)["y"].tolist() == [[2, 2]] * rows
    assert ours.run({"x": np.zeros((0, 4), np.float32), "bias": np.zeros(0, np.int64)})["y"].shape == (0, 2)


def test_outputs_outlive_the_next_run(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    ours = session(tiny)
    first = ours.run(feeds)["y"]
    ours.run({**feeds, "x": feeds["x"] * 100})
    assert first.tolist() == ANSWER
    assert first.flags.owndata


def test_threads_may_share_a_session(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    ours = session(tiny)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: ours.run({**feeds, "x": feeds["x"] * k})["y"], range(40)))
    alone = session(tiny)
    assert all((y == alone.run({**feeds, "x": feeds["x"] * k})["y"]).all() for k, y in enumerate(found))


def test_an_input_that_nothing_uses_and_an_output_that_is_an_input() -> None:
    text = "g (float[n, 2] x, int64[m] unused) => (float[n, 2] x_again, float[n] total) "
    ours = session(graph(text + "{x_again = Identity(x)  two = Constant<value_ints = [1]>()  "
                                "total = ReduceSum<keepdims = 0>(x, two)}"))  # fmt: skip
    assert [spec.name for spec in ours.signature.inputs] == ["x", "unused"]
    found = ours.run({"x": np.array([[1, 2]], np.float32), "unused": np.zeros(3, np.int64)}, ["total", "x_again"])
    assert {name: array.tolist() for name, array in found.items()} == {"total": [3], "x_again": [[1, 2]]}
    assert list(found) == ["total", "x_again"]
    with pytest.raises(InputError, match="'unused' is missing"):
        ours.run({"x": np.ones((1, 2), np.float32)})


def test_every_plain_type_goes_in_and_out() -> None:
    types = {"float16": "float16", "float": "float32", "double": "float64", "bool": "bool", "uint8": "uint8",
             "int8": "int8", "int32": "int32", "int64": "int64"}  # fmt: skip
    inputs = ", ".join(f"{kind}[?, n] in_{kind}" for kind in types)
    outputs = ", ".join(f"{kind}[?, n] out_{kind}" for kind in types)
    ours = session(graph(f"g ({inputs}) => ({outputs}) {{ {' '.join(f'out_{k} = Identity(in_{k})' for k in types)} }}"))
    given = {f"in_{kind}": np.ones((2, 3), dtype) for kind, dtype in types.items()}
    found = ours.run(given)
    assert {name: array.dtype.name for name, array in found.items()} == {f"out_{k}": d for k, d in types.items()}
    assert all((array == 1).all() for array in found.values())
    assert ours.signature.inputs[0] == TensorSpec("in_float16", "float16", (None, "n"))


@pytest.mark.parametrize("kind", ["string", "bfloat16"])
def test_what_cannot_be_exchanged_is_refused_before_it_ends_the_process(kind: str) -> None:
    with pytest.raises(InputError, match=f"input 'x' is {kind}, which cannot be exchanged with OpenVINO"):
        session(graph(f"g ({kind}[n] x) => ({kind}[n] y) {{y = Identity(x)}}"))


def test_a_container_is_refused() -> None:
    with pytest.raises(InputError, match=r"input 'x' is seq\(...\)"):
        session(graph("g (seq(float[n]) x, int64 i) => (float[n] y) {y = SequenceAt(x, i)}"))


def test_an_output_without_a_shape_in_the_file() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18]> g (float[n, 2] x) => (float[n, 2] y) {y = Neg(x)}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert session(model.SerializeToString()).signature.outputs == (TensorSpec("y", "float32", (None, 2)),)


def test_external_data_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ", ".join(map(str, range(1024)))
    body = f"g (float[n, 1024] x) => (float[n, 1024] y) <float[1024] w = {{{values}}}> {{y = Add(x, w)}}"
    monkeypatch.setattr(graph_file, "EXTERNAL_DATA_FROM", 0)
    graph_file.write(ir.from_onnx_text(f'<ir_version: 9, opset_import: ["": 18]> {body}'), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx_data").is_file()
    found = session(tmp_path / "m.onnx").run({"x": np.zeros((1, 1024), np.float32)})["y"]
    assert found.tolist() == [list(range(1024))]


def test_float32_is_not_computed_in_bfloat16() -> None:
    """By default OpenVINO does, where the processor can: an error of 1e-2 here."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 64)).astype(np.float32)
    values = ", ".join(map(str, w.ravel().tolist()))
    ours = session(
        graph(f"g (float[n, 64] x) => (float[n, 64] y) <float[64, 64] w = {{{values}}}> {{y = MatMul(x, w)}}")
    )
    x = rng.standard_normal((8, 64)).astype(np.float32)
    assert np.abs(ours.run({"x": x})["y"] - x.astype(np.float64) @ w).max() < 1e-4
    assert isinstance(ours._engine, OpenVinoEngine)
    compiled = ours._engine.compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_an_operator_that_openvino_does_not_know_is_named() -> None:
    with pytest.raises(InputError) as caught:
        session(graph("g (float[n] x) => (float[n] y) {y = nobody.Frob(x)}", more=', "nobody": 1'))
    assert caught.value.message == "the model cannot be loaded: OpenVINO has no operator nobody.Frob"
    assert "cpu" in caught.value.next_step


def test_an_operator_that_openvino_refuses_is_named() -> None:
    with pytest.raises(InputError) as caught:
        session(graph("g (float[n, 2] x) => (float[n, 2] y) {y = Softmax<axis = 7>(x)}", 16))
    assert caught.value.message.startswith("the model cannot be loaded: OpenVINO refuses Softmax-16: Axis 7 out of")
    assert ".cpp" not in caught.value.message


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_that_fails_says_so_and_harms_no_other(threads: int) -> None:
    """`infer()` of 2026.4.1 on one thread returns stale outputs here, and crashes on the third call."""
    ours = session(graph("g (float[n, k] x, float[a, b] z) => (float[n, b] y) {y = MatMul(x, z)}"), threads)
    x = np.ones((2, 3), np.float32)
    for rows in (2, 3, 2, 2, 3, 3, 4, 3):
        given = {"x": x, "z": np.ones((rows, 2), np.float32)}
        if rows == 3:
            assert ours.run(given)["y"].tolist() == [[3, 3], [3, 3]]
            continue
        with pytest.raises(OnnxpressError, match="the model failed: MatMul node with name 'y'") as caught:
            ours.run(given)
        assert ".cpp" not in caught.value.message


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_corrupt_model_is_one_line(tmp_path: Path, tiny_bytes: bytes, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(tiny_bytes[:60] if content is None else content)
    for model in (path, path.read_bytes()):
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            session(model)
        assert str(tmp_path) not in caught.value.message
        assert "\n" not in caught.value.message


def test_absent_model_and_bad_threads(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(InputError, match="no model file"):
        session(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="threads"):
        session(tiny, threads=0)


def test_more_threads_than_cores_are_not_claimed(tiny: Path) -> None:
    assert session(tiny, threads=4096).threads < 4096


def test_not_installed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not openvino_engine.is_installed()
    assert "openvino" not in available_providers()
    with pytest.raises(MissingDependency) as caught:
        session(tiny)
    assert caught.value.next_step == 'pip install "onnxpress[openvino]"'
    with pytest.raises(MissingDependency, match="openvino is not installed"):
        openvino_engine.openvino()


def test_importing_it_reports_to_nobody(tmp_path: Path, tiny: Path) -> None:
    """Importing openvino alone opens a connection and leaves an identifier in the user's home."""
    code = f"""
import os, socket, sys, threading
def refuse(*_, **__): print("NETWORK"); raise OSError
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from onnxpress.runtime import Session
from onnxpress.runtime.openvino_engine import openvino
Session({str(tiny)!r}, provider="openvino", threads=1)
assert "openvino_telemetry" not in sys.modules
openvino().convert_model  # loaded, with the stand-in
print([t.name for t in threading.enumerate()])
"""
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment |= {"HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['MainThread']"
    assert list((tmp_path / "home").iterdir()) == []


QDQ = """g (float[n, 16] x) => (float[n, 16] y)
<float s = {0.05}, uint8 z = {128}, float ws = {0.02}, int8 wz = {0}, int8[16, 16] w = {%s}>
{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  wd = DequantizeLinear(w, ws, wz)  y = MatMul(d, wd) }
""" % ", ".join(str(i % 13 - 6) for i in range(256))  # noqa: UP031


def test_profile_names_nodes_and_kernels() -> None:
    x = {"x": np.linspace(-5, 5, 48, dtype=np.float32).reshape(3, 16)}
    times = profile(graph(QDQ), x, provider="openvino", threads=1, runs=2)
    assert {time.provider for time in times} == {"openvino"}
    assert sum(time.share for time in times) == pytest.approx(1)
    (product,) = [time for time in times if time.op == "FullyConnected"]
    assert "i8" in product.kernel
    assert operators_after_optimization(graph(QDQ), x, provider="openvino", threads=1)["FullyConnected"] == 1


def test_no_trace_unless_it_was_asked_for(tiny: Path) -> None:
    with pytest.raises(OnnxpressError, match="no trace"):
        session(tiny).end_profiling()


def test_probe(tiny: Path, tmp_path: Path, feeds: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "inputs.npz", **feeds)  # type: ignore[arg-type]
    arguments = [str(tiny), "--inputs", str(tmp_path / "inputs.npz"), "--provider", "openvino", "--threads", "1"]
    assert probe_main(arguments) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"load_ms", "peak_rss_mb"}


def test_reason_of_an_unknown_kind() -> None:
    assert reason(RuntimeError("")) == "RuntimeError"
    text = (
        "Exception from src/a.cpp:1:\nCheck 'x' failed at src/b.cpp:2:\nonnx: Could not open \"/some/where/m.onnx\"\n\n"
    )
    assert reason(RuntimeError(text)) == "onnx: Could not open m.onnx"

# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import onnxpress.runtime
from onnxpress.contracts.errors import InputError, MissingDependency, OnnxpressError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.runtime import PROVIDERS, Session, available_providers, openvino_engine, require_provider
from onnxpress.runtime.onnxruntime_engine import OnnxRuntimeEngine, _DeviceRun

ANSWER = [[2, 4], [11, 13], [0, 0]]  # by hand: rows [0+2, 1+3], [4+6+1, 5+7+1], and below zero


def parse(text: str) -> bytes:
    model: bytes = onnx.parser.parse_model(text).SerializeToString()
    return model


def onnxruntime_session(session: Session) -> Any:
    assert isinstance(session._engine, OnnxRuntimeEngine)
    return session._engine.session


def test_import_is_light() -> None:
    engines = "'onnxruntime', 'openvino', 'torch', 'transformers', 'onnx', 'safetensors'"
    heavy = f"{{{engines}, 'onnxpress.exporters', 'onnxpress.pipeline'}}"
    check = (
        f"import sys, onnxpress.runtime; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_import_no_engine_until_it_is_used() -> None:
    modules = "session, benchmark, bundle, kernels, machine, probe, profiling"
    engines = "{'onnxruntime', 'openvino'}"
    check = f"import sys; from onnxpress.runtime import {modules}; sys.exit(bool({engines} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_public_name_resolves() -> None:
    names = onnxpress.runtime.__all__
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(onnxpress.runtime, name).__doc__ is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(onnxpress.runtime, "no_such_name")  # noqa: B009


def test_answer_and_signature(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    session = Session(tiny, threads=1)
    assert session.run(feeds)["y"].tolist() == ANSWER
    assert session.signature.inputs == (
        TensorSpec("x", "float32", ("batch", 4)),
        TensorSpec("bias", "int64", ("batch",)),
    )
    assert session.signature.outputs == (TensorSpec("y", "float32", ("batch", 2)),)
    assert (session.provider, session.threads) == ("cpu", 1)
    assert session.load_ms > 0


def test_bytes_and_default_threads(tiny_bytes: bytes, feeds: dict[str, np.ndarray]) -> None:
    session = Session(tiny_bytes)
    assert session.threads >= 1
    assert list(session.run(feeds, ["y"])) == ["y"]


def test_worker_threads_stay_awake_only_when_asked(tiny_bytes: bytes) -> None:
    quiet, awake = (onnxruntime_session(Session(tiny_bytes, threads=1, spinning=s)) for s in (False, True))
    assert quiet.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
    with pytest.raises(RuntimeError, match="force_spinning_stop"):
        awake.get_session_options().get_session_config_entry("session.force_spinning_stop")


def test_dtype_names_are_numpys() -> None:
    types = ["float16", "float", "double", "bool", "string", "uint8", "bfloat16"]
    inputs = ", ".join(f"{kind}[?, n] in_{kind}" for kind in types)
    outputs = ", ".join(f"{kind}[?, n] out_{kind}" for kind in types)
    body = "\n".join(f"out_{kind} = Identity(in_{kind})" for kind in types)
    session = Session(parse(f'<ir_version: 8, opset_import: ["": 16]> g ({inputs}) => ({outputs}) {{ {body} }}'))
    assert [spec.dtype for spec in session.signature.inputs] == [
        "float16", "float32", "float64", "bool", "string", "uint8", "bfloat16",
    ]  # fmt: skip
    assert session.signature.inputs[0].shape == (None, "n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, ["'x' is missing", "float32 [batch, 4]"]),
        ({"bais": np.zeros(3, np.int64)}, ["no input 'bais'"]),
        ({"x": np.zeros((3, 4))}, ["'x' is float64 [3, 4]", "float32 [batch, 4]"]),
        ({"x": np.zeros((3, 5), np.float32)}, ["'x' is float32 [3, 5]", "float32 [batch, 4]"]),
        ({"bias": np.zeros((3, 1), np.int64)}, ["'bias' is int64 [3, 1]", "int64 [batch]"]),
        ({"bias": [0, 1, 2]}, ["'bias' is a list", "int64 [batch]"]),
    ],
)
def test_wrong_input_is_named_in_one_line(
    tiny: Path, feeds: dict[str, np.ndarray], change: dict[str, np.ndarray], words: list[str]
) -> None:
    changed = {name: array for name, array in {**feeds, **change}.items() if array is not None}
    with pytest.raises(InputError) as caught:
        Session(tiny).run(changed)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_unknown_names_are_suggested(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    session = Session(tiny)
    with pytest.raises(InputError, match="no input 'bais'") as caught:
        session.run({**feeds, "bais": feeds["bias"]})
    assert "'bias'" in caught.value.next_step
    with pytest.raises(InputError, match="no output 'z'"):
        session.run(feeds, ["z"])


def test_values_that_the_model_cannot_take() -> None:
    graph = "g (int64[n] i) => (float[n] y) <float[2] w = {1, 2}> {y = Gather(w, i)}"
    session = Session(parse('<ir_version: 8, opset_import: ["": 16]>' + graph))
    assert session.run({"i": np.array([1, 0])})["y"].tolist() == [2, 1]
    with pytest.raises(OnnxpressError, match="the model failed") as caught:
        session.run({"i": np.array([7])})
    assert ".cc" not in caught.value.message
    assert "7" in caught.value.message


def test_unknown_provider_is_suggested(tiny: Path) -> None:
    with pytest.raises(InputError, match="unknown provider 'cudaa'") as caught:
        Session(tiny, provider="cudaa")
    assert "'cuda'" in caught.value.next_step


def test_known_provider_that_is_not_installed() -> None:
    assert "cpu" in available_providers()
    assert require_provider("cpu") == "CPUExecutionProvider"
    for name in sorted(set(PROVIDERS) - set(available_providers())):
        with pytest.raises(MissingDependency) as caught:
            require_provider(name)
        assert name in caught.value.message
        assert caught.value.next_step
        if name == "cuda":
            assert 'pip install "onnxpress[gpu]"' in caught.value.next_step


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as caught:
        require_provider("cpu")
    assert caught.value.next_step == 'pip install "onnxpress[cpu]"'
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: True)
    assert available_providers() == ["openvino"]
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    with pytest.raises(MissingDependency, match="onnxruntime is not installed"):
        available_providers()


def test_silent_fallback_is_an_error(
    tiny: Path, feeds: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A build that offers CUDA on a machine that cannot start it: onnxruntime itself would go on with the CPU."""
    import onnxruntime as ort

    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda model, options, providers, **_: real(model, options, providers=providers[-1:])
    )
    with pytest.raises(MissingDependency, match="'cuda' could not be started"):
        Session(tiny, provider="cuda")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_corrupt_model_is_one_line(tmp_path: Path, tiny_bytes: bytes, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(tiny_bytes[:60] if content is None else content)
    for model in (path, path.read_bytes()):
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            Session(model)
        assert "ONNXRuntimeError" not in caught.value.message
        assert str(tmp_path) not in caught.value.message


def test_unsupported_operator_is_one_line() -> None:
    text = '<ir_version: 8, opset_import: ["": 16, "nobody": 1]> g (float[n] x) => (float[n] y) {y = nobody.Frob(x)}'
    with pytest.raises(InputError, match="Frob") as caught:
        Session(parse(text))
    assert "::" not in caught.value.message


def test_absent_model_and_bad_threads(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(InputError, match="no model file"):
        Session(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match="no model file"):
        Session(tmp_path)
    with pytest.raises(InputError, match="threads"):
        Session(tiny, threads=0)


def test_device_buffers_follow_shapes_and_values(tiny: Path, feeds: dict[str, np.ndarray]) -> None:
    """What CUDA uses, with the CPU as the device: the buffers must be refilled, and made anew for another shape."""
    session = Session(tiny)
    bound = _DeviceRun(onnxruntime_session(session), "cpu")
    for rows in [3, 1, 2, 3, *range(1, 14), 3]:
        for factor in (1, 2):
            # reversed order and a strided array: neither may matter
            given = {"bias": feeds["bias"][:1].repeat(rows), "x": np.full((4, rows), factor, np.float32).T}
            (y,) = bound(["y"], given)
            assert y.tolist() == [[2 * factor, 2 * factor]] * rows
    assert len(bound._bindings) <= 8


def test_device_run_copes_with_shapes_that_depend_on_values() -> None:
    text = '<ir_version: 8, opset_import: ["": 16]> g (float[n] x) => (int64[1, found] y) {y = NonZero(x)}'
    bound = _DeviceRun(onnxruntime_session(Session(parse(text))), "cpu")
    assert bound(["y"], {"x": np.array([1, 0, 1], np.float32)})[0].tolist() == [[0, 2]]
    assert bound(["y"], {"x": np.array([0, 1, 0], np.float32)})[0].tolist() == [[1]]
    assert bound(["y"], {"x": np.array([1, 1, 1], np.float32)})[0].tolist() == [[0, 1, 2]]


def test_device_run_returns_the_outputs_asked_for() -> None:
    text = '<ir_version: 8, opset_import: ["": 16]> g (float[n] x) => (float[n] a, float[n] b) {a = Neg(x) b = Abs(x)}'
    bound = _DeviceRun(onnxruntime_session(Session(parse(text))), "cpu")
    given = {"x": np.array([3], np.float32)}
    assert [value.item() for value in bound(["a", "b"], given)] == [-3, 3]
    assert [value.item() for value in bound(["b"], given)] == [3]
    assert [value.item() for value in bound(["b", "a"], given)] == [3, -3]

# SPDX-License-Identifier: Apache-2.0
"""What Triton would read, read back by our own reader and, where it is installed, by protobuf with Triton's schema."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.exporters import graph_file
from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN, run_tool
from onnxpress.pipeline.handoff.model_files import place_model
from onnxpress.pipeline.handoff.triton import TARGETS, configuration_of, text_proto
from onnxpress.pipeline.handoff.triton.configuration import repeated, service_name
from onnxpress.pipeline.handoff.triton.golden_requests import write_requests
from onnxpress.runtime.opened import Bundle, GoldenSample
from onnxpress.runtime.session import Session

from ..samples import model_from, write_net

TRITON = TARGETS["triton"]
COUPLED = """
<ir_version: 10, opset_import: ["": 18]>
coupled (float[batch, 4] x) => (float[batch, 4] y)
{
    axes = Constant<value_ints = [0]>()
    mean = ReduceMean(x, axes)
    y = Sub(x, mean)
}
"""
"""A row's answer depends on the other rows, although all first axes bear the batch's name."""


def written(bundle: Bundle, folder: Path) -> text_proto.Message:
    TRITON.write(bundle, folder)
    (file,) = folder.glob("model_repository/*/config.pbtxt")
    return text_proto.read(file.read_text("utf-8"))


@contextmanager
def served(models: dict[str, Path]) -> Iterator[str]:
    """`onnxpress serve`, in a thread."""
    from onnxpress.runtime.serving.app import create_app
    from onnxpress.runtime.serving.serve import make_server

    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses: list[str] = []
        ready = threading.Event()
        server = make_server(create_app(models), on_ready=lambda url: (addresses.append(url), ready.set()))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ready.wait(60)
            yield addresses[0]
        finally:
            server.should_exit = True
            thread.join()


def stub(model: Path, sample: dict[str, np.ndarray], **fields: Any) -> Any:
    """As much of a bundle as the configuration asks for."""
    session = Session(model, threads=1)
    golden = (GoldenSample("one", None, sample, session.run(sample)),)
    known = {"manifest": {}, "name": "net", "labels": {}, "signature": session.signature, "golden": golden}
    more = {"session": lambda: session, "tolerance": lambda name: 1e-6, "model_file": lambda: model}
    return SimpleNamespace(**{**known, **more, **fields})


def test_texts_are_joined_along_the_batch(text_bundle: Bundle, tmp_path: Path) -> None:
    message = written(text_bundle, tmp_path)
    (home,) = (tmp_path / "model_repository").iterdir()
    assert message["name"] == [home.name]
    assert message["backend"] == ["onnxruntime"]
    assert message["max_batch_size"] == [16]
    names = [spec.name for spec in text_bundle.signature.inputs]
    wanted = [{"name": [n], "data_type": ["TYPE_INT64"], "dims": [-1]} for n in names]
    assert message["input"] == wanted
    label = {"label_filename": ["labels.txt"]}
    assert message["output"] == [{"name": ["logits"], "data_type": ["TYPE_FP32"], "dims": [3], **label}]
    assert message["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    batching = message["dynamic_batching"][0]
    assert isinstance(batching, dict)
    assert batching["preferred_batch_size"] == [4, 8, 16]
    assert batching["max_queue_delay_microseconds"] == [2000]
    assert (home / "labels.txt").read_text() == "".join(f"{text_bundle.labels[i]}\n" for i in range(3))
    assert (home / "1" / "model.onnx").read_bytes() == text_bundle.model_file().read_bytes()


def test_the_readme_says_how_text_becomes_tensors(text_bundle: Bundle, tmp_path: Path) -> None:
    TRITON.write(text_bundle, tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert 'Tokenizer.from_file("preprocessing/tokenizer.json")' in text
    assert f"enable_truncation({text_bundle.max_length})" in text
    assert "\n\n## Text" in text
    code = text.partition("```python\n")[2].partition("```")[0].replace("preprocessing/", f"{tmp_path}/preprocessing/")
    sample = json.loads((tmp_path / "requests" / "expected.json").read_text("utf-8"))["samples"][0]
    space: dict[str, Any] = {}
    exec(code.replace('"some text"', repr(sample["text"])), space)
    for tensor in json.loads((tmp_path / "requests" / sample["request"]).read_text("utf-8"))["inputs"]:
        assert space["tensors"][tensor["name"]] == tensor["data"]


def test_a_decoder_is_not_joined_and_its_scalar_gets_an_axis(decoder_bundle: Bundle, tmp_path: Path) -> None:
    message = written(decoder_bundle, tmp_path)
    assert message["max_batch_size"] == [0]
    assert "dynamic_batching" not in message
    inputs = {field["name"][0]: field for field in message["input"] if isinstance(field, dict)}
    assert inputs["input_ids"]["dims"] == [-1, -1]
    assert inputs["num_logits_to_keep"] == {
        "name": ["num_logits_to_keep"],
        "data_type": ["TYPE_INT64"],
        "dims": [1],
        "reshape": [{"shape": []}],
    }
    request = json.loads((tmp_path / "requests" / "0.json").read_text("utf-8"))
    shapes = {tensor["name"]: tensor["shape"] for tensor in request["inputs"]}
    assert shapes["num_logits_to_keep"] == [1]
    assert 0 in shapes["past_key_values.0.key"]


def test_rows_that_see_each_other_are_not_joined(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)
    bundle = stub(write_net(tmp_path / "coupled.onnx", COUPLED), {"x": x})
    assert configuration_of(bundle).max_batch_size == 0
    free = stub(write_net(tmp_path / "free.onnx", COUPLED.replace("Sub(x, mean)", "Neg(x)")), {"x": x})
    assert configuration_of(free).max_batch_size == 16
    fixed = stub(write_net(tmp_path / "fixed.onnx", COUPLED.replace("batch", "1")), {"x": x})
    assert configuration_of(fixed).max_batch_size == 0


def test_a_tensor_of_the_batch_axis_alone_gets_another(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]> n (int64[batch] x) => (int64[batch] y) { y = Neg(x) }"""
    bundle = stub(write_net(tmp_path / "n.onnx", text), {"x": np.array([3])})
    configuration = configuration_of(bundle)
    assert (configuration.inputs[0].dims, configuration.inputs[0].scalar) == ((1,), True)
    assert configuration.request_shape(np.zeros(5)) == (5, 1)


def test_external_data_travels_under_its_name(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    n (float[batch, 64] x, float[64, 64] w1) => (float[batch, 64] y) { y = MatMul(x, w1) }"""
    graph_file.write(model_from(text), tmp_path / "deep.onnx", external_from=0)
    place_model(SimpleNamespace(model_file=lambda: tmp_path / "deep.onnx"), tmp_path / "there" / "1")  # type: ignore[arg-type]
    assert {p.name for p in (tmp_path / "there" / "1").iterdir()} == {"model.onnx", "deep.onnx_data"}
    x = {"x": np.ones((1, 64), np.float32)}
    there, here = Session(tmp_path / "there" / "1" / "model.onnx"), Session(tmp_path / "deep.onnx")
    np.testing.assert_array_equal(there.run(x)["y"], here.run(x)["y"])


def test_external_data_outside_the_folder_stays_there(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    n (float[batch, 64] x, float[64, 64] w1) => (float[batch, 64] y) { y = MatMul(x, w1) }"""
    graph_file.write(model_from(text), tmp_path / "deep.onnx", external_from=0)
    raw = (tmp_path / "deep.onnx").read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "m.onnx").write_bytes(raw.replace(b"deep.onnx_data", b"../secret_data"))
    (tmp_path / "secret_data").write_text("secret")
    with pytest.raises(InputError, match="outside"):
        place_model(SimpleNamespace(model_file=lambda: tmp_path / "bad" / "m.onnx"), tmp_path / "there")  # type: ignore[arg-type]


def test_what_was_not_run_is_not_claimed(
    text_bundle: Bundle, vision_bundle: Bundle, decoder_bundle: Bundle, tmp_path: Path
) -> None:
    for number, bundle in enumerate((text_bundle, vision_bundle, decoder_bundle)):
        TRITON.write(bundle, tmp_path / str(number))
        check = TRITON.check(bundle, tmp_path / str(number), tmp_path)
        assert (check.status, check.done, dict(check.worst)) == (NOT_RUN, ("generated", "parsed"), {}), check.reason


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("dims: [ 3 ]", "dims: [ 4 ]", "outputs are not those"),
        ("TYPE_INT64", "TYPE_INT32", "inputs are not those"),
        ('name: "input_ids"', 'name: "ids"', "inputs are not those"),
        ("max_batch_size: 16", "max_batch_size: many", "max_batch_size"),
        ("count: 1", "count 1", "line"),
    ],
)
def test_a_configuration_that_contradicts_the_model_fails(
    text_bundle: Bundle, tmp_path: Path, old: str, new: str, reason: str
) -> None:
    TRITON.write(text_bundle, tmp_path)
    (file,) = tmp_path.glob("model_repository/*/config.pbtxt")
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    check = TRITON.check(text_bundle, tmp_path, tmp_path)
    assert check.status == FAILED
    assert reason in check.reason


def test_a_copy_that_answers_otherwise_fails(text_bundle: Bundle, decoder_bundle: Bundle, tmp_path: Path) -> None:
    TRITON.write(text_bundle, tmp_path)
    (model,) = tmp_path.glob("model_repository/*/1/model.onnx")
    model.write_bytes(decoder_bundle.model_file().read_bytes())
    assert TRITON.check(text_bundle, tmp_path, tmp_path).status == FAILED


def test_the_largest_batch_is_all_of_one_row() -> None:
    rows = repeated({"x": np.arange(6).reshape(3, 2)}, 4)["x"]
    np.testing.assert_array_equal(rows, [[0, 1]] * 4)


@pytest.mark.parametrize(("name", "safe"), [("a b/c", "a-b-c"), ("../x", "x"), ("模型", "model"), ("m.1_2", "m.1_2")])
def test_names_become_a_folder_and_a_url(name: str, safe: str) -> None:
    assert service_name(SimpleNamespace(name=name)) == safe  # type: ignore[arg-type]


def test_what_triton_cannot_run_is_refused(text_bundle: Bundle, tmp_path: Path) -> None:
    x = {"x": np.zeros((1, 4), np.float32)}
    model = write_net(tmp_path / "coupled.onnx", COUPLED)
    with pytest.raises(InputError, match="several graphs"):
        configuration_of(stub(model, x, manifest={"companions": [{"name": "encoder_model"}]}))
    odd = SimpleNamespace(inputs=(TensorSpec("x", "seq(tensor(float))", ()),), outputs=())
    with pytest.raises(InputError, match="no name for"):
        configuration_of(stub(model, x, signature=odd))


def test_numbers_that_json_does_not_know_leave_a_sample_out(tmp_path: Path) -> None:
    bundle = stub(write_net(tmp_path / "n.onnx", COUPLED), {"x": np.full((1, 4), np.nan, np.float32)})
    assert write_requests(bundle, tmp_path, "net") == 0
    expected = json.loads((tmp_path / "requests" / "expected.json").read_text("utf-8"))
    assert expected["left_out"] == ["one: 'x' has numbers that JSON does not know"]


def test_our_own_server_gives_the_golden_answers(text_bundle: Bundle, decoder_bundle: Bundle, tmp_path: Path) -> None:
    """The script that Triton is checked with, against a server of the same protocol that can be run here."""
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    for name, bundle in (("text", text_bundle), ("decoder", decoder_bundle)):
        write_requests(bundle, tmp_path / name, name, configuration_of(bundle).request_shape)
    with served({"text": text_bundle.folder, "decoder": decoder_bundle.folder}) as url:
        for name in ("text", "decoder"):
            done = run_tool([sys.executable, "check_server.py", url], tmp_path / name)
            assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- text format


def test_the_reader_reads_what_text_format_allows() -> None:
    text = """# a comment
    name: "a\\"b\\u00e9" ; max: -1, share: 2.5e-1
    list: [ 1, 2 ]  list: 3  empty: [ ]
    inner { kind: KIND_CPU } inner: { kind: true }
    many [ { x: 1 }, { } ]
    """
    assert text_proto.read(text) == {
        "name": ['a"bé'], "max": [-1], "share": [0.25], "list": [1, 2, 3], "empty": [],
        "inner": [{"kind": ["KIND_CPU"]}, {"kind": ["true"]}], "many": [{"x": [1]}, {}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb 2", 2),
        ("a { b: 1", 1),
        ("a: 1 }", 1),
        ("\n\na: [ 1 2 ]", 3),
        ('a: "x', 1),
        ("a: [ 1, ]", 1),
        (": 1", 1),
        ("a:", 1),
        ("a: §", 1),
        ("a: 1\n\n]", 3),
    ],
)
def test_the_reader_names_the_line_of_what_it_refuses(text: str, line: int) -> None:
    with pytest.raises(InputError, match=f"line {line} "):
        text_proto.read(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(-(2**63), 2**63 - 1))
def test_values_come_back(text: str, number: int) -> None:
    assert text_proto.read(f"a {{ b: {json.dumps(text)} c: {number} }}") == {"a": [{"b": [text], "c": [number]}]}


def test_tritons_own_schema_reads_it(text_bundle: Bundle, decoder_bundle: Bundle, tmp_path: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    from google.protobuf import text_format

    for number, bundle in enumerate((text_bundle, decoder_bundle)):
        written(bundle, tmp_path / str(number))
        (file,) = (tmp_path / str(number)).glob("model_repository/*/config.pbtxt")
        found = text_format.Parse(file.read_text("utf-8"), schema.ModelConfig())
        assert [field.name for field in found.input] == [spec.name for spec in bundle.signature.inputs]
        assert found.max_batch_size == (16, 0)[number]

# SPDX-License-Identifier: Apache-2.0
"""The application's own parts without Ray, the golden requests against them, and with Ray where it is installed."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from onnxpress.pipeline.handoff.base import NOT_RUN, PASSED, run_tool
from onnxpress.pipeline.handoff.ray_serve import PYTHON, TARGETS
from onnxpress.pipeline.handoff.ray_serve.open_inference import BadRequest, Call, Model
from onnxpress.runtime.opened import Bundle

from .v2_server import serving

RAY = TARGETS["ray-serve"]


@pytest.fixture(scope="module")
def folder(text_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ray")
    RAY.write(text_bundle, place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(folder / "model", threads=1)


def request_of(folder: Path, number: int = 0) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "requests" / f"{number}.json").read_text("utf-8"))
    return body


def read(model: Model, body: Any) -> Call:
    return model.read(json.dumps(body).encode())


def test_the_application_is_python_with_every_route_of_the_protocol(folder: Path) -> None:
    text = (folder / "application.py").read_text("utf-8")
    tree = ast.parse(text)
    routes = {
        call.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncFunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)
    }
    name = "/v2/models/{name}"
    plain = {"/v2", "/v2/health/live", "/v2/health/ready", name, f"{name}/ready", f"{name}/infer"}
    assert routes == plain | {r.replace(name, f"{name}/versions/{{version}}") for r in plain if r.startswith(name)}
    assert "MAX_BATCH, WAIT_SECONDS = 16, 0.002" in text
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("onnxpress" in (module or "") for module in imported)


def test_the_cluster_configuration_says_the_same_as_the_application(folder: Path) -> None:
    configuration = yaml.safe_load((folder / "serve_config.yaml").read_text("utf-8"))
    assert configuration["http_options"]["host"] == "127.0.0.1"
    (application,) = configuration["applications"]
    (server,) = application["deployments"]
    assert (application["import_path"], server["name"]) == ("application:app", "Server")
    text = (folder / "application.py").read_text("utf-8")
    for name in ("max_ongoing_requests", "max_queued_requests"):
        assert re.search(rf"\b{name}={server[name]}\b", text)
    assert f'"target_ongoing_requests": {server["autoscaling_config"]["target_ongoing_requests"]}' in text
    assert re.search(r"ray\[serve\]==\d", (folder / "requirements.txt").read_text("utf-8"))


@pytest.mark.parametrize(("shift", "code"), [(0.0, 0), (5.0, 1), (float("nan"), 1)])
def test_the_golden_requests_tell_a_right_server_from_a_wrong_one(
    folder: Path, text_bundle: Bundle, shift: float, code: int
) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["outputs"][0]["data"][0] += shift
        return answer

    with serving(folder / "model", change) as url:
        done = run_tool([sys.executable, "check_server.py", url], folder)
    assert done.returncode == code, done.stderr
    name, difference, tolerance, other = done.stdout.split()
    assert (name, float(tolerance)) == ("logits", pytest.approx(text_bundle.tolerance("logits")))
    assert (float(difference) <= float(tolerance)) == (code == 0)
    assert code or float(other) < 1e-6


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"id": "text 0"', '"id": "text 1"', "the answer is for"),
        ('"datatype": "FP32"', '"datatype": "FP64"', "in place of"),
        ('"name": "logits"', '"name": "scores"', "no output logits"),
    ],
)
def test_an_answer_to_another_question_is_none(folder: Path, old: str, new: str, said: str) -> None:
    with serving(folder / "model", lambda answer: json.loads(json.dumps(answer).replace(old, new))) as url:
        done = run_tool([sys.executable, "check_server.py", url], folder)
    assert done.returncode == 1
    assert said in done.stderr


def test_a_server_that_is_not_there_is_said(folder: Path) -> None:
    with serving(folder / "model") as url:
        unknown = run_tool([sys.executable, "check_server.py", url, "--model", "other"], folder)
        odd = run_tool([sys.executable, "check_server.py", url, "--header", "no colon"], folder)
    gone = run_tool([sys.executable, "check_server.py", url, "--wait", "0.1"], folder)
    assert [done.returncode for done in (unknown, odd, gone)] == [2, 2, 2]
    assert "not ready: 404" in unknown.stderr
    assert "no answer" in gone.stderr


def test_a_request_is_answered_as_the_model_answers(folder: Path, model: Model, text_bundle: Bundle) -> None:
    sample = text_bundle.golden[0]
    call = read(model, request_of(folder))
    for name, array in sample.inputs.items():
        np.testing.assert_array_equal(call.feeds[name], array)
        assert call.feeds[name].dtype == array.dtype
    outputs = model.run([call])[0]
    assert not isinstance(outputs, BadRequest)
    answer = model.answer(call, outputs)
    assert (answer["model_name"], answer["id"]) == (model.name, sample.name)
    expected = text_bundle.session().run(dict(sample.inputs))["logits"]
    np.testing.assert_allclose(answer["outputs"][0]["data"], expected.ravel(), atol=1e-6)
    assert answer["outputs"][0]["shape"] == list(expected.shape)


def test_requests_of_one_shape_run_together_and_each_gets_its_own(folder: Path, model: Model) -> None:
    """Of several shapes, several rows, and one that the model refuses: it takes nobody with it."""

    def call(ids: list[list[int]]) -> Call:
        rows = np.asarray(ids)
        ones = np.ones_like(rows)
        feeds = {"input_ids": rows, "attention_mask": ones, "token_type_ids": 0 * ones}
        return Call("", {s["name"]: feeds[s["name"]] for s in model.description["inputs"]}, ("logits",))

    calls = [call([[2, 5, 3]]), call([[2, 3]]), call([[2, 9, 3], [2, 7, 3]]), call([[2, 10**6, 3]])]
    runs: list[tuple[int, ...]] = []
    original = model._together
    model._together = lambda feeds: (runs.append(tuple(len(f["input_ids"]) for f in feeds)), original(feeds))[1]  # type: ignore[method-assign,func-returns-value]
    try:
        together = model.run(calls)
    finally:
        del model._together  # type: ignore[method-assign]
    assert runs[0] == (1, 2, 1)
    assert isinstance(together[3], BadRequest)
    for one, answer in zip(calls[:3], together[:3], strict=True):
        alone = model.run([one])[0]
        assert not isinstance(alone, BadRequest)
        assert not isinstance(answer, BadRequest)
        np.testing.assert_allclose(answer["logits"], alone["logits"], atol=1e-5)


def _bad_bodies() -> Iterator[tuple[str, Any]]:
    def tensor(**changes: Any) -> dict[str, Any]:
        return {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [2, 3], **changes}

    for body in ([], {}, {"inputs": {}}, {"inputs": [1]}, {"inputs": [{"name": ["a"]}]}):
        yield "input", body
    yield "no such input", {"inputs": [tensor(name="other")]}
    yield "twice", {"inputs": [tensor(), tensor()]}
    yield "missing", {"inputs": [tensor()]}
    yield "in place of INT64", {"inputs": [tensor(datatype="INT32")]}
    for shape in (None, "12", [1, 2.5], [1, -1], [1, 2**40]):
        yield "no shape", {"inputs": [tensor(shape=shape)]}
    yield "in place of", {"inputs": [tensor(shape=[2])]}
    for shape, data in (([1, 3], [2, 3]), ([1, 2], "23"), ([1, 2], [[2], [3, 4]]), ([1, 2], None)):
        yield "data", {"inputs": [tensor(shape=shape, data=data)]}
    for data in ([2.5, 3], [2, 10**30], [True, False], ["2", "3"], [None, 3]):
        yield "data", {"inputs": [tensor(data=data)]}


@pytest.mark.parametrize(("said", "body"), list(_bad_bodies()))
def test_a_request_that_is_none_is_refused_with_the_reason(model: Model, said: str, body: Any) -> None:
    with pytest.raises(BadRequest, match=said):
        read(model, body)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_is_refused(model: Model, raw: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        model.read(raw)


def test_outputs_are_chosen_and_batches_have_one_size(folder: Path, model: Model) -> None:
    body = request_of(folder)
    assert read(model, {**body, "outputs": [{"name": "logits"}]}).outputs == ("logits",)
    for outputs in ([{"name": "other"}], ["logits"], "logits"):
        with pytest.raises(BadRequest, match="output"):
            read(model, {**body, "outputs": outputs})
    first = body["inputs"][0]
    first["shape"], first["data"] = [2, first["shape"][1]], first["data"] * 2
    with pytest.raises(BadRequest, match="different sizes"):
        read(model, body)


def test_a_decoder_with_a_scalar_is_served_one_by_one(decoder_bundle: Bundle, tmp_path: Path) -> None:
    RAY.write(decoder_bundle, tmp_path)
    assert "MAX_BATCH, WAIT_SECONDS = 1, 0.0" in (tmp_path / "application.py").read_text("utf-8")
    with serving(tmp_path / "model") as url:
        done = run_tool([sys.executable, "check_server.py", url], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(decoder_bundle.signature.outputs)


def test_without_ray_it_is_compiled_and_not_run(
    text_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "absent"))
    check = RAY.check(text_bundle, folder, tmp_path)
    assert (check.status, check.done) == (NOT_RUN, ("generated", "compiled"))
    assert PYTHON in check.reason


@pytest.mark.skipif(
    not os.environ.get(PYTHON) and find_spec("ray") is None, reason=f"ray is not installed; {PYTHON} may name a Python"
)
def test_ray_serves_the_golden_requests(text_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    check = RAY.check(text_bundle, folder, tmp_path)
    assert (check.status, check.done) == (PASSED, ("generated", "compiled", "run")), check.reason

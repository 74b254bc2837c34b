# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol: every answer is held against open_inference.yaml."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from served import Client, serving, shifted_bundle, shifted_request, tensor, text_bundle

from onnxpress.runtime.serving.openapi import describe
from onnxpress.runtime.serving.settings import Settings
from onnxpress.runtime.serving.watch import Watch

CONTRACT = yaml.safe_load((Path(__file__).parent / "open_inference.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("v2")
    models = {"shifted": shifted_bundle(folder / "shifted", 0.5), "words": text_bundle(folder / "words")}
    with serving(models, Settings(reload_seconds=0, max_body_mb=1)) as client:
        yield client


def ask(client: Client, route: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """Ask, and hold the answer against the contract of its route."""
    status, answer, got = client(path, body, headers=headers)
    schema = CONTRACT["routes"][route][status]
    if isinstance(answer, bytes):
        length = int(got["inference-header-content-length"])
        answer, tail = json.loads(answer[:length]), answer[length:]
        jsonschema.validate(answer, {**CONTRACT, "$ref": f"#/definitions/{schema}"})
        return status, answer, tail
    jsonschema.validate(answer, {**CONTRACT, "$ref": f"#/definitions/{schema}"})
    return status, answer


def test_the_server_and_its_health(client: Client) -> None:
    _, server = ask(client, "GET /v2", "/v2")
    assert server["name"] == "onnxpress"
    assert "binary_tensor_data" in server["extensions"]
    assert ask(client, "GET /v2", "/v2/") == (200, server)
    assert ask(client, "GET /v2/health/live", "/v2/health/live")[1]["live"]
    assert ask(client, "GET /v2/health/ready", "/v2/health/ready") == (200, {"live": True, "ready": True})


def test_metadata_says_what_the_model_takes(client: Client) -> None:
    version = client.models["shifted"].version
    _, model = ask(client, "GET /v2/models/NAME", "/v2/models/shifted")
    assert model["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "bias", "datatype": "INT64", "shape": [-1]},
    ]
    assert model["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
    assert model["versions"] == [version]
    assert ask(client, "GET /v2/models/NAME/versions/VERSION", f"/v2/models/shifted/versions/{version}")[1] == model
    for path in ("/v2/models/shifted", f"/v2/models/shifted/versions/{version}"):
        route = "GET /v2/models/NAME/ready"
        assert ask(client, route, f"{path}/ready") == (200, {"name": "shifted", "ready": True})


@pytest.mark.parametrize("name", ["none", "shifte", "..", "%2e%2e", "..%2f..%2fetc", "shifted%00", "a" * 300])
def test_unknown_models_and_versions_are_not_found(client: Client, name: str) -> None:
    for path in (f"/v2/models/{name}", f"/v2/models/shifted/versions/{name}"):
        for end, body in (("", None), ("/ready", None), ("/infer", shifted_request())):
            status, answer, _ = client(path + end, body)
            assert status in (404, 405)  # a slash makes it another path
            jsonschema.validate(answer, CONTRACT["definitions"]["error"])


def infer(client: Client, body: Any, headers: Mapping[str, str] | None = None, model: str = "shifted") -> Any:
    return ask(client, "POST /v2/models/NAME/infer", f"/v2/models/{model}/infer", body, headers)


def test_inference(client: Client) -> None:
    status, answer = infer(client, shifted_request(2, id="42"))
    assert status == 200
    assert answer["id"] == "42"
    assert answer["model_name"] == "shifted"
    assert answer["model_version"] == client.models["shifted"].version
    expected = (np.arange(6) + 0.5).tolist()
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": expected}]
    path = f"/v2/models/shifted/versions/{answer['model_version']}/infer"
    assert ask(client, "POST /v2/models/NAME/versions/VERSION/infer", path, shifted_request(2, id="42"))[1] == answer


def test_the_long_way_to_inference_is_the_same(client: Client) -> None:
    """Where the application is mounted below a path, the request takes Starlette's way."""
    direct = client("/v2/models/shifted/infer", shifted_request())[1]
    client.app._infer, kept = None, client.app._infer
    try:
        from onnxpress.runtime.serving import application

        found, application.inferred = application.inferred, lambda path: None
        assert client("/v2/models/shifted/infer", shifted_request())[1] == direct
        assert client("/v2/models/none/infer", shifted_request())[0] == 404
    finally:
        application.inferred, client.app._infer = found, kept


def test_nested_data_and_chosen_outputs(client: Client) -> None:
    nested = {"inputs": [tensor("x", [[1.0, 2], [3, 4]], "FP32", data=[[1, 2], [3.0, 4]]), tensor("bias", [0, 1])]}
    status, answer = infer(client, {**nested, "outputs": [{"name": "y"}], "parameters": {"priority": 3}})
    assert (status, answer["outputs"][0]["data"]) == (200, [1.5, 2.5, 4.5, 5.5])


def test_binary_tensors(client: Client) -> None:
    x, bias = np.arange(6, dtype="<f4").reshape(2, 3), np.array([0, 10], "<i8")
    inputs = []
    for name, array, datatype in (("x", x, "FP32"), ("bias", bias, "INT64")):
        row = {"name": name, "shape": list(array.shape), "datatype": datatype}
        inputs.append({**row, "parameters": {"binary_data_size": array.nbytes}})
    head = json.dumps({"inputs": inputs, "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, answer, tail = infer(client, head + x.tobytes() + bias.tobytes(), headers)
    assert status == 200
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 24}
    np.testing.assert_array_equal(np.frombuffer(tail, "<f4").reshape(2, 3), x + bias[:, None] + np.float32(0.5))
    for body in (head + x.tobytes(), head + x.tobytes() + bias.tobytes() + b"1", head):
        assert infer(client, body, headers)[0] == 400
    for length in ("x", "-1", str(10**18), str(len(head) + 10**6)):
        assert infer(client, head, {"Inference-Header-Content-Length": length})[0] == 400
    status, _, tail = infer(client, {**shifted_request(), "parameters": {"binary_data_output": True}})
    assert np.frombuffer(tail, "<f4").tolist() == [0.5, 1.5, 2.5]


def bad(**changes: Any) -> dict[str, Any]:
    """A request whose x is changed."""
    request = shifted_request()
    request["inputs"][0].update(changes)
    return request


X = shifted_request()["inputs"][0]
BIAS = shifted_request()["inputs"][1]
BAD = {
    "no list": {"inputs": {}},
    "no inputs": {},
    "null": None,
    "a number": 3,
    "no objects": {"inputs": [1]},
    "id": {**shifted_request(), "id": 3},
    "parameters": {**shifted_request(), "parameters": []},
    "outputs": {**shifted_request(), "outputs": "y"},
    "unknown output": {**shifted_request(), "outputs": [{"name": "z"}]},
    "output twice": {**shifted_request(), "outputs": [{"name": "y"}, {"name": "y"}]},
    "missing": {"inputs": [X]},
    "unknown": {"inputs": [X, BIAS, {**X, "name": "z"}]},
    "twice": {"inputs": [X, X, BIAS]},
    "no name": bad(name=None),
    "datatype": bad(datatype="FP64"),
    "datatype is a list": bad(datatype=["FP32"]),
    "rank": bad(shape=[3]),
    "shape": bad(shape=[1, 4]),
    "negative": bad(shape=[-1, -3]),
    "shape of fractions": bad(shape=[1.0, 3]),
    "shape of booleans": bad(shape=[True, 3]),
    "huge": bad(shape=[2**62, 2**62]),
    "huge and empty": bad(shape=[0, 2**62], data=[]),
    "many axes": bad(shape=[1] * 1000),
    "empty": bad(shape=[0, 3], data=[]),
    "rows differ": bad(shape=[3, 1]),
    "no data": bad(data=None),
    "text": bad(data="abc"),
    "ragged": bad(data=[[1, 2], [3]]),
    "nested otherwise": bad(data=[[1], [2], [3]]),
    "nested too deeply": bad(data=[[[1, 2, 3]]]),
    "mixed": bad(data=[1, [2], 3]),
    "strings": bad(data=["a", "b", "c"]),
    "one long string": bad(data=["a" * 1000, 1, 2]),
    "booleans": bad(data=[True, 1, 2]),
    "nulls": bad(data=[None, 1, 2]),
    "too large for float32": bad(data=[1e300, 1, 2]),
    "binary without bytes": bad(parameters={"binary_data_size": 12}),
    "binary of a wrong size": bad(parameters={"binary_data_size": -1}),
    "parameters of a tensor": bad(parameters=3),
    "fractions": {"inputs": [X, {**BIAS, "data": [0.5]}]},
    "too large for int64": {"inputs": [X, {**BIAS, "data": [2**63]}]},
    "digits": {"inputs": [X, {**BIAS, "data": [10**400]}]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_so(client: Client, name: str) -> None:
    status, answer = infer(client, json.dumps(BAD[name]).encode())
    assert status in (400, 413), answer
    assert client("/v2/models/shifted/infer", shifted_request())[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"inputs": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        json.dumps(bad(data=[math.nan, 1, 2])).encode(),
        json.dumps(bad(data=[math.inf, 1, 2])).encode(),
        json.dumps(bad(data=[-1.5, 1, 2])).replace("-1.5", "-1e999").encode(),
        json.dumps(shifted_request()).encode() + b"}",
        json.dumps(shifted_request()).encode("utf-16"),
        b"1" * 50_000,
    ],
)
def test_what_is_no_json_is_refused(client: Client, body: bytes) -> None:
    status, answer = infer(client, body)
    assert status == 400
    assert len(answer["error"]) < 1000


def test_errors_name_the_tensor_and_what_is_wanted(client: Client) -> None:
    _, answer = infer(client, bad(datatype="FP64"))
    assert answer["error"] == "input 'x' has datatype 'FP64': the model wants FP32 [batch, width]"
    _, answer = infer(client, {"inputs": [{**X, "name": "xx"}]})
    assert answer["error"].startswith("the model has no input 'xx'.")


def test_values_that_the_model_refuses(client: Client) -> None:
    ids = np.array([[2, 500]])
    request = {"inputs": [tensor("input_ids", ids), tensor("attention_mask", np.ones_like(ids))]}
    status, answer = infer(client, request, model="words")
    assert status == 400
    assert "model failed" in answer["error"]


def test_nan_can_be_allowed(tmp_path: Path) -> None:
    bundle = shifted_bundle(tmp_path / "shifted")
    head = json.dumps({"inputs": [{**X, "data": None, "parameters": {"binary_data_size": 12}}, BIAS]}).encode()
    body = head + np.array([np.nan, 1, 2], "<f4").tobytes()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with serving({"m": bundle}) as client:
        status, answer, _ = client("/v2/models/m/infer", body, headers=headers)
        assert status == 400
        assert "NaN" in answer["error"]
    watch = Watch()
    with serving({"m": bundle}, Settings(reload_seconds=0, allow_not_finite=True), [watch]) as client:
        status, answer, _ = client("/v2/models/m/infer", body, headers=headers)
        assert status == 422
        assert "binary" in answer["error"]
        assert b'onnxpress_rows_not_finite_total{model="m"} 1.0' in watch.text()[0]
    watch.close()


def test_the_repository(client: Client) -> None:
    status, index, _ = client("/v2/repository/index")
    assert (status, [row["name"] for row in index]) == (200, ["shifted", "words"])
    assert all(row["state"] == "READY" and row["version"] for row in index)
    status, answer, _ = client("/v2/repository/models/shifted/load", b"")
    assert (status, answer["version"]) == (200, client.models["shifted"].version)
    assert client("/v2/repository/models/none/load", b"")[0] == 404


@pytest.mark.parametrize(
    ("body", "header", "told"),
    [
        ("mine", None, "mine"),
        ("mine", "the header's", "the header's"),
        ("mine", " ", "mine"),
        ("two\r\nlines", None, None),
        ("\u00fc", None, None),
        ("x" * 129, None, None),
    ],
)
def test_a_request_is_called_as_its_client_calls_it(
    client: Client, body: str, header: str | None, told: str | None
) -> None:
    headers = {} if header is None else {"X-Request-Id": header}
    status, answer, got = client("/v2/models/shifted/infer", shifted_request(id=body), headers=headers)
    assert (status, answer["id"]) == (200, body)
    assert got["x-request-id"] == told if told else got["x-request-id"] not in ("", body)


def test_every_route_is_described_and_what_is_described_is_answered(client: Client) -> None:
    status, document, _ = client("/openapi.json")
    assert status == 200
    jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"]["InferRequest"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert {"200", "default"} <= operation["responses"].keys()
            real = path.replace("{model}", "shifted").replace("{version}", client.models["shifted"].version)
            assert client(real, b"{}" if method == "post" else None, method=method.upper())[0] not in (404, 405, 500)
    assert describe.__doc__

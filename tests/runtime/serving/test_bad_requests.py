# SPDX-License-Identifier: Apache-2.0
"""Clients that send too much, too slowly, or no HTTP at all; and what a busy server says to those it cannot take."""

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from served import Blocked, Client, blocked, received, serving, shifted_bundle, shifted_request, text_bundle, until

from onnxpress.runtime.serving.events import Answer
from onnxpress.runtime.serving.settings import Settings

INFER = "/v2/models/shifted/infer"
GIB = 1 << 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shifted_bundle(tmp_path_factory.mktemp("bad") / "shifted")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[Client]:
    limits = {"max_body_mb": 1, "max_buffered_mb": 2, "header_seconds": 0.5, "body_seconds": 0.5}
    settings = Settings(reload_seconds=0, max_text_characters=1000, **limits)
    words = text_bundle(bundle.parent / "words")
    with pytest.MonkeyPatch.context() as patch, serving({"shifted": bundle, "words": words}, settings) as client:
        patch.setattr("onnxpress.runtime.serving.call._LINGER", 0.3)
        yield client


def head(path: str = INFER, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(client: Client) -> None:
    before = psutil.Process().memory_info().rss
    answer = client.raw(head(INFER, f"Content-Length: {GIB}") + b"x" * 1000)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1]) == {"error": "the body is larger than 1 MiB"}
    assert psutil.Process().memory_info().rss < before + 50 * 2**20


def test_a_client_that_goes_on_sending_still_reads_the_refusal(client: Client) -> None:
    status, answer, headers = client(INFER, b"[" + b" " * (3 << 20) + b"]")
    assert (status, headers["connection"]) == (413, "close")
    assert "larger" in answer["error"]


@pytest.mark.parametrize("end", [True, False])
def test_a_body_of_no_announced_length_is_refused_when_it_grows_too_large(client: Client, end: bool) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = client.raw(head(INFER, "Transfer-Encoding: chunked") + chunk * 20 + (b"0\r\n\r\n" if end else b""))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_read(client: Client) -> None:
    body = json.dumps(shifted_request()).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:10], body[10:]))
    sent = head(INFER, "Transfer-Encoding: chunked", "Connection: close") + chunks + b"0\r\n\r\n"
    assert client.raw(sent).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("length", ["-1", "x", "1" * 30, "0x10", ""])
def test_lengths_that_are_none(client: Client, length: str) -> None:
    answer = client.raw(head(INFER, f"Content-Length: {length}") + b"{}", wait=3)
    assert answer[9:12] in (b"400", b"413", b"408")


def test_bodies_of_all_together_are_bounded(client: Client) -> None:
    size = 900_000  # two fit into 2 MiB, a third does not
    connections = [socket.create_connection(("127.0.0.1", client.port), timeout=10) for _ in range(2)]
    try:
        for connection in connections:
            connection.sendall(head(INFER, f"Content-Length: {size}") + b" " * 100)
        until(lambda: client.app._guard._requests == 2)
        status, answer, headers = client(INFER, b" " * size)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "at once" in answer["error"]
    finally:
        for connection in connections:
            connection.close()
    until(lambda: client.app._guard._bytes == 0)
    assert client(INFER, shifted_request())[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v2 HT", b"POST /v2 HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_head_that_does_not_end_is_given_up(client: Client, sent: bytes) -> None:
    answer = client.raw(sent)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error": ' in answer


def test_a_client_that_sends_a_byte_now_and_then_is_given_up(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n")
        began = time.monotonic()
        try:
            while time.monotonic() < began + 10:
                connection.sendall(b"A")
                connection.settimeout(0.1)
                try:
                    if not (answer := connection.recv(100)):
                        break
                except TimeoutError:
                    continue
                assert answer.startswith(b"HTTP/1.1 408 ")
                break
            else:
                pytest.fail("the server waits for ever")
        except (ConnectionResetError, BrokenPipeError):
            pass


def test_a_body_that_does_not_come_is_given_up(client: Client) -> None:
    assert client.raw(head(INFER, "Content-Length: 100") + b"{").startswith(b"HTTP/1.1 408 ")
    until(lambda: client.app._guard._requests == 0)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,  # TLS
        b"hello\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"A" * 200_000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"A: b\r\n" * 40_000,
    ],
)
def test_what_is_no_http_is_refused(client: Client, sent: bytes) -> None:
    answer = client.raw(sent, wait=3)
    assert answer == b"" or answer[9:10] in (b"4", b"5"), answer[:100]
    assert client("/v2/health/live")[0] == 200


def test_a_million_tokens_are_not_read(client: Client) -> None:
    status, answer, _ = client("/models/words/predict", {"text": "good " * 150_000})
    assert status == 413
    assert "characters" in answer["error"]
    ids = [[2] * 200_000]
    tensor = {"name": "input_ids", "shape": [1, 200_000], "datatype": "INT64", "data": ids}
    request = {"inputs": [tensor, {**tensor, "name": "attention_mask"}]}
    client.models["words"].current.bundle.manifest["max_length"] = 512
    status, answer, _ = client("/v2/models/words/infer", request)
    assert status in (400, 413)


def test_unknown_paths_and_methods(client: Client) -> None:
    for path in ("/none", "/v2/../etc/passwd", "/v2/models/../../x", "//v2", "/models/words/predict/"):
        status, answer, _ = client(path)
        assert status == 404
        assert set(answer) == {"error"}
    status, answer, headers = client(INFER, method="DELETE")
    assert (status, answer) == (405, {"error": "Method Not Allowed"})
    assert headers["allow"] == "POST"


def test_the_api_key(bundle: Path) -> None:
    with serving({"shifted": bundle}, Settings(reload_seconds=0, api_key="s3cret")) as client:
        for headers in ({}, {"X-Api-Key": "s3cre"}, {"Authorization": "Basic s3cret"}, {"X-Api-Key": "\xe9"}):
            status, answer, got = client(INFER, shifted_request(), headers=headers)
            assert (status, got["www-authenticate"]) == (401, "Bearer")
            assert "error" in answer
        for headers in ({"X-Api-Key": "s3cret"}, {"Authorization": "Bearer s3cret"}):
            assert client(INFER, shifted_request(), headers=headers)[0] == 200
        assert client("/v2/health/live")[0] == client("/v2/health/ready")[0] == 200
        assert client("/v2/models/shifted")[0] == client("/v1/models")[0] == 401


class Answers:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.depths: list[int] = []

    def loaded(self, *_: object) -> None: ...
    def ran(self, *_: object) -> None: ...
    def queued(self, model: str, depth: int) -> None:
        self.depths.append(depth)

    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)


def test_a_busy_server_refuses_tells_lates_and_forgets_who_is_gone(bundle: Path) -> None:
    heard, model = Answers(), list[Blocked]()
    settings = Settings(reload_seconds=0, queue=2, workers=1)
    with (
        serving({"m": bundle}, settings, [heard], before=lambda app: model.append(blocked(app, "m"))) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        served, path = client.models["m"], "/v2/models/m/infer"
        first = pool.submit(client, path, shifted_request())
        assert model[0].running.wait(10)
        late = client(path, shifted_request(), headers={"X-Deadline-Ms": "20", "X-Request-Id": "late"})
        assert (late[0], late[2]["x-request-id"]) == (504, "late")
        body = json.dumps(shifted_request()).encode()
        gone = socket.create_connection(("127.0.0.1", client.port))
        gone.sendall(head(path, f"Content-Length: {len(body)}", "X-Request-Id: gone") + body)
        second = pool.submit(client, path, shifted_request(), headers={"X-Request-Id": "second"})
        until(lambda: served.depth == 2)
        status, answer, headers = client(path, shifted_request())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "full" in answer["error"]
        gone.close()
        until(lambda: served.depth == 1)
        for wrong in ("0", "-1", "x", "nan"):
            assert client(path, shifted_request(), headers={"X-Deadline-Ms": wrong})[0] == 400
        model[0].go.set()
        assert first.result()[0] == second.result()[0] == 200
        assert model[0].batches == [1, 1]
        until(lambda: len(heard.answers) == 9)
    by_id = {answer.request_id: answer for answer in heard.answers}
    assert by_id["gone"].status == 499
    assert (by_id["late"].status, by_id["late"].queued_ms, by_id["late"].bundle) == (504, None, served.bundle.sha256)
    told = by_id["second"]
    assert (told.status, told.model, told.route, told.rows) == (200, "m", "infer", 1)
    assert told.outputs["y"].tolist() == [[0, 1, 2]]
    assert told.inputs["x"].tolist() == [[0, 1, 2]]
    assert told.queued_ms is not None
    assert 0 <= told.queued_ms <= told.total_ms
    assert heard.depths[-1] == 0


def test_more_requests_than_may_be_in_flight(bundle: Path) -> None:
    with serving({"shifted": bundle}, Settings(reload_seconds=0, max_in_flight=1)) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as first:
            first.sendall(head(INFER, "Content-Length: 10"))
            until(lambda: client.app._guard._requests == 1)
            status, _, headers = client(INFER, shifted_request())
            assert (status, headers["retry-after"]) == (503, "1")
            assert client("/v2/health/live")[0] == 200
        until(lambda: client.app._guard._requests == 0)
        assert client(INFER, shifted_request())[0] == 200


def test_clients_that_are_killed_in_the_middle(bundle: Path) -> None:
    """A reset at any point of a request leaves nothing behind."""
    body = json.dumps(shifted_request(2)).encode()
    whole = head(INFER, f"Content-Length: {len(body)}") + body
    with serving({"shifted": bundle}) as client:

        def killed(cut: int) -> None:
            with socket.create_connection(("127.0.0.1", client.port)) as connection:
                connection.sendall(whole[:cut])
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        threads = [threading.Thread(target=killed, args=(cut,)) for cut in range(0, len(whole) + 1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client(INFER, shifted_request(2))[1]["outputs"][0]["data"] == list(range(6))
        until(lambda: client.app._guard._requests == client.app._guard._bytes == 0)
        assert client.models["shifted"].depth == 0


def test_requests_behind_each_other_on_one_connection(client: Client) -> None:
    body = json.dumps(shifted_request()).encode()
    one = head(INFER, f"Content-Length: {len(body)}") + body
    last = head(INFER, f"Content-Length: {len(body)}", "Connection: close") + body
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(one * 3 + last)
        assert received(connection).count(b"HTTP/1.1 200 ") == 4

# SPDX-License-Identifier: Apache-2.0
"""Starting, stopping and being killed; and the verb."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import blocked, serving, shifted_bundle, shifted_request, until

from onnxpress.contracts.errors import InputError, MissingDependency
from onnxpress.pipeline.cli import main
from onnxpress.runtime.serving.app import create_app
from onnxpress.runtime.serving.serve import serve
from onnxpress.runtime.serving.settings import Settings

PATH = "/v2/models/m/infer"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shifted_bundle(tmp_path / "m")


def test_stopping_answers_what_was_accepted_and_takes_no_more(bundle: Path) -> None:
    model: list[Any] = []
    answers: list[Any] = []
    with serving({"m": bundle}, before=lambda app: model.append(blocked(app, "m"))) as client:
        threads = [threading.Thread(target=lambda: answers.append(client(PATH, shifted_request()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: client.app._guard._requests == 3)
        assert client("/v2/health/ready")[0] == 200
        client.app.state.server.stopping = True  # what the signal does first
        assert client("/v2/health/ready")[0] == 503
        assert client("/v2/health/live")[0] == 200
        release = threading.Timer(0.2, model[0].go.set)
        release.start()
    for thread in threads:  # the server has ended by now
        thread.join(5)
    assert [status for status, _, _ in answers] == [200] * 3
    with pytest.raises(ConnectionRefusedError):
        client("/v2")


def test_a_server_that_cannot_finish_in_time_ends(bundle: Path) -> None:
    model: list[Any] = []
    settings = Settings(reload_seconds=0, drain_seconds=1)
    with serving({"m": bundle}, settings, before=lambda app: model.append(blocked(app, "m"))) as client:
        body = json.dumps(shifted_request()).encode()
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        connection.request("POST", PATH, body)
        assert model[0].running.wait(10)
        threading.Timer(1.5, model[0].go.set).start()  # the batch itself cannot be broken off
    connection.close()


def test_addresses_that_cannot_be_had(bundle: Path) -> None:
    app = create_app({"m": bundle})
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen on"):
        serve(app, port=taken.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen on"):
        serve(app, host="no such host")
    with pytest.raises(InputError, match="nothing to serve"):
        create_app({})


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"join": "always"},
        {"queue": 0},
        {"threads": 0},
        {"workers": 0},
        {"deadline_ms": -1.0},
        {"max_body_mb": 0.0},
        {"header_seconds": float("nan")},
        {"api_key": " "},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("settings", "threads", "workers"),
    [
        ({}, 1, 4),
        ({"threads": 2}, 2, 2),
        ({"threads": 8}, 8, 1),
        ({"workers": 3}, 1, 3),
        ({"provider": "cuda"}, None, 1),
    ],
)
def test_threads_and_workers(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], threads: int | None, workers: int
) -> None:
    monkeypatch.setattr("onnxpress.runtime.serving.settings.usable_cores", lambda: 4)
    found = Settings(**settings)
    assert (found.session_threads, found.batch_workers) == (threads, workers)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    app = create_app({"m": bundle})
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingDependency) as missing:
        serve(app, port=0)
    assert missing.value.next_step == 'pip install "onnxpress[serve]"'
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingDependency, match="fastapi"):
        create_app({"m": bundle})


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), capsys.readouterr().err


Harm = Callable[[Path], list[str]]


def _changed(bundle: Path) -> list[str]:
    (bundle / "config.json").write_text("{}")
    return ["serve", str(bundle)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (_changed, "config.json"),
        (lambda bundle: ["serve", str(bundle / "none")], "no bundle folder"),
        (lambda bundle: ["serve", str(bundle), f"m={bundle}"], "two bundles are named 'm'"),
        (lambda bundle: ["serve", f"a/b={bundle}"], "cannot be a model's name"),
        (lambda bundle: ["serve", str(bundle), "x", "--name", "y"], "--name is for one bundle"),
        (lambda bundle: ["serve", str(bundle), "--api-key-file", str(bundle / "none")], "cannot be read"),
        (lambda bundle: ["serve", str(bundle), "--shadow", f"x={bundle}"], "which is not served"),
        (lambda bundle: ["serve", str(bundle), "--audit", str(bundle)], "cannot be opened"),
        (lambda bundle: ["serve", str(bundle), "--join", "sometimes"], "one of exact, tolerance, never"),
        (lambda bundle: ["serve", str(bundle), "--provider", "abacus"], "abacus"),
    ],
)
def test_what_the_verb_refuses(
    bundle: Path, words: Harm, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    code, told = run([*words(bundle), "--port", "0"], capsys)
    assert (code, message in told) == (2, True), told
    assert len(told.splitlines()) == 1


def started(bundle: Path, port: int) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    words = [
        sys.executable,
        "-P",
        "-m",
        "onnxpress.pipeline.cli",
        "serve",
        f"m={bundle}",
        "--port",
        str(port),
        "--json",
    ]
    environment = {**os.environ, "ONNXPRESS_API_KEY": "k"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def version_at(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/v2/models/m", headers={"X-Api-Key": "k"})
        return str(json.loads(connection.getresponse().read())["versions"][0])
    finally:
        connection.close()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals are POSIX's")
def test_a_killed_server_starts_again_and_signals_reload_and_end_it(bundle: Path) -> None:
    first, told = started(bundle, 0)
    try:
        assert told["join"] == {"m": "requests share a run"}
        port = int(told["address"].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", PATH, json.dumps(shifted_request()), {"X-Api-Key": "k"})
        assert connection.getresponse().status == 200
        first.kill()
    finally:
        first.kill()
        first.communicate()
        connection.close()
    second, again = started(bundle, port)
    try:
        assert again == told
        shutil.rmtree(bundle)
        shifted_bundle(bundle, 1.0)
        second.send_signal(signal.SIGHUP)
        until(lambda: version_at(port) != told["models"]["m"])
        second.send_signal(signal.SIGTERM)
        out, err = second.communicate(timeout=20)
    finally:
        second.kill()
    assert (second.returncode, out) == (0, ""), err
    assert "Traceback" not in err

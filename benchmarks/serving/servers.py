# SPDX-License-Identifier: Apache-2.0
"""How each server is started, asked and read; each as its own documentation recommends for this kind of model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from .environments import python_of
from .workload import COMMAND, Feeds, v2_body, v2_logits

PEERS = Path(__file__).parent / "peers"
MODEL_NAME = "sentiment"


@dataclass(frozen=True)
class Way:
    """How a server is to run.

    Attributes:
        bundle: The bundle's folder.
        model: Its `.onnx`.
        max_batch: Most rows in a batch.
        wait_ms: How long a batch that is not full waits.
        environments: Where the peers' environments are.
        workers: Batches at the same time; each is a process of its own with LitServe and BentoML. onnxpress finds its
            own number.
        threads: Threads of each; the same.
    """

    bundle: Path
    model: Path
    max_batch: int
    wait_ms: float
    environments: Path
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: In the table.
        command: Words that start it on a port; the folder is a scratch one.
        path: Where rows are posted to.
        ready: What answers with 200 once it can.
        body: A row and an id as the body.
        logits: The answer's logits.
    """

    name: str
    command: Callable[[Way, int, Path], list[str]]
    path: str
    ready: str
    body: Callable[[Feeds, str], bytes] = v2_body
    logits: Callable[[Any], Any] = v2_logits


def _ours(way: Way, port: int, folder: Path) -> list[str]:
    batch = ["--max-batch", str(way.max_batch), "--max-wait-ms", f"{way.wait_ms:g}"]
    return [str(COMMAND), "serve", f"{MODEL_NAME}={way.bundle}", "--port", str(port), *batch]


def _mlserver(way: Way, port: int, folder: Path) -> list[str]:
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "parallel_workers": 0}
    settings |= {"metrics_port": free_port(), "debug": False}
    model = {"name": MODEL_NAME, "implementation": "mlserver_onnx.OnnxRuntime"}
    model |= {"max_batch_size": way.max_batch, "max_batch_time": way.wait_ms / 1e3}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(python_of("mlserver", way.environments).with_name("mlserver")), "start", str(folder)]


def _litserve(way: Way, port: int, folder: Path) -> list[str]:
    return [str(python_of("litserve", way.environments)), str(PEERS / "litserve_onnx.py"), str(port)]


def _bentoml(way: Way, port: int, folder: Path) -> list[str]:
    program = str(python_of("bentoml", way.environments).with_name("bentoml"))
    where = ["--host", "127.0.0.1", "--port", str(port), "--working-dir", str(PEERS)]
    return [program, "serve", "bentoml_onnx:OnnxRuntime", *where]


def _rows(feeds: Feeds, request_id: str) -> bytes:
    row = np.stack([feeds[name] for name in ("input_ids", "attention_mask", "token_type_ids")], axis=1)
    return json.dumps({"rows": row.tolist()}, separators=(",", ":")).encode()


_INFER = f"/v2/models/{MODEL_NAME}/infer"
_READY = f"/v2/models/{MODEL_NAME}/ready"
CONTENDERS = (
    Contender("onnxpress", _ours, _INFER, _READY),
    Contender("MLServer", _mlserver, _INFER, _READY),
    Contender("LitServe", _litserve, "/predict", "/health", logits=lambda answer: answer["logits"]),
    Contender("BentoML", _bentoml, "/infer", "/readyz", _rows, lambda answer: answer[0]),
)


@dataclass
class Running:
    """A server that runs: its port and its first process."""

    port: int
    process: psutil.Process

    def family(self) -> list[psutil.Process]:
        """It and its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def cpu_seconds(self) -> float:
        """Processor time that all of its processes have taken."""
        total = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def rss_mib(self) -> float:
        """Resident memory of all of its processes; what they share is counted once each."""
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20


@contextlib.contextmanager
def running(
    contender: Contender, way: Way, *, port: int | None = None, log: Path | None = None, more: tuple[str, ...] = ()
) -> Iterator[Running]:
    """Start a server, wait until it answers, and end all of its processes at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        port = port or free_port()
        words = [*contender.command(way, port, folder), *more]
        with (log or folder / "log").open("ab") as output:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env=_environment(way),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Running(port, psutil.Process(process.pid))
        try:
            _wait(process, f"http://127.0.0.1:{port}{contender.ready}", log or folder / "log")
            yield server
        finally:
            family = server.family()  # LitServe leaves workers behind when only its first process ends
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            _, left = psutil.wait_procs(family, timeout=15)
            for child in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(way: Way) -> Mapping[str, str]:
    """Without OMP_NUM_THREADS, which some would take for their own number of threads."""
    settings = {
        "MODEL": str(way.model.resolve()),
        "THREADS": str(way.threads),
        "WORKERS": str(way.workers),
        "MAX_BATCH": str(way.max_batch),
        "WAIT_MS": str(way.wait_ms),
        "PYTHONPATH": str(PEERS),
        "BENTOML_DO_NOT_TRACK": "True",
        "NO_COLOR": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, **settings}


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), opener.open(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"it did not start: {log.read_text('utf-8', 'replace')[-2000:]}")

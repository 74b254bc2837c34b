# SPDX-License-Identifier: Apache-2.0
"""Tiny bundles and a real server on a free port, for the tests of serving."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from safetensors.numpy import save_file

from onnxpress.runtime import hash_file, write_sums
from onnxpress.runtime.serving.app import create_app
from onnxpress.runtime.serving.serve import make_server
from onnxpress.runtime.serving.settings import Settings

SHIFTED = """
<ir_version: 8, opset_import: ["": 18]>
shifted (float[batch, width] x, int64[batch] bias) => (float[batch, width] y)
<float shift = {%s}>
{
    one = Constant<value_ints = [1]>()
    column = Unsqueeze(bias, one)
    number = Cast<to = 1>(column)
    sum = Add(x, number)
    y = Add(sum, shift)
}
"""

QUANTIZED = """
<ir_version: 8, opset_import: ["": 18]>
quantized (float[batch, 4] x) => (float[batch, 3] y)
<int8[4, 3] weight = {1, -2, 3, 4, 5, -6, 7, 8, 9, -10, 11, 12}>
{
    levels, scale, zero = DynamicQuantizeLinear(x)
    sum = MatMulInteger(levels, weight, zero)
    number = Cast<to = 1>(sum)
    y = Mul(number, scale)
}
"""

TEXT = """
<ir_version: 8, opset_import: ["": 18]>
text (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask) => (%s)
<float[9, 2] table = {0, 0, 0, 0, 2, -2, -2, 2, 1, 0, 0, 1, 3, 0, 0, 3, 1, 1}>
{
    rows = Gather(table, input_ids)
    two = Constant<value_ints = [2]>()
    mask = Unsqueeze(attention_mask, two)
    weights = Cast<to = 1>(mask)
    %s
}
"""

CLASSIFIER = TEXT % (
    "float[batch, 2] logits",
    "counted = Mul(rows, weights) one = Constant<value_ints = [1]>() logits = ReduceSum<keepdims = 0>(counted, one)",
)
TAGGER = TEXT % ("float[batch, sequence, 2] logits", "logits = Mul(rows, weights)")

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "plot", "great", "awful", "[MASK]"]
"""Token ids 0 to 8; the table above says what each is worth."""


def shifted_bundle(folder: Path, shift: float = 0.0, **changes: Any) -> Path:
    """y = x + bias + shift, rows by themselves."""
    rng = np.random.default_rng(0)
    inputs = [
        {"x": rng.normal(size=(rows, width)).astype(np.float32), "bias": np.arange(rows, dtype=np.int64)}
        for rows, width in ((1, 3), (2, 4))
    ]
    outputs = [{"y": feeds["x"] + feeds["bias"][:, None].astype(np.float32) + np.float32(shift)} for feeds in inputs]
    return _bundle(folder, SHIFTED % shift, "generic", inputs, outputs, **changes)


def quantized_bundle(folder: Path) -> Path:
    """Dynamic int8, whose scale is that of the largest value in the run; of a tolerance that this keeps within."""
    rng = np.random.default_rng(0)
    inputs = [{"x": rng.normal(size=(1, 4)).astype(np.float32)} for _ in range(3)]
    weight = np.array([1, -2, 3, 4, 5, -6, 7, 8, 9, -10, 11, 12], np.float32).reshape(4, 3)
    return _bundle(folder, QUANTIZED, "generic", inputs, [{"y": f["x"] @ weight} for f in inputs], tolerance=1.0)


def text_bundle(folder: Path, task: str = "text-classification", graph: str = CLASSIFIER, **changes: Any) -> Path:
    """Words in, the sum of what they are worth out."""
    inputs = [
        {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        for ids in ([2, 4], [3, 5, 4, 2, 2, 6, 7])
    ]
    table = np.array([[0, 0], [0, 0], [2, -2], [-2, 2], [1, 0], [0, 1], [3, 0], [0, 3], [1, 1]], np.float32)
    rows = [table[feeds["input_ids"]] for feeds in inputs]
    outputs = [{"logits": row if graph is TAGGER else row.sum(1)} for row in rows]
    config = {"id2label": {"0": "positive", "1": "negative"}}
    tokenizer = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    files = {"config.json": config, "tokenizer_config.json": tokenizer}
    return _bundle(folder, graph, task, inputs, outputs, files=files, words=True, **changes)


def _bundle(
    folder: Path,
    graph: str,
    task: str,
    inputs: list[dict[str, np.ndarray]],
    outputs: list[dict[str, np.ndarray]],
    *,
    files: Mapping[str, Any] | None = None,
    words: bool = False,
    tolerance: float = 1e-5,
    **changes: Any,
) -> Path:
    from onnxpress.runtime.session import Session

    for name in ("onnx", "golden"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    model = onnx.parser.parse_model(graph).SerializeToString()
    (folder / "onnx" / "model.onnx").write_bytes(model)
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    if words:
        _tokenizer(folder / "tokenizer.json")
    allowed = {name: {"max_abs": tolerance} for name in outputs[0]}
    index = {"samples": [{"text": None}] * len(inputs), "tolerance": {"fp32": allowed}}
    (folder / "golden" / "golden.json").write_text(json.dumps(index))
    for name, rows in (("inputs", inputs), ("outputs", outputs)):
        arrays = {f"{i}/{key}": array for i, row in enumerate(rows) for key, array in row.items()}
        save_file(arrays, folder / "golden" / f"{name}.safetensors")
    listed = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    listed = [name for name in listed if name not in ("manifest.json", "SHA256SUMS")]
    manifest = {
        "schema_version": 1,
        "name": folder.name,
        "task": task,
        "variants": {"fp32": {"path": "onnx/model.onnx"}},
        "signature": Session(model).signature.to_json(),
        "files": {n: {"sha256": hash_file(folder / n), "size": (folder / n).stat().st_size} for n in listed},
        "golden": {"index": "golden/golden.json"},
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_sums(folder)
    return folder


def _tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(file))


class Client:
    """Asks a server that runs in a thread.

    Attributes:
        app: The application.
        port: Where it listens.
        models: Its models.
    """

    def __init__(self, app: Any, port: int) -> None:
        self.app, self.port = app, port
        self.models = app.state.server.models

    def __call__(
        self, path: str, body: Any = None, *, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or bytes) and headers (lower case) of an answer. A body that is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, dict(headers or {}))
            answer = connection.getresponse()
            content = answer.read()
            got = {key.lower(): value for key, value in answer.getheaders()}
        finally:
            connection.close()
        is_json = got.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json and content else content, got

    def raw(self, data: bytes, *, wait: float = 10.0) -> bytes:
        """Send bytes as they are, and read until the server closes or `wait` is over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            return received(connection)


def received(connection: socket.socket) -> bytes:
    """What comes until the other side closes, or nothing more comes."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(parts)


@contextmanager
def serving(
    models: Mapping[str, Path],
    settings: Settings | None = None,
    observers: Any = (),
    *,
    before: Callable[[Any], None] | None = None,
) -> Iterator[Client]:
    """A server in a thread; `before` may change the application before it starts."""
    app = create_app(models, settings or Settings(reload_seconds=0), observers)
    if before is not None:
        before(app)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Client(app, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"


def until(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


def tensor(name: str, array: Any, datatype: str | None = None, **changes: Any) -> dict[str, Any]:
    """An input tensor of the protocol."""
    array = np.asarray(array)
    kinds = {"float32": "FP32", "int64": "INT64", "float64": "FP64", "int32": "INT32"}
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": datatype or kinds[array.dtype.name],
        "data": array.ravel().tolist(),
        **changes,
    }


def shifted_request(rows: int = 1, width: int = 3, **changes: Any) -> dict[str, Any]:
    """A request to `shifted_bundle`, whose x counts from 0."""
    x = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    return {"inputs": [tensor("x", x), tensor("bias", np.zeros(rows, np.int64))], **changes}


class Blocked:
    """A session that waits until it is let go, and counts what it ran.

    Attributes:
        batches: Rows of every run.
        running: Set while it waits.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self.signature = session.signature
        self.batches: list[int] = []
        self.running, self.go = threading.Event(), threading.Event()

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Any = None) -> Any:
        self.batches.append(len(next(iter(feeds.values()))))
        self.running.set()
        assert self.go.wait(20)
        return self._session.run(feeds, outputs)


def blocked(app: Any, name: str) -> Blocked:
    """Put a `Blocked` in front of a model that has not started."""
    model = app.state.server.models[name]
    model.current.session = Blocked(model.current.session)
    return model.current.session  # type: ignore[no-any-return]

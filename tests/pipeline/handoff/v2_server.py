# SPDX-License-Identifier: Apache-2.0
"""A small server of the Open Inference Protocol, out of parts of the Ray handoff: it proves the check script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from onnxpress.pipeline.handoff.ray_serve.open_inference import BadRequest, Model

Change = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def serving(folder: Path, change: Change = lambda answer: answer) -> Iterator[str]:
    """Serve a folder with model.onnx and model.json; `change` falsifies each answer."""
    model = Model(folder, threads=1)
    path = f"/v2/models/{model.name}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = {f"{path}/ready": {"ready": True}, path: model.metadata()}
            self.answer(200 if self.path in answers else 404, answers.get(self.path, {"error": "unknown"}))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                call = model.read(body)
                outputs = model.run([call])[0]
                if isinstance(outputs, BadRequest):
                    raise outputs
                self.answer(200, change(model.answer(call, outputs)))
            except BadRequest as error:
                self.answer(400, {"error": str(error)})

        def answer(self, status: int, data: Any) -> None:
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

# SPDX-License-Identifier: Apache-2.0
"""Requests that nobody would send, made by schemathesis from the server's own OpenAPI description.

    .venv/bin/python -m benchmarks.serving.fuzz [--quick] [--examples 200] [--seed 1] [--bundle DIR ...]

All of schemathesis' checks (no 5xx; statuses, content types and bodies as described; unsupported methods refused) but
one: that whatever fits the schema is accepted, since no schema says which token ids a model knows. Once with any name
of a model, once with the name of the one that is served. Then golden requests with one to three places changed, and
raw bytes that no HTTP library would send. Ends with exit code 1 where something was found, or where the server died or
grew by more than 200 MiB.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from onnxpress.runtime.opened import Bundle

from .environments import python_of
from .mutations import send_mutated
from .servers import CONTENDERS, MODEL_NAME, Contender, Running, Way, running
from .workload import ARTIFACTS, COMMAND, bundle_of, v2_body

RAW = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "no end of the head": b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000,
    "two lengths": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "length and chunks": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\n\r\n",
    "negative length": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a gigabyte announced": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n{",
    "broken chunk": b"POST {infer} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "invalid UTF-8": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n\xff\xfe{}",
    "path tricks": b"GET /v2/models/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a nul in the path": b"GET /v2/models/%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "deep JSON": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"[" * 100_000,
    "length of a header beyond the body": b"POST {infer} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
    b"Inference-Header-Content-Length: 99999\r\n\r\n{}",
}


def main() -> int:
    options = arguments()
    folders = options.bundle or [bundle_of("fp32").folder]
    way = Way(folders[0], folders[0], 16, 0, options.environments)
    with running(_serving(folders), way) as server:
        before = server.rss_mib()
        found = sum(_schemathesis(server, options, model) for model in (None, MODEL_NAME))
        found += _mutations(server, Bundle(folders[0], check=False), options)
        found += _raw(server)
        alive = server.process.is_running() and b"200" in _exchange(server.port, _LIVE)[:20]
        grown = server.rss_mib() - before
    print(f"{found} findings; the server {'lives' if alive else 'DIED'} and grew by {grown:.0f} MiB")
    return int(bool(found) or not alive or grown > 200)


_LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 examples of each operation: shows that it runs")
    parser.add_argument("--examples", type=int, default=200, help="of each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bundle", type=Path, nargs="+", help="what is served; the first one as 'sentiment'")
    parser.add_argument("--environments", type=Path, default=ARTIFACTS / "environments")
    options = parser.parse_args()
    if options.quick:
        options.examples = 20
    return options


def _serving(folders: list[Path]) -> Contender:
    names = [MODEL_NAME, *(f"model{i}" for i in range(1, len(folders)))]
    models = [f"{name}={folder}" for name, folder in zip(names, folders, strict=True)]

    def command(way: Way, port: int, folder: Path) -> list[str]:
        return [str(COMMAND), "serve", *models, "--port", str(port)]

    return Contender("onnxpress", command, CONTENDERS[0].path, CONTENDERS[0].ready)


def _schemathesis(server: Running, options: argparse.Namespace, model: str | None) -> int:
    """Run it, showing what it says; 1 where it found something. `model` fills the place in the paths."""
    program = python_of("schemathesis", options.environments).with_name("schemathesis")
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    words = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--no-color"]
    words += ["--max-examples", str(options.examples), "--seed", str(options.seed)]
    with tempfile.TemporaryDirectory() as scratch:
        filled = f'[parameters]\n"path.model" = "{model}"\n' if model else ""
        (Path(scratch) / "schemathesis.toml").write_text(filled, "utf-8")
        done = subprocess.run([str(program), "run", url, *words], cwd=scratch)
    return int(done.returncode != 0)


def _mutations(server: Running, bundle: Bundle, options: argparse.Namespace) -> int:
    """Nearly right requests; none may be answered by a 5xx or by nothing."""
    found = []
    text = next((sample.text for sample in bundle.golden if sample.text), "a text")
    bodies = {CONTENDERS[0].path: json.loads(v2_body(bundle.golden[0].inputs, "1"))}
    bodies[f"/models/{MODEL_NAME}/predict"] = {"text": [text, "another"]}
    for path, body in bodies.items():
        statuses, worse = send_mutated(server.port, path, body, count=20 * options.examples, seed=options.seed)
        print(f"{path}: {dict(sorted(statuses.items()))}", file=sys.stderr)
        found += worse
    print("\n".join(found[:10]), file=sys.stderr)
    return len(found)


def _raw(server: Running) -> int:
    """Send what is no proper request; each has to be answered by a 4xx, or by closing the connection."""
    found = 0
    for name, raw in RAW.items():
        answer = _exchange(server.port, raw.replace(b"{infer}", CONTENDERS[0].path.encode()))
        good = not answer or (answer[:9] == b"HTTP/1.1 " and answer[9:10] == b"4")
        first = answer.partition(b"\r\n")[0].decode("latin1")
        print(f"{name}: {first or 'closed'}", file=sys.stderr)
        found += not good
    return found


def _exchange(port: int, raw: bytes, seconds: float = 15) -> bytes:
    """What is answered within a while, at most 64 KiB."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(raw)
            while len(answer) < 2**16 and (part := connection.recv(2**16)):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except OSError:
            pass
    return answer


if __name__ == "__main__":
    sys.exit(main())

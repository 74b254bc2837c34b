# SPDX-License-Identifier: Apache-2.0
"""Sends the golden requests to a server of the Open Inference Protocol (v2, REST) and compares its answers.

    python3 check_server.py http://127.0.0.1:8000 [--model NAME] [--header "Host: model.example"] [--wait SECONDS]

Any Python from 3.8 on, nothing to install. First one after the other, then many at once, so that a server that joins
requests is held to the same answers. Prints a line an output: NAME DIFFERENCE TOLERANCE DIFFERENCE-FROM-PYTHON, where
both are the largest absolute ones. Exit code 0: all within their tolerance; 1: not; 2: no such server or model.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

REQUESTS = Path(__file__).parent / "requests"
CLIENTS, ROUNDS = 8, 4


class Server:
    def __init__(self, url: str, headers: dict[str, str], seconds: float = 60) -> None:
        self.parts, self.headers, self.seconds = urlsplit(url), headers, seconds
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname:
            raise ValueError("not an http URL: " + url)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """The status and what was answered: JSON, or text where it is none."""
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self.parts.hostname), self.parts.port, timeout=self.seconds)
        headers = {"Content-Type": "application/json", **self.headers} if body else self.headers
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, body or None, headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text


def main() -> int:
    options = arguments()
    expected = json.loads((REQUESTS / "expected.json").read_text("utf-8"))
    model = options.model or expected["model"]
    path = "/v2/models/" + quote(model, safe="")
    try:
        server = Server(options.url, dict(split_header(line) for line in options.header))
        wait_until_ready(server, path, options.wait)
        shapeless = check_metadata(server, path, expected)
        worst = {tensor["name"]: [0.0, 0.0] for tensor in expected["outputs"]}
        samples = expected["samples"]
        for sample in samples:
            compare(sample, infer(server, path, sample, shapeless), expected, worst)
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = pool.map(lambda sample: infer(server, path, sample, shapeless), samples * ROUNDS)
            for sample, answer in zip(samples * ROUNDS, answers):  # noqa: B905 - Python 3.8 has no strict
                compare(sample, answer, expected, worst)
    except (OSError, http.client.HTTPException) as error:
        return told("no answer: " + str(error), 2)
    except ValueError as error:
        return told(str(error), 2)
    except Wrong as error:
        return told(str(error), 1)
    within = bool(samples)
    for tensor in expected["outputs"]:
        difference, other = worst[tensor["name"]]
        within = within and difference <= tensor["tolerance"]
        sys.stdout.write("{} {:.9g} {:.9g} {:.9g}\n".format(tensor["name"], difference, tensor["tolerance"], other))
    return 0 if within else told("an answer is further from the golden one than its tolerance", 1)


class Wrong(Exception):
    """An answer that is no answer to the request."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", help="the server's name of the model, where it is another one")
    parser.add_argument("--header", action="append", default=[], help="to send with each request; may be repeated")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for the model to be ready")
    return parser.parse_args()


def split_header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon:
        raise ValueError("not a header: " + line)
    return name.strip(), value.strip()


def wait_until_ready(server: Server, path: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            status, text = server.ask("GET", path + "/ready")
            if status == 200:
                return
            problem = f"the model is not ready: {status} {text}"
        except (OSError, http.client.HTTPException) as error:
            problem = "no answer: " + str(error)
        if time.monotonic() >= end:
            raise ValueError(problem)
        time.sleep(0.2)


def check_metadata(server: Server, path: str, expected: dict[str, Any]) -> list[str]:
    """Compare names and types; return the inputs that have no dimensions here, which Triton's have as [1]."""
    status, metadata = server.ask("GET", path)
    if status != 200:
        raise ValueError(f"no metadata: {status} {metadata}")
    for side in ("inputs", "outputs"):
        wanted = {tensor["name"]: tensor["datatype"] for tensor in expected[side]}
        found = {tensor["name"]: tensor["datatype"] for tensor in metadata[side]}
        if wanted != found:
            raise Wrong(f"the model's {side} are {found} in place of {wanted}")
    return [tensor["name"] for tensor in metadata["inputs"] if tensor["shape"] == []]


def infer(server: Server, path: str, sample: dict[str, Any], shapeless: list[str]) -> Any:
    body = (REQUESTS / sample["request"]).read_bytes()
    if shapeless:
        data = json.loads(body)
        for tensor in data["inputs"]:
            if tensor["name"] in shapeless:
                tensor["shape"] = []
        body = json.dumps(data).encode()
    status, answer = server.ask("POST", path + "/infer", body)
    if status != 200:
        raise Wrong("{}: {} {}".format(sample["name"], status, answer))
    return answer


def compare(sample: dict[str, Any], answer: Any, expected: dict[str, Any], worst: dict[str, list[float]]) -> None:
    """Widen `worst` by one answer: the differences from the original and from what Python answered."""
    if answer.get("id", sample["name"]) != sample["name"]:
        raise Wrong("{}: the answer is for {}".format(sample["name"], answer["id"]))
    found = {tensor["name"]: tensor for tensor in answer["outputs"]}
    for tensor in expected["outputs"]:
        name, wanted = tensor["name"], sample["outputs"].get(tensor["name"])
        if wanted is None:
            continue
        if name not in found:
            raise Wrong("{}: there is no output {}".format(sample["name"], name))
        if found[name]["shape"] != wanted["shape"] or found[name]["datatype"] != tensor["datatype"]:
            got = "{} {}".format(found[name]["datatype"], found[name]["shape"])
            raise Wrong("{}: {} is {} in place of {}".format(sample["name"], name, got, wanted["shape"]))
        values = flat(found[name]["data"])
        if len(values) != len(wanted["reference"]):
            raise Wrong("{}: {} has {} values".format(sample["name"], name, len(values)))
        for place, other in enumerate(("reference", "python")):
            worst[name][place] = max(worst[name][place], furthest(values, wanted[other]))


def furthest(values: list[float], others: list[float]) -> float:
    differences = [abs(value - other) for value, other in zip(values, others)]  # noqa: B905 - of one length
    return max(differences, default=0.0) if all(d == d for d in differences) else float("inf")


def flat(data: Any) -> list[float]:
    """The values of a nested or flat list, in C order; the protocol allows both."""
    if not isinstance(data, list):
        return [float(data)]
    return [value for part in data for value in flat(part)]


def told(line: str, code: int) -> int:
    sys.stderr.write(line + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

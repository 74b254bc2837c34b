# SPDX-License-Identifier: Apache-2.0
"""Requests that are nearly right: one place of a valid body changed, which a generator from a schema seldom hits."""

from __future__ import annotations

import copy
import http.client
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "0", "INT64", "FP32", "BOOL", "BYTES", "a" * 10_000, "\x00", "\ud800", "../../etc/passwd", "💥",
    [], [[]], [0], [1, 2, 3], [[1], [2, 3]], {}, {"": None}, {"binary_data": True}, {"binary_data_size": 2**40},
)  # fmt: skip
"""What is put in the place of a value."""


def mutated(body: Any, rng: random.Random) -> Any:
    """A copy with one value replaced, removed, repeated or nested."""
    data = copy.deepcopy(body)
    parent, key = rng.choice(list(_places(data)))
    kind = rng.randrange(4)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [parent[key]] * rng.choice((1, 2, 100))
    elif kind == 2:
        parent[key] = {"x": parent[key]}
    else:
        parent[key] = rng.choice(ODD)
    return data


def send_mutated(port: int, path: str, body: Any, *, count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Send `count` of them; return the statuses, and the bodies that were answered with 5xx or not at all."""
    rng, statuses, found = random.Random(seed), Counter[int](), []
    for _ in range(count):
        data = body
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = mutated(data, rng) if isinstance(data, dict | list) and data else data
        raw = json.dumps(data).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            raw = raw[: rng.randrange(len(raw) + 1)]
        more = {"Inference-Header-Content-Length": str(rng.randrange(len(raw) + 2))} if rng.random() < 0.1 else {}
        status = _post(port, path, raw, more)
        statuses[status] += 1
        if status >= 500 or status == 0:
            found.append(f"{status}: {raw[:300]!r}")
    return statuses, found


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a nested value; of long lists the first few places."""
    keys = list(data) if isinstance(data, dict) else range(min(len(data), 3))
    for key in keys:
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def _post(port: int, path: str, raw: bytes, more: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json", **more})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()

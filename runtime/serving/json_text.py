# SPDX-License-Identifier: Apache-2.0
"""JSON in and out, strict: UTF-8, no NaN, no depth that breaks the stack. orjson does it where it is installed.

Numbers of a tensor are the bulk of what a server reads and writes, and orjson is several times faster at both.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from .refusal import Refusal

try:
    import orjson  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    orjson = None  # type: ignore[assignment, unused-ignore]


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
# ASCII: what is half a character in a request can be escaped, but not written
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=np.ndarray.tolist)


def decode(body: bytes) -> Any:
    """Read JSON.

    Raises:
        Refusal: 400, it is none.
    """
    try:
        return orjson.loads(body) if orjson is not None else _DECODER.decode(str(body, "utf-8"))
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except RecursionError:
        raise Refusal(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


def flat(array: np.ndarray) -> Any:
    """A tensor's elements in row-major order, as `encode` takes them."""
    return array.ravel().tolist() if orjson is None else np.ascontiguousarray(array).reshape(-1)


def encode(value: Any) -> bytes:
    """Write JSON. Arrays, of finite numbers, become flat or nested lists as they are."""
    if orjson is not None:
        return bytes(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=np.ndarray.tolist))
    return _ENCODER.encode(value).encode("ascii")

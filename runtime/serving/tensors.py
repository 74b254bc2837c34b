# SPDX-License-Identifier: Apache-2.0
"""Tensors as the Open Inference Protocol (v2, REST) writes them, to numpy and back, checked against a signature.

Data are flat or nested in row-major order. With the binary extension (`Inference-Header-Content-Length`,
`binary_data_size`, `binary_data`, as Triton has it) the JSON is followed by the tensors' bytes, little-endian.
Nothing is allocated before a declared shape agrees with the data that really came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ...contracts.errors import did_you_mean
from ...contracts.signature import Signature, TensorSpec
from . import json_text
from .refusal import NotFinite, Refusal
from .settings import Settings

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
    "string": "BYTES",
}
"""numpy's names to the protocol's."""

_OF_KIND: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}, "O": {str}}
_MOST_AXES = 64


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A checked request.

    Attributes:
        id: The client's, or None.
        feeds: Input name to array.
        outputs: The outputs that are wanted, in the client's order; None for all.
        binary: Names of outputs that are wanted as bytes.
    """

    id: str | None
    feeds: dict[str, np.ndarray]
    outputs: tuple[str, ...] | None
    binary: frozenset[str]


def datatype(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's element type; the dtype itself where it has none."""
    return DATATYPES.get(spec.dtype, spec.dtype)


def shape(spec: TensorSpec) -> list[int]:
    """The protocol's form of a shape: -1 for an open axis."""
    return [dim if isinstance(dim, int) else -1 for dim in spec.shape]


def read_request(body: bytes, header_length: str | None, signature: Signature, settings: Settings) -> InferRequest:
    """Read and check the body of an inference request.

    Args:
        body: As it came.
        header_length: The header `Inference-Header-Content-Length`, or None.
        signature: Of the model.
        settings: For its limits.

    Raises:
        Refusal: 400, or 413 for too many elements; says which tensor and what is wanted.
    """
    text, tail = _parts(body, header_length)
    request = json_text.decode(text)
    if not isinstance(request, dict):
        raise Refusal(400, "the body is not a JSON object")
    name = request.get("id")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "'id' is not a string")
    specs = {spec.name: spec for spec in signature.inputs}
    feeds = dict[str, np.ndarray]()
    for tensor in _objects(request, "inputs"):
        spec = _spec(tensor, specs, "input")
        if spec.name in feeds:
            raise Refusal(400, f"input '{spec.name}' is there twice")
        feeds[spec.name], tail = _array(tensor, spec, tail, settings)
    missing = [spec for spec in signature.inputs if spec.name not in feeds]
    if missing:
        raise Refusal(400, f"input '{missing[0].name}' is missing: the model wants {_wanted(missing[0])}")
    if len(tail):
        raise Refusal(400, f"{len(tail)} bytes are left behind the tensors")
    if sum(array.size for array in feeds.values()) > settings.max_elements:
        raise Refusal(413, f"the inputs have more than {settings.max_elements} elements in all")
    _require_one_batch(feeds, signature)
    outputs, binary = _outputs(request, signature)
    return InferRequest(name, feeds, outputs, binary)


def write_answer(
    model: str, version: str, name: str | None, outputs: Mapping[str, np.ndarray], binary: frozenset[str]
) -> tuple[bytes, int | None]:
    """Write the body of an inference response.

    Returns:
        The body, and the length of its JSON where bytes follow it.

    Raises:
        NotFinite: An output has values that JSON cannot hold.
    """
    tensors, tails = list[dict[str, Any]](), list[bytes]()
    for key, array in outputs.items():
        strings = array.dtype.kind in "OUS"
        tensor: dict[str, Any] = {
            "name": key,
            "datatype": "BYTES" if strings else DATATYPES.get(array.dtype.name, array.dtype.name),
            "shape": list(array.shape),
        }
        if key in binary and not strings:
            tails.append(np.ascontiguousarray(array).tobytes())
            tensor["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise NotFinite(key)
            tensor["data"] = array.ravel().tolist() if strings else json_text.flat(array)
        tensors.append(tensor)
    answer = {"model_name": model, "model_version": version, "outputs": tensors}
    if name is not None:
        answer["id"] = name
    text = json_text.encode(answer)
    return (b"".join([text, *tails]), len(text)) if tails else (text, None)


def _parts(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    if header_length is None:
        return body, memoryview(b"")
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise Refusal(400, "Inference-Header-Content-Length is not a number")
    length = int(header_length)
    if length > len(body):
        raise Refusal(400, "Inference-Header-Content-Length is larger than the body")
    return body[:length], memoryview(body)[length:]


def _objects(request: Mapping[str, Any], key: str) -> Iterable[dict[str, Any]]:
    values = request.get(key)
    if not isinstance(values, list):
        raise Refusal(400, f"'{key}' is not a list")
    for value in values:
        if not isinstance(value, dict):
            raise Refusal(400, f"'{key}' holds something that is no object")
        yield value


def _spec(tensor: Mapping[str, Any], specs: Mapping[str, TensorSpec], kind: str) -> TensorSpec:
    name = tensor.get("name")
    if not isinstance(name, str):
        raise Refusal(400, f"an {kind} has no name")
    if name not in specs:
        raise Refusal(400, f"the model has no {kind} '{name[:100]}'. {did_you_mean(name[:100], specs)}")
    return specs[name]


def _array(
    tensor: Mapping[str, Any], spec: TensorSpec, tail: memoryview, settings: Settings
) -> tuple[np.ndarray, memoryview]:
    """One input tensor, and the binary data behind it."""
    if tensor.get("datatype") != datatype(spec):
        raise Refusal(400, f"input '{spec.name}' has datatype {_short(tensor.get('datatype'))}: {_wanted(spec)}")
    dims = _dims(tensor.get("shape"), spec)
    size = math.prod(dims)
    if max(size, *dims, 0) > settings.max_elements:  # also beside a 0, where numpy would still count
        raise Refusal(413, f"input '{spec.name}' has {size} elements: at most {settings.max_elements} are taken")
    dtype = np.dtype(object if spec.dtype == "string" else spec.dtype) if spec.dtype in DATATYPES else None
    if dtype is None or spec.dtype == "bfloat16":
        raise Refusal(400, f"input '{spec.name}' is {spec.dtype}, which cannot be sent")
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refusal(400, f"input '{spec.name}': 'parameters' is not an object")
    if "binary_data_size" in parameters:
        array, tail = _from_bytes(parameters["binary_data_size"], tail, spec, dtype, size)
    else:
        array = _from_list(tensor.get("data"), dims, spec, dtype, size)
    if dtype.kind == "f" and not settings.allow_not_finite and not np.isfinite(array).all():
        raise Refusal(400, f"input '{spec.name}' holds NaN, infinity, or a number that does not fit {datatype(spec)}")
    return array.reshape(dims), tail


def _dims(dims: Any, spec: TensorSpec) -> list[int]:
    if not isinstance(dims, list) or not all(type(dim) is int and 0 <= dim < 2**63 for dim in dims):
        raise Refusal(400, f"input '{spec.name}': 'shape' is not a list of sizes")
    fits = len(dims) == len(spec.shape) <= _MOST_AXES and all(
        size == dim for size, dim in zip(dims, spec.shape, strict=True) if isinstance(dim, int)
    )
    if not fits:
        raise Refusal(400, f"input '{spec.name}' has shape {_short(dims)}: {_wanted(spec)}")
    return dims


def _from_bytes(
    count: Any, tail: memoryview, spec: TensorSpec, dtype: np.dtype[Any], size: int
) -> tuple[np.ndarray, memoryview]:
    if dtype.kind == "O":
        raise Refusal(400, f"input '{spec.name}': strings are taken as JSON only")
    if type(count) is not int or count != size * dtype.itemsize or count > len(tail):
        raise Refusal(
            400, f"input '{spec.name}': binary_data_size is {_short(count)}, its shape makes {size * dtype.itemsize} "
            f"bytes, and {len(tail)} are left in the body"
        )  # fmt: skip
    if dtype.kind == "b" and np.frombuffer(tail[:count], np.uint8).max(initial=0) > 1:
        raise Refusal(400, f"input '{spec.name}': a BOOL is neither 0 nor 1")
    return np.frombuffer(tail[:count], dtype.newbyteorder("<")).astype(dtype), tail[count:]


def _from_list(data: Any, dims: list[int], spec: TensorSpec, dtype: np.dtype[Any], size: int) -> np.ndarray:
    """Flatten one level at a time, with the types checked before numpy sees them: it would guess, and a long string
    among numbers would make it allocate that length for each of them."""
    if not isinstance(data, list):
        raise Refusal(400, f"input '{spec.name}': 'data' is not a list")
    lengths = [len(data)]
    kinds = set(map(type, data))
    while kinds == {list}:
        below = set(map(len, data))
        if len(below) > 1 or len(lengths) >= len(dims):
            raise Refusal(400, f"input '{spec.name}': 'data' is not nested as its shape says")
        lengths.append(below.pop())
        data = list(chain.from_iterable(data))
        kinds = set(map(type, data))
    if (len(lengths) > 1 and lengths != dims[: len(lengths)]) or len(data) != size:
        raise Refusal(400, f"input '{spec.name}' has {len(data)} elements: its shape {_short(dims)} makes {size}")
    if not kinds <= _OF_KIND[dtype.kind]:
        odd = next(iter(kinds - _OF_KIND[dtype.kind]))
        raise Refusal(400, f"input '{spec.name}' holds a JSON {_JSON_NAMES.get(odd, 'value')}: {_wanted(spec)}")
    try:
        with np.errstate(over="ignore"):  # becomes infinity, which is looked for
            return np.array(data, dtype)
    except (OverflowError, ValueError):
        raise Refusal(400, f"input '{spec.name}' holds a number that does not fit {datatype(spec)}") from None


_JSON_NAMES = {bool: "boolean", int: "number", float: "fraction", str: "string", list: "list", dict: "object"}


def _require_one_batch(feeds: Mapping[str, np.ndarray], signature: Signature) -> None:
    """Axes of one name have one size, and none is empty (caches of no tokens aside)."""
    sizes = dict[str, tuple[int, str]]()
    for spec in signature.inputs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            if not isinstance(dim, str):
                continue
            other, name = sizes.setdefault(dim, (size, spec.name))
            if other != size:
                raise Refusal(
                    400, f"inputs '{name}' and '{spec.name}' have {other} and {size} along '{dim}': one size is wanted"
                )
            if not size and not spec.name.startswith("past_"):
                raise Refusal(400, f"input '{spec.name}' is empty: {_wanted(spec)}")


def _outputs(request: Mapping[str, Any], signature: Signature) -> tuple[tuple[str, ...] | None, frozenset[str]]:
    """The names that are wanted, and those of them that are wanted as bytes."""
    parameters = request.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise Refusal(400, "'parameters' is not an object")
    default = bool((parameters or {}).get("binary_data_output"))
    specs = {spec.name: spec for spec in signature.outputs}
    if not request.get("outputs"):
        if request.get("outputs") not in (None, []):
            raise Refusal(400, "'outputs' is not a list")
        return None, frozenset(specs if default else ())
    wanted = dict[str, bool]()
    for tensor in _objects(request, "outputs"):
        name = _spec(tensor, specs, "output").name
        if name in wanted:
            raise Refusal(400, f"output '{name}' is there twice")
        own = tensor.get("parameters")
        wanted[name] = bool(own.get("binary_data", default)) if isinstance(own, dict) else default
    return tuple(wanted), frozenset(name for name, binary in wanted.items() if binary)


def _wanted(spec: TensorSpec) -> str:
    return f"the model wants {datatype(spec)} [{', '.join('?' if d is None else str(d) for d in spec.shape)}]"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

# SPDX-License-Identifier: Apache-2.0
"""What is in an `.onnx` file, read without any ONNX library and without touching a weight: the signature, the nodes,
and where the values of tensors lie.

OpenVINO forgets the names of dynamic axes and drops inputs that nothing uses, and ONNX Runtime shows its optimized
graph only as a file; the runtime imports no ONNX library. Field numbers are those of onnx.proto3
(github.com/onnx/onnx, onnx/onnx.proto3), the encoding is protobuf's (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..contracts.errors import InputError
from ..contracts.signature import Dim, Signature, TensorSpec

Buffer = bytes | mmap.mmap
Span = tuple[int, int]
"""Where the bytes of a nested message, string or tensor begin and end."""
Parsed = TypeVar("Parsed")

_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1",
}  # fmt: skip
"""TensorProto.DataType -> numpy's name, or onnx's where numpy has none."""

_CONTAINERS = {4: "seq(...)", 5: "map(...)", 8: "sparse_tensor(...)", 9: "optional(...)"}
"""Fields of TypeProto that are no plain tensor."""


@dataclass(frozen=True)
class FileNode:
    """One node; `integers` are its int attributes, `outputs` the values it makes."""

    op: str
    domain: str
    name: str
    outputs: tuple[str, ...]
    integers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor lie, as little-endian bytes.

    Attributes:
        dtype: numpy's name of the element type, or onnx's where numpy has none.
        start: Offset of the first byte.
        length: In bytes; None reaches to the end of the file.
        location: The external data file, relative to the model's folder; empty: the model's own file.
    """

    dtype: str
    start: int
    length: int | None
    location: str = ""


@dataclass(frozen=True)
class OnnxFile:
    """What was read.

    Attributes:
        signature: Inputs that are no weights, and outputs. An output whose shape the file leaves out has shape ().
        unshaped: Names of those outputs.
        nodes: All nodes in the file's order, those of subgraphs right after the node that holds them.
    """

    signature: Signature
    unshaped: frozenset[str]
    nodes: tuple[FileNode, ...]


def read_onnx(model: str | Path | bytes) -> OnnxFile:
    """Read the signature and the nodes of a model.

    Raises:
        InputError: It is no ONNX model.
    """
    return _read(model, _model)


def stored_tensors(model: str | Path | bytes) -> list[StoredTensor]:
    """Find the values of all initializers and constants, those of subgraphs and functions included.

    Values that protobuf stores as numbers of varying length, and strings, are left out.

    Raises:
        InputError: It is no ONNX model.
    """
    return _read(model, _all_tensors)


def _read(model: str | Path | bytes, parse: Callable[[Buffer], Parsed]) -> Parsed:
    try:
        if isinstance(model, bytes):
            return parse(model)
        with (
            Path(model).open("rb") as file,
            contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as mapped,
        ):
            return parse(mapped)
    except (IndexError, ValueError, TypeError, RecursionError) as error:  # cut off, or other bytes altogether
        label = "the model" if isinstance(model, bytes) else Path(model).name
        raise InputError(f"{label} cannot be loaded: it is no ONNX model") from error


def _graph(data: Buffer) -> Span:
    graphs = [value for number, value in _fields(data, (0, len(data))) if number == 7]
    if not graphs:
        raise ValueError("no graph")
    return _span(graphs[-1])


def _model(data: Buffer) -> OnnxFile:
    graph = _graph(data)
    weights: set[str] = set()
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    unshaped: set[str] = set()
    for number, value in _fields(data, graph):
        if number == 5:
            weights.add(_text(data, value, 8))
        elif number in (11, 12):
            spec = _value_info(data, _span(value))
            if spec[1]:
                unshaped.add(spec[0].name)
            (inputs if number == 11 else outputs).append(spec[0])
    signature = Signature(tuple(spec for spec in inputs if spec.name not in weights), tuple(outputs))
    return OnnxFile(signature, frozenset(unshaped), tuple(_nodes(data, graph)))


_TENSORS_IN = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message -> the fields through which tensors are reached, and the messages that lie there."""


def _all_tensors(data: Buffer) -> list[StoredTensor]:
    _graph(data)
    return list(_tensors(data, (0, len(data)), "model"))


def _tensors(data: Buffer, span: Span, kind: str) -> Iterator[StoredTensor]:
    if kind == "tensor":
        yield from _stored(data, span)
        return
    inside = _TENSORS_IN[kind]
    for number, value in _fields(data, span):
        if number in inside:
            yield from _tensors(data, _span(value), inside[number])


def _stored(data: Buffer, span: Span) -> Iterator[StoredTensor]:
    """The values of one TensorProto: raw, packed floats or doubles, or in another file."""
    dtype, external, entries = "unknown", False, dict[str, str]()
    values: list[tuple[str, Span]] = []
    for number, value in _fields(data, span):
        if number == 2 and isinstance(value, int):
            dtype = _DTYPES.get(value, f"type {value}")
        elif number in (4, 9, 10):
            values.append(({4: "float32", 9: "", 10: "float64"}[number], _span(value)))
        elif number == 13:
            entries[_text(data, value, 1)] = _text(data, value, 2)
        elif number == 14:
            external = value == 1
    if external:
        if not entries.get("location"):
            raise ValueError("external data that lies nowhere")
        length = int(entries["length"]) if "length" in entries else None
        yield StoredTensor(dtype, int(entries.get("offset") or 0), length, entries["location"])
    else:
        yield from (StoredTensor(kind or dtype, start, end - start) for kind, (start, end) in values)


def _nodes(data: Buffer, graph: Span) -> Iterator[FileNode]:
    for number, value in _fields(data, graph):
        if number != 1:
            continue
        words = {3: "", 4: "", 7: ""}
        outputs: list[str] = []
        integers: dict[str, int] = {}
        inner: list[Span] = []
        for key, part in _fields(data, _span(value)):
            if key in words:
                words[key] = _string(data, part)
            elif key == 2:
                outputs.append(_string(data, part))
            elif key == 5:
                _attribute(data, _span(part), integers, inner)
        yield FileNode(words[4], words[7], words[3], tuple(outputs), integers)
        for subgraph in inner:
            yield from _nodes(data, subgraph)


def _attribute(data: Buffer, span: Span, integers: dict[str, int], graphs: list[Span]) -> None:
    """Keep an attribute that is one integer, and the subgraphs of one that holds any."""
    name, number = "", None
    for key, value in _fields(data, span):
        if key == 1:
            name = _string(data, value)
        elif key == 3 and isinstance(value, int):
            number = value - (1 << 64) if value >> 63 else value
        elif key in (6, 11):
            graphs.append(_span(value))
    if number is not None:
        integers[name] = number


def _value_info(data: Buffer, span: Span) -> tuple[TensorSpec, bool]:
    """Return the spec of a ValueInfoProto, and whether its shape is missing."""
    name, dtype, shape = "", "unknown", None
    for number, value in _fields(data, span):
        if number == 1:
            name = _string(data, value)
        elif number == 2:
            for kind, inner in _fields(data, _span(value)):
                if kind == 1:
                    dtype, shape = _tensor_type(data, _span(inner))
                elif kind in _CONTAINERS:
                    dtype, shape = _CONTAINERS[kind], ()
    return TensorSpec(name, dtype, shape or ()), shape is None


def _tensor_type(data: Buffer, span: Span) -> tuple[str, tuple[Dim, ...] | None]:
    dtype, shape = "unknown", None
    for number, value in _fields(data, span):
        if number == 1 and isinstance(value, int):
            dtype = _DTYPES.get(value, f"type {value}")
        elif number == 2:
            shape = tuple(_dim(data, _span(dim)) for key, dim in _fields(data, _span(value)) if key == 1)
    return dtype, shape


def _dim(data: Buffer, span: Span) -> Dim:
    for number, value in _fields(data, span):
        if number == 1 and isinstance(value, int):
            return value
        if number == 2:
            return _string(data, value) or None
    return None


def _fields(data: Buffer, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Yield the fields of one message: the number, and an integer or where the bytes lie."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("no protobuf message")
        if at + size > end:
            raise ValueError("cut off")
        yield key >> 3, (at, at + size)
        at += size


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no protobuf message")


def _text(data: Buffer, value: int | Span, number: int) -> str:
    """The last string with this number in a message."""
    found = ""
    for key, part in _fields(data, _span(value)):
        if key == number:
            found = _string(data, part)
    return found


def _string(data: Buffer, value: int | Span) -> str:
    start, end = _span(value)
    return data[start:end].decode("utf-8")


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise ValueError("no protobuf message")
    return value

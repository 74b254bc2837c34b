# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol (v2, REST) around one ONNX model: JSON in, tensors through the model, JSON out.

Knows nothing of Ray, so that it can be tested without; needs numpy and onnxruntime only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
"""What the protocol's JSON can carry."""

Arrays = dict[str, np.ndarray]


class BadRequest(ValueError):
    """The client's fault, in one line."""


@dataclass(frozen=True)
class Call:
    """A request that was read.

    Attributes:
        id: The client's, or empty.
        feeds: Input name -> array.
        outputs: Names of the outputs that are wanted.
    """

    id: str
    feeds: Arrays
    outputs: tuple[str, ...]


class Model:
    """A model.onnx with the model.json beside it.

    Args:
        folder: Where both lie.
        threads: Threads that one operator may use; OMP_NUM_THREADS, which Ray sets to a replica's CPUs, or 1.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()  # official Windows wheels have it on
        self.description: dict[str, Any] = json.loads((folder / "model.json").read_text("utf-8"))
        self.name, self.batched = str(self.description["name"]), bool(self.description["batched"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # replicas share the cores
        path = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def metadata(self) -> dict[str, Any]:
        """What GET /v2/models/<name> answers."""
        return {key: self.description[key] for key in ("name", "versions", "platform", "inputs", "outputs")}

    def read(self, body: bytes) -> Call:
        """Read a request's body.

        Raises:
            BadRequest: It is not a request for this model.
        """
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest("the body is not JSON") from error
        if not isinstance(data, dict) or not isinstance(data.get("inputs"), list):
            raise BadRequest("the body has no list of inputs")
        given: Arrays = {}
        specs = {spec["name"]: spec for spec in self.description["inputs"]}
        for tensor in data["inputs"]:
            name = tensor.get("name") if isinstance(tensor, dict) else None
            if not isinstance(name, str) or name not in specs or name in given:
                raise BadRequest(f"no such input, or one given twice: {name!r}")
            given[name] = _array(tensor, specs[name])
        missing = [name for name in specs if name not in given]
        if missing:
            raise BadRequest(f"input '{missing[0]}' is missing")
        if self.batched and len({len(array) for array in given.values()}) != 1:
            raise BadRequest("the inputs have batches of different sizes")
        return Call(str(data.get("id") or ""), given, self._wanted(data.get("outputs")))

    def answer(self, call: Call, outputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The JSON for what the model gave for a request."""
        datatypes = {spec["name"]: spec["datatype"] for spec in self.description["outputs"]}
        tensors = [
            {
                "name": name,
                "shape": list(outputs[name].shape),
                "datatype": datatypes[name],
                "data": outputs[name].ravel().tolist(),
            }
            for name in call.outputs
        ]
        return {
            "model_name": self.name,
            "model_version": "1",
            **({"id": call.id} if call.id else {}),
            "outputs": tensors,
        }

    def run(self, calls: Sequence[Call]) -> list[Arrays | BadRequest]:
        """Run requests, those of one shape together; what the model refuses becomes that request's answer."""
        answers: list[Arrays | BadRequest] = [{} for _ in calls]
        for places in self._groups(calls):
            for place, answer in zip(places, self._together([calls[i].feeds for i in places]), strict=True):
                answers[place] = answer
        return answers

    def _groups(self, calls: Sequence[Call]) -> list[list[int]]:
        if not self.batched:
            return [[i] for i in range(len(calls))]
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, call in enumerate(calls):
            key = tuple(call.feeds[spec["name"]].shape[1:] for spec in self.description["inputs"])
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _together(self, feeds: list[Arrays]) -> list[Arrays | BadRequest]:
        joined = feeds[0] if len(feeds) == 1 else {n: np.concatenate([f[n] for f in feeds]) for n in feeds[0]}
        names = [spec["name"] for spec in self.description["outputs"]]
        try:
            values = self._session.run(names, joined)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common class of their own
            if len(feeds) == 1:
                return [BadRequest(str(error).splitlines()[0][:300])]
            return [answer for one in feeds for answer in self._together([one])]
        if len(feeds) == 1:
            return [dict(zip(names, values, strict=True))]
        ends = np.cumsum([len(next(iter(one.values()))) for one in feeds])[:-1]
        rows = [np.split(value, ends) for value in values]
        return [dict(zip(names, parts, strict=True)) for parts in zip(*rows, strict=True)]

    def _wanted(self, outputs: Any) -> tuple[str, ...]:
        names = [spec["name"] for spec in self.description["outputs"]]
        if not outputs:
            return tuple(names)
        if not isinstance(outputs, list):
            raise BadRequest("'outputs' is no list")
        wanted: list[Any] = [output.get("name") if isinstance(output, dict) else None for output in outputs]
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise BadRequest(f"no such output: {unknown[0]!r}")
        return tuple(wanted)


def _array(tensor: dict[str, Any], spec: dict[str, Any]) -> np.ndarray:
    """A tensor of a request as the model takes it."""
    name, shape, datatype = spec["name"], tensor.get("shape"), tensor.get("datatype")
    if datatype != spec["datatype"] or datatype not in DTYPES:
        raise BadRequest(f"input '{name}' is {datatype!r} in place of {spec['datatype']}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and 0 <= size < 2**31 for size in shape):
        raise BadRequest(f"input '{name}' has no shape of whole numbers")
    if len(shape) != len(spec["shape"]):
        raise BadRequest(f"input '{name}' has shape {shape!r} in place of {spec['shape']}")
    if any(wanted not in (-1, size) for size, wanted in zip(shape, spec["shape"], strict=True)):
        raise BadRequest(f"input '{name}' has shape {shape} in place of {spec['shape']}")
    try:
        plain = np.asarray(tensor.get("data"))
        kind = np.dtype(DTYPES[datatype]).kind
        fits = plain.size == 0 or plain.dtype.kind in {"b": "b", "f": "iuf"}.get(kind, "iu")
        array = plain.astype(DTYPES[datatype])
        exact = kind == "f" or plain.size == 0 or bool((array == plain).all())
        if not fits or not exact:
            raise BadRequest(f"the data of input '{name}' are no {datatype}")
        return array.reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"the data of input '{name}' do not fill the shape {shape}") from error

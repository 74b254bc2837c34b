# SPDX-License-Identifier: Apache-2.0
"""The golden samples as requests of the Open Inference Protocol (v2, REST), for any server that speaks it.

requests/<i>.json        the body to POST to /v2/models/<name>/infer
requests/expected.json   {"model", "inputs", "outputs": [{"name", "datatype", "tolerance"}],
                          "samples": [{"name", "text", "request", "outputs": {name: {"shape", "reference", "python"}}}],
                          "left_out": [reason]}
check_server.py          sends them and compares; Python's own library alone

The protocol's JSON has neither 16-bit floats nor NaN: samples with such numbers are left out, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....runtime.opened import Bundle, GoldenSample
from ....runtime.session import Array
from ..base import copy_files
from .configuration import DATATYPES

FOLDER, EXPECTED, CHECK = "requests", "expected.json", "check_server.py"
Shape = Callable[[Array], tuple[int, ...]]


def write_requests(bundle: Bundle, folder: Path, model: str, shape: Shape = np.shape) -> int:
    """Write the golden requests and the script that sends them into a handoff; return how many there are.

    Args:
        bundle: Whose golden samples they are.
        folder: The handoff.
        model: The name under which a server knows the model.
        shape: The shape that an array has in a request: Triton has no tensor without dimensions.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    session = bundle.session()
    samples: list[dict[str, Any]] = []
    left_out: list[str] = []
    for sample in bundle.golden:
        answers = session.run(dict(sample.inputs))
        reason = _no_json(sample.inputs) or _no_json(answers) or _no_json(sample.outputs)
        if reason:
            left_out.append(f"{sample.name}: {reason}")
            continue
        file = f"{len(samples)}.json"
        _write(folder / FOLDER / file, {"id": sample.name, "inputs": _tensors(sample.inputs, shape)})
        samples.append(_expected(sample, answers, file, shape))
    expected = {
        "model": model,
        "inputs": [{"name": s.name, "datatype": DATATYPES[s.dtype]} for s in bundle.signature.inputs],
        "outputs": [
            {"name": s.name, "datatype": DATATYPES[s.dtype], "tolerance": bundle.tolerance(s.name)}
            for s in bundle.signature.outputs
        ],
        "samples": samples,
        "left_out": left_out,
    }
    _write(folder / FOLDER / EXPECTED, expected)
    copy_files(Path(__file__).parent, folder, [CHECK])
    return len(samples)


def _expected(sample: GoldenSample, answers: Mapping[str, Array], file: str, shape: Shape) -> dict[str, Any]:
    outputs = {
        name: {"shape": list(shape(answer)), "reference": _flat(sample.outputs[name]), "python": _flat(answer)}
        for name, answer in answers.items()
        if name in sample.outputs
    }
    return {"name": sample.name, "text": sample.text, "request": file, "outputs": outputs}


def _tensors(arrays: Mapping[str, Array], shape: Shape) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(shape(array)), "datatype": DATATYPES[array.dtype.name], "data": _flat(array)}
        for name, array in arrays.items()
    ]


def _flat(array: Array) -> list[Any]:
    """The values in C order; a 32-bit float in its shortest form, which reads back as the same number."""
    if array.dtype == np.float32:
        return [float(str(value)) for value in array.ravel()]
    values: list[Any] = array.ravel().tolist()
    return values


def _no_json(arrays: Mapping[str, Array]) -> str:
    for name, array in arrays.items():
        if array.dtype.name not in DATATYPES or array.dtype.name in ("float16", "bfloat16", "string"):
            return f"'{name}' is {array.dtype.name}, which the protocol's JSON does not carry"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"'{name}' has numbers that JSON does not know"
    return ""


def _write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n", "utf-8", newline="\n")

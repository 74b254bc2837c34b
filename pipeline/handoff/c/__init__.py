# SPDX-License-Identifier: Apache-2.0
"""C11 on ONNX Runtime's C interface, built by CMake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..base import Target
from ..example_inputs import ExampleInput
from ..native import NativeTarget

_ONNX_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
"""Where ONNX Runtime's enum does not simply have numpy's name."""


class C(NativeTarget):
    """The files are the consumer's; only the example, CMakeLists.txt and the README are filled in."""

    name: ClassVar[str] = "c"
    summary: ClassVar[str] = "C11, CMake, ONNX Runtime's C interface"
    package: ClassVar[str] = __name__
    files: ClassVar[tuple[str, ...]] = ("model.h", "model.c", "check.c")
    types: ClassVar[Mapping[str, str]] = {
        "float32": "float", "float64": "double", "bool": "uint8_t",
        "int64": "int64_t", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t",
        "uint64": "uint64_t", "uint32": "uint32_t", "uint16": "uint16_t", "uint8": "uint8_t",
    }  # fmt: skip
    build: ClassVar[Mapping[str, str]] = {
        "language": "C",
        "standard": "c_std_11",
        "suffix": "c",
        "header": "onnxruntime_c_api.h",
    }
    compiler: ClassVar[str] = "cc"

    def example(self, index: int, example: ExampleInput) -> dict[str, Any]:
        values = super().example(index, example)
        kind = _ONNX_TYPES.get(example.dtype, example.dtype.upper())
        values["onnx_type"] = f"ONNX_TENSOR_ELEMENT_DATA_TYPE_{kind}"
        values["filled"] = bool(values["type"] and example.size and example.numbers is None and example.fill)
        values["bytes"] = example.size * np.dtype(example.dtype).itemsize if not values["type"] else 0
        values["shape"] = values["shape"] if example.shape else "{0}"
        return values


TARGETS: dict[str, Target] = {"c": C()}

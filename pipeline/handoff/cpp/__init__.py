# SPDX-License-Identifier: Apache-2.0
"""C++17 on ONNX Runtime's C++ interface, built by CMake; a decode loop where the model is a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from ....runtime.opened import Bundle
from ..base import Target, copy_files
from ..native import NativeTarget
from .generation import decoding_of, write_generation

_HERE = Path(__file__).parent


class Cpp(NativeTarget):
    """The files are the consumer's; only the example, CMakeLists.txt and the README are filled in."""

    name: ClassVar[str] = "cpp"
    summary: ClassVar[str] = "C++17, CMake, ONNX Runtime's C++ interface"
    package: ClassVar[str] = __name__
    files: ClassVar[tuple[str, ...]] = ("model.hpp", "model.cpp", "golden.hpp", "check.cpp")
    types: ClassVar[Mapping[str, str]] = {
        "float32": "float", "float64": "double",
        "int64": "std::int64_t", "int32": "std::int32_t", "int16": "std::int16_t", "int8": "std::int8_t",
        "uint64": "std::uint64_t", "uint32": "std::uint32_t", "uint16": "std::uint16_t", "uint8": "std::uint8_t",
    }  # fmt: skip
    build: ClassVar[Mapping[str, str]] = {
        "language": "CXX",
        "standard": "cxx_std_17",
        "suffix": "cpp",
        "header": "onnxruntime_cxx_api.h",
    }
    compiler: ClassVar[str] = "c++"

    def programs(self, bundle: Bundle) -> list[str]:
        return ["check", "example", *["generate"] * (decoding_of(bundle) is not None)]

    def write(self, bundle: Bundle, folder: Path) -> None:
        super().write(bundle, folder)
        if "generate" in self.programs(bundle):
            write_generation(bundle, folder / "golden")
            copy_files(_HERE, folder, ["generate.cpp"])


TARGETS: dict[str, Target] = {"cpp": Cpp()}

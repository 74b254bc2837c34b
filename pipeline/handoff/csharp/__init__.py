# SPDX-License-Identifier: Apache-2.0
"""C# on ONNX Runtime's .NET interface. Written, and its project file parsed: never compiled here."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ....runtime.onnxruntime_engine import onnxruntime
from ....runtime.opened import Bundle
from ..base import FAILED, Check, Target, copy_files, not_run, render
from ..example_inputs import ExampleInput, about, example_inputs, one_line, quoted
from ..model_files import lay_out

COMMAND = "dotnet run -- check"
_FILES = ("Tensor.cs", "Model.cs", "Golden.cs", "Check.cs")
_TEMPLATES = ("Model.csproj", "Program.cs", "README.md")
_TYPES: Mapping[str, str] = {
    "float32": "float", "float64": "double", "int64": "long", "int32": "int", "int16": "short", "int8": "sbyte",
    "uint64": "ulong", "uint32": "uint", "uint16": "ushort", "uint8": "byte",
}  # fmt: skip


class CSharp(Target):
    """The files are the consumer's; only the program, the project and the README are filled in."""

    name: ClassVar[str] = "csharp"
    summary: ClassVar[str] = "C#, .NET 8, Microsoft.ML.OnnxRuntime"

    def write(self, bundle: Bundle, folder: Path) -> None:
        lay_out(bundle, folder)
        copy_files(Path(__file__).parent, folder, _FILES)
        values = {
            "name": one_line(bundle.name),
            "about": about(bundle),
            "inputs": [_written(example) for example in example_inputs(bundle)],
            "signature": bundle.signature,
            "version": onnxruntime().__version__,
        }
        for name in _TEMPLATES:
            (folder / name).write_text(render(__name__, f"{name}.j2", **values), "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        try:
            project = ET.parse(folder / "Model.csproj").getroot()
        except ET.ParseError as error:
            return Check(FAILED, f"Model.csproj is not XML: {error}", command=COMMAND)
        package = project.find("ItemGroup/PackageReference[@Include='Microsoft.ML.OnnxRuntime']")
        if package is None:
            return Check(FAILED, "Model.csproj does not name ONNX Runtime", command=COMMAND)
        return not_run(
            "the C# was not compiled: onnxpress does not drive .NET, whose packages come from elsewhere; "
            "Model.csproj was parsed",
            ("generated", "parsed"),
            COMMAND,
        )


def _written(example: ExampleInput) -> dict[str, Any]:
    kind = _TYPES.get(example.dtype)
    suffix = "f" if kind == "float" else ""
    listed = f"{suffix}, ".join(example.listed().split(", ")) + suffix
    return {
        "name": quoted(example.name)[1:-1],
        "dtype": example.dtype,
        "open_shape": example.open_shape,
        "shape": "".join(f", {dim}" for dim in example.shape),
        "type": kind,
        "numbers": "{ " + listed + " }" if kind and example.numbers else "",
    }


TARGETS: dict[str, Target] = {"csharp": CSharp()}

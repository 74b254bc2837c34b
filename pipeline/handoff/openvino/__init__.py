# SPDX-License-Identifier: Apache-2.0
"""C++17 on OpenVINO's C++ interface: the .onnx itself, and the same in OpenVINO's own format."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from ....contracts.errors import InputError
from ....exporters import graph_file
from ....runtime.opened import Bundle
from ....runtime.openvino_engine import is_installed, openvino
from ....runtime.session import OPENVINO, Session
from ..base import FAILED, PASSED, Check, MissingTool, Target, copy_files, judge, render
from ..cpp import Cpp
from ..example_inputs import about, example_inputs, one_line
from ..model_files import MODEL, lay_out
from ..native import BuildFailed, build_with_cmake, run_all

_HERE = Path(__file__).parent
_TYPES: Mapping[str, str] = {
    **Cpp.types,
    "bool": "std::uint8_t",
    "float16": "ov::float16",
    "bfloat16": "ov::bfloat16",
}
_DEFAULTS: Mapping[tuple[str, str], Mapping[str, int]] = {("com.microsoft", "RotaryEmbedding"): {"interleaved": 0}}
"""OpenVINO 2026.4 refuses these operators without these attributes, with `Any was not initialized`."""

COMMAND = "cmake -B build -DOpenVINO_DIR=... && cmake --build build && build/check"


class OpenVino(Target):
    """The .onnx is what is checked first; OpenVINO's own format is written where its Python package is installed."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "C++17, CMake, OpenVINO's C++ interface"

    def write(self, bundle: Bundle, folder: Path) -> None:
        model = lay_out(bundle, folder)
        _write_defaults(model)
        converted = is_installed()
        if converted:
            Session(model, provider=OPENVINO, threads=1)  # names the operators that OpenVINO does not know
            _convert(model)
        copy_files(_HERE, folder, ["CMakeLists.txt", "model.hpp", "model.cpp", "check.cpp"])
        copy_files(_HERE.parent / "cpp", folder, ["golden.hpp"])
        used = _used_inputs(model) if converted else None
        inputs = [
            Cpp().example(i, example) | {"type": _TYPES.get(example.dtype)}
            for i, example in enumerate(example_inputs(bundle))
            if used is None or example.name in used
        ]
        values = {
            "name": one_line(bundle.name),
            "about": about(bundle),
            "inputs": inputs,
            "signature": bundle.signature,
        }
        for name in ("example.cpp", "README.md"):
            text = render(__name__, f"{name}.j2", ir=converted, **values)
            (folder / name).write_text(text, "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        if not is_installed():
            raise MissingTool("openvino is not installed", next_step='pip install "onnxpress[openvino]"')
        versions, build = {"openvino": str(openvino().__version__).split("-", 1)[0]}, scratch / "build"
        cmake = importlib.import_module("openvino.utils").get_cmake_path()
        try:
            build_with_cmake(folder, build, f"-DOpenVINO_DIR={cmake}")
        except BuildFailed as error:
            return Check(FAILED, str(error), ("generated",), COMMAND, versions=versions)
        check = self._run(bundle, folder, build, ["check", "example"], versions)
        if check.status == PASSED and (folder / MODEL / "model.xml").is_file():
            own = self._run(bundle, folder, build, [f"check {MODEL}/model.xml"], versions)
            check = own if own.status == FAILED else check
        return check

    def _run(
        self, bundle: Bundle, folder: Path, build: Path, programs: list[str], versions: Mapping[str, str]
    ) -> Check:
        result = run_all(build, programs, folder)
        outputs = [spec.name for spec in bundle.signature.outputs]
        return judge(result, outputs, command=COMMAND, stages=("generated", "compiled", "run"), versions=versions)


def _write_defaults(model: Path) -> None:
    """Give attributes that a node leaves out their defaults, where OpenVINO's reader knows no default."""
    graph = graph_file.read(model)
    nodes = [node for node in graph.graph if node.op_identifier()[:2] in _DEFAULTS]
    missing = [node for node in nodes if not _DEFAULTS[node.op_identifier()[:2]].keys() <= node.attributes.keys()]
    for node in missing:
        for name, value in _DEFAULTS[node.op_identifier()[:2]].items():
            if name not in node.attributes:
                node.attributes.add(ir.AttrInt64(name, value))
    if missing:
        graph_file.write(graph, model)


def _convert(model: Path) -> None:
    """Write model.xml and model.bin beside the .onnx, weights as they are."""
    try:
        read = openvino().Core().read_model(model)
        openvino().save_model(read, model.with_suffix(".xml"), compress_to_fp16=False)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot convert the model: {str(error).strip().splitlines()[-1]}") from error


def _used_inputs(model: Path) -> set[str]:
    """OpenVINO drops the inputs that nothing uses."""
    read = openvino().Core().read_model(model)
    return {name for value in read.inputs for name in value.names}


TARGETS: dict[str, Target] = {"openvino": OpenVino()}

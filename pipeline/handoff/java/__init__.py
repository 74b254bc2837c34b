# SPDX-License-Identifier: Apache-2.0
"""Java 17 on ONNX Runtime's Java interface, built by Gradle.

The library is a jar that may not be here. Without it (`ONNXPRESS_ORT_JAR`) everything is compiled, against signatures
of the few methods that are called, and the reading and comparing of golden samples is run on a stand-in for the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ....contracts.errors import InputError
from ....runtime.onnxruntime_engine import onnxruntime
from ....runtime.opened import Bundle
from ..base import (
    FAILED,
    PASSED,
    Check,
    MissingTool,
    Target,
    judge,
    not_run,
    render,
    require_tool,
    run_tool,
)
from ..example_inputs import ExampleInput, about, example_inputs, one_line, quoted
from ..model_files import lay_out, place_files

JAR = "ONNXPRESS_ORT_JAR"
COMMAND = "gradle golden"
_HERE = Path(__file__).parent
_CLASSES = "src/main/java/model"
_PLACES = {
    **{name: name for name in ("build.gradle.kts", "settings.gradle.kts")},
    **{
        name: f"{_CLASSES}/{name}" for name in ("Check.java", "Golden.java", "Model.java", "Runner.java", "Tensor.java")
    },
}
_TYPES: Mapping[str, str] = {"int64": "long", "int32": "int", "float32": "float"}
NO_TENSORS = frozenset({"uint16", "uint32", "uint64"})
"""What ONNX Runtime's Java interface makes no tensor of."""


class Java(Target):
    """The files are the consumer's; only the example and the README are filled in."""

    name: ClassVar[str] = "java"
    summary: ClassVar[str] = "Java 17, Gradle, ONNX Runtime's Java interface"

    def write(self, bundle: Bundle, folder: Path) -> None:
        require_java_types(bundle)
        lay_out(bundle, folder)
        place_files(_HERE, folder, _PLACES)
        version = str(onnxruntime().__version__)
        (folder / "gradle.properties").write_text(f"onnxruntimeVersion={version}\n", "utf-8", newline="\n")
        values = {
            "name": one_line(bundle.name),
            "about": about(bundle),
            "inputs": [_written(example) for example in example_inputs(bundle)],
            "signature": bundle.signature,
            "opset": bundle.manifest.get("opsets", {}).get("", "?"),
        }
        for template, place in (("Example.java.j2", f"{_CLASSES}/Example.java"), ("README.md.j2", "README.md")):
            (folder / place).write_text(render(__name__, template, **values), "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        javac = require_tool("javac", "Install a JDK, 17 or newer (Debian: apt-get install openjdk-17-jdk-headless).")
        versions = {"javac": run_tool([javac, "-version"], folder).stdout.split()[-1]}
        jar, classes = os.environ.get(JAR), scratch / "classes"
        if jar and not Path(jar).is_file():
            raise MissingTool(f"{JAR} names no file", next_step="Set it to the path of onnxruntime-VERSION.jar.")
        sources = sorted((folder / _CLASSES).glob("*.java"))
        if not jar:
            sources += [*sorted((_HERE / "signatures").glob("*.java")), _HERE / "Replay.java"]
        options = ["-encoding", "UTF-8", "-d", str(classes), *(["-cp", jar] if jar else [])]
        compiled = run_tool([javac, *options, *sources], folder)
        if compiled.returncode:
            told = compiled.stderr.strip().splitlines() or ["javac failed"]
            return Check(FAILED, told[0][-300:], ("generated",), COMMAND, versions=versions)
        outputs = [spec.name for spec in bundle.signature.outputs]
        java, path = require_tool("java", "Install a Java runtime."), [classes, *([jar] if jar else [])]
        program = "model.Check" if jar else "model.Replay"
        result = run_tool([java, "-Dfile.encoding=UTF-8", "-cp", os.pathsep.join(map(str, path)), program], folder)
        stages = ("generated", "compiled", "run") if jar else ("generated", "compiled")
        check = judge(result, outputs, command=COMMAND, stages=stages, versions=versions)
        if jar or check.status != PASSED:
            return check
        return not_run(
            f"onnxruntime's jar is not on this machine ({JAR} would name it): all was compiled, Model.java against "
            "signatures alone, and the check read and compared the golden samples with a stand-in for the model",
            stages,
            COMMAND,
            **versions,
        )


def require_java_types(bundle: Bundle) -> None:
    """Raise InputError for a type that ONNX Runtime's Java interface makes no tensor of."""
    for spec in (*bundle.signature.inputs, *bundle.signature.outputs):
        if spec.dtype in NO_TENSORS:
            raise InputError(f"'{spec.name}' is {spec.dtype}: ONNX Runtime's Java interface makes no tensors of it")


def _written(example: ExampleInput) -> dict[str, Any]:
    kind = _TYPES.get(example.dtype)
    suffix = {"long": "L", "float": "f"}.get(kind or "", "")
    listed = f"{suffix}, ".join(example.listed().split(", ")) + suffix
    return {
        "name": quoted(example.name)[1:-1],
        "dtype": example.dtype,
        "open_shape": example.open_shape,
        "shape": "{" + ", ".join(map(str, example.shape)) + "}",
        "type": kind,
        "numbers": "{" + listed + "}" if kind and example.numbers else "",
    }


TARGETS: dict[str, Target] = {"java": Java()}

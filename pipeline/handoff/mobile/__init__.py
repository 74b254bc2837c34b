# SPDX-License-Identifier: Apache-2.0
"""iOS and Android: the model as .ort, and a Swift package or an Android library module around it.

Neither Swift nor Kotlin is compiled here. What is run is the .ort files themselves: by ONNX Runtime in Python, and by
the C++ consumer.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from ....contracts.errors import InputError
from ....contracts.signature import TensorSpec
from ....runtime.bundle import largest_difference
from ....runtime.onnxruntime_engine import onnxruntime
from ....runtime.opened import Bundle
from ..base import FAILED, NOT_RUN, PASSED, Check, MissingTool, Target, copy_files, judge, render, run_tool, write_json
from ..cpp import Cpp
from ..example_inputs import example_inputs, one_line
from ..java import NO_TENSORS
from ..model_files import GOLDEN, lay_out, place_files
from ..native import BuildFailed, build_with_cmake, runtime_root
from .ort_files import CONFIGS, FIXED, REPLAY, RUNTIME, write_ort
from .partitions import partitions_of, table

_HERE = Path(__file__).parent
_ORT = "ort"


class Mobile(Target):
    """What both have in common.

    Attributes:
        language: As people write it.
        command: Runs the golden check where the toolchain is.
        files: Copied as they are: file here to path in the handoff.
        templates: Filled in, likewise.
        model: Where the "Fixed" .ort file goes; the other one stays in `ort/`.
        golden: Where the golden samples go.
    """

    language: ClassVar[str]
    command: ClassVar[str]
    files: ClassVar[Mapping[str, str]]
    templates: ClassVar[Mapping[str, str]]
    model: ClassVar[str]
    golden: ClassVar[str]

    @abstractmethod
    def takes(self, spec: TensorSpec) -> bool:
        """Whether ONNX Runtime's interface in this language has tensors of that type."""

    def write(self, bundle: Bundle, folder: Path) -> None:
        for spec in (*bundle.signature.inputs, *bundle.signature.outputs):
            if not self.takes(spec):
                raise InputError(
                    f"'{spec.name}' is {spec.dtype}: ONNX Runtime's {self.language} interface makes no tensors of it",
                    next_step="Press it with a recipe whose inputs and outputs are float32.",
                )
        with tempfile.TemporaryDirectory() as place:
            original = lay_out(bundle, Path(place))
            write_ort(original, folder / _ORT)
            partitions = partitions_of(original)
            shutil.copytree(original.parent.parent / GOLDEN, folder / self.golden)
            for path in original.parent.glob("*.json"):
                _move_in(path, folder / "text" / path.name)
        _move_in(folder / _ORT / FIXED, folder / self.model)
        write_json({"partitions": [asdict(partition) for partition in partitions]}, folder / "partitions.json", 1)
        place_files(_HERE, folder, self.files)
        values: Mapping[str, Any] = {
            "name": one_line(bundle.name),
            "signature": bundle.signature,
            "version": onnxruntime().__version__,
            "table": table(partitions),
            "inputs": example_inputs(bundle),
            "configs": CONFIGS,
        }
        for template, place in {**self.templates, "PARTITIONS.md.j2": "PARTITIONS.md"}.items():
            (folder / place).write_text(render(__name__, template, **values), "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        worst, from_python = _run_in_python(bundle, folder / self.model, replay=False)
        other = _run_in_python(bundle, folder / _ORT / RUNTIME, replay=True)
        for name in worst:
            worst[name], from_python[name] = max(worst[name], other[0][name]), max(from_python[name], other[1][name])
        versions = {"onnxruntime": str(onnxruntime().__version__)}
        wrong = [name for name, difference in worst.items() if not difference <= bundle.tolerance(name)]
        if wrong:
            reason = f"the .ort file does not give the golden answers: '{wrong[0]}' is {worst[wrong[0]]:.3g} off"
            return Check(FAILED, reason, ("generated",), self.command, worst, from_python, versions)
        told = "ONNX Runtime in Python ran both .ort files"
        try:
            cpp = _run_in_cpp(bundle, folder, self.golden, [self.model, f"{_ORT}/{RUNTIME}"], scratch)
            if cpp.status == FAILED:
                return cpp
            told += ", and so did the C++ consumer"
        except MissingTool as error:
            told += f" (the C++ consumer did not: {error.message})"
        reason = f"{self.language}'s own tools are not driven from here: nothing was compiled; {told}, within tolerance"
        return Check(NOT_RUN, reason, ("generated",), self.command, worst, from_python, versions)


class Swift(Mobile):
    """A Swift package with an XCTest."""

    name: ClassVar[str] = "swift"
    summary: ClassVar[str] = "iOS: .ort files and a Swift package"
    language: ClassVar[str] = "Swift"
    command: ClassVar[str] = "swift test"
    files: ClassVar[Mapping[str, str]] = {
        "Model.swift": "Sources/Model/Model.swift",
        "Tensor.swift": "Sources/Model/Tensor.swift",
        "GoldenTests.swift": "Tests/ModelTests/GoldenTests.swift",
    }
    templates: ClassVar[Mapping[str, str]] = {"Package.swift.j2": "Package.swift", "swift.md.j2": "README.md"}
    model: ClassVar[str] = f"Sources/Model/Resources/{FIXED}"
    golden: ClassVar[str] = "Tests/ModelTests/golden"

    def takes(self, spec: TensorSpec) -> bool:
        return spec.dtype in {"float32", "int64", "int32", "int8", "uint8", "uint32", "uint64", "bool"}


class Kotlin(Mobile):
    """An Android library module with a JUnit test that runs without a device."""

    name: ClassVar[str] = "kotlin"
    summary: ClassVar[str] = "Android: .ort files and a library module in Kotlin"
    language: ClassVar[str] = "Kotlin"
    command: ClassVar[str] = "gradle testDebugUnitTest"
    files: ClassVar[Mapping[str, str]] = {
        "settings.gradle.kts": "settings.gradle.kts",
        "AndroidManifest.xml": "src/main/AndroidManifest.xml",
        "Model.kt": "src/main/kotlin/model/Model.kt",
        "Tensor.kt": "src/main/kotlin/model/Tensor.kt",
        "GoldenTest.kt": "src/test/kotlin/model/GoldenTest.kt",
    }
    templates: ClassVar[Mapping[str, str]] = {
        "build.gradle.kts.j2": "build.gradle.kts",
        "kotlin.md.j2": "README.md",
    }
    model: ClassVar[str] = f"src/main/assets/{FIXED}"
    golden: ClassVar[str] = GOLDEN

    def takes(self, spec: TensorSpec) -> bool:
        return spec.dtype not in NO_TENSORS


def _run_in_python(bundle: Bundle, model: Path, *, replay: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Largest difference of each output from the original's answers, and from what the .onnx answers."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if replay:
        options.add_session_config_entry(REPLAY, "1")
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    original = bundle.session(threads=1)
    worst, from_python = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for sample in bundle.golden:
        expected = original.run(dict(sample.inputs))
        for name, actual in zip(names, session.run(names, dict(sample.inputs)), strict=True):
            if actual.shape != expected[name].shape:
                worst[name] = from_python[name] = float("inf")
                continue
            worst[name] = max(worst[name], largest_difference(actual, sample.outputs[name]))
            from_python[name] = max(from_python[name], largest_difference(actual, expected[name]))
    return worst, from_python


def _run_in_cpp(bundle: Bundle, folder: Path, golden: str, models: list[str], scratch: Path) -> Check:
    """Run the C++ consumer's check on .ort files; the first that does not pass, or the last."""
    root, place = runtime_root(scratch), scratch / "cpp"
    copy_files(_HERE.parent / "cpp", place, Cpp.files)
    Cpp().write_cmake(place, ["check"])
    shutil.copytree(folder / golden, place / GOLDEN)
    try:
        build_with_cmake(place, scratch / "build", f"-DONNXRUNTIME_ROOT={root}")
    except BuildFailed as error:
        return Check(FAILED, str(error))
    outputs, check = [spec.name for spec in bundle.signature.outputs], Check(PASSED)
    for model in models:
        done = run_tool([scratch / "build" / "check", ".", (folder / model).resolve()], place)
        check = judge(done, outputs, command="", stages=("run",), versions={})
        if check.status != PASSED:
            return check
    return check


def _move_in(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


TARGETS: dict[str, Target] = {target.name: target for target in (Swift(), Kotlin())}

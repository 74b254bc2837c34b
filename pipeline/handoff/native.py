# SPDX-License-Identifier: Apache-2.0
"""Consumers in C and C++, and what these and Rust are built against on this machine: the library of ONNX Runtime's
Python wheel, and headers from elsewhere.

The wheel has the library without the name that programs ask for (libonnxruntime.so.1) and no headers; Debian's
libonnxruntime-dev has them. ONNX Runtime's C interface is versioned: older headers work with a newer library, newer
headers with an older library do not (onnxruntime.ai/docs/api/c, `OrtApiBase::GetApi`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...runtime.onnxruntime_engine import onnxruntime
from ...runtime.opened import Bundle
from .base import FAILED, Check, MissingTool, Target, copy_files, judge, render, require_tool, run_tool
from .example_inputs import ExampleInput, about, example_inputs, one_line, quoted
from .model_files import lay_out

HEADER = "onnxruntime_c_api.h"
INCLUDE = "ONNXPRESS_ORT_INCLUDE"
_API = re.compile(r"#define\s+ORT_API_VERSION\s+(\d+)")
_PLACES = (
    str(Path(__file__).resolve().parents[2] / ".consumers" / "include"),
    "/usr/include",
    "/usr/local/include",
    "/opt/onnxruntime/include",
)


COMMAND = "cmake -B build -DONNXRUNTIME_ROOT=... && cmake --build build && build/check"


class BuildFailed(Exception):
    """A consumer did not compile; the message is the compiler's first error."""


def headers() -> Path:
    """The folder of ONNX Runtime's headers.

    Looked for in $ONNXPRESS_ORT_INCLUDE, in `.consumers/include` of the checkout (scripts/consumers), in the system.

    Raises:
        MissingTool: There are none.
    """
    for place in filter(None, (os.environ.get(INCLUDE), *_PLACES)):
        for inside in (".", "onnxruntime", "onnxruntime/core/session"):
            folder = Path(place).absolute() / inside
            if (folder / HEADER).is_file():
                return folder
    raise MissingTool(
        "the headers of ONNX Runtime are not on this machine",
        next_step=f"Set {INCLUDE} to their folder, or install libonnxruntime-dev.",
    )


def library() -> Path:
    """The shared library in the installed wheel.

    Raises:
        MissingTool: The wheel is of a system whose library this module does not know.
        MissingDependency: onnxruntime is not installed.
    """
    folder = Path(onnxruntime().__file__).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so.*")) or sorted(folder.glob("libonnxruntime*.dylib"))
    if not found:
        raise MissingTool("the installed onnxruntime holds no library to link with", next_step="Use Linux or macOS.")
    return found[0]


def api_version(folder: Path) -> int:
    """ORT_API_VERSION of the headers in a folder."""
    match = _API.search((folder / HEADER).read_text("utf-8", errors="replace"))
    if match is None:
        raise MissingTool(f"{HEADER} does not say which version it is of", next_step="Install other headers.")
    return int(match[1])


def runtime_root(scratch: Path) -> Path:
    """A folder as a release of ONNX Runtime has it: `include/`, and `lib/` with the names that a linker wants.

    Raises:
        MissingTool: Headers or library are missing, or the headers are newer than the library.
    """
    include, lib, version = headers(), library(), str(onnxruntime().__version__)
    if api_version(include) > int(version.split(".")[1]):
        raise MissingTool(
            f"the headers are of ONNX Runtime 1.{api_version(include)}, newer than the library {version}",
            next_step="Install older headers or a newer onnxruntime.",
        )
    root = scratch / "onnxruntime"
    (root / "lib").mkdir(parents=True, exist_ok=True)
    _link(root / "include", include)
    suffixes = (".1.dylib", ".dylib") if lib.suffix == ".dylib" else (".so.1", ".so")
    for suffix in suffixes:
        _link(root / "lib" / f"libonnxruntime{suffix}", lib)
    return root


def build_with_cmake(folder: Path, build: Path, *options: str, compiler: str = "c++") -> None:
    """Configure and build a folder.

    Raises:
        MissingTool: CMake or the compiler (`c++` or `cc`) is missing.
        BuildFailed: With the first error.
    """
    cmake = require_tool("cmake", "Install CMake (Debian: apt-get install cmake make).")
    require_tool(compiler, "Install a compiler (Debian: apt-get install g++).")
    _step([cmake, "-S", folder, "-B", build, *options], folder)
    _step([cmake, "--build", build, "--parallel", str(min(os.cpu_count() or 1, 4))], folder)


def _step(command: Sequence[str | Path], folder: Path) -> None:
    done = run_tool(command, folder)
    if done.returncode:
        lines = (done.stdout + "\n" + done.stderr).splitlines()
        told = [line.strip() for line in lines if re.search(r"\b(fatal error|error)\b", line, re.IGNORECASE)]
        raise BuildFailed((told or lines or ["it failed"])[0].replace(f"{folder}{os.sep}", "")[:300])


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())


class NativeTarget(Target):
    """A consumer that CMake builds against ONNX Runtime.

    Attributes:
        package: The sub-package that holds its files.
        files: Those that are copied as they are.
        types: numpy's names to the language's types that hold such a number as it is.
        build: What CMakeLists.txt is filled in with.
        compiler: The program that has to be there.
    """

    package: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    types: ClassVar[Mapping[str, str]]
    build: ClassVar[Mapping[str, str]]
    compiler: ClassVar[str]

    def programs(self, bundle: Bundle) -> list[str]:
        """The programs that CMake builds and the check runs, `check` first."""
        return ["check", "example"]

    def example(self, index: int, example: ExampleInput) -> dict[str, Any]:
        """What the example's template reads of one input."""
        return {
            "index": index,
            "name": quoted(example.name)[1:-1],
            "dtype": example.dtype,
            "type": self.types.get(example.dtype),
            "open_shape": example.open_shape,
            "rank": len(example.shape),
            "shape": "{" + ", ".join(map(str, example.shape)) + "}",
            "size": example.size,
            "numbers": "{" + example.listed() + "}" if example.numbers else "",
            "fill": example.fill,
        }

    def write(self, bundle: Bundle, folder: Path) -> None:
        lay_out(bundle, folder)
        suffix, programs = self.build["suffix"], self.programs(bundle)
        copy_files(Path(__file__).parent / self.name, folder, self.files)
        inputs = [self.example(i, example) for i, example in enumerate(example_inputs(bundle))]
        values = {"name": one_line(bundle.name), "signature": bundle.signature, "programs": programs}
        values |= {"about": about(bundle), "inputs": inputs}
        self.write_cmake(folder, programs)
        for name in (f"example.{suffix}", "README.md"):
            (folder / name).write_text(render(self.package, f"{name}.j2", **values), "utf-8", newline="\n")

    def write_cmake(self, folder: Path, programs: Sequence[str]) -> None:
        """Write CMakeLists.txt for some programs; C and C++ share it."""
        text = render(f"{__package__}.cpp", "CMakeLists.txt.j2", programs=programs, **self.build)
        (folder / "CMakeLists.txt").write_text(text, "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        root, build = runtime_root(scratch), scratch / "build"
        versions = {"onnxruntime": str(onnxruntime().__version__), "headers": f"1.{api_version(headers())}"}
        try:
            build_with_cmake(folder, build, f"-DONNXRUNTIME_ROOT={root}", compiler=self.compiler)
        except BuildFailed as error:
            return Check(FAILED, str(error), ("generated",), COMMAND, versions=versions)
        outputs = [spec.name for spec in bundle.signature.outputs]
        outputs += ["generated_tokens"] * ("generate" in self.programs(bundle))
        result = run_all(build, self.programs(bundle), folder)
        return judge(result, outputs, command=COMMAND, stages=("generated", "compiled", "run"), versions=versions)


def run_all(build: Path, programs: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run programs, each with its arguments, one after the other; the exit code is that of the first which fails."""
    total = subprocess.CompletedProcess[str](list(programs), 0, "", "")
    for program, *arguments in map(str.split, programs):
        done = run_tool([build / program, *arguments], folder)
        total.returncode = total.returncode or done.returncode
        total.stdout += done.stdout
        total.stderr += done.stderr
    return total

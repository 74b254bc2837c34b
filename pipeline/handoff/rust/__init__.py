# SPDX-License-Identifier: Apache-2.0
"""Rust without a crate: the C consumer's model.c, compiled by build.rs, and a safe face over it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ....runtime.onnxruntime_engine import onnxruntime
from ....runtime.opened import Bundle
from ..base import FAILED, Check, Target, copy_files, judge, render, require_tool, run_tool
from ..example_inputs import about, example_inputs, one_line, quoted
from ..model_files import lay_out, place_files
from ..native import api_version, headers, run_all, runtime_root

_HERE = Path(__file__).parent
_PLACES = {
    **{name: name for name in ("Cargo.toml", "Cargo.lock", "rustfmt.toml", "build.rs")},
    **{name: f"src/{name}" for name in ("lib.rs", "model.rs", "tensor.rs", "golden.rs")},
    "check.rs": "src/bin/check.rs",
}
_NATIVE = ("model.h", "model.c")
COMMAND = "ONNXRUNTIME_ROOT=... cargo run --release --bin check"


class Rust(Target):
    """A crate without dependencies."""

    name: ClassVar[str] = "rust"
    summary: ClassVar[str] = "a crate without dependencies over ONNX Runtime's C interface"

    def write(self, bundle: Bundle, folder: Path) -> None:
        lay_out(bundle, folder)
        place_files(_HERE, folder, _PLACES)
        copy_files(_HERE.parent / "c", folder / "native", _NATIVE)
        (folder / "examples").mkdir()
        inputs = [
            {
                "name": quoted(example.name)[1:-1],
                "dtype": example.dtype,
                "open_shape": example.open_shape,
                "shape": str(list(example.shape)),
                "type": example.dtype.capitalize(),
                "numbers": _numbers(example.dtype, example.listed()) if example.numbers else "",
                "size": example.size,
                "fill": "0" if _is_bits(example.dtype) else example.fill,
            }
            for example in example_inputs(bundle)
        ]
        values = {
            "name": one_line(bundle.name),
            "about": about(bundle),
            "inputs": inputs,
            "signature": bundle.signature,
        }
        for template, place in (("example.rs.j2", "examples/example.rs"), ("README.md.j2", "README.md")):
            (folder / place).write_text(render(__name__, template, **values), "utf-8", newline="\n")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        cargo = require_tool("cargo", "Install Rust (Debian: apt-get install cargo).")
        require_tool("cc", "Install a C compiler (Debian: apt-get install gcc).")
        root, target = runtime_root(scratch), scratch / "target"
        versions = {
            "onnxruntime": str(onnxruntime().__version__),
            "headers": f"1.{api_version(headers())}",
            "cargo": run_tool([cargo, "--version"], folder).stdout.split(" ")[1].strip(),
        }
        environment = {"ONNXRUNTIME_ROOT": str(root), "CARGO_TARGET_DIR": str(target), "CARGO_TERM_COLOR": "never"}
        built = run_tool([cargo, "build", "--offline", "--locked", "--bins", "--examples"], folder, more=environment)
        if built.returncode:
            errors = [line.strip() for line in built.stderr.splitlines() if line.strip().startswith("error")]
            return Check(FAILED, (errors or ["cargo failed"])[0][:300], ("generated",), COMMAND, versions=versions)
        result = run_all(target / "debug", ["check", "examples/example"], folder)
        outputs = [spec.name for spec in bundle.signature.outputs]
        return judge(result, outputs, command=COMMAND, stages=("generated", "compiled", "run"), versions=versions)


def _is_bits(dtype: str) -> bool:
    """Whether Rust has no type of its own for it, so that the numbers are written as bits."""
    return dtype in ("float16", "bfloat16")


def _numbers(dtype: str, listed: str) -> str:
    return "" if _is_bits(dtype) else f"[{listed}]"


TARGETS: dict[str, Target] = {"rust": Rust()}

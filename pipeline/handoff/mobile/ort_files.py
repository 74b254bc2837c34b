# SPDX-License-Identifier: Apache-2.0
"""A model in ONNX Runtime's own format (.ort), which its smallest builds read, and the operators that they have to
hold.

Two files, by ONNX Runtime's own converter in a process of its own. `model.ort` ("Fixed") has every optimization for ARM
done. `model.with_runtime_opt.ort` ("Runtime") keeps the standard operators that NNAPI and Core ML know and saves what
to optimize in the rest, which ONNX Runtime 1.31 replays only if told to. The two `.config` files list operators and
types for `--include_ops_by_config`. Reference: onnxruntime.ai, "ORT model format".
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from ....contracts.errors import InputError
from ....runtime.onnxruntime_engine import onnxruntime
from ..base import run_tool

FIXED, RUNTIME = "model.ort", "model.with_runtime_opt.ort"
CONFIGS = ("required_operators_and_types.config", "required_operators_and_types.with_runtime_opt.config")
"""The converter puts `model.` before these names."""

REPLAY = "session.enable_saved_runtime_optimizations"
_LARGEST = 2**31
"""A flatbuffer addresses itself with 31 bits."""


def write_ort(model: Path, folder: Path) -> None:
    """Convert `model.onnx`, external data beside it, and write both files and both configurations into `folder`.

    Raises:
        InputError: It is too large for one file, or the converter refuses it.
    """
    onnxruntime()
    size = sum(path.stat().st_size for path in model.parent.iterdir() if path.is_file())
    if size >= _LARGEST:
        raise InputError(
            f"the model has {size / 2**30:.1f} GiB; an .ort file holds less than 2",
            next_step="Press it with a smaller recipe, such as int4.",
        )
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(model)]
        command += ["--output_dir", place, "--optimization_style", "Fixed", "Runtime"]
        command += ["--enable_type_reduction", "--target_platform", "arm"]
        done = run_tool(command, model.parent)
        made, wanted = Path(place), (FIXED, RUNTIME, *(f"model.{name}" for name in CONFIGS))
        if done.returncode or not all((made / name).is_file() for name in wanted):
            told = (done.stderr.strip() or done.stdout.strip() or "it wrote nothing").splitlines()[-1]
            raise InputError(f"ONNX Runtime's converter to .ort refuses the model: {told[:300]}")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FIXED, RUNTIME):
            shutil.copyfile(made / name, folder / name)
        for name in CONFIGS:
            text = _without_paths((made / f"model.{name}").read_text("utf-8"))
            (folder / name).write_text(text, "utf-8", newline="\n")


def _without_paths(text: str) -> str:
    """The converter writes which files it read, with their folders, into its comments."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(["# operators;opset;types, as ONNX Runtime's --include_ops_by_config reads them", *lines]) + "\n"

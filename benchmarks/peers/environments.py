# SPDX-License-Identifier: Apache-2.0
"""Virtual environments for other people's tools: none of them lives with another one, or with onnxpress."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PACKAGES = {
    "onnxruntime": ["onnxruntime", "onnx", "sympy"],  # sympy for its own shape inference
    "nncf": ["nncf==3.4.0", "onnx", "onnxruntime"],  # 450 MB, without torch; without openvino nothing is sent home
    "pictures": ["pillow==13.0.0", "numpy"],
    "genai": ["onnxruntime-genai==0.18.0", "torch", "transformers", "onnx", "onnx-ir", "sympy"],  # with its builder
    "zipnn": ["zipnn==0.5.4", "torch", "numpy"],  # torch is named for its pinned build without CUDA
}
_HERE = Path(__file__).parent


@dataclass
class Attempt:
    """What a tool left: the file, how long it took, or what it said instead; `note` is what else it said."""

    file: Path | None
    seconds: float | None
    problem: str = ""
    note: str = ""


def interpreter(home: Path, packages: Sequence[str], *options: str) -> Path:
    """The interpreter of the environment in `home`, which is made with `packages` when it is first asked for.

    Args:
        home: Its folder, by whose last part it is called.
        packages: What pip installs.
        options: Of pip.
    """
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (home / "complete").exists():
        print(f"... making an environment for {home.name}: {', '.join(packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, *options, *packages], check=True)
        (home / "complete").touch()
    return python


class Environments:
    """Makes each environment when it is first asked for.

    Args:
        folder: Where they are made.
        threads: Given to the tools as OMP_NUM_THREADS.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder.resolve(), threads

    def python(self, name: str) -> Path:
        """The interpreter of an environment, with its packages at the versions of constraints.txt."""
        return interpreter(self.folder / name, PACKAGES[name], "--constraint", str(CONSTRAINTS))

    def run(self, name: str, script: str, *words: object) -> str:
        """Run one of the scripts beside this file and return its last line; raises with what it said last instead."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TQDM_DISABLE": "1", "NO_COLOR": "1"}
        command = [str(self.python(name)), str(_HERE / script), *map(str, words)]
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:  # onnxruntime leaves files where it is started
            done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(_last_words(done.stderr) or f"exit code {done.returncode}")
        return (done.stdout.strip().splitlines() or [""])[-1]

    def quantize(self, name: str, script: str, method: str, model: Path, calibration: Path, out: Path) -> Attempt:
        try:
            line = self.run(name, script, method, model, calibration, out)
        except RuntimeError as error:
            return Attempt(None, None, str(error))
        printed = json.loads(line)
        return Attempt(out, float(printed["seconds"]), note=str(printed.get("note", "")))


def _last_words(text: str) -> str:
    """The error of a traceback, word for word but on one line and without folders."""
    lines = text.strip().splitlines()
    start = max((i for i, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception|Fail)\b", line)), default=-1)
    return re.sub(r"/\S*/", "", " ".join(" ".join(lines[start:]).split()))[:300]

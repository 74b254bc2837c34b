# SPDX-License-Identifier: Apache-2.0
"""An environment for each peer, with the onnxruntime and numpy that this one has."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = {
    "mlserver": ["mlserver==1.7.1"],
    "litserve": ["litserve==0.2.19"],
    "bentoml": ["bentoml==1.4.40"],
    "schemathesis": ["schemathesis==4.32.5"],
}
_WITH_MODEL = ("mlserver", "litserve", "bentoml")


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of an environment, made when it is first asked for."""
    home = folder.resolve() / name
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        packages = list(PACKAGES[name])
        if name in _WITH_MODEL:
            packages += [f"{package}=={version(package)}" for package in ("onnxruntime", "numpy")]
        print(f"... making an environment for {name}: {', '.join(packages)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (home / "complete").touch()
    return python

# SPDX-License-Identifier: Apache-2.0
"""An environment for each peer, with the onnxruntime and numpy that this one has."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from ..peers.environments import interpreter

PACKAGES = {
    "mlserver": ["mlserver==1.7.1"],
    "litserve": ["litserve==0.2.19"],
    "bentoml": ["bentoml==1.4.40"],
    "schemathesis": ["schemathesis==4.32.5"],
}
_WITH_MODEL = ("mlserver", "litserve", "bentoml")


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of an environment, made when it is first asked for."""
    packages = list(PACKAGES[name])
    if name in _WITH_MODEL:
        packages += [f"{package}=={version(package)}" for package in ("onnxruntime", "numpy")]
    return interpreter(folder.resolve() / name, packages)

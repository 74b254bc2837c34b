# SPDX-License-Identifier: Apache-2.0
"""Load time and peak memory of one model, measured in a process that does nothing else.

    python -m onnxpress.runtime.probe MODEL --inputs FILE.npz|FILE.safetensors [--provider cpu] [--threads N]

prints one line: {"load_ms": 41.3, "peak_rss_mb": 118.2}. Memory is in MiB and includes Python, numpy and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..contracts.errors import InputError, OnnxpressError
from ..contracts.process import peak_rss_mib
from .session import Array, Session


def command(model: Path | str, inputs: Path | str, *, provider: str = "cpu", threads: int = 1) -> list[str]:
    """Return the command line that probes a model: what `Contender.probe` wants."""
    # -P: a folder named like one of our packages in the current directory must not be imported instead.
    head = [sys.executable, "-P", "-m", "onnxpress.runtime.probe", str(model)]
    return [*head, "--inputs", str(inputs), "--provider", provider, "--threads", str(threads)]


def read_inputs(path: Path) -> dict[str, Array]:
    """Read one set of inputs: arrays by input name, or the first sample of a bundle's `golden/inputs.safetensors`.

    Raises:
        InputError: The file is absent, or neither a `.npz` nor a `.safetensors` file.
    """
    if not path.is_file():
        raise InputError(f"there is no input file {path}")
    if path.suffix == ".npz":
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, ValueError, EOFError, TypeError, BadZipFile) as error:
            raise InputError(f"{path.name} cannot be read as .npz") from error
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path.name} cannot be read as .safetensors") from error
    else:
        raise InputError(f"{path.name} holds no inputs that are known here", next_step="Give a .npz or .safetensors.")
    first = {name.removeprefix("0/"): array for name, array in arrays.items() if name.startswith("0/")}
    return first or arrays


def main(arguments: list[str] | None = None) -> int:
    """Run the probe and return its exit code."""
    parser = argparse.ArgumentParser(prog="onnxpress.runtime.probe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    try:
        feeds = read_inputs(options.inputs)
        session = Session(options.model, provider=options.provider, threads=options.threads)
        session.run(feeds)
    except OnnxpressError as error:
        sys.stderr.write(f"{error} {error.next_step}".strip() + "\n")
        return error.exit_code
    result = {"load_ms": round(session.load_ms, 3), "peak_rss_mb": round(peak_rss_mib(), 1)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

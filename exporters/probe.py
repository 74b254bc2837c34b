# SPDX-License-Identifier: Apache-2.0
"""Load time and peak memory of the PyTorch original, in a process of its own.

    python -m onnxpress.exporters.probe SOURCE --inputs inputs.npz --threads 2 [--task T] [--settings JSON] [--bfloat16]

prints one line of JSON: {"load_ms": ..., "peak_rss_mb": ...} (milliseconds; MiB of resident memory at the highest).
Loading counts from after the imports; memory counts everything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from ..contracts.errors import OnnxpressError
from ..contracts.process import peak_rss_mib


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m onnxpress.exporters.probe")
    parser.add_argument("source")
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--task")
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--bfloat16", action="store_true")
    options = parser.parse_args(arguments)

    try:
        result = measure(options)
    except OnnxpressError as error:
        sys.stderr.write(f"{error} {error.next_step}".strip() + "\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Load the original, call it once, and return what that took."""
    import torch

    from .settings import ExportSettings
    from .sources import form_of, load_reference

    torch.set_num_threads(options.threads)
    settings = ExportSettings.model_validate_json(options.settings)
    feeds = dict(np.load(options.inputs, allow_pickle=False))
    if form_of(options.source, settings)[0] == "transformers":
        import transformers  # noqa: F401 - imported before the clock starts

    started = time.perf_counter()
    reference = load_reference(options.source, options.task, settings)
    if options.bfloat16:
        reference.cast_to_bfloat16()
    load_ms = 1000 * (time.perf_counter() - started)
    with torch.inference_mode():
        reference.call(feeds)
    return {"load_ms": round(load_ms, 3), "peak_rss_mb": round(peak_rss_mib(), 1)}


if __name__ == "__main__":
    raise SystemExit(main())

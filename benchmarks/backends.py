# SPDX-License-Identifier: Apache-2.0
"""What each backend makes of tiny models: seconds, nodes after cleaning, error against PyTorch, or why it fails.

    .venv/bin/python -m benchmarks.backends                 # the table, on standard output
    .venv/bin/python -m benchmarks.backends --quick         # three models
    .venv/bin/python -m benchmarks.backends --write         # into the README
    .venv/bin/python -m benchmarks.backends mamba:text-generation

The orders in `exporters/attempts.py` are taken from it. The first export of a process pays for imports, so one of each
backend is made before the clock starts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coverage import subject
from .markdown import environment, table, write_section

MODELS = (
    "bert:feature-extraction", "deberta-v2:text-classification", "modernbert:fill-mask", "longformer:fill-mask",
    "gpt2:text-generation", "llama:text-generation", "mixtral:text-generation", "mamba:text-generation",
    "t5:text2text-generation", "vit:image-classification", "swin:image-classification", "detr:object-detection",
    "wav2vec2:automatic-speech-recognition", "clip:zero-shot-image-classification",
)  # fmt: skip

QUICK = MODELS[:1] + MODELS[4:5] + MODELS[9:10]


@dataclass(frozen=True)
class Row:
    """One model, one backend: what came of it."""

    seconds: float
    nodes: int | None = None
    error: float | None = None
    reason: str = ""

    def shown(self) -> list[str]:
        if self.reason:
            return [f"{self.seconds:.1f}", "–", self.reason.replace("|", "/")[:90]]
        return [f"{self.seconds:.1f}", str(self.nodes), f"{self.error:.0e}"]


def main() -> None:
    options = _parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from onnxpress.exporters.backends import BACKENDS, is_available
    from onnxpress.pipeline.versions import versions
    from onnxpress.runtime.machine import machine

    backends = [name for name in BACKENDS if is_available(name)]
    for backend in backends:
        _try(QUICK[0], backend)
    rows = []
    for model in options.models or (QUICK if options.quick else MODELS):
        cells = [_try(model, backend) for backend in backends]
        rows.append([model.replace(":", ", "), *(text for cell in cells for text in cell.shown())])
        print(*rows[-1], sep=" | ", flush=True)
    columns = ["model", *(f"{name}{part}" for name in backends for part in (", s", ": nodes", ": error"))]
    text = table("**Backends** (tiny models, one thread; error relative to PyTorch)", columns, rows)
    text += "\n\n" + environment(machine(), versions(), ("torch", "transformers", "onnxruntime"))
    print(text)
    if options.write:
        write_section("backends", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="type:task")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    return parser


def _try(model: str, backend: str) -> Row:
    """Export one tiny model with one backend alone, and hold every graph of it to PyTorch."""
    from onnxpress.contracts.tasks import TASKS
    from onnxpress.exporters.attempts import load_proven
    from onnxpress.exporters.settings import ExportSettings

    model_type, _, task = model.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / model_type
        subject.save(subject.build(model_type, TASKS[task]), source)
        found: list[tuple[int, float]] = []
        settings = ExportSettings.model_validate({"backend": backend})
        started = exported_at = time.perf_counter()

        def prove(exported: Any) -> None:
            nonlocal exported_at
            exported_at = time.perf_counter()
            parts: Sequence[Any] = (exported, *getattr(exported, "companions", ()))
            found.extend(_nodes_and_error(part, Path(folder)) for part in parts)

        try:
            load_proven(str(source), task, settings, prove)
        except Exception as error:  # noqa: BLE001 - it is the result
            return Row(time.perf_counter() - started, reason=" ".join(str(error).split()))
        return Row(exported_at - started, sum(nodes for nodes, _ in found), max(error for _, error in found))


def _nodes_and_error(part: Any, folder: Path) -> tuple[int, float]:
    from onnxpress.exporters import graph_file
    from onnxpress.pipeline.inputs import comparison_cases
    from onnxpress.pipeline.passes.base import run_pass
    from onnxpress.pipeline.passes.clean import Clean
    from onnxpress.pipeline.proof import prove_export

    cleaned, _ = run_pass(Clean(), part.model.clone())
    file = folder / "graph.onnx"
    graph_file.write(cleaned, file)
    parity = prove_export(part, file, part.reference.run, comparison_cases(part, None), 1e-3, threads=1)
    return len(list(cleaned.graph.all_nodes())), parity.worst("relative_error", lowest=False) or 0.0


if __name__ == "__main__":
    main()

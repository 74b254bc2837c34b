# SPDX-License-Identifier: Apache-2.0
"""One trial: build a tiny model, save it, export the folder as a user would, and hold the graphs to PyTorch."""

from __future__ import annotations

import gc
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from onnxpress.contracts.errors import InputError, OnnxpressError
from onnxpress.contracts.tasks import TASKS

from .results import DIFFERS, NOT_BUILT, NOT_EXPORTED, NOT_RUN, PASSES, Result

TOLERANCE = 1e-3
"""Relative error of an output that is still called the same: `validation.export_tolerance` of every recipe."""


def preload() -> None:
    """Import what a trial needs, for processes that are forked from this one."""
    import onnxruntime
    import torch
    import transformers

    from onnxpress.exporters import attempts, dynamo, torchscript, transformers_source
    from onnxpress.pipeline import inputs, proof
    from onnxpress.pipeline.passes import clean

    del inputs, proof, clean, attempts, dynamo, torchscript, transformers_source
    torch.set_num_threads(1)
    onnxruntime.set_default_logger_severity(4)
    transformers.logging.set_verbosity_error()


def run(model_type: str, task_name: str, folder: Path) -> Result:
    """Try one model type for one task in `folder`, which is left with what was written."""
    started = time.process_time()
    trial = _Trial(model_type, task_name, folder)
    state, reason = PASSES, ""
    try:
        trial.run()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        state, reason = trial.state_after(error), _line(error, folder)
    return Result(
        model_type, task_name, state, reason, seconds=round(time.process_time() - started, 1),
        versions={name: version(name) for name in ("torch", "transformers", "onnxruntime")}, **trial.found,
    )  # fmt: skip


class _Trial:
    """What is known of a trial so far: `found` holds fields of its `Result`."""

    def __init__(self, model_type: str, task_name: str, folder: Path) -> None:
        self.model_type, self.task, self.folder = model_type, TASKS[task_name], folder
        self.found: dict[str, Any] = {}
        self.built = self.exported = False

    def run(self) -> None:
        from onnxpress.exporters.attempts import load_proven
        from onnxpress.exporters.settings import ExportSettings

        from . import subject

        model = subject.build(self.model_type, self.task)
        self.found["model_class"] = type(model).__name__
        self.found["parameters"] = sum(p.numel() for p in model.parameters())
        source = self.folder / self.model_type
        subject.save(model, source)
        del model
        gc.collect()
        self.built = True
        exported = load_proven(str(source), self.task.name, ExportSettings(), self._prove)
        self.found["backend"] = str(exported.export_details.get("backend", ""))

    def state_after(self, error: Exception) -> str:
        if not self.built:
            return NOT_BUILT
        if isinstance(error, InputError) and "fails in PyTorch" in error.message:
            return NOT_RUN
        return DIFFERS if self.exported else NOT_EXPORTED

    def _prove(self, exported: Any) -> None:
        """Each graph as the pipeline writes it, cleaned, against the original, on the pipeline's own cases."""
        self.exported = True
        self.found |= {"nodes": 0, "cases": [], "error": None}
        for part in (exported, *exported.companions):
            self._prove_part(part)

    def _prove_part(self, part: Any) -> None:
        from onnxpress.exporters import graph_file
        from onnxpress.pipeline.inputs import comparison_cases
        from onnxpress.pipeline.passes.base import run_pass
        from onnxpress.pipeline.passes.clean import Clean
        from onnxpress.pipeline.proof import prove_export

        cleaned, _ = run_pass(Clean(), part.model.clone())
        self.found["nodes"] += sum(graph_file.operator_counts(cleaned).values())
        file = self.folder / f"{part.name or 'model'}.onnx"
        graph_file.write(cleaned, file)
        cases = comparison_cases(part, None)
        self.found["cases"] += [case.name for case in cases]
        parity = prove_export(part, file, part.reference.run, cases, TOLERANCE, threads=1)
        error = parity.worst("relative_error", lowest=False)
        self.found["error"] = max(e for e in (error, self.found["error"], 0.0) if e is not None)


_PLACE = re.compile(r"(/[\w.@+-]+)+/(?=[\w.-]+\.py)")


def _line(error: BaseException, folder: Path) -> str:
    """What an error says, in one line, without a path of this machine."""
    text = error.message if isinstance(error, OnnxpressError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split()).replace(f"{folder}/", "").replace(str(folder), "")
    return _PLACE.sub("", text)[:600]

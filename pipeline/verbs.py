# SPDX-License-Identifier: Apache-2.0
"""The verbs that are one stage of a press: validate, benchmark, inspect (`export` is in `exporting`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..contracts.errors import BundleError, InputError
from ..contracts.signature import Signature
from ..contracts.tasks import FEATURES
from ..exporters import graph_file, sources
from ..exporters.attempts import load_proven
from ..exporters.exported import ExportedModel, SourceInfo
from ..runtime import machine as machine_facts
from ..runtime.benchmark import Contender, measure
from ..runtime.bundle import read_manifest
from ..runtime.session import Session
from .data import Dataset
from .evaluate import evaluate, metric_names
from .gates import MEASURED, Gate, check_names, require_all
from .inputs import benchmark_settings, comparison_cases
from .passes.base import run_pass
from .passes.clean import Clean
from .progress import Progress
from .recipe import Recipe
from .token_identity import cut_of_bundle
from .validate import Run, compare

_LOWEST = ("sqnr_db", "cosine", "top1_agreement")
_HIGHEST = ("max_abs_error", "relative_error")
"""The errors that a gate may name, by which end of them over all outputs is the worst."""


def _trusted(exported: ExportedModel) -> None:
    """No check: the original alone is wanted, and what names its inputs and outputs is the graph."""


def reference_run(exported: ExportedModel) -> Run:
    """The original as a function: PyTorch, or the unmodified graph for an `.onnx` source."""
    if exported.reference is not None:
        return exported.reference.run
    assert exported.original_file is not None
    return Session(exported.original_file).run


def model_file(candidate: Path) -> Path:
    """The `.onnx` behind a path: the file itself, or the first variant of a bundle."""
    if candidate.is_dir():
        manifest = read_manifest(candidate)
        try:
            path = next(iter(manifest["variants"].values()))["path"]
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise BundleError(f"{candidate}: its manifest names no model", next_step="Press it again.") from None
        file: Path = (candidate / str(path)).resolve()
        if not file.is_relative_to(candidate.resolve()):
            raise BundleError(f"{candidate}: its model lies outside the bundle", next_step="Press it again.")
        return file
    if not candidate.is_file():
        raise InputError(f"no such file or bundle: {candidate}", next_step="Check the path.")
    return candidate


def validate_candidate(
    source: str,
    candidate: Path,
    task: str | None,
    data: Dataset | None,
    provider: str,
    gates: list[str],
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    """Parity and task metrics of an `.onnx` or bundle against the original, judged by the gates."""
    parsed = [Gate.parse(text) for text in gates]
    for gate in parsed:
        if gate.name in MEASURED and gate.name not in (*_LOWEST, *_HIGHEST):
            raise InputError(f"gate '{gate.expression}' is not measured by validate", next_step="Use: onnxpress press.")
    session = Session(model_file(candidate), provider=provider)
    progress("export", source)
    exported = load_proven(source, task, recipe.export, _trusted, progress=progress)
    check_names(parsed, metric_names(exported.task, data))
    reference = original = reference_run(exported)
    cut = cut_of_bundle(exported, candidate)
    if cut is not None:
        original = cut.renumbering.with_cut_outputs(original)
        reference = cut.renumbering.reading_new_ids(original)
    cases = comparison_cases(cut.pressed if cut else exported, data)
    progress("compare", str(candidate))
    parity = compare(reference, session.run, cases, classes=exported.task != FEATURES)
    metrics = {}
    if data is not None:
        progress("evaluate", f"{len(data)} examples of {data.name}")
        metrics = evaluate(exported, data, original, session.run, recipe.validation.batch, cut)
    values: dict[str, float | None] = {k: parity.worst(k, lowest=True) for k in _LOWEST}
    values |= {k: parity.worst(k, lowest=False) for k in _HIGHEST}
    for name, row in metrics.items():
        values[name], values[f"{name}_drop"] = row["candidate"], row["drop"]
    return {
        "candidate": str(candidate),
        "parity": parity.to_json(),
        "parity_cases": parity.cases,
        "parity_padding": parity.padding,
        "metrics": metrics,
        "gates": [gate.judge(values) for gate in parsed],
    }


def require_gates(result: dict[str, Any]) -> None:
    """Raise GateFailed when a gate of a validation did not pass."""
    require_all(result["gates"], "Loosen the gate or choose a milder recipe.")


def benchmark_candidate(
    candidate: Path,
    reference: str | None,
    task: str | None,
    data: Dataset | None,
    provider: str,
    recipe: Recipe,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Time a candidate and, interleaved, the original that it came from."""
    threads = recipe.benchmark.threads or machine_facts.default_threads()
    session = Session(model_file(candidate), provider=provider, threads=threads)
    ours = Contender(candidate.name, provider, session.run)
    contenders = [ours]
    if reference is not None:
        progress("export", reference)
        exported = load_proven(reference, task, recipe.export, _trusted, progress=progress)
        if exported.reference is not None:
            import torch

            torch.set_num_threads(threads)
            contenders.insert(0, Contender("pytorch-fp32", "pytorch", exported.reference.run))
        else:
            assert exported.original_file is not None
            original = Session(exported.original_file, provider=provider, threads=threads)
            contenders.insert(0, Contender("onnx-original", provider, original.run))
        # The original reads the ids of a cut vocabulary as well, and which rows it picks takes no time
        cut = cut_of_bundle(exported, candidate)
        exported = cut.pressed if cut else exported
    else:
        exported = _standalone(candidate, session.signature)
    settings = benchmark_settings(exported, data, recipe.benchmark)
    measured = measure(
        contenders,
        settings,
        rounds=recipe.benchmark.rounds,
        max_seconds=recipe.benchmark.max_seconds,
        threads=threads,
        progress=lambda line: progress("benchmark", line),
    )
    return [m.to_json() for m in measured]


def _standalone(candidate: Path, signature: Signature) -> ExportedModel:
    """What a bundle or file says of itself, for inputs to time it with."""
    exported = sources.load(str(model_file(candidate)))
    exported.signature = signature
    exported.source = SourceInfo("onnx", candidate.name, None, None, None)
    return exported


def groups_of(model: ir.Model) -> dict[str, Any]:
    """What `prune_structured` could cut from a graph, cleaned as recipes do first, and what stays and why."""
    from .structure import analyze

    structure = analyze(run_pass(Clean(), model)[0])
    return {
        "groups": [group.to_json() for group in structure.groups],
        "stays": [vars(stays) for stays in structure.surprises],
        "operators_without_a_rule": structure.unruled,
    }


def inspect_model(path: Path, *, groups: bool = False) -> dict[str, Any]:
    """Signature, opsets, operators, weights by type and size of an `.onnx` or bundle, and its groups if asked."""
    file = model_file(path)
    model = graph_file.read(file)
    by_type: Counter[str] = Counter()
    largest: list[tuple[int, str, str]] = []
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            by_type[str(value.const_value.dtype).lower()] += value.const_value.nbytes
            shape = "x".join(map(str, value.const_value.shape)) or "scalar"
            largest.append((value.const_value.nbytes, name, f"{str(value.const_value.dtype).lower()} {shape}"))
    largest.sort(key=lambda row: (-row[0], row[1]))
    return {
        "file": file.name,
        "bytes": graph_file.file_bytes(file),
        "signature": graph_file.signature_of(model).to_json(),
        "opsets": dict(model.opset_imports),
        "nodes": len(model.graph),
        "operators": graph_file.operator_counts(model),
        "weight_bytes": dict(sorted(by_type.items(), key=lambda item: -item[1])),
        "largest_weights": [{"name": n, "bytes": b, "type": t} for b, n, t in largest[:8]],
        "metadata": dict(model.metadata_props),
        **(groups_of(model) if groups else {}),
    }

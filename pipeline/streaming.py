# SPDX-License-Identifier: Apache-2.0
"""Press a checkpoint that is larger than memory: traced without weights, which go through the passes one at a time.

What differs from `pressing`: there is no session of the fp32 graph, since there is no room for one. That the graph is
the original is proven with the finished file: all of its weights are compared with the checkpoint, and it is run, its
weights left in their file, beside PyTorch, which reads the same weights one layer at a time. Its distance from the
original is measured in the same way, with the checkpoint's weights. Nothing is timed, and no pass may ask for
activations.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts.decoding import Decoding
from ..contracts.errors import ExportError, InputError
from ..contracts.tasks import GENERATION
from ..exporters import graph_file
from ..exporters.exported import Arrays, ExportedModel, SourceInfo
from ..exporters.families.decoder import trace_decoder
from ..exporters.reference import TorchReference
from ..exporters.streamed import StreamedExport, export_streamed, weights_as_called
from ..exporters.tokenizer import processor_files
from ..runtime.session import Session
from . import gates as gate_rules
from .bundle import Staging, write_bundle
from .facts import pressed_facts
from .inputs import Case
from .passes.base import PassReport, run_pass
from .progress import Progress
from .recipe import Recipe
from .streamed_check import WrittenWeights
from .validate import Parity, Run, compare

_TOKENS = 12
_GRAPH_COSINE = 0.99
"""What the graph has to reach beside PyTorch with the same weights: fp16 arithmetic and activations of 8 bits leave
more than 0.999; a wrong graph leaves nothing like it."""


@dataclass
class Streamed:
    """What came of pressing a checkpoint piece by piece; the file is written and compared.

    Attributes:
        exported: The graph, its weights still in the checkpoint.
        file: The pressed graph.
        reports: Of the passes.
        bytes: Of the file and its data.
        reference_bytes: Of the same graph in fp32.
        weights: How the file's weights compare with the checkpoint's.
        parity: Of the file with the original; `graph_parity`: with PyTorch on the file's own weights.
        cases: Inputs that it was run on.
    """

    exported: StreamedExport
    file: Path
    reports: list[PassReport]
    bytes: int
    reference_bytes: int
    weights: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    parity: Parity = field(default_factory=Parity)
    graph_parity: Parity = field(default_factory=Parity)


def press_streamed(
    folder: Path,
    name: str,
    recipe: Recipe,
    output: Path,
    *,
    task: str | None = None,
    force: bool = False,
    sign: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Path | None]:
    """Press the transformers model in `folder`; returns the manifest, and the bundle's folder if the gates passed.

    Raises:
        InputError: A pass of the recipe measures activations, the task is not text-generation, or see
            `export_streamed`.
        ExportError: The graph cannot be traced, or does not agree with PyTorch.
        GateFailed: The written weights are not the checkpoint's.
    """
    say = progress or Progress()
    _refuse(recipe, task or GENERATION)
    gates = recipe.parsed_gates()
    gate_rules.check_names(gates, [])
    with Staging(output, force=force, key=sign) as staging:
        file = staging.variant_path(recipe.file_name)
        pressed = write_streamed(folder, recipe, file, say)
        candidate, reference = prove_streamed(pressed, say)
        exported = _exported(pressed, folder, name)
        manifest = _manifest(pressed, exported, recipe)
        manifest["name"] = staging.target.name
        values = {key: pressed.parity.worst(key, lowest=low) for key, low in _ERRORS.items()}
        values["size_ratio"] = manifest["size"]["ratio"]
        manifest["gates"] = [gate.judge(values) for gate in gates]
        accepted = all(gate["passed"] for gate in manifest["gates"])
        manifest["status"] = "accepted" if accepted else "refused"
        if not accepted:
            return manifest, None
        say("bundle", str(output))
        write_bundle(staging, manifest, exported, recipe, pressed.cases, reference, candidate, "cpu", load=False)
        return manifest, staging.publish()


def export_streamed_file(folder: Path, output: Path, recipe: Recipe, *, progress: Progress) -> dict[str, Any]:
    """Write the pressed graph alone to `output`, if it agrees with the original.

    Raises:
        InputError, ExportError, GateFailed: As `press_streamed`; what was at `output` is then still there.
    """
    draft = output.with_name(f".{output.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # a killed run's
        pressed = write_streamed(folder, recipe, draft / output.name, progress)
        prove_streamed(pressed, progress)
        graph_file.into_place(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    model = graph_file.read(output)
    return {
        "file": str(output),
        "bytes": pressed.bytes,
        "nodes": len(model.graph),
        "task": GENERATION,
        "export": pressed.exported.details,
        "signature": graph_file.signature_of(model).to_json(),
        "weights": pressed.weights,
        "parity": pressed.graph_parity.to_json(),
        "relative_error": pressed.graph_parity.worst("relative_error", lowest=False),
    }


def write_streamed(folder: Path, recipe: Recipe, file: Path, say: Progress) -> Streamed:
    """Trace, run the passes, write the file, and compare its weights with the checkpoint's."""
    say("export", folder.name)
    exported = export_streamed(folder, "AutoModelForCausalLM", trace_decoder, opset=recipe.export.opset)
    model, reports = exported.graph, []
    reference_bytes = graph_file.weight_bytes(model)
    source, aliases, joined = model, dict[str, str](), dict[str, tuple[str, int]]()
    for settings in recipe.built_passes():
        say("pass", settings.name)
        if settings.name not in _GRAPH_PASSES:
            model = model.clone()
        model, report = run_pass(settings, model)
        if settings.name in _GRAPH_PASSES:
            source = model
            aliases |= report.details.get("merged_into", {})
        joined |= report.details.get("joined", {})
        reports.append(report)
    say("write", file.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    size = graph_file.write(model, file, external_from=0)
    say("compare", "all weights with the checkpoint's")
    check = WrittenWeights(file, source, aliases, joined).check().to_json()
    exported.graph = source
    exported.details |= {"aliases": aliases, "joined": joined}
    return Streamed(exported, file, reports, size, reference_bytes, check)


def prove_streamed(pressed: Streamed, say: Progress) -> tuple[Run, Run]:
    """Run the file beside PyTorch, on its own weights and on the checkpoint's; returns file and original as functions.

    Raises:
        ExportError: On its own weights, PyTorch computes something else.
    """
    exported, traced = pressed.exported, pressed.exported.traced
    session = Session(pressed.file, in_place=True)
    original = TorchReference(traced.reference, traced.inputs, traced.outputs, name="pytorch-fp32")
    aliases, joined = (exported.details.pop(key) for key in ("aliases", "joined"))
    written = WrittenWeights(pressed.file, exported.graph, aliases, joined)

    def with_weights(read: Callable[[str], np.ndarray | None] | None) -> Run:
        def run(feeds: Arrays) -> Arrays:
            with weights_as_called(exported.model, exported.checkpoint, read):
                outputs: Arrays = original.run(feeds)
            return outputs

        return run

    candidate, reference = _once(session.run), _once(with_weights(None))
    pressed.cases = _cases(exported, candidate)
    say("compare", "the graph with PyTorch, on the same weights")
    pressed.graph_parity = compare(with_weights(written.parameter), candidate, pressed.cases)
    cosine = pressed.graph_parity.worst("cosine", lowest=True)
    if cosine is None or not cosine >= _GRAPH_COSINE:
        raise ExportError(
            f"the graph differs from PyTorch on the same weights: cosine {cosine}, and {_GRAPH_COSINE} is asked for",
            next_step="Run again with --debug and report it.",
        )
    say("compare", "candidate with the original")
    pressed.parity = compare(reference, candidate, pressed.cases)
    return candidate, reference


_GRAPH_PASSES = ("clean", "fuse", "narrow")
"""Passes that leave weights what they are; what follows casts or rounds them."""

_ERRORS = {"sqnr_db": True, "cosine": True, "max_abs_error": False, "relative_error": False, "top1_agreement": True}
"""Errors that a gate may name, and whether the lowest is the worst."""


def _refuse(recipe: Recipe, task: str) -> None:
    measuring = [settings.name for settings in recipe.built_passes() if settings.needs]
    if measuring:
        raise InputError(
            f"pass {measuring[0]} measures activations, for which the model would have to be in memory",
            next_step="Choose recipe fp16, bf16 or int4, or set export.weights=memory on a larger machine.",
        )
    if task != GENERATION:
        raise InputError(
            f"models for {task} are not streamed, only those for {GENERATION}",
            next_step="Add --set export.weights=memory, on a machine with enough memory.",
        )


def _once(run: Run) -> Run:
    """`run`, which is asked for each case once: it reads all weights each time."""
    known: dict[int, tuple[object, Arrays]] = {}

    def remembering(feeds: Arrays) -> Arrays:
        if id(feeds) not in known:
            known[id(feeds)] = feeds, run(feeds)
        return known[id(feeds)][1]

    return remembering


def _cases(exported: StreamedExport, candidate: Run) -> list[Case]:
    """Some tokens at once, and one more with the cache that they leave."""
    decoding = Decoding.of(graph_file.signature_of(exported.graph))
    if decoding is None:
        raise ExportError("the graph has no cache", next_step="Run again with --debug and report it.")
    vocabulary = exported.model.config.get_text_config(decoder=True).vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, _TOKENS))
    first = decoding.feeds(ids)
    outputs = candidate(first)
    token = outputs["logits"][:, -1].argmax(-1)[:, None]
    second = decoding.feeds(token, cache=decoding.next_cache(outputs))
    return [Case(f"1 x {_TOKENS} tokens", first), Case(f"1 x 1 after {_TOKENS}", second)]


def _exported(pressed: Streamed, folder: Path, name: str) -> ExportedModel:
    model = graph_file.read(pressed.file)
    checkpoint = pressed.exported.checkpoint
    return ExportedModel(
        model=model,
        signature=graph_file.signature_of(model),
        task=GENERATION,
        source=SourceInfo(
            "transformers",
            name,
            checkpoint.sha256(),
            type(pressed.exported.model).__name__,
            sum(place.size for place in checkpoint.values()),
        ),
        processor_files=processor_files(folder),
        export_details=pressed.exported.details,
    )


def _manifest(pressed: Streamed, exported: ExportedModel, recipe: Recipe) -> dict[str, Any]:
    candidate_bytes, ratio = pressed.bytes, pressed.reference_bytes / max(1, pressed.bytes)
    return {
        **pressed_facts(exported, recipe, pressed.file, exported.signature),
        "source": exported.source.to_json(),
        "data": {"evaluation": None, "calibration": None},
        "metrics": {},
        "weights": pressed.weights,
        "export_parity": pressed.graph_parity.to_json(),
        "parity": pressed.parity.to_json(),
        "parity_cases": pressed.parity.cases,
        "parity_padding": pressed.parity.padding,
        "benchmarks": [],
        "size": {
            "reference_bytes": pressed.reference_bytes,
            "candidate_bytes": candidate_bytes,
            "ratio": round(ratio, 4),
        },
        "operator_times": [],
        "kernels": [],
        "nodes": [],
        "passes": [report.to_json() for report in pressed.reports],
        "warnings": ["The model is larger than memory: nothing was timed, and no runtime has loaded it as a whole."],
    }


__all__ = ["export_streamed_file", "press_streamed", "prove_streamed", "write_streamed"]

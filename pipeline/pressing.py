# SPDX-License-Identifier: Apache-2.0
"""The one way through: source -> exported model -> passes -> parity, metrics, benchmark -> gates -> bundle."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..contracts.errors import InputError
from ..contracts.tasks import FEATURES
from ..exporters import graph_file
from ..exporters.attempts import load_proven
from ..exporters.exported import ExportedModel
from ..exporters.graph_file import operator_counts, signature_of
from ..exporters.streamed_checkpoint import folder_to_stream
from ..exporters.vocabulary_cut import cut_exported
from ..runtime import machine as machine_facts
from ..runtime import probe as onnx_probe
from ..runtime.benchmark import Contender, Setting, measure
from ..runtime.kernels import executed_kernels
from ..runtime.profiling import by_operator, profile
from ..runtime.session import Session, require_provider
from . import gates as gate_rules
from .bundle import Staging, write_bundle
from .data import Dataset, load_dataset
from .evaluate import evaluate, metric_names
from .facts import pressed_facts
from .inputs import Feeds, benchmark_settings, calibration_batches, comparison_cases, golden_cases
from .passes.base import Pass, PassReport, run_pass
from .passes.clean import Clean
from .progress import Progress
from .proof import prove_export
from .recipe import Recipe
from .renumbering import Renumbering
from .signing import signer
from .statistics import Calibration
from .token_identity import CutVocabulary, vocabulary_facts, vocabulary_warning
from .validate import Parity, Run, compare

BASELINE = "onnx-fp32"


@dataclass(frozen=True)
class Outcome:
    """What a press came to.

    Attributes:
        manifest: Everything that was measured, also when the result is refused.
        folder: The bundle; None when a gate refused it.
    """

    manifest: dict[str, Any]
    folder: Path | None

    @property
    def accepted(self) -> bool:
        return self.folder is not None

    def require_accepted(self) -> None:
        """Raise GateFailed, naming the gates, unless the result was accepted."""
        gate_rules.require_all(
            self.manifest["gates"], "Nothing was written. Loosen the gate or choose a milder recipe."
        )


def press(
    source: str,
    recipe: Recipe,
    output: Path,
    *,
    task: str | None = None,
    calibration: Dataset | None = None,
    evaluation: Dataset | None = None,
    provider: str = "cpu",
    force: bool = False,
    name: str | None = None,
    cache: Path | None = None,
    sign: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Press `source` after `recipe` and write the bundle to `output` if every gate passes.

    Args:
        source: Transformers folder or hub id, `package.module:factory`, or `.onnx` file.
        recipe: What to do; see `load_recipe`.
        output: The bundle's folder. It is replaced as a whole, and only when the new bundle is complete.
        task: A name from `contracts.tasks`; None asks the source.
        calibration: Data for passes that measure activations; refused when none of the recipe's does.
        cache: Folder that keeps what was measured for the next press of the same model on the same data.
        evaluation: Data for the task metric and for realistic lengths.
        sign: Private key to sign the bundle with.
        provider: Execution provider's short name.
        force: Replace a bundle that exists.
        name: The source's name in the manifest, instead of its own.
        progress: Told about each stage.

    Raises:
        InputError, ExportError, MissingDependency: See `contracts.errors`. Nothing is left behind.
    """
    say = progress or Progress()
    require_provider(provider)
    gates = recipe.parsed_gates()
    _check_calibration(recipe, calibration)
    if sign is not None:
        signer(sign)
    large = folder_to_stream(source, task, recipe.export.weights)
    if large is not None:
        from .streaming import press_streamed

        if evaluation is not None:
            raise InputError(
                "a model whose weights are streamed is not evaluated",
                next_step="Leave --evaluation out; validate the bundle on a machine with enough memory.",
            )
        label = name or large.resolve().name
        return Outcome(*press_streamed(large, label, recipe, output, task=task, force=force, sign=sign, progress=say))
    with Staging(output, force=force, key=sign) as staging:
        say("export", name or source)
        proven: list[tuple[_Run, Path]] = []

        def prove(exported: ExportedModel) -> None:
            exported.location = source
            gate_rules.check_names(gates, metric_names(exported.task, evaluation))
            _check_companions(exported, calibration)
            runs = [_Run(exported, recipe, provider, evaluation, staging.scratch, say)]
            runs += [_Run(part, recipe, provider, None, staging.scratch, say) for part in exported.companions]
            proven[:] = [(run, run.export_baseline()) for run in runs]

        exported = load_proven(source, task, recipe.export, prove, progress=say)
        (run, baseline), *companions = proven
        if calibration is not None:
            run.calibrate_with(calibration, cache)
        file = staging.variant_path(run.file_name)
        reports = run.apply_passes(file)
        manifest = run.measure_all(baseline, file)
        manifest["passes"] = [report.to_json() for report in reports]
        pressed = [other.press_beside(staging.variant_path(other.file_name)) for other, _ in companions]
        manifest |= {"companions": pressed} if pressed else {}
        manifest["source"] = {**exported.source.to_json(), **({"name": name} if name else {})}
        manifest["name"] = staging.target.name
        values = _gate_values(manifest, run.parity)
        manifest["gates"] = [gate.judge(values) for gate in gates]
        accepted = all(gate["passed"] for gate in manifest["gates"])
        manifest["status"] = "accepted" if accepted else "refused"
        if not accepted:
            return Outcome(manifest, None)
        say("bundle", str(output))
        golden = golden_cases(run.pressed, evaluation)
        write_bundle(staging, manifest, run.pressed, recipe, golden, run.reference, run.candidate, provider)
        return Outcome(manifest, staging.publish())


def _check_companions(exported: ExportedModel, calibration: Dataset | None) -> None:
    """Refuse to measure activations of a model of several graphs: what one reads, another has to compute first."""
    if exported.companions and calibration is not None:
        raise InputError(
            f"{exported.source.name} becomes {1 + len(exported.companions)} graphs; none alone can be calibrated",
            next_step="Use a recipe that needs no calibration, such as int8-dynamic, or press each exported graph.",
        )


def _check_calibration(recipe: Recipe, calibration: Dataset | None) -> None:
    """Say before anything is run that calibration data is missing, or of no use."""
    measuring = [p.name for p in recipe.built_passes() if p.needs]
    if calibration is not None and not measuring:
        raise InputError(
            f"recipe {recipe.name} needs no calibration data", next_step="Leave --calibration out, or use --evaluation."
        )
    if calibration is None and measuring:
        raise InputError(
            f"recipe {recipe.name} needs calibration data (pass {measuring[0]} measures activations)",
            next_step="Give --calibration DATA: some hundred typical inputs, labels are not read.",
        )


class _Run:
    """One press in progress: the sessions that are open and what was measured so far.

    `exported` and `original` are the source and its tokenizer. Where a pass cuts the vocabulary, the candidate is fed
    through `pressed`, and `reference` is the original on the same tokens, under their new ids (see `renumbering`).
    """

    def __init__(
        self,
        exported: ExportedModel,
        recipe: Recipe,
        provider: str,
        evaluation: Dataset | None,
        scratch: Path,
        say: Progress,
    ) -> None:
        self.exported, self.recipe, self.provider = exported, recipe, provider
        self.evaluation, self.scratch, self.say = evaluation, scratch, say
        self.threads = recipe.benchmark.threads or machine_facts.default_threads()
        self.cases = comparison_cases(exported, evaluation)
        self.original: Run = self._reference()
        self.reference = self.candidate = self.original
        self.cut: CutVocabulary | None = None
        self.vocabulary: dict[str, Any] | None = None
        self.parity = Parity()
        self.export_parity = Parity()
        self.reference_bytes = 0
        self.calibration: Calibration | None = None
        self.calibration_data: Dataset | None = None
        self.calibration_facts: dict[str, Any] | None = None

    @property
    def pressed(self) -> ExportedModel:
        """The model as the candidate's consumers read it."""
        return self.exported if self.cut is None else self.cut.pressed

    @property
    def file_name(self) -> str:
        """`model_quantized.onnx`, or `decoder_model_quantized.onnx` for one of several graphs."""
        return self.recipe.file_name.replace("model", self.exported.name, 1)

    def _reference(self) -> Run:
        if self.exported.reference is not None:
            import torch

            torch.set_num_threads(self.threads)
            return self.exported.reference.run
        assert self.exported.original_file is not None
        return self._session(self.exported.original_file).run

    def _session(self, file: Path) -> Session:
        return Session(file, provider=self.provider, threads=self.threads)

    def _compare(self, candidate: Run) -> Parity:
        return compare(self.reference, candidate, self.cases, classes=self.exported.task != FEATURES)

    def export_baseline(self) -> Path:
        """Write the exported graph, cleaned and otherwise untouched, and prove that it is the original."""
        file = self.scratch / f"{self.exported.name}-baseline.onnx"
        cleaned, _ = run_pass(Clean(), self.exported.model.clone())
        self.cleaned = cleaned
        written = graph_file.write(cleaned, file)
        original = self.exported.original_file
        self.reference_bytes = graph_file.file_bytes(original) if original else written
        self.say("compare", "exported graph with the original")
        self.export_parity = prove_export(
            self.exported,
            file,
            self.reference,
            self.cases,
            self.recipe.validation.export_tolerance,
            provider=self.provider,
            threads=self.threads,
        )
        return file

    def calibrate_with(self, data: Dataset, cache: Path | None) -> None:
        """Tokenize (or stack) the calibration data, for the passes that measure on it."""
        self.calibration_data, self.cache = data, cache
        batches = self._calibrate(self.cleaned)
        used = sum(len(next(iter(batch.values()))) for batch in batches)
        self.calibration_facts = {"name": data.name, "sha256": data.sha256, "examples": used, "batches": len(batches)}

    def _calibrate(self, reference: ir.Model | None) -> Sequence[Feeds]:
        """Feed the calibration data through the tokenizer that the candidate has by now; returns its batches."""
        assert self.calibration_data is not None
        settings = self.recipe.calibration
        batches = calibration_batches(self.pressed, self.calibration_data, settings)
        self.calibration = Calibration(
            batches,
            threads=self.threads,
            memory_limit=settings.memory_limit_mib << 20,
            cache=self.cache,
            reference=reference,
            processor_files=self.pressed.processor_files,
            progress=self.say,
        )
        return batches

    def apply_passes(self, file: Path) -> list[PassReport]:
        """Run the recipe's passes on the exported graph and write the candidate."""
        model, reports = self.exported.model, []
        for settings in self.recipe.built_passes():
            self.say("pass", settings.name)
            model, report = run_pass(settings, model, self.calibration)
            reports.append(report)
            if report.renumbering is not None:
                self._renumber(settings, report.renumbering)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.candidate_bytes = graph_file.write(model, file)
        self.exported.model = model
        return reports

    def press_beside(self, file: Path) -> dict[str, Any]:
        """Press a graph that the main one works with, such as an encoder: passes, parity and size, for the manifest."""
        reports = self.apply_passes(file)
        self.say("compare", f"{file.name} with the original")
        parity = self._compare(self._session(file).run)
        return {
            "name": self.exported.name,
            "path": f"onnx/{file.name}",
            "signature": signature_of(self.exported.model).to_json(),
            "parity": parity.to_json(),
            "export_parity": self.export_parity.to_json(),
            "size": {"reference_bytes": self.reference_bytes, "candidate_bytes": self.candidate_bytes},
            "passes": [report.to_json() for report in reports],
        }

    def _renumber(self, settings: Pass, cut: Renumbering) -> None:
        """A pass cut the vocabulary: cut the tokenizer, and let everything that follows count in new ids."""
        assert self.calibration is not None
        folder = self.scratch / f"processor-{len(cut.kept)}"
        pressed = cut_exported(self.pressed, cut.kept.tolist(), folder)
        self.cut = CutVocabulary(pressed, cut if self.cut is None else self.cut.renumbering.then(cut))
        data = {"calibration": self.calibration_data, "evaluation": self.evaluation}
        self.vocabulary = vocabulary_facts(self.exported, self.cut, data)
        self.original = cut.with_cut_outputs(self.original)
        self.reference = self.cut.renumbering.reading_new_ids(self.original)
        self.cases = comparison_cases(self.pressed, self.evaluation)
        # The graph before rounding, for passes that compare with it, has to take the new ids as well
        unrounded = self.calibration.reference
        if unrounded is not None:
            again = settings.model_copy(update={"optional": True})
            unrounded, report = run_pass(again, unrounded.clone(), self.calibration)
            unrounded = unrounded if report.changed else None
        self._calibrate(unrounded)

    def measure_all(self, baseline: Path, file: Path) -> dict[str, Any]:
        """Parity, task metrics, benchmark and profile of the candidate, as the manifest has them."""
        candidate = self._session(file)
        self.candidate = candidate.run
        self.say("compare", "candidate with the original")
        self.parity = self._compare(self.candidate)
        metrics: dict[str, Any] = {}
        if self.evaluation is not None:
            self.say("evaluate", f"{len(self.evaluation)} examples of {self.evaluation.name}")
            batch = self.recipe.validation.batch
            metrics = evaluate(self.exported, self.evaluation, self.original, self.candidate, batch, self.cut)
        settings = benchmark_settings(self.pressed, self.evaluation, self.recipe.benchmark)
        benchmarks = self._benchmark(settings, baseline, file)
        self.say("profile", "where the time goes")
        kernels = self._kernels(file)
        nodes = profile(file, settings[-1].feeds[0], provider=self.provider, threads=self.threads)
        ratio = self.reference_bytes / max(1, self.candidate_bytes)
        return {
            **self._facts(file),
            "metrics": metrics,
            "export_parity": self.export_parity.to_json(),
            "parity": self.parity.to_json(),
            "parity_cases": self.parity.cases,
            "parity_padding": self.parity.padding,
            "benchmarks": benchmarks,
            "size": {
                "reference_bytes": self.reference_bytes,
                "candidate_bytes": self.candidate_bytes,
                "ratio": round(ratio, 4),
            },
            "operator_times": [
                {"op": t.op, "count": t.nodes, "ms": round(t.ms_per_run, 4), "share": round(t.share, 4)}
                for t in by_operator(nodes)
            ],
            "kernels": kernels,
            "nodes": [
                {"name": t.name, "op": t.op, "ms": round(t.ms_per_run, 4), "share": round(t.share, 4)} for t in nodes
            ],
            "warnings": [*_unsteady(benchmarks), *self._warnings(kernels)],
        }

    def _kernels(self, file: Path) -> list[dict[str, Any]]:
        """What the engine made of the file: operator, how many, and whether they compute in integers."""
        if self.provider not in ("cpu", "openvino"):
            return []
        counts = Counter((kernel.op, kernel.integer) for kernel in executed_kernels(file, self.provider, self.threads))
        return [{"op": op, "count": count, "integer": integer} for (op, integer), count in sorted(counts.items())]

    def _facts(self, file: Path) -> dict[str, Any]:
        data = self.evaluation
        return {
            **pressed_facts(self.exported, self.recipe, file, signature_of(self.exported.model)),
            **({"vocabulary": self.vocabulary} if self.vocabulary else {}),
            "data": {
                "evaluation": data and {"name": data.name, "sha256": data.sha256, "examples": len(data)},
                "calibration": self.calibration_facts,
            },
        }

    def _benchmark(self, settings: list[Setting], baseline: Path, file: Path) -> list[dict[str, Any]]:
        contenders = self._contenders(settings[0].feeds[0], baseline, file)
        limits = self.recipe.benchmark
        measured = measure(
            contenders,
            settings,
            rounds=limits.rounds,
            max_seconds=limits.max_seconds,
            threads=self.threads,
            progress=lambda line: self.say("benchmark", line),
        )
        return [m.to_json() for m in measured]

    def _contenders(self, feeds: Feeds, baseline: Path, file: Path) -> list[Contender]:
        """The reference first, then everything that it should be compared with, the candidate last."""
        example = self.scratch / "inputs.npz"
        with example.open("wb") as stream:
            np.savez(stream, **feeds)  # type: ignore[arg-type]

        def onnx(variant: str, path: Path) -> Contender:
            command = onnx_probe.command(path, example, provider=self.provider, threads=self.threads)
            return Contender(variant, self.provider, self._session(path).run, command)

        contenders = self._torch_contenders(feeds, example)
        if not contenders:
            assert self.exported.original_file is not None
            contenders.append(onnx("onnx-original", self.exported.original_file))
        if self.exported.original_file is None:
            contenders.append(onnx(BASELINE, baseline))
        return [*contenders, onnx(self.recipe.name, file)]

    def _torch_contenders(self, feeds: Feeds, example: Path) -> list[Contender]:
        reference: Any = self.exported.reference
        if reference is None:
            return []
        from ..exporters.reference import bfloat16_is_native

        command = [sys.executable, "-P", "-m", "onnxpress.exporters.probe", self._source_argument()]
        command += ["--inputs", str(example), "--threads", str(self.threads), "--task", self.exported.task]
        command += ["--settings", self.recipe.export.model_dump_json(context={"paths": True})]
        if self.provider == "cuda":
            reference = reference.to("cuda")
            return [Contender("pytorch-fp32", "pytorch-cuda", reference.run)]
        contenders = [Contender("pytorch-fp32", "pytorch", reference.run, command)]
        twin = reference.in_bfloat16() if bfloat16_is_native() else None
        if twin is not None and _runs(twin.run, feeds):
            contenders.append(Contender("pytorch-bf16", "pytorch", twin.run, [*command, "--bfloat16"]))
        return contenders

    def _source_argument(self) -> str:
        return self.exported.location or self.exported.source.name

    def _warnings(self, kernels: list[dict[str, Any]]) -> list[str]:
        warnings = vocabulary_warning(self.vocabulary)
        rounded = {"QuantizeLinear", "DynamicQuantizeLinear"} & set(operator_counts(self.exported.model))
        if kernels and rounded and not any(kernel["integer"] for kernel in kernels):
            warnings.append(
                f"Activations are rounded to integers, but {self.provider} computes none of it in integers."
            )
        isa = machine_facts.machine()["isa"]
        quantized = any("Integer" in op for op in operator_counts(self.exported.model))
        if quantized and "avx2" in isa and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(isa):
            warnings.append(
                "This processor has no VNNI: its int8 kernels may saturate. Set reduce_range on quantize_dynamic."
            )
        if self.evaluation is None:
            warnings.append("No evaluation data was given: accuracy was not measured, only the outputs were compared.")
        return warnings


def _runs(run: Run, feeds: Feeds) -> bool:
    """Whether a module that was cast takes its inputs: one that was traced in fp32, or that names fp32, may not."""
    try:
        run(feeds)
    except InputError:
        return False
    return True


def _unsteady(benchmarks: list[dict[str, Any]]) -> list[str]:
    """Interleaving keeps a slow second fair, not a busy machine: threads that wait for each other lose most there."""
    ratios = [row["ratio_to_reference"] for row in benchmarks]
    if all(ratio["high"] <= 2 * ratio["low"] for ratio in ratios):
        return []
    return ["The timings are unsteady, the machine was probably busy: measure again while nothing else runs."]


def _gate_values(manifest: dict[str, Any], parity: Parity) -> dict[str, float | None]:
    """Every name that a gate may use, with its measured value."""
    values: dict[str, float | None] = {"size_ratio": manifest["size"]["ratio"]}
    for row in manifest["benchmarks"]:
        if row["variant"] == manifest["variant"]:
            values[f"{row['setting']}_ratio"] = row["ratio_to_reference"]["median"]
    for key, lowest in (
        ("sqnr_db", True),
        ("cosine", True),
        ("max_abs_error", False),
        ("relative_error", False),
        ("top1_agreement", True),
    ):
        values[key] = parity.worst(key, lowest=lowest)
    for name, row in manifest["metrics"].items():
        values[name], values[f"{name}_drop"] = row["candidate"], row["drop"]
    return values


def load_data(spec: str | None, limit: int | None = None) -> Dataset | None:
    """`load_dataset`, with None for no data."""
    return None if spec is None else load_dataset(spec, limit)


__all__ = ["Outcome", "load_data", "press"]

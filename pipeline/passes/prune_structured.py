# SPDX-License-Identifier: Apache-2.0
"""`prune_structured`: smaller matrices, on any graph, without training.

Cuts neurons, heads of attention, channels of convolutions and hidden units of recurrent layers out of the graph, all
weights that depend on them together (see `pipeline.structure`), and refits what reads them by ridge regression on
calibration data, front to back. A dense kernel gains from nothing else: zeros in a weight make no product faster.

How much goes is one budget for the whole model, spent where it costs least: each group is tried alone at several sizes,
the error is measured at the model's own outputs, and a dynamic programme picks the sizes. With `latency` the cut graph
is timed against the uncut one, taking turns, until it is as fast as asked.

References: ZipLM (Kurtic et al., arXiv 2302.04089) for order, update and budget; Kwon et al., "A fast post-training
pruning framework for transformers" (arXiv 2204.09656) for refitting by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from ...contracts.errors import InputError
from ..statistics import Calibration
from ..structure import KINDS, Group, analyze
from ..structure.budget import Level, Work, choose, level_sizes, work_of
from ..structure.groups import weight_of
from ..structure.pruner import Done, Importance, Pruner
from ..structure.timing import speed_up
from .base import Left, Pass, Plan, register
from .graph import constant
from .linear_layers import Layer, add_to_bias, find_layers

_DEFAULT_KINDS = ("neurons", "heads", "channels", "recurrent")


@dataclass(frozen=True)
class Survey:
    """What there is to choose from.

    Attributes:
        levels: By group: units that could go, with the error and the saving.
        work: What is saved together.
    """

    levels: dict[str, list[Level]]
    work: Work


@register("prune_structured")
class PruneStructured(Pass):
    """Settings. Exactly one of the four budgets is given.

    Attributes:
        latency: Times faster than the graph before, measured on the calibration data, with the calibration's provider.
        multiply_adds: Share of the products' multiply-adds that goes, 0 to 1.
        bytes: Share of the weights' bytes that goes.
        ratio: Share of its units that each group loses.
        kinds: What may be cut: see `structure.KINDS`. `hidden`, the features that norms average over, is not exact
            under a mask and only cut when it is named here.
        importance: `reconstruction` (what the layers that read a unit lose when all others make up for it),
            `activation` (sizes of weights and inputs) or `magnitude` (sizes of weights).
        repair: Refit the layers that read a group.
        at_outputs: Judge a group's loss at the model's outputs, not at the layers that read it.
        multiple: What is left of neurons, hidden units and features shall be a multiple of it, for the kernels' sake.
        channel_multiple: The same for channels. ONNX Runtime's convolutions work on blocks of 16 with AVX-512: 56 of 64
            channels take as long as 64 (measured), 48 take three quarters.
        minimum: Share of its units that each group keeps in any case.
        damping: Ridge, relative to the mean square of the inputs.
        widest: Layers with more inputs (times kernel) are judged by magnitude and not refitted.
        open_caches: Cut heads also where they have caches as inputs and outputs of the graph, whose shapes then change.
        exclude: Patterns (`*`, `?`) of group or weight names that stay.
    """

    latency: float | None = Field(default=None, gt=1)
    multiply_adds: float | None = Field(default=None, gt=0, lt=1)
    bytes: float | None = Field(default=None, gt=0, lt=1)
    ratio: float | None = Field(default=None, gt=0, lt=1)
    kinds: tuple[str, ...] = _DEFAULT_KINDS
    importance: Importance = "reconstruction"
    repair: bool = True
    at_outputs: bool = True
    multiple: int = Field(default=8, ge=1)
    channel_multiple: int = Field(default=16, ge=1)
    minimum: float = Field(default=0.1, gt=0, le=1)
    damping: float = Field(default=0.01, gt=0)
    widest: int = Field(default=4096, ge=1)
    open_caches: bool = False
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_budget(self) -> PruneStructured:
        given = [n for n in ("latency", "multiply_adds", "bytes", "ratio") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give one budget: latency, multiply_adds, bytes or ratio")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"unknown kind '{unknown[0]}': kinds are {', '.join(KINDS)}")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        measures = self.repair or self.importance != "magnitude" or self.latency is not None
        return ("grams", "channels") if measures else ()

    def plan(self, model: ir.Model, calibration: Calibration | None = None, survey: Survey | None = None) -> Plan:
        plan = Plan()
        pruner = self._pruner(model, calibration)
        groups = self._groups(pruner, plan)
        if not groups:
            return plan
        if self.ratio is not None:
            counts = {group.name: self._nearest(group, self.ratio) for group in groups}
        else:
            counts = self._counts(pruner, survey or self._survey(pruner, groups), calibration, plan)
        done = pruner.prune(counts)
        self._record(model, pruner.model, done, plan)
        return plan

    def survey(self, model: ir.Model, calibration: Calibration | None = None) -> Survey:
        """What each group would cost and save at each size: the slow part, which does not depend on how much is asked.

        `plan` makes one if it is given none; for several budgets of one kind on one model, make it once.
        """
        pruner = self._pruner(model, calibration)
        return self._survey(pruner, self._groups(pruner, Plan()))

    def _pruner(self, model: ir.Model, calibration: Calibration | None) -> Pruner:
        return Pruner(
            model.clone(),
            calibration,
            importance=self.importance,
            repair=self.repair,
            damping=self.damping,
            widest=self.widest,
            progress=calibration.progress if calibration is not None else None,
            open_caches=self.open_caches,
        )

    def _groups(self, pruner: Pruner, plan: Plan) -> list[Group]:
        """What may be cut; everything else is left, with its reason."""
        chosen = []
        for group in pruner.structure.groups:
            plan.seen += 1
            if group.kind not in self.kinds:
                plan.left.append(Left(group.name, f"{group.kind} are not among the kinds"))
            elif any(fnmatchcase(n, p) for p in self.exclude for n in (group.name, *(c.tensor for c in group.cuts))):
                plan.left.append(Left(group.name, "excluded by name"))
            else:
                chosen.append(group)
        for stays in pruner.structure.surprises:
            where = f" ({stays.node})" if stays.node else ""
            plan.left.append(Left(stays.name, f"{stays.reason}{where}"))
        return chosen

    def _survey(self, pruner: Pruner, groups: list[Group]) -> Survey:
        ways = pruner.ways(groups, self._sizes)
        unit = "bytes" if self.bytes is not None else "multiply_adds"
        work = work_of(pruner.model, groups, unit, pruner.calibration)
        saving = {group.name: work.of_a_unit(group) for group in groups}
        levels = pruner.levels(ways, saving, self._sizes, at_outputs=self.at_outputs)
        return Survey(levels, work)

    def _counts(self, pruner: Pruner, survey: Survey, calibration: Calibration | None, plan: Plan) -> dict[str, int]:
        """Units to take from each group."""
        levels, work = survey.levels, survey.work
        if self.latency is not None:
            assert calibration is not None
            return self._by_latency(pruner, levels, calibration, plan)
        wanted = self.bytes if self.bytes is not None else self.multiply_adds
        assert wanted is not None
        counts = work.choose(levels, wanted)
        if counts is None:
            most = work.saved({name: many[-1].removed for name, many in levels.items()})
            unit = "bytes" if self.bytes is not None else "multiply-adds"
            raise _too_much(f"{wanted:.0%} of the {unit}", f"cutting all it may saves {most:.0%}")
        plan.details["saved_percent"] = round(100 * work.saved(counts), 1)
        return counts

    def _nearest(self, group: Group, ratio: float) -> int:
        return min(self._sizes(group), key=lambda n: (abs(n - ratio * group.size), n))

    def _sizes(self, group: Group) -> list[int]:
        """How many units could go, so that kernels like what is left."""
        multiple = {"heads": 1, "channels": self.channel_multiple}.get(group.kind, self.multiple)
        return level_sizes(group.size, multiple, self.minimum)

    def _by_latency(
        self, pruner: Pruner, levels: dict[str, list[Level]], calibration: Calibration, plan: Plan
    ) -> dict[str, int]:
        """Halve the interval of the budget until the cut graph is as fast as asked, and no smaller than it must be."""
        assert self.latency is not None
        low, high = 0.0, sum(level[-1].saving for level in levels.values())
        tried: list[dict[str, float]] = []
        best: dict[str, int] | None = None
        for attempt in range(7):
            wanted = high if attempt == 0 else (low + high) / 2
            counts = choose(levels, wanted * 0.999)
            assert counts is not None
            faster = speed_up(pruner.model, _cut_copy(pruner, counts), calibration)
            tried.append({"share_of_multiply_adds": round(wanted, 4), "times_faster": round(faster, 3)})
            if faster >= self.latency:
                best, high = counts, wanted
            elif attempt == 0:
                raise _too_much(f"time enough for {self.latency} x", f"the smallest form is {faster:.2f} x faster")
            else:
                low = wanted
        assert best is not None
        plan.details["timed"] = tried
        return best

    def _record(self, model: ir.Model, working: ir.Model, done: list[Done], plan: Plan) -> None:
        """The plan: kept units, repaired weights and biases, so that `apply` needs no data."""
        biases = {lay.name: lay for lay in find_layers(model)}
        for entry in done:
            group = entry.group
            kept = np.setdiff1d(np.arange(group.size), entry.removed)
            plan.arrays[f"kept|{group.name}"] = kept
            plan.actions.append(
                {
                    "group": group.name,
                    "kind": group.kind,
                    "units": group.size,
                    "kept": len(kept),
                    "cuts": group.to_json()["cuts"],
                    "error": _rounded(entry.error),
                    "error_unrepaired": _rounded(entry.unrepaired),
                    "refitted": list(entry.refitted),
                }
            )
            for name in entry.refitted:
                plan.arrays[f"weight|{name}"] = weight_of(working, name)
        for lay in find_layers(working):
            before = biases.get(lay.name)
            shift = _shift(before, lay) if before is not None else None
            if shift is not None:
                plan.arrays[f"bias|{lay.name}"] = shift
        plan.details.update(_details(plan))

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        shifts = {n.removeprefix("bias|"): a for n, a in plan.arrays.items() if n.startswith("bias|")}
        for layer in list(find_layers(model)):
            if layer.name in shifts:
                add_to_bias(model, layer, shifts[layer.name])
        for name, array in plan.arrays.items():
            if name.startswith("weight|"):
                value = model.graph.initializers[name.removeprefix("weight|")]
                value.const_value = ir.Tensor(array, name=value.name)
        removed = {action["group"]: _removed(plan, action) for action in plan.actions}
        analyze(model, open_caches=self.open_caches).cut(removed)
        return model


def _removed(plan: Plan, action: dict[str, Any]) -> list[int]:
    """The units of a group that go."""
    numbers: list[int] = np.setdiff1d(np.arange(action["units"]), plan.arrays[f"kept|{action['group']}"]).tolist()
    return numbers


def _cut_copy(pruner: Pruner, counts: dict[str, int]) -> ir.Model:
    """The graph with so many units gone; which ones does not matter for its speed."""
    copy = pruner.model.clone()
    structure = analyze(copy, open_caches=pruner.open_caches)
    structure.cut({name: list(range(count)) for name, count in counts.items() if count})
    return copy


def _shift(before: Layer, after: Layer) -> np.ndarray | None:
    """What was added to a layer's bias."""
    old, new = (_bias_of(layer) for layer in (before, after))
    if new is None:
        return None
    shift = new - (old if old is not None else 0)
    return shift if np.any(shift) else None


def _bias_of(layer: Layer) -> np.ndarray | None:
    if layer.reader is None or layer.bias != "float":
        return None
    node, index = layer.reader
    array = constant(node.inputs[index])
    return None if array is None else array.astype(np.float64)


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _too_much(what: str, most: str) -> InputError:
    return InputError(
        f"prune_structured cannot save {what}: {most}",
        next_step="Ask for less, allow more kinds, or lower `minimum`.",
    )


def _details(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for action in plan.actions:
        kind = found.setdefault(action["kind"], {"groups": 0, "units": 0, "kept": 0})
        kind["groups"] += 1
        kind["units"] += action["units"]
        kind["kept"] += action["kept"]
    # For the manifest: `Structure.cut` (or, on the PyTorch module, `masked_weights`) replays it by name
    found["cut"] = [
        {
            **{key: action[key] for key in ("group", "kind", "units", "kept", "error", "error_unrepaired")},
            "removed": _removed(plan, action),
        }
        for action in plan.actions
    ]
    return found

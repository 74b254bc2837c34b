# SPDX-License-Identifier: Apache-2.0
"""`allocate_bits`: each layer gets the cheapest form that the whole model can afford.

    1. Every quantizer plans for the whole graph. Its plan is then carried out for one layer alone, the model is run on
       calibration data, and what this adds to the outputs' error is written down: the sensitivity map.
    2. All layers start in their cheapest form. One at a time, the layer is improved that takes away most error for
       what it costs, until everything is floating point: a line of assignments from cheapest to exact.
    3. On that line lies the answer. For an accuracy budget the place is found by bisection, each step a real run of the
       whole model, since errors of single layers only roughly add up; for a size budget it is where the bytes say.

Reference: the greedy ratio of error to cost is that of Dong et al., "HAWQ-V2" (arXiv 1911.03852), 3, with errors that
are measured at the outputs instead of estimated from the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from pydantic import Field, model_validator

from ...contracts.errors import GateFailed, InputError
from ...exporters.graph_file import weight_bytes
from ..cost import multiply_adds, values_to_measure
from ..statistics import Calibration
from .base import Left, Pass, Plan, pass_named, register
from .graph import initializers_of, label, nodes_of

Choice = Literal["int8-static", "int8-dynamic", "int8-weights", "int4-weights", "int3-weights", "int2-weights"]
FLOAT = "float"
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8-static": ("quantize_static", {"minimum_share": 0.0}),
    "int8-dynamic": ("quantize_dynamic", {}),
    "int8-weights": ("quantize_weights", {"bits": 8}),
    "int4-weights": ("quantize_weights", {"bits": 4}),
    "int3-weights": ("quantize_weights", {"bits": 3}),
    "int2-weights": ("quantize_weights", {"bits": 2}),
}
_SPEED = {"int8-static": 0.3, "int8-dynamic": 0.33}
"""Time of a multiply-add relative to fp32, for `minimize: latency`; integer weights alone save none."""


@register("allocate_bits")
class AllocateBits(Pass):
    """Settings.

    Attributes:
        choices: The forms besides floating point that a layer may get.
        minimize: What a form costs: bytes, or the time of its multiply-adds.
        minimum_sqnr_db: Accuracy budget: signal to noise that the outputs keep, in dB, measured end to end.
        size_ratio: Size budget: how many times smaller the weights have to become. One of the two.
        measure: How outputs are compared: signal to noise, or the Kullback-Leibler divergence of their softmax (the
            budget is in dB of signal to noise all the same).
        batches: On how many of the calibration batches, evenly spaced, each layer is tried.
        settings: More settings for the passes behind the choices, by choice.
    """

    choices: tuple[Choice, ...] = ("int8-static",)
    minimize: Literal["size", "latency"] = "latency"
    minimum_sqnr_db: float | None = None
    size_ratio: float | None = Field(default=None, gt=1)
    measure: Literal["sqnr", "kl"] = "sqnr"
    batches: int = Field(default=8, ge=1)
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_budget(self) -> AllocateBits:
        if (self.minimum_sqnr_db is None) == (self.size_ratio is None):
            raise ValueError("give one of minimum_sqnr_db and size_ratio")
        if unknown := set(self.settings) - set(_SETTINGS):
            raise ValueError(f"settings for unknown choices: {', '.join(sorted(unknown))}")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("outputs", *dict.fromkeys(need for choice in self.choices for need in self._pass(choice).needs))

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        assert calibration is not None
        plans: dict[str, _Part] = {c: _Part(self._pass(c).plan(model, calibration)) for c in self.choices}
        trial = _Trial(model, calibration.sample(self.batches), self.measure, self._apply)
        layers = _layers(model, plans, calibration, self)
        if not layers:
            return Plan(seen=0)
        for layer in layers:
            for choice in [c for c in layer.work if c != FLOAT]:
                layer.noise[choice] = trial.noise({choice: plans[choice].only([layer.key])})
        line = _line(layers, self.minimize)
        place, sqnr = self._find(line, layers, plans, trial)
        chosen = line[place]
        plan = Plan(seen=len(layers), details=self._report(layers, chosen, sqnr, trial))
        for layer in layers:
            if chosen[layer.key] == FLOAT:
                worst = max(layer.noise.values())
                plan.left.append(Left(layer.node, f"alone it leaves {_decibels(worst):.1f} dB: worth more as fp32"))
            else:
                plan.actions.append({"layer": layer.key, "node": layer.node, "form": chosen[layer.key]})
        for choice in self.choices:
            picked = plans[choice].only([w for w, form in chosen.items() if form == choice])
            if picked.plan.actions:
                plan.details.setdefault("plans", {})[choice] = picked.plan.actions
                plan.arrays |= {f"{choice}|{key}": array for key, array in picked.plan.arrays.items()}
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        wanted = {action["layer"]: action["form"] for action in plan.actions}
        parts = {}
        for choice, actions in plan.details.pop("plans", {}).items():
            arrays = {k.partition("|")[2]: a for k, a in plan.arrays.items() if k.partition("|")[0] == choice}
            whole = _Part(Plan(actions=actions, arrays=arrays))
            parts[choice] = whole.only([key for key, form in wanted.items() if form == choice])
        return self._apply(model, parts)

    def _apply(self, model: ir.Model, parts: Mapping[str, _Part]) -> ir.Model:
        for choice in _SETTINGS:  # static first: it places pairs by what is still floating point
            if choice in parts and parts[choice].plan.actions:
                model = self._pass(choice).apply(model, parts[choice].plan)
        NameFixPass()(model)
        return model

    def _pass(self, choice: str) -> Pass:
        name, settings = _SETTINGS[choice]
        return pass_named(name).model_validate({**settings, **self.settings.get(choice, {})})

    def _find(
        self, line: list[dict[str, str]], layers: list[_Layer], plans: Mapping[str, _Part], trial: _Trial
    ) -> tuple[int, float]:
        """The first place on the line that keeps the budget, and its measured signal to noise in dB."""

        def sqnr(place: int) -> float:
            return _decibels(trial.noise(_parts(line[place], plans)))

        if self.size_ratio is not None:
            sizes = [trial.float_bytes + sum(layer.bytes[place[layer.key]] for layer in layers) for place in line]
            fitting = [i for i, size in enumerate(sizes) if size <= trial.float_bytes / self.size_ratio]
            if not fitting:
                smallest = trial.float_bytes / sizes[0]
                raise InputError(
                    f"allocate_bits reaches a size ratio of {smallest:.2f} at most, not {self.size_ratio:g}",
                    next_step="Allow narrower choices, or a lower size_ratio.",
                )
            return fitting[-1], sqnr(fitting[-1])
        assert self.minimum_sqnr_db is not None
        low, high, best = 0, len(line) - 1, (len(line) - 1, float("inf"))
        while low < high:
            middle = (low + high) // 2
            found = sqnr(middle)
            if found >= self.minimum_sqnr_db:
                high, best = middle, (middle, found)
            else:
                low = middle + 1
        if best[0] == len(line) - 1:
            raise GateFailed(
                f"allocate_bits: no layer can leave floating point at {self.minimum_sqnr_db:g} dB",
                next_step="Lower minimum_sqnr_db; the sensitivity of single layers is in the report of a milder run.",
            )
        return best

    def _report(self, layers: list[_Layer], chosen: Mapping[str, str], sqnr: float, trial: _Trial) -> dict[str, Any]:
        forms = list(chosen.values())
        return {
            "sqnr_db": round(sqnr, 2),
            **{form: forms.count(form) for form in (FLOAT, *self.choices) if form in forms},
            "trials": trial.count,
            "sensitivity": [
                {
                    "layer": layer.key,
                    "node": layer.node,
                    "form": chosen[layer.key],
                    "alone_db": {choice: round(_decibels(noise), 2) for choice, noise in layer.noise.items()},
                }
                for layer in layers
            ],
        }


@dataclass
class _Layer:
    """One weight (or product of two activations) and its forms.

    Attributes:
        key: The weight's key, or the node's name.
        node: The name of the first node that reads it.
        bytes: What each form adds to the bytes of all weights: negative where it saves.
        work: Time units of each form.
        noise: Error of the outputs when this layer alone has the form, relative to their power.
    """

    key: str
    node: str
    bytes: dict[str, int]
    work: dict[str, float]
    noise: dict[str, float] = field(default_factory=dict)


class _Part:
    """A quantizer's plan, of which single layers can be taken."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for action in self.plan.actions if (key := _key(action))))

    def nodes(self, key: str) -> list[str]:
        """The names of the nodes that an action on `key` changes."""
        actions = [action for action in self.plan.actions if _key(action) == key]
        return [str(name) for a in actions for name in (a.get("node"), *(u["node"] for u in a.get("uses", ()))) if name]

    def only(self, keys: Iterable[str]) -> _Part:
        """The actions on these layers, and those that belong to none (the ranges of values)."""
        keep = set(keys)
        chosen = any(_key(action) in keep for action in self.plan.actions)
        actions = [a for a in self.plan.actions if chosen and (_key(a) in keep or _key(a) is None)]
        return _Part(replace(self.plan, actions=actions, left=[], details={}, arrays=dict(self.plan.arrays)))


def _key(action: Mapping[str, Any]) -> str | None:
    return None if "value" in action else action.get("weight") or action.get("node")


class _Trial:
    """Runs variants of one model and compares their outputs with its own."""

    def __init__(
        self,
        model: ir.Model,
        calibration: Calibration,
        measure: str,
        apply: Callable[[ir.Model, Mapping[str, _Part]], ir.Model],
    ) -> None:
        self.model, self.calibration = model, calibration
        self.measure, self.apply, self.count = measure, apply, 0
        self.float_bytes = weight_bytes(model)
        self.reference = list(calibration.run(model))

    def noise(self, parts: Mapping[str, _Part]) -> float:
        """Error power over signal power (or mean divergence), of all floating point outputs together."""
        self.count += 1
        variant = self.apply(self.model.clone(), parts)
        noise = signal = 0.0
        for wanted, got in zip(self.reference, self.calibration.run(variant), strict=True):
            for name, array in wanted.items():
                if array.dtype.kind == "f":
                    step = _divergence if self.measure == "kl" else _error
                    more, of = step(array.astype(np.float64), got[name].astype(np.float64))
                    noise, signal = noise + more, signal + of
        return noise / signal if signal else 0.0


def _error(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    return float(((wanted - got) ** 2).sum()), float((wanted**2).sum())


def _divergence(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """KL(softmax(wanted) || softmax(got)) summed over all rows, and their number."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        shifted = x - x.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum()), float(p.size // p.shape[-1])


def _decibels(noise: float) -> float:
    return float(-10 * np.log10(max(noise, 1e-30)))


def _parts(assignment: Mapping[str, str], plans: Mapping[str, _Part]) -> dict[str, _Part]:
    forms = set(assignment.values()) - {FLOAT}
    return {form: plans[form].only([w for w, f in assignment.items() if f == form]) for form in forms}


def _layers(
    model: ir.Model, plans: Mapping[str, _Part], calibration: Calibration, settings: AllocateBits
) -> list[_Layer]:
    """Every layer that some choice can take, in graph order, with what its forms cost."""
    order = {label(node): index for index, node in enumerate(nodes_of(model))}
    shapes = calibration.shapes(model, values_to_measure(model))
    costs = {label(node): cost for node, cost in multiply_adds(model, shapes).items()}
    weights = {key: tensor for key, value in initializers_of(model).items() if (tensor := value.const_value)}
    before, found = weight_bytes(model), []
    for key in dict.fromkeys(key for part in plans.values() for key in part.keys):
        takers = [choice for choice, part in plans.items() if key in part.keys]
        nodes = min((plans[choice].nodes(key) for choice in takers), key=len)
        # An embedding multiplies nothing; counted as one step an element, its bytes are not given away for free
        elements = weights[key].size if key in weights else 0
        work = float(max(sum(costs.get(node, 0) for node in nodes), elements, 1))
        forms = {c: weight_bytes(settings._apply(model.clone(), {c: plans[c].only([key])})) for c in takers}
        sizes = {FLOAT: 0, **{choice: size - before for choice, size in forms.items()}}
        found.append(_Layer(key, nodes[0], sizes, {FLOAT: work, **{c: work * _SPEED.get(c, 1.0) for c in takers}}))
    return sorted(found, key=lambda layer: order.get(layer.node, 0))


def _line(layers: list[_Layer], minimize: str) -> list[dict[str, str]]:
    """Assignments from cheapest to exact; each differs from the one before in one layer."""
    costs: dict[str, Mapping[str, float]] = {la.key: la.bytes if minimize == "size" else la.work for la in layers}
    noise = {layer.key: {FLOAT: 0.0, **layer.noise} for layer in layers}
    current = {key: min(forms, key=lambda c: (forms[c], noise[key][c])) for key, forms in costs.items()}
    line = [dict(current)]
    while steps := [
        ((noise[key][now] - noise[key][form]) / max(costs[key][form] - costs[key][now], 1e-9), key, form)
        for key, now in current.items()
        for form in costs[key]
        if now != FLOAT and (form == FLOAT or noise[key][form] < noise[key][now])
    ]:
        _, key, form = max(steps)
        current[key] = form
        line.append(dict(current))
    return line

# SPDX-License-Identifier: Apache-2.0
"""What a pass is: typed settings, a plan that is data, and a report of what really happened.

    plan = settings.plan(model, calibration)    reads the graph (and measures it on data), changes nothing
    model = settings.apply(model, plan)         carries the plan out
    run_pass(settings, model, calibration)      both, and the report: seen, changed, left and why, bytes, seconds

A pass that finds nothing to do is an error unless it says `may_be_idle`: a recipe that names `quantize_dynamic` and
gets back an fp32 model has been lied to. Adding a pass is adding one file to this folder and one test.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass
from pydantic import BaseModel, ConfigDict

from ...contracts.errors import InputError, OnnxpressError, did_you_mean
from ...exporters.graph_file import weight_bytes
from ..renumbering import Renumbering
from ..statistics import Calibration
from .graph import nodes_of


@dataclass(frozen=True)
class Left:
    """A node that the pass looked at and did not change."""

    node: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"node": self.node, "reason": self.reason}


@dataclass
class Plan:
    """What a pass decided, as data.

    Attributes:
        seen: Number of nodes that the pass is about.
        actions: One dict a change, JSON throughout, in graph order.
        left: Nodes that stay as they are, and why.
        details: Counts for the report.
        arrays: What the actions refer to and is no JSON: scales, rounded weights.
        renumbering: What token ids mean afterwards; None where they mean what they did.
    """

    seen: int = 0
    actions: list[dict[str, Any]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    renumbering: Renumbering | None = None


@dataclass(frozen=True)
class PassReport:
    """The effect of one pass, for the manifest; bytes are those of the weights, nodes include subgraphs.

    `renumbering` is not for the manifest: what runs after the pass has to follow it (see `Plan`).
    """

    name: str
    seen: int
    changed: int
    left: tuple[Left, ...]
    bytes_before: int
    bytes_after: int
    nodes_before: int
    nodes_after: int
    seconds: float
    details: dict[str, Any]
    renumbering: Renumbering | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            **{k: v for k, v in vars(self).items() if k not in ("name", "left", "seconds", "renumbering")},
            "left": [left.to_json() for left in self.left],
            "seconds": round(self.seconds, 3),
        }


class Pass(BaseModel, ABC):
    """Base of all passes: the fields of a subclass are its settings, validated, unknown keys refused.

    Attributes:
        optional: Finding nothing to do is no error: for recipes that fit several kinds of models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    may_be_idle: ClassVar[bool] = False

    optional: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that these settings ask for; with any, `plan` is given calibration data."""
        return ()

    @abstractmethod
    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        """Decide what to change, without changing anything."""

    @abstractmethod
    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        """Carry out the plan; may change `model` in place, and returns the model to go on with."""


_REGISTRY: dict[str, type[Pass]] = {}


def register(name: str) -> Callable[[type[Pass]], type[Pass]]:
    """Class decorator: put the pass under its recipe name."""

    def add(cls: type[Pass]) -> type[Pass]:
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def all_passes() -> dict[str, type[Pass]]:
    """Every pass under its recipe name; importing this package's files registers them."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def pass_named(name: str) -> type[Pass]:
    """Return the pass class, or raise InputError with a suggestion."""
    known = all_passes()
    if name not in known:
        raise InputError(f"unknown pass '{name}'", next_step=did_you_mean(name, known))
    return known[name]


def run_pass(settings: Pass, model: ir.Model, calibration: Calibration | None = None) -> tuple[ir.Model, PassReport]:
    """Plan, apply and report.

    Raises:
        InputError: The pass found nothing to do and may not be idle, or it needs calibration data.
        OnnxpressError: The pass broke; the message names it.
    """
    started = time.perf_counter()
    bytes_before, nodes_before = weight_bytes(model), _node_count(model)
    if settings.needs and calibration is None:
        raise InputError(
            f"pass {settings.name} needs calibration data (it measures {', '.join(settings.needs)})",
            next_step="Give --calibration DATA: some hundred typical inputs, without labels.",
        )
    try:
        plan = settings.plan(model, calibration)
        if not plan.actions and not (settings.may_be_idle or settings.optional):
            raise _nothing_to_do(settings, plan)
        model = settings.apply(model, plan)
        # Passes name new values after old ones, which may meet a name that is taken
        NameFixPass()(model)
        # Before version 4, every initializer had to be an input as well
        model.ir_version = max(model.ir_version, 4)
    except OnnxpressError:
        raise
    except Exception as error:
        raise OnnxpressError(
            f"pass {settings.name} failed: {type(error).__name__}: {error}",
            next_step="Leave the pass out of the recipe, or run again with --debug and report it.",
        ) from error
    return model, PassReport(
        name=settings.name,
        seen=plan.seen,
        changed=len(plan.actions),
        left=tuple(plan.left),
        bytes_before=bytes_before,
        bytes_after=weight_bytes(model),
        nodes_before=nodes_before,
        nodes_after=_node_count(model),
        seconds=time.perf_counter() - started,
        details=plan.details,
        renumbering=plan.renumbering,
    )


def _node_count(model: ir.Model) -> int:
    return sum(1 for _ in nodes_of(model))


def _nothing_to_do(settings: Pass, plan: Plan) -> InputError:
    reasons = sorted({left.reason for left in plan.left})
    why = f": {reasons[0]}" if reasons else ""
    return InputError(
        f"pass {settings.name} has nothing to do on this model ({plan.seen} candidates{why})",
        next_step="Leave the pass out of the recipe.",
    )

# SPDX-License-Identifier: Apache-2.0
"""`cast`: fp32 to fp16 or bf16, with fp32 kept at the model's inputs and outputs, and wherever else it is needed.

Numbers beyond fp16 are brought to its ends instead of becoming infinity (the mask constant -3.4e38 becomes -65504), and
single numbers that would become 0 to its smallest (a 1e-9 that guards a division stays a guard). Both are counted in
the report. Operators that ONNX defines for fp32 only keep it, between two casts; so does the way from int8 products
back to floating point, whose int32 sums do not fit into fp16 before they are scaled.

With `mixed`, what stays fp32 is found by measurement: see `mixed_precision`.

With `storage_only`, weights alone are cast, and cast back where they are read. ONNX Runtime folds these casts when it
loads the model: half the bytes on the disk, fp32 arithmetic, no operator that a provider lacks.

bf16 arithmetic is for GPUs: ONNX Runtime has no CPU kernel of Add or MatMul for it, and refuses to load such a model
there. `no_cpu_kernel` in the report lists the operators concerned.

Reference: type constraints of each operator in the ONNX specification (Operators.md) and in ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass
from pydantic import Field, model_validator

from ...contracts.errors import InputError, did_you_mean
from ...exporters.streamed_tensor import streamed
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import add_weight, attribute, initializers_of, is_op, is_weight, label, make_node, nodes_of
from .low_precision import (
    CPU_BFLOAT16,
    DATA_TYPES,
    FLOAT,
    NOWHERE,
    Held,
    Places,
    Precision,
    held_by_kind,
    limits,
    needs_float32,
    nodes_inside,
    peak,
    round_to,
    subgraphs_of,
    why_held,
    with_kept,
)
from .mixed_precision import Goal, Kept, bridges, bring_in_weight, measure

_WORTH_A_CAST = 256
"""Elements from which on a weight that is stored in 16 bits is worth the operator that brings it back."""


@register("cast")
class CastPass(Pass):
    """Settings.

    Attributes:
        to: The type of weights and activations.
        storage_only: Cast weights alone; every operator computes in fp32.
        keep: Patterns (`*`, `?`) of the names of nodes that stay fp32, or of weights that they read.
        mixed: Leave in fp32 what calibration data shows to overflow, or to cost too much accuracy.
        headroom: With `mixed`, how many times larger than on the calibration data values may become.
        minimum_sqnr_db: With `mixed`, the signal to quantization noise ratio that every output has to reach on the
            calibration data, in dB, against the model as it was.
    """

    to: Precision = "float16"
    storage_only: bool = False
    keep: tuple[str, ...] = ()
    mixed: bool = False
    headroom: float = Field(default=2.0, ge=1.0, le=1024.0)
    minimum_sqnr_db: float = Field(default=40.0, gt=0.0, le=120.0)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> CastPass:
        if self.storage_only and self.mixed:
            raise ValueError("storage_only computes in fp32 throughout, so that mixed has nothing to find")
        return self

    @property
    def _goal(self) -> Goal:
        return Goal(self.to, self.headroom, self.minimum_sqnr_db)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("ranges",) if self.mixed else ()

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        if model.functions:
            raise InputError("cast cannot look into local functions", next_step="Put the clean pass before it.")
        # What is decided here is decided about the model as `apply` will have prepared it
        model = model.clone()
        if not self.storage_only:
            _prepare(model)
        kept = _kept_by_name(model, self.keep)
        if self.storage_only:
            return _plan_storage(model, set(kept), self.to)
        plan, by_kind = Plan(), held_by_kind(model, self.to)
        if self.mixed and _castable(model, by_kind):
            assert calibration is not None
            measured = measure(model, by_kind, kept, self._goal, calibration)
            kept, plan.details = measured.kept, dict(measured.details)
            if measured.brought_in:
                plan.details["brought_in"] = sorted(measured.brought_in)
        else:
            kept |= dict.fromkeys(bridges(model, by_kind, kept), "saves casts between nodes that stay fp32")
        _plan_weights(model, with_kept(by_kind, kept), set(kept), plan)
        reasons = {**{node: why_held(node, self.to, model.opset_imports.get("", 0)) for node in by_kind}, **kept}
        plan.left += [Left(label(node), reason) for node, reason in reasons.items() if reason]
        plan.details["kept"] = [_key(node) for node in kept]
        if not plan.actions and "worst_sqnr_db_before" in plan.details:
            raise self._nothing_left(kept, plan.details["worst_sqnr_db_before"])
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        chosen = {action["weight"] for action in plan.actions if "weight" in action}
        if self.storage_only:
            return _store(model, chosen, self.to, plan)
        _prepare(model)
        names = set(plan.details.pop("kept", ()))
        kept = [node for node in nodes_of(model) if _key(node) in names]
        held = with_kept(held_by_kind(model, self.to), kept)
        low = DATA_TYPES[self.to]
        ends = {value for value in model.graph.outputs if value.dtype == FLOAT}
        counts = {"clamped": 0, "raised_to_smallest": 0}
        late = _Late(plan.details, self.to)
        for name in plan.details.get("brought_in", ()):
            bring_in_weight(model.graph.initializers[name], self._goal.threshold)
        stay = {value for value in model.graph.inputs if value.dtype == FLOAT} | _values_inside(kept)
        cast = 0
        for key, value in initializers_of(model).items():
            if value.const_value is None or value.const_value.dtype != FLOAT:
                continue
            if key not in chosen or _weight_stays(value, held):
                stay.add(value)
            else:
                value.const_value = late.cast(value.const_value) or _cast_tensor(value.const_value, self.to, counts)
                value.type = ir.TensorType(low)
                cast += 1
        stay |= {node.outputs[i] for node, places in held.items() for i in places.outputs if i < len(node.outputs)}
        for node in nodes_of(model):
            if node not in held:
                _cast_attributes(node, self.to, counts)
        _retype(model, stay, low)
        casts = _Casts(model, self.to, counts, held)
        for node in list(nodes_of(model)):
            _connect(node, held.get(node, NOWHERE), stay, casts)
        _cast_outputs(model, ends, stay, set(kept), casts)
        plan.details |= {**counts, "weights_cast": cast, "casts_inserted": len(casts.made)}
        if self.keep or self.mixed:
            plan.details["nodes_kept_fp32"] = len(kept)
        if self.to == "bfloat16":
            plan.details["no_cpu_kernel"] = _without_cpu_kernel(model)
        return model

    def _nothing_left(self, kept: Kept, sqnr: float | None) -> InputError:
        node, reason = next(iter(kept.items()), (None, ""))
        because = f", such as {label(node)}: {reason}" if node is not None else ""
        reached = "not finite" if sqnr is None else f"{sqnr:g} dB"
        return InputError(
            f"cast finds no weight that could be {self.to} with minimum_sqnr_db {self.minimum_sqnr_db:g} and headroom "
            f"{self.headroom:g} (all in {self.to} is {reached}); {len(kept)} nodes stay in fp32{because}",
            next_step="Lower minimum_sqnr_db, or set storage_only: true instead of mixed.",
        )


def _prepare(model: ir.Model) -> None:
    """Make every constant an initializer, so that what holds for one holds for the other, and every type known."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _key(node: ir.Node) -> str:
    """What a plan calls a node by: unlike its own name, the name of what it makes is there, and once."""
    return next((str(value.name) for value in node.outputs if value.name), "")


def _kept_by_name(model: ir.Model, patterns: tuple[str, ...]) -> Kept:
    names = {}
    for node in nodes_of(model):
        names[node] = [
            label(node),
            *(str(value.name) for value in node.inputs if value is not None and is_weight(value)),
        ]
    kept: Kept = {}
    for pattern in patterns:
        found = [node for node, own in names.items() if any(fnmatchcase(name, pattern) for name in own)]
        if not found:
            known = [name for own in names.values() for name in own]
            raise InputError(f"cast: no node is named like keep '{pattern}'", next_step=did_you_mean(pattern, known))
        kept |= {node: f"kept by name ({pattern})" for node in found if node not in kept}
    return kept


def _castable(model: ir.Model, held: Held) -> bool:
    plan = Plan()
    _plan_weights(model, held, set(), plan)
    return bool(plan.actions)


def _plan_weights(model: ir.Model, held: Held, kept: set[ir.Node], plan: Plan) -> None:
    for key, value in initializers_of(model).items():
        if value.const_value is None or value.const_value.dtype != FLOAT:
            continue
        plan.seen += 1
        if value.is_graph_input():
            plan.left.append(Left(key, "also an input of the graph; put the clean pass before"))
        elif _weight_stays(value, held):
            reader = next((use.node for use in value.uses() if use.node in kept), None)
            reason = "an output of the graph, or read by an operator that takes fp32 only"
            plan.left.append(Left(key, f"read by {label(reader)}, which stays in fp32" if reader else reason))
        else:
            plan.actions.append({"weight": key})
    for node in nodes_of(model):
        if is_op(node, "Constant") and _holds_float(node) and node not in held:
            plan.seen += 1
            plan.actions.append({"constant": label(node)})


def _weight_stays(value: ir.Value, held: Held) -> bool:
    at_an_end = value.is_graph_output() or value.is_graph_input()
    return at_an_end or any(use.idx in held.get(use.node, NOWHERE).inputs for use in value.uses())


def _plan_storage(model: ir.Model, kept: set[ir.Node], to: Precision) -> Plan:
    plan, end = Plan(), limits(to)[0]
    for key, value in initializers_of(model).items():
        if value.const_value is None or value.const_value.dtype != FLOAT:
            continue
        plan.seen += 1
        if value.is_graph_input() or value.is_graph_output():
            reason = "also an input or output of the graph; put the clean pass before"
        elif value.const_value.size < _WORTH_A_CAST:
            reason = f"fewer than {_WORTH_A_CAST} elements are not worth a Cast"
        elif any(use.node in kept for use in value.uses()):
            reason = "kept by name"
        elif needs_float32(value):
            reason = "read by an operator that takes fp32 only"
        elif peak(value) > end:
            reason = f"reaches {peak(value):.4g}, and {to} ends at {end:.6g}"
        else:
            plan.actions.append({"weight": key})
            continue
        plan.left.append(Left(key, reason))
    return plan


def _store(model: ir.Model, chosen: set[str], to: Precision, plan: Plan) -> ir.Model:
    """Store weights in 16 bits, each with one cast back to fp32 at the start of its graph."""
    counts = {"clamped": 0, "raised_to_smallest": 0}
    late = _Late(plan.details, to)
    casts = _Casts(model, to, counts, {})
    for key, value in initializers_of(model).items():
        if key in chosen and value.const_value is not None:
            uses, graph = list(value.uses()), value.graph
            assert isinstance(graph, ir.Graph)
            value.const_value = late.cast(value.const_value) or _cast_tensor(value.const_value, to, counts)
            value.type = ir.TensorType(DATA_TYPES[to])
            for use in uses:
                use.node.replace_input_with(use.idx, casts.cast(value, FLOAT, graph))
    plan.details |= {"weights_cast": len(chosen), "casts_inserted": len(casts.made)}
    return model


def _holds_float(constant: ir.Node) -> bool:
    attr = next(iter(constant.attributes.values()))
    if attr.type == ir.AttributeType.TENSOR:
        return attr.as_tensor().dtype == FLOAT
    return attr.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)


class _Late:
    """Casts weights that lie in a file when they are read from it, and counts for the report what that changed.

    A tensor may be read more than once, so that what is counted is kept by tensor and place.
    """

    def __init__(self, details: dict[str, Any], to: Precision) -> None:
        self.details, self.to = details, to
        self.clamped: dict[tuple[str, int], int] = {}

    def cast(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        """The cast tensor, still in its file; None where it is in memory."""
        in_file = streamed(tensor)
        if in_file is None or in_file.size == 1:  # a number alone is there for a reason: it may not vanish
            return None
        self.details["clamped_when_written"] = 0

        def convert(piece: np.ndarray, start: int) -> np.ndarray:
            rounded, clamped, _ = round_to(piece, self.to, keep_nonzero=False)
            if clamped:
                self.clamped[str(tensor.name), start] = clamped
                self.details["clamped_when_written"] = sum(self.clamped.values())
            return rounded

        return in_file.converted(DATA_TYPES[self.to], convert)


def _cast_tensor(tensor: ir.TensorProtocol, to: Precision, counts: dict[str, int]) -> ir.TensorProtocol:
    # Among many weights, one next to zero may well be zero; a number alone is there for a reason
    array, clamped, raised = round_to(tensor.numpy(), to, keep_nonzero=tensor.size == 1)
    counts["clamped"] += clamped
    counts["raised_to_smallest"] += raised
    return ir.Tensor(array, name=tensor.name)


def _cast_attributes(node: ir.Node, to: Precision, counts: dict[str, int]) -> None:
    if node.domain:
        return
    low = DATA_TYPES[to]
    name = {"Cast": "to", "SequenceEmpty": "dtype"}.get(node.op_type)
    if name and attribute(node, name, int(FLOAT)) == int(FLOAT):  # the default of SequenceEmpty
        node.attributes[name] = ir.AttrInt64(name, int(low))
    if is_op(node, "ConstantOfShape") and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, low.numpy())))
    for key, attr in list(node.attributes.items()):
        if attr.type == ir.AttributeType.TENSOR and attr.value is not None:
            tensor = attr.as_tensor()
            if tensor.dtype == FLOAT:
                node.attributes[key] = ir.AttrTensor(key, _cast_tensor(tensor, to, counts))
    if is_op(node, "Constant"):  # what could not be lifted, since the graph returns it
        for key in ("value_float", "value_floats"):
            if key in node.attributes:
                tensor = ir.Tensor(np.asarray(node.attributes.pop(key).value, np.float32))
                node.attributes["value"] = ir.AttrTensor("value", _cast_tensor(tensor, to, counts))


def _values_inside(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """The fp32 values of the subgraphs of nodes that stay fp32."""
    inner = [inner for node in nodes for inner in nodes_inside(node)]
    graphs = [graph for node in (*nodes, *inner) for graph in subgraphs_of(node)]
    values = [*(v for node in inner for v in node.outputs), *(v for graph in graphs for v in graph.inputs)]
    return {value for value in values if value.dtype == FLOAT}


def _retype(model: ir.Model, stay: set[ir.Value], low: ir.DataType) -> None:
    """Declare 16 bits what was declared fp32; a sequence of tensors is left to the runtime to infer."""
    values = [value for node in nodes_of(model) for value in node.outputs]
    values += [value for graph in model.graph.subgraphs() for value in graph.inputs]
    for value in values:
        if value.dtype == FLOAT and value not in stay:
            value.type = ir.TensorType(low) if isinstance(value.type, ir.TensorType) else None


class _Casts:
    """Casts put into the graph, one for each value, type and graph that reads it."""

    def __init__(self, model: ir.Model, to: Precision, counts: dict[str, int], held: Held) -> None:
        self.model, self.to, self.counts, self.held = model, to, counts, held
        self.made: dict[tuple[ir.Value, ir.DataType, object], ir.Value] = {}
        self.copies: dict[ir.Value, ir.Value] = {}

    def cast(self, value: ir.Value, to: ir.DataType, graph: ir.Graph) -> ir.Value:
        """`value` as `to`, cast where it is made, or at the start of `graph` if that is outside of it."""
        key = (value, to, graph)
        if key not in self.made:
            node = make_node("Cast", [value], [f"{value.name}_{to.name.lower()}"], attributes={"to": int(to)})
            node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(to)
            maker = value.producer()
            if maker is not None and maker.graph is graph:
                graph.insert_after(maker, node)
            elif len(graph):
                graph.insert_before(graph[0], node)
            else:
                graph.append(node)
            self.made[key] = node.outputs[0]
        return self.made[key]

    def low(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        """`value`, which is fp32, in 16 bits: cast, or a second time among the weights.

        The second for a few numbers that others need in fp32: a Cast would turn a guard into 0, a mask into infinity.
        """
        tensor = value.const_value
        if tensor is None or not is_weight(value) or not _weight_stays(value, self.held):
            return self.cast(value, DATA_TYPES[self.to], graph)
        if tensor.size >= _WORTH_A_CAST and peak(value) <= limits(self.to)[0]:
            return self.cast(value, DATA_TYPES[self.to], graph)
        if value not in self.copies:
            array = _cast_tensor(tensor, self.to, self.counts).numpy()
            assert isinstance(value.graph, ir.Graph)
            self.copies[value] = add_weight(self.model, value.graph, f"{value.name}_{self.to}", array)
        return self.copies[value]


def _connect(node: ir.Node, places: Places, stay: set[ir.Value], casts: _Casts) -> None:
    """Give every input of `node` the type that it takes."""
    assert isinstance(node.graph, ir.Graph)
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if value in stay and index not in places.inputs:
            node.replace_input_with(index, casts.low(value, node.graph))
        elif value not in stay and index in places.inputs:
            node.replace_input_with(index, casts.cast(value, FLOAT, node.graph))


def _cast_outputs(model: ir.Model, ends: set[ir.Value], stay: set[ir.Value], kept: set[ir.Node], casts: _Casts) -> None:
    """fp32 where the model ends and where the subgraphs of nodes that stay fp32 end, 16 bits where others do."""
    low = DATA_TYPES[casts.to]
    kept = kept | {inner for node in kept for inner in nodes_inside(node)}
    for node in nodes_of(model):
        for graph in subgraphs_of(node):
            for index, value in enumerate(graph.outputs):
                if node not in kept and value in stay:
                    graph.outputs[index] = casts.cast(value, low, graph)
                elif node in kept and value not in stay and value.dtype == low:
                    graph.outputs[index] = casts.cast(value, FLOAT, graph)
    for index, value in enumerate(model.graph.outputs):
        if value not in ends or value in stay:
            continue
        name = value.name
        value.name = f"{name}_{low.name.lower()}"
        result = casts.cast(value, FLOAT, model.graph)
        result.name = name
        model.graph.outputs[index] = result


def _without_cpu_kernel(model: ir.Model) -> list[str]:
    """Types of the operators that read or write bf16 and that ONNX Runtime cannot run in it on the CPU."""
    found = set()
    for node in nodes_of(model):
        values = (*node.inputs, *node.outputs)
        if any(v is not None and v.dtype == ir.DataType.BFLOAT16 for v in values) and node.op_type not in CPU_BFLOAT16:
            found.add(node.op_type)
    return sorted(found)

# SPDX-License-Identifier: Apache-2.0
"""`prune_layers`: whole layers out of a deep network, or attention or feed-forward of some of them.

    b = a + f(a)    every reader of b reads a, and nothing of f is left

Residual networks bear it, because each block only adds to what the others read (see `structure.blocks`). Unlike
narrower layers it shortens the chain of kernels. Which blocks go is found by removing them one after the other: each
that is left is tried, and the one that costs the outputs least stays out (`outputs`); or all are ordered at once
by how little they turn the vectors that pass through them (`similarity`), for which one run over the data does. Errors
are measured and reported either way.

Put the pass behind `clean` and `fuse`, and before `narrow` and the quantizers. Nothing is retrained or refitted.

References: ShortGPT (Men et al., arXiv 2403.03853; its block influence is `similarity`); SLEB (Song et al., arXiv
2402.09025) and "Shortened LLaMA" (Kim et al., arXiv 2402.02834) for removing one after the other by the model's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from pydantic import Field, model_validator

from ...contracts.errors import InputError
from ..cost import multiply_adds, values_to_measure
from ..statistics import Calibration
from ..structure.blocks import Block, dead_nodes, find_blocks, read_sizes_of_inputs, weights_of
from .base import Left, Pass, Plan, register
from .graph import make_node, replace_value

_Replaced = Sequence[tuple[str, str]]
_ROUNDING = 1e-6


@register("prune_layers")
class PruneLayers(Pass):
    """Settings. Exactly one of the three budgets is given.

    Attributes:
        layers: How many blocks go.
        multiply_adds: Share of the products' multiply-adds that goes at least, 0 to 1.
        maximum_error: Blocks go as long as the relative squared error of the model's outputs stays below it.
        blocks: `layers` (attention with its feed-forward; residual blocks of convolutions), `parts` (attention or
            feed-forward alone) or `any` of both.
        importance: `outputs` or `similarity`.
        batches: Calibration batches that are used.
        exclude: Patterns (`*`, `?`) of blocks', weights' or values' names that stay.
    """

    layers: int | None = Field(default=None, ge=1)
    multiply_adds: float | None = Field(default=None, gt=0, lt=1)
    maximum_error: float | None = Field(default=None, gt=0)
    blocks: Literal["layers", "parts", "any"] = "layers"
    importance: Literal["outputs", "similarity"] = "outputs"
    batches: int = Field(default=12, ge=1)
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_budget(self) -> PruneLayers:
        given = [n for n in ("layers", "multiply_adds", "maximum_error") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give one budget: layers, multiply_adds or maximum_error")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.importance,)

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        assert calibration is not None
        plan, data = Plan(), calibration.sample(self.batches)
        measured = _Measured(model.clone(), data, [_floats(outputs) for outputs in data.run(model)])
        candidates = self._candidates(measured, plan)
        if candidates:
            chosen = self._removed(candidates, measured)
            self._record(chosen, candidates, measured, plan)
        return plan

    def _candidates(self, measured: _Measured, plan: Plan) -> list[Block]:
        """What may go; everything else is left, with its reason."""
        found = find_blocks(measured.model)
        blocks = found.layers if self.blocks == "layers" else found.parts
        if self.blocks == "any":  # a layer of one part is that part
            blocks = [*found.parts, *(layer for layer in found.layers if len(layer.parts) > 1)]
        plan.seen = len(blocks) + len(found.stays)
        plan.left += [Left(stays.name, stays.reason) for stays in found.stays]
        chosen = []
        for block in blocks:
            if block.reason:
                plan.left.append(Left(str(block), block.reason))
            elif self._excluded(block):
                plan.left.append(Left(str(block), "excluded by name"))
            elif not measured.same_shape(block):
                plan.left.append(Left(str(block), "it changes the shape of what it is added to"))
            else:
                chosen.append(block)
        return chosen

    def _excluded(self, block: Block) -> bool:
        values = [
            value for node in (n for part in block.parts for n in part.products) for value in node.inputs if value
        ]
        names = [
            str(block),
            block.name,
            *(name for pair in block.replaced() for name in pair),
            *(v.name for v in values),
        ]
        return any(fnmatchcase(str(name), pattern) for name in names for pattern in self.exclude)

    def _removed(self, candidates: Sequence[Block], measured: _Measured) -> list[_Step]:
        """Blocks in the order in which they go, until the budget is met."""
        order = measured.by_similarity(candidates) if self.importance == "similarity" else None
        steps: list[_Step] = []
        while not self._enough(steps):
            taken = [step.block for step in steps]
            free = [block for block in order or candidates if not _overlaps(block, taken)]
            if not free and self.maximum_error is None:
                raise self._too_much(steps)
            tried = [measured.without(taken, block) for block in (free[:1] if order else free)]
            if self.maximum_error is not None:
                tried = [step for step in tried if step.error <= self.maximum_error]
            if not tried:
                break
            before = steps[-1] if steps else None
            steps.append(min(tried, key=lambda step: self._price(step, before)))
        return steps

    def _enough(self, steps: Sequence[_Step]) -> bool:
        if self.layers is not None:
            return len(steps) >= self.layers
        # Shares are sums of floats
        return bool(steps and self.multiply_adds is not None and steps[-1].saved >= self.multiply_adds - 1e-9)

    def _price(self, step: _Step, before: _Step | None) -> float:
        """What a removal costs: its error, or where blocks of several sizes compete, that for what it saves."""
        if self.layers is not None:
            return step.error
        error, saved = (before.error, before.saved) if before is not None else (0.0, 0.0)
        return (step.error - error) / max(step.saved - saved, 1e-9)

    def _too_much(self, steps: Sequence[_Step]) -> InputError:
        if self.layers is not None:
            what, most = f"remove {self.layers} blocks", f"there are {len(steps)} that may go"
        else:
            saved = steps[-1].saved if steps else 0.0
            what, most = f"save {self.multiply_adds:.0%} of the multiply-adds", f"all that may go saves {saved:.0%}"
        return InputError(
            f"prune_layers cannot {what}: {most}", next_step="Ask for less, or allow `blocks: any` and fewer excludes."
        )

    def _record(self, steps: Sequence[_Step], candidates: Sequence[Block], measured: _Measured, plan: Plan) -> None:
        """The plan: what replaces what, so that `apply` needs no data, and what each removal cost and saved."""
        taken: list[Block] = []
        for step in steps:
            before = measured.dead(taken)
            taken.append(step.block)
            nodes = measured.dead(taken) - before
            weights = [v for v in weights_of(measured.dead(taken)) if v not in weights_of(before)]
            plan.actions.append(
                {
                    "block": step.block.name,
                    "kind": step.block.kind,
                    "replaced": [{"from": a, "to": b} for a, b in step.block.replaced()],
                    "nodes": len(nodes),
                    "weights": [str(value.name) for value in weights],
                    "bytes": sum(value.const_value.nbytes for value in weights if value.const_value is not None),
                    "multiply_adds": measured.work(nodes),
                    "error": float(f"{step.error:.4g}"),
                    **({} if step.similarity is None else {"similarity": round(step.similarity, 4)}),
                }
            )
        for block in candidates:
            if block not in taken:
                within = _overlaps(block, taken)
                plan.left.append(Left(str(block), "a part of it is removed" if within else measured.why_left(block)))
        plan.details = {
            "blocks_removed": len(steps),
            "of": len(candidates),
            "multiply_adds_saved_percent": round(100 * steps[-1].saved, 2) if steps else 0.0,
            "relative_error_at_outputs": float(f"{steps[-1].error:.4g}") if steps else 0.0,
            "removed": plan.actions,
        }

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        read_sizes_of_inputs(model)
        _remove(model, [(pair["from"], pair["to"]) for action in plan.actions for pair in action["replaced"]])
        return model


@dataclass(frozen=True)
class _Step:
    """One removal, after those before it.

    Attributes:
        block: What goes.
        error: Relative squared error of the model's outputs then.
        saved: Share of the multiply-adds saved by then.
        similarity: Mean cosine of what enters and leaves the block, where that was measured.
    """

    block: Block
    error: float
    saved: float
    similarity: float | None = None


@dataclass
class _Measured:
    """What is measured of one graph on calibration data.

    Attributes:
        model: A copy, whose lengths are read from its inputs from here on.
        data: The batches.
        exact: Its outputs as they were.
        alone: The last error seen with each block gone that was tried.
        similarity: Of each block, where asked for.
    """

    model: ir.Model
    data: Calibration
    exact: list[np.ndarray]
    alone: dict[str, float] = field(default_factory=dict)
    similarity: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = sum(float(np.square(y).sum()) for y in self.exact)
        if not self.size:
            raise InputError(
                "prune_layers measures errors at the model's outputs, none of which has floating-point numbers",
                next_step="Give it the graph with logits or embeddings as outputs.",
            )
        read_sizes_of_inputs(self.model)
        if self._error(self.model) > _ROUNDING:
            raise InputError(
                "the graph states shapes that its values do not have",
                next_step="Put the clean pass before prune_layers.",
            )
        shapes = self.data.shapes(self.model, values_to_measure(self.model))
        self.macs = multiply_adds(self.model, shapes)
        self.total = max(sum(self.macs.values()), 1)
        self.unused = dead_nodes(self.model, {})

    def same_shape(self, block: Block) -> bool:
        """Whether the block gives on data what it is given."""
        names = [name for pair in block.replaced() for name in pair]
        shapes = self.data.shapes(self.model, names)
        return all(shapes[a] == shapes[b] for a, b in block.replaced())

    def dead(self, blocks: Iterable[Block]) -> set[ir.Node]:
        """The nodes that go with some blocks."""
        replaced = {part.target: part.source for block in blocks for part in block.parts}
        return dead_nodes(self.model, replaced) - self.unused

    def work(self, nodes: Iterable[ir.Node]) -> int:
        """Multiply-adds of nodes, on the largest batch."""
        return sum(self.macs.get(node, 0) for node in nodes)

    def without(self, taken: Sequence[Block], block: Block) -> _Step:
        """What is left when one more block goes."""
        self.data.progress("prune", f"without {', '.join(str(b) for b in (*taken, block))}")
        copy = self.model.clone()
        _remove(copy, [pair for b in (*taken, block) for pair in b.replaced()])
        error = self._error(copy)
        self.alone[str(block)] = error
        saved = self.work(self.dead((*taken, block))) / self.total
        return _Step(block, error, saved, self.similarity.get(str(block)))

    def _error(self, model: ir.Model) -> float:
        """Relative squared error of the outputs, all batches together."""
        results = zip(self.data.run(model), self.exact, strict=True)
        lost = sum(float(np.square(_floats(outputs) - exact).sum()) for outputs, exact in results)
        return lost / self.size if np.isfinite(lost) else float("inf")

    def why_left(self, block: Block) -> str:
        if str(block) in self.alone:
            return f"without it the outputs' relative error would be {self.alone[str(block)]:.3g}"
        if str(block) in self.similarity:
            return f"others change less (similarity {self.similarity[str(block)]:.4f})"
        return "the budget is met without it"

    def by_similarity(self, blocks: Sequence[Block]) -> list[Block]:
        """Most similar first: ShortGPT's block influence, rising."""
        ends = {str(block): (block.replaced()[0][0], block.replaced()[-1][1]) for block in blocks}
        sums, counts = dict.fromkeys(ends, 0.0), dict.fromkeys(ends, 0)
        copy = _returning(self.model, [name for pair in ends.values() for name in pair])
        for batch, values in zip(self.data.batches, self.data.run(copy), strict=True):
            mask = batch.get(self.data.mask)
            for name, (source, target) in ends.items():
                cosines = _cosines(values[f"{_SEEN}{source}"], values[f"{_SEEN}{target}"], mask)
                sums[name] += float(cosines.sum())
                counts[name] += cosines.size
        self.similarity = {name: sums[name] / max(counts[name], 1) for name in ends}
        return sorted(blocks, key=lambda block: -self.similarity[str(block)])


_SEEN = "onnxpress_seen_"


def _returning(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy whose outputs are some of its values, under names that begin with `_SEEN`."""
    copy = model.clone()
    values = _values(copy)
    copy.graph.outputs.clear()
    for name in dict.fromkeys(names):
        node = make_node("Identity", [values[name]], [f"{_SEEN}{name}"])
        node.outputs[0].type = values[name].type
        copy.graph.append(node)
        copy.graph.outputs.append(node.outputs[0])
    return copy


def _cosines(one: np.ndarray, other: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Between the vectors of two arrays: along the last axis, of images [n, c, h, w] along the channels."""
    axis = 1 if one.ndim == 4 else -1
    x, y = (np.moveaxis(array.astype(np.float64), axis, -1) for array in (one, other))
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    cosines = np.asarray((x * y).sum(axis=-1) / np.maximum(norms, 1e-30))
    return cosines[mask.astype(bool)] if mask is not None and mask.shape == cosines.shape else cosines.reshape(-1)


def _remove(model: ir.Model, replaced: _Replaced) -> None:
    """Let the readers of each second value read the first, and drop what nothing reads any more."""
    values = _values(model)
    stands_for: dict[str, str] = {}
    for source, target in replaced:
        while source in stands_for:
            source = stands_for[source]
        stands_for[target] = source
        old, new = values[target], values[source]
        if old.is_graph_output():  # the name of an output stays, and so does that of what takes its place
            maker = old.producer()
            assert maker is not None
            node = make_node("Identity", [new], [f"{target}_kept"])
            model.graph.insert_after(maker, node)
            node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
            replace_value(old, node.outputs[0])
        else:
            old.replace_all_uses_with(new)
    RemoveUnusedNodesPass()(model)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}


def _overlaps(block: Block, taken: Iterable[Block]) -> bool:
    gone = {part.target for other in taken for part in other.parts}
    return any(part.target in gone for part in block.parts)


def _floats(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """All floating-point outputs in one row, float64."""
    parts = [np.asarray(a, np.float64).reshape(-1) for a in outputs.values() if np.issubdtype(a.dtype, np.floating)]
    return np.concatenate(parts) if parts else np.zeros(0)

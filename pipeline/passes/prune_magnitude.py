# SPDX-License-Identifier: Apache-2.0
"""`prune_magnitude`: zero single weights, at a ratio or in a pattern N:M.

magnitude   the smallest |W_ij| go, of each layer or of all together; needs no data
wanda       the smallest |W_ij| ||X_j||, output by output (sparsity/masks.py)
sparsegpt   by the inverse Hessian of the layer, and what stays makes up for what goes (sparsity/sparsegpt.py)

The last two are measured on calibration data: on the graph as it is, or front to back (`sequential`), each layer on
what the pruned layers before it give, as in the papers. SparseGPT takes convolutions as well, by the Gram matrix of
their patches; see `prunable`.

What this buys is bytes alone. ONNX Runtime's kernels are dense: they multiply by the zeros. The file becomes smaller by
`storage` (store_sparse.py), or later by packing; put a quantizer between with `storage: dense` and `store_sparse` last.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from ..quantization.gptq import output_error
from ..sparsity.masks import Pattern, keep_largest, keep_largest_in_rows, keep_largest_of_all, keep_pattern
from ..sparsity.sparsegpt import prune_sparsegpt
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import initializers_of, label
from .prunable import Choice, Measured, Prunable, measured, stages
from .store_sparse import cheapest_form, write_sparsely

Method = Literal["magnitude", "wanda", "sparsegpt"]


@register("prune_magnitude")
class PruneMagnitude(Pass):
    """Settings.

    Attributes:
        method: See above.
        ratio: The share of weights that go.
        pattern: Instead of a ratio, `N:M`: at most N of M neighbours along the inputs stay, such as `2:4`.
        scope: `layer` takes `ratio` of each layer (wanda: of each output); `global` of all layers together (magnitude).
        sequential: Measure a layer's input when all layers before it have been pruned: a run over the data for each
            stage of the graph.
        damping: SparseGPT's share of the mean diagonal of X^T X that is added to the diagonal.
        storage: `dense`; `sparse`, `bitmap` or `auto` where that makes a weight smaller: see `store_sparse`.
        operators: Whose weights are pruned; `Gather` for embeddings.
        minimum_elements: Smaller weights stay as they are.
        exclude: Patterns (`*`, `?`) of node or weight names that stay as they are.
    """

    method: Method = "magnitude"
    ratio: float = Field(default=0.5, gt=0, lt=1)
    pattern: str | None = None
    scope: Literal["layer", "global"] = "layer"
    sequential: bool = False
    damping: float = Field(default=0.01, ge=0)
    storage: Literal["dense", "sparse", "bitmap", "auto"] = "dense"
    operators: tuple[Literal["MatMul", "Gemm", "Conv", "Gather"], ...] = ("MatMul", "Gemm", "Conv")
    minimum_elements: int = Field(default=1024, ge=0)
    exclude: tuple[str, ...] = ()

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, text: str | None) -> str | None:
        if text is not None:
            Pattern.of(text)
        return text

    @model_validator(mode="after")
    def _agree(self) -> PruneMagnitude:
        if self.pattern is not None and "ratio" in self.model_fields_set:
            raise ValueError("a pattern says how many weights go: leave ratio out")
        if self.scope == "global" and (self.method != "magnitude" or self.pattern is not None):
            raise ValueError("scope global compares weights of all layers, which only magnitude at a ratio can do")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.method == "magnitude" else ("grams",)

    @property
    def _target(self) -> float | Pattern:
        return self.ratio if self.pattern is None else Pattern.of(self.pattern)

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan, working = Plan(), model.clone()
        layers = self._layers(working, plan)
        masks = self._global_masks(layers)
        outcomes: dict[str, dict[str, Any]] = {}
        together = stages(working, layers) if self.sequential and self.needs else iter([layers])
        for stage in together:
            found = (
                ((layer, "there is no calibration data") for layer in stage)
                if calibration is None
                else measured(working, stage, calibration, self.damping)
            )
            for layer, known in found:
                pruned, outcomes[layer.key] = self._prune(layer, known, masks.get(layer))
                plan.arrays[layer.key] = layer.as_stored(pruned)
                layer.weight.const_value = ir.Tensor(plan.arrays[layer.key], name=layer.weight.name)
        self._decide(model, layers, outcomes, plan)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        by_key = initializers_of(model)
        for action in plan.actions:
            weight = by_key[action["weight"]]
            weight.const_value = ir.Tensor(plan.arrays.pop(action["weight"]), name=weight.name)
            write_sparsely(model, weight, action["storage"])
        return model

    def _layers(self, model: ir.Model, plan: Plan) -> list[Prunable]:
        """The weights to prune, in graph order; what stays is listed in `plan.left`."""
        layers = []
        for found in Choice(self.operators, self.exclude, self.minimum_elements).find(model):
            nodes, reason = (found.nodes, None) if isinstance(found, Prunable) else found
            plan.seen += len(nodes)
            if isinstance(found, Prunable):
                target = self._target
                if isinstance(target, Pattern) and found.neighbours % target.group:
                    reason = f"its {found.neighbours} inputs are no multiple of {target.group}"
                elif isinstance(target, float) and not round(target * found.matrix().size):
                    reason = f"{target:g} of its weights is less than one"
                else:
                    layers.append(found)
            if reason:
                plan.left += [Left(label(node), reason) for node in nodes]
        return layers

    def _global_masks(self, layers: list[Prunable]) -> dict[Prunable, np.ndarray]:
        if self.scope != "global":
            return {}
        scores = [np.abs(layer.matrix()) for layer in layers]
        remove = round(self.ratio * sum(part.size for part in scores))
        return dict(zip(layers, keep_largest_of_all(scores, remove), strict=True))

    def _prune(
        self, layer: Prunable, known: Measured | str, mask: np.ndarray | None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The pruned matrix, float32 [outputs, K], and what is to be reported of it."""
        matrix, method, fallback = layer.matrix(), self.method, None
        if isinstance(known, str):
            method, fallback = "magnitude", known
        elif method == "sparsegpt" and not known.whole:
            method, fallback = "wanda", "the Gram matrix of its patches is not measured"
        elif method == "sparsegpt" and known.feedback is None:
            method, fallback = "magnitude", "its input is zero on all calibration data"
        outcome: dict[str, Any] = {"method": method}
        if method != self.method:
            outcome["instead_of"] = f"{self.method}: {fallback}"
        if method == "sparsegpt":
            assert isinstance(known, Measured)
            assert known.feedback is not None
            pruned = prune_sparsegpt(matrix, known.feedback, self._target)
        else:
            keep = mask if mask is not None else self._keep(layer, matrix, known if method == "wanda" else None)
            pruned = np.where(keep, matrix, np.float32(0))
        outcome["sparsity_percent"] = round(100 - 100 * np.count_nonzero(pruned) / pruned.size, 2)
        outcome.update(_errors(matrix, pruned, known, updated=method == "sparsegpt"))
        return pruned, outcome

    def _keep(self, layer: Prunable, matrix: np.ndarray, known: Measured | str | None) -> np.ndarray:
        scores, target = np.abs(matrix), self._target
        if isinstance(known, Measured):
            scores *= known.norms(layer)
        if isinstance(target, Pattern):
            return keep_pattern(scores, target)
        if known is None:
            return keep_largest(scores, round(target * scores.size))
        return keep_largest_in_rows(scores, round(target * scores.shape[1]))

    def _decide(self, model: ir.Model, layers: list[Prunable], outcomes: dict[str, dict[str, Any]], plan: Plan) -> None:
        """Fill in the plan's actions and details, in graph order; a weight that is as it was is left."""
        originals = initializers_of(model)
        kept = total = 0
        for layer in layers:
            original, array = originals[layer.key].const_value, plan.arrays[layer.key]
            assert original is not None
            kept, total = kept + int(np.count_nonzero(array)), total + array.size
            if np.array_equal(original.numpy(), array):
                plan.left += [Left(label(node), "it is as sparse already") for node in layer.nodes]
                del plan.arrays[layer.key], outcomes[layer.key]
                continue
            in_main = originals[layer.key].graph is model.graph
            form = cheapest_form(array, self.storage, main_graph=in_main)
            plan.actions.append({"weight": layer.key, "nodes": [label(n) for n in layer.nodes], "storage": form})
        plan.details = {
            "weights_pruned": len(plan.actions),
            "nonzeros": kept,
            "sparsity_percent": round(100 - 100 * kept / total, 2) if total else 0.0,
            "speed": "no speed-up on this provider: ONNX Runtime's kernels are dense",
            "bytes": _bytes_line(plan),
            "layers": {layer.key: outcomes[layer.key] for layer in layers if layer.key in outcomes},
        }


def _errors(matrix: np.ndarray, pruned: np.ndarray, known: Measured | str, *, updated: bool) -> dict[str, float]:
    """How far the layer's outputs are off on the calibration data, in percent; without that, how far its weights are.

    || X (W' - W) || / || X W ||, from the Gram matrix; `without_update` for the same zeros and no other change.
    """
    if isinstance(known, str) or not known.whole:
        size = float(np.linalg.norm(matrix))
        return {"weight_error_percent": round(100 * float(np.linalg.norm(pruned - matrix)) / size, 2) if size else 0.0}
    gram = known.gram.astype(np.float32)
    signal = float(output_error(matrix, gram).sum())

    def percent(other: np.ndarray) -> float:
        return round(100 * (float(output_error(other - matrix, gram).sum()) / signal) ** 0.5, 2) if signal else 0.0

    found = {"output_error_percent": percent(pruned)}
    if updated:
        found["without_update_percent"] = percent(np.where(pruned != 0, matrix, np.float32(0)))
    return found


def _bytes_line(plan: Plan) -> str:
    forms = [action["storage"] for action in plan.actions]
    if all(form == "dense" for form in forms):
        return "dense, as many as before: packing, or store_sparse, makes the file smaller"
    return ", ".join(f"{forms.count(form)} {form}" for form in sorted(set(forms)))

# SPDX-License-Identifier: Apache-2.0
"""`share_weights`: weights that need not be stored twice, or not in full.

tied        a matrix that is another one transposed, bit by bit, as after untying an embedding and an output layer:
            one stays, the other is its Transpose, which the runtime makes when it loads
similar     a weight as good as equal to an earlier one of its shape, within `similarity`: one stays (off by default)
palettes    2^bits values for a weight, or for some of its channels each, and codes of `bits` bits in place of the
            weights (`quantization/palettes.py`); with `sensitive`, squared errors count as much as the inputs they meet

The file is smaller by all of that. It is not faster: ONNX Runtime unpacks when it loads, and computes in fp32. Only
rows that a Gather picks stay packed in memory. Put the clean pass before: it merges weights that are equal as they
stand, and after this pass it would fold the palettes back into weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..quantization.palettes import find_palette, squared_error
from ..statistics import Calibration, Wanted
from .base import Left, Pass, Plan, register
from .folding import matrix_of
from .graph import attribute, consumers, drop_unused_weights, initializers_of, is_op, make_node
from .matrix_weights import drop_dead_transposes, uses_of, why_unfit
from .palette_nodes import Coded, picks_rows, stored_bytes, write_palette

_FORM = "packed codes and palettes; the runtime unpacks them when it loads the model and computes in fp32"


@register("share_weights")
class ShareWeights(Pass):
    """Settings.

    Attributes:
        bits: Of a code, 1 to 8; None: no palettes.
        group_size: How many output channels (rows of an embedding) share a palette; None: all of the weight's.
        sensitive: Weigh errors by the mean square of the inputs they meet; needs calibration data.
        tie: Store a matrix that is another one transposed once.
        similarity: Two weights are one when putting the first in the second's place changes its output on the
            calibration data (without data: the weight) by no more than this share of its norm; None: never.
        minimum_elements: Smaller weights stay as they are.
        exclude: Patterns (`*`, `?`) of names of weights that stay as they are.
    """

    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] | None = 6
    group_size: int | None = Field(default=None, ge=1)
    sensitive: bool = False
    tie: bool = True
    similarity: float | None = Field(default=None, gt=0, lt=1)
    minimum_elements: int = Field(default=4096, ge=0)
    exclude: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return ("grams",) if self.sensitive else ()

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        weights = self._weights(model, plan)
        gone = _transposed_pairs(weights) if self.tie else {}
        plan.actions += [{"weight": key, "how": "tied", "to": other} for key, other in gone.items()]
        left_over = {key: value for key, value in weights.items() if key not in gone}
        measured = calibration if self.sensitive or self.similarity is not None else None
        inputs = _Inputs(model, left_over, measured)
        if self.similarity is not None:
            known = set(gone.values())
            plan.actions += self._similar({k: v for k, v in left_over.items() if k not in known}, inputs)
        dropped = {action["weight"] for action in plan.actions}
        if self.bits is not None:
            for key, weight in left_over.items():
                if key not in dropped:
                    self._palette(key, weight, inputs.importance(key) if self.sensitive else None, plan)
        plan.details = self._details(plan, inputs)
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        by_key = initializers_of(model)
        for action in plan.actions:
            weight = by_key[action["weight"]]
            if action["how"] == "tied":
                other = by_key[action["to"]]
                graph = other.graph
                assert isinstance(graph, ir.Graph)
                _read_transposed(graph, weight, other)
            elif action["how"] == "similar":
                weight.replace_all_uses_with(by_key[action["to"]])
            else:
                codes, palettes = (plan.arrays.pop(f"{action['weight']}|{part}") for part in ("codes", "palettes"))
                write_palette(model, weight, Coded(codes, palettes, action["bits"], action["axis"]))
                weight.const_value = None  # let go of the fp32 copy now: a large model is never held twice
        drop_unused_weights(model)
        return model

    # ---------------------------------------------------------------------------------------------------- candidates

    def _weights(self, model: ir.Model, plan: Plan) -> dict[str, ir.Value]:
        """The fp32 weights with more than one axis, by their names in plans; what stays is listed in `plan.left`."""
        found = {}
        for key, value in initializers_of(model).items():
            tensor = value.const_value
            assert tensor is not None
            if len(tensor.shape) < 2 or not tensor.dtype.is_floating_point():
                continue
            plan.seen += 1
            reason = None
            if any(fnmatchcase(str(value.name), pattern) for pattern in self.exclude):
                reason = "excluded by name"
            elif value.is_graph_input():
                reason = "the weight is also an input of the graph; put the clean pass before"
            elif value.is_graph_output():
                reason = "the weight is an output of the graph"
            reason = reason or why_unfit(value, self.minimum_elements)
            if reason is None:
                found[key] = value
            else:
                plan.left.append(Left(key, reason))
        return found

    def _similar(self, weights: Mapping[str, ir.Value], inputs: _Inputs) -> list[dict[str, Any]]:
        """Which weights an earlier one of the same shape and use can stand for, and what that changes."""
        assert self.similarity is not None
        actions: list[dict[str, Any]] = []
        kept: dict[tuple[object, ...], list[str]] = {}
        for key, weight in weights.items():
            array = _array(weight)
            alike = kept.setdefault((array.shape, inputs.axis(key), weight.graph), [])
            scored = [(inputs.difference(key, array, _array(weights[other])), other) for other in alike]
            least, other = min(scored, default=(np.inf, ""))
            if least <= self.similarity:
                actions.append({"weight": key, "how": "similar", "to": other, "changes": round(least, 5)})
            else:
                alike.append(key)
        return actions

    # ------------------------------------------------------------------------------------------------------ palettes

    def _palette(self, key: str, weight: ir.Value, importance: np.ndarray | None, plan: Plan) -> None:
        assert self.bits is not None
        array, axis = _array(weight), _channel_axis(weight)
        groups = _groups(array.shape[axis], self.group_size)
        by_row = any(picks_rows(use.node, use.idx) for use in weight.uses())
        if stored_bytes(array.shape, self.bits, len(groups), by_row=by_row) >= array.nbytes:
            plan.left.append(Left(key, f"codes and {len(groups)} palettes of {2**self.bits} values take more bytes"))
            return
        coded = _coded(array, axis, groups, self.bits, importance)
        plan.arrays[f"{key}|codes"], plan.arrays[f"{key}|palettes"] = coded.codes, coded.palettes
        noise, signal = squared_error(array, coded.restored()), squared_error(array, np.zeros((), np.float32))
        sqnr = round(float(10 * np.log10(signal / noise)), 2) if noise and signal else None
        action = {"weight": key, "how": "palette", "bits": self.bits, "axis": axis, "palettes": len(groups)}
        plan.actions.append({**action, "weight_sqnr_db": sqnr})

    def _details(self, plan: Plan, inputs: _Inputs) -> dict[str, Any]:
        how = [action["how"] for action in plan.actions]
        details: dict[str, Any] = {"tied": how.count("tied"), "similar": how.count("similar")}
        if self.bits is not None:
            details |= {"palettes": how.count("palette"), "bits": self.bits, "stored_as": _FORM}
        if self.sensitive or self.similarity is not None:
            taken = {action["weight"] for action in plan.actions if action["how"] != "tied"}
            details["judged_by_weight_alone"] = {k: reason for k, reason in inputs.missing.items() if k in taken}
        kept = ("to", "changes", "weight_sqnr_db", "palettes")
        details["weights"] = {
            action["weight"]: {"how": action["how"], **{k: action[k] for k in kept if k in action}}
            for action in plan.actions
        }
        return details


class _Inputs:
    """What calibration says about the inputs of weights.

    Attributes:
        missing: Why nothing is known about a weight's input.
    """

    def __init__(self, model: ir.Model, weights: Mapping[str, ir.Value], calibration: Calibration | None) -> None:
        self._axes = {key: _input_axis(value) for key, value in weights.items()}
        self._weights = weights
        self._grams: dict[str, np.ndarray] = {}
        self._squares: dict[str, np.ndarray] = {}
        self.missing = dict.fromkeys(weights, "no calibration data")
        if calibration is not None:
            self._measure(model, calibration)

    def axis(self, key: str) -> int | None:
        """The axis of a product's weight that runs over its input's channels; None for all other weights."""
        return self._axes[key]

    def importance(self, key: str) -> np.ndarray | None:
        """What an error at each weight counts, broadcastable to it; None where nothing is known."""
        squares = self._squares.get(key)
        if squares is None:
            return None
        array = _array(self._weights[key])
        sizes = [1] * array.ndim
        axis = self._axes[key]
        sizes[1 if axis is None else axis] = -1
        return squares.reshape(sizes)

    def difference(self, key: str, weight: np.ndarray, other: np.ndarray) -> float:
        """How much `other` in the place of `weight` changes: ||X (W - V)|| / ||X W||, or ||W - V|| / ||W||."""
        gram, axis = self._grams.get(key), self._axes[key]
        if gram is None:
            return _ratio(squared_error(weight, other), squared_error(weight, np.zeros((), np.float32)))
        one, off = weight.astype(np.float64), weight.astype(np.float64) - other
        if axis == 1:
            one, off = one.T, off.T
        return _ratio(float(np.sum(off * (gram @ off))), float(np.sum(one * (gram @ one))))

    def _measure(self, model: ir.Model, calibration: Calibration) -> None:
        """Gram matrices of products' inputs, channel means of convolutions'."""
        products: dict[str, list[str]] = {}
        convolutions: dict[str, list[str]] = {}
        for key, weight in self._weights.items():
            name, reason = _input_of(weight, self._axes[key])
            if name is None:
                self.missing[key] = reason
            elif self._axes[key] is None:
                convolutions.setdefault(name, []).append(key)
            else:
                products.setdefault(name, []).append(key)
        for group in calibration.gram_groups(model, products):
            found = calibration.collect(model, Wanted(grams=group))
            for name in group:
                for key in products[name]:
                    if name in found.grams:
                        self._grams[key] = found.grams[name].matrix
                        self._squares[key] = np.diag(self._grams[key])
                    self._note(key, found.missing.get(name, "always masked"))
        found = calibration.collect(model, Wanted(channels=dict.fromkeys(convolutions, 1)))
        for name, keys in convolutions.items():
            for key in keys:
                if name in found.channels:  # no second moment is measured along this axis: the first one, squared
                    self._squares[key] = found.channels[name].mean_abs ** 2
                self._note(key, found.missing.get(name, "always masked"))

    def _note(self, key: str, reason: str) -> None:
        if key in self._squares:
            self.missing.pop(key, None)
        else:
            self.missing[key] = f"its input is {reason}"


def _input_axis(weight: ir.Value) -> int | None:
    axes = set()
    for use in uses_of(weight) if len(weight.shape or ()) == 2 else ():
        matrix = matrix_of(use.node)
        axes.add(None if isinstance(matrix, str) or matrix.stored is not weight else matrix.input_axis)
    return axes.pop() if len(axes) == 1 else None


def _input_of(weight: ir.Value, axis: int | None) -> tuple[str | None, str]:
    """The one activation that a weight is multiplied by, or why there is none."""
    nodes = [use.node for use in uses_of(weight)] if axis is not None else consumers(weight)
    if axis is None and not all(is_op(n, "Conv") and attribute(n, "group", 1) == 1 for n in nodes):
        return None, "the weight is not that of a product, or of a convolution in one group"
    names = {str(node.inputs[0].name) for node in nodes if node.inputs[0] is not None}
    return (names.pop(), "") if len(names) == 1 else (None, "the weight is multiplied by several inputs")


def _channel_axis(weight: ir.Value) -> int:
    """The axis of output channels (or rows): 1 where a product reads the weight as [in, out], else 0."""
    return 1 if _input_axis(weight) == 0 else 0


def _groups(channels: int, size: int | None) -> list[slice]:
    """Channels that share a palette: so many at a time, evenly."""
    count = 1 if size is None else -(-channels // size)
    length = -(-channels // count)
    return [slice(start, start + length) for start in range(0, channels, length)]


def _coded(array: np.ndarray, axis: int, groups: list[slice], bits: int, importance: np.ndarray | None) -> Coded:
    codes = np.empty(array.shape, np.uint8)
    palettes = np.zeros((len(groups), 1 << bits), np.float32)
    for number, channels in enumerate(groups):
        part = (slice(None),) * axis + (channels,)
        palette = find_palette(array[part], bits, importance)
        codes[part] = palette.codes
        palettes[number, : len(palette.values)] = palette.values
    return Coded(codes, palettes, bits, axis)


def _transposed_pairs(weights: Mapping[str, ir.Value]) -> dict[str, str]:
    """Weight -> an earlier weight that it is the transpose of, bit by bit."""
    matrices = {k: v for k, v in weights.items() if v.const_value is not None and len(v.const_value.shape) == 2}
    shapes = {(v.graph, _array(v).shape) for v in matrices.values()}
    digests: dict[tuple[object, bytes], str] = {}
    pairs: dict[str, str] = {}
    for key, value in matrices.items():
        array = _array(value)
        if (value.graph, array.shape[::-1]) not in shapes:
            continue
        other = digests.get((value.graph, _digest(array.T)))
        if other is not None and other not in pairs:
            pairs[key] = other
        else:
            digests.setdefault((value.graph, _digest(array)), key)
    return pairs


def _read_transposed(graph: ir.Graph, weight: ir.Value, other: ir.Value) -> None:
    """Let the readers of `weight`, which is `other` transposed, read `other`: where they transpose, as it is."""
    for node in _transposes(weight):
        node.outputs[0].replace_all_uses_with(other)
    drop_dead_transposes(weight)
    if not weight.uses():
        return
    turned = make_node("Transpose", [other], [str(weight.name)], attributes={"perm": [1, 0]})
    turned.outputs[0].shape, turned.outputs[0].type = weight.shape, weight.type
    for node in _transposes(other):
        if node is not turned:
            node.outputs[0].replace_all_uses_with(turned.outputs[0])
    graph.insert_before(graph[0], turned)
    weight.replace_all_uses_with(turned.outputs[0])
    drop_dead_transposes(other)


def _transposes(weight: ir.Value) -> list[ir.Node]:
    nodes = [node for node in consumers(weight) if is_op(node, "Transpose")]
    turning = [node for node in nodes if list(attribute(node, "perm", [1, 0])) == [1, 0]]
    return [node for node in turning if not node.outputs[0].is_graph_output()]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).digest()


def _array(weight: ir.Value) -> np.ndarray:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _ratio(noise: float, signal: float) -> float:
    """Of norms, from their squares."""
    return float(np.sqrt(max(noise, 0.0) / signal)) if signal > 0 else 0.0 if noise <= 0 else float("inf")

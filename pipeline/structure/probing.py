# SPDX-License-Identifier: Apache-2.0
"""Sizes that only the run tells, made comparable: the graph with a prime number for each of them.

Whether a Reshape merges the batch with the heads, or `[batch x heads, ..]` becomes `[batch, heads, ..]` again, is a
question about products of sizes. With a prime for each open size of an input, shape inference and constant folding
answer it in plain numbers, also where the graph computes with sizes. A number that comes out the same for small, for
middling and for large inputs depends on none of them: it is fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer

from ..passes.graph import constant, dims, is_op
from ..passes.missing_shapes import fill_shapes

LONGEST = 64
"""Elements of the largest vector of sizes."""


@dataclass(frozen=True)
class Probe:
    """What is known for one choice of primes.

    Attributes:
        shapes: Value name to shape.
        numbers: Value name to its whole numbers, where they follow from sizes.
    """

    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    def size(self, name: str, axis: int) -> int | None:
        shape = self.shapes.get(name)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None


def probe(model: ir.Model) -> tuple[Probe, ...]:
    """One probe to reckon with, and others to tell what is fixed, if the graph's inputs leave any size open.

    Both smaller and larger numbers are needed: a window of 16 is cut short in few samples, and a second one begins in
    many. Where a table of positions has too few rows for the large ones, nothing is known of what is behind it.
    """
    taken = _static_sizes(model)
    first = _probed(model, _primes(17, taken))
    if all(isinstance(size, int) for value in model.graph.inputs for size in dims(value) or ()):
        return (first,)
    return first, _probed(model, itertools.count(2)), _probed(model, _primes(1009, taken))


def agreed(numbers: Sequence[int | None]) -> int | None:
    """The number that all probes have, of which only the last, the large one, may know nothing."""
    known = [number for number in numbers if number is not None]
    enough = len(known) >= min(len(numbers), 2) and None not in numbers[:2]
    return known[0] if enough and len(set(known)) == 1 else None


def _static_sizes(model: ir.Model) -> set[int]:
    values = [*model.graph.inputs, *model.graph.initializers.values(), *_results(model)]
    return {size for value in values for size in dims(value) or () if isinstance(size, int)}


def _primes(start: int, taken: set[int]) -> Iterator[int]:
    """Primes that divide no size of the graph; small ones, since a table of positions has only so many rows."""
    for number in range(start, 10**6, 2):
        is_prime = all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))
        if is_prime and not any(size % number == 0 for size in taken if size):
            yield number


def _probed(model: ir.Model, primes: Iterator[int]) -> Probe:
    shadow = model.clone()
    symbols = _numbered_inputs(shadow, primes)
    for value in _results(shadow):
        # Behind an operator that ONNX does not know, the names of sizes are all there is
        maker, shape = value.producer(), dims(value)
        foreign = maker is not None and maker.domain not in ("", "ai.onnx") and shape is not None
        value.shape = ir.Shape([symbols.get(str(s), s) for s in shape or ()]) if foreign else None
        if _may_hold_sizes(value, shape) and value not in shadow.graph.outputs:
            shadow.graph.outputs.append(value)  # or it would be dropped when its reader is folded
    _fold(shadow)
    if any(node.domain not in ("", "ai.onnx") and dims(node.outputs[0]) is None for node in shadow.graph):
        fill_shapes(shadow)
        _fold(shadow)
    result = Probe()
    for value in (*shadow.graph.inputs, *shadow.graph.initializers.values(), *_results(shadow)):
        shape = dims(value)
        if shape is not None:
            result.shapes[str(value.name)] = tuple(size if isinstance(size, int) else None for size in shape)
        if _may_hold_sizes(value, shape):
            array = constant(value)
            if array is not None and array.size <= LONGEST:
                result.numbers[str(value.name)] = array
    return result


def _may_hold_sizes(value: ir.Value, shape: Sequence[object] | None) -> bool:
    return value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and len(shape or ()) <= 1


def _fold(model: ir.Model) -> None:
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=LONGEST,
        output_size_limit=LONGEST,
        should_fold=_small_filling,
    )


def _small_filling(node: ir.Node) -> bool | None:
    """Yes to a small ConstantOfShape, which is not folded otherwise; a target of Expand is made with one."""
    target = constant(node.inputs[0]) if is_op(node, "ConstantOfShape") else None
    return True if target is not None and np.prod(target, dtype=np.float64) <= LONGEST else None


def _numbered_inputs(model: ir.Model, primes: Iterator[int]) -> dict[str, int]:
    """Give each open size of the inputs a number; returns those of named sizes. `a + b` is the sum of two."""
    symbols: dict[str, int] = {}
    sums: list[tuple[ir.Value, list[int | str]]] = []
    for value in model.graph.inputs:
        sizes: list[int | str] = []
        for axis, size in enumerate(dims(value) or ()):
            # Height and width are halved and doubled on their way through a network of convolutions
            scale = 32 if axis >= 2 and len(dims(value) or ()) >= 4 else 1
            if size is None:
                size = scale * next(primes)
            elif isinstance(size, str) and "+" not in size and size not in symbols:
                symbols[size] = scale * next(primes)
            sizes.append(size)
        if value.shape is not None and not value.is_initializer():
            sums.append((value, sizes))
    for value, sizes in sums:
        for size in sizes:
            if isinstance(size, str) and size not in symbols:
                parts = [part.strip() for part in size.split("+")]
                known = [int(part) if part.isdigit() else symbols.get(part) for part in parts]
                symbols[size] = next(primes) if None in known else sum(number or 0 for number in known)
        value.shape = ir.Shape([symbols[size] if isinstance(size, str) else size for size in sizes])
    return symbols


def _results(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph:
        yield from node.outputs

# SPDX-License-Identifier: Apache-2.0
"""How reading few positions of an operator's result becomes reading few positions of its inputs.

    f(x)[:, 0]  =  f(x[:, 0])        where f treats the positions of that axis each by itself

`inputs_for` answers, for one node and one axis of its output, which axis of which input has the same positions, or says
why that is not so: because the operator mixes them (a Softmax over that axis), or is not known here. Inputs that it
does not name are read as they are: weights, the keys and values of an attention, what is broadcast along the axis.

References: the operators of the ONNX specification; MultiHeadAttention and SkipLayerNormalization in ONNX Runtime's
ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from .graph import MICROSOFT, add_weight, attribute, constant, dims, is_op

_TO_THE_END = np.iinfo(np.int32).max
"""Ends of a Slice from here on are those of the axis."""


@dataclass(frozen=True)
class Selection:
    """Positions of some axis: a list of them, or from `start` to before `end`, as Slice counts."""

    indices: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    @property
    def count(self) -> int | None:
        """How many there are; None for a Slice, which takes fewer where the axis is short."""
        return len(self.indices) or None

    @property
    def at_most(self) -> int | None:
        """How many there are on a long axis; None where that depends on its length."""
        if self.indices:
            return len(set(self.indices))
        if self.start < 0 <= self.end:
            return -self.start if self.end >= _TO_THE_END else None
        return self.end - self.start if (self.start < 0) == (self.end < 0) and self.end < _TO_THE_END else None

    @property
    def takes_a_single_one(self) -> bool:
        """Whether, of an axis of size 1, it takes the one position: it may then be applied to what is broadcast."""
        if self.indices:
            return self.indices in ((0,), (-1,))
        return self.end >= 1 if self.start == 0 else self.start < 0 and self.end >= _TO_THE_END

    def __str__(self) -> str:
        if self.indices:
            return ", ".join(map(str, self.indices))
        return f"{self.start}:{'' if self.end >= _TO_THE_END else self.end}"


@dataclass
class Passage:
    """What a node has to read for a selection of its output.

    Attributes:
        inputs: Index of an input to the axis of it that is selected from; the others are read as they are.
        edit: What else changes about the node.
        is_product: Whether the node multiplies matrices, so that fewer positions are much less work.
    """

    inputs: dict[int, int]
    edit: Callable[[ir.Model], None] | None = None
    is_product: bool = False


@dataclass(frozen=True)
class _Asked:
    """One question to a rule.

    Attributes:
        node: The operator.
        axis: Axis of its first output, from 0.
        selection: What is read along that axis.
        shape: Of its first output.
    """

    node: ir.Node
    axis: int
    selection: Selection
    shape: tuple[int | str | None, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def input_shape(self, index: int) -> tuple[int | str | None, ...]:
        found = dims(self.input(index))
        if found is None:
            raise _StopsHere(f"the shape of an input of {self.node.op_type} is not known")
        return found

    def spread_over(self, index: int, axis: int) -> bool:
        """Whether an input has the positions along its `axis`, and not one that is broadcast; negative: no such axis.

        Raises:
            _StopsHere: The graph does not tell, and it matters.
        """
        if axis < 0:
            return False
        size = self.input_shape(index)[axis]
        if size == 1:
            return False
        if self.selection.takes_a_single_one or (size is not None and size == self.shape[self.axis]):
            return True
        raise _StopsHere(f"it is not known whether an input of {self.node.op_type} is broadcast")


class _StopsHere(Exception):
    """The reason why a selection does not pass."""


_Rule = Callable[[_Asked], Passage]


def inputs_for(node: ir.Node, axis: int, selection: Selection) -> Passage | str:
    """What `node` must read if of its outputs only `selection` along `axis` is read; or why all is needed."""
    shape = dims(node.outputs[0])
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = _RULES.get((domain, node.op_type))
    if rule is None:
        return f"{node.op_type} may mix positions"
    if shape is None or axis >= len(shape):
        return f"the shape of what {node.op_type} makes is not known"
    if not is_op(node, "Split") and any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return f"more than the first result of {node.op_type} is read"
    try:
        passage = rule(_Asked(node, axis, selection, shape))
    except _StopsHere as reason:
        return str(reason)
    return passage if passage.inputs else f"{node.op_type} makes the axis itself"


def _mixed(asked: _Asked) -> _StopsHere:
    return _StopsHere(f"{asked.node.op_type} mixes the positions")


# ---------------------------------------------------------------------------------------------- one value to another


def _broadcast(asked: _Asked, indices: Iterable[int] | None = None) -> dict[int, int]:
    """The axis of each input (or of those in `indices`) in a broadcast from the right."""
    found = {}
    for index in range(len(asked.node.inputs)) if indices is None else indices:
        if asked.input(index) is None:
            continue
        axis = asked.axis - asked.rank + len(asked.input_shape(index))
        if asked.spread_over(index, axis):
            found[index] = axis
    return found


def _elementwise(asked: _Asked) -> Passage:
    return Passage(_broadcast(asked))


def _first_input(asked: _Asked) -> Passage:
    """Element by element of the first input; the others are settings of the operator."""
    return Passage({0: asked.axis})


def _softmax(asked: _Asked) -> Passage:
    graph = asked.node.graph
    opset = graph.opset_imports.get("", 0) if isinstance(graph, ir.Graph) else 0
    over = attribute(asked.node, "axis", -1 if opset >= 13 else 1) % asked.rank
    # Before opset 13, it took all axes from that one on together
    if asked.axis == over or (opset < 13 and asked.axis > over):
        raise _mixed(asked)
    return Passage({0: asked.axis})


def _normalization(asked: _Asked) -> Passage:
    if asked.axis >= attribute(asked.node, "axis", -1) % asked.rank:
        raise _mixed(asked)
    return Passage({0: asked.axis, **_broadcast(asked, range(1, len(asked.node.inputs)))})


def _skip_normalization(asked: _Asked) -> Passage:
    if asked.axis == asked.rank - 1:
        raise _mixed(asked)
    return Passage(_broadcast(asked, (0, 1)))


def _batch_normalization(asked: _Asked) -> Passage:
    if asked.axis == 1:
        raise _StopsHere("BatchNormalization has a scale for each position")
    return Passage({0: asked.axis})


def _reduction(asked: _Asked) -> Passage:
    rank, axes = len(asked.input_shape(0)), _axes(asked, len(asked.input_shape(0)))
    if not axes:
        raise _mixed(asked)
    if attribute(asked.node, "keepdims", 1):
        if asked.axis in axes:
            raise _mixed(asked)
        return Passage({0: asked.axis})
    return Passage({0: [a for a in range(rank) if a not in axes][asked.axis]})


# ------------------------------------------------------------------------------------------------------- moving axes


def _axes(asked: _Asked, rank: int) -> list[int]:
    """The axes that the node names in an attribute, or in its second input; none if it names none."""
    named = attribute(asked.node, "axes", None)
    if named is None and asked.input(1) is not None:
        named = constant(asked.input(1))
        if named is None:
            raise _StopsHere(f"the axes of {asked.node.op_type} are computed")
    return [] if named is None else [int(a) % rank for a in np.ravel(named)]


def _transpose(asked: _Asked) -> Passage:
    order = attribute(asked.node, "perm", range(asked.rank)[::-1])
    return Passage({0: int(order[asked.axis])})


def _unsqueeze(asked: _Asked) -> Passage:
    made = _axes(asked, asked.rank)
    if asked.axis in made:
        return Passage({})
    return Passage({0: asked.axis - sum(a < asked.axis for a in made)})


def _squeeze(asked: _Asked) -> Passage:
    rank = len(asked.input_shape(0))
    dropped = _axes(asked, rank)
    if len(dropped) != rank - asked.rank:
        raise _StopsHere("Squeeze does not name its axes")
    return Passage({0: [a for a in range(rank) if a not in dropped][asked.axis]})


def _flatten(asked: _Asked) -> Passage:
    if asked.axis == 0 and attribute(asked.node, "axis", 1) % len(asked.input_shape(0)) == 1:
        return Passage({0: 0})
    raise _StopsHere("Flatten joins the axis with others")


def _concat(asked: _Asked) -> Passage:
    if asked.axis == attribute(asked.node, "axis", 0) % asked.rank:
        raise _StopsHere("Concat joins inputs along the axis")
    return Passage(dict.fromkeys(range(len(asked.node.inputs)), asked.axis))


def _split(asked: _Asked) -> Passage:
    if asked.axis == attribute(asked.node, "axis", 0) % asked.rank:
        raise _StopsHere("Split cuts along the axis")
    return Passage({0: asked.axis})


def _slice(asked: _Asked) -> Passage:
    axes = constant(asked.input(3))
    if axes is None or asked.axis in {int(a) % asked.rank for a in axes}:
        raise _StopsHere("Slice may cut along the axis")
    return Passage({0: asked.axis})


def _gather(asked: _Asked) -> Passage:
    """Of [.., axis, ..] and indices [i, j]: [.., i, j, ..]."""
    over = attribute(asked.node, "axis", 0) % len(asked.input_shape(0))
    count = len(asked.input_shape(1))
    if asked.axis < over:
        return Passage({0: asked.axis})
    if asked.axis < over + count:
        return Passage({1: asked.axis - over})
    return Passage({0: asked.axis - count + 1})


@dataclass(frozen=True)
class _Same:
    """Stands for the unknown size of one axis of the input: equal to itself alone."""

    axis: int


_Size = int | str | _Same | None


def _reshape(asked: _Asked) -> Passage:
    """The axis has survived where it has its size still, and as many elements before it (or behind it) as before."""
    before: list[_Size] = [_Same(a) if d is None else d for a, d in enumerate(asked.input_shape(0))]
    target = constant(asked.input(1))
    copies_zeros = not attribute(asked.node, "allowzero", 0)
    if target is not None and 0 in target and not copies_zeros:
        raise _StopsHere("Reshape to an empty shape")
    after: list[_Size] = list(asked.shape)
    if target is not None and len(target) == len(after):
        after = [before[a] if t == 0 else after[a] if t == -1 else int(t) for a, t in enumerate(target)]
    j = asked.axis
    for i in range(len(before)):
        same_size = after[j] == before[i]
        same_front = _elements(after[:j]) == _elements(before[:i]) is not None
        same_back = _elements(after[j + 1 :]) == _elements(before[i + 1 :]) is not None
        if same_size + same_front + same_back >= 2 and before[i] != 1:
            wanted = _narrowed_target(asked, before, after, i, None if target is None else target.tolist())
            return Passage({0: i}, partial(_write_target, node=asked.node, target=wanted))
    raise _StopsHere("Reshape joins or cuts the axis, or may do so")


def _elements(sizes: Sequence[_Size]) -> tuple[int, list[str]] | None:
    """The product of sizes in a form that can be compared; None where one is not known."""
    if any(size is None for size in sizes):
        return None
    numbers = [size for size in sizes if isinstance(size, int)]
    return int(np.prod(numbers, dtype=np.int64)), sorted(str(size) for size in sizes if not isinstance(size, int))


def _narrowed_target(
    asked: _Asked, before: Sequence[_Size], after: Sequence[_Size], i: int, target: list[int] | None
) -> list[int]:
    """The new shape: 0 copies an axis, -1 (once) is computed."""
    j, found = asked.axis, []
    for a, size in enumerate(after):
        copied = a < len(before) and a != i and size == before[a] and size is not None
        if a == j:
            found.append(0 if i == j else asked.selection.count or -1)
        elif isinstance(size, int):
            found.append(size)
        elif copied or (target is not None and target[a] == 0 and a != i):
            found.append(0)
        else:
            found.append(-1)
    if found.count(-1) > 1:
        raise _StopsHere("the sizes of Reshape are computed")
    return found


def _write_target(model: ir.Model, node: ir.Node, target: list[int]) -> None:
    old, graph = constant(node.inputs[1]), node.graph
    assert isinstance(graph, ir.Graph)
    if old is None or old.tolist() != target:
        name = f"{node.outputs[0].name}_shape"
        node.replace_input_with(1, add_weight(model, graph, name, np.asarray(target, np.int64)))
        node.attributes.pop("allowzero", None)


# ---------------------------------------------------------------------------------------------------------- products


def _matmul(asked: _Asked) -> Passage:
    left, right = len(asked.input_shape(0)), len(asked.input_shape(1))
    if left < 2 or right < 2:
        raise _StopsHere("MatMul with a vector")
    if asked.axis == asked.rank - 1:
        raise _StopsHere("MatMul makes the axis from the columns of its right factor")
    if asked.axis == asked.rank - 2:
        return Passage({0: left - 2}, is_product=True)
    return Passage(_broadcast(asked, (0, 1)), is_product=True)


def _gemm(asked: _Asked) -> Passage:
    if asked.axis == 1:
        raise _StopsHere("Gemm makes the axis from the columns of its right factor")
    found = {0: 1 if attribute(asked.node, "transA", 0) else 0}
    return Passage({**found, **_broadcast(asked, (2,) if asked.input(2) is not None else ())}, is_product=True)


def _convolution(asked: _Asked) -> Passage:
    if asked.axis != 0:
        raise _mixed(asked)
    return Passage({0: 0}, is_product=True)


def _multi_head_attention(asked: _Asked) -> Passage:
    """com.microsoft's: query [batch, length, width]; the runtime's kernel does not broadcast the queries of a bias."""
    if asked.axis != 1 or asked.rank != 3 or asked.input(1) is None or len(asked.input_shape(0)) != 3:
        raise _mixed(asked)
    if any(asked.input(index) is not None for index in range(6, len(asked.node.inputs))):
        raise _StopsHere("MultiHeadAttention keeps a cache of past keys")
    if attribute(asked.node, "unidirectional", 0):
        raise _StopsHere("MultiHeadAttention is causal: it counts its queries")
    found = {0: 1}
    if asked.input(4) is not None:
        padding = asked.input_shape(4)
        if len(padding) == 3:  # [batch, queries, keys]
            found[4] = 1
        elif len(padding) == 1 and padding[0] != asked.input_shape(0)[0]:
            raise _StopsHere("MultiHeadAttention may be told where queries begin")
    bias = asked.input(5)
    if bias is not None and (dims(bias) or (None,) * 4)[2] != 1:
        found[5] = 2
    return Passage(found, is_product=True)


def _attention(asked: _Asked) -> Passage:
    """The standard's, [batch, heads, length, size] or [batch, length, width]; its mask is broadcast."""
    queries = asked.rank - 2
    if asked.axis != queries:
        raise _mixed(asked)
    if any(asked.input(index) is not None for index in (4, 5, 6)):
        raise _StopsHere("Attention keeps a cache of past keys, or has lengths")
    if attribute(asked.node, "is_causal", 0):
        raise _StopsHere("Attention is causal: it counts its queries")
    found = {0: queries}
    if asked.input(3) is not None:
        axis = len(asked.input_shape(3)) - 2
        if axis >= 0 and asked.spread_over(3, axis):
            found[3] = axis
    return Passage(found, is_product=True)


# ------------------------------------------------------------------------------------------------------------- table


@dataclass
class _Table:
    rules: dict[tuple[str, str], _Rule] = field(default_factory=dict)

    def add(self, rule: _Rule, names: str, domain: str = "") -> None:
        self.rules.update({(domain, name): rule for name in names.split()})


def _all_rules() -> dict[tuple[str, str], _Rule]:
    table = _Table()
    table.add(
        _first_input,
        "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu HardSigmoid "
        "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin "
        "Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu CastLike",
    )
    table.add(
        _elementwise,
        "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod "
        "Mul Or Pow PRelu Sub Sum Where Xor",
    )
    table.add(_first_input, "Gelu QuickGelu", MICROSOFT)
    table.add(_elementwise, "BiasGelu FastGelu", MICROSOFT)
    table.add(_softmax, "Softmax LogSoftmax Hardmax")
    table.add(_normalization, "LayerNormalization RMSNormalization SimplifiedLayerNormalization LpNormalization")
    table.add(_skip_normalization, "SkipLayerNormalization SkipSimplifiedLayerNormalization", MICROSOFT)
    table.add(_batch_normalization, "BatchNormalization")
    table.add(
        _reduction,
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare",
    )
    for name, rule in (
        ("Transpose", _transpose),
        ("Unsqueeze", _unsqueeze),
        ("Squeeze", _squeeze),
        ("Flatten", _flatten),
        ("Reshape", _reshape),
        ("Concat", _concat),
        ("Split", _split),
        ("Slice", _slice),
        ("Gather", _gather),
        ("MatMul", _matmul),
        ("Gemm", _gemm),
        ("Conv", _convolution),
        ("Attention", _attention),
    ):
        table.add(rule, name)
    table.add(_multi_head_attention, "MultiHeadAttention", MICROSOFT)
    return table.rules


_RULES = _all_rules()

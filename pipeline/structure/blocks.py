# SPDX-License-Identifier: Apache-2.0
"""Blocks of a network that can go as a whole: residual branches, and the layers that they make up.

    b = a + f(a)              pre-norm transformers, convolutions: b becomes a
    b = Norm(a + f(a))        post-norm, where a comes from a norm itself: b becomes a, and that norm goes as well
    b = Relu(a + f(a))        ResNets: as above, where a comes from a Relu; else the Relu stays, and the sum becomes a

Found from the graph alone. A part is a sum, one side of which is what the other is computed from, so that without the
other side the network still makes sense: what the branch had to add is taken as nothing. Parts that follow each other
form a layer; how many do is what repeats along the stream (attention and feed-forward in an encoder, two attentions
and a feed-forward in a decoder that reads one, four parts in a conformer).

References: Veit et al., "Residual networks behave like ensembles of relatively shallow networks" (arXiv 1605.06431);
ShortGPT (Men et al., arXiv 2403.03853) and "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887)
for transformers; Fan et al., LayerDrop (arXiv 1909.11556).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..cost import PRODUCTS
from ..passes.graph import add_weight, attribute, consumers, dims, is_op, label, make_node, only_consumer

_SUMS = ("Add", "Sum")
_FUSED_SUMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm")
_AFTER_SUM = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Relu")
_HOLD_WEIGHTS = (*PRODUCTS, "Attention", "ConvInteger", "Einsum", "FusedConv", "FusedGemm", "FusedMatMul", "GRU",
                 "LSTM", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "MoE", "QAttention",
                 "QGemm", "QLinearConv", "QLinearMatMul", "QMoE", "RNN")  # fmt: skip
_ATTENTION = ("Attention", "DecoderMaskedMultiHeadAttention", "GroupQueryAttention", "LinearAttention",
              "MultiHeadAttention", "PackedMultiHeadAttention", "QAttention", "Softmax", "SparseAttention")  # fmt: skip
_FAR = 2  # how far back along the stream a branch may start: parallel attention and feed-forward need one step


@dataclass(frozen=True)
class Part:
    """One residual branch.

    Attributes:
        source: What is left when it goes; [..] as `target`.
        target: What `source` then stands for.
        kind: `attention`, `convolution` or `feed-forward`.
        products: The nodes with weights that go, in graph order.
        reason: Why it cannot go; empty if it can.
    """

    source: ir.Value
    target: ir.Value
    kind: str
    products: tuple[ir.Node, ...]
    reason: str


@dataclass(frozen=True)
class Block:
    """Parts that go together.

    Attributes:
        name: What the names of its weights have in common, or that of its result; unique together with `kind`.
        kind: That of its part, or `layer`.
        parts: In graph order.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def reason(self) -> str:
        """Why it cannot go; empty if it can."""
        return next((part.reason for part in self.parts if part.reason), "")

    def replaced(self) -> list[tuple[str, str]]:
        """Names: what stays and what it stands for, in the order to carry out."""
        return [(str(part.source.name), str(part.target.name)) for part in self.parts]


@dataclass(frozen=True)
class Stays:
    """A sum with weights on its sides that is no block.

    Attributes:
        name: Of the weights.
        reason: In words.
    """

    name: str
    reason: str


@dataclass
class Blocks:
    """The blocks of one graph: parts, the layers that they form (each of one part or several), and what is none."""

    parts: list[Block] = field(default_factory=list)
    layers: list[Block] = field(default_factory=list)
    stays: list[Stays] = field(default_factory=list)


def find_blocks(model: ir.Model) -> Blocks:
    """Look at every sum of the main graph.

    A branch cannot go if one of its values is an output of the graph (a cache), if a product in it is needed elsewhere,
    or if it changes the shape of what it is added to. Lengths that the graph reads within a branch count as well: see
    `read_sizes_of_inputs`.
    """
    search = _Search(model)
    found = Blocks()
    parts = []
    for node in model.graph:
        part = search.part(node)
        if isinstance(part, Part):
            parts.append(part)
        elif part is not None:
            found.stays.append(part)
    names: set[str] = set()
    found.parts = [_block((part,), part.kind, names) for part in parts]
    for stream in _streams(parts):
        for together in _layers(stream):
            found.layers.append(_block(together, "layer", names))
    return found


def read_sizes_of_inputs(model: ir.Model) -> None:
    """Compute every Shape of the main graph, in place, from the graph's inputs, where the names of the axes allow it.

    Exporters ask the first query for the lengths that all layers use, and its layer could not go. What the graph states
    of its shapes has to be true.
    """
    axes: dict[int | str | None, tuple[ir.Value, int]] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(dims(value) or ()):
            if isinstance(size, str) and not value.is_initializer():
                axes.setdefault(size, (value, axis))
    made: dict[tuple[int | str | None, ...], ir.Value] = {}
    for node in list(model.graph):
        sizes = dims(node.inputs[0]) if is_op(node, "Shape") else None
        if sizes is None or node.inputs[0] in model.graph.inputs or node.outputs[0].is_graph_output():
            continue
        wanted = sizes[attribute(node, "start", 0) : attribute(node, "end", None)]
        if wanted and all(isinstance(size, int) or size in axes for size in wanted):
            if wanted not in made:
                made[wanted] = _vector(model, [axes.get(size, size) for size in wanted])
            node.outputs[0].replace_all_uses_with(made[wanted])
            model.graph.remove(node, safe=True)


def _vector(model: ir.Model, sizes: Sequence[tuple[ir.Value, int] | int | str | None]) -> ir.Value:
    """int64 [sizes], each a number or an input's axis; computed at the start of the graph."""
    name = "onnxpress_sizes_" + "_".join(f"{s[0].name}_{s[1]}" if isinstance(s, tuple) else str(s) for s in sizes)
    parts, nodes = [], []
    for position, size in enumerate(sizes):
        if isinstance(size, tuple):
            value, axis = size
            shape = make_node("Shape", [value], [f"{name}_{position}_shape"])
            index = add_weight(model, model.graph, f"{name}_{position}_axis", np.array([axis]))
            nodes += [shape, make_node("Gather", [shape.outputs[0], index], [f"{name}_{position}"])]
            parts.append(nodes[-1].outputs[0])
        else:
            parts.append(add_weight(model, model.graph, f"{name}_{position}", np.array([size])))
    nodes.append(make_node("Concat", parts, [name], attributes={"axis": 0}))
    nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.INT64)
    nodes[-1].outputs[0].shape = ir.Shape([len(sizes)])
    model.graph.insert_before(model.graph[0], nodes)
    return nodes[-1].outputs[0]


def dead_nodes(model: ir.Model, replaced: Mapping[ir.Value, ir.Value]) -> set[ir.Node]:
    """Nodes of the main graph that no output needs when values are replaced (target to source) in all their readers."""
    needed: set[ir.Node] = set()
    stack = [value for value in model.graph.outputs]
    stack += [v for node in model.graph for v in node.outputs if any(n.graph is not model.graph for n in consumers(v))]
    while stack:
        value = stack.pop()
        while value in replaced:
            value = replaced[value]
        node = value.producer()
        if node is not None and node.graph is model.graph and node not in needed:
            needed.add(node)
            stack += [v for v in node.inputs if v is not None]
    return {node for node in model.graph if node not in needed}


class _Search:
    """What is known of the graph while its sums are visited in order."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.order = {node: index for index, node in enumerate(model.graph)}
        self.dead = dead_nodes(model, {})
        self.came_from: dict[ir.Value, ir.Value] = {}  # a sum to what the stream was before it
        self.varying = self._varying()

    def _varying(self) -> set[ir.Value]:
        """Values that depend on the inputs; a node with subgraphs may read them without saying so."""
        found = set(self.model.graph.inputs)
        for node in self.model.graph:
            hidden = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
            if hidden or any(value in found for value in node.inputs):
                found.update(node.outputs)
        return found

    def part(self, node: ir.Node) -> Part | Stays | None:
        """What this node adds to a stream, why that is not clear, or None where nothing with weights is added."""
        if node in self.dead:
            return None
        if node.op_type in _FUSED_SUMS:
            return Stays(label(node), f"{node.op_type} is sum and norm at once: start from the unfused graph")
        if not is_op(node, *_SUMS):
            return None
        inputs = [value for value in node.inputs if value in self.varying and value is not None]
        if len(inputs) < 2 or len(set(inputs)) < len(inputs):
            return None
        for source in inputs:
            branch = [value for value in inputs if value is not source]
            found = self._judged(node, source, branch)
            if found is not None:
                return found
        return self._no_shortcut(node, inputs)

    def _judged(self, node: ir.Node, source: ir.Value, branch: Sequence[ir.Value]) -> Part | None:
        """The part that `source` skips, if `branch` is computed from it."""
        total = node.outputs[0]
        inner = self._between(self._starts(source), branch, self.order[node])
        products = [n for n in sorted(inner, key=self.order.__getitem__) if self._holds_weights(n)]
        if not products:
            return None
        gone = dead_nodes(self.model, {total: source}) - self.dead
        needed = [node for node in products if node not in gone]
        if needed and any(value in self.came_from for node in inner for value in node.outputs):
            return None  # a stream runs through it: a mask that all layers read is no shortcut past them
        self.came_from[total] = source
        reason = self._why_not(source, total, inner, needed)
        return Part(source, self._target(source, total), _kind(inner), tuple(products), reason)

    def _why_not(self, source: ir.Value, total: ir.Value, inner: set[ir.Node], needed: Sequence[ir.Node]) -> str:
        in_order = sorted(inner, key=self.order.__getitem__)
        returned = next((v for n in in_order for v in n.outputs if v.is_graph_output()), None)
        if returned is not None:
            return f"the graph returns '{returned.name}' from within it"
        if needed:
            return f"{label(needed[0])} within it is needed elsewhere"
        if not _may_be_equal(dims(source), dims(total)):
            return "it changes the shape of what it is added to"
        return ""

    def _target(self, source: ir.Value, total: ir.Value) -> ir.Value:
        """The sum, or what a norm or Relu makes of it where `source` comes from one, too."""
        after, before = only_consumer(total), source.producer()
        if after is None or before is None or after.inputs[0] is not total or not _ends_sum(after):
            return total
        same = (before.op_type, before.domain) == (after.op_type, after.domain)
        return after.outputs[0] if same and before.outputs[0] is source else total

    def _starts(self, source: ir.Value) -> list[ir.Value]:
        found = [source]
        while found[-1] in self.came_from and len(found) < _FAR:
            found.append(self.came_from[found[-1]])
        return found

    def _between(self, starts: Sequence[ir.Value], ends: Sequence[ir.Value], before: int) -> set[ir.Node]:
        """Nodes on the ways from one of `starts`, the first from which all of `ends` are reached, to `ends`."""
        above = self._above(ends)
        for start in starts:
            below: set[ir.Node] = set()
            stack = [start]
            while stack:
                for node in consumers(stack.pop()):
                    if self.order.get(node, before) < before and node not in below and node in above:
                        below.add(node)
                        stack += node.outputs
            if below and all(value.producer() in below for value in ends):
                return below
        return set()

    def _above(self, ends: Iterable[ir.Value]) -> set[ir.Node]:
        """All nodes that `ends` are computed from; lengths do not count."""
        found: set[ir.Node] = set()
        stack = list(ends)
        while stack:
            node = stack.pop().producer()
            if node is not None and node not in found and not is_op(node, "Shape", "Size"):
                found.add(node)
                stack += [value for value in node.inputs if value is not None]
        return found

    def _holds_weights(self, node: ir.Node) -> bool:
        return node.op_type in _HOLD_WEIGHTS and any(v is not None and v not in self.varying for v in node.inputs)

    def _no_shortcut(self, node: ir.Node, inputs: Sequence[ir.Value]) -> Stays | None:
        """A sum of two things that are computed from one value, by convolutions on one side or both."""
        sides = [self._above([value]) for value in inputs]
        own = [sides[0] - sides[1], sides[1] - sides[0]]
        weighted = [[n for n in side if self._holds_weights(n)] for side in own]
        if len(inputs) != 2 or not any(weighted) or not sides[0] & sides[1]:
            return None
        if any(n.op_type not in ("Conv", "FusedConv") for side in weighted for n in side):
            return None  # parts of one layer: queries and position terms, attention and feed-forward side by side
        products = max(weighted, key=len)
        products.sort(key=self.order.__getitem__)
        return Stays(_common_name(products, node.outputs[0]), "its shortcut is not what the branch starts from")


def _ends_sum(node: ir.Node) -> bool:
    return node.op_type in _AFTER_SUM and node.domain in ("", "ai.onnx", "com.microsoft")


def _kind(inner: Iterable[ir.Node]) -> str:
    types = {node.op_type for node in inner}
    if types & set(_ATTENTION):
        return "attention"
    return "convolution" if any("Conv" in name for name in types) else "feed-forward"


def _may_be_equal(one: tuple[int | str | None, ...] | None, other: tuple[int | str | None, ...] | None) -> bool:
    """Whether shapes that add up can be the same: an axis of 1 is stretched, others are as long as the sum's."""
    if one is None or other is None:
        return True
    return len(one) == len(other) and all(
        n == m or (n != 1 and not _both_fixed(n, m)) for n, m in zip(one, other, strict=True)
    )


def _both_fixed(one: int | str | None, other: int | str | None) -> bool:
    return isinstance(one, int) and isinstance(other, int)


def _streams(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that follow each other, directly or with a norm or Relu in between."""
    streams: list[list[Part]] = []
    for part in parts:
        maker = part.source.producer()
        befores = [part.source, *(maker.inputs[:1] if maker is not None and _ends_sum(maker) else ())]
        stream = next((s for s in streams if s[-1].target in befores), None)
        if stream is None:
            streams.append([part])
        else:
            stream.append(part)
    yield from streams


def _layers(stream: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Cut a stream where it repeats; if it does not, in front of every attention that follows something else."""
    signatures = [_signature(part) for part in stream]
    for period in range(1, len(stream) // 2 + 1):
        if len(stream) % period == 0 and signatures[period:] == signatures[:-period]:
            return [tuple(stream[i : i + period]) for i in range(0, len(stream), period)]
    if not any(part.kind == "attention" for part in stream):
        return [(part,) for part in stream]
    layers: list[list[Part]] = []
    for part in stream:
        if not layers or (part.kind == "attention" and layers[-1][-1].kind != "attention"):
            layers.append([])
        layers[-1].append(part)
    return [tuple(layer) for layer in layers]


def _signature(part: Part) -> tuple[object, ...]:
    shapes = sorted((n.op_type, *(str(dims(v)) for v in _weights(n))) for n in part.products)
    return (part.kind, *shapes)


def _weights(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value.is_initializer()]


def _block(parts: tuple[Part, ...], kind: str, names: set[str]) -> Block:
    """Name a block, and see to it that no other of its kind has the name."""
    products = [node for part in parts for node in part.products]
    wanted = _common_name(products, parts[-1].target)
    if f"{kind} {wanted}" in names:
        wanted = f"{wanted} ({parts[-1].target.name})"
    names.add(f"{kind} {wanted}")
    return Block(wanted, kind, parts)


def _common_name(products: Sequence[ir.Node], result: ir.Value) -> str:
    """What the names of the products' weights have in common, up to a dot; else the name of the result."""
    weights = [str(value.name).split(".") for node in products for value in _weights(node)]
    shared = []
    for words in zip(*weights, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared) if shared and len(weights) > 1 else str(result.name)


def weights_of(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """The initializers that only these nodes read, in order."""
    chosen = set(nodes)
    found = [value for node in chosen for value in _weights(node) if all(n in chosen for n in consumers(value))]
    return sorted(dict.fromkeys(found), key=lambda value: str(value.name))

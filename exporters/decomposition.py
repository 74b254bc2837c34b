# SPDX-License-Identifier: Apache-2.0
"""ATen operators without an ONNX translation are replaced by ones that have it, and the rest of the graph stays.

`ExportedProgram.run_decompositions` traces the whole program again, twice: half of the time of an export, although nine
of ten operators come out as they went in. Here each operator is looked at once. What has a translation is copied, what
only renames a tensor (`contiguous`, dropout in inference) is passed through, an in-place operator becomes its
functional twin where nothing else sees the memory, and what is left is traced by itself, by the same rules and tables
as `run_decompositions` uses. Whatever is not certain raises `NotCovered`, and the caller takes torch's own way.

The terms are those of https://pytorch.org/docs/stable/torch.compiler_ir.html; CIA is CompositeImplicitAutograd.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class NotCovered(Exception):
    """The program needs torch's own decomposition; the text says why."""


@dataclass
class Rules:
    """What torch knows of operators.

    Attributes:
        is_translated: Whether an operator has an ONNX translation.
        may_stay: Whether a CIA operator may be kept; if not, it may return its input itself.
        is_composite: Whether an operator is CIA.
        table: Python decompositions of operators that are not CIA.
        in_force: Makes CIA operators with a translation survive within the block.
    """

    is_translated: Callable[[Any], bool]
    may_stay: Callable[[Any], bool]
    is_composite: Callable[[Any], bool]
    table: Mapping[Any, Callable[..., Any]]
    in_force: Callable[[], contextlib.AbstractContextManager[Any]]
    stays: dict[Any, bool] = field(default_factory=dict)

    def is_kept(self, target: Any) -> bool:
        """Whether `run_decompositions` would leave the operator as it is."""
        found = self.stays.get(target)
        if found is None:
            if self.is_composite(target):
                found = self.is_translated(target) and self.may_stay(target)
            else:  # without a translation and without a decomposition it stays, for the translation's error to name it
                found = self.is_translated(target) or target not in self.table
            self.stays[target] = found
        return found


def decompose(graph_module: torch.fx.GraphModule, rules: Rules) -> torch.fx.GraphModule:
    """A copy of the module, made of operators that have a translation; placeholders and outputs keep their names.

    Raises:
        NotCovered: See above; nothing was changed.
    """
    with contextlib.ExitStack() as contexts:
        rewriting = _Rewriting(graph_module, rules, contexts)
        rewriting.copy_body(graph_module, {})
    rewriting.graph.eliminate_dead_code()
    result = torch.fx.GraphModule(graph_module, rewriting.graph)
    result.meta.update(graph_module.meta)
    return result


class _Rewriting:
    """One pass over a graph; `env` maps its nodes to those of the copy, as they are at this point of the program."""

    def __init__(self, graph_module: torch.fx.GraphModule, rules: Rules, contexts: contextlib.ExitStack) -> None:
        self.graph, self.rules, self.contexts = torch.fx.Graph(), rules, contexts
        self.bodies: dict[str, torch.fx.Graph] = {}
        self.fake_mode: Any = None
        for node in graph_module.graph.nodes:
            value = node.meta.get("val")
            if self.fake_mode is None and isinstance(value, torch.Tensor):
                self.fake_mode = getattr(value, "fake_mode", None)

    def copy_body(self, owner: torch.fx.GraphModule, env: dict[torch.fx.Node, Any]) -> Any:
        """Copy the nodes of `owner`, whose placeholders are in `env` unless it is the root; return what it returns."""
        is_root, memory = not env, _Memory(owner.graph, self.rules)
        for node in owner.graph.nodes:
            if node.op == "output":
                if is_root:
                    self.graph.node_copy(node, env.__getitem__)
                    return None
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "call_function":
                self.call(owner, node, env, memory)
            elif node.op == "placeholder":
                if is_root:
                    env[node] = self.graph.node_copy(node, env.__getitem__)
            elif not isinstance(getattr(owner, str(node.target), None), torch.fx.GraphModule):
                raise NotCovered(f"{node.op} {node.target}")  # a body is copied where it is called
        raise NotCovered("a graph without an output")

    def call(
        self, owner: torch.fx.GraphModule, node: torch.fx.Node, env: dict[torch.fx.Node, Any], memory: _Memory
    ) -> None:
        target: Any = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            env[node] = self.inlined(owner, node, env)
        elif target is operator.getitem and isinstance(env[node.args[0]], tuple | list):
            env[node] = env[node.args[0]][node.args[1]]
        elif not isinstance(target, torch._ops.OpOverload):
            env[node] = self.graph.node_copy(node, env.__getitem__)  # arithmetic on sizes
        elif target in ASSERTIONS:
            pass
        elif (same := self.renamed(node)) is not None:
            env[node] = env[same]
        elif target._schema.is_mutable:
            base = memory.owned_by(node)
            env[node] = env[base] = self.functional(node, env)
        elif self.rules.is_kept(target) or target in STAYING:
            env[node] = self.graph.node_copy(node, env.__getitem__)
        else:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = self.traced(target, node, args, kwargs)

    def renamed(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """The node whose value this one returns unchanged, if that is so."""
        target, source = node.target, node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            return None
        if target in RENAMING:
            return source
        if target is aten.dropout.default and node.args[2:3] == (False,):
            return source
        if target in CONVERSIONS and source.meta["val"].dtype == node.meta["val"].dtype:
            return source
        return None

    def functional(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        """The result of an in-place operator by its functional twin: `aten.add_.Tensor` by `aten.add.Tensor`."""
        target: Any = node.target
        packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        twin = getattr(packet, target._overloadname, None)
        values = [n.meta.get("val") for n in node.all_input_nodes]
        own, *others = [value.dtype for value in values if isinstance(value, torch.Tensor)]
        if twin is None or twin._schema.is_mutable or any(torch.promote_types(own, d) != own for d in others):
            raise NotCovered(str(target))  # in place, the dtype of the result would stay
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        if not self.rules.is_kept(twin):
            return self.traced(twin, node, args, kwargs)
        made = self.graph.create_node("call_function", twin, args, kwargs)
        made.meta = dict(node.meta)
        return made

    def inlined(self, owner: torch.fx.GraphModule, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        """What a block under `torch.no_grad()` or under autocast that is off returns: its nodes are copied here."""
        leading = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(str(node.target))
        if leading is None or (leading == 4 and node.args[2]):
            raise NotCovered(str(node.target))
        body, operands = node.args[leading], node.args[leading + 1 :]
        module = getattr(owner, str(getattr(body, "target", "")))
        inner = [n for n in module.graph.nodes if n.op == "placeholder"]
        return self.copy_body(module, {p: env[o] for p, o in zip(inner, operands, strict=True)})

    def traced(self, target: Any, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """Copy what an operator is made of, traced on the values that its inputs have in the program."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        inputs = [value for value in flat if isinstance(value, torch.fx.Node)]
        key = str((target, spec, [_described(value) for value in flat]))
        if key not in self.bodies:
            self.bodies[key] = self.body_of(target, flat, spec)
        body = self.bodies[key]
        mapped: dict[torch.fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
        noted = {name: value for name, value in node.meta.items() if name not in ("val", "tensor_meta")}
        for inner in body.nodes:
            if inner.op == "output":
                return torch.fx.map_arg(inner.args[0], mapped.__getitem__)
            if inner.op == "call_function":
                if getattr(getattr(inner.target, "_schema", None), "is_mutable", False):
                    raise NotCovered(f"{target} changes its inputs")
                mapped[inner] = self.graph.node_copy(inner, mapped.__getitem__)
                mapped[inner].meta.update(noted)
            elif inner.op != "placeholder":
                raise NotCovered(f"{target} makes a constant")
        raise NotCovered(str(target))

    def body_of(self, target: Any, flat: list[Any], spec: Any) -> torch.fx.Graph:
        """One operator as a graph of its own, whose inputs are the nodes in `flat`."""
        from torch.fx.experimental.proxy_tensor import make_fx

        if not self.bodies:
            self.contexts.enter_context(self.rules.in_force())
            self.contexts.enter_context(self.fake_mode)

        function = OF_OUR_OWN.get(target, target)

        def run(*values: Any) -> Any:
            rest = iter(values)
            filled = [next(rest) if isinstance(value, torch.fx.Node) else value for value in flat]
            positional, keywords = pytree.tree_unflatten(filled, spec)
            return function(*positional, **keywords)

        values = [value.meta["val"] for value in flat if isinstance(value, torch.fx.Node)]
        return make_fx(run, decomposition_table=dict(self.rules.table))(*values).graph


def _described(value: Any) -> Any:
    """All of an operator's argument that its decomposition can depend on."""
    if not isinstance(value, torch.fx.Node):
        return value
    known = value.meta["val"]
    return (known.dtype, known.shape, known.stride(), known.is_conj()) if isinstance(known, torch.Tensor) else known


class _Memory:
    """Which values of a graph may share memory, told by the operators' schemas."""

    def __init__(self, graph: torch.fx.Graph, rules: Rules) -> None:
        self.graph, self.rules = graph, rules
        self.owner: dict[torch.fx.Node, torch.fx.Node] = {}
        self.place: dict[torch.fx.Node, int] = {}

    def owned_by(self, mutation: torch.fx.Node) -> torch.fx.Node:
        """The node that an in-place operator overwrites, if no other value that shares its memory is read later.

        Raises:
            NotCovered: One is, or may be, or it is an input or weight of the graph.
        """
        base = mutation.args[0]
        if not self.owner:
            self._look()
        if not isinstance(base, torch.fx.Node) or self.owner[base].op != "call_function":
            raise NotCovered(f"{mutation.target} on an input")
        now = self.place[mutation]
        for node, owner in self.owner.items():
            # A view that is taken afterwards is taken of the new value
            shares = owner is self.owner[base] and node is not base and self.place[node] < now
            if shares and any(self.place[user] > now for user in node.users):
                raise NotCovered(f"{mutation.target} on shared memory")
        return base

    def _look(self) -> None:
        results: dict[Any, torch.fx.Node] = {}
        for place, node in enumerate(self.graph.nodes):
            self.place[node], self.owner[node] = place, node
            source = next(iter(node.all_input_nodes), None) if node.op == "call_function" else None
            if source is None or not self.may_alias(node.target):
                continue
            if node.target is operator.getitem and self.owner[source] is source:
                self.owner[node] = results.setdefault(node.args, node)  # of several new tensors, such as topk's
            else:
                self.owner[node] = self.owner[source]

    def may_alias(self, target: Any) -> bool:
        """Whether a result may share memory with the first input; the schemas of CIA operators do not say."""
        if target is operator.getitem:
            return True
        if not isinstance(target, torch._ops.OpOverload) or target in FRESH:
            return False
        return any(a.alias_info is not None for a in target._schema.arguments) or self.rules.is_composite(target)


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, _: bool
) -> Any:
    """Inference alone: in training the statistics, which are weights, would be written to."""
    if training or mean is None or variance is None:
        raise NotCovered("batch_norm in training")
    normalized = aten._native_batch_norm_legit_no_training.default
    return normalized(x, weight, bias, mean, variance, momentum, eps)[0]


def _overloads(*names: str) -> frozenset[Any]:
    """The operators `packet.overload` of aten that this torch has."""
    found = (getattr(getattr(aten, name.split(".")[0], None), name.split(".")[1], None) for name in names)
    return frozenset(overload for overload in found if overload is not None)


ASSERTIONS = _overloads(
    "sym_constrain_range_for_size.default", "sym_constrain_range.default", "_assert_async.default",
    "_assert_async.msg", "_assert_scalar.default", "_assert_tensor_metadata.default",
)  # fmt: skip
# ONNX tensors have no strides, devices or gradients
RENAMING = _overloads(
    "contiguous.default", "detach.default", "detach_.default", "alias.default", "lift_fresh_copy.default",
    "clone.default",
)  # fmt: skip
CONVERSIONS = _overloads(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default", "_to_copy.default",
)  # fmt: skip
# It may return its input itself, which matters for nothing but in-place operators
STAYING = _overloads("reshape.default")
# CIA operators whose result is always a new tensor
FRESH = _overloads(
    "linear.default", "matmul.default", "conv1d.default", "conv2d.default", "conv3d.default",
    "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input", "batch_norm.default",
    "layer_norm.default", "group_norm.default", "instance_norm.default", "rms_norm.default", "softmax.int",
    "log_softmax.int", "scaled_dot_product_attention.default", "max_pool1d.default", "max_pool2d.default",
    "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "min.other", "max.other", "__and__.Tensor",
    "__or__.Tensor", "__xor__.Tensor",
)  # fmt: skip
OF_OUR_OWN: Mapping[Any, Callable[..., Any]] = {aten.batch_norm.default: _batch_norm}
"""Where tracing an operator by itself would find another form of it than tracing the program."""

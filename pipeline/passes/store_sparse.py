# SPDX-License-Identifier: Apache-2.0
"""`store_sparse`: write weights that are mostly zeros in fewer bytes. What is computed stays the same, bit by bit.

sparse   ONNX's sparse initializer: a value and an int64 place for each weight that is not zero. ONNX Runtime makes it
         dense when it loads the model; OpenVINO refuses it. 12 bytes a float32, so it pays above 66.7 % zeros.
bitmap   one bit a weight, and the values of those that are not zero, unpacked in the graph by standard operators:
             mask = Gather([256, 8] bits of a byte, bitmap);  W = Gather([0, values], CumSum(mask) * mask)
         ONNX Runtime folds all of it into a dense weight when it loads the model, so that the same kernels run, and
         other runtimes read it as well. It pays from 3.2 % zeros on in float32, from 12.5 % on in int8.
auto     the smallest of these and dense. A sparse initializer wins above 98.4 % zeros.

Put it last: in a bitmap the weight is no initializer any more for passes that look for one, and `clean` would fold it
back. Loading takes longer: of the order of 0.1 s for every million weights that are unpacked.

References: the ONNX specification, SparseTensorProto; Han et al., "Deep compression" (arXiv 1510.00149), 2.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ...exporters.graph_file import SparseTensor, nonzero_places, sparse_bytes
from ..statistics import Calibration
from .base import Left, Pass, Plan, register
from .graph import add_weight, initializers_of, is_weight, make_node

Storage = Literal["dense", "sparse", "bitmap", "auto"]
Form = Literal["dense", "sparse", "bitmap"]

_TYPES = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
)
_NODES = 1024
"""Bytes that the nodes of a bitmap take themselves, with their names."""

_TABLE = "onnxpress_bits_of_a_byte"


@register("store_sparse")
class StoreSparse(Pass):
    """Settings.

    Attributes:
        form: `auto`, `sparse` or `bitmap`: where that makes a weight smaller.
        minimum_elements: Smaller weights stay as they are.
        exclude: Patterns (`*`, `?`) of weight names that stay as they are.
    """

    form: Literal["auto", "sparse", "bitmap"] = "auto"
    minimum_elements: int = Field(default=1024, ge=0)
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, calibration: Calibration | None = None) -> Plan:
        plan = Plan()
        before = after = 0
        for key, weight in initializers_of(model).items():
            tensor = weight.const_value
            assert tensor is not None
            if tensor.size < self.minimum_elements or not is_weight(weight):
                continue
            plan.seen += 1
            reason = self._why_not(weight)
            if reason is not None:
                plan.left.append(Left(key, reason))
                continue
            array = tensor.numpy()
            form = cheapest_form(array, self.form, main_graph=weight.graph is model.graph)
            if form == "dense":
                plan.left.append(Left(key, "it has too few zeros"))
                continue
            size = form_bytes(array, form)
            before, after = before + tensor.nbytes, after + size
            plan.actions.append({"weight": key, "storage": form, "bytes_before": tensor.nbytes, "bytes_after": size})
        forms = [action["storage"] for action in plan.actions]
        plan.details = {"forms": {form: forms.count(form) for form in sorted(set(forms))}, "bytes": [before, after]}
        return plan

    def apply(self, model: ir.Model, plan: Plan) -> ir.Model:
        by_key = initializers_of(model)
        for action in plan.actions:
            write_sparsely(model, by_key[action["weight"]], action["storage"])
        return model

    def _why_not(self, weight: ir.Value) -> str | None:
        tensor = weight.const_value
        assert tensor is not None
        if any(fnmatchcase(str(weight.name), pattern) for pattern in self.exclude):
            return "excluded by name"
        if weight.is_graph_output():
            return "the weight is an output of the graph"
        if isinstance(tensor, SparseTensor):
            return "it is sparse already"
        return None if tensor.dtype in _TYPES else f"weights of type {tensor.dtype.name.lower()} stay dense"


def cheapest_form(array: np.ndarray, storage: Storage, *, main_graph: bool) -> Form:
    """The smallest form of a weight among those that `storage` allows; `dense` always is.

    Args:
        array: The weight.
        storage: A form, or `auto` for all.
        main_graph: Whether it belongs to the main graph: only there may it be a sparse initializer.
    """
    allowed: list[Form] = ["dense"]
    allowed += ["bitmap"] if storage in ("bitmap", "auto") else []
    allowed += ["sparse"] if storage in ("sparse", "auto") and main_graph and len(nonzero_places(array)) else []
    return min(allowed, key=lambda form: form_bytes(array, form))


def form_bytes(array: np.ndarray, form: Form) -> int:
    """Bytes of the weights that a form takes in the file, for a bitmap with its nodes."""
    if form == "dense":
        return int(array.nbytes)
    if form == "sparse":
        return sparse_bytes(len(nonzero_places(array)), array.itemsize)
    return -(-array.size // 8) + (int(np.count_nonzero(_differs(array)[1])) + 1) * array.itemsize + _NODES


def write_sparsely(model: ir.Model, weight: ir.Value, form: Form) -> None:
    """Store an initializer in that form; all of its readers go on reading the same numbers."""
    tensor = weight.const_value
    assert tensor is not None
    if form == "sparse":
        weight.const_value = SparseTensor(tensor.numpy(), dtype=tensor.dtype, name=weight.name)
    elif form == "bitmap":
        _write_bitmap(model, weight, tensor)


def _write_bitmap(model: ir.Model, weight: ir.Value, tensor: ir.TensorProtocol) -> None:
    home = weight.graph if isinstance(weight.graph, ir.Graph) else model.graph
    array, name = tensor.numpy(), str(weight.name)
    fill, differs = _differs(array)
    values = np.concatenate([fill, array.reshape(-1)[differs]])
    bitmap = add_weight(model, home, f"{name}_bitmap", np.packbits(differs, bitorder="little"))
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], part: str, **attributes: int) -> ir.Value:
        nodes.append(make_node(op, inputs, [f"{name}_{part}"], attributes=dict(attributes)))
        return nodes[-1].outputs[0]

    def stored(part: str, values: list[int]) -> ir.Value:
        return add_weight(model, home, f"{name}_{part}", np.asarray(values, np.int64))

    byte = add("Cast", [bitmap], "bytes", to=int(ir.DataType.INT32))
    bits = add("Gather", [_table(model), byte], "bits", axis=0)
    bits = add("Cast", [bits], "digits", to=int(ir.DataType.INT32))
    mask = add("Reshape", [bits, stored("flat", [-1])], "mask")
    if array.size % 8:
        ends = [stored(f"slice_{end}", [end]) for end in (0, array.size)]
        mask = add("Slice", [mask, *ends], "mask_cut")
    axis = add_weight(model, home, f"{name}_axis", np.asarray(0, np.int64))
    place = add("Mul", [add("CumSum", [mask, axis], "count"), mask], "place")
    flat = add("Gather", [add_weight(model, home, f"{name}_values", values), place], "elements", axis=0)
    result = add("Reshape", [flat, stored("shape", list(array.shape))], "unpacked")
    result.shape, result.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    home.insert_before(home[0], nodes)
    weight.replace_all_uses_with(result)
    del home.initializers[name]


def _differs(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What most weights are ([1]; for floats always zero), and where others are: bool, flat. Compared bit by bit."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.itemsize > 1:
        fill = np.zeros(1, flat.dtype)
    else:
        counts = np.bincount(flat.view(np.uint8), minlength=256)
        fill = np.asarray([counts.argmax()], np.uint8).view(flat.dtype)
    bits = f"u{flat.dtype.itemsize}"
    return fill, flat.view(bits) != fill.view(bits)


def _table(model: ir.Model) -> ir.Value:
    """uint8 [256, 8]: the bits of every byte, lowest first; one for all weights, in the main graph."""
    known = model.graph.initializers.get(_TABLE)
    if known is not None:
        return known
    every = np.arange(256, dtype=np.uint8)[:, None]
    return add_weight(model, model.graph, _TABLE, np.unpackbits(every, axis=1, bitorder="little"))

# SPDX-License-Identifier: Apache-2.0
"""`store_sparse`: fewer bytes, the same numbers bit by bit, and the same kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_tools import Array, count, model_from, normal, reasons, run
from test_passes_on_assets import distance, every_file, feeds_for

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import SparseTensor, file_bytes, read, weight_bytes, write
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.prune_magnitude import PruneMagnitude
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.pipeline.passes.store_sparse import StoreSparse, cheapest_form, form_bytes
from onnxpress.runtime.profiling import operators_after_optimization
from onnxpress.runtime.session import Session

TYPES = {
    "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8, "uint8": np.uint8,
}  # fmt: skip


def zeroed(array: Array, density: float, fill: float = 0, seed: int = 1) -> Array:
    keep = np.random.default_rng(seed).random(array.shape) < density
    return np.where(keep, array, np.asarray(fill, array.dtype)).astype(array.dtype)


def linear(density: float, inputs: int = 64, outputs: int = 101) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["": 13]> g (float[b, {inputs}] x, float[{inputs}, {outputs}] w)
        => (float[b, {outputs}] y) {{ y = MatMul(x, w) }}"""
    return model_from(text, {"w": zeroed(normal(inputs, outputs), density)})


def store(model: ir.Model, **options: Any) -> tuple[ir.Model, Any]:
    return run_pass(StoreSparse(minimum_elements=0, **options), model)


X = {"x": normal(3, 64, seed=4)}


@pytest.mark.parametrize(("density", "form"), [(0.5, "bitmap"), (0.2, "bitmap"), (0.002, "sparse")])
def test_auto_takes_the_smallest(density: float, form: str, tmp_path: Path) -> None:
    plain = linear(density, outputs=1001)
    dense = write(plain.clone(), tmp_path / "dense.onnx")
    sizes = {}
    for wanted in ("auto", "bitmap", "sparse"):
        model, report = store(plain.clone(), form=wanted, optional=True)
        sizes[wanted] = write(model, tmp_path / f"{wanted}.onnx")
        np.testing.assert_array_equal(Session(tmp_path / f"{wanted}.onnx").run(X)["y"], run(plain, X)[0])
        if wanted == "auto":
            assert report.details["forms"] == {form: 1}
            assert report.bytes_after <= sizes["auto"] < report.bytes_before <= dense
    assert sizes["auto"] == min(sizes.values())


@pytest.mark.parametrize("form", ["sparse", "bitmap"])
def test_the_file_is_as_small_as_was_said(form: str, tmp_path: Path) -> None:
    plain = linear(0.1, outputs=1000)
    model, report = store(plain.clone(), form=form)
    written = write(model, tmp_path / "model.onnx")
    action_bytes = report.details["bytes"][1]
    table = 2048 if form == "bitmap" else 0
    assert abs(written - action_bytes - table) < 1000
    assert written < write(plain, tmp_path / "plain.onnx") / 2


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("size", [(5, 13), (8, 16), (1, 1), (3, 3, 3)])
@settings(max_examples=10, deadline=None)
@given(density=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_bitmap_gives_back_every_bit(kind: str, size: tuple[int, ...], density: float, seed: int) -> None:
    from onnxpress.pipeline.passes.store_sparse import write_sparsely

    random = np.random.default_rng(seed)
    values = random.integers(0, 256, [*size, np.dtype(TYPES[kind]).itemsize], np.uint8)
    array = np.ascontiguousarray(values).view(TYPES[kind]).reshape(size)
    if kind not in ("int8", "uint8"):
        array = np.where(np.isfinite(array.astype(np.float32)), array, np.asarray(-0.0, array.dtype))
    array = zeroed(array, density, fill=7 if kind == "uint8" else 0, seed=seed)
    shape = ",".join(map(str, size))
    text = f"""<ir_version: 10, opset_import: ["": 13]> g (bool c, {kind}[{shape}] w) => ({kind}[{shape}] y)
        {{ n = Not(c) y = Where(n, w, w) }}"""
    if kind == "bfloat16":
        text = text.replace("y = Where(n, w, w)", "z = Cast<to = 1>(w) y = Cast<to = 16>(z)")
    model = model_from(text, {"w": array}, infer=False)
    weight = model.graph.initializers["w"]
    write_sparsely(model, weight, "bitmap")
    assert "w" not in model.graph.initializers
    got = unpacked(model)
    np.testing.assert_array_equal(got, array.astype(np.float32))


def unpacked(model: ir.Model) -> Array:
    """What ONNX Runtime makes of the weight, as float32, in which all these types are exact."""
    value = next(v for node in model.graph for v in node.outputs if str(v.name).endswith("_unpacked"))
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].name, cast.outputs[0].type = "got", ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    model.graph.append(cast)
    model.graph.outputs.clear()
    model.graph.outputs.append(cast.outputs[0])
    return run(model, {"c": np.array(False)})[0]


def test_minus_zero_is_no_zero(tmp_path: Path) -> None:
    plain = linear(0.1)
    tensor = plain.graph.initializers["w"].const_value
    assert tensor is not None
    array = tensor.numpy().copy()
    array[array == 0] = -0.0
    assert cheapest_form(array, "auto", main_graph=True) == "dense"


def test_the_same_kernels_run(tmp_path: Path) -> None:
    for form in ("sparse", "bitmap"):
        model, _ = store(linear(0.1, outputs=800), form=form)
        write(model, tmp_path / f"{form}.onnx")
        assert operators_after_optimization(tmp_path / f"{form}.onnx", X) == {"MatMul": 1}


def test_after_a_quantizer(tmp_path: Path) -> None:
    """Integers: int8 with zero in the middle, nibbles of MatMulNBits; the kernel stays what it was."""
    x = {"x": normal(2, 256, seed=4)}
    for quantizer in (QuantizeDynamic(), QuantizeWeights(bits=8, symmetric=True, clip_search=False)):
        model = linear(1, 256, 512)
        for step in (PruneMagnitude(ratio=0.7), quantizer):
            model, _ = run_pass(step, model)
        expected, before = run(model, x)[0], count(model)
        model, report = store(model)
        assert report.bytes_after < 0.65 * report.bytes_before
        np.testing.assert_array_equal(run(model, x)[0], expected)
        write(model, tmp_path / "model.onnx")
        kernel = "DynamicQuantizeMatMul" if "MatMulInteger" in before else "MatMulNBits"
        assert set(operators_after_optimization(tmp_path / "model.onnx", x)) == {kernel}


def test_clean_folds_a_bitmap_back() -> None:
    model, report = store(linear(0.1), form="bitmap")
    expected = run(model, X)[0]
    model, _ = run_pass(Clean(), model)
    assert count(model) == {"MatMul": 1}
    assert weight_bytes(model) == report.bytes_before
    np.testing.assert_array_equal(run(model, X)[0], expected)


def test_a_weight_that_several_read_is_unpacked_once() -> None:
    text = """<ir_version: 10, opset_import: ["": 13]> g (float[b, 64] x, bool c, float[64, 100] w)
        => (float[b, 100] y, float[b, 100] z) { y = MatMul(x, w)
        z = If (c) <then_branch = t () => (float[b, 100] p) { p = MatMul(x, w) },
                    else_branch = e () => (float[b, 100] q) { q = Neg(y) }> }"""
    weight, x = {"w": zeroed(normal(64, 100), 0.2)}, {**X, "c": np.array(True)}
    plain = model_from(text, weight, infer=False)
    expected = run(plain, x)
    model, report = store(plain)
    assert (report.changed, count(model)["CumSum"]) == (1, 1)
    for got, wanted in zip(run(model, x), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_weight_of_a_subgraph() -> None:
    text = """<ir_version: 10, opset_import: ["": 13]> g (float[b, 64] x, bool c) => (float[b, 100] z) {
        z = If (c) <then_branch = t () => (float[b, 100] p) <float[64, 100] w> { p = MatMul(x, w) },
                    else_branch = e () => (float[b, 100] q) <float[64, 100] v> { q = MatMul(x, v) }> }"""
    inside = text.replace("<float[64, 100] w>", "").replace("<float[64, 100] v>", "")
    model = model_from(inside.replace("bool c)", "bool c, float[64, 100] w, float[64, 100] v)"),
                       {name: zeroed(normal(64, 100), 0.004, seed=2) for name in "wv"}, infer=False)  # fmt: skip
    branch = next(iter(model.graph.subgraphs()))
    weight = model.graph.initializers.pop("w")
    branch.initializers.add(weight)
    x = {**X, "c": np.array(True)}
    expected = run(model, x)[0]
    model, report = store(model)
    assert {a: n for a, n in report.details["forms"].items()} == {"bitmap": 1, "sparse": 1}
    np.testing.assert_array_equal(run(model, x)[0], expected)


def test_what_stays_dense_has_a_reason(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 13]> g (float[b, 64] x, float[64, 80] w, float[64, 80] skip,
        float[64, 80] full, int64[5000] i) => (float[b, 80] y, int64[n] j)
        { a = MatMul(x, w) c = MatMul(x, skip) d = MatMul(x, full) y = Sum(a, c, d) j = Neg(i) }"""
    half = zeroed(normal(64, 80), 0.1)
    made = {"w": half, "skip": half.copy(), "full": normal(64, 80), "i": np.zeros(5000, np.int64)}
    model, report = run_pass(StoreSparse(exclude=("skip",), form="sparse"), model_from(text, made))
    assert reasons(report) == {
        "skip": "excluded by name", "full": "it has too few zeros", "i": "weights of type int64 stay dense",
    }  # fmt: skip
    with pytest.raises(InputError, match="nothing to do"):
        run_pass(StoreSparse(exclude=("skip",)), model)


def test_a_sparse_file_is_read_and_pressed_again(tmp_path: Path) -> None:
    plain = linear(0.1)
    expected = run(plain, X)[0]
    model, _ = store(plain, form="sparse")
    write(model, tmp_path / "a.onnx")
    again = read(tmp_path / "a.onnx")
    assert isinstance(again.graph.initializers["w"].const_value, SparseTensor)
    assert weight_bytes(again) == weight_bytes(model)
    write(again, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert file_bytes(tmp_path / "b.onnx") < 64 * 101 * 4 / 2
    quantized, _ = run_pass(QuantizeDynamic(minimum_elements=0), read(tmp_path / "a.onnx"))
    assert count(quantized)["MatMulInteger"] == 1
    np.testing.assert_array_equal(Session(tmp_path / "b.onnx").run(X)["y"], expected)


def test_bytes_are_what_the_forms_say() -> None:
    array = zeroed(normal(100, 100), 0.25)
    kept = int(np.count_nonzero(array))
    assert form_bytes(array, "dense") == 40_000
    assert form_bytes(array, "sparse") == 12 * kept
    assert form_bytes(array, "bitmap") - 1024 == 1250 + 4 * (kept + 1)


@every_file
def test_real_files_give_the_same_outputs(path: Path, tmp_path: Path) -> None:
    """Pruned and stored in the smallest form, against pruned and dense: the file that a user would get."""
    model, _ = run_pass(Clean(), read(path))
    model, pruned = run_pass(PruneMagnitude(ratio=0.7, optional=True), model)
    if not pruned.changed:
        assert pruned.left
        return
    expected, feeds = run(model, feeds_for(path)), feeds_for(path)
    dense = write(model.clone(), tmp_path / "dense.onnx")
    model, report = run_pass(StoreSparse(), model)
    stored = write(model, tmp_path / "stored.onnx")
    assert report.bytes_after < report.bytes_before
    assert stored < 0.75 * dense
    for wanted, got in zip(expected, Session(tmp_path / "stored.onnx", threads=1).run(feeds).values(), strict=True):
        assert distance(wanted, got) < 1e-5

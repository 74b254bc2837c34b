# SPDX-License-Identifier: Apache-2.0
"""`quantize_weights`: what is stored, that runtimes compute what was rounded, and that data makes it better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, count, model_from, normal, run, sqnr, to_bytes, weights_of
from pydantic import ValidationError
from test_passes_on_assets import distance, every_file, feeds_for, outputs_of

from onnxpress.contracts.errors import InputError
from onnxpress.exporters.graph_file import read
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.pipeline.passes.weight_only_rounding import kept
from onnxpress.pipeline.quantization.blocks import Grid
from onnxpress.pipeline.quantization.codes import WIDTHS, Bits
from onnxpress.pipeline.statistics import Calibration
from onnxpress.runtime.profiling import operators_after_optimization

EXACT: dict[str, Any] = {"minimum_elements": 0, "accuracy_level": 0}
"""Everything is quantized, and activations stay fp32."""


def head(opset: int = 20) -> str:
    return f'<ir_version: 10, opset_import: ["": {opset}]>'


def product(body: str, shape: tuple[int, ...], *, inputs: int = 64, opset: int = 20, **more: Array) -> ir.Model:
    """y = body(x, w, ...) for x [batch, inputs] and y [batch, 96]."""
    weights = {"w": normal(*shape), **more}
    declared = "".join(f", float[{','.join(map(str, a.shape))}] {n}" for n, a in weights.items())
    text = f"{head(opset)} g (float[batch, {inputs}] x{declared}) => (float[batch, 96] y) {{ {body} }}"
    return model_from(text, weights)


def linear(inputs: int = 64, opset: int = 20) -> ir.Model:
    return product("y = MatMul(x, w)", (inputs, 96), inputs=inputs, opset=opset)


def embedding(columns: int = 64) -> ir.Model:
    text = (
        f"{head()} g (int64[b, s] ids, float[50, {columns}] e) => (float[b, s, {columns}] y) {{ y = Gather(e, ids) }}"
    )
    return model_from(text, {"e": normal(50, columns)})


def tied(columns: int = 64, opset: int = 20) -> ir.Model:
    text = f"""{head(opset)} g (int64[b, s] ids, float[200, {columns}] e) => (float[b, s, 200] y) {{
        h = Gather(e, ids) i = Relu(h) t = Transpose<perm = [1, 0]>(e) y = MatMul(i, t) }}"""
    return model_from(text, {"e": normal(200, columns)})


IDS = {"ids": np.array([[0, 7, 49], [-1, 3, 3]])}


def matrices(settings: QuantizeWeights, model: ir.Model, calibration: Calibration | None = None) -> dict[str, Array]:
    """What the plan rounds each weight to, [out, in]."""
    plan = settings.plan(model, calibration)
    found = {}
    for action in plan.actions:
        grid = Grid(WIDTHS[action["bits"]], action["block"], action["symmetric"])
        scales = plan.arrays[f"{action['weight']}|scales"]
        shape = model.graph.initializers[action["weight"]].const_value.shape.numpy()  # type: ignore[union-attr]
        columns = shape[0] if shape[1] == len(scales) and action["uses"][0]["kind"] == "product" else shape[1]
        rounded = kept(plan, action["weight"], grid, columns)
        assert rounded is not None
        found[action["weight"]] = rounded.dequantized()
    return found


def press(
    model: ir.Model, calibration: Calibration | None = None, **options: Any
) -> tuple[ir.Model, PassReport, bytes]:
    before = to_bytes(model)
    model, report = run_pass(QuantizeWeights(**{**EXACT, **options}), model, calibration)
    return model, report, before


def table_bytes(model: ir.Model) -> int:
    """What unpacking needs once for all weights, and target shapes."""
    return sum(t.nbytes for n, t in weights_of(model).items() if n.startswith("onnxpress_bytes") or "_shape_" in n)


FORMS = {
    "matmul": ("y = MatMul(x, w)", (64, 96)),
    "transposed": ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", (96, 64)),
    "gemm": ("y = Gemm(x, w)", (64, 96)),
    "gemm_bias": ("y = Gemm(x, w, b)", (64, 96)),
    "gemm_transposed": ("y = Gemm<transB = 1>(x, w, b)", (96, 64)),
    "gemm_twice_transposed": ("t = Transpose<perm = [1, 0]>(w) y = Gemm<transB = 1>(x, t)", (64, 96)),
    "gemm_column_bias": ("y = Gemm(x, w, c)", (64, 96)),
}


@pytest.mark.parametrize("form", ["matmul_nbits", "qdq", "unpack"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_product(name: str, form: str) -> None:
    body, shape = FORMS[name]
    model = product(body, shape, opset=21, b=normal(96, seed=5), c=normal(1, 1, seed=6))
    rounded = matrices(QuantizeWeights(**EXACT, format=form), model)["w"]  # type: ignore[arg-type]
    model, report, _ = press(model, format=form)
    bias = normal(96, seed=5) if ", b)" in body else normal(1, 1, seed=6) if ", c)" in body else 0
    x = normal(16, 64, seed=9)
    expected, got = x.astype(np.float64) @ rounded.T + bias, run(model, {"x": x})[0]
    # ONNX Runtime rounds the activations of `qdq`, whatever the file says
    assert sqnr(expected, got) > (40 if form == "qdq" else 110)
    assert report.changed == 1
    assert report.bytes_after < 0.27 * report.bytes_before
    assert not {"Gemm"} & set(count(model))
    assert "w" not in model.graph.initializers
    assert [v.name for v in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("bits", [8, 4, 2, "ternary", "sign"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, None])
@pytest.mark.parametrize("inputs", [64, 100, 300])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernels_compute_what_was_rounded(bits: Bits, group: Any, inputs: int, symmetric: bool) -> None:
    """MatMulNBits on every width and block, with K that blocks do not divide, at both exact levels."""
    options = {"bits": bits, "group_size": group, "symmetric": symmetric, "format": "matmul_nbits"}
    model = linear(inputs)
    rounded = matrices(QuantizeWeights(**EXACT, **options), model)["w"]
    x = normal(5, inputs, seed=9)
    for level in (0, 1):
        model, report, _ = press(linear(inputs), accuracy_level=level, **options)
        assert sqnr(x.astype(np.float64) @ rounded.T, run(model, {"x": x})[0]) > 110
        node = next(n for n in model.graph if n.op_type == "MatMulNBits")
        assert node.attributes["accuracy_level"].value == level == report.details["accuracy_level"]
        assert report.details["computed_by"] == {"MatMulNBits": 1}


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("inputs", [64, 100])
def test_unpacking_computes_what_was_rounded(bits: Bits, group: Any, inputs: int) -> None:
    for symmetric in (True, False):
        options = {"bits": bits, "group_size": group, "symmetric": symmetric, "format": "unpack"}
        model = linear(inputs)
        rounded = matrices(QuantizeWeights(**EXACT, **options), model)["w"]
        model, _, _ = press(model, **options)
        x = normal(5, inputs, seed=9)
        assert sqnr(x.astype(np.float64) @ rounded.T, run(model, {"x": x})[0]) > 110
        assert not any(node.domain for node in model.graph), "standard operators alone"


@pytest.mark.parametrize(("bits", "most"), [(8, 9.1), (4, 5.1), (3, 4.1), (2, 3.1), ("ternary", 2.8), ("sign", 2.1)])
def test_bytes_fall_as_bits_do(bits: Bits, most: float) -> None:
    """Bits a weight in groups of 32, with a float32 scale: bits + 1."""
    model = model_from(
        f"{head()} g (float[b, 256] x, float[256, 512] w) => (float[b, 512] y) {{ y = MatMul(x, w) }}",
        {"w": normal(256, 512)},
    )
    model, report, _ = press(model, bits=bits, symmetric=True)
    assert 8 * (report.bytes_after - table_bytes(model)) / (256 * 512) <= most
    assert report.details["bits"] == {str(bits): 1}


def test_the_runtime_unpacks_once_and_computes_in_fp32() -> None:
    for bits in (3, "ternary", "sign"):
        model, report, _ = press(linear(), bits=bits)
        assert set(operators_after_optimization(to_bytes(model), {"x": normal(4, 64)})) == {"MatMul"}
        assert "fp32" in next(iter(report.details["computed_by"]))


def test_the_runtime_computes_from_packed_weights() -> None:
    for bits in (8, 4, 2):
        model, report, _ = press(linear(), bits=bits)
        assert set(operators_after_optimization(to_bytes(model), {"x": normal(4, 64)})) == {"MatMulNBits"}
        assert ("needs" in report.details) == (bits == 2)


def test_activations_are_rounded_only_where_the_level_says_so() -> None:
    x = normal(16, 64, seed=9)
    expected = x.astype(np.float64) @ matrices(QuantizeWeights(**EXACT), linear())["w"].T
    quality = {}
    for level in (0, 1, 4):
        model, report, _ = press(linear(), accuracy_level=level)
        quality[level] = sqnr(expected, run(model, {"x": x})[0])
        assert report.details["accuracy_level"] == level
    assert min(quality[0], quality[1]) > 110
    assert 30 < quality[4] < 70
    assert QuantizeWeights().accuracy_level == 4


@pytest.mark.parametrize(
    ("bits", "group", "opset", "block"),
    [(4, 32, 21, 32), (8, 32, 21, 32), (8, None, 13, None), (4, None, 21, None), (2, 32, 25, 32)],
)
def test_standard_operators_become_kernels_when_loaded(bits: Bits, group: Any, opset: int, block: int | None) -> None:
    for symmetric in (True, False):
        model, report, before = press(linear(96, opset), bits=bits, group_size=group, format="qdq", symmetric=symmetric)
        assert set(count(model)) == {"DequantizeLinear", "MatMul"}
        node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
        assert (node.attributes["block_size"].value if "block_size" in node.attributes else None) == block
        feeds = {"x": normal(4, 96, seed=9)}
        assert set(operators_after_optimization(to_bytes(model), feeds)) == {"MatMulNBits"}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > {8: 35, 4: 15, 2: 5}[bits]  # type: ignore[index]
        assert "accuracy_level" in report.details["activations"]


def test_an_opset_without_the_type_gets_packed_bytes() -> None:
    model, report, before = press(linear(64, 20), format="qdq")
    assert "DequantizeLinear" not in count(model)
    assert "unpacked" in next(iter(report.details["computed_by"]))
    assert sqnr(run(before, {"x": normal(4, 64)})[0], run(model, {"x": normal(4, 64)})[0]) > 15


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("form", ["auto", "qdq", "unpack"])
@pytest.mark.parametrize("columns", [64, 100, 97])
@pytest.mark.parametrize("group", [32, None])
def test_an_embedding(bits: Bits, form: str, columns: int, group: Any) -> None:
    for symmetric in (True, False):
        options = {"bits": bits, "format": form, "group_size": group, "symmetric": symmetric}
        model = embedding(columns)
        rounded = matrices(QuantizeWeights(**EXACT, **options), model)["e"]  # type: ignore[arg-type]
        model, report, _ = press(model, **options)
        assert np.allclose(run(model, IDS)[0], rounded[IDS["ids"]], rtol=1e-6, atol=1e-6)
        assert report.bytes_after - table_bytes(model) < report.bytes_before / (2 if bits == 8 else 3)
        native = form == "auto" and bits in (8, 4, 2)
        assert ("com.microsoft::GatherBlockQuantized" in count(model)) == native


def test_zero_points_that_older_runtimes_misread_are_avoided() -> None:
    """96 columns are three blocks: their 4 bit zero points would share a byte with those of the next row."""
    model, _, _ = press(embedding(96))
    assert "e_zero_point" not in weights_of(model)
    model, _, _ = press(embedding(128))
    assert "e_zero_point" in weights_of(model)


@pytest.mark.parametrize("bits", list(WIDTHS))
@pytest.mark.parametrize("form", ["auto", "qdq", "unpack"])
@pytest.mark.parametrize("columns", [64, 100])
def test_a_tied_embedding_is_stored_once(bits: Bits, form: str, columns: int) -> None:
    model = tied(columns, 21)
    rounded = matrices(QuantizeWeights(**EXACT, bits=bits, format=form), model)["e"]  # type: ignore[arg-type]
    model, report, _ = press(model, bits=bits, format=form)
    expected = np.maximum(rounded[IDS["ids"]], 0).astype(np.float64) @ rounded.T
    assert sqnr(expected, run(model, IDS)[0]) > 110
    codes = [n for n in weights_of(model) if "packed" in n]
    assert len(codes) == len(WIDTHS[bits].planes) if form != "auto" or bits == 3 else 1
    assert report.changed == 1
    assert report.seen == 2


def test_a_weight_of_two_readers_is_stored_once() -> None:
    text = f"""{head()} g (float[b, 64] x, float[64, 64] w) => (float[b, 64] y) {{
        h = MatMul(x, w) i = Relu(h) y = MatMul(i, w) }}"""
    for form in ("auto", "unpack", "qdq"):
        model, report, before = press(model_from(text, {"w": normal(64, 64)}), format=form, bits=8, group_size=None)
        assert sum("packed" in n or "codes" in n for n in weights_of(model)) == 1
        assert report.changed == 1
        feeds = {"x": normal(4, 64)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 30


BRANCHES = f"""{head(21)} g (bool c, float[b, 64] x, float[64, 64] w) => (float[b, 64] y) {{ h = Relu(x)
    y = If (c) <then_branch = f () => (float[b, 64] p) {{ p = MatMul(h, w) }},
                else_branch = d () => (float[b, 64] q) {{ r = Tanh(h) s = MatMul(r, w) q = Relu(s) }}> }}"""


@pytest.mark.parametrize("form", ["auto", "qdq", "unpack"])
def test_weights_read_in_branches(form: str) -> None:
    model, report, before = press(model_from(BRANCHES, {"w": normal(64, 64)}), format=form, bits=8)
    assert report.changed == 1
    assert "w" not in model.graph.initializers
    for c in (True, False):
        feeds = {"c": np.array(c), "x": normal(4, 64)}
        assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 35


def test_leading_axes_and_vectors() -> None:
    for shape in ((3, 5, 64), (2, 3, 5, 64), (64,), (0, 64)):
        dims, ends = ", ".join(map(str, shape)), ", ".join(map(str, (*shape[:-1], 32)))
        text = f"{head()} g (float[{dims}] x, float[64, 32] w) => (float[{ends}] y) {{ y = MatMul(x, w) }}"
        for form in ("auto", "unpack"):
            model, _, before = press(model_from(text, {"w": normal(64, 32)}), bits=8, format=form)
            expected, got = run(before, {"x": normal(*shape)})[0], run(model, {"x": normal(*shape)})[0]
            assert expected.shape == got.shape
            assert not expected.size or sqnr(expected, got) > 35


# ------------------------------------------------------------------------------------------------------------- methods


def mixing(channels: int, spread: float = 0.0, seed: int = 0) -> Array:
    """A matrix that turns noise into activations with correlated channels of different size."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((channels, channels)) * np.exp(-np.arange(channels) / (channels / 5))[:, None]
    mix = mix / np.sqrt(channels) + 0.05 * np.eye(channels)
    return (mix * np.exp(spread * random.standard_normal(channels))).astype(np.float32)


LAYER = f"""{head()} g (float[batch, 128] x, float[128, 96] w) => (float[batch, 96] y) {{ y = MatMul(x, w) }}"""


def layer() -> ir.Model:
    return model_from(LAYER, {"w": normal(128, 96)})


def batches(spread: float = 0.0, seed: int = 1, name: str = "x") -> Calibration:
    data = [{name: normal(64 + i, 128, seed=seed + i) @ mixing(128, spread)} for i in range(4)]
    return Calibration(data, threads=1)


def quality(method: str, calibration: Calibration, text: str = LAYER, **options: Any) -> float:
    """SQNR on inputs that the calibration has not seen."""
    spread = options.pop("spread", 0.0)
    model, _, before = press(model_from(text, {"w": normal(128, 96)}), calibration, method=method, **options)
    x = normal(512, 128, seed=99) @ mixing(128, spread)
    return sqnr(run(before, {"x": x})[0], run(model, {"x": x})[0])


@pytest.mark.parametrize("bits", [4, 3, 2, "ternary"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_far_better_than_rounding(bits: Bits, act_order: bool) -> None:
    """Reading the wrong Cholesky factor, or deriving scales again, would make it equal or worse."""
    plain = quality("rtn", batches(), bits=bits, clip_search=False)
    assert quality("gptq", batches(), bits=bits, act_order=act_order, clip_search=False) > plain + 3
    assert quality("gptq", batches(), bits=bits, act_order=act_order) > quality("rtn", batches(), bits=bits) + 3


def test_gptq_reports_every_layer_beside_plain_rounding() -> None:
    model, report, _ = press(layer(), batches(), method="gptq")
    found = report.details["layers"]["w"]
    assert found["method"] == "gptq"
    assert found["output_sqnr_db"] > found["rtn_output_sqnr_db"] + 3
    assert 0 <= found["channels_kept_rtn"] < 96
    assert report.details["fell_back_to_rtn"] == {}
    assert count(model) == {"com.microsoft::MatMulNBits": 1}


def test_gptq_keeps_plain_rounding_where_that_is_better() -> None:
    """Uncorrelated channels: the feedback of a Gram matrix from few rows is noise, but no channel may lose by it."""
    data = Calibration([{"x": np.diag(np.linspace(1, 2, 128)).astype(np.float32)}], threads=1)
    _, report, _ = press(layer(), data, method="gptq", act_order=False, clip_search=False)
    found = report.details["layers"]["w"]
    assert found["method"] == "rtn"
    assert found["channels_kept_rtn"] == 96
    assert found["output_sqnr_db"] == found["rtn_output_sqnr_db"]


def test_layers_of_one_input_and_layers_of_many() -> None:
    """Three products share one Gram matrix; a weight that two activations meet gets the sum of both."""
    text = f"""{head()} g (float[b, 128] x, float[128, 128] q, float[128, 128] k, float[128, 128] w)
        => (float[b, 128] y) {{ a = MatMul(x, q) d = MatMul(x, k) e = Mul(a, d) f = Tanh(e)
        g = MatMul(f, w) h = Tanh(g) y = MatMul(h, w) }}"""
    weights = {n: normal(128, 128, seed=i, scale=0.1) for i, n in enumerate("qkw")}
    data = batches()
    data.memory_limit = 1  # one Gram matrix at a time
    model, report, before = press(model_from(text, weights), data, method="gptq", bits=3)
    assert {name: found["method"] for name, found in report.details["layers"].items()} == dict.fromkeys("qkw", "gptq")
    plain, _, _ = press(model_from(text, weights), method="rtn", bits=3, clip_search=False)
    feeds = {"x": normal(512, 128, seed=99) @ mixing(128)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > sqnr(run(before, feeds)[0], run(plain, feeds)[0]) + 2


def test_data_tell_the_search_what_counts() -> None:
    with_data = quality("rtn", batches(2.0), bits=3, spread=2.0)
    model, _, before = press(layer(), method="rtn", bits=3)
    x = normal(512, 128, seed=99) @ mixing(128, 2.0)
    without = sqnr(run(before, {"x": x})[0], run(model, {"x": x})[0])
    assert with_data > without + 0.5


def test_hqq_needs_no_data_and_gains() -> None:
    heavy = np.random.default_rng(0).standard_t(4, (128, 96)).astype(np.float32)
    x, found = normal(256, 128, seed=9), {}
    for method, options in {"rtn": {"clip_search": False}, "hqq": {}}.items():
        model, report, before = press(model_from(LAYER, {"w": heavy}), method=method, bits=3, **options)
        found[method] = sqnr(run(before, {"x": x})[0], run(model, {"x": x})[0])
        assert report.details["layers"]["w"]["method"] == method
    assert found["hqq"] > found["rtn"] + 0.2


NORMED = f"""{head()} g (float[b, 128] v, float[128] gamma, float[128] beta, float[128, 128] p, float[128, 128] q)
    => (float[b, 128] y) {{ x = LayerNormalization<axis = -1>(v, gamma, beta)
    a = MatMul(x, p) c = MatMul(x, q) y = Add(a, c) }}"""


def normed(text: str = NORMED) -> ir.Model:
    size = np.exp(1.5 * np.random.default_rng(5).standard_normal(128)).astype(np.float32)
    weights = {"gamma": size, "beta": normal(128, seed=6), "p": normal(128, 128), "q": normal(128, 128, seed=1)}
    return model_from(text, weights)


def test_awq_folds_one_scale_for_all_readers_of_an_input() -> None:
    data = Calibration([{"v": normal(256, 128, seed=3)}], threads=1)
    feeds = {"v": normal(512, 128, seed=99)}
    found = {}
    for method in ("rtn", "awq"):
        model, report, before = press(normed(), data if method == "awq" else None, method=method, clip_search=False)
        found[method] = sqnr(run(before, feeds)[0], run(model, feeds)[0])
    assert found["awq"] > found["rtn"] + 1
    assert report.details["input_scales"] == {"norm": 1}
    assert count(model)["com.microsoft::MatMulNBits"] == 2
    assert "Mul" not in count(model)
    layers = report.details["layers"]
    assert layers["p"]["alpha"] == layers["q"]["alpha"] > 0
    assert layers["p"]["output_gain_db"] > 1


def test_awq_writes_a_mul_where_it_may_and_must() -> None:
    """The normalization is read by a residual too."""
    text = NORMED.replace("y = Add(a, c)", "d = Add(a, c) y = Add(d, x)")
    data = Calibration([{"v": normal(256, 128, seed=3)}], threads=1)
    model, report, before = press(normed(text), data, method="awq")
    assert report.details["input_scales"] == {"mul": 1}
    assert count(model)["Mul"] == 1
    feeds = {"v": normal(64, 128, seed=99)}
    assert sqnr(run(before, feeds)[0], run(model, feeds)[0]) > 18
    model, report, _ = press(normed(text), data, method="awq", insert_mul=False)
    assert "input_scales" not in report.details
    assert set(report.details["fell_back_to_rtn"]) == {"p", "q"}
    assert "insert_mul" in report.details["fell_back_to_rtn"]["p"]


def test_awq_folds_into_a_layer_that_is_quantized_itself() -> None:
    """The second layer's scale goes into the first one's columns, which are rounded after that."""
    text = f"""{head()} g (float[b, 128] x, float[128, 128] p, float[128, 128] q) => (float[b, 128] y) {{
        h = MatMul(x, p) r = Relu(h) y = MatMul(r, q) }}"""
    p = normal(128, 128) * np.exp(1.5 * np.random.default_rng(5).standard_normal(128)).astype(np.float32)
    data, feeds, found = batches(1.5), {"x": normal(512, 128, seed=99) @ mixing(128, 1.5)}, {}
    for method in ("rtn", "awq"):
        model = model_from(text, {"p": p, "q": normal(128, 128, seed=1)})
        model, report, before = press(model, data if method == "awq" else None, method=method, clip_search=False)
        found[method] = sqnr(run(before, feeds)[0], run(model, feeds)[0])
    assert report.details["input_scales"] == {"mul": 1, "linear": 1}
    assert found["awq"] > found["rtn"] + 1


def test_methods_fall_back_where_nothing_can_be_measured() -> None:
    inside = BRANCHES.replace("p = MatMul(h, w)", "t = Relu(h) p = MatMul(t, w)")
    data = Calibration([{"c": np.array(True), "x": normal(8, 64)}], threads=1)
    for method in ("gptq", "awq"):
        _, report, _ = press(model_from(inside, {"w": normal(64, 64)}), data, method=method)
        assert report.changed == 1
        assert report.details["layers"]["w"]["method"] == "rtn"
        assert "w" in report.details["fell_back_to_rtn"]
    _, report, _ = press(layer(), Calibration([{"x": np.zeros((4, 128), np.float32)}], threads=1), method="gptq")
    assert report.details["fell_back_to_rtn"] == {"w": "its input is zero on all calibration data"}


def test_awq_leaves_tied_and_shared_weights_unscaled() -> None:
    data = Calibration([IDS], threads=1)
    _, report, _ = press(tied(), data, method="awq")
    assert report.details["fell_back_to_rtn"] == {"e": "an embedding reads the weight too"}
    _, report, _ = press(tied(), data, method="gptq")
    assert report.details["layers"]["e"]["method"] == "gptq"


def test_measuring_methods_ask_for_data() -> None:
    for method in ("gptq", "awq"):
        with pytest.raises(InputError, match="needs calibration data"):
            press(layer(), method=method)
    assert QuantizeWeights(method="rtn").needs == QuantizeWeights(method="hqq").needs == ()


# ---------------------------------------------------------------------------------------------------- what is left out


def test_what_stays_is_listed_with_its_reason() -> None:
    text = f"""{head()} g (float[b, 64] x, float[64, 64] ok, float[64, 64] nan, float[64, 64] skipped,
        float[64, 64] left, float[64, 64] both, float[64, 64] bias)
        => (float[b, 64] y, float[64, 64] both) {{
        a = MatMul(x, ok) c = MatMul(a, nan) d = MatMul(c, skipped) e = MatMul(left, left) f = MatMul(d, e)
        g = MatMul(f, both) h = MatMul(g, bias) i = Add(h, bias) y = Identity(i) }}"""
    weights = {n: normal(64, 64) for n in ("ok", "nan", "skipped", "left", "both", "bias")}
    weights["nan"][3, 5] = np.nan
    model = model_from(text, weights)
    settings = QuantizeWeights(exclude=("skip*",))
    plan = settings.plan(model)
    assert [action["weight"] for action in plan.actions] == ["ok"]
    found = " | ".join(left.reason for left in plan.left)
    for part in ("NaN", "excluded by name", "left factor", "output of the graph", "read by Add", "both inputs are"):
        assert part in found, part


def test_small_weights_and_other_operators_stay() -> None:
    with pytest.raises(InputError, match="fewer than 10000 elements"):
        press(linear(), minimum_elements=10000)
    with pytest.raises(InputError, match="not among the operators"):
        press(linear(), operators=("Gather",))
    half = linear()
    weight = half.graph.initializers["w"]
    weight.const_value = ir.Tensor(normal(64, 96).astype(np.float16), name="w")
    with pytest.raises(InputError, match="float16, not fp32"):
        press(half)


def test_a_quantized_model_has_nothing_left_to_do() -> None:
    model, _, _ = press(linear())
    with pytest.raises(InputError, match="nothing to do"):
        press(model)


def test_widths_by_name() -> None:
    text = f"""{head()} g (int64[b] ids, float[50, 64] embed, float[64, 64] middle, float[64, 96] lm_head)
        => (float[b, 96] y) {{ a = Gather(embed, ids) c = MatMul(a, middle) y = MatMul(c, lm_head) }}"""
    shapes = {"embed": (50, 64), "middle": (64, 64), "lm_head": (64, 96)}
    model = model_from(text, {n: normal(*s) for n, s in shapes.items()})
    _, report, _ = press(model, mixed={"*head*": 8, "*": "ternary"}, gather_bits=2)
    assert {n: r["bits"] for n, r in report.details["layers"].items()} == {
        "embed": "ternary",
        "middle": "ternary",
        "lm_head": 8,
    }
    model = model_from(text, {n: normal(*s) for n, s in shapes.items()})
    _, report, _ = press(model, bits=4, gather_bits=8)
    assert report.details["bits"] == {"8": 1, "4": 2}
    model = model_from(text, {n: normal(*s) for n, s in shapes.items()})
    with pytest.raises(InputError, match=r"mixed pattern '\*lm_hed\*' matches no weight") as error:
        press(model, mixed={"*lm_hed*": 8})
    assert "lm_head" in str(error.value.next_step)


def test_settings_without_a_kernel_are_refused() -> None:
    for options in ({"bits": 3}, {"gather_bits": 3}, {"mixed": {"*": 3}}):
        with pytest.raises(ValidationError, match="no kernel for 3 bits"):
            QuantizeWeights(format="matmul_nbits", **options)  # type: ignore[arg-type]
    for options in ({"bits": 5}, {"group_size": 48}, {"method": "adaround"}, {"damping": -1.0}):
        with pytest.raises(ValidationError):
            QuantizeWeights(**options)  # type: ignore[arg-type]


def test_the_report_is_json_and_warns_of_little_data() -> None:
    few = Calibration([{"x": normal(40, 128) @ mixing(128)}], threads=1)
    _, report, _ = press(layer(), few, method="gptq", damping=0.0)
    found = report.details["layers"]["w"]
    assert "fewer than the 128 channels" in found["rows"]
    assert found["damping"] > 0
    json.dumps(report.to_json())
    _, report, _ = press(layer(), batches(), method="gptq")
    assert not {"rows", "damping"} & set(report.details["layers"]["w"])


@every_file
@pytest.mark.parametrize("form", ["auto", "qdq", "unpack"])
def test_real_files_run_or_are_refused(path: Path, form: str) -> None:
    model, _ = run_pass(Clean(), read(path))
    settings = QuantizeWeights(bits=8, format=form)  # type: ignore[arg-type]
    if not settings.plan(model).actions:
        with pytest.raises(InputError, match="nothing to do"):
            run_pass(settings, model)
        return
    model, report = run_pass(settings, model)
    assert report.bytes_after < report.bytes_before
    for expected, got in zip(outputs_of(path), run(model, feeds_for(path)), strict=True):
        assert distance(expected, got) < 0.1


def test_the_same_model_gives_the_same_bytes() -> None:
    assert len({to_bytes(press(layer(), batches(), method="gptq")[0]) for _ in range(2)}) == 1

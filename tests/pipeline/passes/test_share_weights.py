# SPDX-License-Identifier: Apache-2.0
"""Palettes, ties and likenesses: the file is smaller, and the graph computes what the codes stand for, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import NameFixPass
from pass_tools import Array, count, model_from, normal, reasons, run, sqnr, weights_of
from pydantic import ValidationError

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.palette_nodes import Coded, planes_of, stored_bytes, write_palette
from onnxpress.pipeline.passes.share_weights import ShareWeights
from onnxpress.pipeline.quantization.codes import pack_plane, unpack_plane
from onnxpress.pipeline.statistics import Calibration

# Odd sizes, so that no row of codes fills its bytes
NET = """
<ir_version: 10, opset_import: ["": 18]>
net (float[b, 45] x, float[n, 5, 8, 8] image, int64[b] ids, float[45, 63] w1, float[31, 63] w2, float[31] b2,
     float[21, 5, 3, 3] w3, float[101, 37] w4) => (float[b, 31] y, float[n, 21, 6, 6] z, float[b, 37] e)
{
    hidden = MatMul(x, w1)
    y = Gemm<transB = 1>(hidden, w2, b2)
    z = Conv(image, w3)
    e = Gather(w4, ids)
}
"""


def net(**changed: Array) -> ir.Model:
    weights = {
        "w1": normal(45, 63, seed=1),
        "w2": normal(31, 63, seed=2),
        "b2": normal(31, seed=3),
        "w3": normal(21, 5, 3, 3, seed=4),
        "w4": normal(101, 37, seed=5),
    }
    return model_from(NET, {**weights, **changed})


def feeds(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((7, 45)).astype(np.float32),
        "image": random.standard_normal((2, 5, 8, 8)).astype(np.float32),
        "ids": random.integers(0, 101, 7),
    }


def shared(model: ir.Model, calibration: Calibration | None = None, **settings: Any) -> tuple[ir.Model, PassReport]:
    return run_pass(ShareWeights(**{"minimum_elements": 0, **settings}), model, calibration)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_exactly_their_bits(bits: int) -> None:
    planes = planes_of(bits)
    assert sum(8 / plane.per_byte for plane in planes) == bits
    codes = np.arange(2**bits, dtype=np.uint8)[None]
    assert np.array_equal(sum(unpack_plane(pack_plane(codes, p), p, codes.shape[1]) for p in planes), codes)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_file_is_smaller_and_the_graph_reads_the_palette(bits: int, group_size: int | None) -> None:
    model = net()
    before, settings = run(model, feeds()), ShareWeights(bits=bits, group_size=group_size, minimum_elements=0)  # type: ignore[arg-type]
    plan = settings.plan(model)
    assert len(plan.actions) == 4
    stood_for = {}
    for action in plan.actions:
        key = action["weight"]
        codes, palettes = plan.arrays[f"{key}|codes"].copy(), plan.arrays[f"{key}|palettes"].copy()
        stood_for[key] = Coded(codes, palettes, bits, action["axis"]).restored()
    expected = run(net(**stood_for), feeds())
    model, report = shared(model, bits=bits, group_size=group_size)
    overhead = 6500 + 4 * 2**bits * sum(action["palettes"] for action in plan.actions)
    assert report.bytes_after < report.bytes_before * bits / 32 + overhead < report.bytes_before
    for found, wanted, plain in zip(run(model, feeds()), expected, before, strict=True):
        assert np.array_equal(found, wanted)
        assert not np.array_equal(found, plain)


def test_more_bits_are_nearer() -> None:
    before, found = run(net(), feeds()), []
    for bits in (2, 4, 6, 8):
        model, _ = shared(net(), bits=bits)
        found.append([sqnr(a, b) for a, b in zip(before, run(model, feeds()), strict=True)])
    assert np.all(np.diff(np.asarray(found), axis=0) > 8)
    assert min(found[-1]) > 38


def test_palettes_of_their_own_are_nearer() -> None:
    weight = normal(45, 64) * np.exp2(np.arange(64) // 16 * 4).astype(np.float32)
    text = """
    <ir_version: 10, opset_import: ["": 18]>
    g (float[b, 45] x, float[45, 64] w) => (float[b, 64] y) { y = MatMul(x, w) }
    """
    found, x = [], {"x": normal(9, 45, seed=3)}
    for group in (None, 16):
        model, report = shared(model_from(text, {"w": weight}), bits=3, group_size=group)
        exact, got = x["x"] @ weight, run(model, x)[0]
        found.append(sqnr(exact[:, :16], got[:, :16]))
    assert report.details["weights"]["w"]["palettes"] == 4
    assert found[1] > 12 > 3 > found[0]


def test_rows_of_an_embedding_stay_packed() -> None:
    model, _ = shared(net(), bits=4, exclude=("w1", "w2", "w3"))
    picked = [node for node in model.graph if node.op_type == "Gather" and node.inputs[1].name == "ids"]
    assert [node.inputs[0].dtype for node in picked] == [ir.DataType.UINT8]
    scalar = model_from(
        """<ir_version: 10, opset_import: ["": 13]>
        g (int64 i, int64[a, b] j, float[101, 37] w) => (float[37] y, float[a, b, 37] z)
        { y = Gather(w, i) z = Gather<axis = -2>(w, j) }""",
        {"w": normal(101, 37)},
    )
    before, given_ = run(scalar, {"i": np.asarray(5), "j": np.arange(6).reshape(2, 3)}), scalar
    after, _ = shared(given_, bits=8, group_size=32)
    for a, b in zip(before, run(after, {"i": np.asarray(5), "j": np.arange(6).reshape(2, 3)}), strict=True):
        assert a.shape == b.shape
        assert sqnr(a, b) > 38


def test_errors_count_as_much_as_the_inputs_they_meet() -> None:
    """The inputs that are large meet weights that are small, as after a normalization was scaled."""
    scale = np.exp(2 * normal(45, seed=9))
    weight = normal(45, 63) / scale[:, None]
    batches = [{**feeds(seed), "x": feeds(seed)["x"] * scale} for seed in range(6)]
    unseen = {**feeds(99), "x": feeds(99)["x"] * scale}
    before, found = run(net(w1=weight), unseen), []
    for sensitive in (False, True):
        settings = {"bits": 4, "sensitive": sensitive, "exclude": ("w2",)}
        model, report = shared(net(w1=weight), Calibration(batches, threads=1), **settings)
        found.append(sqnr(before[0], run(model, unseen)[0]))
    assert found[1] > found[0] + 3
    assert list(report.details["judged_by_weight_alone"]) == ["w4"]


def test_sensitive_palettes_need_data() -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        shared(net(), sensitive=True)


TIED = """
<ir_version: 10, opset_import: ["": 18]>
g (int64[b] ids, float[90, 40] w1, float[40, 90] w2) => (float[b, 90] y, float[b, 90] z)
{ e = Gather(w1, ids) y = MatMul(e, w2) t = Transpose(w1) z = MatMul(e, t) }
"""


TURNED = TIED.replace("t = Transpose(w1) z = MatMul(e, t)", "t = Transpose(w2) f = Gather(t, ids) z = MatMul(f, w2)")


@pytest.mark.parametrize("text", [TIED, TURNED], ids=["the one that stays is transposed too", "the one that goes is"])
def test_a_transposed_copy_is_stored_once(text: str) -> None:
    table, ids = normal(90, 40), {"ids": np.arange(0, 90, 7)}
    model = model_from(text, {"w1": table, "w2": np.ascontiguousarray(table.T)})
    before = run(model, ids)
    model, report = shared(model, bits=None)
    assert report.details["tied"] == 1
    assert report.bytes_after == report.bytes_before / 2
    assert list(weights_of(model)) == ["w1"]
    assert count(model)["Transpose"] == 1
    for a, b in zip(before, run(model, ids), strict=True):
        assert np.array_equal(a, b)


def test_a_transposed_copy_and_a_palette() -> None:
    table = normal(90, 40)
    model = model_from(TIED, {"w1": table, "w2": np.ascontiguousarray(table.T)})
    before = run(model, {"ids": np.arange(20)})
    model, report = shared(model, bits=8)
    assert report.bytes_after < 0.2 * report.bytes_before
    assert min(sqnr(a, b) for a, b in zip(before, run(model, {"ids": np.arange(20)}), strict=True)) > 35


def test_what_is_nearly_transposed_is_not_tied() -> None:
    other = np.ascontiguousarray(normal(90, 40).T)
    other[3, 3] = np.nextafter(other[3, 3], np.float32(9))
    with pytest.raises(InputError, match="nothing to do"):
        shared(model_from(TIED, {"w1": normal(90, 40), "w2": other}), bits=None)


ALIKE = """
<ir_version: 10, opset_import: ["": 18]>
g (float[b, 40] x, float[40, 40] w1, float[40, 40] w2, float[40, 40] w3) => (float[b, 40] y)
{ a = MatMul(x, w1) n = Tanh(a) c = MatMul(n, w2) m = Tanh(c) y = MatMul(m, w3) }
"""


def alike(change: Array) -> ir.Model:
    first = normal(40, 40, scale=0.2)
    return model_from(ALIKE, {"w1": first, "w2": first + change, "w3": normal(40, 40, seed=8, scale=0.2)})


def test_similar_weights_become_one_where_asked() -> None:
    with pytest.raises(InputError, match="nothing to do"):
        shared(alike(normal(40, 40, seed=5, scale=0.002)), bits=None)
    model = alike(normal(40, 40, seed=5, scale=0.002))
    before = run(model, {"x": normal(9, 40)})
    model, report = shared(model, bits=None, similarity=0.02)
    assert report.details["similar"] == 1
    assert report.details["weights"]["w2"]["to"] == "w1"
    assert 0.005 < report.details["weights"]["w2"]["changes"] < 0.02
    assert report.bytes_after == pytest.approx(report.bytes_before * 2 / 3)
    assert sqnr(before[0], run(model, {"x": normal(9, 40)})[0]) > 30


def test_data_says_how_similar_outputs_are() -> None:
    """The weights differ a lot, in a row that meets an input which is nearly always zero."""
    change = np.zeros((40, 40), np.float32)
    change[7] = normal(40, seed=5)
    first = normal(40, 40, scale=0.2)
    first[:, 7] *= 1e-4
    weights = {"w1": first, "w2": first + change, "w3": normal(40, 40, seed=8, scale=0.2)}
    with pytest.raises(InputError, match="nothing to do"):
        shared(model_from(ALIKE, weights), bits=None, similarity=0.02)
    data = Calibration([{"x": normal(30, 40, seed=seed)} for seed in range(4)], threads=1)
    _, report = shared(model_from(ALIKE, weights), data, bits=None, similarity=0.02)
    assert report.details["weights"]["w2"]["to"] == "w1"


def test_what_stays_has_a_reason() -> None:
    text = NET.replace("net (", "net (float[40, 40] w6, float[40, 40] w7,")
    text = text.replace("e = Gather", "k = MatMul(w6, w7) e = Gather")
    text = text.replace("=> (", "=> (float[40, 40] k,").replace("float[40, 40] w6,", "float[40, 40] w6,")
    broken = normal(40, 40)
    broken[0, 0] = np.inf
    weights = {name: tensor.numpy() for name, tensor in weights_of(net()).items()}
    model = model_from(text, {**weights, "w6": broken, "w7": normal(40, 40)})
    model, report = shared(model, exclude=("w1",), minimum_elements=1000)
    found = reasons(report)
    assert found["w1"] == "excluded by name"
    assert found["w3"] == "the weight has fewer than 1000 elements"
    assert found["w6"] == "the weight holds NaN or infinity"
    assert report.seen == 6
    assert sorted(report.details["weights"]) == ["w2", "w4", "w7"]


def test_palettes_that_would_take_more_than_they_save_are_not_written() -> None:
    with pytest.raises(InputError, match="palettes of 256 values take more bytes"):
        shared(net(), bits=8, group_size=1)
    assert stored_bytes((45, 63), 8, 63, by_row=False) > 4 * 45 * 63 > stored_bytes((45, 63), 8, 1, by_row=False)


def test_the_report_says_what_it_is_worth() -> None:
    _, report = shared(net())
    assert "computes in fp32" in report.details["stored_as"]
    assert all(entry["weight_sqnr_db"] > 25 for entry in report.details["weights"].values())


def test_tables_are_stored_once_for_all_weights() -> None:
    model, _ = shared(net(), bits=6)
    assert sorted(name for name in weights_of(model) if name.startswith("onnxpress")) == [
        "onnxpress_codes_16_1",
        "onnxpress_codes_4_16",
    ]


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 30), st.integers(1, 4), st.integers(0, 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_shape_is_read_back(bits: int, rows: int, columns: int, groups: int, axis: int, pick: bool) -> None:
    random = np.random.default_rng(rows * 100 + columns)
    codes = random.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    groups = min(groups, codes.shape[axis])
    groups = -(-codes.shape[axis] // -(-codes.shape[axis] // groups))
    coded = Coded(codes, random.standard_normal((groups, 2**bits)).astype(np.float32), bits, axis)
    body = "y = Gather(w, ids)" if pick else "z = Gather(w, ids) y = Add(w, w)"
    text = f"""
    <ir_version: 10, opset_import: ["": 18]>
    g (int64[b] ids, float[{rows}, {columns}] w) => (float[b, {columns}] y) {{ {body} }}
    """
    model = model_from(text, {"w": np.zeros((rows, columns), np.float32)})
    write_palette(model, model.graph.initializers["w"], coded)
    del model.graph.initializers["w"]
    NameFixPass()(model)
    ids = np.arange(rows)
    wanted = coded.restored() if pick else 2 * coded.restored()
    assert np.array_equal(run(model, {"ids": ids})[0], wanted)


@pytest.mark.parametrize("bad", [{"bits": 9}, {"bits": 0}, {"group_size": 0}, {"similarity": 1.0}])
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ShareWeights(**bad)

# SPDX-License-Identifier: Apache-2.0
"""Attention with a cache becomes GroupQueryAttention where asked for: the same numbers, the cache updated in place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from fusing import fused_same
from pass_tools import Array, count, model_from, normal, press, session

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse

FUSED = "com.microsoft::GroupQueryAttention"
ASKED = Fuse(grouped_query=True)
HEADS, GROUPS, SIZE = 4, 2, 8
CAUSAL = """
    zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>() new0 = Shape<start = 1, end = 2>(x)
    new = Squeeze(new0) old0 = Shape<start = 2, end = 3>(past_k) old = Squeeze(old0) all = Add(old, new)
    queries0 = Range(zero, new, one) queries1 = Add(queries0, old) keys = Range(zero, all, one)
    last = Constant<value = int64[1] {-1}>() queries = Unsqueeze(queries1, last) seen = LessOrEqual(keys, queries)
    real0 = Cast<to = 9>(tokens) middle = Constant<value = int64[2] {1, 2}>() real = Unsqueeze(real0, middle)
"""
JOIN = "visible = And(seen, real)"
WINDOW = """far = Constant<value = int64 {4096}>() near0 = Sub(queries, far) near = Greater(keys, near0)
    recent = And(seen, near) visible = And(recent, real)"""
BIAS = """low = Constant<value_float = -3.4028234e38>() none = Constant<value_float = 0.0>()
    mask = Where(visible, none, low)"""
HEAD = """
    qs = Constant<value = int64[4] {0, 0, 4, 8}>() ks = Constant<value = int64[4] {0, 0, 2, 8}>()
    join = Constant<value = int64[3] {0, 0, 32}>() q0 = Reshape(x, qs) q = Transpose<perm = [0, 2, 1, 3]>(q0)
    ky = MatMul(x, wk) k0 = Reshape(ky, ks) k1 = Transpose<perm = [0, 2, 1, 3]>(k0)
    vy = MatMul(x, wv) v0 = Reshape(vy, ks) v1 = Transpose<perm = [0, 2, 1, 3]>(v0)
    k = Concat<axis = 2>(past_k, k1) v = Concat<axis = 2>(past_v, v1)
"""
SIZES_OF_REPEATS = """
    two = Constant<value = int64[1] {2}>() four = Constant<value = int64[1] {4}>()
    eight = Constant<value = int64[1] {8}>() b0 = Shape<start = 0, end = 1>(x) t0 = Shape<start = 1, end = 2>(tokens)
    wide = Concat<axis = 0>(b0, two, two, t0, eight) full = Concat<axis = 0>(b0, four, t0, eight)
"""
REPEAT = "NAME5 = Unsqueeze(NAME, two) NAME6 = Expand(NAME5, wide) NAME7 = Reshape(NAME6, full) "
ATTEND = """
    kt = Transpose<perm = [0, 1, 3, 2]>(k7) m = MatMul(q, kt) c = Constant<value_float = 0.3>() n = Mul(m, c)
    a = Add(n, mask) p = Softmax<axis = -1>(a) o = MatMul(p, v7) o1 = Transpose<perm = [0, 2, 1, 3]>(o)
    y = Reshape(o1, join)
"""
WEIGHTS = {"wk": normal(32, 16, scale=0.3), "wv": normal(32, 16, seed=1, scale=0.3)}


def decoder(join: str = JOIN, *, attend: str = ATTEND, more: str = "", returned: str = "k") -> ir.Model:
    repeat = SIZES_OF_REPEATS + REPEAT.replace("NAME", "k") + REPEAT.replace("NAME", "v")
    wide, full = f"float[b, {GROUPS}, 2, total, 8]", "float[b, 4, total, 8]"
    text = f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[b, s, 32] x, int64[b, total] tokens, float[b, 2, past, 8] past_k, float[b, 2, past, 8] past_v,
           float[32, 16] wk, float[32, 16] wv)
        => (float[b, s, 32] y, float[b, 2, total, 8] {returned}, float[b, 2, total, 8] v)
        <float[b, 1, s, total] mask, {wide} k6, {full} k7, {wide} v6, {full} v7> {{
        {CAUSAL} {join} {BIAS} {HEAD} {repeat} {attend} {more} }}"""
    return press(Clean(), model_from(text, WEIGHTS))[0]


def feeds(batch: int, new: int, past: int) -> dict[str, Array]:
    cache = {f"past_{part}": normal(batch, GROUPS, past, SIZE, seed=i) for i, part in enumerate("kv")}
    return {"x": normal(batch, new, 32), "tokens": np.ones((batch, past + new), np.int64), **cache}


SIZES = [feeds(1, 1, 0), feeds(2, 5, 0), feeds(3, 1, 4), feeds(1, 3, 6)]


def test_the_same_numbers_with_a_cache_of_the_exact_size() -> None:
    model, report = fused_same(decoder(), {"grouped_query": 1}, SIZES, ASKED)
    assert report.left == ()
    assert count(model)[FUSED] == 1
    assert {"Softmax", "Where", "Range", "Expand", "Concat"}.isdisjoint(count(model))


def test_a_cache_updated_in_place() -> None:
    old, new = session(decoder()), session(press(ASKED, decoder())[0])
    buffers = {p: ort.OrtValue.ortvalue_from_numpy(np.zeros((2, GROUPS, 16, SIZE), np.float32)) for p in "kv"}
    past = {f"past_{part}": np.zeros((2, GROUPS, 0, SIZE), np.float32) for part in "kv"}
    done = 0
    for count_new in (4, 1, 1):
        given = {"x": normal(2, count_new, 32, seed=done), "tokens": np.ones((2, done + count_new), np.int64)}
        wanted, keys, values = old.run(None, {**given, **past})
        past, done = {"past_k": keys, "past_v": values}, done + count_new
        binding = new.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for part, buffer in buffers.items():
            binding.bind_ortvalue_input(f"past_{part}", buffer)
            binding.bind_ortvalue_output(part, buffer)
        binding.bind_output("y")
        new.run_with_iobinding(binding)
        result = next(v for v in binding.get_outputs() if len(v.shape()) == 3)
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(buffers["k"].numpy()[:, :, :done], keys, rtol=1e-5, atol=1e-6)
        assert not buffers["k"].numpy()[:, :, done:].any()


def test_padding_on_the_right() -> None:
    """A row whose last tokens are padding gets what it gets alone."""
    new = session(press(ASKED, decoder())[0])
    given = feeds(2, 5, 0)
    given["tokens"][0, 3:] = 0
    alone = {name: array[:1, :3] if name in ("x", "tokens") else array[:1] for name, array in given.items()}
    both, single = new.run(["y"], given)[0], new.run(["y"], alone)[0]
    np.testing.assert_allclose(both[:1, :3], single, rtol=1e-4, atol=1e-5)


def test_not_unless_asked_for() -> None:
    model, report, _ = press(Fuse(), decoder())
    assert FUSED not in count(model)
    assert report.details["grouped_heads"] == 2


REFUSED = {
    "window": (lambda: decoder(WINDOW), "its mask is not causal, or hides more than padding"),
    "sees_all": (
        lambda: decoder("no = Constant<value = bool {0}>() al = Or(seen, no) nay = Not(al) any = Or(al, nay) "
                        "visible = And(any, real)"),
        "its mask is not causal, or hides more than padding",
    ),
    "no_padding": (
        lambda: decoder("front = Constant<value = int64[2] {0, 1}>() visible = Unsqueeze(seen, front)"),
        "its mask does not depend on one attention mask of integers among the inputs",
    ),
    "kept_inside": (
        lambda: decoder(more="kept = Neg(k)", returned="kept"),
        "its cache is not among the graph's inputs and outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_express_says_why(case: str) -> None:
    make, reason = REFUSED[case]
    model, report, _ = press(ASKED, make())
    assert FUSED not in count(model)
    assert reason in [left.reason for left in report.left]


def test_positions_counted_from_the_cache_are_refused() -> None:
    tail = "length = Shape<start = 2, end = 3>(past_v) place = Cast<to = 1>(length) y = Add(merged, place)"
    with pytest.raises(InputError, match="'past_v' is also read by Shape"):
        press(ASKED, decoder(attend=ATTEND.replace("y =", "merged ="), more=tail))

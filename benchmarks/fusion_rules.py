# SPDX-License-Identifier: Apache-2.0
"""Each fusing rule alone: the operators that it replaces, before and after, and what was tried instead.

Whole models hide what a rule does behind their matrix products, which it does not touch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from markdown import interval, table

from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.runtime.benchmark import Contender, Setting, measure
from onnxpress.runtime.session import Session

HEADS, GROUPS, SIZE, WIDTH, ROW = 12, 4, 64, 768, 6
Feeds = dict[str, np.ndarray]
Forms = Mapping[str, str | tuple[str, tuple[Pass, ...]]]


@dataclass(frozen=True)
class Case:
    """One rule.

    Attributes:
        name: What it does.
        inputs: Types of the graph's inputs, in ONNX's text form; `w` or `b` and a number are weights.
        forms: A form's name, and its text or (text, passes): `#` is the repetition, which reads `x#` and
            makes `z#`. The first is what torch writes, `fused` what the rule makes of it. Opset 20, unless the name
            says `opset 23`.
        head: Text before the repetitions.
        feeds: Sizes to measure with, and the arrays.
        known: Types of values that shape inference cannot find and torch.export states.
    """

    name: str
    inputs: str
    forms: Forms
    head: str
    feeds: Mapping[str, Feeds]
    known: tuple[str, ...] = ()


def rule_table(rounds: int, threads: int, *, quick: bool = False) -> str:
    """Every rule and every form of it, on every size, taking turns."""
    rows: list[tuple[object, ...]] = []
    for case in cases():
        sessions = {name: _session(case, name, form, threads) for name, form in case.forms.items()}
        contenders = [Contender(name, "cpu", session.run) for name, session in sessions.items()]
        settings = [Setting(size, 1, size, [feeds]) for size, feeds in case.feeds.items()]
        found = measure(
            contenders, settings[:1] if quick else settings, rounds=rounds, max_seconds=20, threads=threads, burst=2
        )
        for m in found:
            ratio = interval(m.ratio_to_reference)
            rows.append((case.name, m.shape, m.variant, f"{1000 * m.latency_ms['p50'] / ROW:.0f}", ratio))
    columns = ("operators", "input", "form", "p50 µs each", "x first form (95 %)")
    return table(f"**Fusing, rule by rule** ({ROW} in a row; `packed` is off by default)", columns, rows)


def _session(case: Case, name: str, form: str | tuple[str, tuple[Pass, ...]], threads: int) -> Session:
    text, passes = (form, ()) if isinstance(form, str) else form
    body = " ".join(text.replace("#", f"_{i}") for i in range(ROW))
    body = re.sub(rf"\bz_{ROW - 1}\b", "last", body)
    for i in range(1, ROW):
        body = re.sub(rf"\bx_{i}\b", f"z_{i - 1}", body)
    names = set(re.findall(r"\w+", body))
    known = [kind.replace("#", f"_{i}") for kind in case.known for i in range(ROW)]
    known = [kind for kind in known if kind.split()[-1] in names]
    caches = [f"{part}_{i}" for part in ("ok", "ov") for i in range(ROW)]
    present = "".join(f", float[b, n, t, {SIZE}] {name}" for name in caches if name in names)
    stated = f"<{', '.join(known)}>" if known else ""
    opset = 23 if "opset 23" in name else 20
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> g ({case.inputs}) => '
        f"(float[b, s, {WIDTH}] last{present}) {stated} {{ {case.head} {body} }}"
    )
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if str(value.name)[0] in "wb" and str(value.name)[1:].replace("_", "").isdigit():
            array = (random.standard_normal(value.shape.numpy()) / WIDTH**0.5).astype(np.float32)  # type: ignore[union-attr]
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    model, _ = run_pass(Clean(), model)
    for step in passes:
        model, _ = run_pass(step, model)
    return Session(ir.to_proto(model).SerializeToString(), threads=threads)


def cases() -> list[Case]:
    apart = [_norm(), _residual(), _rotary(), _grouped(), _cached()]
    return [*apart, *(make(kind) for make in (_gemm, _packed) for kind in _KINDS)]


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


_RMS = "p# = Pow(x#, two) m# = ReduceMean(p#, last_axis) a# = Add(m#, e) q# = Sqrt(a#) r# = Reciprocal(q#) "
_RMS_HEAD = """two = Constant<value_float = 2.0>() e = Constant<value_float = 0.00001>()
    last_axis = Constant<value = int64[1] {-1}>()"""
_TOKENS = {"1 x 1": {"x_0": _x(1, 1, WIDTH)}, "1 x 128": {"x_0": _x(1, 128, WIDTH)}}


def _norm() -> Case:
    before = f"{_RMS} n# = Mul(x#, r#) z# = Mul(w0, n#)"
    return Case(
        "root mean square normalization", f"float[b, s, {WIDTH}] x_0, float[{WIDTH}] w0",
        {
            "torch": before, "fused": (before, (Fuse(),)),
            "RMSNormalization, opset 23": "z# = RMSNormalization<axis = -1, epsilon = 0.00001>(x#, w0)",
        },
        _RMS_HEAD, _TOKENS,
    )  # fmt: skip


def _residual() -> Case:
    before = f"h# = Add(x#, other) {_RMS.replace('x#', 'h#')} n# = Mul(h#, r#) z# = Mul(w0, n#)"
    return Case(
        "the same with its residual addition", f"float[b, s, {WIDTH}] x_0, float[{WIDTH}] w0",
        {
            "torch": before, "fused": (before, (Fuse(),)),
            "SkipSimplifiedLayerNormalization":
                "z# = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.00001>(x#, other, w0)",
        },
        f"{_RMS_HEAD} other = Neg(x_0)", _TOKENS,
    )  # fmt: skip


_SPLIT = f"""
    sq = Constant<value = int64[4] {{0, 0, {HEADS}, {SIZE}}}>()
    sk = Constant<value = int64[4] {{0, 0, GROUPS, {SIZE}}}>()
    jo = Constant<value = int64[3] {{0, 0, {WIDTH}}}>() c = Constant<value_float = 0.125>()
"""


def _rotary() -> Case:
    head = f"""{_SPLIT.replace("GROUPS", str(GROUPS))}
        a1 = Constant<value = int64[1] {{1}}>() a2 = Constant<value = int64[1] {{2}}>()
        i0 = Constant<value = int64[1] {{0}}>()
        a3 = Constant<value = int64[1] {{3}}>() h = Constant<value = int64[1] {{{SIZE // 2}}}>()
        most = Constant<value = int64[1] {{9223372036854775807}}>() p3 = Unsqueeze(positions, a2) pf = Cast<to = 1>(p3)
        an = Mul(pf, w0) cc = Concat<axis = -1>(an, an) co = Cos(cc) si = Sin(cc) c4 = Unsqueeze(co, a1)
        s4 = Unsqueeze(si, a1)"""
    before = """q# = Reshape(x#, sq) t# = Transpose<perm = [0, 2, 1, 3]>(q#) u# = Mul(t#, c4)
        l# = Slice(t#, i0, h, a3, a1) r# = Slice(t#, h, most, a3, a1) n# = Neg(r#) k# = Concat<axis = -1>(n#, l#)
        v# = Mul(k#, s4) y# = Add(u#, v#) o# = Transpose<perm = [0, 2, 1, 3]>(y#) z# = Reshape(o#, jo)"""
    feeds = {}
    for batch, length in ((1, 1), (1, 128)):
        positions = np.tile(np.arange(length) + 100, (batch, 1))
        feeds[f"{batch} x {length}"] = {"x_0": _x(batch, length, WIDTH), "positions": positions}
    inputs = f"float[b, s, {WIDTH}] x_0, int64[b, s] positions, float[{SIZE // 2}] w0"
    return Case("rotary position embedding", inputs, {"torch": before, "fused": (before, (Fuse(),))}, head, feeds)


def _attention(repeat: str, keys: str, values: str) -> str:
    return f"""q# = Reshape(x#, sq) k# = Reshape(fk, sk) v# = Reshape(fv, sk)
        q1# = Transpose<perm = [0, 2, 1, 3]>(q#) k1# = Transpose<perm = [0, 2, 1, 3]>(k#)
        v1# = Transpose<perm = [0, 2, 1, 3]>(v#) ok# = Concat<axis = 2>(pk, k1#) ov# = Concat<axis = 2>(pv, v1#)
        {repeat} kt# = Transpose<perm = [0, 1, 3, 2]>({keys}) m# = MatMul(q1#, kt#) n# = Mul(m#, c) a# = Add(n#, mask)
        p# = Softmax<axis = -1>(a#) o# = MatMul(p#, {values}) t# = Transpose<perm = [0, 2, 1, 3]>(o#)
        z# = Reshape(t#, jo)"""


_FROM_CACHE = "z#, ok#, ov# = NAME (x#, fk, fv, INPUTS)"


def _attention_case(name: str, groups: int, forms: Forms, head: str, known: tuple[str, ...] = ()) -> Case:
    width = groups * SIZE
    feeds = {}
    for new, past in ((1, 128), (1, 1024), (128, 0)):
        causal = np.where(np.arange(past + new) <= past + np.arange(new)[:, None], 0, np.finfo(np.float32).min)
        feeds[f"{new} new, past {past}"] = {
            "x_0": _x(1, new, WIDTH), "fk": _x(1, new, width), "fv": _x(1, new, width),
            "pk": _x(1, groups, past, SIZE), "pv": _x(1, groups, past, SIZE),
            "mask": causal[None, None].astype(np.float32),
        }  # fmt: skip
    inputs = f"""float[b, s, {WIDTH}] x_0, float[b, s, {width}] fk, float[b, s, {width}] fv,
        float[b, {groups}, p, {SIZE}] pk, float[b, {groups}, p, {SIZE}] pv, float[b, 1, s, t] mask"""
    return Case(name, inputs, forms, f"{_SPLIT.replace('GROUPS', str(groups))} {head}", feeds, known)


def _grouped() -> Case:
    share = HEADS // GROUPS
    head = f"""a2 = Constant<value = int64[1] {{2}}>() i3 = Constant<value = int64[1] {{{share}}}>()
        ig = Constant<value = int64[1] {{{GROUPS}}}>() ih = Constant<value = int64[1] {{{HEADS}}}>()
        size = Constant<value = int64[1] {{{SIZE}}}>() bb = Shape<start = 0, end = 1>(mask)
        tt = Shape<start = 3, end = 4>(mask) wide = Concat<axis = 0>(bb, ig, i3, tt, size)
        full = Concat<axis = 0>(bb, ih, tt, size)
        i1 = Constant<value = int32[1] {{1}}>() t32 = Cast<to = 6>(tt) less = Sub(t32, i1) rows = Expand(less, bb)"""
    repeat = """k2# = Unsqueeze(ok#, a2) k3# = Expand(k2#, wide) kr# = Reshape(k3#, full) v2# = Unsqueeze(ov#, a2)
        v3# = Expand(v2#, wide) vr# = Reshape(v3#, full)"""
    torch = _attention(repeat, "kr#", "vr#")
    own = f"com.microsoft.GroupQueryAttention<num_heads = {HEADS}, kv_num_heads = {GROUPS}, scale = 0.125>"
    standard = f"Attention<q_num_heads = {HEADS}, kv_num_heads = {GROUPS}, scale = 0.125>"
    forms: Forms = {
        "torch": torch,
        "fused": (torch, (Fuse(),)),
        "GroupQueryAttention, cache copied":
            _FROM_CACHE.replace("NAME", own).replace("INPUTS", 'pk, pv, rows, t32, "", "", "", mask'),
        "Attention, opset 23": _FROM_CACHE.replace("NAME", standard).replace("INPUTS", "mask, pk, pv"),
    }  # fmt: skip
    wide, full = f"float[b, {GROUPS}, {share}, t, {SIZE}]", f"float[b, {HEADS}, t, {SIZE}]"
    known = (f"{wide} k3#", f"{full} kr#", f"{wide} v3#", f"{full} vr#")
    return _attention_case(f"attention, {HEADS} heads share {GROUPS} cached", GROUPS, forms, head, known)


def _cached() -> Case:
    torch = _attention("", "ok#", "ov#")
    standard = f"Attention<q_num_heads = {HEADS}, kv_num_heads = {HEADS}, scale = 0.125>"
    forms: Forms = {
        "torch": torch,
        "fused": (torch, (Fuse(),)),
        "Attention, opset 23": _FROM_CACHE.replace("NAME", standard).replace("INPUTS", "mask, pk, pv"),
    }
    return _attention_case(f"attention, {HEADS} cached heads", HEADS, forms, "")


_KINDS: dict[str, tuple[Pass, ...]] = {
    "fp32": (),
    "int8": (QuantizeDynamic(),),
    "int4": (QuantizeWeights(bits=4),),
}


def _gemm(kind: str) -> Case:
    weights = ", ".join(f"float[{WIDTH}, {WIDTH}] w_{i}, float[{WIDTH}] b_{i}" for i in range(ROW))
    head = f"""rows = Constant<value = int64[2] {{-1, {WIDTH}}}>() ww = Constant<value = int64[1] {{{WIDTH}}}>()
        bs = Shape<start = 0, end = 2>(x_0) back = Concat<axis = 0>(bs, ww)"""
    torch = "f# = Reshape(x#, rows) g# = Gemm(f#, w#, b#) h# = Reshape(g#, back) z# = Tanh(h#)"
    forms: Forms = {"torch": (torch, _KINDS[kind]), "fused": (torch, (Fuse(), *_KINDS[kind]))}
    known = (f"float[b, s, {WIDTH}] h#",)
    inputs = f"float[b, s, {WIDTH}] x_0, {weights}"
    return Case(f"Gemm between reshapes, {kind}", inputs, forms, head, _TOKENS, known)


def _packed(kind: str) -> Case:
    sizes = ", ".join(f"float[{WIDTH}, {WIDTH}] w_{i}{part}" for i in range(ROW) for part in range(3))
    torch = """q# = MatMul(x#, w#0) k# = MatMul(x#, w#1) v# = MatMul(x#, w#2) s# = Add(q#, k#) t# = Add(s#, v#)
        z# = Tanh(t#)"""
    forms: Forms = {"torch": (torch, _KINDS[kind]), "packed": (torch, (Fuse(packed=True), *_KINDS[kind]))}
    return Case(f"three products of one input, {kind}", f"float[b, s, {WIDTH}] x_0, {sizes}", forms, "", _TOKENS)

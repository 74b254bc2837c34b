# SPDX-License-Identifier: Apache-2.0
"""`.onnx` files of every form that the standard allows, from the file through `clean` and back: same outputs.

Functions, control flow with values of the outer graph, opset 7, operators of com.microsoft, weights in another file,
unusual types and names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.exporters import graph_file, sources
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse

from .samples import model_from

FUNCTION = """
<ir_version: 8, opset_import: ["": 18, "local": 1]>
main (float[N, 4] x, float[4, 4] w1, float[4] b1) => (float[N, 4] y)
{ h = local.block<scale: float = 2.0>(x, w1, b1)  y = local.block<scale: float = 3.0>(h, w1, b1) }
<opset_import: ["": 18, "local": 1], domain: "local">
scaled <scale>(x) => (y) { s = Constant<value_float: float = @scale>()  y = Mul(x, s) }
<opset_import: ["": 18, "local": 1], domain: "local">
block <scale>(x, w, b) => (y)
{ m = MatMul(x, w)  a = Add(m, b)  t = Tanh(a)  y = local.scaled<scale: float = @scale>(t) }
"""
IF = """
<ir_version: 8, opset_import: ["": 18]>
main (float[N, 4] x, float[4, 4] w1) => (float[N, 4] y)
{
    zero = Constant<value = float {0}>()
    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, zero)
    y = If(positive) <
        then_branch = yes () => (float[N, 4] a) { a = MatMul(x, w1) },
        else_branch = no () => (float[N, 4] b) { c = Neg(x)  b = MatMul(c, w1) }
    >
}
"""
LOOP = """
<ir_version: 8, opset_import: ["": 18]>
main (float[N, 4] x, float[4, 4] w1) => (float[N, 4] y, float[T, N, 4] steps)
{
    count = Constant<value = int64 {3}>()
    going = Constant<value = bool {1}>()
    y, steps = Loop(count, going, x) <
        body = step (int64 i, bool on, float[N, 4] h) => (bool still, float[N, 4] next, float[N, 4] seen)
        { m = MatMul(h, w1)  next = Tanh(m)  still = Identity(on)  seen = Identity(next) }
    >
}
"""
SCAN = """
<ir_version: 8, opset_import: ["": 18]>
main (float[T, 4] x, float[4, 4] w1) => (float[4] last, float[T, 4] all)
{
    four = Constant<value = int64[1] {4}>()
    start = ConstantOfShape<value = float[1] {0.0}>(four)
    last, all = Scan(start, x) <
        num_scan_inputs = 1,
        body = step (float[4] h, float[4] e) => (float[4] next, float[4] seen)
        { s = Add(h, e)  m = MatMul(s, w1)  next = Tanh(m)  seen = Identity(next) }
    >
}
"""
OPSET_7 = """
<ir_version: 3, opset_import: ["": 7]>
main (float[2, 3, 8, 8] x, float[4, 3, 3, 3] w1, float[4] b1, float[4] w2, float[4] b2, float[4] b3, float[4] w4)
    => (float[2, 4] y)
{
    c = Conv(x, w1, b1)
    v = Abs(w4)
    n = BatchNormalization<epsilon = 0.001>(c, w2, b2, b3, v)
    r = Relu(n)
    u = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]>(r)
    p = GlobalAveragePool(u)
    f = Flatten(p)
    d = Dropout<ratio = 0.5>(f)
    y = Softmax<axis = 1>(d)
}
"""
CONTRIB = """
<ir_version: 8, opset_import: ["": 18, "com.microsoft": 1]>
main (float[N, 4] x, float[4, 4] w1, float[4] b1, float[4] w2) => (float[N, 4] y)
{
    m = MatMul(x, w1)
    g = com.microsoft.BiasGelu(m, b1)
    y = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(g, x, w2)
}
"""
SEQUENCE = """
<ir_version: 8, opset_import: ["": 18]>
main (float[N, 4] x, float[4, 4] w1) => (float[M, 4] y)
{
    count = Constant<value = int64 {3}>()
    going = Constant<value = bool {1}>()
    none = SequenceEmpty()
    seen = Loop(count, going, none) <
        body = step (int64 i, bool on, seq(float) before) => (bool still, seq(float) after)
        {
            two = Constant<value = int64 {2}>()
            early = Less(i, two)
            list = If(early) <
                then_branch = more () => (seq(float) a) { m = MatMul(x, w1)  a = SequenceInsert(before, m) },
                else_branch = same () => (seq(float) b) { b = Identity(before) }
            >
            after = SequenceInsert(list, x)
            still = Identity(on)
        }
    >
    copy = Identity(seen)
    y = ConcatFromSequence<axis = 0>(copy)
}
"""
SCAN_8 = """
<ir_version: 3, opset_import: ["": 8]>
main (float[1, 4] start, float[1, T, 4] x) => (float[1, 4] last, float[1, T, 4] all)
{
    last, all = Scan(, start, x) <
        num_scan_inputs = 1,
        body = step (float[4] h, float[4] e) => (float[4] next, float[4] seen)
        { next = Add(h, e)  seen = Identity(next) }
    >
}
"""
ODD_NAMES = """
<ir_version: 8, opset_import: ["": 18]>
main (float[N, 4] x, float[4, 4] w1, float[4, 4] w2) => (float[N, 4] y) { a = MatMul(x, w1)  y = MatMul(a, w2) }
"""

FORMS = {
    "function": FUNCTION,
    "if": IF,
    "loop": LOOP,
    "scan": SCAN,
    "opset 7": OPSET_7,
    "com.microsoft": CONTRIB,
    "sequence": SEQUENCE,
}


def feeds_of(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"N": 3, "T": 5}
    return {
        str(value.name): rng.standard_normal(
            [sizes.get(str(dim), 0) or int(str(dim)) for dim in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }


def outputs_of(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [np.asarray(out) for out in session.run(None, feeds)]


def as_written(path: Path, text: str, change: Callable[[ir.Model], None] | None = None) -> tuple[Path, ir.Model]:
    """The file as another tool would have written it: nothing of ours touches it before `sources.load`."""
    model = model_from(text)
    if change is not None:
        change(model)
    proto = ir.to_proto(model)
    if proto.ir_version < 4:  # weights had to be among the inputs then
        weights = [ir.Value(name=v.name, shape=v.shape, type=v.type) for v in model.graph.initializers.values()]
        proto.graph.input.extend(ir.to_proto(value) for value in weights)
    path.write_bytes(proto.SerializeToString())
    return path, model


@pytest.mark.parametrize("form", FORMS)
def test_read_clean_write(form: str, tmp_path: Path) -> None:
    path, model = as_written(tmp_path / "net.onnx", FORMS[form])
    loaded = sources.load(str(path))
    assert loaded.signature.outputs
    cleaned, _ = run_pass(Clean(), loaded.model.clone())
    fused, _ = run_pass(Fuse(optional=True), loaded.model)
    for name, graph in (("clean", cleaned), ("fuse", fused)):
        graph_file.write(graph, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(tmp_path / f"{name}.onnx")
        for seed in range(2):
            feeds = feeds_of(model, seed)
            for wanted, got in zip(outputs_of(path, feeds), outputs_of(tmp_path / f"{name}.onnx", feeds), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_a_function_computes_is_counted_and_cleaned(tmp_path: Path) -> None:
    path, _ = as_written(tmp_path / "net.onnx", FUNCTION)
    loaded = sources.load(str(path))
    counts = graph_file.operator_counts(loaded.model)
    assert counts["local::block"] == 2
    assert counts["Tanh"] >= 1
    cleaned, _ = run_pass(Clean(), loaded.model)
    assert graph_file.operator_counts(cleaned)["MatMul"] in (1, 2)


def test_opset_7_is_brought_to_one_that_passes_understand(tmp_path: Path) -> None:
    path, _ = as_written(tmp_path / "net.onnx", OPSET_7)
    loaded = sources.load(str(path))
    assert loaded.model.opset_imports[""] >= graph_file.MINIMUM_OPSET
    assert loaded.original_file == path
    assert "Upsample" not in graph_file.operator_counts(loaded.model)


def test_scan_of_opset_8_is_refused_and_not_misread(tmp_path: Path) -> None:
    """It reads a batch of sequences and their lengths; ONNX's converter leaves it as it is."""
    path, _ = as_written(tmp_path / "net.onnx", SCAN_8)
    with pytest.raises(InputError, match="uses Scan of opset 8") as caught:
        sources.load(str(path))
    assert caught.value.next_step == "Export it again with opset 9 or newer."


@pytest.mark.parametrize("form", ["if", "function", "com.microsoft"])
def test_weights_in_another_file(form: str, tmp_path: Path) -> None:
    path, model = as_written(tmp_path / "inside.onnx", FORMS[form])
    proto = onnx.load(path)  # noqa: TID251 - as another tool writes it
    onnx.save(  # noqa: TID251
        proto, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    loaded = sources.load(str(tmp_path / "net.onnx"))
    cleaned, _ = run_pass(Clean(optional=True), loaded.model)
    (tmp_path / "out").mkdir()
    graph_file.write(cleaned, tmp_path / "out" / "net.onnx")
    feeds = feeds_of(model, 0)
    for wanted, got in zip(outputs_of(path, feeds), outputs_of(tmp_path / "out" / "net.onnx", feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_names_with_odd_characters(tmp_path: Path) -> None:
    def rename(model: ir.Model) -> None:
        names = {"x": "in put/0:é", "y": "out::模型", "w1": "a.b[0] 'c'", "w2": "weight\nline", "a": "//"}
        values = [*model.graph.inputs, *model.graph.initializers.values()]
        values += [v for node in model.graph for v in node.outputs]
        for value in values:
            new = names[str(value.name)]
            if str(value.name) in model.graph.initializers:
                del model.graph.initializers[str(value.name)]
                value.name = new
                assert value.const_value is not None
                value.const_value.name = new
                model.graph.initializers.add(value)
            value.name = new

    path, model = as_written(tmp_path / "net.onnx", ODD_NAMES, rename)
    loaded = sources.load(str(path))
    assert [spec.name for spec in (*loaded.signature.inputs, *loaded.signature.outputs)] == ["in put/0:é", "out::模型"]
    cleaned, _ = run_pass(Clean(optional=True), loaded.model)
    graph_file.write(cleaned, tmp_path / "out.onnx")
    feeds = feeds_of(model, 0)
    [wanted], [got] = outputs_of(path, feeds), outputs_of(tmp_path / "out.onnx", feeds)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)

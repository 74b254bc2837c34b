# SPDX-License-Identifier: Apache-2.0
"""The comparison of a written file with its source finds what was changed, and accepts what rounding leaves."""

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxpress.contracts.errors import GateFailed
from onnxpress.exporters import graph_file
from onnxpress.exporters.streamed_tensor import Place, StreamedTensor
from onnxpress.pipeline.passes.base import Pass, run_pass
from onnxpress.pipeline.passes.cast import CastPass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.quantize_weights import QuantizeWeights
from onnxpress.pipeline.streamed_check import WrittenWeights

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (int64[n] ids, float[90, 64] e, float[128, 64] up, float[128, 64] straight) => (float[n, 64] y) {
    h = Gather(e, ids)
    t = Transpose<perm = [1, 0]>(up)
    a = MatMul(h, t)
    y = MatMul(a, straight)
}"""

QUANTIZE = QuantizeWeights(minimum_elements=0, gather_bits=8, clip_search=False)


def written(folder: Path, last: Pass) -> tuple[WrittenWeights, dict[str, np.ndarray]]:
    """The model with its weights in a file, pressed; and the weights."""
    model, arrays = ir.from_proto(onnx.parser.parse_model(TEXT)), {}
    for seed, value in enumerate(list(model.graph.inputs)[1:]):
        assert value.shape is not None
        array = np.random.default_rng(seed).standard_normal(value.shape.numpy()).astype(np.float32)
        arrays[str(value.name)] = array
        (folder / f"{value.name}.bin").write_bytes(array.tobytes())
        place = Place(folder / f"{value.name}.bin", 0, ir.DataType.FLOAT, array.shape)
        model.graph.inputs.remove(value)
        value.const_value = StreamedTensor(place, name=value.name)
        model.graph.register_initializer(value)
    source, _ = run_pass(Clean(), model)
    pressed, _ = run_pass(last, source.clone())
    graph_file.write(pressed, folder / "m.onnx", external_from=0)
    return WrittenWeights(folder / "m.onnx", source), arrays


@pytest.mark.parametrize("last", [CastPass(), CastPass(to="bfloat16", storage_only=True)])
def test_cast_weights_are_identical(tmp_path: Path, last: Pass) -> None:
    weights, arrays = written(tmp_path, last)
    assert weights.check().to_json() == {
        "identical": 3,
        "rounded": 0,
        "bytes_read": sum(6 * array.size for array in arrays.values()),
    }
    kind = np.float16 if last.to == "float16" else None  # type: ignore[attr-defined]
    for name, array in arrays.items():
        found = weights.parameter(name)
        assert found is not None
        np.testing.assert_allclose(found, array, rtol=2**-8)
        if kind is not None:
            np.testing.assert_array_equal(found, array.astype(kind).astype(np.float32))


def test_rounded_weights_are_within_half_a_step(tmp_path: Path) -> None:
    weights, arrays = written(tmp_path, QUANTIZE)
    found = weights.check()
    assert (found.identical, found.rounded) == (0, 3)
    assert 0.4 < found.worst_step <= 0.501
    differences = [np.square(weights.parameter(name) - array).sum() for name, array in arrays.items()]  # type: ignore[operator]
    signal = sum(np.square(array).sum() for array in arrays.values())
    assert found.to_json()["sqnr_db"] == pytest.approx(10 * np.log10(signal / sum(differences)), abs=0.01)
    assert found.to_json()["sqnr_db"] > 20


def test_other_parameters_are_not_the_files(tmp_path: Path) -> None:
    weights, _ = written(tmp_path, QUANTIZE)
    assert weights.parameter("bias") is None


@pytest.mark.parametrize(
    ("last", "message"), [(CastPass(), "differs from the source's"), (QUANTIZE, "is not the rounded weight")]
)
def test_a_changed_byte_is_found(tmp_path: Path, last: Pass, message: str) -> None:
    weights, _ = written(tmp_path, last)
    names = ("up.T", "up.T_scale")
    tensor = next(v.const_value for n, v in weights.written.graph.initializers.items() if n in names)
    assert isinstance(tensor, ir.ExternalTensor)
    data = bytearray((tmp_path / "m.onnx_data").read_bytes())
    data[(tensor.offset or 0) + 3] ^= 0x7F
    (tmp_path / "m.onnx_data").write_bytes(data)
    with pytest.raises(GateFailed, match=message):
        weights.check()


def test_a_missing_weight_is_found(tmp_path: Path) -> None:
    weights, _ = written(tmp_path, QUANTIZE)
    del weights.written.graph.initializers["up.T_packed"]
    with pytest.raises(GateFailed, match=r"lacks the weight 'up\.T'"):
        weights.check()

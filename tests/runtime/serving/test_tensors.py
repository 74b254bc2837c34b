# SPDX-License-Identifier: Apache-2.0
"""Tensors to the protocol's JSON or bytes and back."""

import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.runtime.serving.refusal import Refusal
from onnxpress.runtime.serving.settings import Settings
from onnxpress.runtime.serving.tensors import DATATYPES, read_request, write_answer

NUMBERS = [name for name in DATATYPES if name not in ("string", "bfloat16")]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(NUMBERS)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    floats = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    elements = hnp.from_dtype(dtype, **floats)
    return draw(hnp.arrays(dtype, shape, elements=elements))


def signature(array: np.ndarray, name: str = "x") -> Signature:
    spec = TensorSpec(name, array.dtype.name, tuple(None for _ in array.shape))
    return Signature((spec,), (spec,))


@hypothesis.settings(deadline=None)
@given(arrays())
def test_json_keeps_every_value(array: np.ndarray) -> None:
    body, length = write_answer("m", "1", None, {"x": array}, frozenset())
    assert length is None
    tensor = json.loads(body)["outputs"][0]
    found = read_request(json.dumps({"inputs": [tensor]}).encode(), None, signature(array), Settings())
    np.testing.assert_array_equal(found.feeds["x"], array)
    assert found.feeds["x"].dtype == array.dtype
    nested = {**tensor, "data": array.tolist() if array.ndim else [array.item()]}
    again = read_request(json.dumps({"inputs": [nested]}).encode(), None, signature(array), Settings())
    np.testing.assert_array_equal(again.feeds["x"], array)


@hypothesis.settings(deadline=None)
@given(arrays())
def test_bytes_keep_every_value(array: np.ndarray) -> None:
    body, length = write_answer("m", "1", "7", {"x": array}, frozenset({"x"}))
    assert length is not None
    head = json.loads(body[:length])
    assert head["id"] == "7"
    request = json.dumps({"inputs": head["outputs"]}).encode()
    found = read_request(request + body[length:], str(len(request)), signature(array), Settings())
    np.testing.assert_array_equal(found.feeds["x"], array)


KEYS = ("inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "id")
LEAVES = st.none() | st.booleans() | st.floats() | st.text() | st.integers()


def status(request: Any, array: np.ndarray, settings: Settings | None = None) -> int:
    """200, or what a request is refused with."""
    try:
        read_request(json.dumps(request).encode(), None, signature(array), settings or Settings())
    except Refusal as refusal:
        return refusal.status
    return 200


@hypothesis.settings(max_examples=50, deadline=None)
@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner)))
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    for request in (value, {"inputs": value}, {"inputs": [value]}, {"inputs": [{"name": "x", "data": value}]}):
        assert status(request, np.zeros((1, 1), np.float32)) in (400, 413)


def test_strings() -> None:
    spec = TensorSpec("x", "string", ("n",))
    tensor = {"name": "x", "datatype": "BYTES", "shape": [2], "data": ["a", "é\u0000"]}
    found = read_request(json.dumps({"inputs": [tensor]}).encode(), None, Signature((spec,), (spec,)), Settings())
    assert found.feeds["x"].tolist() == ["a", "é\u0000"]
    body, _ = write_answer("m", "1", None, found.feeds, frozenset({"x"}))
    assert json.loads(body)["outputs"] == [tensor]
    tensor = {**tensor, "data": ["a", 1]}
    with pytest.raises(Refusal, match="holds a JSON number"):
        read_request(json.dumps({"inputs": [tensor]}).encode(), None, Signature((spec,), (spec,)), Settings())


def test_more_elements_than_are_taken() -> None:
    array = np.zeros((2, 3), np.float32)
    tensor = json.loads(write_answer("m", "1", None, {"x": array}, frozenset())[0])["outputs"][0]
    assert status({"inputs": [tensor]}, array, Settings(max_elements=6)) == 200
    assert status({"inputs": [tensor]}, array, Settings(max_elements=5)) == 413


def test_a_batch_has_one_size() -> None:
    specs = (TensorSpec("a", "float32", ("batch", 1)), TensorSpec("b", "float32", ("batch",)))
    inputs = [
        {"name": "a", "datatype": "FP32", "shape": [2, 1], "data": [1, 2]},
        {"name": "b", "datatype": "FP32", "shape": [3], "data": [1, 2, 3]},
    ]
    with pytest.raises(Refusal, match="2 and 3 along 'batch'"):
        read_request(json.dumps({"inputs": inputs}).encode(), None, Signature(specs, specs), Settings())


def test_an_output_that_is_not_finite_is_no_json() -> None:
    outputs = {"x": np.array([1, np.nan], np.float32)}
    with pytest.raises(Refusal) as refusal:
        write_answer("m", "1", None, outputs, frozenset())
    assert refusal.value.status == 422
    body, length = write_answer("m", "1", None, outputs, frozenset({"x"}))
    np.testing.assert_array_equal(np.frombuffer(body[length:], "<f4"), outputs["x"])

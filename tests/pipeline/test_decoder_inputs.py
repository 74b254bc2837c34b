# SPDX-License-Identifier: Apache-2.0
"""Calls to compare and to time a decoder with."""

from pathlib import Path

import numpy as np
import pytest

from onnxpress.contracts.decoding import Decoding
from onnxpress.exporters.exported import ExportedModel, SourceInfo
from onnxpress.exporters.graph_file import signature_of, write
from onnxpress.pipeline.decoder_inputs import decoder_feeds, decoding_of, mask_of_output, step_after
from onnxpress.pipeline.inputs import comparison_cases
from onnxpress.pipeline.validate import compare
from onnxpress.runtime.session import Session

from .samples import model_from

DECODER = """
<ir_version: 10, opset_import: ["": 20]>
decoder (
    int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    float[batch, 1, past, 2] "past_key_values.0.key", float[batch, 2] "past_recurrent.1", float[40, 2] w1
) => (float[batch, sequence, 2] logits, float[batch, 1, total, 2] "present.0.key",
      float[batch, 2] "present_recurrent.1")
{
    logits = Gather(w1, input_ids)
    one = Constant <value_ints = [1]> ()
    new = Unsqueeze(logits, one)
    "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", new)
    sum = ReduceSum <keepdims = 0> (logits, one)
    "present_recurrent.1" = Add("past_recurrent.1", sum)
}
"""


def _exported(text: str = DECODER, **changes: object) -> ExportedModel:
    model = model_from(text)
    source = SourceInfo("onnx", "decoder", None, None, None)
    exported = ExportedModel(model=model, signature=signature_of(model), task="text-generation", source=source)
    for name, value in changes.items():
        setattr(exported, name, value)
    return exported


def _decoding(exported: ExportedModel) -> Decoding:
    found = decoding_of(exported)
    assert found is not None
    return found


def test_calls_are_the_first_and_later_ones_in_batches_of_different_lengths() -> None:
    exported = _exported()
    calls = dict(decoder_feeds(exported, _decoding(exported), ()))
    assert list(calls) == [
        "3 x 12 tokens", "3 x 12 tokens, padded right", "3 x 12 tokens, padded left", "1 x 1 token",
        "3 x 1 tokens after 12, padded left", "3 x 3 tokens after 12, padded left",
    ]  # fmt: skip
    right, left = calls["3 x 12 tokens, padded right"], calls["3 x 12 tokens, padded left"]
    assert right["attention_mask"][1].tolist() == [1] * 8 + [0] * 4
    assert left["attention_mask"][1].tolist() == [0] * 6 + [1] * 6
    first, later = calls["1 x 1 token"], calls["3 x 3 tokens after 12, padded left"]
    assert first["past_key_values.0.key"].shape == (1, 1, 0, 2)
    assert later["past_key_values.0.key"].shape == (3, 1, 12, 2)
    assert later["past_recurrent.1"].any()  # a state of zeros would hide that it is not read
    assert later["attention_mask"].shape == (3, 15)


def test_a_graph_agrees_with_itself_on_all_of_them_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    exported = _exported()
    cases = comparison_cases(exported, None)
    write(exported.model, tmp_path / "right.onnx")
    right = Session(tmp_path / "right.onnx").run
    assert compare(right, right, cases).worst("relative_error", lowest=False) == 0.0
    forgetful = _exported()  # which starts again in each call
    node = next(n for n in forgetful.model.graph if n.op_type == "Add")
    node.op_type = "Sub"
    write(forgetful.model, tmp_path / "wrong.onnx")
    parity = compare(right, Session(tmp_path / "wrong.onnx").run, cases)
    assert (parity.outputs["present_recurrent.1"]["relative_error"] or 0) > 0.1
    assert parity.outputs["present.0.key"]["relative_error"] == 0.0


def test_tokens_are_the_texts_own_and_fit_the_longest_sequence() -> None:
    exported = _exported(
        tokenize=lambda texts, *_, **__: {"input_ids": np.array([[len(text) for text in texts] * 2])}, max_length=10
    )
    name, feeds = decoder_feeds(exported, _decoding(exported), ("abc", "", "de"))[0]
    assert name == "3 x 5 tokens"
    assert set(feeds["input_ids"].flatten().tolist()) == {2, 3}


def test_most_calls_are_one_token_after_many() -> None:
    exported = _exported()
    feeds = step_after(exported, _decoding(exported), 30, batch=2)
    assert feeds["input_ids"].shape == (2, 1)
    assert feeds["past_key_values.0.key"].shape == (2, 1, 30, 2)
    assert feeds["past_recurrent.1"].shape == (2, 2)
    assert feeds["attention_mask"].shape == (2, 31)


def test_the_decoder_of_an_encoder_decoder_cannot_be_started_with_tokens_alone() -> None:
    without = DECODER.replace("int64[batch, total] attention_mask,", "")
    assert decoding_of(_exported(without)) is None
    assert decoding_of(_exported()) is not None


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((2, 5, 9), [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),  # logits of all tokens
        ((2, 2, 9), [[1, 1], [1, 1]]),  # of the last two
        ((2, 1, 5, 4), [[[0, 0, 1, 1, 1]], [[1, 1, 1, 1, 1]]]),  # keys
        ((2, 7), None),
        ((2, 30, 3), None),  # the last inputs of a convolution, by channel
        ((2, 3, 4, 4), None),  # a recurrent state
    ],
)
def test_an_output_counts_where_its_tokens_do(shape: tuple[int, ...], counts: list[object] | None) -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    found = mask_of_output(mask, shape)
    assert (None if found is None else found.astype(int).tolist()) == counts

# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders as two graphs: the tokens that transformers' `generate` picks, step by step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from greedy import Arrays, Exported, build, export, relative_error, texts

from onnxpress.contracts.errors import ExportError
from onnxpress.exporters.families.encoder_decoder import (
    ENCODER_MASK,
    STATES,
    STEPS,
    decoding_samples,
    layout_of,
    trace_encoder_decoder,
)

VOCABULARY = 60


def _configuration(name: str) -> Any:
    special = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1, "tie_word_embeddings": False}
    if name == "t5":
        return transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=3, **special
        )
    return transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=40, num_mel_bins=8, bos_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        **special,
    )  # fmt: skip


@dataclass
class Pair:
    """Both graphs of a model, and inputs of its encoder."""

    model: Any
    decoder: Exported
    encoder: Exported
    inputs: Arrays

    def continued(self, steps: int) -> np.ndarray:
        """`steps` tokens by the graphs, from the token that the model begins with."""
        encoded = self.encoder.run(self.inputs)
        batch = len(encoded[STATES])
        fixed = {n: encoded[n.replace("past_key_values", "present")] for n in self.names if ".encoder." in n}
        if ENCODER_MASK in self.names:
            fixed[ENCODER_MASK] = self.inputs["attention_mask"]
        shape = next(spec.shape for spec in self.decoder.graph.graph.inputs if str(spec.name).endswith("decoder.key"))
        assert shape is not None
        empty = np.zeros((batch, shape[1], 0, shape[3]), np.float32)
        own = {n: empty for n in self.names if ".decoder." in n}
        tokens = [np.full((batch, 1), 1)]
        for _ in range(steps):
            outputs = self.decoder.run({"input_ids": tokens[-1], **fixed, **own})
            own = {n: outputs[n.replace("past_key_values", "present")] for n in own}
            tokens.append(outputs["logits"][:, -1].argmax(-1)[:, None])
        return np.concatenate(tokens[1:], axis=1)

    @property
    def names(self) -> list[str]:
        return [str(value.name) for value in self.decoder.graph.graph.inputs]


@pytest.fixture(scope="module")
def pair() -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            auto_class = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForSpeechSeq2Seq"
            model = build(auto_class, _configuration(name))
            decoder, encoder = trace_encoder_decoder(model, {})
            if name == "t5":
                ids, mask = texts(VOCABULARY, 3, 7)
                inputs: Arrays = {"input_ids": ids, "attention_mask": mask[:, ::-1].copy()}
            else:
                inputs = {"input_features": np.random.default_rng(0).standard_normal((3, 8, 20)).astype(np.float32)}
            made[name] = Pair(model, export(model, decoder), export(model, encoder), inputs)
        return made[name]

    return get


both = pytest.mark.parametrize("name", ["t5", "whisper"])


@both
def test_twenty_tokens_are_those_of_generate(pair: Callable[[str], Pair], name: str) -> None:
    subject = pair(name)
    got = subject.continued(20)
    with torch.no_grad():
        expected = subject.model.generate(
            **{n: torch.from_numpy(array) for n, array in subject.inputs.items()}, max_new_tokens=20, do_sample=False
        )[:, -20:].numpy()
    assert np.array_equal(got, expected)
    assert len(np.unique(got)) > 2


@both
def test_both_graphs_agree_with_the_original_over_the_steps_of_a_sample(pair: Callable[[str], Pair], name: str) -> None:
    subject = pair(name)
    expected, got = subject.encoder.original(subject.inputs), subject.encoder.run(subject.inputs)
    for output in subject.encoder.trace.outputs:
        assert relative_error(expected[output], got[output]) < 1e-5
    calls = decoding_samples(subject.decoder.trace, subject.encoder.trace, subject.inputs)
    lengths = [call["input_ids"].shape[1] for call in calls]
    assert lengths == [1] * (STEPS - 1) + [3]
    assert [call[_own(subject)].shape[2] for call in calls] == list(range(STEPS))
    for call in calls:
        expected, got = subject.decoder.original(call), subject.decoder.run(call)
        for output in subject.decoder.trace.outputs:
            assert relative_error(expected[output], got[output]) < 1e-5


def _own(subject: Pair) -> str:
    return next(name for name in subject.names if name.endswith(".decoder.key"))


def test_padding_in_the_encoder_changes_nothing(pair: Callable[[str], Pair]) -> None:
    subject = pair("t5")
    row = {name: array[2:] for name, array in subject.inputs.items()}  # two of seven tokens are padding
    assert row["attention_mask"][0].tolist() == [1] * 5 + [0] * 2
    other = {**row, "input_ids": row["input_ids"].copy()}
    other["input_ids"][0, 5:] = 9
    short = {name: array[:, :5] for name, array in row.items()}
    tokens = [
        Pair(subject.model, subject.decoder, subject.encoder, inputs).continued(8) for inputs in (row, other, short)
    ]
    assert np.array_equal(tokens[0], tokens[1])
    assert np.array_equal(tokens[0], tokens[2])


def test_names_tell_the_two_caches_apart(pair: Callable[[str], Pair]) -> None:
    subject = pair("t5")
    assert subject.names == [
        "input_ids", "encoder_attention_mask", "past_key_values.0.decoder.key", "past_key_values.0.decoder.value",
        "past_key_values.0.encoder.key", "past_key_values.0.encoder.value",
    ]  # fmt: skip
    outputs = [value.name for value in subject.decoder.graph.graph.outputs]
    assert outputs == ["logits", "present.0.decoder.key", "present.0.decoder.value"]
    outputs = [value.name for value in subject.encoder.graph.graph.outputs]
    assert outputs == [STATES, "present.0.encoder.key", "present.0.encoder.value"]


def test_neither_graph_holds_the_others_weights(pair: Callable[[str], Pair]) -> None:
    subject = pair("t5")
    decoder = {str(name) for name in subject.decoder.graph.graph.initializers}
    encoder = {str(name) for name in subject.encoder.graph.graph.initializers}
    assert not [name for name in decoder if name.startswith("encoder.block")]
    assert not [name for name in encoder if name.startswith("decoder.block.0.layer.0") or name.startswith("lm_head")]
    crossing = [name for name in encoder if "EncDecAttention" in name]
    assert crossing  # the decoder's keys and values of what the encoder read are computed once, by the encoder
    assert not set(crossing) & decoder


def test_a_decoder_may_look_for_more_than_states_in_what_the_encoder_left() -> None:
    """Moonshine reads a mask of the encoder's own; there is none where its input has none."""
    config = transformers.MoonshineConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2, decoder_num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    model = build("AutoModelForSpeechSeq2Seq", config)
    decoder, encoder = trace_encoder_decoder(model, {})
    sound = {name: tensor.numpy() for name, tensor in encoder.examples.items()}
    calls = decoding_samples(decoder, encoder, sound)
    chosen = np.concatenate([call["input_ids"][:, :1] for call in calls[1:]], axis=1)
    model.generation_config.decoder_start_token_id = int(calls[0]["input_ids"][0, 0])
    with torch.no_grad():
        expected = model.generate(**encoder.examples, max_new_tokens=STEPS - 1, do_sample=False)
    assert np.array_equal(chosen, expected[:, 1:].numpy())


def test_a_model_with_one_cache_is_no_encoder_decoder() -> None:
    model = build("AutoModelForSeq2SeqLM", _configuration("t5"))
    own = model.forward

    @functools.wraps(own)
    def forward(**inputs: Any) -> Any:
        result = own(**inputs)
        result.past_key_values = transformers.DynamicCache()
        return result

    model.forward = forward
    with pytest.raises(ExportError, match="T5ForConditionalGeneration keeps no pair of caches"):
        layout_of(model, {})

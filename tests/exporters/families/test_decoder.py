# SPDX-License-Identifier: Apache-2.0
"""Causal language models as one graph: the tokens that transformers' `generate` picks, and what is asked for alone."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from greedy import Exported, build, continued, export, generated, relative_error, texts

from onnxpress.contracts.decoding import Decoding
from onnxpress.contracts.errors import ExportError, InputError
from onnxpress.exporters.dynamo import export_module
from onnxpress.exporters.families.decoder import Decoder, StatefulDecoder, layout_of, trace_cached, trace_decoder

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
STORIES = ASSETS / "stories260K" / "derived" / "hf"
VOCABULARY = 60


def _configuration(name: str) -> Any:
    untied = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}  # tied, it would repeat the last token
    sizes: dict[str, Any] = {**untied, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    if name == "gpt2":
        return transformers.GPT2Config(**untied, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    if name == "mixtral":  # a window shorter than the text, experts, and two heads for one of keys
        return transformers.MixtralConfig(
            **sizes, **heads, sliding_window=4, num_local_experts=3, num_experts_per_tok=2, head_dim=4
        )
    return transformers.MambaConfig(**sizes, state_size=4, expand=2, time_step_rank=3)


@pytest.fixture(scope="module")
def subject() -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            model = build("AutoModelForCausalLM", _configuration(name))
            made[name] = export(model, trace_decoder(model))
        return made[name]

    return get


every_kind = pytest.mark.parametrize("name", ["gpt2", "mixtral", "mamba"])


@every_kind
def test_the_tokens_are_those_of_generate_in_a_batch_with_padding_on_the_left(
    subject: Callable[[str], Exported], name: str
) -> None:
    exported = subject(name)
    ids, mask = texts(VOCABULARY, 3, 9)
    got = continued(exported.run, exported.decoding, ids, mask, 14)
    assert np.array_equal(got, generated(exported.model, ids, mask, 14))
    assert len(np.unique(got)) > 3  # a model that says one thing only would prove little


@every_kind
def test_a_text_in_two_calls_leaves_what_it_leaves_in_one(subject: Callable[[str], Exported], name: str) -> None:
    """Mamba as transformers has it does not: of several tokens after a cache it forgets the cache."""
    run, decoding = subject(name).run, subject(name).decoding
    ids, mask = texts(VOCABULARY, 2, 8)
    whole = run(decoding.feeds(ids, mask))
    first = run(decoding.feeds(ids[:, :3], mask[:, :3]))
    second = run(decoding.feeds(ids[:, 3:], mask, decoding.next_cache(first)))
    assert relative_error(whole["logits"][:, 3:], second["logits"]) < 1e-5
    for output in decoding.present.values():
        assert relative_error(whole[output], second[output], mask) < 1e-5


@every_kind
def test_only_the_logits_that_are_asked_for_come_out(subject: Callable[[str], Exported], name: str) -> None:
    run, decoding = subject(name).run, subject(name).decoding
    ids, mask = texts(VOCABULARY, 2, 5)
    every = run(decoding.feeds(ids, mask))["logits"]
    assert every.shape == (2, 5, VOCABULARY)
    for keep in (1, 3, 5, 9):
        kept = run(decoding.feeds(ids, mask, keep=keep))["logits"]
        assert np.allclose(kept, every[:, -keep:], atol=1e-5)


@every_kind
@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 1), (3, 0, 4), (2, 5, 1), (1, 7, 3)])
def test_every_size_agrees_with_the_original(
    subject: Callable[[str], Exported], name: str, batch: int, past: int, new: int
) -> None:
    exported = subject(name)
    decoding, (ids, mask) = exported.decoding, texts(VOCABULARY, batch, past + new)
    cache = decoding.next_cache(exported.original(decoding.feeds(ids[:, :past], mask[:, :past]))) if past else None
    feeds = decoding.feeds(ids[:, past:], mask, cache)
    expected, got = exported.original(feeds), exported.run(feeds)
    for output in exported.trace.outputs:
        assert relative_error(expected[output], got[output], mask) < 1e-5


def test_names_and_shapes_are_the_ecosystems(subject: Callable[[str], Exported]) -> None:
    inputs = {spec.name: spec for spec in subject("mixtral").graph.graph.inputs}
    assert list(inputs) == [
        "input_ids", "attention_mask", "position_ids", "num_logits_to_keep",
        "past_key_values.0.key", "past_key_values.0.value", "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert [str(dim) for dim in inputs["past_key_values.0.key"].shape or ()] == ["batch", "2", "past_sequence", "4"]
    assert not list(inputs["num_logits_to_keep"].shape or ())
    outputs = [output.name for output in subject("mixtral").graph.graph.outputs]
    assert outputs == ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    states = [value.name for value in subject("mamba").graph.graph.inputs][-4:]
    assert states == ["past_conv.0", "past_recurrent.0", "past_conv.1", "past_recurrent.1"]


def test_a_recurrence_is_one_scan_a_layer(subject: Callable[[str], Exported]) -> None:
    operators = [node.op_type for node in subject("mamba").graph.graph]
    assert operators.count("Scan") == 2
    assert "Scan" not in [node.op_type for node in subject("gpt2").graph.graph]


def test_a_mask_over_all_tokens_serves_a_model_that_keeps_states_only(subject: Callable[[str], Exported]) -> None:
    run, decoding = subject("mamba").run, subject("mamba").decoding
    ids, mask = texts(VOCABULARY, 2, 6)
    cache = decoding.next_cache(run(decoding.feeds(ids[:, :4], mask[:, :4])))
    long, short = decoding.feeds(ids[:, 4:], mask, cache), decoding.feeds(ids[:, 4:], mask[:, 4:], cache)
    assert long["attention_mask"].shape != short["attention_mask"].shape
    assert np.array_equal(run(long)["logits"], run(short)["logits"])


def test_the_original_takes_tokens_one_by_one_where_it_would_forget_its_state() -> None:
    mamba = build("AutoModelForCausalLM", _configuration("mamba"))
    layout = layout_of(mamba)
    assert layout is not None
    original = StatefulDecoder(mamba, layout)
    assert not original.continues
    ids, mask = (torch.from_numpy(array) for array in texts(VOCABULARY, 2, 7))
    start = [torch.zeros(2, *spec.shape[1:]) for spec in layout.caches]  # type: ignore[arg-type]
    all_of_them = torch.tensor(0)
    whole, *states = original(ids, mask, all_of_them, *start)
    _, *before = original(ids[:, :4], mask[:, :4], all_of_them, *start)
    kept = [tensor.clone() for tensor in before]
    later, *after = original(ids[:, 4:], mask, all_of_them, *before)
    assert torch.allclose(whole[:, 4:], later, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))  # what comes in stays as it is


def test_a_model_without_a_cache_has_nothing_to_go_on_from() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = build("AutoModelForCausalLM", config)
    assert trace_cached(model) is None
    with pytest.raises(ExportError, match="returns no cache") as refused:
        trace_decoder(model)
    assert "export.cache=false" in (refused.value.next_step or "")


def test_a_model_that_fails_is_named_with_its_own_error() -> None:
    model = build("AutoModelForCausalLM", _configuration("gpt2"))
    model.transformer.h[0].forward = lambda *_, **__: 1 / 0
    with pytest.raises(InputError, match=r"GPT2LMHeadModel fails in PyTorch already.*ZeroDivisionError"):
        layout_of(model)


def test_a_layer_with_a_window_keeps_every_token() -> None:
    config = _configuration("mixtral")
    layout = layout_of(build("AutoModelForCausalLM", config))
    assert layout is not None
    assert layout.grows
    assert not layout.has_states
    assert {spec.shape for spec in layout.caches} == {("batch", 2, "past_sequence", 4)}
    assert isinstance(trace_decoder(build("AutoModelForCausalLM", config)).reference, Decoder)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no checkpoint under {STORIES}")
def test_stories260k_tells_the_story_that_generate_tells(tmp_path: Path) -> None:
    from onnxpress.exporters.settings import ExportSettings
    from onnxpress.exporters.transformers_source import export_folder

    exported = export_folder(STORIES, "stories260K", "text-generation", ExportSettings())
    decoding = Decoding.of(exported.signature)
    assert decoding is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    from greedy import runner

    run = runner(exported.model)
    for ids in (np.array([[1]]), np.array([[1, 403, 407, 261, 378]])):
        got = continued(run, decoding, ids, np.ones_like(ids), 64)
        assert np.array_equal(got, generated(model, ids, np.ones_like(ids), 64))


class _Branching(torch.nn.Module):
    """Computes something else for more than 20 tokens."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.model = SimpleNamespace(config=transformers.LlamaConfig(max_position_embeddings=longest))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * 2 if x.shape[1] > 20 else x + 1,)


def test_a_branch_beyond_the_longest_text_is_none() -> None:
    def graph(longest: int) -> None:
        axes = {"x": {0: "batch", 1: "sequence"}}
        inputs = {"x": torch.ones(2, 5)}
        export_module(_Branching(longest).eval(), inputs, output_names=["y"], dynamic_axes=axes)

    graph(20)
    with pytest.raises(ExportError, match="takes another branch where 'sequence'"):
        graph(21)

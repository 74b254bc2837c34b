# SPDX-License-Identifier: Apache-2.0
"""Texts go on as transformers' `generate` has them go on, whatever way their tokens are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VOCABULARY, Language, sequences
from writing_bundles import seal, spelling_bundle

from onnxpress.contracts.decoding import Decoding
from onnxpress.contracts.errors import InputError
from onnxpress.contracts.signature import TensorSpec
from onnxpress.runtime.generation import Generator, Sampling
from onnxpress.runtime.generation.chunks import Cancellation
from onnxpress.runtime.generation.padding import Padded
from onnxpress.runtime.generation.steps import BoundSteps, CopiedSteps, SharedSteps, WholeSteps
from onnxpress.runtime.onnxruntime_engine import OnnxRuntimeEngine, _DeviceRun

ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[4] / "shared" / "assets"))
STORIES = ASSETS / "stories260K" / "derived" / "hf"
LENGTHS = (5, 2, 8)


def generated(model: Any, prompts: list[list[int]], steps: int, **more: Any) -> list[list[int]]:
    """transformers' new tokens of each prompt, padded on the left, without what follows an end token."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        result = model.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **more)
    eos = more.get("eos_token_id")
    rows = result[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def continued(generator: Generator, prompts: list[list[int]], steps: int, **more: Any) -> list[list[int]]:
    sampling = Sampling(max_new_tokens=steps, **more)
    return [list(text.tokens) for text in generator.generate(prompts, sampling)]


every_kind = pytest.mark.parametrize("name", ["llama", "llama-shared", "gpt2", "mamba"])


@every_kind
def test_a_batch_of_several_lengths_goes_on_as_generate_has_it(language: Callable[[str], Language], name: str) -> None:
    subject, prompts = language(name), sequences(3, LENGTHS)
    got = continued(subject.generator(), prompts, 16)
    assert got == generated(subject.model, prompts, 16, eos_token_id=None)
    assert len({token for row in got for token in row}) > 3  # a model that says one thing only would prove little


@every_kind
def test_rows_end_by_themselves(language: Callable[[str], Language], name: str) -> None:
    """The end token is one that some rows write early and others late or never."""
    subject, prompts = language(name), sequences(3, LENGTHS)
    free = generated(subject.model, prompts, 12, eos_token_id=None)
    eos = free[0][2]
    expected = generated(subject.model, prompts, 12, eos_token_id=eos)
    texts = subject.generator().generate(prompts, Sampling(max_new_tokens=12, eos=(eos,)))
    assert [list(text.tokens) for text in texts] == expected
    assert [text.finish for text in texts] == ["eos" if row[-1] == eos else "length" for row in expected]
    assert len(expected[0]) <= 3


@every_kind
def test_penalties_look_at_the_prompt_and_not_at_padding(language: Callable[[str], Language], name: str) -> None:
    subject, prompts = language(name), sequences(3, LENGTHS)
    rules = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    assert continued(subject.generator(), prompts, 12, **rules) == generated(
        subject.model, prompts, 12, eos_token_id=None, **rules
    )


@every_kind
def test_the_ways_of_keeping_a_cache_agree(language: Callable[[str], Language], name: str) -> None:
    """Bound and shared caches against numpy arrays that go in and out, also when rows change places."""
    graphs = language(name).generator()._graphs
    decoding = Decoding.of(graphs.decoder.signature)
    assert decoding is not None
    prompts = sequences(3, LENGTHS)

    def batch() -> Padded:
        return Padded(prompts, 8, decoding.inputs, left=not graphs.shared, whole_mask=name != "mamba")

    kind = SharedSteps if name == "llama-shared" else BoundSteps
    bound = graphs.begin(prompts, 8, 0, None, Cancellation())
    assert type(bound) is kind
    copied = CopiedSteps(graphs.decoder, decoding, batch())
    random = np.random.default_rng(0)
    np.testing.assert_allclose(bound.start(), copied.start(), rtol=1e-5, atol=1e-6)
    for step in range(6):
        tokens = random.integers(3, VOCABULARY, 3)
        if step == 3:
            for steps in (bound, copied):
                steps.follow(np.array([2, 0, 0]))
        np.testing.assert_allclose(bound.step(tokens), copied.step(tokens), rtol=1e-4, atol=1e-5)
    assert bound.graph_seconds > 0


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_openvino_writes_the_same(language: Callable[[str], Language], name: str) -> None:
    pytest.importorskip("openvino")
    subject, prompts = language(name), sequences(3, LENGTHS)
    generator = Generator(subject.folder, provider="openvino", threads=1)
    assert type(generator._graphs.begin(prompts, 1, 0, None, Cancellation())) is CopiedSteps
    assert continued(generator, prompts, 12) == continued(subject.generator(), prompts, 12)


def test_the_number_of_logits_is_a_scalar_on_bound_buffers_too(language: Callable[[str], Language]) -> None:
    """What runs on a GPU binds every input; a scalar that became [1] on the way would be refused."""
    session = language("gpt2").generator()._graphs.decoder
    decoding = Decoding.of(session.signature)
    assert decoding is not None
    assert isinstance(session.engine, OnnxRuntimeEngine)
    feeds = decoding.feeds(np.array([[5, 6, 7]]), keep=1)
    [logits] = _DeviceRun(session.engine.session, "cpu")(["logits"], feeds)
    np.testing.assert_array_equal(logits, session.run(feeds, ["logits"])["logits"])


def test_memory_for_a_shared_cache_is_asked_for_at_once(language: Callable[[str], Language]) -> None:
    graphs = language("llama-shared").generator()._graphs
    with pytest.raises(InputError, match="there is no memory for 1000000000001 tokens in 1 rows"):
        graphs.begin([[5]], 10**12, 0, None, Cancellation())


def test_a_mask_grows_with_a_long_text() -> None:
    """Room without end is not set aside at once."""
    spec = {name: TensorSpec(name, "int64", ("batch", "n")) for name in ("input_ids", "attention_mask")}
    for left in (True, False):
        batch = Padded([[5, 6], [7]], 10**9, spec, left=left)
        batch.first()
        masks = [batch.next(np.array([8, 9]))["attention_mask"] for _ in range(9000)]
        assert masks[-1].shape == (2, 9002)
        assert masks[-1].sum(axis=1).tolist() == [9002, 9001]
        assert masks[-1][1, 0 if left else -1] == 0


def test_the_shared_cache_is_one_buffer_that_is_never_allocated_again(language: Callable[[str], Language]) -> None:
    graphs = language("llama-shared").generator()._graphs
    steps = graphs.begin([[5, 6, 7]], 5, 0, None, Cancellation())
    assert isinstance(steps, SharedSteps)
    places = [buffer.data_ptr() for buffer in steps._buffers]
    steps.start()
    for _ in range(4):
        steps.step(np.array([9]))
    assert [buffer.data_ptr() for buffer in steps._buffers] == places
    assert [value.data_ptr() for value in steps._binding.io.get_outputs()[1:]] == places
    filled = steps._buffers[0].numpy()
    assert filled.shape[2] == 8
    assert filled[:, :, :7].any()
    assert not filled[:, :, 7:].any()


@pytest.mark.parametrize("name", ["llama", "llama-shared", "gpt2"])
def test_a_short_prompt_goes_on_where_a_long_one_has_reached_the_last_position(
    language: Callable[[str], Language], name: str
) -> None:
    """The rows of a batch have different room; what has ended must not run over the table of positions."""
    generator = language(name).generator()
    assert generator.max_length is not None
    prompts = sequences(2, (generator.max_length - 2, 3))
    texts = generator.generate(prompts, Sampling(max_new_tokens=generator.max_length))
    assert [len(text.tokens) for text in texts] == [2, generator.max_length - 3]
    assert [text.finish for text in texts] == ["length", "length"]
    assert continued(generator, prompts[1:], generator.max_length)[0] == list(texts[1].tokens)


def test_only_the_last_logits_are_computed(language: Callable[[str], Language]) -> None:
    graphs = language("llama").generator()._graphs
    steps = graphs.begin([[5] * 40], 1, 0, None, Cancellation())
    assert isinstance(steps, BoundSteps)
    steps.start()
    assert steps._binding.io.get_outputs()[0].shape() == [1, 1, VOCABULARY]


def test_sampling_is_repeatable_and_follows_the_seed(language: Callable[[str], Language]) -> None:
    generator, prompts = language("llama").generator(), sequences(2, (4,))
    drawn = {seed: continued(generator, prompts, 12, temperature=1.5, seed=seed) for seed in (1, 2)}
    assert drawn[1] == continued(generator, prompts, 12, temperature=1.5, seed=1)
    assert drawn[1] != drawn[2]
    same = continued(generator, [prompts[0]] * 2, 12, temperature=1.5, seed=1)
    assert same[0] != same[1]  # each row draws for itself
    assert continued(generator, prompts, 12, temperature=1.5, top_k=1) == continued(generator, prompts, 12)


def test_a_closed_stream_ends(language: Callable[[str], Language]) -> None:
    stream = language("llama").generator().stream([5], Sampling(max_new_tokens=50))
    chunks = [next(stream) for _ in range(3)]
    stream.close()
    assert [*stream] == []
    assert stream.usage.new_tokens == len(chunks) == 3


def test_a_running_step_is_interrupted_from_another_thread(language: Callable[[str], Language]) -> None:
    generator = language("llama").generator()
    stream = generator.stream([5], Sampling(max_new_tokens=60))
    next(stream)
    cancellation = stream._cancellation
    inner, reached = cancellation.interrupt_with, threading.Event()

    def interrupted(interrupt: Any) -> None:
        if interrupt is not None and not reached.is_set():
            reached.set()
            other = threading.Thread(target=stream.close)  # while the step is under way
            inner(interrupt)
            other.start()
            other.join()
        else:
            inner(interrupt)

    cancellation.interrupt_with = interrupted  # type: ignore[method-assign]
    assert [*stream] == []
    assert reached.is_set()
    assert stream.usage.new_tokens == 1


def test_streams_of_one_generator_do_not_meet(language: Callable[[str], Language]) -> None:
    generator, prompts = language("llama").generator(), sequences(4, LENGTHS)
    alone = [continued(generator, [prompt], 20)[0] for prompt in prompts]
    found: dict[int, list[int]] = {}

    def work(row: int) -> None:
        found[row] = continued(generator, [prompts[row]], 20)[0]

    threads = [threading.Thread(target=work, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[row] for row in range(4)] == alone


def test_a_model_without_a_cache_reads_the_whole_text_each_time(spelled: Callable[[str], Generator]) -> None:
    generator = spelled("abcdefgh")
    assert isinstance(generator._graphs.begin([[1]], 1, 0, None, Cancellation()), WholeSteps)
    texts = generator.generate(["a", "de", "h"])
    assert [text.text for text in texts] == ["bcdefgh", "fgh", ""]
    assert [text.finish for text in texts] == ["eos"] * 3


def test_text_comes_in_whole_characters(spelled: Callable[[str], Generator]) -> None:
    """Each byte is a token; those of a character come together, when it is complete."""
    generator = spelled("so: 🎉é")
    with generator.stream("s") as stream:
        chunks = [*stream]
    assert [chunk.text for chunk in chunks] == ["o", ":", " ", "", "", "", "🎉", "", "é", ""]
    assert all(len(chunk.tokens) == 1 for chunk in chunks)
    assert [chunk.finish for chunk in chunks] == [None] * 9 + ["eos"]


def test_what_could_become_a_stop_string_waits(spelled: Callable[[str], Generator]) -> None:
    generator = spelled("abcdefgh")
    stream = generator.stream("a", generator.defaults.changed(stop=["cdx", "efg"]))
    assert [chunk.text for chunk in stream] == ["b", "", "", "cd", "", ""]  # "cd" was no "cdx", and "efg" is cut
    assert generator.generate(["a"], generator.defaults.changed(stop="efg"))[0].finish == "stop"
    limited = generator.defaults.changed(stop="efg", max_new_tokens=4)
    assert generator.generate(["a"], limited)[0].text == "bcde"  # what waited is shown at the end
    assert generator.generate(["a"], generator.defaults.changed(stop="hx"))[0].text == "bcdefgh"


def test_usage_says_what_was_done(language: Callable[[str], Language]) -> None:
    stream = language("llama").generator().stream_batch(sequences(2, (4, 2)), Sampling(max_new_tokens=5))
    assert sum(len(chunk.tokens) for chunk in stream) == 10
    usage = stream.usage
    assert (usage.prompt_tokens, usage.new_tokens, usage.steps) == ((4, 2), 10, 4)
    assert usage.prefill_seconds > usage.prefill_graph_seconds > 0
    assert usage.decode_seconds > usage.graph_seconds > 0
    assert usage.decode_rate == 8 / usage.decode_seconds


def test_an_empty_prompt_begins_with_the_token_that_texts_begin_with(language: Callable[[str], Language]) -> None:
    generator = language("gpt2").generator()
    assert generator.tokens([]) == [1]
    assert continued(generator, [[]], 4) == continued(generator, [[1]], 4)


def test_bad_prompts(language: Callable[[str], Language], spelled: Callable[[str], Generator]) -> None:
    generator = language("gpt2").generator()
    for prompt, what in (
        ("text", "has no tokenizer.json"),
        ([5, VOCABULARY], f"there is no token {VOCABULARY}"),
        ([-1], "there is no token -1"),
        ([5] * 32, "the prompt has 32 tokens, and the model takes 31"),
        ({"input_ids": np.ones((1, 2), np.int64)}, "has no tokens|not arrays"),
    ):
        with pytest.raises(InputError, match=what):
            generator.stream(prompt)
    with pytest.raises(InputError, match="there is no prompt"):
        generator.generate([])
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        generator.stream([5], Sampling(stop=("x",)))
    without_bos = spelled("ab")
    with pytest.raises(InputError, match="the prompt is empty"):
        without_bos.stream("")
    with pytest.raises(InputError, match="the prompt has 60 tokens"):
        without_bos.stream("a" * 60)  # and is not cut in silence


def test_what_is_no_language_model(tmp_path: Path, language: Callable[[str], Language]) -> None:
    with pytest.raises(InputError, match="is a model for token-classification, not a language model"):
        Generator(spelling_bundle(tmp_path / "one", "ab", task="token-classification"))
    folder = tmp_path / "decoder"
    folder.mkdir()
    subject = language("bart")
    import shutil

    shutil.copytree(subject.folder, folder, dirs_exist_ok=True)
    manifest = Generator(subject.folder, threads=1).bundle.manifest
    seal(folder, **{name: manifest[name] for name in ("variants", "signature", "task")})
    with pytest.raises(InputError, match="is a decoder without its encoder"):
        Generator(folder)


def test_an_unknown_input_is_named(tmp_path: Path) -> None:
    folder = spelling_bundle(tmp_path / "odd", "ab")
    manifest = Generator(folder, threads=1).bundle.manifest
    manifest["signature"]["inputs"].append({"name": "use_cache_branch", "dtype": "bool", "shape": [1]})
    seal(folder, **{name: manifest[name] for name in ("variants", "signature", "task")})
    with pytest.raises(InputError, match="also reads use_cache_branch"):
        Generator(folder)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no checkpoint under {STORIES}")
def test_stories260k_tells_the_story_that_generate_tells(tmp_path: Path) -> None:
    import transformers
    from conftest import shared, write_bundle

    from onnxpress.exporters.settings import ExportSettings
    from onnxpress.exporters.transformers_source import export_folder

    graph = export_folder(STORIES, "stories260K", "text-generation", ExportSettings()).model
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).eval()
    model.generation_config.pad_token_id = 0
    prompts = [[1], [1, 403, 407, 261, 378]]
    expected = generated(model, prompts, 64, eos_token_id=None)
    for name, part in (("bound", graph), ("shared", shared(graph))):
        folder = tmp_path / name
        folder.mkdir()
        assert continued(Generator(write_bundle(folder, {"model": part}, 512), threads=1), prompts, 64) == expected

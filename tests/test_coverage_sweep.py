# SPDX-License-Identifier: Apache-2.0
"""The coverage sweep: configurations shrink without losing a code path, children keep to limits, the page is true."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coverage import page, results, subject, walk, workers
from benchmarks.coverage.results import DIED, DIFFERS, NOT_BUILT, PASSES, TOO_LARGE, TOO_LONG, Result
from benchmarks.coverage.shrink import HEAD, HEADS, LAYERS, VOCABULARY, WIDTH, shrink, tiny_config
from onnxpress.contracts.tasks import TASKS

FAMILIES = (
    ("bert", "fill-mask"),
    ("gpt2", "text-generation"),
    ("llama", "text-generation"),
    ("qwen2_vl", "image-text-to-text"),
    ("deepseek_v3", "text-generation"),
    ("qwen3_next", "text-generation"),
    ("mamba2", "text-generation"),
    ("t5", "text2text-generation"),
    ("whisper", "automatic-speech-recognition"),
    ("swin", "image-classification"),
    ("resnet", "image-classification"),
    ("detr", "object-detection"),
    ("wav2vec2", "audio-classification"),
    ("clip", "zero-shot-image-classification"),
    ("funnel", "feature-extraction"),
)


@pytest.mark.parametrize(("model_type", "task"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_a_family_shrinks_to_a_model_that_builds(model_type: str, task: str) -> None:
    import torch

    auto_class, _ = walk.classes_of(model_type, TASKS[task])
    config = subject.configure(model_type, TASKS[task])
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert sum(p.numel() for p in model.parameters()) < subject.LARGEST
    # What save_pretrained writes must build the same model again
    again = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        reloaded = auto_class.from_config(again)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in reloaded.named_parameters()}


def test_sizes_are_set_by_what_a_setting_is_called() -> None:
    config = tiny_config("llama")
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (WIDTH, HEADS, HEAD)
    assert (config.num_hidden_layers, config.vocab_size) == (LAYERS, VOCABULARY)
    assert config.num_key_value_heads == HEADS, "as many as heads by default: no grouping"
    assert tiny_config("mistral").num_key_value_heads == 2, "fewer than heads by default: grouped"
    assert tiny_config("mistral").sliding_window < 12, "the window must show at the lengths that are compared"


def test_one_layer_of_each_kind_stays() -> None:
    small = tiny_config("qwen3_next")
    assert sorted(small.layer_types) == ["full_attention", "linear_attention"]
    assert small.num_hidden_layers == len(small.layer_types)
    both = tiny_config("gemma3n_text")
    assert set(both.layer_types) == {"full_attention", "sliding_attention"}
    small = tiny_config("kimi_linear")
    assert {*small.layer_types} == {"linear_attention", "full_attention"}
    assert {*small.mlp_layer_types} == {"dense", "sparse"}
    assert len(small.layer_types) == small.num_hidden_layers == 3


def test_lists_of_layers_point_at_the_layers_that_stay() -> None:
    settings: dict[str, Any] = {
        "num_hidden_layers": 12,
        "layer_types": ["sliding"] * 5 + ["full"] + ["sliding"] * 5 + ["full"],
        "mlp_only_layers": [0],
        "intermediate_size": [1000 + i for i in range(12)],
    }
    small = shrink(settings, "")
    assert small["num_hidden_layers"] == len(small["layer_types"]) == len(small["intermediate_size"])
    assert small["layer_types"][0] == "sliding"
    assert "full" in small["layer_types"]
    assert small["mlp_only_layers"] == [0], "the first layer is one of a kind, and stays the first"


def test_equal_numbers_stay_equal() -> None:
    small = shrink({"d_model": 256, "decoder_in_channels": [256, 256], "num_channels": 3, "stem_channels": [3, 32]}, "")
    assert small["d_model"] == WIDTH
    assert small["decoder_in_channels"] == [WIDTH, WIDTH]
    assert (small["num_channels"], small["stem_channels"]) == (3, [3, 8])


def test_special_tokens_stay_apart_and_inside_the_vocabulary() -> None:
    config = tiny_config("qwen2_vl")
    special = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    assert len(set(special)) == len(special)
    assert all(0 <= token < config.text_config.vocab_size for token in special)


def test_rotary_sections_add_up() -> None:
    config = tiny_config("qwen2_vl").text_config
    assert sum(config.rope_parameters["mrope_section"]) == HEAD // 2


def test_weights_are_drawn_so_that_each_counts() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    torch.nn.init.zeros_(model[0].weight)
    state = subject.draw_weights(model).state_dict()
    constant = [name for name, tensor in state.items() if tensor.is_floating_point() and float(tensor.std()) == 0]
    assert not constant


def test_each_model_type_comes_once_before_any_comes_twice() -> None:
    listed = walk.trials()
    assert len(listed) == len(set(listed))
    kinds = {model_type for model_type, _ in listed}
    first = listed[: len(kinds)]
    assert {model_type for model_type, _ in first} == kinds
    assert ("gpt2", "text-generation") in first, "a cache says more than a vector"
    assert ("bert", "feature-extraction") in listed


def test_results_are_read_back_past_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results.append(file, _result("bert", state=DIFFERS))
    with file.open("a") as lines:
        lines.write('{"model_type": "gpt2", "ta')
    results.append(file, _result("bert", state=PASSES))
    assert [r.state for r in results.read(file).values()] == [PASSES]


def _answers(model_type: str, task: str, folder: Path) -> Result:
    """What a child does in these tests; the model type says what."""
    if model_type == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if model_type == "spins":
        while True:
            pass
    if model_type == "waits":
        time.sleep(60)
    if model_type == "grows":
        held = []
        while True:
            held.append(bytearray(64 << 20))
    folder.mkdir()
    (folder / "large").write_bytes(b"0")
    return Result(model_type, task, PASSES)


def test_a_child_that_dies_or_exceeds_a_limit_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path))
    limits = workers.Limits(seconds=0.5, bytes=1 << 30)
    trials = [(name, "task") for name in ("works", "dies", "spins", "waits", "grows")]
    found = {r.model_type: r for r in workers.run_all(trials, _answers, jobs=2, limits=limits)}
    assert {name: r.state for name, r in found.items() if name != "grows"} == {
        "works": PASSES, "dies": DIED, "spins": TOO_LONG, "waits": TOO_LONG,
    }  # fmt: skip
    assert found["grows"].state in (TOO_LARGE, TOO_LONG), "whichever limit it meets first"
    assert found["dies"].reason == "killed by signal 9"
    assert not list(tmp_path.iterdir()), "nothing is left of a child"


def test_the_page_counts_types_and_lists_only_what_ran() -> None:
    found = [
        _result("bert", state=PASSES, error=2e-7, backend="dynamo"),
        _result("bert", task="fill-mask", state=DIFFERS, reason="output 'a|b' <differs>"),
        _result("gpt2", state=PASSES, error=1e-6, backend="torchscript"),
        _result("dinat", state=NOT_BUILT, reason="needs natten"),
    ]
    text = page.page(found)
    assert "**2 of 3 model types pass for at least one task**; 2 of 4 pairs" in text
    assert "| feature-extraction | 2 | 0 | 1 | 1e-06 |" in text
    assert "bert, gpt2 (torchscript)." in text
    assert "| bert | differs | output 'a\\|b' &lt;differs&gt; |" in text
    assert "| dinat | feature-extraction | needs natten |" in text
    assert "llama" not in text
    assert page.summary(found).endswith("2 of 3 model types pass")


def _result(model_type: str, *, task: str = "feature-extraction", state: str, **fields: Any) -> Result:
    return Result(model_type, task, state, versions={"torch": "2.13"}, **fields)

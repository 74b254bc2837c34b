# SPDX-License-Identifier: Apache-2.0
"""Which inputs a model is found to need, without exporting anything."""

from typing import Any

import pytest
import torch
import transformers
from tiny_configs import CONVOLUTIONS, TEXT, VISION, WHISPER, tiny

from onnxpress.contracts.errors import ExportError, InputError
from onnxpress.contracts.tasks import TASKS
from onnxpress.exporters.families.examples import Examples, inputs_for


def found(model: Any, task: str, **settings: Any) -> dict[str, tuple[list[int], dict[int, str]]]:
    examples = inputs_for(model, TASKS[task].inputs, Examples(model, settings.pop("preprocessor", {}), **settings))
    return {name: (list(e.tensor.shape), e.axes) for name, e in examples.items()}


def test_text() -> None:
    model = tiny("bert", "text-classification", **TEXT)
    axes = {0: "batch", 1: "sequence"}
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert found(model, "text-classification") == {name: ([2, 7], axes) for name in names}


def test_several_texts_to_choose_from() -> None:
    model = tiny("bert", "multiple-choice", **TEXT)
    shape, axes = found(model, "multiple-choice", choices=3)["input_ids"]
    assert shape == [2, 3, 7]
    assert axes == {0: "batch", 1: "choices", 2: "sequence"}


def test_an_image_has_the_size_of_the_configuration() -> None:
    model = tiny("vit", "image-classification", **VISION)
    assert found(model, "image-classification") == {"pixel_values": ([2, 3, 16, 16], {0: "batch"})}


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({}, [224, 224]),
        ({"size": {"height": 40, "width": 48}}, [40, 48]),
        ({"size": {"shortest_edge": 70}, "crop_size": {"height": 64, "width": 64}}, [64, 64]),
        ({"size": 50}, [50, 50]),
    ],
)
def test_an_image_has_the_size_of_its_processor(preprocessor: dict[str, Any], size: list[int]) -> None:
    model = tiny("resnet", "image-classification", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    shape, _ = found(model, "image-classification", preprocessor=preprocessor)["pixel_values"]
    assert shape == [2, 3, *size]


def test_sound_is_long_enough_for_the_convolutions() -> None:
    model = tiny("wav2vec2", "automatic-speech-recognition", **TEXT, **CONVOLUTIONS)
    assert found(model, "automatic-speech-recognition") == {"input_values": ([2, 8000], {0: "batch", 1: "samples"})}


def test_a_spectrogram_of_fixed_size() -> None:
    model = tiny("audio-spectrogram-transformer", "audio-classification", **VISION, max_length=32, num_mel_bins=16)
    assert found(model, "audio-classification") == {"input_values": ([2, 32, 16], {0: "batch"})}


def test_an_encoder_decoder_also_wants_tokens_to_go_on_from() -> None:
    model = tiny("whisper", "automatic-speech-recognition", **WHISPER)
    examples = found(model, "automatic-speech-recognition")
    assert examples["input_features"] == ([2, 8, 40], {0: "batch"})
    assert list(examples) == ["input_features", "decoder_input_ids"]


def test_image_and_text() -> None:
    settings = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION}
    model = tiny("clip", "zero-shot-image-classification", **settings)
    assert list(found(model, "zero-shot-image-classification")) == ["input_ids", "attention_mask", "pixel_values"]


def test_as_many_image_tokens_as_the_image_has_features() -> None:
    text = {**TEXT, "model_type": "llama", "num_key_value_heads": 2}
    vision = {**VISION, "model_type": "clip_vision_model"}
    model = tiny("llava", "image-text-to-text", text_config=text, vision_config=vision, image_token_id=59)
    make = Examples(model, {})
    ids = inputs_for(model, TASKS["image-text-to-text"].inputs, make)["input_ids"].tensor
    assert ids.shape[1] == make.length + 4  # an image of 16 x 16 in patches of 8
    assert ((ids == 59).sum(dim=1) == 4).all()


def test_no_token_that_the_model_treats_apart() -> None:
    model = tiny("bert", "text-classification", **{**TEXT, "vocab_size": 4}, pad_token_id=0, eos_token_id=2)
    ids = Examples(model).tokens((50, 4), model.config)
    assert set(ids.unique().tolist()) == {1, 3}


def test_same_seed_same_numbers() -> None:
    model = tiny("vit", "image-classification", **VISION)
    first, again, other = (Examples(model, seed=seed).make("pixel_values") for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.tensor, again.tensor)
    assert not torch.equal(first.tensor, other.tensor)


class Unusual(torch.nn.Module):
    main_input_name = "states"
    config = transformers.BertConfig(**TEXT)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


class Failing(Unusual):
    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        raise ValueError("not today")


def test_an_input_that_is_not_known_is_named() -> None:
    model = Unusual()
    with pytest.raises(ExportError, match="Unusual reads 'states', for which no example can be made") as caught:
        inputs_for(model, (), Examples(model))
    assert "factory" in caught.value.next_step


def test_a_model_that_fails_in_pytorch() -> None:
    model = Failing()
    with pytest.raises(InputError, match=r"Failing fails in PyTorch already: ValueError: not today \(test_examples.py"):
        inputs_for(model, (), Examples(model))

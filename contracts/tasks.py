# SPDX-License-Identifier: Apache-2.0
"""The tasks that onnxpress can export and evaluate, under the ecosystem's names."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError, did_you_mean


@dataclass(frozen=True)
class Task:
    """What a task means for the exporter and for the evaluation.

    Attributes:
        name: The name, as the hub and optimum write it.
        auto_classes: The transformers classes that load a model for it; the first that knows the model is taken.
        outputs: Output names in the graph, in order; none means everything that the model returns.
        inputs: Inputs that the task implies, beside the model's main one.
        generates: Whether its model is called token by token, with a cache.
    """

    name: str
    auto_classes: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    generates: bool = False


FEATURES = "feature-extraction"
"""The task whose outputs are vectors, not choices."""

GENERATION = "text-generation"
TEXT_TO_TEXT = "text2text-generation"
SPEECH = "automatic-speech-recognition"

_LOGITS = ("logits",)
_IMAGE_AND_TEXT = ("input_ids", "pixel_values")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(FEATURES, ("AutoModel",), ("last_hidden_state",)),
        Task("text-classification", ("AutoModelForSequenceClassification",), _LOGITS),
        Task("token-classification", ("AutoModelForTokenClassification",), _LOGITS),
        Task("fill-mask", ("AutoModelForMaskedLM",), _LOGITS),
        Task("question-answering", ("AutoModelForQuestionAnswering",), ("start_logits", "end_logits")),
        Task("multiple-choice", ("AutoModelForMultipleChoice",), _LOGITS),
        Task(GENERATION, ("AutoModelForCausalLM",), _LOGITS, generates=True),
        Task(TEXT_TO_TEXT, ("AutoModelForSeq2SeqLM",), _LOGITS, generates=True),
        Task("image-classification", ("AutoModelForImageClassification",), _LOGITS),
        Task("semantic-segmentation", ("AutoModelForSemanticSegmentation",), _LOGITS),
        Task(
            "image-segmentation",
            ("AutoModelForImageSegmentation", "AutoModelForUniversalSegmentation", "AutoModelForInstanceSegmentation"),
        ),
        Task("object-detection", ("AutoModelForObjectDetection",), ("logits", "pred_boxes")),
        Task("depth-estimation", ("AutoModelForDepthEstimation",), ("predicted_depth",)),
        Task("image-to-image", ("AutoModelForImageToImage",), ("reconstruction",)),
        Task("keypoint-detection", ("AutoModelForKeypointDetection",)),
        Task("video-classification", ("AutoModelForVideoClassification",), _LOGITS),
        Task("audio-classification", ("AutoModelForAudioClassification",), _LOGITS),
        Task("audio-frame-classification", ("AutoModelForAudioFrameClassification",), _LOGITS),
        Task("audio-xvector", ("AutoModelForAudioXVector",), ("logits", "embeddings")),
        Task(SPEECH, ("AutoModelForCTC", "AutoModelForSpeechSeq2Seq"), _LOGITS, generates=True),
        Task("zero-shot-image-classification", ("AutoModelForZeroShotImageClassification",), inputs=_IMAGE_AND_TEXT),
        Task("zero-shot-object-detection", ("AutoModelForZeroShotObjectDetection",), inputs=_IMAGE_AND_TEXT),
        Task("visual-question-answering", ("AutoModelForVisualQuestionAnswering",), inputs=_IMAGE_AND_TEXT),
        Task(
            "document-question-answering",
            ("AutoModelForDocumentQuestionAnswering",),
            ("start_logits", "end_logits"),
            inputs=("input_ids", "bbox"),
        ),
        Task("image-text-to-text", ("AutoModelForImageTextToText",), _LOGITS, _IMAGE_AND_TEXT, generates=True),
        Task("image-to-text", ("AutoModelForImageTextToText",), _LOGITS, generates=True),
        Task("time-series-forecasting", ("AutoModelForTimeSeriesPrediction",)),
    )
}

GENERIC = "generic"
"""The task of a plain `nn.Module` or an `.onnx` file about which nothing more is known."""


def task_named(name: str) -> Task:
    """Return the task, or raise InputError with a suggestion."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task '{name}'", next_step=did_you_mean(name, TASKS)) from None

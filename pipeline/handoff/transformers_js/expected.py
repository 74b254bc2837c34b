# SPDX-License-Identifier: Apache-2.0
"""What Python answers where transformers.js is asked for more than tensors: greedy tokens, an image's scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ....contracts.decoding import Decoding
from ....contracts.tasks import GENERATION
from ....runtime.opened import Bundle

PROMPT, TOKENS = "Once upon a time", 16
IMAGE = "image.rgb"


def generation(bundle: Bundle) -> list[dict[str, Any]]:
    """A prompt's ids, the greedy tokens after it, and by how much each led the next best."""
    decoding = Decoding.of(bundle.signature)
    if bundle.task != GENERATION or decoding is None or bundle.encoder is None:
        return []
    session, ids = bundle.session(threads=1), bundle.encoder.ids(PROMPT)
    step, cache = np.asarray([ids], np.int64), None
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < TOKENS and not (tokens and tokens[-1] in _ends(bundle)):
        answers = session.run(decoding.feeds(step, None, cache, keep=1))
        second, first = np.sort(answers["logits"][0, -1].astype(np.float64))[-2:]
        tokens.append(int(answers["logits"][0, -1].argmax()))
        margins.append(float(first - second))
        step, cache = np.asarray([[tokens[-1]]], np.int64), decoding.next_cache(answers)
    tolerance = 2 * bundle.tolerance("logits")
    return [{"prompt": PROMPT, "ids": ids, "tokens": tokens, "margins": margins, "tolerance": tolerance}]


def image(bundle: Bundle, folder: Path) -> list[dict[str, Any]]:
    """An image of the model's own size, so that nothing is resized: its bytes go to `folder`, its numbers come back.

    Empty for a model whose processor does more than scale and normalize.
    """
    file = bundle.folder / "preprocessor_config.json"
    inputs = {spec.name: spec.shape for spec in bundle.signature.inputs}
    shape = inputs.get("pixel_values", ())
    if bundle.task != "image-classification" or len(inputs) != 1 or not file.is_file() or not bundle.labels:
        return []
    settings = json.loads(file.read_text("utf-8"))
    if len(shape) != 4 or shape[1] != 3:
        return []
    height, width = shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return []
    if settings.get("size") != {"height": height, "width": width} or settings.get("do_center_crop"):
        return []
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    (folder / IMAGE).write_bytes(pixels.tobytes())
    values = _prepared(pixels, settings)
    logits = bundle.session(threads=1).run({"pixel_values": values})["logits"][0].astype(np.float64)
    scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    row = {"file": IMAGE, "width": width, "height": height, "channels": 3, "pixels": values.tolist()}
    return [{**row, "scores": scores.tolist(), "tolerance": bundle.tolerance("logits")}]


def _prepared(pixels: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    values = pixels.astype(np.float32)
    if settings.get("do_rescale", True):
        values = values * np.float32(settings.get("rescale_factor", 1 / 255))
    if settings.get("do_normalize", True):
        values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None], np.float32)


def _ends(bundle: Bundle) -> set[int]:
    ends = bundle.generation_config.get("eos_token_id", bundle.config.get("eos_token_id"))
    return {ends} if isinstance(ends, int) else set(ends or ())

# SPDX-License-Identifier: Apache-2.0
"""What is sent and what has to come back: a classifier of sentences, fed with token ids as tensors.

The texts are SST-2's dev sentences. All servers get the same rows, padded or cut to one length, since not every peer
can join rows of different lengths.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.runtime.opened import Bundle

from ..peers.assets import find

ARTIFACTS = Path(__file__).parents[2] / "artifacts" / "serving"
COMMAND = Path(sys.executable).with_name("onnxpress")
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """Requests of one row with their answers.

    Attributes:
        bundle: Whose model answers.
        rows: Input name to [1, tokens].
        answers: The logits of each, run alone.
        tolerance: How far an answer may be off.
    """

    bundle: Bundle
    rows: Sequence[Feeds]
    answers: Sequence[np.ndarray]
    tolerance: float

    def is_right(self, number: int, logits: Sequence[float]) -> bool:
        """Whether `logits` answer row `number`."""
        return self._off(number, logits) <= self.tolerance

    def is_alone(self, number: int, logits: Sequence[float]) -> bool:
        """Whether `logits` are what row `number` gets alone, up to the rounding of floats."""
        return self._off(number, logits) <= 1e-4 * float(np.abs(self.answers[number]).max()) + 1e-6

    def _off(self, number: int, logits: Sequence[float]) -> float:
        wanted = self.answers[number].ravel()
        got = np.asarray(logits, np.float64).ravel()
        return float(np.abs(got - wanted).max()) if got.shape == wanted.shape else np.inf


def bundle_of(recipe: str, folder: Path | None = None) -> Bundle:
    """The bundle in `folder`, or MiniLM fine-tuned on SST-2, pressed with a recipe if it has not been yet."""
    if folder is not None:
        return Bundle(folder)
    place = ARTIFACTS / recipe
    if not place.is_dir():
        print(f"... pressing {place.name}", file=sys.stderr, flush=True)
        words = ["press", str(find("minilm-sst2")), "--recipe", recipe, "-o", str(place)]
        subprocess.run([str(COMMAND), *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Bundle(place)


def workload(bundle: Bundle, *, count: int = 256, tokens: int | None = 32, tolerance: float | None = None) -> Workload:
    """Rows of `tokens` tokens, or of each sentence's own length for None."""
    encoder = bundle.encoder
    if encoder is None:
        raise SystemExit(f"{bundle.name} takes no text")
    lines = (find("data_sst2") / "dev.tsv").read_text("utf-8").splitlines()
    rows = [_sized(encoder([line.split("\t")[0]]), tokens) for line in lines[:count]]
    session = bundle.session()
    answers = [session.run(row)["logits"] for row in rows]
    return Workload(bundle, rows, answers, bundle.tolerance("logits") if tolerance is None else tolerance)


def v2_body(feeds: Feeds, request_id: str) -> bytes:
    """A request of the Open Inference Protocol."""
    inputs: list[dict[str, Any]] = [
        {"name": name, "shape": list(array.shape), "datatype": "INT64", "data": array.ravel().tolist()}
        for name, array in feeds.items()
    ]
    return json.dumps({"id": request_id, "inputs": inputs}, separators=(",", ":")).encode()


def v2_logits(answer: Any) -> list[float]:
    values: list[float] = answer["outputs"][0]["data"]
    return values


def _sized(feeds: Feeds, tokens: int | None) -> dict[str, np.ndarray]:
    """Padded with zeros at the end (BERT's padding id is 0), or cut with its last token kept."""
    if tokens is None:
        return dict(feeds)
    sized = {}
    for name, array in feeds.items():
        row = array if array.shape[1] <= tokens else np.concatenate([array[:, : tokens - 1], array[:, -1:]], axis=1)
        sized[name] = np.pad(row, ((0, 0), (0, tokens - row.shape[1])))
    return sized

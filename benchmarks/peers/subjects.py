# SPDX-License-Identifier: Apache-2.0
"""The models, and what each is calibrated, judged and timed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxpress.exporters.exported import ExportedModel
from onnxpress.runtime.benchmark import Setting
from peers.assets import find
from peers.environments import Environments

Feeds = dict[str, np.ndarray]
_MEAN, _DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Material:
    """What a model is fed with.

    Attributes:
        calibration: One sample each, without padding; none of them is in `evaluation`.
        evaluation: Batches; empty where only the speed is of interest.
        labels: Of all evaluation samples in order.
        settings: What is timed.
    """

    calibration: list[Feeds]
    evaluation: list[Feeds]
    labels: np.ndarray
    settings: list[Setting]


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        title: Its name in the report.
        source: What our exporter is given, or a function that finds it.
        transformer: Whether peers should treat it as one.
        material: Makes the data from the exported model.
        note: How it was judged, for the line below the title.
    """

    title: str
    source: str | Callable[[], str]
    transformer: bool
    material: Callable[[ExportedModel, Environments, bool], Material]
    note: str


def cifar(exported: ExportedModel, environments: Environments, quick: bool) -> Material:
    with np.load(find("data_cifar10") / "test_first500_per_class.npz") as data:
        pixels, labels = data["images"], data["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    images = ((pixels[order].astype(np.float32) / 255 - _MEAN) / _DEVIATION).transpose(0, 3, 1, 2)
    return _images(np.ascontiguousarray(images), labels[order], 300, 400 if quick else None)


def photos(exported: ExportedModel, environments: Environments, quick: bool) -> Material:
    decoded = environments.folder / "photos.npz"
    if not decoded.exists():
        environments.run("pictures", "decode_photos.py", find("data_imagenet_sample"), decoded)
    with np.load(decoded) as data:
        images, labels = data["images"], data["labels"]
    order = np.random.default_rng(0).permutation(len(labels))
    return _images(images[order], labels[order], 40, 40 if quick else None)


def _images(images: np.ndarray, labels: np.ndarray, calibrate: int, limit: int | None) -> Material:
    """The first `calibrate` images for calibration, the others to be judged by."""
    rest, labels = images[calibrate:][:limit], labels[calibrate:][:limit]
    size = 20
    batches = [{"image": rest[i : i + size]} for i in range(0, len(rest), size)]
    shape = " x ".join(map(str, images.shape[1:]))
    settings = [
        Setting("1", 1, f"1 x {shape}", [{"image": rest[i : i + 1]} for i in range(8)]),
        Setting("8", 8, f"8 x {shape}", [{"image": rest[:8]}]),
    ]
    return Material([{"image": images[i : i + 1]} for i in range(calibrate)], batches, labels, settings)


def sst2(exported: ExportedModel, environments: Environments, quick: bool) -> Material:
    tokenize = exported.tokenize
    assert tokenize is not None
    train, dev = _sentences("train.tsv"), _sentences("dev.tsv")
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:300])
    dev = dev[: 100 if quick else None]
    single = [tokenize([text]) for text, _ in dev]
    lengths = [feeds["input_ids"].shape[1] for feeds in single[:20]]
    full = tokenize([" ".join(text for text, _ in dev[:40])] * 8, max_length=128)
    settings = [
        Setting("1", 1, f"1 x own length ({min(lengths)}-{max(lengths)} tokens)", single[:20]),
        Setting("8", 8, "8 x 128 tokens", [full]),
    ]
    calibration = [tokenize([train[i][0]]) for i in chosen]
    return Material(calibration, single, np.array([label for _, label in dev]), settings)


def _sentences(file: str) -> list[tuple[str, int]]:
    rows = [line.split("\t") for line in (find("data_sst2") / file).read_text("utf-8").splitlines()]
    return [(text, int(label)) for text, label in rows]


def random_tokens(exported: ExportedModel, environments: Environments, quick: bool) -> Material:
    rng = np.random.default_rng(0)

    def feeds(batch: int) -> Feeds:
        ids = rng.integers(5, 30000, (batch, 128))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    settings = [Setting(str(b), b, f"{b} x 128 tokens", [feeds(b)]) for b in (1, 8)]
    return Material([feeds(1) for _ in range(16 if quick else 64)], [], np.zeros(0), settings)


SUBJECTS: dict[str, Subject] = {
    "resnet20": Subject("ResNet-20, CIFAR-10", "peers.factories:resnet20", False, cifar,
                        "300 images for calibration, accuracy on the other 4,700"),
    "resnet44": Subject("ResNet-44, CIFAR-10", "peers.factories:resnet44", False, cifar,
                        "300 images for calibration, accuracy on the other 4,700"),
    "squeezenet": Subject("SqueezeNet 1.0, ImageNet", "peers.factories:squeezenet", False, photos,
                          "40 photos for calibration, accuracy on the other 160: one photo is 0.6 points"),
    "minilm": Subject("MiniLM-L6, SST-2", lambda: str(find("minilm-sst2")), True, sst2,
                      "300 training sentences for calibration, accuracy on the 872 of dev: one is 0.11 points"),
    "bert-base": Subject("BERT-base, random weights", "peers.factories:bert_base", True, random_tokens,
                         "64 random sequences for calibration; no accuracy to measure, so the error of the logits"),
}  # fmt: skip


def source_of(subject: Subject) -> str:
    return subject.source if isinstance(subject.source, str) else subject.source()


def by_shape(samples: Sequence[Feeds]) -> list[list[int]]:
    """Indices of samples that can be run together without padding."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, feeds in enumerate(samples):
        groups.setdefault(tuple(array.shape[1:] for array in feeds.values()), []).append(index)
    return [group[i : i + 16] for group in groups.values() for i in range(0, len(group), 16)]


def joined(samples: Sequence[Feeds], indices: Sequence[int]) -> Feeds:
    return {name: np.concatenate([samples[i][name] for i in indices]) for name in samples[indices[0]]}


def batches_of(samples: Sequence[Feeds], labels: np.ndarray) -> tuple[list[Feeds], list[np.ndarray]]:
    """Evaluation samples of one shape together, with their labels."""
    sizes = [len(next(iter(feeds.values()))) for feeds in samples]
    starts = np.cumsum([0, *sizes])
    groups = by_shape(samples)
    own = [np.concatenate([labels[starts[i] : starts[i + 1]] for i in group]) for group in groups]
    return [joined(samples, group) for group in groups], own


def write_samples(samples: Sequence[Feeds], file: Path) -> Path:
    """Samples as `3/input_ids`, for the peers."""
    np.savez(file, **{f"{i}/{name}": array for i, feeds in enumerate(samples) for name, array in feeds.items()})
    return file


def write_dataset(samples: Sequence[Feeds], file: Path) -> Path:
    """The same samples as one array an input, padded at the end, for `onnxpress press --calibration`."""
    names = list(samples[0])
    longest = [max(dims) for dims in zip(*(feeds[names[0]].shape[1:] for feeds in samples), strict=True)]
    stacked = {}
    for name in names:
        rows = []
        for feeds in samples:
            missing = [(0, size - own) for size, own in zip(longest, feeds[name].shape[1:], strict=True)]
            rows.append(np.pad(feeds[name][0], missing))
        stacked[name] = np.stack(rows)
    np.savez(file, **stacked)
    return file

# SPDX-License-Identifier: Apache-2.0
"""Task metrics: reference and candidate on the same evaluation data, through the same tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..contracts.errors import InputError
from ..contracts.tasks import GENERATION
from ..exporters.exported import ExportedModel
from . import metrics
from .data import Dataset, labels_to_ids, labels_to_scores
from .inputs import dataset_texts, fixed_batch, stack
from .token_identity import CutVocabulary
from .validate import Run


def metric_names(exported_task: str, data: Dataset | None) -> list[str]:
    """The metrics that `evaluate` will return for this task and data; known before anything is run."""
    if data is None:
        return []
    labelled = data.examples[0].label is not None
    agreement = ["top1_agreement_with_reference"]
    if exported_task == "feature-extraction":
        extra = ["spearman"] if data.kind == "pairs" and labelled else ["neighbour_accuracy"] if labelled else []
        return [*extra, "cosine_to_reference", "cosine_to_reference_min"]
    if exported_task == "token-classification" and data.kind == "words":
        return ["f1", *agreement]
    if exported_task == GENERATION and data.kind == "text":
        return ["perplexity", *agreement]
    if exported_task in ("text-classification", "generic") and labelled:
        return ["accuracy", *agreement]
    return agreement


def evaluate(
    exported: ExportedModel,
    data: Dataset,
    reference: Run,
    candidate: Run,
    batch: int,
    cut: CutVocabulary | None = None,
) -> dict[str, Any]:
    """Return {metric: {reference, candidate, drop}}; accuracy and F1 in percent, `drop` in points.

    Args:
        exported: What the reference reads the data through.
        data: Texts or arrays.
        reference: The original.
        candidate: What it became.
        batch: Examples a batch.
        cut: What the candidate reads the data through, where its vocabulary was cut.

    Raises:
        InputError: The data does not fit the task.
    """
    pressed = exported if cut is None else cut.pressed
    if exported.task == "token-classification" and data.kind == "words":
        return _entities(exported, data, reference, candidate, batch, pressed)
    if exported.task == GENERATION and data.kind == "text":
        return _language(exported, data, reference, candidate, batch, pressed)
    ours, theirs = [], []
    scores = exported.task == "question-answering"
    if scores and cut is not None:
        # Answers are positions among the tokens, so both sides have to read the same ones
        exported, reference = pressed, cut.renumbering.reading_new_ids(reference)
    batches, order = _batches(exported, data, batch)
    other = batches if pressed is exported else _batches(pressed, data, batch)[0]
    for feeds, its_feeds in zip(batches, other, strict=True):
        ours.append(_rows(reference(feeds), feeds, token_scores=scores))
        theirs.append(_rows(candidate(its_feeds), its_feeds, token_scores=scores))
    wanted, got = _joined(ours)[order], _joined(theirs)[order]
    labelled = data.examples[0].label is not None
    if exported.task == "feature-extraction":
        return _embedding_metrics(data, labelled, wanted, got)
    result: dict[str, Any] = {}
    if exported.task in ("text-classification", "generic") and labelled:
        labels = labels_to_ids(data, exported.id2label, wanted.shape[-1])
        result["accuracy"] = _row(metrics.accuracy(wanted, labels), metrics.accuracy(got, labels))
    result["top1_agreement_with_reference"] = _row(100.0, metrics.top1_agreement(wanted, got))
    return result


def _batches(exported: ExportedModel, data: Dataset, batch: int) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """The data in batches, and the index that puts their rows back into the data's order.

    Texts are batched with others of about their length, so that little time goes into padding.
    """
    if exported.tokenize is None:
        return _array_batches(exported, data, batch)
    texts, pairs = dataset_texts(data)
    if exported.task == "feature-extraction" and pairs is not None:
        texts, pairs = [*texts, *pairs], None
    lengths = [len(text) + len(pairs[i] if pairs else "") for i, text in enumerate(texts)]
    by_length = np.argsort(lengths, kind="stable")
    groups = [by_length[i : i + batch] for i in range(0, len(texts), batch)]
    tokenize = exported.tokenize
    feeds = [
        tokenize([texts[i] for i in group], None if pairs is None else [pairs[i] for i in group]) for group in groups
    ]
    return feeds, np.argsort(by_length, kind="stable")


def _array_batches(
    exported: ExportedModel, data: Dataset, batch: int
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    if data.kind != "arrays":
        raise InputError(
            f"{exported.source.name} has no tokenizer, so it cannot read texts",
            next_step="Give --evaluation FILE.npz with one array an input.",
        )
    fixed = fixed_batch(exported.signature)
    size = fixed or batch
    if fixed and len(data) % fixed:
        raise InputError(
            f"{len(data)} examples do not fill batches of {fixed}, the model's fixed size",
            next_step=f"Give a multiple of {fixed} examples, or export with a dynamic batch.",
        )
    feeds = [stack(exported.signature, data, i, size) for i in range(0, len(data), size)]
    return feeds, np.arange(len(data))


def _rows(outputs: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], *, token_scores: bool) -> np.ndarray:
    """The first output as one row an example; token vectors are averaged over the tokens that count.

    With `token_scores` it is one score a token, and padding cannot win.
    """
    first = np.asarray(next(iter(outputs.values())), dtype=np.float32)
    mask = feeds.get("attention_mask")
    if token_scores and mask is not None:
        return np.where(mask.astype(bool), first, -np.inf)
    if first.ndim == 3 and mask is not None and first.shape[:2] == mask.shape:
        weights = mask[:, :, None].astype(np.float32)
        return np.asarray((first * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9))
    return first.reshape(first.shape[0], -1)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """All batches below each other; rows of token scores, whose length is the batch's, are filled up with -inf."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-np.inf) for p in parts])


def _embedding_metrics(data: Dataset, labelled: bool, wanted: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if data.kind == "pairs" and labelled:
        half, scores = len(wanted) // 2, labels_to_scores(data)
        values = [metrics.spearman(metrics.cosine_rows(e[:half], e[half:]), scores) for e in (wanted, got)]
        result["spearman"] = _row(*values)
    elif labelled:
        labels = np.unique([str(example.label) for example in data.examples], return_inverse=True)[1]
        values = [metrics.neighbour_accuracy(e, labels) for e in (wanted, got)]
        result["neighbour_accuracy"] = _row(*values)
    cosines = metrics.cosine_rows(wanted, got)
    result["cosine_to_reference"] = _row(1.0, float(cosines.mean()))
    result["cosine_to_reference_min"] = _row(1.0, float(cosines.min()))
    return result


def _entities(
    exported: ExportedModel, data: Dataset, reference: Run, candidate: Run, batch: int, pressed: ExportedModel
) -> dict[str, dict[str, float | None]]:
    """Entity-level F1: the tag of a word is that of its first token, as in the usual training scripts."""
    if exported.tokenize is None or pressed.tokenize is None or exported.id2label is None:
        raise InputError(
            f"{exported.source.name} has no tokenizer or no labels", next_step="Copy tokenizer.json and config.json."
        )
    gold = [list(example.tags or ()) for example in data.examples]
    tags: tuple[list[list[str]], list[list[str]]] = ([], [])
    same = total = 0
    for start in range(0, len(data), batch):
        words = [list(example.words or ()) for example in data.examples[start : start + batch]]
        wanted, got = (
            _word_classes(run, *reads.words(words))
            for run, reads in ((reference, exported.tokenize), (candidate, pressed.tokenize))
        )
        for side, found in zip(tags, (wanted, got), strict=True):
            side += [["O" if n is None else exported.id2label[n] for n in numbers] for numbers in found]
        pairs = [
            pair for a, b in zip(wanted, got, strict=True) for pair in zip(a, b, strict=True) if pair[0] is not None
        ]
        same += sum(a == b for a, b in pairs)
        total += len(pairs)
    return {
        "f1": _row(metrics.entity_f1(tags[0], gold), metrics.entity_f1(tags[1], gold)),
        "top1_agreement_with_reference": _row(100.0, 100.0 * same / max(total, 1)),
    }


def _language(
    exported: ExportedModel, data: Dataset, reference: Run, candidate: Run, batch: int, pressed: ExportedModel
) -> dict[str, dict[str, float | None]]:
    """Perplexity of the texts, each read from its beginning and cut at the model's limit; `drop` is in percent of it.

    Agreement is that of the most likely next tokens, at every position.
    """
    if pressed is not exported:
        raise InputError(
            "perplexities over different vocabularies cannot be compared",
            next_step="Leave prune_vocabulary out for text-generation, or leave --evaluation out.",
        )
    (batches, _), sums = _batches(exported, data, batch), np.zeros(2)
    tokens = same = 0
    for feeds in batches:
        ids, mask = feeds["input_ids"], feeds["attention_mask"].astype(bool)
        logits = [np.asarray(run(feeds)["logits"])[:, :-1] for run in (reference, candidate)]
        counts = mask[:, 1:] & mask[:, :-1]
        sums += [metrics.negative_log_likelihood(part[counts], ids[:, 1:][counts]) for part in logits]
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1))[counts].sum())
        tokens += int(counts.sum())
    if not tokens:
        raise InputError(f"{data.name} holds no text of two tokens", next_step="Give longer texts.")
    wanted, got = (float(value) for value in np.exp(sums / tokens))
    return {
        "perplexity": {**_row(wanted, got), "drop": round(100.0 * (got / wanted - 1.0), 6)},
        "top1_agreement_with_reference": _row(100.0, 100.0 * same / tokens),
    }


def _word_classes(run: Run, feeds: dict[str, np.ndarray], firsts: list[list[int | None]]) -> list[list[int | None]]:
    """The class of each word: that of its first token; None where the word was cut off."""
    classes = np.argmax(next(iter(run(feeds).values())), axis=-1)
    return [[None if p is None else int(classes[row, p]) for p in positions] for row, positions in enumerate(firsts)]


def _row(reference: float, candidate: float) -> dict[str, float | None]:
    values = {"reference": reference, "candidate": candidate, "drop": reference - candidate}
    return {key: None if (n := metrics.json_number(value)) is None else round(n, 6) for key, value in values.items()}

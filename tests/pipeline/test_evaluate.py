# SPDX-License-Identifier: Apache-2.0
"""Task metrics against values computed by hand, with models and tokenizers that can be seen through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.data import Dataset
from onnxpress.pipeline.data_files import Example
from onnxpress.pipeline.evaluate import evaluate, metric_names
from onnxpress.pipeline.validate import Run

from .samples import TEXT_INPUTS, LetterTokenizer, exported


def _dataset(kind: Any, *examples: Example) -> Dataset:
    return Dataset(examples, kind, "dev", "0" * 64)


def _labelled(*rows: tuple[str, Any]) -> Dataset:
    return _dataset("text", *(Example(text=text, label=label) for text, label in rows))


def _by_text(answer: Callable[[str], Sequence[float]]) -> Run:
    """A model that answers a row for each text, which it reads back from the letters' ids."""

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = []
        for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
            rows.append(answer("".join(chr(int(i) - 3) for i in ids[mask.astype(bool)][1:-1])))
        return {"out": np.array(rows, np.float32)}

    return run


def _reader(task: str = "text-classification", **fields: Any) -> Any:
    return exported(TEXT_INPUTS, task=task, tokenize=LetterTokenizer(), **fields)


POSITIVE = {0: "bad", 1: "good"}


def _first_letter(text: str) -> list[float]:
    return [0.0, 1.0] if text.startswith("g") else [1.0, 0.0]


def test_accuracy_by_hand_in_percent_and_points() -> None:
    data = _labelled(("good", "good"), ("bad", "bad"), ("great", 1), ("gone", "bad"))
    result = evaluate(_reader(id2label=POSITIVE), data, _by_text(_first_letter), _by_text(lambda t: [1.0, 0.0]), 3)
    assert result == {
        "accuracy": {"reference": 75.0, "candidate": 50.0, "drop": 25.0},
        "top1_agreement_with_reference": {"reference": 100.0, "candidate": 25.0, "drop": 75.0},
    }


def test_the_order_of_the_data_survives_batching_by_length() -> None:
    texts = ["g" * n for n in (9, 1, 30, 2, 2, 17, 5)]
    reader = _reader(id2label=None)
    data = _labelled(*((text, len(text) % 2) for text in texts))
    parity = _by_text(lambda text: [float(len(text) % 2 == 0), float(len(text) % 2)])
    assert evaluate(reader, data, parity, parity, 2)["accuracy"]["candidate"] == 100.0
    batches = [[len(text) for text in call] for call in reader.tokenize.calls]
    assert batches == [[1, 2], [2, 5], [9, 17], [30]]


def test_data_without_labels_gives_agreement_alone() -> None:
    data = _dataset("text", Example(text="good"), Example(text="bad"))
    result = evaluate(_reader(), data, _by_text(_first_letter), _by_text(_first_letter), 8)
    assert result == {"top1_agreement_with_reference": {"reference": 100.0, "candidate": 100.0, "drop": 0.0}}


def test_a_label_that_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="unknown label 'neutral'"):
        evaluate(
            _reader(id2label=POSITIVE), _labelled(("x", "neutral")), _by_text(_first_letter), _by_text(_first_letter), 1
        )


def test_a_broken_candidate_is_never_right() -> None:
    data = _labelled(("good", 1), ("bad", 0))
    result = evaluate(_reader(), data, _by_text(_first_letter), _by_text(lambda t: [np.nan, np.nan]), 2)
    assert result["accuracy"] == {"reference": 100.0, "candidate": 0.0, "drop": 100.0}
    assert result["top1_agreement_with_reference"]["candidate"] == 0.0


VECTORS = {"a": [1.0, 0.0], "b": [0.9, 0.1], "c": [0.0, 1.0], "d": [0.1, 0.9]}


def test_neighbour_accuracy_by_hand() -> None:
    data = _labelled(("a", "east"), ("b", "east"), ("c", "north"), ("d", "north"))
    turned = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.9, 0.1], "d": [0.1, 0.9]}
    result = evaluate(
        _reader("feature-extraction"), data, _by_text(VECTORS.__getitem__), _by_text(turned.__getitem__), 3
    )
    assert result["neighbour_accuracy"] == {"reference": 100.0, "candidate": 0.0, "drop": 100.0}
    same = 1.0
    moved = 0.1 / np.hypot(0.9, 0.1)
    assert result["cosine_to_reference"]["candidate"] == pytest.approx((2 * same + 2 * moved) / 4, abs=1e-6)
    assert result["cosine_to_reference_min"]["candidate"] == pytest.approx(moved, abs=1e-6)


def test_token_vectors_are_averaged_over_the_tokens_that_count() -> None:
    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        hidden = np.stack([feeds["input_ids"] == 3 + ord(c) for c in "az"], axis=-1).astype(np.float32)
        hidden[feeds["attention_mask"] == 0] = (0, 1e6)
        return {"last_hidden_state": hidden}

    data = _labelled(("a", 0), ("aaa", 0), ("zz", 1), ("z", 1))
    result = evaluate(_reader("feature-extraction"), data, run, run, 4)
    assert result["cosine_to_reference"]["candidate"] == 1.0
    assert result["neighbour_accuracy"]["candidate"] == 100.0


def test_spearman_by_hand() -> None:
    rows = [("a", "a", 3.0), ("a", "b", 2.0), ("a", "d", 1.0), ("a", "c", 0.0)]
    data = _dataset("pairs", *(Example(text=t, text_pair=p, label=s) for t, p, s in rows))
    mirrored = {"a": [1.0, 0.0], "b": [0.1, 0.9], "c": [1.0, 0.0], "d": [0.9, 0.1]}

    def candidate(text: str) -> Sequence[float]:
        return mirrored[text]

    result = evaluate(_reader("feature-extraction"), data, _by_text(VECTORS.__getitem__), _by_text(candidate), 3)
    # cosines of the candidate, in the data's order: 1, low, high, 1; ranks 3.5, 1, 2, 3.5 against 4, 3, 2, 1
    assert result["spearman"]["reference"] == 1.0
    assert result["spearman"]["candidate"] == pytest.approx(-0.5 / np.sqrt(4.5 * 5), abs=1e-6)
    assert "accuracy" not in result


TAGS = {0: "O", 1: "B-PER", 2: "B-LOC"}


def _tagger(answer: Callable[[str], int]) -> Run:
    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        classes = np.vectorize(lambda i: answer(chr(max(int(i) - 3, 0))))(feeds["input_ids"])
        return {"logits": np.eye(3, dtype=np.float32)[classes]}

    return run


def test_f1_of_entities_by_hand_reads_each_word_s_first_token() -> None:
    data = _dataset(
        "words",
        Example(words=("Pam", "visits", "Lyon"), tags=("B-PER", "O", "B-LOC")),
        Example(words=("Paul",), tags=("B-PER",)),
        Example(words=("rain",), tags=("O",)),
    )
    right = _tagger(lambda c: {"P": 1, "L": 2}.get(c, 0))
    blind = _tagger(lambda c: {"P": 1, "r": 1}.get(c, 0))
    result = evaluate(_reader("token-classification", id2label=TAGS), data, right, blind, 2)
    # the candidate finds 2 of 3 entities and one that is none: P = 2/3, R = 2/3
    assert result["f1"]["reference"] == 100.0
    assert result["f1"]["candidate"] == pytest.approx(200 / 3, abs=1e-5)
    assert result["top1_agreement_with_reference"]["candidate"] == pytest.approx(100 * 3 / 5, abs=1e-5)


def test_a_word_that_was_cut_off_is_outside_every_entity() -> None:
    reader = exported(TEXT_INPUTS, task="token-classification", tokenize=LetterTokenizer(limit=8), id2label=TAGS)
    data = _dataset("words", Example(words=("Pa", "Pb", "Pc", "Pd"), tags=("B-PER",) * 4))
    run = _tagger(lambda c: int(c == "P"))
    result = evaluate(reader, data, run, run, 1)
    assert result["f1"]["candidate"] == pytest.approx(100 * 2 * 3 / 7, abs=1e-5)
    assert result["top1_agreement_with_reference"]["candidate"] == 100.0


def test_token_classification_needs_labels_and_a_tokenizer() -> None:
    data = _dataset("words", Example(words=("a",), tags=("O",)))
    with pytest.raises(InputError, match="has no tokenizer or no labels"):
        evaluate(_reader("token-classification"), data, _tagger(lambda c: 0), _tagger(lambda c: 0), 1)


def test_answers_of_different_lengths_are_compared_and_padding_never_wins() -> None:
    def starts(at: int) -> Run:
        def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            scores = np.zeros(feeds["input_ids"].shape, np.float32)
            scores[:, at] = 1.0
            scores[feeds["attention_mask"] == 0] = 9.0
            return {"start_logits": scores, "end_logits": scores}

        return run

    data = _dataset("text", *(Example(text="x" * n) for n in (3, 12, 1, 7)))
    reader = _reader("question-answering")
    same = evaluate(reader, data, starts(1), starts(1), 2)
    assert same["top1_agreement_with_reference"]["candidate"] == 100.0
    assert evaluate(reader, data, starts(1), starts(2), 2)["top1_agreement_with_reference"]["candidate"] == 0.0


def _array_data(count: int) -> Dataset:
    rows = [Example(arrays={"x": np.eye(3)[i % 3]}, label=i % 3) for i in range(count)]
    return _dataset("arrays", *rows)


def test_arrays_are_read_in_the_model_s_fixed_batch() -> None:
    sizes: list[int] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes.append(len(feeds["x"]))
        return {"y": feeds["x"]}

    fixed = exported({"x": ("float32", (4, 3))})
    assert evaluate(fixed, _array_data(8), run, run, 3)["accuracy"]["candidate"] == 100.0
    assert set(sizes) == {4}
    with pytest.raises(InputError, match="6 examples do not fill batches of 4") as caught:
        evaluate(fixed, _array_data(6), run, run, 3)
    assert caught.value.next_step.startswith("Give a multiple of 4 examples")
    sizes.clear()
    assert evaluate(exported({"x": ("float32", ("N", 3))}), _array_data(7), run, run, 3)["accuracy"]["candidate"] == 100
    assert sizes == [3, 3, 3, 3, 1, 1]


def test_a_model_without_a_tokenizer_reads_no_text() -> None:
    with pytest.raises(InputError, match=r"net.onnx has no tokenizer, so it cannot read texts") as caught:
        evaluate(exported({"x": ("float32", ("batch", 3))}), _labelled(("a", 0)), lambda f: {}, lambda f: {}, 1)
    assert caught.value.next_step == "Give --evaluation FILE.npz with one array an input."


CASES: list[tuple[str, Dataset | None]] = [
    ("text-classification", _labelled(("good", 1), ("bad", 0))),
    ("text-classification", _dataset("text", Example(text="good"))),
    ("feature-extraction", _labelled(("a", "x"), ("b", "x"))),
    ("feature-extraction", _dataset("text", Example(text="a"), Example(text="b"))),
    ("feature-extraction", _dataset("pairs", *(Example(text=t, text_pair="b", label=i) for i, t in enumerate("ab")))),
]


@pytest.mark.parametrize(("task", "data"), CASES)
def test_the_names_that_are_announced_are_those_that_are_measured(task: str, data: Dataset) -> None:
    run = _by_text(lambda text: VECTORS.get(text, [1.0, 0.5]))
    assert list(evaluate(_reader(task), data, run, run, 2)) == metric_names(task, data)


def test_without_data_no_metric_is_announced() -> None:
    assert metric_names("text-classification", None) == []


def _language_model(probability: float) -> Run:
    """Gives the token that really follows `probability`, and the 299 others what is left in equal parts."""

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = np.asarray(feeds["input_ids"])
        follow = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
        spread = np.full((*ids.shape, 300), (1.0 - probability) / 299, np.float64)
        np.put_along_axis(spread, follow[..., None], probability, axis=-1)
        return {"logits": np.log(spread).astype(np.float32)}

    return run


def test_perplexity_by_hand_and_its_drop_in_percent() -> None:
    data = _labelled(("a longer text", None), ("short", None), ("another one", None))
    for batch in (1, 2, 3):  # padding must not count
        result = evaluate(_reader("text-generation"), data, _language_model(0.5), _language_model(0.25), batch)
        assert result["perplexity"]["reference"] == pytest.approx(2.0, rel=1e-5)
        assert result["perplexity"]["candidate"] == pytest.approx(4.0, rel=1e-5)
        assert result["perplexity"]["drop"] == pytest.approx(100.0, rel=1e-4)
        assert result["top1_agreement_with_reference"]["candidate"] == 100.0


def test_agreement_is_counted_at_every_position() -> None:
    def other(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = _language_model(0.5)(feeds)["logits"]
        logits[:, 0] = -logits[:, 0]  # the first token that follows is no longer the likeliest
        return {"logits": logits}

    data = _labelled(("abc", None))  # five tokens with their frame: four that follow another
    result = evaluate(_reader("text-generation"), data, _language_model(0.5), other, 1)
    assert result["top1_agreement_with_reference"]["candidate"] == 75.0


def test_a_text_of_one_token_has_no_perplexity() -> None:
    class OneToken(LetterTokenizer):
        def __call__(self, *args: Any, **settings: Any) -> dict[str, np.ndarray]:
            return {name: array[:, :1] for name, array in super().__call__(*args, **settings).items()}

    reader = exported(TEXT_INPUTS, task="text-generation", tokenize=OneToken())
    with pytest.raises(InputError, match="holds no text of two tokens"):
        evaluate(reader, _labelled(("a", None)), _language_model(0.5), _language_model(0.5), 1)

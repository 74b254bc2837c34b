# SPDX-License-Identifier: Apache-2.0
"""The monitor of outputs: what it sees, when it speaks up, and that it does so once."""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CLASSIFIER, text_bundle

from onnxpress.contracts.errors import BundleError, InputError
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving import watch as watch_module
from onnxpress.runtime.serving.events import Answer
from onnxpress.runtime.serving.monitoring import (
    CLASSES,
    GOLDEN,
    NUMBERS,
    TEXTS,
    VECTORS,
    Agreement,
    Expectations,
    Monitor,
    View,
)
from onnxpress.runtime.serving.shadow import Shadow
from onnxpress.runtime.serving.watch import Watch, Watching

SMALL = Expectations(window=50, reference_rows=100, false_alarms=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_bundle(tmp_path_factory.mktemp("classifier") / "tiny")


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Bundle:
    return Bundle(folder)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(text_bundle(tmp_path_factory.mktemp("embedder") / "tiny", task="feature-extraction"))


def an_answer(bundle: Bundle, outputs: Any, name: str = "m", **changes: Any) -> Answer:
    array = np.asarray(outputs, np.float32)
    ids = np.full((len(array), 3), 2, np.int64)
    fields = {"rows": len(array), "inputs": {"input_ids": ids, "attention_mask": np.ones_like(ids)}, **changes}
    output = bundle.signature.outputs[0].name
    return Answer("r", name, bundle.sha256, "infer", 200, outputs={output: array}, **fields)


def logits(draw: np.random.Generator, rows: int, positive: float = 0.5, scale: float = 2.0) -> np.ndarray:
    side = np.where(draw.random(rows) < positive, 1, -1) * np.abs(draw.normal(0, scale, rows))
    return np.stack([-side, side], axis=1)


def test_each_kind_of_model_is_looked_at_in_its_own_way(classifier: Bundle, embedder: Bundle, tmp_path: Path) -> None:
    assert View.of(classifier) == View("logits", CLASSES, False)
    assert View.of(embedder) == View("logits", VECTORS, False)
    generic = Bundle(
        text_bundle(tmp_path / "g", signature={"inputs": [], "outputs": [_spec("y", ["batch", "a", "b"])]})
    )
    assert View.of(generic).kind == NUMBERS
    inputs = [{"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"]}]
    tokens = {"inputs": inputs, "outputs": [_spec("logits", ["batch", "sequence", 5])]}
    assert View.of(Bundle(text_bundle(tmp_path / "t", signature=tokens))) == View("logits", CLASSES, True)
    words = Bundle(text_bundle(tmp_path / "w", task="feature-extraction", signature=tokens))
    assert View.of(words) == View("logits", VECTORS, True)


def _spec(name: str, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": shape}


def test_padding_counts_nowhere() -> None:
    mask = np.array([[1, 1, 1, 0], [0, 1, 0, 0]])
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    values[mask == 0] = np.nan
    vectors = View("y", VECTORS, True).rows({"attention_mask": mask}, {"y": np.nan_to_num(values, nan=1e6)})
    assert vectors is not None
    np.testing.assert_allclose(vectors, [values[0, :3].mean(0), values[1, 1]])
    classes = View("y", CLASSES, True).rows({"attention_mask": mask}, {"y": values})
    assert classes is not None
    np.testing.assert_array_equal(classes, [values[0, 1], values[1, 1]])
    assert View("z", VECTORS, True).rows({}, {"y": values}) is None


def test_confidence_is_the_softmax_s_unless_the_model_made_it() -> None:
    view = View("y", CLASSES, False)
    found = view.features(np.array([[0.0, np.log(3.0)], [800.0, 0.0]]))
    np.testing.assert_allclose(found["confidence"], [0.75, 1.0])
    assert found["classes"].tolist() == [1, 0]
    np.testing.assert_allclose(view.features(np.array([[0.25, 0.75]]))["confidence"], [0.75])


def test_traffic_that_stays_the_same_raises_no_alert(classifier: Bundle) -> None:
    monitor, draw = Monitor(classifier, SMALL), np.random.default_rng(0)
    for _ in range(200):
        monitor.see([an_answer(classifier, logits(draw, 10))])
    assert monitor.windows == 38
    assert set(monitor.drifts) == {"classes", "confidence"}
    assert not monitor.alerts()


def test_other_classes_and_other_confidence_raise_an_alert_each(classifier: Bundle) -> None:
    draw = np.random.default_rng(1)
    for kind, changed in (("drift_classes", {"positive": 0.95}), ("drift_confidence", {"scale": 0.1})):
        monitor = Monitor(classifier, SMALL)
        for _ in range(10):
            monitor.see([an_answer(classifier, logits(draw, 10))])
        assert monitor.progress == ("window", 0, 50)
        for _ in range(5):
            monitor.see([an_answer(classifier, logits(draw, 10, **changed))])
        assert list(monitor.alerts()) == [kind]
        for _ in range(5):
            monitor.see([an_answer(classifier, logits(draw, 10))])
        assert not monitor.alerts()


def test_vectors_that_turn_or_grow_raise_an_alert_each(embedder: Bundle) -> None:
    draw = np.random.default_rng(2)
    for kind, factor, shift in (("drift_direction", 1.0, 8.0), ("drift_norm", 3.0, 0.0)):
        monitor = Monitor(embedder, SMALL)
        for rows, by, add in ((100, 1.0, 0.0), (50, factor, shift)):
            values = draw.normal(size=(rows, 2))
            turned = values + np.array([add, 0])
            turned *= by * np.linalg.norm(values, axis=1, keepdims=True) / np.linalg.norm(turned, axis=1, keepdims=True)
            monitor.see([an_answer(embedder, turned)])
        assert list(monitor.alerts()) == [kind]


def test_a_model_that_begins_to_repeat_itself_or_to_write_little_is_noticed(tmp_path: Path) -> None:
    bundle, draw = Bundle(text_bundle(tmp_path / "w", task="text-generation")), np.random.default_rng(5)
    for kind, length, words in (("drift_variety", 30, 2), ("drift_length", 3, 1000)):
        monitor = Monitor(bundle, SMALL)
        assert monitor.view.kind == TEXTS
        for rows, most, vocabulary in ((100, 30, 1000), (50, length, words)):
            for _ in range(rows):
                tokens = draw.integers(0, vocabulary, (1, int(draw.integers(most // 2 + 1, most + 1))))
                monitor.see([Answer("r", "m", bundle.sha256, "generate", 200, rows=1, outputs={"tokens": tokens})])
        assert kind in monitor.alerts()


def test_nan_and_infinity_are_counted_and_do_not_enter_the_statistics(classifier: Bundle) -> None:
    monitor = Monitor(classifier, SMALL)
    monitor.see([an_answer(classifier, [[1, 2], [np.nan, 1], [3, 4]])])
    monitor.see([an_answer(classifier, [[np.inf, 2]])])
    assert (monitor.seen, monitor.not_finite) == (4, 2)
    assert monitor.progress == ("reference", 2, 100)
    assert list(monitor.alerts()) == ["not_finite"]
    monitor.see([an_answer(classifier, np.ones((50, 2)))])
    assert not monitor.alerts()


def test_outputs_of_any_shape_are_no_error(classifier: Bundle) -> None:
    monitor = Monitor(classifier, SMALL)
    for outputs in ({}, {"other": np.ones(3)}, {"logits": np.array(np.nan)}, {"logits": np.array(["a"], object)}):
        monitor.see([Answer("r", "m", classifier.sha256, "infer", 200, rows=3, outputs=outputs)])
    assert monitor.not_finite == 3
    monitor.see([Answer("r", "m", "", "infer", 200, rows=0, outputs={"logits": np.ones((0, 2))})])


def test_the_golden_samples_are_the_reference_where_there_are_enough(classifier: Bundle) -> None:
    monitor = Monitor(classifier, Expectations(reference=GOLDEN))
    assert monitor.reference == "first"  # two samples say nothing about a distribution
    assert monitor.progress == ("reference", 0, 1000)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_bundle_agrees_with_itself(classifier: Bundle, embedder: Bundle, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for bundle in (classifier, embedder):
        monitor = Monitor(bundle, SMALL)
        values = draw.normal(size=(int(draw.integers(1, 9)), 2)) * draw.integers(0, 2, (1, 2))
        answer = an_answer(bundle, values)
        monitor.compare(answer, answer.outputs)
        assert monitor.agreement.share == 1
        assert monitor.agreement.cosine == pytest.approx(1)
        assert monitor.agreement.largest == {bundle.signature.outputs[0].name: 0.0}


def test_agreement_is_by_class_or_by_cosine(classifier: Bundle, embedder: Bundle) -> None:
    ours, theirs = [[1.0, 2.0], [3.0, 1.0], [0, 1]], [[-4.0, 2.0], [1.0, 3.0], [0, 1]]
    by_class = Monitor(classifier, SMALL)
    by_class.compare(an_answer(classifier, ours), {"logits": np.array(theirs)})
    assert list(by_class.agreement.recent) == [True, False, True]
    assert by_class.agreement.largest["logits"] == pytest.approx(5.0)
    by_cosine = Monitor(embedder, SMALL)
    by_cosine.compare(an_answer(embedder, ours), {"logits": np.array(theirs)})
    assert list(by_cosine.agreement.recent) == [False, False, True]
    assert by_cosine.agreement.cosine == pytest.approx((0 + 0.6 + 1) / 3)
    with pytest.raises(InputError, match="another shape"):
        by_class.compare(an_answer(classifier, ours), {"logits": np.ones((1, 2))})


def test_low_agreement_alerts_within_a_block_and_rests_with_the_next_good_one() -> None:
    agreement, wanted = Agreement(), Expectations(window=80, agreement=0.9, false_alarms=1e-3)
    agreement.add(np.zeros(10, bool), np.zeros(10), wanted)
    assert agreement.alarm
    agreement.add(np.ones(70, bool), np.ones(70), wanted)
    agreement.add(np.ones(80, bool), np.ones(80), wanted)
    assert not agreement.alarm
    assert (agreement.rows, agreement.hits) == (160, 150)


def test_agreement_as_wanted_alerts_as_rarely_as_promised() -> None:
    draw, wanted, alarms, blocks = np.random.default_rng(4), Expectations(window=80, false_alarms=0.05), 0, 300
    for _ in range(blocks):
        agreement = Agreement()
        for part in np.split(draw.random(80) < wanted.agreement, 8):
            agreement.add(part, np.ones(10), wanted)
            if agreement.alarm:
                alarms += 1
                break
    assert alarms <= 0.05 * blocks + 4 * (0.05 * blocks) ** 0.5


@pytest.mark.parametrize("bad", [{"window": 5}, {"reference": "last"}, {"agreement": 1.0}, {"false_alarms": 0.0}])
def test_settings_that_mean_nothing_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Expectations(**bad)
    with pytest.raises(InputError):
        Watching(share=1.5)


def _wait_for(found: Any, seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not found() and time.monotonic() < until:
        time.sleep(0.01)
    assert found()


def _run(bundle: Bundle, words: np.ndarray) -> Answer:
    mask = np.ones_like(words)
    session = bundle.session(threads=1)
    outputs = session.run({"input_ids": words, "attention_mask": mask})
    inputs = {"input_ids": words, "attention_mask": mask}
    return Answer("r", "m", bundle.sha256, "infer", 200, rows=len(words), inputs=inputs, outputs=outputs)


def test_live_requests_are_replayed_and_a_bad_bundle_is_found_out(
    folder: Path, classifier: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swapped = text_bundle(tmp_path / "swapped", graph=CLASSIFIER.replace("2, -2, -2, 2", "-3, 3, 3, -3"))
    wrong = Bundle(swapped)
    log = tmp_path / "log.jsonl"
    watch = Watch(Watching(log=log, shadow={"m": folder}, share=1.0, expectations=SMALL))
    try:
        for live in (classifier, wrong):
            watch.loaded("m", live, live.sha256[:12], 1.0)
            for start in range(10):
                watch.answered(_run(live, np.full((5, 2), 2 + start % 2)))
            watch.settle()
            assert watch._shadow is not None
            watch._shadow.settle()
            shown = watch.live()["models"]["m"]["shadow"]
            assert shown["rows"] == 50
            assert shown["bundle"] == classifier.sha256
            assert shown["agreement"] == (1.0 if live is classifier else 0.0)
            assert shown["largest_difference"]["logits"] == pytest.approx(0 if live is classifier else 10)
        with caplog.at_level(logging.WARNING):
            watch.settle()
            watch.settle()
        text = watch.text()[0].decode()
        assert 'onnxpress_alert{kind="agreement",model="m"} 1.0' in text
        assert 'onnxpress_shadow_replayed_total{model="m"} 20.0' in text
        assert 'onnxpress_shadow_agreement{measure="rows",model="m"} 0.0' in text
        assert [alert["kind"] for alert in watch.live()["alerts"]] == ["agreement"]
    finally:
        watch.close()
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kind"] for line in said if line["event"] == "alert"] == ["agreement"]


def test_the_first_part_of_a_request_that_ran_in_parts_is_replayed(folder: Path, classifier: Bundle) -> None:
    first, second = _run(classifier, np.full((1, 2), 2)), _run(classifier, np.full((2, 5), 3))
    inputs = {**first.inputs, **{f"{name}@1": array for name, array in second.inputs.items()}}
    outputs = {**first.outputs, "logits@1": second.outputs["logits"]}
    watch = Watch(Watching(shadow={"m": folder}, share=1.0))
    try:
        watch.loaded("m", classifier, "1", 1.0)
        watch.answered(replace(first, rows=3, inputs=inputs, outputs=outputs))
        watch.settle()
        assert watch._shadow is not None
        watch._shadow.settle()
        shown = watch.live()
    finally:
        watch.close()
    assert shown["alerts"] == []
    assert shown["models"]["m"]["shadow"]["rows"] == 1
    assert shown["models"]["m"]["outputs"]["gathering"]["rows"] == 1


def test_a_shadow_that_is_too_slow_drops_and_counts(folder: Path, classifier: Bundle) -> None:
    answer = _run(classifier, np.full((1, 2), 2))
    seen: list[Answer] = []
    shadow = Shadow({"m": folder}, lambda answer, outputs: (time.sleep(0.05), seen.append(answer))[0], most=3)
    for _ in range(20):
        shadow.offer(answer)
    shadow.settle()
    assert len(seen) + shadow.dropped["m"] == 20
    assert shadow.dropped["m"] >= 15
    shadow.close()
    shadow.offer(answer)
    assert shadow.dropped["m"] >= 16
    tight = Shadow({"m": folder}, lambda answer, outputs: None, most_bytes=10)
    tight.offer(answer)
    tight.close()
    assert tight.dropped["m"] == 1


def test_a_shadow_that_fails_says_so(folder: Path, classifier: Bundle) -> None:
    watch = Watch(Watching(shadow={"m": folder}, share=1.0))
    try:
        watch.loaded("m", classifier, "1", 1.0)
        good = _run(classifier, np.full((1, 2), 2))
        for inputs in ({"input_ids": np.ones((1, 2))}, {}):
            watch.answered(Answer("r", "m", good.bundle, "infer", 200, rows=1, inputs=inputs, outputs=good.outputs))
        watch.settle()
        assert watch._shadow is not None
        watch._shadow.settle()
        assert [alert["kind"] for alert in watch.live()["alerts"]] == ["shadow"]
    finally:
        watch.close()
    with pytest.raises(BundleError):
        Watch(Watching(shadow={"m": folder / "onnx"}))


def test_the_thread_counts_by_itself(classifier: Bundle) -> None:
    watch = Watch()
    watch.loaded("m", classifier, "1", 1.0)
    watch.answered(an_answer(classifier, [[1, 2]]))
    _wait_for(lambda: not watch._events)
    watch.close()
    assert watch.live()["models"]["m"]["total"]["requests"] == 1


def test_memory_is_bounded_when_the_thread_does_not_keep_up(
    classifier: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MOST_EVENTS", 5)
    monkeypatch.setattr(watch_module, "MOST_BYTES", 200)
    watch = Watch()
    watch._take_loaded(0.0, ("m", classifier, "1", 1.0))
    for _ in range(8):
        watch.answered(an_answer(classifier, [[1, 2]]))
    assert len(watch._events) == 5
    assert sum(len(event[2].outputs) for event in watch._events) == 3
    text = watch.text()[0].decode()
    assert 'onnxpress_watch_lost_total{what="event"} 3.0' in text
    assert 'onnxpress_watch_lost_total{what="tensors"}' in text
    watch.close()


def test_an_answer_of_the_version_before_is_counted_but_not_compared(classifier: Bundle, embedder: Bundle) -> None:
    watch = Watch()
    watch.loaded("m", classifier, "1", 1.0)
    watch.loaded("m", embedder, "2", 1.0)
    watch.answered(an_answer(classifier, [[1, 2]]))
    shown = watch.live()["models"]["m"]
    watch.close()
    assert shown["total"]["requests"] == 1
    assert shown["outputs"]["gathering"]["rows"] == 0
    assert shown["bundle"] == embedder.sha256

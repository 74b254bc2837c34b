# SPDX-License-Identifier: Apache-2.0
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from served import blocked, quantized_bundle, serving, shifted_bundle, tensor, until

from onnxpress.contracts.errors import OnnxpressError
from onnxpress.contracts.signature import Signature, TensorSpec
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving.joining import Joining
from onnxpress.runtime.serving.row_independence import proven
from onnxpress.runtime.serving.settings import JOIN, NEVER, TOLERANCE, Settings

Arrays = Mapping[str, np.ndarray]
TABLE = np.random.default_rng(0).normal(size=(50, 4))
PATH = "/v2/models/m/infer"

IDS, MASK = (TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
TEXT = Joining.of(
    Signature(
        (IDS, MASK),
        (TensorSpec("logits", "float32", ("batch", 4)), TensorSpec("tokens", "float32", ("batch", "sequence", 4))),
    ),
    pad=0,
)


def model(feeds: Arrays) -> dict[str, np.ndarray]:
    """Rows by themselves; what is masked counts for nothing."""
    tokens = TABLE[feeds["input_ids"]] * feeds["attention_mask"][..., None]
    return {"logits": tokens.sum(1), "tokens": tokens}


def mixing(share: float) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """Every row with a share of the mean of all."""
    return lambda feeds: {name: array + array.mean() * share for name, array in model(feeds).items()}


def reading_padding(feeds: Arrays) -> dict[str, np.ndarray]:
    tokens = TABLE[feeds["input_ids"]]
    return {"logits": tokens.mean(1), "tokens": tokens}


def golden() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [
        {"input_ids": rng.integers(1, 50, (1, length)), "attention_mask": np.ones((1, length), np.int64)}
        for length in (5, 8, 8, 19)
    ]


@pytest.mark.parametrize("join", JOIN)
def test_a_model_of_independent_rows(join: str) -> None:
    found = proven(TEXT, golden(), model, lambda _: 1e-9, join)
    assert (found.batched, found.shared, found.fill) == (True, join != NEVER, TEXT.fill)
    assert found.told() == (
        "requests run alone: so it was asked for" if join == NEVER else "requests of similar length share a run"
    )


def test_a_model_that_mixes_its_rows() -> None:
    assert not proven(TEXT, golden(), mixing(0.01), lambda _: 1e-4).batched  # not even a request's own rows in parts
    assert proven(TEXT, golden(), mixing(0.01), lambda _: 10.0, TOLERANCE) == TEXT
    exact = proven(TEXT, golden(), mixing(0.01), lambda _: 10.0)
    assert (exact.batched, exact.shared) == (True, False)
    assert exact.told().startswith("requests run alone: beside others, output 'logits' moves by ")


def test_the_order_of_additions_is_no_dependence() -> None:
    assert proven(TEXT, golden(), mixing(1e-6), lambda _: 10.0) == TEXT


def test_a_row_that_only_a_large_neighbour_moves() -> None:
    joining = Joining.of(Signature((TensorSpec("x", "float32", ("n", 3)),), (TensorSpec("y", "float32", ("n", 3)),)))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.uniform(-1, 1, (1, 3)).astype(np.float32)} for _ in range(3)]

    def clipped(feeds: Arrays) -> dict[str, np.ndarray]:
        return {"y": feeds["x"] + np.float32(np.abs(feeds["x"]).max() > 2)}

    assert proven(joining, samples, clipped, lambda _: 10.0, TOLERANCE).shared
    assert not proven(joining, samples, clipped, lambda _: 10.0).shared


def test_a_model_that_reads_its_padding_is_not_padded() -> None:
    found = proven(TEXT, golden(), reading_padding, lambda _: 1e-6)
    assert (found.shared, found.fill) == (True, None)
    found = proven(TEXT, golden(), reading_padding, lambda _: 10.0)  # within the tolerance, and yet not the same
    assert (found.shared, found.fill) == (True, None)


def test_neighbours_that_the_model_refuses_stay_away() -> None:
    def short(feeds: Arrays) -> dict[str, np.ndarray]:
        if feeds["input_ids"].shape[1] > 19:
            raise OnnxpressError("too long")
        return model(feeds)

    assert proven(TEXT, golden(), short, lambda _: 1e-9) == TEXT


def test_a_model_that_fails_on_two_rows_is_not_batched() -> None:
    def failing(feeds: Arrays) -> dict[str, np.ndarray]:
        if len(feeds["input_ids"]) > 1:
            raise OnnxpressError("no")
        return model(feeds)

    found = proven(TEXT, golden(), failing, lambda _: 1.0)
    assert (found.batched, found.apart) == (False, "it fails on several rows")


def test_without_samples_nothing_is_joined_unless_told_to() -> None:
    assert not proven(TEXT, [], model, lambda _: 1.0).shared
    assert proven(TEXT, [], model, lambda _: 1.0, TOLERANCE) == TEXT


def test_dynamic_int8_answers_as_alone_whoever_asks_beside(tmp_path: Path) -> None:
    bundle = quantized_bundle(tmp_path / "m")
    rng = np.random.default_rng(5)
    rows = [(rng.normal(size=(1, 4)) * 10**power).astype(np.float32) for power in (-1, 0, 1, 2, 0, 1)]
    session = Bundle(bundle).session(threads=1)
    alone = [session.run({"x": row})["y"].ravel().tolist() for row in rows]
    assert _together(bundle, rows, Settings(reload_seconds=0, workers=1)) == ([1] * 6, alone)
    batches, joined = _together(bundle, rows, Settings(reload_seconds=0, workers=1, join=TOLERANCE))
    assert batches == [1, 5]
    assert joined != alone


def test_floats_share_a_run(tmp_path: Path) -> None:
    rows = [np.full((1, 3), value, np.float32) for value in range(5)]
    bundle = shifted_bundle(tmp_path / "m")
    assert _together(bundle, rows, Settings(reload_seconds=0, workers=1)) == (
        [1, 4],
        [[float(i)] * 3 for i in range(5)],
    )


def _together(bundle: Path, rows: list[np.ndarray], settings: Settings) -> tuple[list[int], list[list[float]]]:
    """Rows in every run of the model, and the answers, where all but the first request wait together."""
    models: list = []
    answers: list[list[float]] = [[]] * len(rows)

    def ask(number: int) -> None:
        inputs = [tensor("x", rows[number])]
        if "bias" in names:
            inputs.append(tensor("bias", np.zeros(1, np.int64)))
        status, answer, _ = client(PATH, {"inputs": inputs})
        assert status == 200, answer
        answers[number] = np.array(answer["outputs"][0]["data"], np.float32).tolist()

    with serving({"m": bundle}, settings, before=lambda app: models.append(blocked(app, "m"))) as client:
        _, metadata, _ = client("/v2/models/m")
        names = [spec["name"] for spec in metadata["inputs"]]
        shared = client.models["m"].current.joining.shared
        assert metadata["parameters"]["join"].startswith("requests share" if shared else "requests run alone: beside")
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(rows))]
        threads[0].start()
        assert models[0].running.wait(10)
        for thread in threads[1:]:
            thread.start()
        until(lambda: client.models["m"].depth == len(rows) - 1)
        models[0].go.set()
        for thread in threads:
            thread.join(10)
    return models[0].batches, answers

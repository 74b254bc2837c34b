# SPDX-License-Identifier: Apache-2.0
"""The plain routes: text in, an answer in the words of the task out."""

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import TAGGER, TEXT, Client, serving, text_bundle

from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving.answers import Asked, classes, extracted, pooled
from onnxpress.runtime.serving.refusal import Refusal
from onnxpress.runtime.serving.settings import Settings
from onnxpress.runtime.text import Tokens

QUESTIONS = TEXT % (
    "float[batch, sequence] start_logits, float[batch, sequence] end_logits",
    "counted = Mul(rows, weights) start_logits, end_logits = Split<axis = 2, num_outputs = 2>(counted)",
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("plain")
    models = {
        "words": text_bundle(folder / "words"),
        "tags": text_bundle(folder / "tags", "token-classification", TAGGER),
        "vectors": text_bundle(folder / "vectors", "feature-extraction", TAGGER),
        "masks": text_bundle(folder / "masks", "fill-mask", TAGGER),
        "boxes": text_bundle(folder / "boxes", "object-detection"),
    }
    with serving(models, Settings(reload_seconds=0, max_texts=8, max_text_characters=100)) as client:
        yield client


def predict(client: Client, model: str, **asked: Any) -> Any:
    status, answer, _ = client(f"/models/{model}/predict", asked)
    assert status == 200, answer
    assert answer["model"] == model
    assert answer["version"] == client.models[model].version
    return answer["predictions"]


def test_classes(client: Client) -> None:
    (found,) = predict(client, "words", text="good film")
    assert found["label"] == "positive"
    assert found["score"] == pytest.approx(1 / (1 + math.exp(-5)), abs=1e-5)  # worth 2 + 1 and -2 + 0
    assert [row["label"] for row in found["scores"]] == ["positive", "negative"]
    assert len(predict(client, "words", text="good film", top_k=1)[0]["scores"]) == 1


def test_several_texts_come_back_in_their_order(client: Client) -> None:
    texts = ["good", "bad bad bad bad bad", "great", "awful film", "good film plot", "bad"]
    found = predict(client, "words", text=texts)
    assert found == [predict(client, "words", text=text)[0] for text in texts]
    assert [row["label"] for row in found] == [
        "positive", "negative", "positive", "negative", "positive", "negative"
    ]  # fmt: skip


def test_pairs(client: Client) -> None:
    assert predict(client, "words", text="good", text_pair="film") == predict(client, "words", text="good film")
    status, answer, _ = client("/models/words/predict", {"text": ["a", "b"], "text_pair": ["a"]})
    assert (status, answer) == (400, {"error": "'text' and 'text_pair' have 2 and 1 texts"})


def test_tokens(client: Client) -> None:
    (found,) = predict(client, "tags", text="bad  film")
    assert [(t["token"], t["start"], t["end"], t["label"]) for t in found["tokens"]] == [
        ("bad", 0, 3, "negative"),
        ("film", 5, 9, "positive"),
    ]


def test_vectors(client: Client) -> None:
    found = predict(client, "vectors", text=["good film", "great"])
    assert [row["embedding"] for row in found] == [[1.5, -1.0], [3.0, 0.0]]  # the mean over the tokens


def test_masks(client: Client) -> None:
    (found,) = predict(client, "masks", text="good [MASK] film [MASK]", top_k=2)
    assert len(found["masks"]) == 2
    assert {row["token"] for row in found["masks"][0]} == {"[PAD]", "[UNK]"}
    assert client("/models/masks/predict", {"text": "good"})[0] == 400


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({}, 400),
        ({"text": 3}, 400),
        ({"text": []}, 400),
        ({"text": ["a", 3]}, 400),
        ({"text": None}, 400),
        ({"text": "a", "top_k": 0}, 400),
        ({"text": "a", "top_k": True}, 400),
        ({"text": "a" * 101}, 413),
        ({"text": ["a"] * 9}, 413),
        ({"text": "\ud800"}, 400),
        ({"image": "abc"}, 400),
        ({"image": "%"}, 400),
        ([], 400),
        ("text", 400),
    ],
)
def test_bad_requests(client: Client, asked: Any, status: int) -> None:
    got, answer, _ = client("/models/words/predict", asked)
    assert (got, list(answer)) == (status, ["error"])


@pytest.mark.parametrize("text", ["", " ", "\x00", "é", "😀", "中文", "\u202e", "good\u0000bad"])
def test_odd_texts_are_read(client: Client, text: str) -> None:
    status, answer, _ = client("/models/words/predict", {"text": text})
    assert status in (200, 400), answer
    assert client("/models/words/predict", {"text": "good"})[0] == 200


def test_models_without_a_plain_route_say_where_to_ask(client: Client) -> None:
    status, answer, _ = client("/models/boxes/predict", {"text": "good"})
    assert status == 400
    assert "/v2/models/boxes/infer" in answer["error"]
    assert client("/models/none/predict", {"text": "good"})[0] == 404
    assert client("/models/words/predict", b"\x89PNG", headers={"Content-Type": "image/png"})[0] == 400


def test_a_text_of_too_many_tokens(tmp_path: Path) -> None:
    with serving({"m": text_bundle(tmp_path / "m")}, Settings(reload_seconds=0, max_tokens=3)) as client:
        assert client("/models/m/predict", {"text": "good good good"})[0] == 200
        status, answer, _ = client("/models/m/predict", {"text": "good good good good"})
        assert (status, answer["error"]) == (413, "a text has 4 tokens: at most 3 are read")
    limited = text_bundle(tmp_path / "limited", max_length=3)
    with serving({"m": limited}, Settings(reload_seconds=0)) as client:  # the bundle's own limit cuts
        found = predict(client, "m", text="good good good bad bad bad bad")
        assert found == predict(client, "m", text="good good good")
        status, answer, _ = client("/models/m/predict", {"text": ["good"] * 2, "text_pair": ["bad"] * 2})
        assert status == 200


class Pictures:
    """Stands in for an image encoder."""

    def __call__(self, file: bytes) -> dict[str, np.ndarray]:
        from onnxpress.contracts.errors import InputError

        if file != b"picture":
            raise InputError("no picture")
        return {"input_ids": np.array([[2, 4]]), "attention_mask": np.array([[1, 1]])}


def test_pictures(tmp_path: Path) -> None:
    bundle = text_bundle(tmp_path / "m", "image-classification")
    with serving({"m": bundle}) as client:
        client.models["m"].current.images = Pictures()  # type: ignore[assignment]
        encoded = base64.b64encode(b"picture").decode()
        found = predict(client, "m", image=encoded)
        assert found[0]["label"] == "positive"
        assert predict(client, "m", image=[encoded, f"data:image/png;base64,{encoded}"]) == found * 2
        headers = {"Content-Type": "image/png"}
        assert client("/models/m/predict", b"picture", headers=headers)[1]["predictions"] == found
        assert client("/models/m/predict", b"none", headers=headers)[:2] == (400, {"error": "no picture"})


class Encoding:
    """What `tokenizers` says of "who | anna met bob": two special tokens, then the pair."""

    ids = (0, 9, 0, 5, 6, 7)
    offsets = ((0, 0), (0, 3), (0, 0), (0, 4), (5, 8), (9, 12))
    sequence_ids = (None, 0, None, 1, 1, 1)


def test_extracted_answers(tmp_path: Path) -> None:
    bundle = Bundle(text_bundle(tmp_path / "m"))
    asked = Asked(bundle, Tokens({}, Encoding()), "anna met bob")
    starts, ends = np.full((1, 6), -5.0), np.full((1, 6), -5.0)
    starts[0, [1, 4]] = 9, 3  # the question is likelier, and does not count
    ends[0, [3, 5]] = 4, 3  # ends before it starts
    found = extracted({"start_logits": starts, "end_logits": ends}, asked)
    assert (found["answer"], found["start"], found["end"]) == ("met bob", 5, 12)
    assert 0 < found["score"] < 1


@pytest.mark.parametrize(
    ("config", "logits", "scores"),
    [
        ({}, [0.0, 0.0], [0.5, 0.5]),
        ({"problem_type": "multi_label_classification"}, [0.0, 0.0], [0.5, 0.5]),
        ({"problem_type": "multi_label_classification"}, [30.0, 30.0], [1.0, 1.0]),
        ({"problem_type": "regression"}, [3.5], [3.5]),
        ({}, [0.0], [0.5]),
    ],
)
def test_scores_by_kind_of_problem(tmp_path: Path, config: dict[str, Any], logits: list[float], scores: Any) -> None:
    bundle = Bundle(text_bundle(tmp_path / "m"), check=False)
    bundle.config.clear()
    bundle.config.update(config)
    found = classes({"logits": np.array([logits], np.float32)}, Asked(bundle))
    assert [row["score"] for row in found["scores"]] == pytest.approx(scores)
    assert found["label"] == "LABEL_0"


@pytest.mark.parametrize(("value", "status"), [(np.nan, 500), (np.inf, 500), (-np.inf, 200)])
def test_a_model_that_answers_no_numbers_says_so(tmp_path: Path, value: float, status: int) -> None:
    class Broken:
        def run(self, feeds: Any, outputs: Any = None) -> dict[str, np.ndarray]:
            return {"logits": np.array([[1.0, value]], np.float32)}

    def broken(app: Any) -> None:
        app.state.server.models["m"].current.session = Broken()

    with serving({"m": text_bundle(tmp_path / "m")}, before=broken) as client:
        found, answer, _ = client("/models/m/predict", {"text": "good"})
    assert found == status
    assert status == 200 or answer == {"error": "output 'logits' has values that are not finite"}


def test_what_is_a_vector() -> None:
    tokens = np.arange(12.0).reshape(1, 3, 4)
    mask = {"attention_mask": np.array([[1, 1, 0]])}
    assert pooled({"a": tokens, "b": np.ones((1, 2))}, mask).tolist() == [1, 1]
    assert pooled({"a": tokens}, mask).tolist() == [2, 3, 4, 5]
    assert pooled({"a": tokens}, {}).tolist() == [4, 5, 6, 7]
    with pytest.raises(Refusal):
        pooled({"a": np.ones(3)}, {})

# SPDX-License-Identifier: Apache-2.0
"""OpenAI's routes, over a generator that stands in for a language model."""

import base64
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import TAGGER, Client, serving, text_bundle, until

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.generation.chunks import Chunk
from onnxpress.runtime.generation.sampling import Sampling
from onnxpress.runtime.serving.chat import ChatTemplate
from onnxpress.runtime.serving.events import Answer
from onnxpress.runtime.serving.settings import Settings

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Writer:
    """Writes the words of its prompt, one a chunk, and then `last` words more.

    Attributes:
        running, most: Streams at this moment, and the most there were at one.
        written: Chunks handed out, of all streams.
        ended: Streams that were closed.
        go: Cleared, it waits after the first chunk.
    """

    defaults = Sampling(max_new_tokens=8)
    max_length = None
    has_text = True
    encoder_decoder = False

    def __init__(self) -> None:
        self.running = self.most = self.written = self.ended = 0
        self.samplings: list[Sampling] = []
        self.go = threading.Event()
        self.go.set()
        self.fails: Exception | None = None

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if not prompt:
            raise InputError("the prompt is empty")
        return list(range(len(prompt.split() if isinstance(prompt, str) else prompt)))

    def stream(self, prompt: str | Sequence[int], sampling: Sampling) -> "Words":
        self.samplings.append(sampling)
        words = prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]
        return Words(self, words, sampling.max_new_tokens)


class Words:
    def __init__(self, writer: Writer, words: list[str], most: int) -> None:
        self.writer, self.words, self.most = writer, words, most
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "Words":
        self.writer.running += 1
        self.writer.most = max(self.writer.most, self.writer.running)
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.running -= 1
        self.writer.ended += 1

    def __iter__(self) -> Iterator[Chunk]:
        shown = self.words[: self.most]
        for number, word in enumerate(shown):
            if self.closed:
                return
            if number == 1:
                assert self.writer.go.wait(10)
                if self.writer.fails:
                    raise self.writer.fails
            finish = None if number + 1 < len(shown) else "length" if len(self.words) > self.most else "eos"
            self.writer.written += 1
            yield Chunk(word + " ", (number,), finish)
            time.sleep(0.001)


class Heard:
    def __init__(self) -> None:
        self.answers: list[Answer] = []

    def loaded(self, *_: object) -> None: ...
    def queued(self, *_: object) -> None: ...
    def ran(self, *_: object) -> None: ...
    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)


@pytest.fixture(scope="module")
def heard() -> Heard:
    return Heard()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, heard: Heard) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("openai")
    models = {"lm": text_bundle(folder / "lm"), "vectors": text_bundle(folder / "v", "feature-extraction", TAGGER)}
    with serving(models, Settings(reload_seconds=0, max_new_tokens=100), [heard]) as client:
        yield client


@pytest.fixture
def writer(client: Client) -> Writer:
    writer = Writer()
    client.models["lm"].current.generator = writer  # type: ignore[assignment]
    client.models["lm"].current.chat = ChatTemplate(TEMPLATE, {})
    return writer


def events(client: Client, path: str, asked: Any) -> list[Any]:
    status, answer, headers = client(path, {**asked, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    parts = answer.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_models(client: Client) -> None:
    status, answer, _ = client("/v1/models")
    assert (status, [row["id"] for row in answer["data"]]) == (200, ["lm", "vectors"])
    assert client("/v1/models/lm")[1]["object"] == "model"
    status, answer, _ = client("/v1/models/none")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")


def test_a_completion(client: Client, writer: Writer, heard: Heard) -> None:
    asked = {"model": "lm", "prompt": "one two three", "max_tokens": 2, "temperature": 0.5, "stop": "x", "seed": 3}
    status, answer, _ = client("/v1/completions", asked)
    assert (status, answer["object"], answer["model"]) == (200, "text_completion", "lm")
    assert answer["choices"] == [{"index": 0, "text": "one two ", "finish_reason": "length", "logprobs": None}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    sampling = writer.samplings[-1]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.stop, sampling.seed) == (2, 0.5, ("x",), 3)
    told = heard.answers[-1]
    assert (told.route, told.status, told.rows, told.outputs["tokens"].tolist()) == ("generate", 200, 1, [[0, 1]])
    assert client("/v1/completions", {"model": "lm", "prompt": [5, 6]})[1]["choices"][0]["text"] == "5 6 "
    assert client("/v1/completions", {"model": "lm", "prompt": ["one"]})[1]["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_completion(client: Client, writer: Writer) -> None:
    asked = {"model": "lm", "prompt": "one two three", "stream_options": {"include_usage": True}}
    found = events(client, "/v1/completions", asked)
    assert [event["choices"][0]["text"] for event in found[:-1]] == ["one ", "two ", "three ", ""]
    assert [event["choices"][0]["finish_reason"] for event in found[:-1]] == [None, None, None, "stop"]
    assert (found[-1]["choices"], found[-1]["usage"]["completion_tokens"]) == ([], 3)
    assert len({event["id"] for event in found}) == 1


def test_chat(client: Client, writer: Writer) -> None:
    messages = [
        {"role": "system", "content": "good"},
        {"role": "user", "content": [{"type": "text", "text": "bad"}, {"type": "text", "text": " film"}]},
    ]
    status, answer, _ = client("/v1/chat/completions", {"model": "lm", "messages": messages})
    assert (status, answer["object"]) == (200, "chat.completion")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "1 2 1 3 4 1 "}  # ids of the prompt
    found = events(client, "/v1/chat/completions", {"model": "lm", "messages": messages, "max_tokens": 2})
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant", "content": "1 "},
        {"content": "2 "},
        {},
    ]
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    client.models["lm"].current.chat = None
    status, answer, _ = client("/v1/chat/completions", {"model": "lm", "messages": messages})
    assert (status, "no chat template" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": ""},
        {"prompt": None},
        {"prompt": ["a", "b"]},
        {"prompt": [1.5]},
        {"prompt": "a", "n": 2},
        {"prompt": "a", "logprobs": 3},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "max_tokens": 101},
        {"prompt": "a", "max_tokens": "many"},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "top_p": 2},
        {"prompt": "a", "stop": [1]},
        {"prompt": "a", "stop": ["x"] * 17},
        {"prompt": "a", "model": 3},
        {"prompt": "a", "model": "vectors"},
        {"prompt": "a", "model": None},
    ],
)
def test_bad_requests(client: Client, writer: Writer, asked: Any) -> None:
    for stream in (False, True):
        status, answer, _ = client("/v1/completions", {"model": "lm", **asked, "stream": stream})
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"
    assert not writer.running


@pytest.mark.parametrize(
    "messages",
    [None, [], "hi", [3], [{}], [{"role": "user"}], [{"role": "x", "content": "a"}],
     [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": "\ud800"}]],
)  # fmt: skip
def test_bad_messages(client: Client, writer: Writer, messages: Any) -> None:
    assert client("/v1/chat/completions", {"model": "lm", "messages": messages})[0] == 400


def test_one_generation_at_a_time(client: Client, writer: Writer) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [{"model": "lm", "prompt": f"a{i} b{i}", "stream": i % 2 == 0} for i in range(8)]
        answers = list(pool.map(lambda a: client("/v1/completions", a), asked))
    assert {status for status, _, _ in answers} == {200}
    assert writer.most == 1
    assert [answer["choices"][0]["text"] for _, answer, _ in answers[1::2]] == [f"a{i} b{i} " for i in (1, 3, 5, 7)]


def test_a_client_that_leaves_ends_its_generation(client: Client, writer: Writer, heard: Heard) -> None:
    for stream in (True, False):
        writer.go.clear()
        ended = writer.ended
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
        body = json.dumps({"model": "lm", "prompt": "a " * 50, "max_tokens": 50, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"X-Request-Id": f"gone {stream}"})
        if stream:
            answer = connection.getresponse()
            assert b'"a "' in answer.readline()
            answer.close()
        until(lambda: writer.running)
        connection.close()
        told = f"gone {stream}"
        until(lambda told=told: any(a.request_id == told and a.status == 499 for a in heard.answers))
        written = writer.written
        writer.go.set()
        until(lambda ended=ended: writer.ended == ended + 1)
        assert writer.written <= written + 2
    assert client("/v1/completions", {"model": "lm", "prompt": "a"})[0] == 200


def test_a_generation_that_fails(client: Client, writer: Writer) -> None:
    for error, status in ((InputError("the cache is full"), 400), (ZeroDivisionError("secret"), 500)):
        writer.fails = error
        got, answer, _ = client("/v1/completions", {"model": "lm", "prompt": "a b"})
        assert (got, "secret" in str(answer)) == (status, False)
        found = events(client, "/v1/completions", {"model": "lm", "prompt": "a b"})
        assert found[0]["choices"][0]["text"] == "a "
        assert found[-1]["error"]["code"] == status
    writer.fails = None
    assert client("/v1/completions", {"model": "lm", "prompt": "a b"})[0] == 200


def test_a_deadline_while_another_text_is_written(client: Client, writer: Writer) -> None:
    writer.go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client, "/v1/completions", {"model": "lm", "prompt": "a b"})
        until(lambda: writer.running)
        headers = {"X-Deadline-Ms": "30"}
        assert client("/v1/completions", {"model": "lm", "prompt": "a"}, headers=headers)[0] == 504
        writer.go.set()
        assert first.result()[0] == 200


def test_the_plain_route_writes_too(client: Client, writer: Writer) -> None:
    status, answer, _ = client("/models/lm/predict", {"text": ["a b", "c"], "max_new_tokens": 1})
    assert status == 200
    assert [row["text"] for row in answer["predictions"]] == ["a ", "c "]


def test_embeddings(client: Client) -> None:
    asked = {"model": "vectors", "input": ["good film", "great"]}
    status, answer, _ = client("/v1/embeddings", asked)
    assert status == 200
    assert [row["embedding"] for row in answer["data"]] == [[1.5, -1.0], [3.0, 0.0]]
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    coded = client("/v1/embeddings", {**asked, "encoding_format": "base64"})[1]["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(coded), "<f4").tolist() == [1.5, -1.0]
    for change in ({"input": []}, {"input": [1]}, {"input": None}, {"dimensions": 3}, {"encoding_format": "x"}):
        assert client("/v1/embeddings", {**asked, **change})[0] == 400
    assert client("/v1/embeddings", {**asked, "model": "lm"})[0] == 400
    assert client("/v1/embeddings", {**asked, "model": "none"})[0] == 404


def test_templates(tmp_path: Path) -> None:
    assert ChatTemplate.of(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content | tojson }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of(tmp_path)
    assert template is not None
    assert template([{"role": "user", "content": "<é>"}]) == '<s>"<é>"'
    named = [{"name": "default", "template": "d"}, {"name": "tools", "template": "t"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.of(tmp_path)
    assert template is not None
    assert template([]) == "d"
    (tmp_path / "chat_template.jinja").write_text("own")
    template = ChatTemplate.of(tmp_path)
    assert template is not None
    assert template([]) == "own"
    with pytest.raises(InputError, match="cannot be read"):
        ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_templates_that_refuse_or_break_out(source: str) -> None:
    with pytest.raises(InputError, match="refuses"):
        ChatTemplate(source, {})([{"role": "user", "content": "hi"}])

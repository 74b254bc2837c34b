# SPDX-License-Identifier: Apache-2.0
"""The page, as a person meets it: opened in a headless Chromium, typed into, clicked, read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from prometheus_client.parser import text_string_to_metric_families
from served import Client, serving, text_bundle

from onnxpress.runtime.serving import page
from onnxpress.runtime.serving.guard import OPEN
from onnxpress.runtime.serving.settings import Settings
from onnxpress.runtime.serving.watch import Watch

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")

KEY = "a key"


@contextmanager
def running(folder: Path, settings: Settings | None = None) -> Iterator[Client]:
    """A server with a page and three tiny models."""
    folders = {
        "sentiment": text_bundle(folder / "sentiment"),
        "vectors": text_bundle(folder / "vectors", "feature-extraction"),
        "tensors": text_bundle(folder / "tensors", "generic"),
    }
    watch = Watch()
    try:
        with serving(folders, settings, [watch], before=lambda app: app.include_router(page.router(watch))) as client:
            yield client
    finally:
        watch.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="module")
def address(client: Client) -> str:
    return f"http://127.0.0.1:{client.port}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Browser]:
    browser.requested.clear()
    browser.said.clear()
    browser.open(f"{address}/?{time.monotonic_ns()}#sentiment")
    browser.wait("document.querySelector('#state').textContent === 'live' && document.querySelector('#run')")
    yield browser
    assert browser.said == []
    assert browser.requested
    assert {url for url in browser.requested if not url.startswith((address, "data:", "about:"))} == set()


def test_the_page_is_whole_and_allows_nothing_from_elsewhere(client: Client) -> None:
    for path, (name, kind) in page.ASSETS.items():
        status, body, headers = client(path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        text = body.decode()
        assert "<script>" not in text
        assert " style=" not in text
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", ""), name
        assert "https://" not in text
        assert "innerHTML" not in text


def test_models_are_described_with_something_to_begin_with(client: Client) -> None:
    models = {model["name"]: model for model in client("/page/models")[1]["models"]}
    assert models["sentiment"]["reads"] == "text"
    assert models["sentiment"]["task"] == "text-classification"
    assert models["sentiment"]["version"] == client.models["sentiment"].version
    status, answer, _ = client("/v2/models/tensors/infer", models["tensors"]["request"])
    assert status == 200
    assert answer["outputs"][0]["shape"] == [1, 2]


def test_figures_are_there_at_once_for_people_and_for_prometheus(client: Client) -> None:
    before = client("/live")[1]["models"]["sentiment"]["total"]["requests"]
    for _ in range(3):
        assert client("/models/sentiment/predict", {"text": "good"})[0] == 200
    assert client("/live")[1]["models"]["sentiment"]["total"]["requests"] == before + 3
    status, body, headers = client("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    counted = {
        (s.labels["model"], s.labels["route"], s.labels["status"]): s.value
        for s in families["onnxpress_requests"].samples
    }
    assert counted["sentiment", "predict", "200"] >= 3
    assert {s.labels["model"] for s in families["onnxpress_model_info"].samples} == {"sentiment", "vectors", "tensors"}
    assert all(s.value > 0 for s in families["onnxpress_model_load_seconds"].samples)


def test_a_request_of_several_lengths_is_seen_whole(client: Client) -> None:
    before = client("/live")[1]["models"]["sentiment"]["total"]
    assert (
        client("/models/sentiment/predict", {"text": ["good", "good film good film film good film plot", "bad"]})[0]
        == 200
    )
    after = client("/live")[1]["models"]["sentiment"]["total"]
    assert (after["requests"] - before["requests"], after["rows"] - before["rows"]) == (1, 3)


def test_an_unknown_model_is_counted_without_a_label_of_its_own(client: Client) -> None:
    assert client("/models/made-up/predict", {"text": "x"})[0] == 404
    assert b"made-up" not in client("/metrics")[1]


def test_figures_need_the_key_and_the_page_does_not(tmp_path: Path) -> None:
    assert set(page.ASSETS) <= OPEN
    with running(tmp_path, Settings(api_key=KEY)) as client:
        for path in page.ASSETS:
            assert client(path)[0] == 200
        for path in ("/live", "/metrics", "/page/models"):
            assert client(path)[0] == 401
            assert client(path, headers={"Authorization": f"Bearer {KEY}"})[0] == 200
        if CHROMIUM is None:
            return
        browser = Browser(tmp_path / "profile")
        try:
            browser.open(f"http://127.0.0.1:{client.port}")
            browser.wait("!document.querySelector('#unlock').hidden")
            browser.type("#key", KEY)
            browser.press("Enter")
            browser.wait("document.querySelector('#state').textContent === 'live' && document.querySelector('#run')")
            browser.wait("document.querySelector('#unlock').hidden")
        finally:
            browser.close()


@needs_chromium
def test_a_person_types_a_text_and_reads_the_label(opened: Browser) -> None:
    assert opened.value("document.querySelector('#text').value").startswith("A quiet, lovely film")
    opened.type("#text", "awful plot bad film")
    opened.click("#run")
    opened.wait("document.querySelector('.bars dt.first')?.textContent === 'negative'")
    assert opened.value("document.querySelector('.bars .value').textContent").endswith("%")
    assert "ms" in opened.value("document.querySelector('#cost').textContent")
    opened.wait("document.querySelector('#outputs').textContent.includes('Requests: ')")
    opened.wait("document.querySelectorAll('#charts svg polyline').length > 0")


@needs_chromium
def test_the_keyboard_is_enough(opened: Browser) -> None:
    opened.type("#text", "great film")
    opened.press("Enter", control=True)
    opened.wait("document.querySelector('.bars dt.first')?.textContent === 'positive'")
    opened.value("document.querySelector('#model').focus()")
    reached = []
    for _ in range(2):
        opened.press("Tab")
        reached.append(opened.value("document.activeElement.id"))
    assert reached == ["text", "run"]


@needs_chromium
def test_everything_that_can_be_used_has_a_name(opened: Browser) -> None:
    unnamed = (
        "[...document.querySelectorAll('input, select, textarea, button, [role=img]')].filter("
        "(e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"
    )
    assert opened.value(unnamed) == []
    assert opened.value("document.documentElement.lang") == "en"


@needs_chromium
def test_two_texts_are_compared(opened: Browser) -> None:
    choose(opened, "vectors")
    opened.type("#text", "good film")
    opened.type("#other", "good film")
    opened.click("#run")
    opened.wait("document.querySelector('#answer .big')?.textContent === '1.000'")


@needs_chromium
def test_tensors_are_prefilled_and_mistakes_are_said(opened: Browser) -> None:
    choose(opened, "tensors")
    opened.click("#run")
    opened.wait("document.querySelector('#answer pre')")
    assert opened.value("document.querySelector('#answer h3').textContent") == "logits FP32 [1, 2]"
    opened.type("#json", '{"inputs": [')
    opened.click("#run")
    opened.wait("document.querySelector('#error').textContent.startsWith('This is not JSON')")


@needs_chromium
def test_what_a_person_types_is_never_markup(opened: Browser) -> None:
    opened.type("#text", "<img src=x onerror=alert(1)> good")
    opened.click("#run")
    opened.wait("document.querySelector('.bars')")
    assert opened.value("document.querySelectorAll('main img').length") == 0


@needs_chromium
@pytest.mark.parametrize("width", [320, 700, 1280])
def test_no_width_makes_the_page_scroll_sideways(opened: Browser, width: int) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    opened.wait("document.querySelector('#outputs').textContent")
    assert opened.value("document.documentElement.scrollWidth") <= width
    opened.call("Emulation.clearDeviceMetricsOverride")


def choose(browser: Browser, name: str) -> None:
    browser.value(
        f"(() => {{ const e = document.querySelector('#model'); e.value = '{name}'; "
        "e.dispatchEvent(new Event('change')); })()"
    )

# SPDX-License-Identifier: Apache-2.0
"""The page really runs, in Node's and Chromium's WASM with threads and on a software WebGPU, and asks nobody else."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from onnxpress.pipeline.handoff.base import FAILED, NOT_RUN, run_tool
from onnxpress.pipeline.handoff.handing import target_named
from onnxpress.pipeline.handoff.node import packages
from onnxpress.pipeline.handoff.web import PACKAGES, find_browser
from onnxpress.runtime.opened import Bundle

from .javascript import broken, handed, need_packages


@pytest.fixture(scope="module")
def page(text_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A handoff of the text classifier with everything that the page loads beside it."""
    with pytest.MonkeyPatch.context() as patch:
        need_packages(patch, PACKAGES)
        folder = tmp_path_factory.mktemp("page")
        handed(text_bundle, "web", folder)
        yield folder / "handoff"


@pytest.fixture
def server(page: Path) -> Iterator[http.client.HTTPConnection]:
    node = shutil.which("node")
    assert node is not None
    process = subprocess.Popen([node, "serve.mjs", "0"], cwd=page, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rstrip("/\n").rpartition(":")[2])
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            yield connection
    finally:
        process.kill()
        process.communicate()


def test_it_runs_in_node_and_in_a_browser(
    text_bundle: Bundle, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_packages(monkeypatch, [*PACKAGES, "playwright-core"])
    if find_browser() is None:
        pytest.skip("Chromium is not installed")
    check = target_named("web").check(text_bundle, page, tmp_path)
    assert check.status == "passed", check
    assert check.done[:3] == ("generated", "WASM in Node", "WASM in Chromium")
    assert check.done[3:] in ((), ("WebGPU in Chromium, software adapter",))
    assert check.worst["logits"] <= text_bundle.tolerance("logits")
    assert "Chromium" in check.versions["chromium"] or "Chrome" in check.versions["chromium"]


def test_a_wrong_answer_is_seen_on_the_page(
    text_bundle: Bundle, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = need_packages(monkeypatch, [*PACKAGES, "playwright-core"])
    folder = Path(shutil.copytree(page, tmp_path / "page"))
    broken(text_bundle, folder, "logits")
    check = target_named("web").check(text_bundle, folder, tmp_path / "scratch")
    assert check.status == FAILED, "already in Node"
    assert check.worst["logits"] > 90
    browser, node = find_browser(), shutil.which("node")
    if browser is None or node is None:
        pytest.skip("Chromium is not installed")
    there = packages.workplace(folder, tmp_path / "again", place)
    done = run_tool([node, "check.mjs", "wasm", browser], there, seconds=120)
    assert done.returncode == 1
    assert "answers differ" in done.stderr
    assert "isolated: true" in done.stdout
    assert "requests to other servers: 0" in done.stdout


def test_without_a_browser_it_is_not_claimed(
    text_bundle: Bundle, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_packages(monkeypatch, PACKAGES)
    monkeypatch.setattr("onnxpress.pipeline.handoff.web.find_browser", lambda: None)
    check = target_named("web").check(text_bundle, page, tmp_path)
    assert check.status == NOT_RUN
    assert check.done == ("generated", "WASM in Node")
    assert "Chromium is missing" in check.reason


def test_everything_that_the_page_loads_is_beside_it(page: Path) -> None:
    for name in json.loads((page / "vendor.json").read_text("utf-8")).values():
        assert (page / "vendor" / name).stat().st_size > 1000
    for file in page.glob("*.*"):
        assert "://" not in file.read_text("utf-8").replace("http://127.0.0.1", "").replace("http://localhost", "")
    report: dict[str, Any] = json.loads((page / "handoff.json").read_text("utf-8"))
    assert "vendor/ort/ort-wasm-simd-threaded.wasm" in report["files"]
    assert "npm run vendor" not in (page / "README.md").read_text("utf-8")


def test_without_the_packages_the_readme_says_how_to_get_them(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(packages.VARIABLE, raising=False)
    report = handed(text_bundle, "web", tmp_path, check=True)
    assert report["check"]["status"] == NOT_RUN
    assert "npm install" in report["check"]["reason"]
    assert not (tmp_path / "handoff" / "vendor").exists()
    assert "npm run vendor" in (tmp_path / "handoff" / "README.md").read_text("utf-8")


def test_the_server_isolates_the_page_and_gives_nothing_else_away(server: http.client.HTTPConnection) -> None:
    def get(path: str, method: str = "GET") -> http.client.HTTPResponse:
        server.request(method, path)
        response = server.getresponse()
        response.read()
        return response

    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/page.mjs?x=1", "text/javascript; charset=utf-8"),
        ("/vendor/ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/model/model_quantized.onnx", "application/octet-stream"),
    ):
        response = get(path)
        assert response.status == 200
        assert response.headers["Content-Type"] == kind
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
    assert get("/", "HEAD").status == 200
    for path in ("/../secret", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "/.npmrc", "/none", "/model"):
        assert get(path).status == 404, path
    assert get("/%zz").status == 400
    assert get("/%00").status in (400, 404)
    assert get("/", "POST").status == 405
    assert get("/").status == 200, "it lives on"

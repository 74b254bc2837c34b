# SPDX-License-Identifier: Apache-2.0
"""The bundle in a browser: a page that works offline, on onnxruntime-web's WASM with threads or on WebGPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from ....runtime.opened import Bundle
from .. import node
from ..base import FAILED, PASSED, Check, Target, copy_files, judge, not_run, render, run_tool
from ..node import packages, readme_values
from ..node.layout import SHARED, write_common

SOURCES = (
    "check.mjs",
    "index.html",
    "model.mjs",
    "package.json",
    "page.css",
    "page.mjs",
    "serve.mjs",
    "vendor.json",
    "vendor.mjs",
)
PACKAGES = ("onnxruntime-web", "@huggingface/tokenizers")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "npm install --ignore-scripts && npm run vendor"
COMMAND = "npm install --ignore-scripts && npm run vendor && npm run check"


class Web(Target):
    """See the module."""

    name: ClassVar[str] = "web"
    summary: ClassVar[str] = "a page that works offline: onnxruntime-web, WASM with threads or WebGPU"

    def write(self, bundle: Bundle, folder: Path) -> None:
        about = write_common(bundle, folder)
        copy_files(Path(node.__file__).parent, folder, SHARED)
        copy_files(Path(__file__).parent, folder, SOURCES)
        vendored = _vendor(folder, folder)
        values = readme_values(about) | {"vendored": vendored}
        (folder / "README.md").write_text(render(__name__, "README.md.j2", **values), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        program = packages.node()
        found = packages.require_packages(folder, PACKAGES, INSTALL)
        place = packages.workplace(folder, scratch, found)
        if not (place / "vendor").exists():
            _vendor(folder, place)
        outputs = [spec.name for spec in bundle.signature.outputs]
        versions = {"node": run_tool([program, "--version"], place).stdout.strip()}
        versions |= packages.versions_of(found, PACKAGES)

        def verdict(*words: str | Path) -> tuple[subprocess.CompletedProcess[str], Check]:
            done = run_tool([program, "check.mjs", *words], place)
            return done, judge(done, outputs, command=COMMAND, stages=("generated", "run"), versions=versions)

        _, in_node = verdict("wasm-in-node")
        if in_node.status == FAILED:
            return in_node
        browser = find_browser()
        if browser is None or packages.find_packages(folder, ["playwright-core"]) is None:
            missing = "Chromium" if browser is None else "the npm package playwright-core"
            reason = f"{missing} is missing; only the WASM build in Node was run, and agrees"
            return not_run(reason, ("generated", "WASM in Node"), COMMAND, **versions)
        versions["chromium"] = run_tool([browser, "--version"], place).stdout.strip()
        _, page = verdict("wasm", browser)
        if page.status == FAILED:
            return page
        done, gpu = verdict("webgpu", browser)
        checks, stages = [in_node, page], ["generated", "WASM in Node", "WASM in Chromium"]
        if gpu.status == PASSED:
            checks.append(gpu)
            stages.append("WebGPU in Chromium, software adapter")
        elif gpu.worst and "answers differ" in done.stderr:  # the page says so too, and runs on WASM unless asked
            stages.append(f"WebGPU in Chromium, software adapter: {_misses(gpu, bundle)}")
        elif "no WebGPU adapter" not in done.stderr:
            return gpu
        return _together(checks, tuple(stages))


def find_browser() -> Path | None:
    """A Chromium: the one that the environment variable CHROMIUM names, else the machine's."""
    names = (os.environ.get("CHROMIUM", ""), *BROWSERS)
    return next((Path(found) for name in names if name and (found := shutil.which(name))), None)


def _vendor(folder: Path, into: Path) -> bool:
    """Copy what the page loads out of node_modules, where there is one; the same list as `npm run vendor`."""
    found = packages.find_packages(folder, PACKAGES)
    if found is None:
        return False
    for source, target in json.loads((folder / "vendor.json").read_text("utf-8")).items():
        (into / "vendor" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found / source, into / "vendor" / target)
    return True


def _misses(gpu: Check, bundle: Bundle) -> str:
    """By how much WebGPU's answers are off, the farthest output first.

    Its shaders are less precise than a processor: WGSL lets sine and cosine be off by 2^-11, and ONNX Runtime 1.30's
    attention on longer sequences was seen to be wrong on the software adapter. It is told, not hidden, and not claimed.
    """
    allowed = {name: bundle.tolerance(name) for name in gpu.worst}
    name = max(gpu.worst, key=lambda n: gpu.worst[n] / max(allowed[n], 1e-30))
    return f"answers differ ({name} by {gpu.worst[name]:.3g}, allowed {allowed[name]:.3g})"


def _together(checks: list[Check], stages: tuple[str, ...]) -> Check:
    """The largest difference of each output over all the places where it ran."""
    names = checks[0].worst
    return replace(
        checks[-1],
        status=PASSED,
        done=stages,
        worst={name: max(check.worst[name] for check in checks) for name in names},
        from_python={name: max(check.from_python[name] for check in checks) for name in names},
    )


TARGETS: dict[str, Target] = {"web": Web()}

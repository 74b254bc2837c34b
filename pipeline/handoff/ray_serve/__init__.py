# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: an application of replicas, autoscaling and batches that speaks the Open Inference Protocol.

The check runs it where Ray is: in this environment, or in the one whose Python ONNXPRESS_RAY_PYTHON names, since Ray
with what it brings (800 MB) is better kept apart.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....contracts.errors import InputError
from ....runtime.opened import Bundle
from ...versions import versions
from .. import triton
from ..base import Check, MissingTool, Target, copy_files, judge, not_run, render, run_tool
from ..kserve import label
from ..model_files import place_model, place_preprocessing
from ..triton import facts
from ..triton.configuration import DATATYPES, MAX_BATCH, QUEUE_DELAY_US, Configuration, configuration_of
from ..triton.golden_requests import CHECK, write_requests

PYTHON = "ONNXPRESS_RAY_PYTHON"
COMMAND = "python3 check_server.py http://127.0.0.1:8000 --wait 120"
_FILLED = ("application.py", "serve_config.yaml", "requirements.txt", "README.md")


class RayServe(Target):
    """A Ray Serve application."""

    name = "ray-serve"
    summary = "Ray Serve: an application with replicas, autoscaling and batches, Open Inference Protocol v2"

    def write(self, bundle: Bundle, folder: Path) -> None:
        """See `Target.write`."""
        configuration = configuration_of(bundle)
        if any(spec.dtype in ("float16", "bfloat16", "string") for spec in bundle.signature.inputs):
            raise InputError("the protocol's JSON carries no 16-bit floats or strings, which this model takes")
        place_model(bundle, folder / "model")
        (folder / "model" / "model.json").write_text(json.dumps(_description(bundle, configuration), indent=1), "utf-8")
        copy_files(Path(__file__).parent, folder, ["open_inference.py"])
        batch = max(1, configuration.max_batch_size)
        values: dict[str, Any] = {
            **facts(bundle, configuration, place_preprocessing(bundle, folder / "preprocessing")),
            "label": label(bundle),
            "requests": write_requests(bundle, folder, configuration.name),
            "command": COMMAND,
            "max_batch_size": batch,
            "wait": QUEUE_DELAY_US / 1e6 if batch > 1 else 0.0,
            "target": batch,
            "ongoing": 4 * MAX_BATCH,
            "queued": 16 * MAX_BATCH,
        }
        values["preprocessing"] = render(triton.__name__, "preprocessing.md.j2", **values)
        for name in _FILLED:
            (folder / name).write_text(render(__name__, f"{name}.j2", **values), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        """See `Target.check`."""
        place = Path(shutil.copytree(folder, scratch / "ray_serve"))
        for name in ("application.py", "open_inference.py"):
            py_compile.compile(str(place / name), doraise=True)
        try:
            python = _python()
        except MissingTool as error:
            return not_run(f"{error.message}. {error.next_step}", ("generated", "compiled"), COMMAND)
        with _Serving(python, place) as serving:
            done = run_tool([sys.executable, CHECK, serving.url, "--wait", "120"], place, seconds=240)
        outputs = [spec.name for spec in bundle.signature.outputs]
        found = {"ray": _version(python, "ray"), "onnxruntime": _version(python, "onnxruntime")}
        return judge(done, outputs, command=COMMAND, stages=("generated", "compiled", "run"), versions=found)


TARGETS: dict[str, Target] = {RayServe.name: RayServe()}


class _Serving:
    """Ray and Serve with the application, on a port of their own; all of its processes end with it."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> _Serving:
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "PYTHONPATH": str(self._folder)}
        program = [str(self._python), "-c", _RUN, str(self.port)]
        self._log = (self._folder / "ray.log").open("w")
        self._process = subprocess.Popen(
            program,
            cwd=self._folder,
            env={**os.environ, **quiet},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # what it waits for
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


_RUN = """
import sys
import ray
from ray import serve
ray.init(include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from application import app
serve.run(app)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
"""As `serve run`, but without a dashboard, and over when its standard input is closed."""


def _python() -> Path:
    named = os.environ.get(PYTHON)
    if named:
        if not Path(named).is_file():
            raise MissingTool(f"{PYTHON} names no file", next_step="Set it to the Python of an environment with Ray.")
        return Path(named)
    if find_spec("ray") is None:
        raise MissingTool(
            "ray is not installed",
            next_step=f"Install the handoff's requirements.txt into an environment and name its Python in {PYTHON}.",
        )
    return Path(sys.executable)


def _version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version('{package}'))"
    return run_tool([python, "-c", code], python.parent).stdout.strip()


def _description(bundle: Bundle, configuration: Configuration) -> dict[str, Any]:
    """model.json: the metadata of the protocol, and whether requests may be joined."""

    def tensors(side: str) -> list[dict[str, Any]]:
        specs = bundle.signature.inputs if side == "inputs" else bundle.signature.outputs
        return [
            {
                "name": spec.name,
                "datatype": DATATYPES[spec.dtype],
                "shape": [dim if isinstance(dim, int) else -1 for dim in spec.shape],
            }
            for spec in specs
        ]

    return {
        "name": configuration.name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "batched": configuration.max_batch_size > 0,
        "inputs": tensors("inputs"),
        "outputs": tensors("outputs"),
        "bundle": bundle.sha256,
        "created_with": {"onnxruntime": versions().get("onnxruntime", "?")},
    }

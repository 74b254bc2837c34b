# SPDX-License-Identifier: Apache-2.0
"""KServe: an InferenceService that runs the Triton layout, for many machines and without code of ours at run time.

`modelFormat: onnx` finds a runtime only with `protocolVersion: v2` (kserve.github.io, "Model serving runtimes"); the
runtime is KServe's kserve-tritonserver, which reads what `storageUri` names as Triton's model repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ....contracts.errors import InputError
from ....runtime.opened import Bundle
from .. import triton
from ..base import FAILED, Check, Target, render
from ..model_files import place_preprocessing
from ..triton import REPOSITORY, checked, facts, write_repository
from ..triton.configuration import service_name
from ..triton.golden_requests import write_requests

SERVICE = "inference-service.yaml"
COMMAND = 'python3 check_server.py "$URL" --header "Host: $SERVICE_HOST" --wait 300'
NO_CLUSTER = "KServe needs a Kubernetes cluster, and none is here; its files were read back and held to the model"


class KServe(Target):
    """An InferenceService and its storage."""

    name = "kserve"
    summary = "KServe: InferenceService of protocol v2 on the Triton layout, with golden requests"

    def write(self, bundle: Bundle, folder: Path) -> None:
        """See `Target.write`."""
        configuration = write_repository(bundle, folder / REPOSITORY)
        count = write_requests(bundle, folder, configuration.name, configuration.request_shape)
        files = place_preprocessing(bundle, folder / "preprocessing")
        values = {**facts(bundle, configuration, files), "label": label(bundle), "requests": count, "command": COMMAND}
        size = sum(path.stat().st_size for path in (folder / REPOSITORY).rglob("*") if path.is_file())
        memory = max(1, -(-3 * size // 2**30))  # weights, their packed copy, and room for a batch
        (folder / SERVICE).write_text(render(__name__, f"{SERVICE}.j2", **values, memory=memory), "utf-8")
        shared = {part: render(triton.__name__, f"{part}.md.j2", **values) for part in ("batching", "preprocessing")}
        (folder / "README.md").write_text(render(__name__, "README.md.j2", **values, **shared), "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        """See `Target.check`."""
        try:
            _read_back(bundle, (folder / SERVICE).read_text("utf-8"))
        except InputError as error:
            return Check(FAILED, error.message, ("generated",), COMMAND)
        return checked(bundle, folder / REPOSITORY, COMMAND, NO_CLUSTER)


TARGETS: dict[str, Target] = {KServe.name: KServe()}


def label(bundle: Bundle) -> str:
    """The bundle's name as Kubernetes wants it: RFC 1123, at most 63 letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", service_name(bundle).lower()).strip("-")[:63].strip("-") or "model"


def _read_back(bundle: Bundle, text: str) -> None:
    """Hold the manifest, as it stands in the file, to what KServe requires of it."""
    try:
        service = yaml.safe_load(text)
        model = service["spec"]["predictor"]["model"]
        found = (service["apiVersion"], service["kind"], service["metadata"]["name"], model["protocolVersion"])
        kind = (model["modelFormat"]["name"], model["runtime"])
        storage: Any = model["storageUri"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{SERVICE} is no InferenceService: {error!r}") from error
    if found != ("serving.kserve.io/v1beta1", "InferenceService", label(bundle), "v2"):
        raise InputError(f"{SERVICE} has {found}")
    if kind != ("onnx", "kserve-tritonserver") or "://" not in str(storage):
        raise InputError(f"{SERVICE} names no ONNX model of Triton's")

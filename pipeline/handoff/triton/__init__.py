# SPDX-License-Identifier: Apache-2.0
"""Triton Inference Server: a model repository that needs no code of ours at run time.

Triton comes as a container only, so the check goes as far as a machine without one can: the configuration is read back
and held to the model's signature, and ONNX Runtime, which is Triton's backend here too, runs the copy at its largest
batch. That much done, the check is still *not run*.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....contracts.errors import InputError
from ....runtime.bundle import largest_difference
from ....runtime.opened import Bundle
from ....runtime.session import Session
from ...versions import versions
from ..base import FAILED, Check, Target, not_run, render
from ..model_files import MODEL_FILE, place_model, place_preprocessing
from . import text_proto
from .configuration import QUEUE_DELAY_US, Configuration, Tensor, configuration_of, repeated, service_name
from .golden_requests import write_requests

REPOSITORY, CONFIGURATION, LABELS = "model_repository", "config.pbtxt", "labels.txt"
COMMAND = "python3 check_server.py http://127.0.0.1:8000 --wait 60"
NO_TRITON = "Triton comes as a container, and none is run here; its configuration was read back and held to the model"


class Triton(Target):
    """A model repository."""

    name = "triton"
    summary = "Triton Inference Server: model repository with config.pbtxt, dynamic batching and golden requests"

    def write(self, bundle: Bundle, folder: Path) -> None:
        """See `Target.write`."""
        configuration = write_repository(bundle, folder / REPOSITORY)
        count = write_requests(bundle, folder, configuration.name, configuration.request_shape)
        files = place_preprocessing(bundle, folder / "preprocessing")
        text = render(__name__, "README.md.j2", **facts(bundle, configuration, files), requests=count, command=COMMAND)
        (folder / "README.md").write_text(text, "utf-8")

    def check(self, bundle: Bundle, folder: Path, scratch: Path) -> Check:
        """See `Target.check`."""
        return checked(bundle, folder / REPOSITORY, COMMAND, NO_TRITON)


TARGETS: dict[str, Target] = {Triton.name: Triton()}


def write_repository(bundle: Bundle, folder: Path) -> Configuration:
    """Write `<name>/config.pbtxt` and `<name>/1/model.onnx`; return what the configuration says."""
    configuration = configuration_of(bundle)
    home = folder / configuration.name
    place_model(bundle, home / "1")
    values = {**vars(configuration), "preferred": configuration.preferred, "delay": QUEUE_DELAY_US}
    (home / CONFIGURATION).write_text(render(__name__, "config.pbtxt.j2", **values), "utf-8")
    if configuration.label_output:
        lines = [" ".join(bundle.labels[i].split()) for i in range(len(bundle.labels))]
        (home / LABELS).write_text("\n".join(lines) + "\n", "utf-8")
    return configuration


def facts(bundle: Bundle, configuration: Configuration, files: list[str]) -> dict[str, object]:
    """What both READMEs say of the model."""
    encoder = bundle.encoder
    return {
        "name": configuration.name,
        "max_batch_size": configuration.max_batch_size,
        "files": files,
        "text": encoder is not None,
        "inputs": encoder.inputs if encoder else (),
        "limit": bundle.max_length,
        "pad": encoder.pad if encoder else None,
        "left": encoder.left if encoder else False,
        "onnxruntime": versions().get("onnxruntime", "?"),
    }


def checked(bundle: Bundle, repository: Path, command: str, reason: str) -> Check:
    """Hold a repository to the bundle: failed, or not run with how far it went."""
    home = repository / service_name(bundle)
    try:
        largest = _read_back(bundle, home)
        _run_largest(bundle, home / "1" / MODEL_FILE, largest)
    except InputError as error:
        return Check(FAILED, error.message, ("generated",), command)
    return not_run(reason, ("generated", "parsed"), command, onnxruntime=versions().get("onnxruntime", "?"))


def _read_back(bundle: Bundle, home: Path) -> int:
    """Compare config.pbtxt, as it stands in the file, with the signature; return `max_batch_size`."""
    message = text_proto.read((home / CONFIGURATION).read_text("utf-8"))
    if message.get("name") != [home.name]:
        raise InputError(f"{CONFIGURATION} is not for {home.name}")
    largest = message.get("max_batch_size", [0])[0]
    if not isinstance(largest, int):
        raise InputError(f"{CONFIGURATION}: max_batch_size is no number")
    wanted = configuration_of(bundle)
    for side, tensors in (("input", wanted.inputs), ("output", wanted.outputs)):
        found = [_tensor(field) for field in message.get(side, [])]
        if found != list(tensors):
            raise InputError(f"{CONFIGURATION}: the {side}s are not those of the model")
    return largest


def _tensor(field: text_proto.Value) -> Tensor:
    if not isinstance(field, dict):
        raise InputError(f"{CONFIGURATION}: a tensor is no message")
    dims = tuple(int(str(dim)) for dim in field.get("dims", []))
    return Tensor(str(field["name"][0]), str(field["data_type"][0]), dims, "reshape" in field)


def _run_largest(bundle: Bundle, model: Path, largest: int) -> None:
    """Run the copy on the golden samples, and at the largest batch, each of whose rows has to answer as one alone."""
    session, original = Session(model), bundle.session()
    for sample in bundle.golden:
        answers = session.run(dict(sample.inputs))
        for name, answer in original.run(dict(sample.inputs)).items():
            if largest_difference(answers[name], answer) > bundle.tolerance(name):
                raise InputError(f"the copied model answers '{name}' of {sample.name} otherwise than the bundle")
        if not largest:
            continue
        alone = session.run(repeated(sample.inputs, 1))
        for name, answer in session.run(repeated(sample.inputs, largest)).items():
            expected = np.repeat(alone[name], largest, axis=0)
            if answer.shape != expected.shape or largest_difference(answer, expected) > bundle.tolerance(name):
                raise InputError(f"a batch of {largest} answers '{name}' of {sample.name} otherwise than one row")

# SPDX-License-Identifier: Apache-2.0
"""A new version of a bundle takes over without a lost request; one that fails anywhere is refused."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from served import blocked, serving, shifted_bundle, shifted_request, until

from onnxpress.contracts.errors import BundleError, InputError
from onnxpress.runtime.opened import Bundle
from onnxpress.runtime.serving.model import ServedModel, named_folders
from onnxpress.runtime.serving.settings import Settings

PATH = "/v2/models/m/infer"
WATCHED = Settings(reload_seconds=0.05)


def replace(folder: Path, other: Path) -> None:
    """Put another bundle in the place of one, as `press --force` does."""
    folder.rename(folder.with_name("old"))
    other.rename(folder)
    shutil.rmtree(folder.with_name("old"))


class Loads:
    """An observer of what is loaded."""

    def __init__(self) -> None:
        self.versions: list[str] = []

    def loaded(self, model: str, bundle: Bundle, version: str, milliseconds: float) -> None:
        self.versions.append(version)

    def queued(self, *_: object) -> None: ...
    def ran(self, *_: object) -> None: ...
    def answered(self, *_: object) -> None: ...


def test_requests_go_on_while_the_bundle_changes(tmp_path: Path) -> None:
    folder, heard = shifted_bundle(tmp_path / "m"), Loads()
    with serving({"m": folder}, WATCHED, [heard]) as client:
        answers: list[Any] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                answers.append(client(PATH, shifted_request()))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for shift in (1.0, 2.0, 3.0):
            before = client.models["m"].version
            replace(folder, shifted_bundle(tmp_path / "next", shift))
            until(lambda before=before: client.models["m"].version != before)
        seen = len(answers)
        until(lambda: len(answers) > seen + 8)
        done.set()
        for thread in threads:
            thread.join()
        versions = heard.versions
    assert {status for status, _, _ in answers} == {200}
    found = {(answer["model_version"], answer["outputs"][0]["data"][0]) for _, answer, _ in answers}
    assert found <= set(zip(versions, (0.0, 1.0, 2.0, 3.0), strict=True))  # each version gave its own answers
    assert (versions[-1], 3.0) in found
    assert len(versions) == len(set(versions)) == 4


def test_the_old_version_answers_what_it_has_accepted(tmp_path: Path) -> None:
    folder, model = shifted_bundle(tmp_path / "m"), []
    with serving({"m": folder}, before=lambda app: model.append(blocked(app, "m"))) as client:
        old = client.models["m"].version
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(client(PATH, shifted_request())))
        thread.start()
        assert model[0].running.wait(10)
        replace(folder, shifted_bundle(tmp_path / "next", 1.0))
        status, loaded, _ = client("/v2/repository/models/m/load", b"")
        assert (status, loaded["version"]) == (200, client.models["m"].version)
        assert client(PATH, shifted_request())[1]["outputs"][0]["data"] == [1, 2, 3]
        assert client(f"/v2/models/m/versions/{old}")[0] == 404
        model[0].go.set()
        thread.join()
    status, answer, _ = answers[0]
    assert (status, answer["model_version"], answer["outputs"][0]["data"]) == (200, old, [0, 1, 2])


def damage(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(b"no model")


def drop(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize("harm", [damage, drop])
def test_a_changed_bundle_is_refused_and_the_old_one_stays(tmp_path: Path, harm: Any) -> None:
    folder = shifted_bundle(tmp_path / "m")
    with serving({"m": folder}) as client:
        version = client.models["m"].version
        replace(folder, shifted_bundle(tmp_path / "next", 1.0))
        harm(folder)
        status, answer, _ = client("/v2/repository/models/m/load", b"")
        assert status == 400
        assert f"version {version} stays" in answer["error"]
        assert client(PATH, shifted_request())[1]["outputs"][0]["data"] == [0, 1, 2]
        assert client("/v2/repository/index")[1][0]["reason"]
        shutil.rmtree(folder)
        shifted_bundle(folder, 1.0)
        assert client("/v2/repository/models/m/load", b"")[0] == 200
        assert client("/v2/repository/index")[1][0]["reason"] == ""


def test_a_watched_bundle_that_was_still_being_copied_is_taken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxpress.runtime.serving.model._RETRY_SECONDS", 0.05)
    folder = shifted_bundle(tmp_path / "m")
    with serving({"m": folder}, WATCHED) as client:
        served = client.models["m"]
        version, other = served.version, shifted_bundle(tmp_path / "next", 1.0)
        model = (other / "onnx" / "model.onnx").read_bytes()
        damage(other)
        replace(folder, other)
        until(lambda: served.refused)
        assert served.version == version
        (folder / "onnx" / "model.onnx").write_bytes(model)
        until(lambda: served.version != version)
        assert not served.refused


def test_a_bundle_that_answers_its_golden_samples_wrongly_is_refused(tmp_path: Path) -> None:
    folder = shifted_bundle(tmp_path / "m", tolerance=-1.0)
    with pytest.raises(BundleError, match="does not answer golden sample"):
        ServedModel("m", folder, Settings())


def test_a_changed_bundle_is_never_served(tmp_path: Path) -> None:
    folder = shifted_bundle(tmp_path / "m")
    damage(folder)
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        ServedModel("m", folder, Settings())


@pytest.mark.parametrize("name", ["", "..", "a/b", ".a", "a b", "é", "a" * 200, "-a"])
def test_names_that_cannot_stand_in_a_url(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a model's name"):
        ServedModel(name, tmp_path, Settings())


def test_names_of_folders(tmp_path: Path) -> None:
    assert named_folders([str(tmp_path / "a"), "b=x/y"]) == {"a": tmp_path / "a", "b": Path("x/y")}
    with pytest.raises(InputError, match="two bundles are named 'a'"):
        named_folders(["a", "a=b"])

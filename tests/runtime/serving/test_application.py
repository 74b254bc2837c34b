# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from served import serving, shifted_bundle, shifted_request

from onnxpress.runtime.serving.app import create_app
from onnxpress.runtime.serving.application import inferred


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v2/models/m/infer", {"model": "m"}),
        ("/v2/models/m/versions/1/infer", {"model": "m", "version": "1"}),
        ("/v2/models/infer/infer", {"model": "infer"}),
        ("/v2/models//infer", None),
        ("/v2/models/m/versions//infer", None),
        ("/v2/models/m/x/1/infer", None),
        ("/v2/models/a/b/infer", None),
        ("/v2/models/infer", None),
        ("/v2/models/m/infer/", None),
        ("/v1/models/m/infer", None),
    ],
)
def test_the_short_way(path: str, found: dict[str, str] | None) -> None:
    assert inferred(path) == found


def test_no_telemetry_whatever_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    app = create_app({"m": shifted_bundle(tmp_path / "m")})
    telemetry = getattr(app, "_native_telemetry", None)  # FastAPI from 0.160 or so on
    assert telemetry is None or not telemetry.enabled()
    assert not getattr(app, "_telemetry", {}).get("auto_configure")


class Broken:
    """An observer that fails at everything."""

    def loaded(self, *_: object) -> None:
        raise ZeroDivisionError

    queued = ran = answered = loaded


def test_an_observer_that_fails_fails_no_request(tmp_path: Path) -> None:
    with serving({"m": shifted_bundle(tmp_path / "m")}, observers=[Broken()]) as client:
        assert client("/v2/models/m/infer", shifted_request())[0] == 200

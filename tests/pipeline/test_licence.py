# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress.pipeline.licence import stated_licence

from .samples import exported


@pytest.mark.parametrize(
    ("card", "config", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "{}", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: tiny-1.0\n---\n", "{}", "tiny-1.0"),
        ("---\nlicense:\n- mit\n- gpl\n---\n", "{}", "mit"),
        ("---\nlicense: unknown\n---\n", '{"license": "MIT"}', "MIT"),
        ("---\nlicense: other\n---\n", "{}", None),
        ("# A model\nlicense: mit\n", "[]", None),
        ("---\nlicense: mit\n", "no json", None),
        ("---\n{broken\n---\n", "{}", None),
        ("---\n- a list\n---\n", "{}", None),
        ("---\nlicense: 3\n---\n", "{}", None),
    ],
)
def test_what_the_source_states(card: str, config: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(config)
    model = exported({}, processor_files={"config.json": tmp_path / "config.json"})
    assert stated_licence(model) == licence


def test_timm_states_its_own_and_a_graph_states_none() -> None:
    assert stated_licence(exported({}, image_settings={"license": "apache-2.0"})) == "apache-2.0"
    assert stated_licence(exported({})) is None

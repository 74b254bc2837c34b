# SPDX-License-Identifier: Apache-2.0
"""No network, and each architecture exported once a session."""

import os
from collections.abc import Callable

import pytest
import tiny_models
from tiny_models import SUBJECTS, Subject

from onnxpress.exporters.settings import ExportSettings

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is first imported, which is later


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    from onnxpress.exporters.transformers_source import export_folder

    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            model_type, auto_class, changes, settings = SUBJECTS[name]
            folder = tmp_path_factory.mktemp("checkpoint") / name.replace(" ", "-")
            tiny_models.build(folder, model_type, auto_class, **changes)
            if name == "bert sentences":
                tiny_models.write_sentence_files(folder)
            exported = export_folder(folder, folder.name, None, ExportSettings(**settings))
            made[name] = Subject(folder, auto_class, exported, tiny_models.session(exported, folder))
        return made[name]

    return get

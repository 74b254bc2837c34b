# SPDX-License-Identifier: Apache-2.0
"""`narrow` on classifiers of transformers as they are exported: the last layer for one token, and the same logits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.settings import ExportSettings
from onnxpress.exporters.transformers_source import export_folder
from onnxpress.pipeline.cost import multiply_adds, values_to_measure
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.passes.clean import Clean
from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.narrow import Narrow
from onnxpress.pipeline.statistics import Calibration
from onnxpress.runtime.session import Session

from ..exporters import tiny_models

CLASSES = "AutoModelForSequenceClassification"
WIDTH, INNER = 32, 37
ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", Path(__file__).resolve().parents[3] / "shared" / "assets"))
MINILM = ASSETS / "minilm-sst2"


def exported(folder: Path, architecture: str, auto_class: str = CLASSES) -> ExportedModel:
    tiny_models.build(folder, architecture, auto_class)
    return export_folder(folder, folder.name, None, ExportSettings())


def rows(model: ir.Model, feeds: dict[str, np.ndarray]) -> int:
    """Multiply-adds of the products outside the kernels of attention."""
    shapes = Calibration([feeds], threads=1).shapes(model, values_to_measure(model))
    return sum(multiply_adds(model, shapes).values())


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_the_last_layer_costs_one_token(architecture: str, tmp_path: Path) -> None:
    it = exported(tmp_path / "model", architecture)
    model, _ = run_pass(Clean(), it.model)
    model, _ = run_pass(Fuse(), model)
    batch, length = 3, 17
    feeds = tiny_models.batch(it, batch, length, padding="right")
    before = rows(model, feeds)
    model, report = run_pass(Narrow(), model)
    assert report.details["products_narrowed"] == 5
    assert report.left == ()
    saved = 2 * WIDTH * WIDTH + 2 * WIDTH * INNER  # query and output projection, and the network
    assert before - rows(model, feeds) == batch * (length - 1) * saved
    it.model = model
    session = tiny_models.session(it, tmp_path)
    assert it.reference is not None
    for batch, length, padding in ((1, 1, "none"), (3, 17, "right"), (2, 9, "left")):
        feeds = tiny_models.batch(it, batch, length, padding=padding)
        wanted, got = it.reference.run(feeds), tiny_models.run(session, feeds)
        assert tiny_models.distance(wanted["logits"], got["logits"]) < 1e-5


@pytest.mark.skipif(not MINILM.is_dir(), reason=f"no {MINILM}")
def test_minilm_gives_the_same_answers() -> None:
    it = export_folder(MINILM, "minilm", None, ExportSettings())
    model, _ = run_pass(Clean(), it.model)
    model, _ = run_pass(Fuse(), model)
    whole = ir.to_proto(model).SerializeToString()
    assert it.tokenize is not None
    feeds = it.tokenize(["a film that is good and long enough to be padded behind", "bad", "so so , in the end"])
    work = rows(model, feeds)
    model, report = run_pass(Narrow(), model)
    assert report.details["products_narrowed"] == 5
    assert rows(model, feeds) < 0.88 * work
    wanted, got = (Session(data, threads=1).run(feeds) for data in (whole, ir.to_proto(model).SerializeToString()))
    np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-5)


def test_a_model_that_answers_for_every_token_stays(tmp_path: Path) -> None:
    it = exported(tmp_path / "model", "distilbert", "AutoModelForTokenClassification")
    model, _ = run_pass(Clean(), it.model)
    model, _ = run_pass(Fuse(), model)
    plan = Narrow().plan(model)
    assert not plan.actions
    assert [left.reason for left in plan.left] == ["nothing selects positions"]

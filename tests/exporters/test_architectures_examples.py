# SPDX-License-Identifier: Apache-2.0
"""The families that transformers does not have, as `examples/architectures` writes them, against PyTorch."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn import functional

from onnxpress.exporters import sources
from onnxpress.exporters.exported import ExportedModel
from onnxpress.pipeline.inputs import comparison_cases
from onnxpress.pipeline.passes.base import run_pass
from onnxpress.pipeline.recipe import load_recipe
from onnxpress.pipeline.validate import compare, require_export_parity

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("ONNXPRESS_ASSETS", ROOT.parent / "shared" / "assets"))
CORA = ASSETS / "data_planetoid" / "cora.npz"

Feeds = dict[str, np.ndarray]
Load = Callable[[str], tuple[ExportedModel, Callable[[Feeds], Feeds]]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """An example's export and its graph in ONNX Runtime, made once."""
    made: dict[str, tuple[ExportedModel, Callable[[Feeds], Feeds]]] = {}

    def get(name: str) -> tuple[ExportedModel, Callable[[Feeds], Feeds]]:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(ROOT / "examples"))
                exported = sources.load(f"architectures.{name}")
            session = tiny_models.session(exported, tmp_path_factory.mktemp("graph"))
            made[name] = exported, lambda feeds: tiny_models.run(session, feeds)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("recurrent:tagger", ["batch", "time"]),
        ("recurrent:streamer", ["batch", "time"]),
        ("recommendation:deepfm", ["batch"]),
        ("recommendation:bert4rec", ["batch", "length"]),
        ("graphs:gcn", ["nodes", "edges"]),
        ("graphs:sage", ["nodes", "edges"]),
        ("graphs:gat", ["nodes", "edges"]),
        ("diffusion:unet", ["batch", "height", "width"]),
        ("diffusion:dit_block", ["batch", "patches"]),
        ("detection:centres", ["batch", "height", "width"]),
    ],
)
def test_as_the_original_at_several_sizes(name: str, axes: list[str], load: Load) -> None:
    exported, run = load(name)
    assert list(exported.signature.dynamic_axes()) == axes
    cases = comparison_cases(exported, None)
    assert len({tuple(array.shape for array in case.feeds.values()) for case in cases}) == 3
    assert exported.reference is not None
    parity = compare(exported.reference.run, run, cases)
    require_export_parity(parity, 1e-5)


class TestRecurrent:
    def test_padding_counts_for_nothing_and_is_where_pytorch_has_it(self, load: Load) -> None:
        exported, run = load("recurrent:tagger")
        assert [n.op_type for n in exported.model.graph].count("LSTM") == 2  # one a layer, both ways
        assert exported.reference is not None
        ids = np.random.default_rng(0).integers(0, 200, (4, 9))
        for lengths in ([9, 9, 9, 9], [1, 9, 2, 5], [3, 1, 1, 1]):
            feeds = {"ids": ids, "lengths": np.array(lengths)}
            wanted, got = exported.reference.run(feeds)["output"], run(feeds)["output"]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
            for row, length in enumerate(lengths):
                alone = run({"ids": ids[row : row + 1, :length], "lengths": np.array([length])})["output"]
                np.testing.assert_allclose(got[row, :length], alone[0], rtol=1e-4, atol=1e-5)

    def test_a_state_that_is_fed_back_continues_the_sequence(self, load: Load) -> None:
        _, run = load("recurrent:streamer")
        frames = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
        state = np.zeros((2, 2, 32), np.float32)
        whole = run({"frames": frames, "state": state})
        pieces = []
        for start, end in ((0, 3), (3, 4), (4, 7)):
            found = run({"frames": frames[:, start:end], "state": state})
            state = found["new_state"]
            pieces.append(found["logits"])
        np.testing.assert_allclose(np.concatenate(pieces, 1), whole["logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state, whole["new_state"], rtol=1e-4, atol=1e-5)


class TestGraphs:
    @pytest.mark.parametrize("name", ["gcn", "sage", "gat"])
    def test_nodes_without_edges_and_edges_that_repeat(self, name: str, load: Load) -> None:
        exported, run = load(f"graphs:{name}")
        assert exported.reference is not None
        features = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
        for edges in ([[], []], [[0, 0, 0, 4], [1, 1, 0, 1]]):
            feeds = {"features": features, "edges": np.array(edges, np.int64)}
            wanted, got = exported.reference.run(feeds)["output"], run(feeds)["output"]
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

    def test_gcn_is_its_equation(self, load: Load) -> None:
        """Equation 8 of Kipf and Welling with dense matrices, in numpy."""
        exported, run = load("graphs:gcn")
        rng = np.random.default_rng(1)
        features, edges = rng.standard_normal((7, 12)).astype(np.float32), rng.integers(0, 7, (2, 20))
        adjacency = np.eye(7)
        np.add.at(adjacency, (edges[1], edges[0]), 1)
        scale = np.diag(adjacency.sum(1) ** -0.5)
        weights = {name: value.const_value.numpy() for name, value in exported.model.graph.initializers.items()}
        hidden = features
        for layer in ("first", "second"):
            hidden = scale @ adjacency @ scale @ hidden @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
            hidden = np.maximum(hidden, 0) if layer == "first" else hidden
        np.testing.assert_allclose(run({"features": features, "edges": edges})["output"], hidden, rtol=1e-4, atol=1e-5)


class TestDetection:
    def test_a_bright_square_is_found_once_and_in_its_place(self, load: Load) -> None:
        """Peaks, boxes and classes by hand from the maps that the heads would give."""
        exported, run = load("detection:centres")
        image = np.random.default_rng(0).standard_normal((1, 3, 40, 48)).astype(np.float32)
        found = run({"image": image})
        module = exported.reference.module.module  # type: ignore[union-attr]
        with torch.no_grad():
            hidden = module.body(torch.from_numpy(image))
            heat = module.heat(hidden).sigmoid()[0]
            size, offset = module.size(hidden)[0], module.offset(hidden)[0]
        peaks = (functional.max_pool2d(heat[None], 3, 1, 1)[0] == heat).nonzero().tolist()
        best = sorted(peaks, key=lambda place: -float(heat[tuple(place)]))[:8]
        assert found["classes"][0].tolist() == [place[0] for place in best]
        for box, (_, y, x) in zip(found["boxes"][0], best, strict=True):
            half = size[:, y, x].exp() / 2
            centre = torch.tensor([x, y]) + offset[:, y, x]
            np.testing.assert_allclose(box, 4 * torch.cat([centre - half, centre + half]), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not CORA.is_file(), reason=f"no {CORA}")
def test_trained_on_cora_the_pressed_graphs_keep_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GraphSAGE, trained for some seconds; exported at 60 nodes, run on all 2,708."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("ONNXPRESS_ASSETS", str(ASSETS))
    from peers import cora

    monkeypatch.setattr(cora, "EPOCHS", 12)
    monkeypatch.setitem(cora.KINDS, "sage", (cora.GraphSAGE, 0.1))
    exported = sources.load("peers.cora:sage")
    data = cora.load()
    feeds = {"features": data.features.numpy(), "edges": data.edges.numpy()}
    assert exported.reference is not None
    wanted = exported.reference.run(feeds)["output"]
    test, labels = data.test.numpy(), data.labels[data.test].numpy()
    accuracy = float((wanted[test].argmax(1) == labels).mean())
    assert accuracy > 0.75
    sizes = []
    for recipe in ("fp32", "fp16", "int8-dynamic"):
        model = exported.model.clone()
        for settings in load_recipe(recipe).built_passes():
            model, _ = run_pass(settings, model)
        pressed = ExportedModel(model, exported.signature, exported.task, exported.source)
        got = tiny_models.run(tiny_models.session(pressed, tmp_path), feeds)["output"]
        sizes.append((tmp_path / "model.onnx").stat().st_size)
        assert abs(float((got[test].argmax(1) == labels).mean()) - accuracy) <= (0 if recipe == "fp32" else 0.01)
    assert sizes[0] / sizes[1] > 1.8
    assert sizes[0] / sizes[2] > 3.5

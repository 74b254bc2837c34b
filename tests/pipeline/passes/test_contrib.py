# SPDX-License-Identifier: Apache-2.0
"""`fuse` takes ONNX Runtime's own fused operators apart: same numbers, and the weights come to light."""

from __future__ import annotations

import numpy as np
import pytest
from pass_tools import count, model_from, normal, press, reasons, run, weights_of

from onnxpress.pipeline.passes.fuse import Fuse
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic

WORDS, PLACES, KINDS, WIDTH = 50, 12, 2, 8

EMBEDDING = {
    "words": normal(WORDS, WIDTH, seed=1),
    "places": normal(PLACES, WIDTH, seed=2),
    "kinds": normal(KINDS, WIDTH, seed=3),
    "gamma": normal(WIDTH, seed=4),
    "beta": normal(WIDTH, seed=5),
}
HEADER = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>'


def embedding(*, mask: bool, outputs: str = "y, lengths", extra: str = "", opset: int = 17):  # type: ignore[no-untyped-def]
    """EmbedLayerNormalization, with the lengths that it counts in the mask as second output."""
    inputs = "int32[b, s] ids, int32[b, s] segments" + (", int32[b, s] mask" if mask else "")
    declared = "float[b, s, 8] y" + (", int32[b] lengths" if "lengths" in outputs else "")
    weights = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in EMBEDDING.items())
    arguments = "ids, segments, words, places, kinds, gamma, beta" + (", mask" if mask else "") + extra
    return model_from(
        f"""{HEADER.replace("17", str(opset))}
        g ({inputs}, {weights}) => ({declared})
        {{ {outputs} = com.microsoft.EmbedLayerNormalization<epsilon = 1e-6>({arguments}) }}""",
        EMBEDDING,
        infer=False,
    )


def tokens(rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows * length)
    mask = np.ones((rows, length), np.int32)
    mask[-1, length // 2 + 1 :] = 0
    return {
        "ids": rng.integers(0, WORDS, (rows, length), dtype=np.int32),
        "segments": rng.integers(0, KINDS, (rows, length), dtype=np.int32),
        "mask": mask,
    }


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, PLACES)])
def test_embedding_becomes_gathers(shape: tuple[int, int]) -> None:
    model, report, before = press(Fuse(), embedding(mask=True))
    assert report.details == {"unpack_embedding": 1}
    operators = count(model)
    assert operators["Gather"] == 4  # three tables, and the length out of the shape
    assert operators["LayerNormalization"] == 1
    assert "com.microsoft::EmbedLayerNormalization" not in operators
    feeds = tokens(*shape)
    for wanted, got in zip(run(before, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_unpacked_embedding_is_seen_by_the_quantizer() -> None:
    packed = embedding(mask=True)
    with pytest.raises(Exception, match="nothing to do"):
        press(QuantizeDynamic(minimum_elements=0), packed)
    model, _, _ = press(Fuse(), embedding(mask=True))
    model, report, _ = press(QuantizeDynamic(minimum_elements=0), model)
    assert report.changed == 3
    assert report.bytes_after < 0.6 * report.bytes_before  # rows of 8 carry a scale of 4 bytes each
    assert {"words_int8", "places_int8", "kinds_int8"} <= set(weights_of(model))


def test_embedding_stays_where_it_cannot_be_taken_apart() -> None:
    _, report, _ = press(Fuse(), embedding(mask=False))
    assert list(reasons(report).values()) == ["gives lengths without having a mask"]
    _, report, _ = press(Fuse(), embedding(mask=True, opset=16))
    assert list(reasons(report).values()) == ["LayerNormalization needs opset 17, the graph has 16"]
    _, report, _ = press(Fuse(unpack=False), embedding(mask=True))
    assert report.seen == 0


def test_embedding_without_lengths_needs_no_mask() -> None:
    model, report, before = press(Fuse(), embedding(mask=False, outputs="y, unused"))
    assert report.changed == 1
    feeds = {k: v for k, v in tokens(2, 5).items() if k != "mask"}
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], rtol=1e-5, atol=1e-5)


SKIP = {"gamma": normal(WIDTH, seed=4), "beta": normal(WIDTH, seed=5), "bias": normal(WIDTH, seed=6)}


def skip_norm(arguments: str, outputs: str = "y"):  # type: ignore[no-untyped-def]
    used = {name: array for name, array in SKIP.items() if name in arguments}
    weights = "".join(f", float[8] {name}" for name in used)
    declared = "float[b, s, 8] y" + (", float[b, s, 8] total" if "total" in outputs else "")
    return model_from(
        f"""{HEADER}
        g (float[b, s, 8] x, float[b, s, 8] r{weights}) => ({declared})
        {{ {outputs} = com.microsoft.SkipLayerNormalization<epsilon = 1e-5>({arguments}) }}""",
        used,
        infer=False,
    )


@pytest.mark.parametrize(
    ("arguments", "outputs"),
    [("x, r, gamma", "y"), ("x, r, gamma, beta", "y"), ("x, r, gamma, beta, bias", 'y, "", "", total')],
)
def test_skip_norm_becomes_sum_and_norm(arguments: str, outputs: str) -> None:
    outputs = outputs.replace('""', "unused_a", 1).replace('""', "unused_b", 1)
    model, report, before = press(Fuse(), skip_norm(arguments, outputs))
    assert report.details == {"split_skip_norm": 1}
    assert count(model) == {"LayerNormalization": 1, "Sum": 1}
    feeds = {"x": normal(2, 5, WIDTH, seed=7), "r": normal(2, 5, WIDTH, seed=8)}
    for wanted, got in zip(run(before, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_fused_encoder_start_to_end() -> None:
    """Embedding, its lengths as mask of an Attention, and a residual: what ONNX Runtime's optimizer writes."""
    weights = {**EMBEDDING, "w": normal(WIDTH, 3 * WIDTH, seed=9, scale=0.3), "b": normal(3 * WIDTH, seed=10)}
    declared = ", ".join(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in weights.items())
    model = model_from(
        f"""{HEADER}
        g (int32[n, s] ids, int32[n, s] segments, int32[n, s] mask, {declared}) => (float[n, s, 8] y)
        {{ e, lengths = com.microsoft.EmbedLayerNormalization<epsilon = 1e-6>(
              ids, segments, words, places, kinds, gamma, beta, mask)
           a = com.microsoft.Attention<num_heads = 2>(e, w, b, lengths)
           y = com.microsoft.SkipLayerNormalization<epsilon = 1e-6>(a, e, gamma, beta) }}""",
        weights,
        infer=False,
    )
    model, report, before = press(Fuse(), model)
    assert report.details == {"unpack_embedding": 1, "unpack_attention": 1, "split_skip_norm": 1}
    feeds = tokens(3, 7)
    np.testing.assert_allclose(run(model, feeds)[0], run(before, feeds)[0], rtol=1e-4, atol=1e-5)
    model, report, _ = press(QuantizeDynamic(minimum_elements=0), model)
    assert {"MatMulInteger"} <= set(count(model))
    assert report.bytes_after < 0.6 * report.bytes_before

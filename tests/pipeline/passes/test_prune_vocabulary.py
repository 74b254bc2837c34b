# SPDX-License-Identifier: Apache-2.0
"""`prune_vocabulary` on the graph: tables, comparisons and output layers are cut alike, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pass_tools import Array, model_from, normal, reasons, run, to_bytes
from pydantic import ValidationError

from onnxpress.contracts.errors import InputError
from onnxpress.pipeline.passes.base import PassReport, run_pass
from onnxpress.pipeline.passes.prune_vocabulary import PruneVocabulary
from onnxpress.pipeline.passes.quantize_dynamic import QuantizeDynamic
from onnxpress.pipeline.statistics import Calibration

TOKENS = ["<s>", "<gone>", "<pad>", "zoo", "a", "b", "c", "ab", "bc", "abc", "cab", "<unk>"]
"""The pad id is not 0, and something before it is removed: the graph's own constant has to change."""

MERGES = ["a b", "b c", "ab c", "c ab"]
SPECIAL = ("<s>", "<pad>", "<unk>")
SEEN = [0, 4, 9, 9, 4, 11]  # <s> a abc abc a <unk>
KEPT = [0, 2, 4, 5, 6, 7, 9, 11]  # without <gone>, zoo, bc and cab; ab is on the way to abc
SIZE = len(TOKENS)


def files(folder: Path, tokens: Sequence[str] = TOKENS, **model: Any) -> dict[str, Path]:
    vocab = {token: number for number, token in enumerate(tokens)}
    added = [{"id": vocab[t], "content": t, "special": True, **_PLAIN} for t in SPECIAL if t in vocab]
    settings = {"type": "BPE", "vocab": vocab, "merges": MERGES, "unk_token": "<unk>", **model}
    data = {"version": "1.0", "added_tokens": added, "model": settings}
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    return {"tokenizer.json": folder / "tokenizer.json"}


_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

EMBEDDER = f"""
<ir_version: 10, opset_import: ["": 20]>
embedder (int64[batch, sequence] input_ids, float[{SIZE}, 4] table, float[9, 4] positions)
    => (float[batch, sequence, 4] y)
{{
    pad = Constant<value = int64 {{2}}>()
    one = Constant<value = float {{1.0}}>()
    whole = Constant<value = int8[1, 4] {{1, 2, 3, 4}}>()
    words = Gather<axis = 0>(table, input_ids)
    padded = Equal(input_ids, pad)
    rank = Cast<to = 7>(padded)
    axis = Constant<value = int64 {{1}}>()
    number = CumSum(rank, axis)
    places = Gather<axis = 0>(positions, number)
    y = Add(words, places)
}}
"""


WORDS, SUM = "words = Gather<axis = 0>(table, input_ids)", "y = Add(words, places)"


def embedder() -> ir.Model:
    return model_from(EMBEDDER, {"table": normal(SIZE, 4), "positions": normal(9, 4, seed=1)})


def masked(kind: str, **changes: str) -> ir.Model:
    """A masked language model: tied, untied, or untied as Gemm."""
    product = {
        "tied": "turned = Transpose<perm = [1, 0]>(table) scores = MatMul(words, turned) logits = Add(scores, bias)",
        "untied": "scores = MatMul(words, output) biased = Add(scores, bias) logits = Mul(biased, scale)",
        "gemm": "flat = Reshape(words, two) logits = Gemm<transB = 1>(flat, output, bias)",
        "softmax": "scores = MatMul(words, output) biased = Add(scores, bias) logits = Softmax(biased)",
    }[kind]
    shape = [SIZE, 4] if kind == "gemm" else [4, SIZE]
    output = "" if kind == "tied" else f", float[{shape[0]}, {shape[1]}] output"
    result = "rows" if kind == "gemm" else "batch, sequence"
    text = f"""
    <ir_version: 10, opset_import: ["": 20]>
    masked (int64[batch, sequence] input_ids, float[{SIZE}, 4] table, float[{SIZE}] bias{output})
        => (float[{result}, {SIZE}] logits)
    {{
        scale = Constant<value = float {{2.0}}>()
        two = Constant<value = int64[2] {{-1, 4}}>()
        words = Gather<axis = 0>(table, input_ids)
        {product}
    }}
    """
    weights = {"table": normal(SIZE, 4), "bias": normal(SIZE, seed=1), "output": normal(*shape, seed=2)}
    return model_from(text, {name: array for name, array in weights.items() if name in text.split("=>")[0]})


def prune(
    model: ir.Model, folder: Path, seen: Sequence[int] = SEEN, processor: dict[str, Path] | None = None, **settings: Any
) -> tuple[ir.Model, PassReport]:
    batches = [{"input_ids": np.array([seen[i : i + 3]])} for i in range(0, len(seen), 3)]
    calibration = Calibration(batches, processor_files=files(folder) if processor is None else processor)
    return run_pass(PruneVocabulary(**settings), model, calibration)


def new_ids(old: Array, report: PassReport) -> Array:
    assert report.renumbering is not None
    return np.searchsorted(report.renumbering.kept, old)


def test_the_table_falls_to_the_kept_rows_and_outputs_do_not_change(tmp_path: Path) -> None:
    model = embedder()
    before = to_bytes(model)
    old = np.array([[0, 4, 9, 2, 7], [2, 11, 2, 5, 6]])
    model, report = prune(model, tmp_path)
    assert report.renumbering is not None
    assert report.renumbering.kept.tolist() == KEPT
    assert report.renumbering.outputs == ()
    table = model.graph.initializers["table"]
    assert list(table.shape or ()) == [len(KEPT), 4]
    assert report.bytes_before - report.bytes_after == (SIZE - len(KEPT)) * 4 * 4
    assert report.details == {
        "tokens_before": SIZE,
        "tokens_after": len(KEPT),
        "tokens_seen": 4,
        "tokens_kept_for_the_data": 4,
        "occurrences_kept_percent": 100.0,
    }
    assert (report.seen, report.changed, report.left) == (1, 1, ())
    np.testing.assert_array_equal(
        run(model, {"input_ids": new_ids(old, report)})[0], run(before, {"input_ids": old})[0]
    )


@pytest.mark.parametrize("kind", ["tied", "untied", "gemm"])
def test_an_output_layer_is_cut_when_asked(kind: str, tmp_path: Path) -> None:
    model = masked(kind)
    before = to_bytes(model)
    old = np.array([[0, 4, 9], [11, 5, 6]])
    model, report = prune(model, tmp_path, cut_output=True)
    assert report.renumbering is not None
    assert report.renumbering.outputs == ("logits",)
    removed = SIZE - len(KEPT)
    assert report.bytes_before - report.bytes_after == removed * 4 * (4 + 1 + (0 if kind == "tied" else 4))
    (logits,) = model.graph.outputs
    assert logits.shape is not None
    assert logits.shape[-1] == len(KEPT)
    got = run(model, {"input_ids": new_ids(old, report)})[0]
    np.testing.assert_allclose(got, run(before, {"input_ids": old})[0][..., KEPT], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["tied", "untied", "gemm"])
def test_an_output_layer_is_refused_otherwise(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to do .* set cut_output to cut it as well"):
        prune(masked(kind), tmp_path)


def test_a_layer_that_is_no_plain_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the layer that makes it is not a plain product"):
        prune(masked("softmax"), tmp_path, cut_output=True)


def test_a_table_that_is_int8_already_is_cut_with_its_scales(tmp_path: Path) -> None:
    model, _ = run_pass(QuantizeDynamic(minimum_elements=1), embedder())
    before, old = to_bytes(model), np.array([[0, 4, 9, 2, 7]])
    model, report = prune(model, tmp_path)
    assert report.bytes_before - report.bytes_after == (SIZE - len(KEPT)) * (4 + 4), "a row of int8, and its scale"
    np.testing.assert_array_equal(
        run(model, {"input_ids": new_ids(old, report)})[0], run(before, {"input_ids": old})[0]
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"minimum_count": 2}, KEPT),  # <unk> is essential, the others occur twice
        ({"minimum_count": 3}, [n for n in KEPT if TOKENS[n] not in ("abc", "ab")]),
        ({"keep_share": 0.3}, [n for n in KEPT if TOKENS[n] not in ("abc", "ab")]),  # a is half as much
        ({"keep_share": 0.6}, KEPT),
    ],
)
def test_how_often_a_token_has_to_occur(settings: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    _, report = prune(embedder(), tmp_path, **settings)
    assert report.renumbering is not None
    assert report.renumbering.kept.tolist() == kept


def test_tokens_of_a_file_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("cab\n\nzoo\n", "utf-8")
    _, report = prune(embedder(), tmp_path, keep_file="words.txt")
    assert report.renumbering is not None
    assert [TOKENS[n] for n in report.renumbering.kept if n not in KEPT] == ["zoo", "cab"]
    (tmp_path / "words.txt").write_text("cad\n", "utf-8")
    with pytest.raises(InputError, match="'cad' is no token") as caught:
        prune(embedder(), tmp_path, keep_file="words.txt")
    assert caught.value.next_step == "Did you mean 'cab'?"
    with pytest.raises(InputError, match=r"absent.txt cannot be read"):
        prune(embedder(), tmp_path, keep_file="absent.txt")


@pytest.mark.parametrize(
    "settings", [{"keep_file": "/words.txt"}, {"keep_file": "C:\\words.txt"}, {"minimum_count": 0}, {"keep_share": 0.0}]
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneVocabulary(**settings)


def test_planning_changes_nothing(tmp_path: Path) -> None:
    model = embedder()
    before = to_bytes(model)
    calibration = Calibration([{"input_ids": np.array([SEEN])}], processor_files=files(tmp_path))
    plan = PruneVocabulary().plan(model, calibration)
    assert plan.actions == [{"weight": "table", "axis": 0, "role": "embedding", "rows": len(KEPT)}]
    assert to_bytes(model) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SUM, "d = Cast<to=1>(input_ids) y = Mul(words, d)", "Cast reads the token ids"),
        ("{2}", "{-100}", "with -100, which no token has"),
        ("padded = Equal(input_ids, pad)", "n = Add(input_ids, pad) padded = Equal(n, pad)", "Add reads the token ids"),
        ("(positions, number)", "(table, number)", "by other numbers than token ids"),
        (SUM, "s = ReduceSum(table) y = Add(words, s)", "also read by ReduceSum"),
        (WORDS, "t = Identity(table) words = Gather(t, input_ids)", "put the clean pass before"),
        (WORDS, "t = DequantizeLinear(whole, one) words = Gather(t, input_ids)", "before quantizing"),
        (WORDS, "words = Gather<axis = 1>(table, input_ids)", "do not pick rows"),
    ],
)
def test_graphs_that_cannot_be_cut(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in EMBEDDER
    text = EMBEDDER.replace(old, new)
    weights = {"table": normal(SIZE, 4), "positions": normal(9, 4, seed=1)}
    model = model_from(text, weights, infer=False)
    before = to_bytes(model)
    with pytest.raises(InputError, match=message):
        prune(model, tmp_path)
    assert to_bytes(model) == before


def test_without_token_ids_there_is_nothing_to_do(tmp_path: Path) -> None:
    model = model_from(EMBEDDER.replace("input_ids", "numbers"), {"table": normal(SIZE, 4), "positions": normal(9, 4)})
    with pytest.raises(InputError, match="has no embedding that token ids pick rows of"):
        prune(model, tmp_path)
    model, report = prune(model, tmp_path, optional=True)
    assert report.renumbering is None
    assert report.bytes_after == report.bytes_before
    assert "input_ids" in reasons(report)


def test_the_tokenizer_has_to_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer.json lies beside the model"):
        prune(embedder(), tmp_path, processor={})
    with pytest.raises(InputError, match="every token of it has to stay"):
        prune(embedder(), tmp_path, seen=list(range(SIZE)))
    with pytest.raises(InputError, match="holds token id 77, which the tokenizer does not have"):
        prune(embedder(), tmp_path, seen=[0, 77])
    many = files(tmp_path, [*TOKENS, "x", "y"])
    with pytest.raises(InputError, match="has 12 rows, and the tokenizer has ids up to 13"):
        prune(embedder(), tmp_path, processor=many)


def test_it_asks_for_calibration_data() -> None:
    with pytest.raises(InputError, match="prune_vocabulary needs calibration data"):
        run_pass(PruneVocabulary(), embedder())


def test_rows_without_a_token_go_too(tmp_path: Path) -> None:
    """Tables are often longer than the vocabulary, for kernels that like round numbers."""
    text = EMBEDDER.replace(f"float[{SIZE}, 4] table", "float[64, 4] table")
    model = model_from(text, {"table": normal(64, 4), "positions": normal(9, 4)})
    model, report = prune(model, tmp_path)
    assert report.details["tokens_before"] == 64
    assert list(model.graph.initializers["table"].shape or ()) == [len(KEPT), 4]

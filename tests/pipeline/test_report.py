# SPDX-License-Identifier: Apache-2.0
"""The report and the card: readable, honest, self-contained, and safe against what a manifest may hold."""

from __future__ import annotations

import ast
import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml

from onnxpress.pipeline.report import render_card, render_report
from onnxpress.pipeline.templates import filesize, fraction, number, times

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


def _benchmark(variant: str, setting: str, p50: float, ratio: tuple[float, float, float]) -> dict[str, Any]:
    batch, shape = (1, "1 x own length (8-91 tokens)") if setting == "latency" else (8, "8 x 128 tokens")
    torch = variant.startswith("pytorch")
    return {
        "provider": "pytorch" if torch else "cpu", "variant": variant, "threads": 2, "setting": setting,
        "batch": batch, "shape": shape, "rounds": 30,
        "latency_ms": {"p50": p50, "p95": p50 * 1.42, "min": p50 * 0.85},
        "ratio_to_reference": dict(zip(("median", "low", "high"), ratio, strict=True)),
        "throughput_per_s": batch * 1000 / p50, "load_ms": 812.0 if torch else 96.4,
        "peak_rss_mb": 512.0 if torch else 141.7,
    }  # fmt: skip


MEASURED = (
    ("pytorch-fp32", "latency", 14.1, (1.0, 1.0, 1.0)), ("pytorch-bf16", "latency", 16.9, (0.834, 0.81, 0.86)),
    ("onnx-fp32", "latency", 7.94, (1.776, 1.7, 1.84)), ("int8-dynamic", "latency", 4.55, (3.1, 3.02, 3.18)),
    ("pytorch-fp32", "throughput", 261.0, (1.0, 1.0, 1.0)), ("pytorch-bf16", "throughput", 198.0, (1.318, 1.27, 1.35)),
    ("onnx-fp32", "throughput", 213.0, (1.225, 1.2, 1.26)), ("int8-dynamic", "throughput", 118.4, (2.204, 2.15, 2.27)),
)  # fmt: skip


def _errors(scale: float, sqnr: float | None, cosine: float) -> dict[str, Any]:
    errors = {"max_abs_error": scale, "mean_abs_error": scale / 9, "relative_error": scale / 3}
    return errors | {"sqnr_db": sqnr, "cosine": cosine, "top1_agreement": 100.0}


@pytest.fixture
def manifest() -> dict[str, Any]:
    return sample()


def sample() -> dict[str, Any]:
    """Return a manifest as a press of all-MiniLM-L6-v2 writes it."""
    tensors = ("input_ids", "attention_mask", "token_type_ids")
    left = [{"node": f"/encoder/layer.{i}/MatMul", "reason": "both inputs are activations"} for i in range(12)]
    return {
        "schema_version": 1, "onnxpress": "0.1.0", "name": "all-MiniLM-L6-v2-int8", "created_by": "onnxpress press",
        "status": "accepted",
        "source": {"kind": "transformers", "name": "all-MiniLM-L6-v2", "sha256": "5f" * 32,
                   "architecture": "BertModel", "parameters": 22713216},
        "task": "feature-extraction",
        "recipe": {"name": "int8-dynamic", "sha256": "ab" * 32, "passes": [{"pass": "clean"}, {"pass": "fuse"}]},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.31.1"},
        "machine": {"cpu": "AMD EPYC 9B14", "cores": 2, "memory_gib": 23.4, "os": "Linux x86_64",
                    "isa": ["avx2", "avx512_vnni"]},
        "variant": "int8-dynamic", "variants": {"int8-dynamic": {"path": "onnx/model_quantized.onnx"}},
        "signature": {"inputs": [{"name": n, "dtype": "int64", "shape": ["batch", "sequence"]} for n in tensors],
                      "outputs": [{"name": "sentence_embedding", "dtype": "float32", "shape": ["batch", 384]}]},
        "opsets": {"": 20, "com.microsoft": 1},
        "operators": {"Gather": 4, "DynamicQuantizeMatMul": 36, "SkipLayerNormalization": 12, "MatMul": 12},
        "files": {
            "onnx/model_quantized.onnx": {"sha256": "c0ffee" * 10 + "abcd", "size": 22900000},
            "tokenizer.json": {"sha256": "d1" * 32, "size": 466247},
            "golden/golden.json": {"sha256": "f3" * 32, "size": 2140},
        },
        "passes": [
            {"pass": "clean", "seen": 312, "changed": 120, "left": [], "bytes_before": 90900000,
             "bytes_after": 90870000, "seconds": 0.4, "details": {"constants_folded": 12}},
            {"pass": "fuse", "seen": 192, "changed": 54, "left": [{"node": "/pooler/Div", "reason": "no match"}],
             "bytes_before": 90870000, "bytes_after": 90870000, "seconds": 1.31, "details": {"layer_norm": 13}},
            {"pass": "quantize_dynamic", "seen": 48, "changed": 36, "left": left, "bytes_before": 90870000,
             "bytes_after": 22900000, "seconds": 2.07, "details": {}},
        ],
        "data": {"evaluation": {"name": "stdlib-docstrings-3.11", "sha256": "b5" * 32, "examples": 480},
                 "calibration": None},
        "metrics": {"neighbour_accuracy": {"reference": 71.2, "candidate": 71.0, "drop": 0.2},
                    "cosine_to_reference": {"reference": 1.0, "candidate": 0.998, "drop": 0.002}},
        "export_parity": {"sentence_embedding": _errors(1.2e-7, 120.1, 0.9999999)},
        "parity": {"sentence_embedding": _errors(0.0123, 31.4, 0.99812)},
        "parity_cases": [{"case": "batch 1 x 8", "sqnr_db": None, "max_abs_error": 0.0},
                         {"case": "batch 3 x 17, right padding", "sqnr_db": 31.0, "max_abs_error": 0.0117}],
        "benchmarks": [_benchmark(*row) for row in MEASURED],
        "size": {"reference_bytes": 90900000, "candidate_bytes": 22900000, "ratio": 3.97},
        "gates": [{"expression": "cosine >= 0.98", "value": 0.998, "passed": True},
                  {"expression": "accuracy_drop <= 0.5", "value": 0.2, "passed": True},
                  {"expression": "latency_ratio >= 2", "value": 3.1, "passed": True}],
        "nodes": [{"name": "linear_31_MatMul", "op": "DynamicQuantizeMatMul", "ms": 0.21, "share": 0.046}],
        "operator_times": [{"op": "DynamicQuantizeMatMul", "count": 36, "ms": 2.46, "share": 0.54},
                  {"op": "FusedMatMul", "count": 12, "ms": 0.82, "share": 0.18},
                  {"op": "SkipLayerNormalization", "count": 12, "ms": 0.5, "share": 0.11},
                  {"op": "Gather", "count": 4, "ms": 0.02, "share": 0.004}],
        "golden": {"index": "golden/golden.json"},
        "warnings": ["the machine was busy: the slowest round took 2.1 times the fastest"],
    }  # fmt: skip


def empty() -> dict[str, Any]:
    """Return a manifest in which whatever may be missing is missing."""
    found: dict[str, Any] = dict.fromkeys(sample())
    found |= {"schema_version": 1, "onnxpress": "0.1.0", "name": "bare", "status": "refused", "variant": "fp32"}
    return found | {"source": {"kind": "onnx", "name": None, "sha256": None, "architecture": None, "parameters": None}}


class Page(HTMLParser):
    """Checks that tags balance, and keeps what the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"], ["desc"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def words(html: str) -> str:
    return Page(html).text


def python_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)\n```\n", card, re.S)
    assert found
    return found[1]


def slower(data: dict[str, Any]) -> dict[str, Any]:
    for row in data["benchmarks"]:
        if row["variant"] == data["variant"]:
            row["ratio_to_reference"] = {"median": 0.8, "low": 0.75, "high": 0.85}
    return data


def failing(data: dict[str, Any]) -> dict[str, Any]:
    data["status"] = "refused"
    data["gates"][0] |= {"value": 0.91, "passed": False}
    return data


@pytest.mark.parametrize("build", [sample, empty, lambda: failing(slower(sample()))])
def test_page_is_whole_and_self_contained(build: Any) -> None:
    html = render_report(build())
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    names = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(names)
    for tag, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on")], tag
        for key in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attrs.get(key) or "#").startswith(("#", "data:,")), (tag, attrs)
    assert "@import" not in html
    assert "url(" not in html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labels = {word for _, attrs in page.tags for word in (attrs.get("aria-labelledby") or "").split()}
    anchors = {(attrs.get("href") or "")[1:] for tag, attrs in page.tags if tag == "a"}
    assert labels | anchors <= set(ids)


def test_page_is_accessible(manifest: dict[str, Any]) -> None:
    page = Page(render_report(manifest))
    count = {tag: sum(name == tag for name, _ in page.tags) for tag in ("table", "caption", "svg", "desc", "h1")}
    assert count["caption"] == count["table"] > 6
    assert count["h1"] == 1
    assert count["desc"] == sum(tag == "svg" and attrs.get("role") == "img" for tag, attrs in page.tags) == 3
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert all("aria-hidden" in attrs or "role" in attrs for tag, attrs in page.tags if tag == "svg")


def test_verdict_and_numbers(manifest: dict[str, Any]) -> None:
    text = words(render_report(manifest))
    assert (
        "3.97 × smaller and 3.10 × faster (batch 1) than PyTorch fp32 eager; "
        "neighbour accuracy 71.0 vs 71.2 (−0.2 points)." in text
    )
    assert "1.75 × faster than ONNX fp32, the fastest other variant measured (4.55 ms vs 7.94 ms, batch 1)." in text
    for figure in (
        *("✓ Accepted", "22.9 MB", "from 90.9 MB", "4.55 ms", "3.02–3.18", "67.6 /s", "22,713,216", "142 MiB"),
        *("1.2 × 10⁻⁷", "31.4 dB", "identical", "> 0.999999", "−74.8 %", "54.0 %", "batch × sequence", "23.4 GiB"),
    ):
        assert figure in text
    assert "12 × both inputs are activations" in text
    assert "and 4 more" in text
    manifest["benchmarks"][6]["latency_ms"]["p50"] = 59.2
    assert "2.00 × slower than ONNX fp32, the fastest other variant measured" in words(render_report(manifest))


def test_slower_and_worse_is_said_plainly(manifest: dict[str, Any]) -> None:
    html = render_report(failing(slower(manifest)))
    text = words(html)
    assert "3.97 × smaller but 1.25 × slower (batch 1) than PyTorch fp32 eager" in text
    assert "1.25 × slower than PyTorch fp32 eager, 1.18–1.33" in text
    assert "✕ Refused" in text
    assert "cosine >= 0.98 asked for, measured 0.91" in text
    assert "✕ not met" in text
    manifest["size"]["ratio"] = 0.8
    assert "1.25 × larger and 1.25 × slower" in words(render_report(manifest))
    card = render_card(manifest)
    assert "1.25 × slower (1.18–1.33)" in card
    assert "Refused by its own gates.** `cosine >= 0.98`: measured 0.91" in card


def test_speed_within_noise_is_no_claim(manifest: dict[str, Any]) -> None:
    for row in manifest["benchmarks"]:
        if row["variant"] == "int8-dynamic":
            row["ratio_to_reference"] = {"median": 1.04, "low": 0.97, "high": 1.1}
    text = words(render_report(manifest))
    assert "3.97 × smaller than PyTorch fp32 eager; no measurable change in speed (batch 1: 0.970–1.10 ×)" in text
    assert "faster (batch 1)" not in text
    assert "no measurable change" in render_card(manifest)


def test_uncompared_speed_is_no_claim(manifest: dict[str, Any]) -> None:
    manifest["benchmarks"] = [r for r in manifest["benchmarks"] if r["variant"] == "int8-dynamic"]
    for row in manifest["benchmarks"]:
        row["ratio_to_reference"] = None
    text = words(render_report(manifest))
    assert "3.97 × smaller than the PyTorch original; neighbour accuracy" in text
    assert "as fast as the" not in text.partition("Speed and size")[0]
    assert "measurable" not in render_card(manifest)


def test_what_was_not_measured_is_said() -> None:
    text = words(render_report(empty()))
    assert "Nothing was measured." in text
    assert "Speed and quality on a task were not measured." in text
    assert "No failed gate is recorded" in text
    assert "None" not in text
    assert "None" not in render_card(empty())


def test_any_part_may_be_missing() -> None:
    for key, value in sample().items():
        if key not in {"name", "status", "schema_version", "onnxpress"}:
            for nothing in (None, type(value)()):
                manifest = sample() | {key: nothing}
                assert Page(render_report(manifest)).text, key
                ast.parse(python_of(render_card(manifest)))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [leaf for key, item in items for leaf in _leaves(item, (*path, key))]
    return found or [path]


def test_any_measured_value_may_be_null() -> None:
    required = {"variant", "setting", "provider", "name", "dtype", "pass", "op", "schema_version", "onnxpress", "isa"}
    for *path, last in _leaves(sample()):
        if last in required or "operators" in path or "isa" in path:
            continue
        manifest = target = sample()
        for key in path:
            target = target[key]
        target[last] = None
        assert not re.search(r"\bNone\b", words(render_report(manifest))), (path, last)
        assert not re.search(r"\bNone\b", render_card(manifest)), (path, last)


def _hostile(value: Any, word: str) -> Any:
    if isinstance(value, dict):
        return {key: _hostile(item, word) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item, word) for item in value]
    return word + value if isinstance(value, str) else value


ATTACK = "<script>alert(1)</script>\"'></style></svg>`|\n```\n{{ 7*7 }}](javascript:x)"


def test_hostile_strings_stay_text(manifest: dict[str, Any]) -> None:
    attacked = _hostile(manifest, ATTACK)
    attacked["variant"] = manifest["variant"]
    attacked["signature"] = manifest["signature"]
    attacked["signature"]["inputs"][0]["name"] = ATTACK
    attacked["metrics"] = {ATTACK: manifest["metrics"]["neighbour_accuracy"]}
    attacked["files"] = {ATTACK: {"sha256": ATTACK, "size": 1}, **manifest["files"]}
    attacked["operators"] = attacked["opsets"] = {ATTACK: 1}
    html = render_report(attacked)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "49" not in page.text.partition("Speed and size")[0]
    card = render_card(attacked)
    front, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["pipeline_tag"].startswith("<script>")
    prose = re.sub(r"```python\n.*?\n```\n", "", body, flags=re.S)
    assert "<script" not in re.sub(r"`[^`\n]*`", "", prose)
    assert ATTACK in [key.value for key in _feed_keys(python_of(card))]


def test_very_long_names_are_cut_in_charts_only(manifest: dict[str, Any]) -> None:
    name = "a-very-long-variant-name-" * 8
    for row in manifest["benchmarks"]:
        row["variant"] = row["variant"].replace("int8-dynamic", name)
    manifest["variant"] = name
    html = render_report(manifest)
    assert f">{name[:21]}…<" in html
    assert f">{name}<" in html


def test_same_manifest_same_bytes(manifest: dict[str, Any]) -> None:
    before = copy.deepcopy(manifest)
    again = json.loads(json.dumps(manifest))
    assert render_report(manifest) == render_report(again)
    assert render_card(manifest) == render_card(again)
    assert manifest == before


def test_one_variant_only(manifest: dict[str, Any]) -> None:
    manifest["benchmarks"] = [r for r in manifest["benchmarks"] if r["variant"] == "onnx-fp32"]
    manifest["variant"] = "onnx-fp32"
    for row in manifest["benchmarks"]:
        row["ratio_to_reference"] = {"median": 1.0, "low": 1.0, "high": 1.0}
    text = words(render_report(manifest))
    assert "measurable" not in text
    assert "fastest other" not in text


def test_numbers_for_people() -> None:
    sizes = {0: "0 B", 612: "612 B", 1000: "1.00 kB", 22900000: "22.9 MB", 999_600_000: "1.00 GB"}
    assert {size: filesize(size).replace("\u00a0", " ") for size in sizes} == sizes
    texts = {14.1: "14.1", 1234.5: "1,234", -0.25: "−0.250", None: "–", float("inf"): "∞", 0.0: "0"}
    assert {value: number(value) for value in texts} == texts
    assert fraction(0.99999999999).replace("\u00a0", " ") == "> 0.999999"
    assert [fraction(v) for v in (0.99987, 0.998, 1.0, 0.5)] == ["0.99987", "0.9980", "1.00", "0.500"]
    assert times(3.9694) == "3.97\u00a0×"


# ----------------------------------------------------------------------------------------------------------- the card


def _feed_keys(source: str) -> list[ast.Constant]:
    dicts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    return [key for key in dicts[0].keys if isinstance(key, ast.Constant)]


def test_card_front_matter(manifest: dict[str, Any]) -> None:
    front = yaml.safe_load(render_card(manifest).split("---\n")[1])
    tags = ["onnx", "onnxruntime", "onnxpress", "int8-dynamic"]
    assert front == {"library_name": "onnx", "pipeline_tag": "feature-extraction", "tags": tags}
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    for name in (hub, "./models/mine", "../mine", "/srv/models/mine", "a/b/c", "mine", "x:y/z"):
        manifest["source"]["name"] = name
        front = yaml.safe_load(render_card(manifest).split("---\n")[1])
        assert front.get("base_model") == (hub if name == hub else None)


def test_card_table_and_code(manifest: dict[str, Any]) -> None:
    card = render_card(manifest)
    assert "| Size | 90.9 MB | 22.9 MB | 3.97 × smaller |" in card
    assert "| Neighbour accuracy | 71.2 % | 71.0 % | −0.2 points |" in card
    assert "| Median latency, 8 × 128 tokens | 261 ms | 118 ms | 2.20 × faster (2.15–2.27) |" in card
    source = python_of(card)
    assert [key.value for key in _feed_keys(source)] == ["input_ids", "attention_mask", "token_type_ids"]
    assert "'onnx/model_quantized.onnx'" in source
    assert "'sentence_embedding'" in source
    assert 'Tokenizer.from_file("tokenizer.json")' in source
    assert "onnxpress verify ." in card
    assert not re.search(r"\n\n\n", card)


def test_card_of_a_model_without_tokenizer(manifest: dict[str, Any]) -> None:
    del manifest["files"]["tokenizer.json"]
    manifest["signature"]["inputs"] = [{"name": "pixels", "dtype": "float32", "shape": ["batch", 3, 224, 224]}]
    manifest["task"] = "generic"
    card = render_card(manifest)
    assert "feed = {'pixels': np.zeros((1, 3, 224, 224), np.float32)}" in card
    assert "tokenizers" not in card
    assert "put your own arrays" in card
    assert "pipeline_tag" not in card


def test_card_pads_for_a_fixed_length(manifest: dict[str, Any]) -> None:
    for spec in manifest["signature"]["inputs"]:
        spec["shape"] = [4, 128]
    source = python_of(render_card(manifest))
    for line in ("enable_padding(length=128)", "enable_truncation(128)", "np.array([text.ids] * 4, np.int64)"):
        assert line in source


def test_fragile_layers_are_shown_most_fragile_first(manifest: dict[str, Any]) -> None:
    layers = [("encoder.0", 41.5, "int8-static"), ("encoder.1", 12.25, "float"), ("head", 80.0, "int8-static")]
    manifest["passes"][-1]["details"]["sensitivity"] = [
        {"layer": name, "node": name, "form": form, "alone_db": {"int8-static": db}} for name, db, form in layers
    ]
    page = words(render_report(manifest))
    section = page[page.index("Each layer was tried alone") :]
    assert section.index("encoder.1") < section.index("encoder.0") < section.index("head")
    assert "12.2 dB" in section
    assert "sensitivity: " not in page, "not among the details of its pass as well"


def test_without_a_sensitivity_run_there_is_no_such_section(manifest: dict[str, Any]) -> None:
    assert "Fragile layers" not in render_report(manifest)


def test_integer_kernels_are_named(manifest: dict[str, Any]) -> None:
    manifest["kernels"] = [
        {"op": "com.microsoft.MatMulIntegerToFloat", "count": 36, "integer": True},
        {"op": "Softmax", "count": 6, "integer": False},
    ]
    page = words(render_report(manifest))
    assert "In integers it computes 36 × com.microsoft.MatMulIntegerToFloat." in page

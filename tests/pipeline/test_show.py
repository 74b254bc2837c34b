# SPDX-License-Identifier: Apache-2.0
"""Rows of the tables in the terminal that depend on the kind of model."""

from onnxpress.pipeline.show import _metric_rows, _noise_rows


def test_a_cache_of_many_layers_takes_one_row_with_its_worst() -> None:
    cache = {f"present.{layer}.{part}": 40.0 + layer for layer in range(3) for part in ("key", "value")}
    assert _noise_rows({"logits": 30.04, **cache}) == [
        ("SQNR of logits, dB", "", "30.0", ""),
        ("SQNR of the cache, the worst of 6, dB", "", "40.0", ""),
    ]


def test_few_outputs_have_a_row_each() -> None:
    rows = _noise_rows({"logits": None, "present.0.key": 41.0})
    assert [row[0] for row in rows] == ["SQNR of logits, dB", "SQNR of present.0.key, dB"]
    assert rows[0][2] == "exact"


def test_of_a_perplexity_less_is_better() -> None:
    metrics = {
        "perplexity": {"reference": 20.0, "candidate": 21.0, "drop": 5.0},
        "accuracy": {"reference": 80.0, "candidate": 79.0, "drop": 1.0},
    }
    assert [row[3] for row in _metric_rows(metrics)] == ["+5.00 %", "-1.00"]

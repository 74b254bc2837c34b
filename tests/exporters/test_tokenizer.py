# SPDX-License-Identifier: Apache-2.0
"""How long a text may be: the shortest of what position table, tokenizer and sentence-transformers allow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from onnxpress.exporters.tokenizer import longest_sequence


@pytest.mark.parametrize(
    ("settings", "longest"),
    [('{"max_seq_length": 256}', 256), ('{"max_seq_length": 9999}', 512), ("{}", 512), ("no json", 512), (None, 512)],
)
def test_sentence_transformers_limit(settings: str | None, longest: int, tmp_path: Path) -> None:
    if settings is not None:
        (tmp_path / "sentence_bert_config.json").write_text(settings)
    tokenizer = SimpleNamespace(model_max_length=10**30)
    assert longest_sequence({"max_position_embeddings": 512}, tokenizer, tmp_path) == longest
    assert longest_sequence({"max_position_embeddings": 512}, tokenizer) == 512

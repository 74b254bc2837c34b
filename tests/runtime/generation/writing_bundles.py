# SPDX-License-Identifier: Apache-2.0
"""Bundles without a press: sealed as the writer seals them, and a language model that was written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from onnxpress.runtime.bundle import hash_file, write_sums

END = "<|end|>"
TABLE = """
<ir_version: 10, opset_import: ["": 20]>
language (int64[batch, sequence] input_ids) => (float[batch, sequence, SIZE] logits)
<float[SIZE, SIZE] table = {VALUES}>
{
    logits = Gather(table, input_ids)
}
"""
"""Each token says which comes next."""


def seal(folder: Path, **manifest: Any) -> None:
    """Write the manifest and SHA256SUMS over what lies in the folder."""
    for name in ("manifest.json", "SHA256SUMS"):
        (folder / name).unlink(missing_ok=True)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: {"sha256": hash_file(folder / name), "size": (folder / name).stat().st_size} for name in names}
    whole = {"schema_version": 1, "name": folder.name, "files": files, "golden": {"index": "golden/golden.json"}}
    (folder / "manifest.json").write_text(json.dumps({**whole, **manifest}), "utf-8")
    write_sums(folder)


def byte_tokenizer() -> Tokenizer:
    """A token a byte, and an end token, which is the last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def spelling_bundle(folder: Path, text: str, *, tokenizer: bool = True, task: str = "text-generation") -> Path:
    """A bundle of a model without a cache that spells a text in which no byte occurs twice, and ends."""
    made = byte_tokenizer()
    end = made.token_to_id(END)
    ids = [*made.encode(text).ids, end]
    assert len(set(ids)) == len(ids), "a byte occurs twice"
    size = end + 1
    table = np.zeros((size, size), np.float32)
    table[ids[:-1], ids[1:]] = 8.0
    (folder / "onnx").mkdir(parents=True)
    values = ", ".join(f"{value:g}" for value in table.ravel())
    graph = TABLE.replace("SIZE", str(size)).replace("VALUES", values)
    (folder / "onnx" / "model.onnx").write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end, "vocab_size": size}), "utf-8")
    if tokenizer:
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text("{}", "utf-8")
    tensors = [("input_ids", "int64", ["batch", "sequence"]), ("logits", "float32", ["batch", "sequence", size])]
    specs = [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in tensors]
    signature = {"inputs": specs[:1], "outputs": specs[1:]}
    variants = {"fp32": {"path": "onnx/model.onnx"}}
    seal(folder, task=task, variants=variants, signature=signature, max_length=50)
    return folder

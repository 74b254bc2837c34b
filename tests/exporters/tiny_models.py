# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models in folders, as save_pretrained writes them, and what compares a graph with one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from onnxpress.exporters.exported import ExportedModel
from onnxpress.exporters.graph_file import write

VOCABULARY = 99
WORDS = ["the", "cat", "sat", "on", "mat", "a", "dog", "good", "bad", "##s", "film", "was", "who", "where", "?", "."]
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "num_labels": 3,
}

OWN_NAMES: dict[str, dict[str, Any]] = {
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 37,
        "max_position_embeddings": 40,
        "num_labels": 3,
    },
    "albert": {**SMALL, "embedding_size": 16},
    "electra": {**SMALL, "embedding_size": 16},
    "deberta-v2": {**SMALL, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {**SMALL, "local_attention": 8, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    "roberta": {**SMALL, "type_vocab_size": 1, "pad_token_id": 0},
    "xlm-roberta": {**SMALL, "type_vocab_size": 1, "pad_token_id": 0},
    "mpnet": {**SMALL, "pad_token_id": 0},
}
"""Where an architecture's configuration has names or sizes of its own."""


@dataclass
class Subject:
    """A tiny checkpoint, what it was exported to, and a session on that."""

    folder: Path
    auto_class: str
    exported: ExportedModel
    session: onnxruntime.InferenceSession


# name: architecture, class, changes to the configuration, settings of the export
SUBJECTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert sentences": ("bert", "AutoModel", {}, {}),
    "mpnet cls": ("mpnet", "AutoModel", {}, {"pooling": "cls"}),
    "modernbert tokens": ("modernbert", "AutoModel", {"local_attention": 16, "max_position_embeddings": 64}, {}),
    "roberta classes": ("roberta", "AutoModelForSequenceClassification", {}, {}),
    "deberta-v2 pairs": ("deberta-v2", "AutoModelForSequenceClassification", {}, {}),
    "distilbert words": ("distilbert", "AutoModelForTokenClassification", {}, {}),
    "xlm-roberta words": ("xlm-roberta", "AutoModelForTokenClassification", {}, {}),
    "albert masks": ("albert", "AutoModelForMaskedLM", {}, {}),
    "electra answers": ("electra", "AutoModelForQuestionAnswering", {"num_labels": 2}, {}),
}


def build(folder: Path, model_type: str, auto_class: str, *, tokenizer: bool = True, **changes: Any) -> Path:
    """Write a model with random weights (seed 0, spread widely enough that layers matter) and its tokenizer."""
    import transformers

    settings = {**OWN_NAMES.get(model_type, SMALL), **changes}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    if tokenizer:
        token_types = model_type not in ("distilbert", "roberta", "xlm-roberta", "modernbert", "mpnet")
        write_tokenizer(folder, token_types=token_types)
    return folder


def write_tokenizer(folder: Path, *, token_types: bool = True, **settings: Any) -> None:
    """A WordPiece tokenizer over a handful of words and letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    entries = [*SPECIAL.values(), *WORDS]
    entries += [c for letter in "abcdefghijklmnopqrstuvwxyz" for c in (letter, f"##{letter}")]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names, **SPECIAL, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_byte_tokenizer(folder: Path, *, prefix_space: bool) -> None:
    """A byte-level BPE tokenizer, as RoBERTa has it, in which a space is the start of the word that follows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    special = list(SPECIAL.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat , a dog sat on the cat"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_sentence_files(folder: Path, *, normalize: bool = True, **pooling: Any) -> None:
    """What sentence-transformers writes beside a model: modules.json and 1_Pooling/config.json."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(types)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    settings = pooling or {
        "word_embedding_dimension": 32,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
    (folder / "1_Pooling/config.json").write_text(json.dumps(settings), encoding="utf-8")


def batch(
    exported: ExportedModel, rows: int, length: int, *, padding: str = "none", seed: int = 0
) -> dict[str, np.ndarray]:
    """Random token ids; with `right` or `left` padding, every row but the first loses 3 more tokens than the last."""
    rng = np.random.default_rng(seed)
    values = {
        "input_ids": rng.integers(5, VOCABULARY, (rows, length)),
        "attention_mask": np.ones((rows, length), np.int64),
        "token_type_ids": np.tile(np.arange(length) >= (length + 1) // 2, (rows, 1)).astype(np.int64),
    }
    for row in range(rows if padding != "none" else 0):
        padded = slice(length - 3 * row, None) if padding == "right" else slice(0, 3 * row)
        if row:
            values["input_ids"][row, padded] = 0
            values["attention_mask"][row, padded] = 0
            values["token_type_ids"][row, padded] = 0
    return {spec.name: values[spec.name] for spec in exported.signature.inputs}


def session(exported: ExportedModel, folder: Path) -> onnxruntime.InferenceSession:
    path = folder / "model.onnx"
    write(exported.model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(runner: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(names, dict(feeds)), strict=True))


def distance(wanted: np.ndarray, got: np.ndarray, mask: np.ndarray | None = None) -> float:
    """The largest difference, relative to the largest wanted value; under the mask where outputs have a sequence.

    A single number near 0, the sum of many near 1, has no meaningful relative error, hence the floor of 0.1.
    """
    assert wanted.shape == got.shape
    assert wanted.dtype == got.dtype
    assert np.isfinite(got).all()
    if mask is not None and wanted.shape[:2] == mask.shape:
        wanted, got = wanted[mask.astype(bool)], got[mask.astype(bool)]
    return float(np.abs(wanted - got).max() / max(np.abs(wanted).max(), 0.1))

# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of every model, trained on a few sentences, as tokenizer.json would hold them; and folders with
tiny tokenizers as families of models have them, with what transformers adds to their files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "the cat sat on the mat and the other cat sat there",
    "that theatre is the best theatre in this northern town",
    "a banana bandana, another banana and aaa aaaa bananas",
    "naïve café: 他们 abab ababab cats hats mats",
] * 3


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    return _trained(tokenizer, trainer)


def byte_bpe(*, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _trained(tokenizer, trainer)
    tokenizer.add_tokens([AddedToken("<extra>", special=True)])
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """Words end in `</w>`, as CLIP's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=140, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def prefix_bpe() -> Tokenizer:
    """Pieces inside a word begin with `##`."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=140, special_tokens=SPECIAL, continuing_subword_prefix="##", show_progress=False
    )
    return _trained(tokenizer, trainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    return _trained(tokenizer, trainer)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


MAKERS = {
    "WordPiece": word_piece,
    "BPE, bytes": byte_bpe,
    "BPE, words as they are": lambda: byte_bpe(ignore_merges=True),
    "BPE, ends": suffix_bpe,
    "BPE, continued": prefix_bpe,
    "Unigram": unigram,
    "WordLevel": word_level,
}


@cache
def text_of(name: str) -> str:
    """The tokenizer.json of one of `MAKERS`."""
    return str(MAKERS[name]().to_str())


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bert(folder: Path) -> None:
    """vocab.txt alone, as old checkpoints have it."""
    vocabulary = word_piece().get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n", "utf-8")
    _configure(folder, "BertTokenizer", do_lower_case=True)


def _byte_pairs(folder: Path, special: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.model.save(str(folder))


def roberta(folder: Path) -> None:
    """vocab.json and merges.txt; padding id 1, two separators between a pair, no type ids."""
    _byte_pairs(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    _configure(folder, "RobertaTokenizer")


def gpt2(folder: Path) -> None:
    """No padding token, nothing added to a text."""
    _byte_pairs(folder, ["<|endoftext|>"])
    _configure(folder, "GPT2Tokenizer")


def gpt2_padded_left(folder: Path) -> None:
    _byte_pairs(folder, ["<|endoftext|>"])
    _configure(folder, "GPT2Tokenizer", pad_token="<|endoftext|>", padding_side="left", truncation_side="left")


def llama(folder: Path) -> None:
    """tokenizer_config.json lacks the side of the padding, which the class has on the left."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    _only_special(tokenizer, {"<unk>", "<s>", "</s>"}, folder / "tokenizer.json")
    _configure(folder, "LlamaTokenizer", pad_token="</s>", legacy=False)


def t5(folder: Path) -> None:
    """Unigram; the file lacks the `</s>` behind each text, which the class adds."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _configure(folder, "T5Tokenizer", extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _only_special(tokenizer: Tokenizer, special: set[str], file: Path) -> None:
    """Training marks all given tokens as special; bytes are plain ones."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    file.write_text(json.dumps(data), "utf-8")


def _configure(folder: Path, name: str, **settings: object) -> None:
    config = {"tokenizer_class": name, "model_max_length": 64, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


FOLDERS: dict[str, Callable[[Path], None]] = {
    "BERT": bert,
    "RoBERTa": roberta,
    "GPT-2": gpt2,
    "GPT-2, padded left": gpt2_padded_left,
    "Llama": llama,
    "T5": t5,
}

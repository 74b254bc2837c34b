# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of every model, trained on a few sentences, as tokenizer.json would hold them."""

from __future__ import annotations

from functools import cache

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

# SPDX-License-Identifier: Apache-2.0
"""Cut a tokenizer to the tokens that are kept, and write their new ids into every file that lies beside the model.

New ids count the kept tokens in the order of their old ids. What is written is read back by the `tokenizers` library,
which has to find every kept token under its new id, and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..contracts.errors import InputError
from .exported import ExportedModel
from .tokenizer import TextInputs, load_tokenizer
from .vocabulary import TOKENIZER, Json, Vocabulary, merge_pairs, processors_of, read_json, read_vocabulary, token_ids

NewIds = Mapping[int, int]

_STALE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
"""SentencePiece's own files, which hold the whole vocabulary; tokenizer.json says the same and can be cut."""

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def cut_exported(exported: ExportedModel, kept: Sequence[int], folder: Path) -> ExportedModel:
    """The same model with a tokenizer that knows the `kept` tokens alone; its graph is left to the pass.

    Args:
        exported: As its source has it; not changed.
        kept: Old ids of the tokens that stay, ascending; a token's place in it is its new id.
        folder: Where the cut files are written; it must not exist.

    Raises:
        InputError: The files do not fit together, or lack what `kept` needs.
    """
    files = cut_files(exported.processor_files, kept, folder)
    tokenize = exported.tokenize
    if isinstance(tokenize, TextInputs):
        tokenizer = load_tokenizer(folder)
        if len(tokenizer) != len(kept):
            raise InputError(
                f"transformers finds {len(tokenizer)} tokens where tokenizer.json has {len(kept)}",
                next_step="Save the tokenizer again with save_pretrained, which writes them all to tokenizer.json.",
            )
        tokenize = TextInputs(tokenizer, tokenize.dtypes, tokenize.limit)
    return replace(exported, processor_files=files, tokenize=tokenize)


def cut_files(files: Mapping[str, Path], kept: Sequence[int], folder: Path) -> dict[str, Path]:
    """Write the processor files anew, for the `kept` ids, and return name to path; see `cut_exported`."""
    vocabulary = read_vocabulary(files)
    new_ids = {int(old): new for new, old in enumerate(kept)}
    cut = cut_tokenizer(vocabulary, new_ids)
    folder.mkdir(parents=True)
    for name, file in files.items():
        content = _CUTTERS.get(name, _unchanged)(file, new_ids, cut)
        if name in _STALE or content == "":
            continue
        if content is None:
            shutil.copyfile(file, folder / name)
        else:
            (folder / name).write_text(content, "utf-8")
    return {name: folder / name for name in files if (folder / name).is_file()}


def cut_tokenizer(vocabulary: Vocabulary, new_ids: NewIds) -> Json:
    """The content of tokenizer.json over the kept tokens.

    Raises:
        InputError: A token that has to stay is missing, or the library numbers the result differently.
    """
    lost = vocabulary.essential() - set(new_ids)
    if lost:
        name = next(token for token, number in vocabulary.ids.items() if number in lost)
        raise InputError(f"the tokenizer cannot do without {name!r}", next_step="Keep it.")
    data = dict(vocabulary.data)
    data["model"] = _cut_model(vocabulary, new_ids)
    data["added_tokens"] = [
        {**token, "id": new_ids[vocabulary.ids[token["content"]]]} for token in data.get("added_tokens") or ()
    ]
    data["post_processor"] = _renumbered_processor(data.get("post_processor"), new_ids)
    if data.get("padding"):
        data["padding"] = {**data["padding"], "pad_id": _new(new_ids, data["padding"]["pad_id"], "padding")}
    wanted = {token: new_ids[number] for token, number in vocabulary.ids.items() if number in new_ids}
    if token_ids(json.dumps(data)) != wanted:
        raise InputError(
            "the tokenizer's added tokens lie between the others, so that its vocabulary cannot be cut",
            next_step="Leave prune_vocabulary out of the recipe.",
        )
    return data


def _cut_model(vocabulary: Vocabulary, new_ids: NewIds) -> Json:
    model = dict(vocabulary.model)
    if vocabulary.kind == "Unigram":
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
        return model
    model["vocab"] = _renumbered_tokens(model["vocab"], new_ids)
    if vocabulary.kind == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        known = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in merge_pairs(model)
            if left in known and right in known and left + right.removeprefix(prefix) in known
        ]
    return model


def _renumbered_tokens(tokens: Mapping[str, int], new_ids: NewIds) -> dict[str, int]:
    """Token to new id, in the order of ids."""
    kept = ((token, new_ids[number]) for token, number in tokens.items() if number in new_ids)
    return dict(sorted(kept, key=lambda pair: pair[1]))


def _renumbered_processor(processor: Json | None, new_ids: NewIds) -> Json | None:
    copy: Json | None = json.loads(json.dumps(processor))
    for inner in processors_of(copy):
        for special in (inner.get("special_tokens") or {}).values():
            special["ids"] = [_new(new_ids, number, "post_processor") for number in special["ids"]]
        for side in ("sep", "cls"):
            if side in inner:
                inner[side] = [inner[side][0], _new(new_ids, inner[side][1], "post_processor")]
    return copy


def _new(new_ids: NewIds, number: int, where: str) -> int:
    if number not in new_ids:
        raise InputError(
            f"{TOKENIZER}: {where} names id {number}, which no token has", next_step="Copy the tokenizer files again."
        )
    return new_ids[number]


# --- one function a file: its new content, None where it stays as it is, "" where it is left out ----------------------


def _unchanged(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    return None


def _whole(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    return json.dumps(cut, separators=(",", ":"), ensure_ascii=False)


def _tokenizer_config(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    data = read_json(file)
    decoder = data.get("added_tokens_decoder")
    if decoder:
        numbered = sorted((new_ids[int(old)], token) for old, token in decoder.items() if int(old) in new_ids)
        data["added_tokens_decoder"] = {str(number): token for number, token in numbered}
    return _text(_renumbered_settings(data, new_ids))


def _config(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    return _text(_renumbered_settings(read_json(file), new_ids))


def _token_map(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    return _text(_renumbered_tokens(read_json(file), new_ids))


def _lines(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    """vocab.txt: a token a line, whose number is its id."""
    lines = file.read_text("utf-8").removesuffix("\n").split("\n")
    return "".join(f"{line}\n" for number, line in enumerate(lines) if number in new_ids)


def _merges(file: Path, new_ids: NewIds, cut: Json) -> str | None:
    """merges.txt: a first line for the version, then a merge a line."""
    if "merges" not in cut["model"]:
        return ""
    first = file.read_text("utf-8").split("\n", 1)[0]
    head = f"{first}\n" if first.startswith("#version") else ""
    return head + "".join(f"{left} {right}\n" for left, right in merge_pairs(cut["model"]))


def _renumbered_settings(data: Json, new_ids: NewIds) -> Json:
    """A configuration with `vocab_size` and all token ids anew; an id that no token had becomes null."""
    return {key: _renumbered_setting(key, value, new_ids) for key, value in data.items()}


def _renumbered_setting(key: str, value: Any, new_ids: NewIds) -> Any:
    if isinstance(value, dict) and key != "added_tokens_decoder":
        return _renumbered_settings(value, new_ids)
    if key == "vocab_size" and isinstance(value, int):
        return len(new_ids)
    if key.endswith("_token_id") and isinstance(value, int):
        return new_ids.get(value)
    if (key.endswith("_token_id") or key in _ID_LISTS) and isinstance(value, list):
        return [new_ids[number] for number in value if number in new_ids]
    return value


def _text(data: Json) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


_CUTTERS: dict[str, Callable[[Path, NewIds, Json], str | None]] = {
    TOKENIZER: _whole,
    "tokenizer_config.json": _tokenizer_config,
    "config.json": _config,
    "generation_config.json": _config,
    "added_tokens.json": _token_map,
    "vocab.json": _token_map,
    "vocab.txt": _lines,
    "merges.txt": _merges,
}

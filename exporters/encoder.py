# SPDX-License-Identifier: Apache-2.0
"""The module that is traced for an encoder: model, optional ready-made mask, optional sentence pooling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..contracts.errors import InputError
from ..contracts.tasks import Task
from .sentence_modules import HEAD_MODULES, POOLINGS, head_module
from .settings import Pooling

SENTENCE_EMBEDDING = "sentence_embedding"


@dataclass(frozen=True)
class PoolingPlan:
    """How token vectors become one vector a text.

    Attributes:
        kind: `none`, or one of `sentence_modules.POOLINGS`, such as `mean` (over tokens that are not padding).
        normalize: Whether the vector is scaled to length 1 in the end.
        head: Layers between the pooling and that; None where there are none.
    """

    kind: str
    normalize: bool = False
    head: torch.nn.Module | None = None

    def output_names(self, task: Task) -> tuple[str, ...]:
        return task.outputs if self.kind == "none" else (SENTENCE_EMBEDDING,)


def pooling_plan(folder: Path, task: Task, setting: Pooling) -> PoolingPlan:
    """Decide the pooling from the setting or, for `auto`, from the folder's sentence-transformers files.

    Raises:
        InputError: Pooling was asked for another task, or the files ask for a module that is not known here.
    """
    if task.name != "feature-extraction":
        if setting in ("mean", "cls"):
            raise InputError(
                f"pooling is for feature-extraction, not {task.name}", next_step="Set export.pooling=none."
            )
        return PoolingPlan("none")
    modules = _sentence_modules(folder)
    kinds = [kind for kind, _ in modules]
    normalize = "Normalize" in kinds
    if setting != "auto":
        return PoolingPlan(setting, normalize and setting != "none")
    if not modules:
        return PoolingPlan("none")
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"} - HEAD_MODULES)
    if unknown or kinds.count("Pooling") != 1:
        odd = unknown or [kind for kind in kinds if kind != "Transformer"] or kinds
        raise InputError(
            f"{folder.name} has sentence-transformers modules that are not known here: {', '.join(odd)}",
            next_step="Set export.pooling to mean, cls or none.",
        )
    return PoolingPlan(
        _pooling_kind(folder / dict(modules)["Pooling"] / "config.json"), normalize, _head(folder, modules)
    )


def _head(folder: Path, modules: Sequence[tuple[str, str]]) -> torch.nn.Module | None:
    """The layers with weights, in order."""
    layers = [(kind, path) for kind, path in modules if kind in HEAD_MODULES]
    if layers and "Normalize" in [kind for kind, _ in modules][:-1]:
        raise InputError(
            f"{folder.name} scales its vectors before {modules[-1][0]}, which is not known here",
            next_step="Set export.pooling to mean, cls or none.",
        )
    if not layers:
        return None
    return torch.nn.ModuleDict({path.replace(".", "_"): head_module(folder / path, kind) for kind, path in layers})


def _sentence_modules(folder: Path) -> list[tuple[str, str]]:
    """Class name and sub-folder of each, as modules.json lists them; empty when the folder has none."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        found = [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in json.loads(file.read_text("utf-8"))]
        if any(Path(path).name != path for _, path in found):
            raise ValueError("a path outside the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder.name}/modules.json cannot be read: {error}", next_step="Copy it again.") from error
    return found


_OLD_NAMES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _pooling_kind(file: Path) -> str:
    try:
        config: dict[str, Any] = dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the pooling settings cannot be read: {error}", next_step="Set export.pooling.") from error
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    kind = _OLD_NAMES.get(chosen[0] if chosen else "")
    kind = config.get("pooling_mode", kind)
    if len(chosen) > 1 or not isinstance(kind, str) or kind not in POOLINGS:
        raise InputError(
            f"pooling {', '.join(chosen) or kind} is not known here",
            next_step="Set export.pooling to mean, cls or none.",
        )
    return str(kind)


class Encoder(torch.nn.Module):
    """Calls the model with its tokenizer's inputs and returns plain tensors, in the order of the output names."""

    def __init__(
        self, model: torch.nn.Module, pooling: PoolingPlan, outputs: tuple[str, ...], *, broadcast_mask: bool = False
    ) -> None:
        super().__init__()
        self.model, self.pooling, self.outputs, self.broadcast_mask = model, pooling, outputs, broadcast_mask
        self.head = pooling.head  # registered here, so that its weights get its name in the graph
        self.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """input_ids, attention_mask, token_type_ids: int64 [batch, sequence]."""
        keywords: dict[str, torch.Tensor] = {"input_ids": input_ids}
        if attention_mask is not None:
            keywords["attention_mask"] = self._mask(attention_mask) if self.broadcast_mask else attention_mask
        if token_type_ids is not None:
            keywords["token_type_ids"] = token_type_ids
        result = self.model(**keywords, return_dict=True)
        if self.pooling.kind == "none":
            return tuple(result[name] for name in self.outputs)
        return (self._pool(result["last_hidden_state"], attention_mask),)

    def _mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min

    def _pool(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """tokens: [batch, sequence, hidden] -> [batch, hidden]; as sentence-transformers' Pooling has it."""
        mask = torch.ones_like(tokens[..., :1])
        if attention_mask is not None:
            mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        pooled = POOLINGS[self.pooling.kind](tokens, mask)
        for layer in () if self.head is None else self.head.children():
            pooled = layer(pooled)
        return torch.nn.functional.normalize(pooled, p=2, dim=1) if self.pooling.normalize else pooled

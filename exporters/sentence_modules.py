# SPDX-License-Identifier: Apache-2.0
"""What sentence-transformers puts behind a model: how tokens become one vector, and the layers that follow.

Read from the folder that it saves (`modules.json` and a sub-folder each), without the library.
https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..contracts.errors import InputError

HEAD_MODULES = {"Dense", "LayerNorm"}
"""Layers with weights that may follow the pooling."""

_AGAIN = "Copy the folder again, or set export.pooling to mean, cls or none."


def _mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


def _first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens[:, 0]


def _mean_by_root(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9).sqrt()


def _weighted_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Later tokens count more; counted are those that are no padding, on whichever side that is."""
    weights = mask.cumsum(dim=1) * mask
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def _maximum(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask == 0, torch.finfo(tokens.dtype).min).amax(dim=1)


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    last = mask.squeeze(-1).cumsum(dim=1).argmax(dim=1)
    return tokens[torch.arange(tokens.shape[0], device=tokens.device), last]


POOLINGS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "max": _maximum,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""Name, as sentence-transformers has it, to (tokens [batch, sequence, hidden], mask [batch, sequence, 1], both float)
-> [batch, hidden]."""


class Dense(nn.Module):
    """A linear layer with an activation: [batch, in] -> [batch, out]."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        super().__init__()
        size = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(*size, bias=bool(config.get("bias", True)))
        self.activation = _activation(str(config.get("activation_function", "torch.nn.modules.activation.Tanh")), name)
        self.residual: nn.Module | None = None
        if config.get("use_residual"):
            self.residual = nn.Identity() if size[0] == size[1] else nn.Linear(*size, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.linear(vectors))
        return result if self.residual is None else result + self.residual(vectors)


class LayerNorm(nn.Module):
    """[batch, hidden] -> the same."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(config["dimension"]))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(vectors)
        return result


def _activation(path: str, name: str) -> nn.Module:
    """The class that a config names, if it is one of PyTorch's activations: nothing is imported by name."""
    module, _, kind = path.rpartition(".")
    if module in ("torch.nn.modules.activation", "torch.nn.modules.linear") and kind in (
        *("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "Mish", "Hardswish"),
    ):
        made: nn.Module = getattr(nn, kind)()
        return made
    raise InputError(f"{name} has the activation {path}, which is not known here", next_step=_AGAIN)


def head_module(folder: Path, kind: str) -> nn.Module:
    """The layer that a sub-folder holds, with its weights.

    Args:
        folder: Such as `2_Dense`.
        kind: One of HEAD_MODULES.

    Raises:
        InputError: Its files are missing, or do not fit together.
    """
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(
            f"{folder.name} has no model.safetensors (a pickle is not opened)",
            next_step="Save the model again with a newer sentence-transformers, which writes safetensors.",
        )
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf-8")))
        if config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
            raise ValueError(f"it reads {config['module_input_name']}")
        module: nn.Module = (Dense if kind == "Dense" else LayerNorm)(config, folder.name)
        module.load_state_dict(load_file(weights))
    except InputError:
        raise
    except Exception as error:  # JSON, safetensors and load_state_dict each have their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{folder.name} cannot be read: {lines[-1] if lines else error}", next_step=_AGAIN) from error
    return module.eval()

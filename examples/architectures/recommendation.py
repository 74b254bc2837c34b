# SPDX-License-Identifier: Apache-2.0
"""Recommendation: the chance of a click from a row of categories, and the next item from a history.

cd examples && onnxpress press architectures.recommendation:deepfm --recipe int8-dynamic -o ../artifacts/deepfm
"""

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]


class DeepFM(nn.Module):
    """A factorization machine and a perceptron over the same embeddings (Guo et al., DeepFM, 2017).

    One table holds the categories of all fields; `first` is where each field's begin.
    """

    def __init__(self, sizes: tuple[int, ...] = (60, 40, 20, 30), numbers: int = 3, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("first", torch.tensor((0, *sizes[:-1])).cumsum(0))
        self.linear, self.factors = nn.Embedding(sum(sizes), 1), nn.Embedding(sum(sizes), width)
        self.numbers = nn.Linear(numbers, 1)
        self.deep = nn.Sequential(
            nn.Linear(len(sizes) * width + numbers, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, categories: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = categories + self.first
        factors = self.factors(rows)  # [batch, fields, width]
        # All products of two fields: half of (the square of the sum - the sum of the squares)
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1, keepdim=True) / 2
        first_order = self.linear(rows).sum(1) + self.numbers(numbers)
        return torch.sigmoid(first_order + pairs + self.deep(torch.cat([factors.flatten(1), numbers], 1)))


class BERT4Rec(nn.Module):
    """A bidirectional transformer over a history of items, 0 for padding, tied to the item table (Sun et al., 2019)."""

    def __init__(self, items: int = 150, longest: int = 32, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(items, width, padding_idx=0), nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, items)
        self.head.weight = self.items.weight

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        hidden = self.items(history) + self.positions(torch.arange(history.shape[1]))
        logits: torch.Tensor = self.head(self.encoder(hidden, src_key_padding_mask=history == 0)[:, -1])
        return logits


def deepfm() -> Made:
    torch.manual_seed(0)
    inputs = {"categories": torch.randint(0, 20, (4, 4)), "numbers": torch.randn(4, 3)}
    return DeepFM(), inputs, {name: {0: "batch"} for name in inputs}


def bert4rec() -> Made:
    torch.manual_seed(0)
    history = torch.randint(1, 150, (3, 9))
    return BERT4Rec(), {"history": history}, {"history": {0: "batch", 1: "length"}}

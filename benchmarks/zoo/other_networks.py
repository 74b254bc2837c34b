# SPDX-License-Identifier: Apache-2.0
"""Small networks that are neither convolutional nor a transformers class: recurrent, tabular, graphs, gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LstmTagger(nn.Module):
    """Embedding, two LSTM layers, a class a token."""

    def __init__(self, vocabulary: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, 64, num_layers=2, batch_first=True)
        self.hidden, self.head = nn.Linear(64, 96), nn.Linear(96, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(input_ids))
        logits: Tensor = self.head(functional.relu(self.hidden(states)))
        return logits


class GruClassifier(nn.Module):
    """Bidirectional GRU over features, maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(20, 48)
        self.gru = nn.GRU(48, 40, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.Linear(64, 5))

    def forward(self, features: Tensor) -> Tensor:
        states, _ = self.gru(functional.relu(self.project(features)))
        logits: Tensor = self.head(states.amax(1))
        return logits


class TextCnn(nn.Module):
    """Convolutions of three widths over word vectors, maximum over time (Kim, 2014)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.convs = nn.ModuleList(nn.Conv1d(32, 40, size, padding=size // 2) for size in (3, 5, 7))
        self.head = nn.Linear(120, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        words = self.embed(input_ids).transpose(1, 2)
        logits: Tensor = self.head(torch.cat([functional.relu(conv(words)).amax(2) for conv in self.convs], 1))
        return logits


class DeepFm(nn.Module):
    """Click prediction: one embedding a category, pairwise products, and an MLP (Guo et al., 2017)."""

    def __init__(self, sizes: tuple[int, ...], width: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.first = nn.ModuleList(nn.Embedding(size, 1) for size in sizes)
        self.numbers = nn.Linear(6, width)
        deep = (len(sizes) + 1) * width
        self.mlp = nn.Sequential(nn.Linear(deep, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(),
                                 nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))  # fmt: skip

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        vectors = [table(categories[:, i]) for i, table in enumerate(self.embeddings)] + [self.numbers(numbers)]
        linear = torch.stack([table(categories[:, i]) for i, table in enumerate(self.first)]).sum(0)
        stacked = torch.stack(vectors, 1)
        pairs = (stacked.sum(1).square() - stacked.square().sum(1)).sum(1, keepdim=True) / 2
        return torch.sigmoid(linear + pairs + self.mlp(torch.cat(vectors, 1)))


class Tower(nn.Module):
    """Two towers of a retrieval model, and the cosine of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
        self.item = nn.Sequential(nn.Linear(40, 96), nn.SELU(), nn.Linear(96, 32))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        left, right = functional.normalize(self.user(user), dim=1), functional.normalize(self.item(item), dim=1)
        return (left * right).sum(1)


class Autoencoder(nn.Module):
    """Weights that are used twice: the decoder is the encoder transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 96), nn.Linear(96, 24)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(96)), nn.Parameter(torch.zeros(40))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        code = self.second(functional.relu(self.first(features)))
        hidden = functional.relu(code @ self.second.weight + self.bias1)
        return code, hidden @ self.first.weight + self.bias2


class Gcn(nn.Module):
    """Graph convolution (Kipf and Welling, 2017) over a list of edges, with scatter instead of a sparse product."""

    def __init__(self, features: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 64), nn.Linear(64, 7)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        degree = torch.ones_like(features[:, 0]).index_add(0, edges[1], torch.ones_like(edges[1], dtype=features.dtype))
        scale = degree.rsqrt()
        weight = (scale[edges[0]] * scale[edges[1]])[:, None]

        def spread(values: Tensor) -> Tensor:
            own = values * (scale * scale)[:, None]
            return own.index_add(0, edges[1], values[edges[0]] * weight)

        logits: Tensor = spread(self.second(functional.relu(spread(self.first(features)))))
        return logits


class RmsNorm(nn.Module):
    """Root mean square normalization (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, (hidden.shape[-1],), self.weight, 1e-6)


class GatedMlp(nn.Module):
    """Residual SwiGLU blocks (Shazeer, 2020); the two halves come out of one product in the first block."""

    def __init__(self, width: int = 48, inner: int = 128) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RmsNorm(width) for _ in range(3))
        self.both, self.down0 = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down1, self.head = nn.Linear(inner, width, bias=False), nn.Linear(width, 9)

    def forward(self, features: Tensor) -> Tensor:
        gate, up = self.both(self.norms[0](features)).chunk(2, -1)
        hidden = features + self.down0(functional.silu(gate) * up)
        normed = self.norms[1](hidden)
        hidden = hidden + self.down1(functional.silu(self.gate(normed)) * self.up(normed))
        logits: Tensor = self.head(self.norms[2](hidden))
        return logits


class Experts(nn.Module):
    """Four experts, all computed with Einsum and mixed by a softmax over a gate."""

    def __init__(self, width: int = 32, inner: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.zeros(experts, width, inner))
        self.down = nn.Parameter(torch.zeros(experts, inner, width))
        self.first, self.head = nn.Linear(20, width), nn.Linear(width, 6)

    def forward(self, features: Tensor) -> Tensor:
        hidden = functional.gelu(self.first(features))
        inner = functional.relu(torch.einsum("bd,edi->bei", hidden, self.up))
        outer = torch.einsum("bei,eid->bed", inner, self.down)
        mixed = torch.einsum("be,bed->bd", self.gate(hidden).softmax(-1), outer)
        logits: Tensor = self.head(hidden + mixed)
        return logits


class Attention(nn.Module):
    """A pre-norm block with `scaled_dot_product_attention`; query, key and value out of one product, as in nanoGPT."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.qkv(self.norm1(hidden)).split(width, 2)
        query, key, value = (p.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        found: Tensor = hidden + self.down(functional.gelu(self.up(self.norm2(hidden)), approximate="tanh"))
        return found


class SpeechTransformer(nn.Module):
    """As wav2vec 2.0 (Baevski et al., 2020): 1-D convolutions over samples, GroupNorm, then attention over frames."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Conv1d(1, 32, 10, 5, bias=False), nn.Conv1d(32, 48, 4, 4), nn.Conv1d(48, 48, 2, 2)]
        self.convs = nn.ModuleList(layers)
        self.norm, self.project = nn.GroupNorm(32, 32), nn.Linear(48, width)
        self.position = nn.Conv1d(width, width, 9, padding=4, groups=4)
        self.blocks = nn.Sequential(Attention(width), Attention(width))
        self.head = nn.Linear(width, 29)

    def forward(self, samples: Tensor) -> Tensor:
        hidden = functional.gelu(self.norm(self.convs[0](samples[:, None])))
        for conv in self.convs[1:]:
            hidden = functional.gelu(conv(hidden))
        frames = self.project(hidden.transpose(1, 2))
        frames = frames + functional.gelu(self.position(frames.transpose(1, 2))).transpose(1, 2)
        logits: Tensor = self.head(self.blocks(frames))
        return logits


class CharGpt(nn.Module):
    """nanoGPT in small: learned positions, fused query-key-value, tied output."""

    def __init__(self, vocabulary: int, width: int = 64, length: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.Sequential(Attention(width), Attention(width)), nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.norm(self.blocks(self.tokens(input_ids) + self.positions(positions)))
        return hidden @ self.tokens.weight.T

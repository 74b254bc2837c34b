# SPDX-License-Identifier: Apache-2.0
"""Graph networks over any number of nodes and edges, by gathering and index_add alone.

cd examples && onnxpress export architectures.graphs:gcn -o gcn.onnx

`features` [nodes, features]; `edges` int64 [2, edges], from its first row to its second.
"""

import torch
from torch import nn
from torch.nn import functional

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]


def sum_to(target: torch.Tensor, messages: torch.Tensor, nodes: int) -> torch.Tensor:
    """Sum the messages of the edges that end in a node: [edges, ...] to [nodes, ...]."""
    return messages.new_zeros((nodes, *messages.shape[1:])).index_add(0, target, messages)


def with_loops(edges: torch.Tensor, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and targets of the edges and of one more from every node to itself."""
    itself = torch.arange(nodes)
    return torch.cat([edges[0], itself]), torch.cat([edges[1], itself])


class GCN(nn.Module):
    """Neighbours weighted by both degrees (Kipf and Welling, 2017, equation 2)."""

    def __init__(self, features: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, width), nn.Linear(width, classes)
        self.dropout = nn.Dropout()

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        nodes = features.shape[0]
        source, target = with_loops(edges, nodes)
        scale = sum_to(target, torch.ones_like(target, dtype=features.dtype), nodes).rsqrt()
        weight = (scale[source] * scale[target])[:, None]
        hidden = features
        for layer in (self.first, self.second):
            hidden = hidden.relu() if layer is self.second else hidden
            hidden = sum_to(target, functional.linear(self.dropout(hidden), layer.weight)[source] * weight, nodes)
            hidden = hidden + layer.bias
        return hidden


class GraphSAGE(nn.Module):
    """A node beside the mean of its neighbours (Hamilton et al., 2017, algorithm 1)."""

    def __init__(self, features: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.own = nn.ModuleList([nn.Linear(features, width), nn.Linear(width, classes)])
        self.neighbours = nn.ModuleList([nn.Linear(features, width, bias=False), nn.Linear(width, classes, bias=False)])
        self.dropout = nn.Dropout()

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        nodes, (source, target) = features.shape[0], (edges[0], edges[1])
        count = sum_to(target, torch.ones_like(target, dtype=features.dtype), nodes).clamp(min=1)[:, None]
        hidden = features
        for layer, (own, neighbours) in enumerate(zip(self.own, self.neighbours, strict=True)):
            hidden = self.dropout(hidden.relu() if layer else hidden)
            # The product first, the mean after it: the same, over fewer numbers an edge
            hidden = own(hidden) + sum_to(target, neighbours(hidden)[source], nodes) / count
        return hidden


class Attention(nn.Module):
    """One GAT layer: a softmax over each node's incoming edges (Velickovic et al., 2018, equations 3 to 6)."""

    def __init__(self, features: int, width: int, heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, heads * width, bias=False)
        self.source, self.target = (nn.Parameter(torch.randn(heads, width) / width**0.5) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(heads, width))
        self.dropout = nn.Dropout(0.6)

    def forward(self, hidden: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.dropout(hidden)).unflatten(1, self.bias.shape)  # [nodes, heads, width]
        score = (hidden * self.source).sum(-1)[source] + (hidden * self.target).sum(-1)[target]
        score = functional.leaky_relu(score, 0.2)
        highest = score.new_zeros((hidden.shape[0], score.shape[1])).scatter_reduce(
            0, target[:, None].expand_as(score), score, "amax", include_self=False
        )
        share = (score - highest[target]).exp()
        share = share / sum_to(target, share, hidden.shape[0])[target]
        return sum_to(target, hidden[source] * self.dropout(share)[..., None], hidden.shape[0]) + self.bias


class GAT(nn.Module):
    """Heads side by side in the first layer, one in the second."""

    def __init__(self, features: int, classes: int, width: int = 8, heads: int = 8) -> None:
        super().__init__()
        self.first, self.second = Attention(features, width, heads), Attention(heads * width, classes, 1)

    def forward(self, features: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = with_loops(edges, features.shape[0])
        hidden = functional.elu(self.first(features, source, target).flatten(1))
        return self.second(hidden, source, target).flatten(1)


def gcn() -> Made:
    return _example(GCN)


def sage() -> Made:
    return _example(GraphSAGE)


def gat() -> Made:
    return _example(GAT)


def _example(network: type[nn.Module]) -> Made:
    torch.manual_seed(0)
    inputs = {"features": torch.randn(6, 12), "edges": torch.randint(0, 6, (2, 15))}
    return network(12, 4), inputs, {"features": {0: "nodes"}, "edges": {1: "edges"}}

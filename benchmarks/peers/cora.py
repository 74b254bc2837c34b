# SPDX-License-Identifier: Apache-2.0
"""Graph networks trained on Cora, as sources of the form `peers.cora:gcn`.

Cora (Sen et al., 2008) has 2,708 papers, each with a bag of 1,433 words and one of 7 topics, and their citations. The
split is that of Planetoid (Yang et al., 2016): 140 papers to train on, 500 for validation, 1,000 for the test.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from peers.assets import find

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from architectures.graphs import GAT, GCN, GraphSAGE

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]

AXES = {"features": {0: "nodes"}, "edges": {1: "edges"}}
EPOCHS = 200


@dataclass(frozen=True)
class Cora:
    """`features` float32 [nodes, words] whose rows sum to 1; `edges` int64 [2, edges]; `labels` [nodes]."""

    features: torch.Tensor
    edges: torch.Tensor
    labels: torch.Tensor
    train: torch.Tensor
    test: torch.Tensor


@cache
def load() -> Cora:
    with np.load(find("data_planetoid") / "cora.npz", allow_pickle=False) as data:
        features, edges, labels, train, test = (
            torch.from_numpy(data[key]) for key in ("features", "edge_index", "labels", "train", "test")
        )
    return Cora(features / features.sum(1, keepdim=True).clamp(min=1), edges, labels, train, test)


def train(network: nn.Module, cora: Cora, *, epochs: int, rate: float) -> nn.Module:
    """Full-batch Adam with weight decay 5e-4, as the three papers have it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, weight_decay=5e-4)
    network.train()
    for _ in range(epochs):
        optimizer.zero_grad()
        logits = network(cora.features, cora.edges)
        functional.cross_entropy(logits[cora.train], cora.labels[cora.train]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def gcn() -> Made:
    return _trained("gcn")


def sage() -> Made:
    return _trained("sage")


def gat() -> Made:
    return _trained("gat")


KINDS = {"gcn": (GCN, 0.01), "sage": (GraphSAGE, 0.01), "gat": (GAT, 0.005)}


@cache
def _trained(name: str) -> Made:
    cora = load()
    torch.manual_seed(0)
    kind, rate = KINDS[name]
    network = train(kind(cora.features.shape[1], 7), cora, epochs=EPOCHS, rate=rate)
    nodes = 60  # of the example; the graph takes any number
    inner = (cora.edges < nodes).all(0)
    return network, {"features": cora.features[:nodes], "edges": cora.edges[:, inner]}, AXES

# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks: a tagger for sequences of different lengths, and one that is fed step by step.

cd examples && onnxpress export architectures.recurrent:tagger -o tagger.onnx
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]


class Tagger(nn.Module):
    """Two bidirectional LSTM layers; what lies behind a sequence's end counts for nothing, hence the packing."""

    def __init__(self, words: int = 200, width: int = 32, tags: int = 9) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])
        logits: torch.Tensor = self.head(hidden)
        return logits


class Streamer(nn.Module):
    """A GRU over however many frames there are; the state that comes out goes in again with the next ones."""

    def __init__(self, features: int = 16, width: int = 32, layers: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, layers, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, frames: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, state = self.gru(frames, state)
        return {"logits": self.head(hidden), "new_state": state}


def tagger() -> Made:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(0, 200, (3, 7)), "lengths": torch.tensor([7, 3, 5])}
    return Tagger(), inputs, {"ids": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}


def streamer() -> Made:
    torch.manual_seed(0)
    inputs = {"frames": torch.randn(2, 6, 16), "state": torch.zeros(2, 2, 32)}
    return Streamer(), inputs, {"frames": {0: "batch", 1: "time"}, "state": {1: "batch"}}

# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from onnxpress.contracts.errors import ExportError
from onnxpress.exporters.dynamo import export_module
from onnxpress.exporters.graph_file import write
from onnxpress.exporters.packed import padded

AXES = {"x": {0: "time", 1: "batch"}, "lengths": {0: "batch"}}


class Everything(nn.Module):
    """A layer of each kind, one after the other; all final states, an initial one, padding of -1, cut short."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, bidirectional=True)
        self.gru = nn.GRU(8, 5, bias=False, bidirectional=True)
        self.tanh, self.relu = nn.RNN(10, 6), nn.RNN(6, 4, nonlinearity="relu")

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        packed, (hidden, cell) = self.lstm(packed)
        packed, gates = self.gru(packed, hidden.new_ones(2, x.shape[1], 5) / 2)
        packed, plain = self.tanh(packed)
        packed, rectified = self.relu(packed)
        outputs, found = pad_packed_sequence(packed, padding_value=-1.0)
        return outputs, found, hidden, cell, gates, plain, rectified


def test_every_kind_of_layer_is_what_pytorch_computes_on_packed_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Everything().eval()
    example = {"x": torch.randn(6, 3, 3), "lengths": torch.tensor([6, 2, 4])}
    names = [str(n) for n in range(7)]
    model = export_module(module, example, output_names=names, dynamic_axes=AXES)
    kinds = [node.op_type for node in model.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    assert kinds == ["LSTM", "LSTM", "GRU", "RNN", "RNN"]
    assert model.graph.outputs[0].shape is not None
    assert model.graph.outputs[0].shape[0] != "time"  # the longest, which only the lengths tell
    write(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for time, lengths in ((6, [6, 2, 4]), (8, [3, 5]), (1, [1]), (5, [1, 1, 5, 2])):
        x = torch.randn(time, len(lengths), 3)
        with torch.no_grad():
            wanted = module(x, torch.tensor(lengths))
        got = session.run(None, {"x": x.numpy(), "lengths": np.array(lengths)})
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


def test_what_packing_alone_can_do_is_refused_by_name() -> None:
    class Packed(nn.Module):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (pack_padded_sequence(x, lengths, enforce_sorted=False).data * 2,)

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, proj_size=2)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))[1][0],)

    example = {"x": torch.randn(6, 3, 3), "lengths": torch.tensor([6, 2, 4])}
    for module, said in ((Packed(), "pad the sequence first"), (Projected(), "proj_size has no counterpart in ONNX")):
        with pytest.raises(ExportError, match=said):
            export_module(module.eval(), example, output_names=["y"], dynamic_axes=AXES)


def test_everything_is_as_before_afterwards() -> None:
    here = sys.modules[__name__]
    before = (nn.LSTM.forward, nn.GRU.forward, rnn.pack_padded_sequence, here.pack_padded_sequence)

    def fail() -> None:
        with padded(Everything()):
            assert here.pack_padded_sequence is rnn.pack_padded_sequence is not before[2]
            assert nn.LSTM.forward is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert before == (nn.LSTM.forward, nn.GRU.forward, rnn.pack_padded_sequence, here.pack_padded_sequence)

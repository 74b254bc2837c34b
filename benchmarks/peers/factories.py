# SPDX-License-Identifier: Apache-2.0
"""The models that are no transformers folder, as sources of the form `peers.factories:name`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from peers.assets import find

Made = tuple[nn.Module, dict[str, torch.Tensor]]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Where the size changes the shortcut has no weights: every other pixel, and zeros for the new channels (option A in
    He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(image)))))
        if self.added:
            half = self.added // 2
            image = functional.pad(image[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(inner + image)


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 channels: 6 x blocks + 2 layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(before, after, stride), *(Block(after, after, 1) for _ in range(blocks - 1)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu(self.bn1(self.conv1(image)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: torch.Tensor = self.linear(hidden.mean((2, 3)))
        return logits


class Fire(nn.Module):
    """SqueezeNet's module: a 1x1 convolution to few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, before: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = functional.relu(self.squeeze(image))
        return torch.cat([functional.relu(self.expand1x1(image)), functional.relu(self.expand3x3(image))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 (Iandola et al., 2016, table 1), with the names of torchvision's state dict."""

    def __init__(self) -> None:
        super().__init__()
        pool = [nn.MaxPool2d(3, stride=2, ceil_mode=True) for _ in range(3)]
        fires = [Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), Fire(256, 32, 128), Fire(256, 48, 192),
                 Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256)]  # fmt: skip
        first = [nn.Conv2d(3, 96, 7, stride=2), nn.ReLU(), pool[0]]
        self.features = nn.Sequential(*first, *fires[:3], pool[1], *fires[3:7], pool[2], fires[7])
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(image)).mean((2, 3))
        return logits


class Bert(nn.Module):
    """A transformers classifier that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits: torch.Tensor = found.logits
        return logits


def resnet20() -> Made:
    return _resnet(3, "resnet20-12fca82f.th")


def resnet44() -> Made:
    return _resnet(7, "resnet44-014dd654.th")


def _resnet(blocks: int, file: str) -> Made:
    saved = torch.load(find("cifar_resnet") / file, map_location="cpu", weights_only=True)["state_dict"]
    model = CifarResNet(blocks)
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()})
    return model.eval(), {"image": torch.zeros(2, 3, 32, 32)}


def squeezenet() -> Made:
    (file,) = find("squeezenet_v1.0/derived").glob("*.pth")
    model = SqueezeNet()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval(), {"image": torch.zeros(2, 3, 227, 227)}


def bert_base() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    torch.manual_seed(0)
    model = Bert(BertForSequenceClassification(BertConfig(num_labels=2))).eval()
    ones = torch.ones((2, 9), dtype=torch.int64)
    inputs = {"input_ids": ones, "attention_mask": ones.clone(), "token_type_ids": torch.zeros_like(ones)}
    return model, inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}

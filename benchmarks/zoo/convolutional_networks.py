# SPDX-License-Identifier: Apache-2.0
"""Small convolutional networks, one for every way in which published ones couple their channels."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(before: int, after: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    layer = nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after))


class Classifier(nn.Module):
    """Features, their mean over all pixels, one linear layer."""

    def __init__(self, features: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image).mean((2, 3)))
        return logits


class Vgg(nn.Module):
    """Convolutions with biases, then Flatten of channels and pixels into a linear layer (Simonyan, 2015)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 48, 64]
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for a, b in pairwise(widths)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(64 * 4 * 4, 96), nn.ReLU(), nn.Dropout(), nn.Linear(96, 10))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(image), 1))
        return logits


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups for ResNeXt; Xie et al., 2017), 1x1, and a shortcut that is projected where it must be."""

    def __init__(self, before: int, inner: int, after: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.reduce = convolution(before, inner, 1)
        self.spatial = convolution(inner, inner, stride=stride, groups=groups)
        self.expand = convolution(inner, after, 1)
        changes = stride > 1 or before != after
        self.shortcut = convolution(before, after, 1, stride=stride) if changes else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        inner = functional.relu(self.spatial(functional.relu(self.reduce(image))))
        return functional.relu(self.expand(inner) + self.shortcut(image))


def resnet(groups: int = 1) -> Classifier:
    """Two stages of two bottlenecks; ResNeXt with groups."""
    stages = [Bottleneck(32, 32, 64, 1, groups), Bottleneck(64, 32, 64, 1, groups),
              Bottleneck(64, 48, 96, 2, groups), Bottleneck(96, 48, 96, 1, groups)]  # fmt: skip
    return Classifier(nn.Sequential(convolution(3, 32), nn.ReLU(), *stages), 96)


class SqueezeExcite(nn.Module):
    """Channels scaled by a small network over their means (Hu et al., 2018)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, image: Tensor) -> Tensor:
        scale = self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(image, 1))))
        return image * functional.hardsigmoid(scale)


class Inverted(nn.Module):
    """MobileNet's block: wider, one filter a channel, narrower again without activation (Howard et al., 2019)."""

    def __init__(self, before: int, inner: int, after: int, stride: int, activation: type[nn.Module], se: bool) -> None:
        super().__init__()
        excite = [SqueezeExcite(inner, inner // 4)] if se else []
        self.layers = nn.Sequential(
            convolution(before, inner, 1), activation(), convolution(inner, inner, stride=stride, groups=inner),
            *excite, activation(), convolution(inner, after, 1),
        )  # fmt: skip
        self.residual = stride == 1 and before == after

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.layers(image)
        return image + found if self.residual else found


def mobilenet(version: int) -> Classifier:
    """MobileNetV2 with ReLU6, or V3 with squeeze-and-excite and hard-swish."""
    activation: type[nn.Module] = nn.ReLU6 if version == 2 else nn.Hardswish
    se = version == 3
    blocks = [Inverted(16, 64, 24, 2, activation, se), Inverted(24, 96, 24, 1, activation, se),
              Inverted(24, 96, 40, 2, activation, se), Inverted(40, 120, 40, 1, activation, se)]  # fmt: skip
    last = (convolution(40, 96, 1), activation())
    return Classifier(nn.Sequential(convolution(3, 16), activation(), *blocks, *last), 96)


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass by, then both halves are interleaved (Ma et al., 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(convolution(half, half, 1), nn.ReLU(), convolution(half, half, groups=half),
                                    convolution(half, half, 1), nn.ReLU())  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        left, right = image.chunk(2, 1)
        joined = torch.cat([left, self.branch(right)], 1)
        batch, width, height, breadth = joined.shape
        return joined.view(batch, 2, width // 2, height, breadth).transpose(1, 2).reshape(batch, width, height, breadth)


def shufflenet() -> Classifier:
    return Classifier(
        nn.Sequential(convolution(3, 32, stride=2), nn.ReLU(), Shuffle(32), Shuffle(32), convolution(32, 64, 1)), 64
    )


class Dense(nn.Module):
    """DenseNet's layer: normalization first, and its output joined to everything before it (Huang et al., 2017)."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        inner = self.conv1(functional.relu(self.norm1(image)))
        return torch.cat([image, self.conv2(functional.relu(self.norm2(inner)))], 1)


def densenet() -> Classifier:
    transition = nn.Sequential(nn.BatchNorm2d(72), nn.ReLU(), nn.Conv2d(72, 36, 1, bias=False), nn.AvgPool2d(2))
    last = nn.Sequential(nn.BatchNorm2d(68), nn.ReLU())
    return Classifier(
        nn.Sequential(convolution(3, 24), *(Dense(24 + 16 * i, 16) for i in range(3)), transition,
                      *(Dense(36 + 16 * i, 16) for i in range(2)), last), 68,
    )  # fmt: skip


class Inception(nn.Module):
    """Four branches side by side, one of them pooling (Szegedy et al., 2015)."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.one = convolution(before, 16, 1)
        self.three = nn.Sequential(convolution(before, 24, 1), nn.ReLU(), convolution(24, 32))
        self.five = nn.Sequential(convolution(before, 8, 1), nn.ReLU(), convolution(8, 16, 5))
        self.pool = convolution(before, 16, 1)

    def forward(self, image: Tensor) -> Tensor:
        pooled = functional.max_pool2d(image, 3, 1, 1)
        return functional.relu(torch.cat([self.one(image), self.three(image), self.five(image), self.pool(pooled)], 1))


def googlenet() -> Classifier:
    return Classifier(nn.Sequential(convolution(3, 32, stride=2), nn.ReLU(), Inception(32), Inception(80)), 80)


class UNet(nn.Module):
    """Down and up again, transposed convolutions, and skips that are concatenated (Ronneberger et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()

        def double(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(convolution(before, after), nn.ReLU(), convolution(after, after), nn.ReLU())

        self.down1, self.down2, self.bottom = double(3, 16), double(16, 32), double(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1 = double(64, 32), double(32, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.down1(image)
        second = self.down2(functional.max_pool2d(first, 2))
        hidden = self.up2(self.bottom(functional.max_pool2d(second, 2)))
        hidden = self.up1(self.join2(torch.cat([second, hidden], 1)))
        mask: Tensor = self.out(self.join1(torch.cat([first, hidden], 1)))
        return mask


class Pyramid(nn.Module):
    """Features of two sizes, the smaller one resized and added (feature pyramid; Lin et al., 2017), two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 32, stride=2), nn.ReLU())
        self.deep = nn.Sequential(convolution(32, 64, stride=2), nn.LeakyReLU(0.1), convolution(64, 64), nn.PReLU(64))
        self.lateral, self.top = nn.Conv2d(32, 48, 1), nn.Conv2d(64, 48, 1)
        self.scores, self.boxes = nn.Conv2d(48, 6, 3, padding=1), nn.Conv2d(48, 4, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        near = self.stem(image)
        top = functional.interpolate(self.top(self.deep(near)), scale_factor=2.0, mode="nearest")
        merged = self.lateral(near) + top
        return torch.sigmoid(self.scores(merged)), self.boxes(merged)


class GroupNormNet(nn.Module):
    """GroupNorm instead of BatchNorm, with a residual (Wu and He, 2018)."""

    def __init__(self, width: int = 48, groups: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.stem(image)
        hidden = hidden + self.conv2(functional.silu(self.norm2(self.conv1(functional.silu(self.norm1(hidden))))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


class StyleNet(nn.Module):
    """Fast style transfer: InstanceNorm, reflected borders, residual blocks, resize (Johnson et al., 2016)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()

        def layer(before: int, after: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(before, after, 3, stride), nn.InstanceNorm2d(after, affine=True)
            )

        self.down = nn.Sequential(layer(3, 24), nn.ReLU(), layer(24, width, 2), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(layer(width, width), nn.ReLU(), layer(width, width)) for _ in "ab")
        self.up, self.out = layer(width, 24), nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.down(image)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        return torch.tanh(self.out(functional.relu(self.up(hidden))))


class SuperResolution(nn.Module):
    """Sub-pixel convolution: channels become pixels (DepthToSpace; Shi et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 32, 5, padding=2), nn.ELU(), nn.Conv2d(32, 24, 3, padding=1), nn.ELU())
        self.out = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return functional.pixel_shuffle(self.out(self.layers(image)), 2)


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over patches and over channels in turn (Tolstikhin et al., 2021)."""

    def __init__(self, width: int = 48, patches: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.tokens = nn.ModuleList(self._mlp(patches, 32) for _ in "ab")
        self.channels = nn.ModuleList(self._mlp(width, 96) for _ in "ab")
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _mlp(width: int, inner: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.patch(image).flatten(2).transpose(1, 2)
        for i in range(2):
            hidden = hidden + self.tokens[i](self.norms[2 * i](hidden).transpose(1, 2)).transpose(1, 2)
            hidden = hidden + self.channels[i](self.norms[2 * i + 1](hidden))
        logits: Tensor = self.head(self.norms[4](hidden).mean(1))
        return logits


class SpeechCommands(nn.Module):
    """Keyword spotting on a spectrum: depthwise separable 1-D convolutions over time."""

    def __init__(self, mels: int = 40, width: int = 64) -> None:
        super().__init__()

        def separable() -> nn.Sequential:
            depthwise = nn.Conv1d(width, width, 9, padding=4, groups=width, bias=False)
            return nn.Sequential(depthwise, nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU())

        self.stem = nn.Sequential(nn.Conv1d(mels, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.ModuleList(separable() for _ in range(3))
        self.head = nn.Linear(width, 12)

    def forward(self, spectrum: Tensor) -> Tensor:
        hidden = self.stem(spectrum)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits: Tensor = self.head(functional.adaptive_avg_pool1d(hidden, 1).flatten(1))
        return logits

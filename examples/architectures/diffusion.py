# SPDX-License-Identifier: Apache-2.0
"""Denoisers of diffusion models: a UNet over images of any size, and one of patches (DiT).

cd examples && onnxpress export architectures.diffusion:unet -o unet.onnx
"""

import math

import torch
from torch import nn
from torch.nn import functional

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]


def sinusoids(steps: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of a step, [batch] to [batch, width]."""
    angles = steps[:, None].float() * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class Residual(nn.Module):
    """Two convolutions, told the step between them."""

    def __init__(self, before: int, after: int, told: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.step = nn.Linear(told, after)
        self.second = nn.Sequential(nn.GroupNorm(4, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1))
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, image: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        hidden = self.first(image) + self.step(told)[:, :, None, None]
        return self.second(hidden) + self.shortcut(image)


class Attention(nn.Module):
    """Every pixel looks at every pixel."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(4, channels), heads
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for part in self.qkv(self.norm(image)).chunk(3, dim=1)
        )
        seen = functional.scaled_dot_product_attention(query, key, value)
        return image + self.out(seen.transpose(2, 3).flatten(1, 2).reshape(image.shape))


class UNet(nn.Module):
    """One step down and up again, with attention at the bottom (Ho et al., 2020, appendix B, in small)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.told = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.enter = nn.Conv2d(3, channels, 3, padding=1)
        self.down = Residual(channels, channels, 4 * channels)
        self.halve = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.bottom, self.look = Residual(2 * channels, 2 * channels, 4 * channels), Attention(2 * channels)
        self.up = Residual(3 * channels, channels, 4 * channels)
        self.leave = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, image: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        told = self.told(sinusoids(step, self.enter.out_channels))
        upper = self.down(self.enter(image), told)
        lower = self.look(self.bottom(self.halve(upper), told))
        lower = functional.interpolate(lower, size=upper.shape[2:], mode="nearest")
        return self.leave(self.up(torch.cat([upper, lower], 1), told))


class DiTBlock(nn.Module):
    """A transformer block that the condition scales, shifts and gates (Peebles and Xie, 2023, adaLN-Zero)."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.told = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, patches: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.told(condition)[:, None].chunk(6, dim=-1)
        hidden = self.norms[0](patches) * (1 + scale) + shift
        patches = patches + gate * self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return patches + gate2 * self.mlp(self.norms[1](patches) * (1 + scale2) + shift2)


def unet() -> Made:
    torch.manual_seed(0)
    inputs = {"image": torch.randn(2, 3, 16, 12), "step": torch.tensor([3, 700])}
    return UNet(), inputs, {"image": {0: "batch", 2: "height", 3: "width"}, "step": {0: "batch"}}


def dit_block() -> Made:
    torch.manual_seed(0)
    inputs = {"patches": torch.randn(2, 9, 32), "condition": torch.randn(2, 32)}
    return DiTBlock(), inputs, {"patches": {0: "batch", 1: "patches"}, "condition": {0: "batch"}}

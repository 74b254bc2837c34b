# SPDX-License-Identifier: Apache-2.0
"""A detector without suppression: the centres of objects are peaks of a map (Zhou et al., Objects as Points, 2019).

cd examples && onnxpress export architectures.detection:centres -o detector.onnx
"""

import torch
from torch import nn
from torch.nn import functional

Made = tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]

STRIDE = 4


class CentreDetector(nn.Module):
    """Returns the `kept` highest peaks: boxes [batch, kept, 4] as corners in pixels, scores and classes."""

    def __init__(self, classes: int = 3, width: int = 16, kept: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.heat, self.size, self.offset = (nn.Conv2d(width, n, 1) for n in (classes, 2, 2))
        self.kept = kept

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.body(image)
        heat = self.heat(hidden).sigmoid()
        # A peak is its own neighbourhood's maximum: what others remove by non-maximum suppression never appears
        heat = torch.where(functional.max_pool2d(heat, 3, stride=1, padding=1) == heat, heat, 0)
        scores, places = heat.flatten(1).topk(self.kept)
        height, width = heat.shape[2:]
        classes, cell = places // (height * width), places % (height * width)
        size, offset = (
            head(hidden).flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)).transpose(1, 2)
            for head in (self.size, self.offset)
        )
        centre = torch.stack([cell % width, cell // width], -1) + offset
        corners = torch.cat([centre - size.exp() / 2, centre + size.exp() / 2], -1)
        return {"boxes": corners * STRIDE, "scores": scores, "classes": classes}


def centres() -> Made:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 24)
    return CentreDetector(), {"image": image}, {"image": {0: "batch", 2: "height", 3: "width"}}

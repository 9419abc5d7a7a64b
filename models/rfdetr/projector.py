"""From the encoder's maps to those that the decoder samples: C2f stages with layer norms (YOLOv8's, via LW-DETR).

Maps have their channels last throughout: (B, H, W, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.linear import linear

EPS = 1e-6  # of the layer norms
BOTTLENECKS = 3


class Projector(nn.Module):
    """Maps of one size, `count` of `channels` → a map of `width` channels for each scale: 1, 2 (larger) or 0.5."""

    def __init__(self, channels: int, count: int, width: int, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.stages_sampling = nn.ModuleList(
            nn.ModuleList(_resampling(channels, scale) for _ in range(count)) for scale in scales
        )
        self.stages = nn.ModuleList(
            nn.Sequential(C2f(count * int(channels // max(1, scale)), width), nn.LayerNorm(width, eps=EPS))
            for scale in scales
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        features = []
        changes: Any
        for changes, stage in zip(self.stages_sampling, self.stages, strict=True):
            fitting = [change(x) for change, x in zip(changes, maps, strict=True)]
            features.append(stage(torch.cat(fitting, -1)))
        return features


class C2f(nn.Module):
    """Half of the channels go through bottlenecks; what each of them gives is joined and fused."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.cv1 = ConvNormAct(channels, width, 1)
        self.cv2 = ConvNormAct((2 + BOTTLENECKS) * half, width, 1)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(BOTTLENECKS))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, -1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, -1))


class Bottleneck(nn.Module):
    """Two 3×3 convolutions, without a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1 = ConvNormAct(width, width, 3)
        self.cv2 = ConvNormAct(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))


class ConvNormAct(nn.Module):
    """A convolution without bias, a layer norm over channels (`bn` in checkpoints), SiLU or another activation."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.LayerNorm(width, eps=EPS)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.kernel_size == (1, 1):
            x = linear(x, self.conv.weight.flatten(1))
        else:
            # Laid out with channels first: oneDNN then sums in an order that has half the rounding error, and near
            # ties among the proposals fall as they do officially.
            x = self.conv(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        return self.act(self.bn(x))


class Upsampling(nn.Sequential):
    """Twice the size, half the channels; a sequence of one, as checkpoints name it."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.ConvTranspose2d(channels, channels // 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _resampling(channels: int, scale: float) -> nn.Module:
    if scale == 2:
        return Upsampling(channels)
    return nn.Sequential(ConvNormAct(channels, channels, 3, 2, nn.ReLU)) if scale == 0.5 else nn.Identity()

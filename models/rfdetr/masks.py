"""The mask heads: a mask is the product of a query's vector with a map of features at a quarter of the input's size.

Masks of all queries are never built in training: the criterion multiplies where it samples, and builds those of the
matched queries alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import checkpointed
from models.rfdetr.decoder import Perceptron

RATIO = 4  # of the input's sides to the masks'


class MaskHead(nn.Module):
    """What both heads share: masks are products of `vectors` and `planes`, plus `bias`."""

    bias: nn.Parameter

    def forward(
        self, states: Tensor, proposed: Tensor, maps: list[Tensor], feature: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Masks in evaluation, their factors in training.

        Args:
            states: (L, B, N, D), the decoder's, of all layers in training and of the last in evaluation.
            proposed: (B, K, D), the proposals' states.
            maps: (B, h, w, C), the encoder's.
            feature: (B, h, w, D), the projector's finest.
            size: (height, width) of the input.
        """
        planes = self.planes(maps, feature, size)
        if not self.training:
            masks = self.vectors(states[-1]) @ planes[-1].flatten(2)
            return {"masks": masks.unflatten(-1, planes.shape[-2:]) + self.bias}
        return {
            "mask_queries": self.vectors(states),
            "mask_features": planes[:-1],
            "encoder_mask_queries": self.vectors(proposed),
            "encoder_mask_features": planes[-1],
            "mask_bias": self.bias,
        }

    def vectors(self, states: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        raise NotImplementedError

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> Tensor:
        """In training (L + 1, B, D, H/4, W/4): one for each layer and at last one for the proposals; in evaluation
        (1, B, D, H/4, W/4), the last layer's."""
        raise NotImplementedError


class OfficialMaskHead(MaskHead):
    """The official head: a depthwise block more with each decoder layer; the proposals' map goes through none."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(DepthwiseBlock(width) for _ in range(layers))
        self.spatial_features_proj = nn.Conv2d(width, width, 1)
        self.query_features_block = QueryBlock(width)
        self.query_features_proj = nn.Linear(width, width)
        self.checkpointing = False

    def vectors(self, states: Tensor) -> Tensor:
        return self.query_features_proj(self.query_features_block(states))

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> Tensor:
        stages = [resize(feature, size)]
        for block in self.blocks:
            x = stages[-1]
            stages.append(checkpointed(block, x) if self.checkpointing and self.training else block(x))
        stacked = torch.stack([*stages[1:], stages[0]] if self.training else stages[-1:])
        projection = self.spatial_features_proj
        return F.linear(stacked, projection.weight.flatten(1), projection.bias).permute(0, 1, 4, 2, 3)


class FpnMaskHead(MaskHead):
    """A feature pyramid: the encoder's maps, deepest first, are added one by one to the projector's and smoothed.

    One map serves all decoder layers.
    """

    def __init__(self, channels: int, count: int, width: int, layers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.layers = layers
        self.lateral = nn.ModuleList(nn.Linear(channels, width) for _ in range(count))
        self.smooth = nn.ModuleList(SmoothingBlock(width) for _ in range(count))
        self.finest = SmoothingBlock(width)
        self.features = nn.Linear(width, width)
        self.queries = Perceptron(width, width, width, 3)

    def vectors(self, states: Tensor) -> Tensor:
        return self.queries(states)

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> Tensor:
        x = feature
        for lateral, smooth, level in zip(self.lateral, self.smooth, reversed(maps), strict=True):
            x = smooth(x + lateral(level))
        plane = self.features(self.finest(resize(x, size))).permute(0, 3, 1, 2)
        return plane.expand(self.layers + 1 if self.training else 1, *plane.shape)


class DepthwiseBlock(nn.Module):
    """A residual block of ConvNeXt's kind without its perceptron; channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + F.gelu(self.pwconv1(self.norm(y)))


class QueryBlock(nn.Module):
    """A residual perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm_in(x))


class SmoothingBlock(nn.Module):
    """A 3×3 convolution, a layer norm over channels, and GELU; channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w, C) to a quarter of an input's size (height, width), bilinear."""
    target = (size[0] // RATIO, size[1] // RATIO)
    return F.interpolate(x.permute(0, 3, 1, 2), target, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

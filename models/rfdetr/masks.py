"""The mask heads: a mask is the product of a query's vector with a map of features at a quarter of the input's size.

Masks of all queries are never built in training: the criterion multiplies where it samples, and builds those of the
matched queries alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import checkpointed, without_autocast
from models.linear import linear
from models.rfdetr.decoder import Perceptron
from models.rfdetr.rows import few_rows

RATIO = 4  # of the input's sides to the masks'


class MaskHead(nn.Module):
    """What both heads share: masks are products of `vectors` and `planes`, plus `bias`."""

    bias: nn.Parameter

    def forward(
        self, states: Tensor, proposed: Tensor, maps: list[Tensor], feature: Tensor, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Masks in evaluation, their factors in training.

        Args:
            states: (L, B, N, D), the decoder's, of all layers in training and of the last in evaluation.
            proposed: (B, K, D), the proposals' states.
            maps: (B, h, w, C), the encoder's.
            feature: (B, h, w, D), the projector's finest.
            size: (height, width) of the input.
        """
        first, *others = self.planes(maps, feature, size)
        if not self.training:
            plane = (others or [first])[-1]
            masks = self.vectors(states[-1]) @ plane.flatten(1, 2).mT
            return {"masks": masks.unflatten(-1, plane.shape[1:3]) + self.bias}
        parameters = [parameter for layer in self.vector_layers() for parameter in layer.parameters()]
        return {
            "mask_queries": few_rows(self.vectors, states, parameters),
            # Not stacked: that would copy the largest tensors of a step, and their gradients.
            "mask_features": tuple(x.permute(0, 3, 1, 2) for x in others or [first] * len(states)),
            "encoder_mask_queries": few_rows(self.vectors, proposed, parameters),
            "encoder_mask_features": first.permute(0, 3, 1, 2),
            "mask_bias": self.bias.clone(),
        }

    def vectors(self, states: Tensor) -> Tensor:
        """(…, D) → (…, E)."""
        raise NotImplementedError

    def vector_layers(self) -> list[nn.Module]:
        """Those that `vectors` uses."""
        raise NotImplementedError

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """(B, H/4, W/4, E): one for the proposals, and one for each decoder layer unless that one serves them too."""
        raise NotImplementedError


class OfficialMaskHead(MaskHead):
    """The official head: a depthwise block more with each decoder layer; the proposals' plane goes through none.

    Officially both the queries and the planes go through a last linear layer. In the product of the two these are one
    matrix, which is applied to the queries: they are far fewer than pixels. What the planes' bias adds to a mask is the
    same everywhere; it is the vectors' last channel, and that of the planes is 1.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(DepthwiseBlock(width) for _ in range(layers))
        self.spatial_features_proj = nn.Conv2d(width, width, 1)
        self.query_features_block = QueryBlock(width)
        self.query_features_proj = nn.Linear(width, width)
        self.checkpointing = False

    def vectors(self, states: Tensor) -> Tensor:
        planes, queries = self.spatial_features_proj, self.query_features_proj
        with without_autocast(states):
            both = torch.cat([planes.weight.flatten(1), planes.get_parameter("bias")[:, None]], 1).T
            weight, bias = both @ queries.weight, both @ queries.bias
        return linear(self.query_features_block(states), weight, bias)

    def vector_layers(self) -> list[nn.Module]:
        return [self.spatial_features_proj, self.query_features_block, self.query_features_proj]

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> list[Tensor]:
        stages = [resize(feature, size)]
        for block in self.blocks:
            x = stages[-1]
            stages.append(checkpointed(block, x) if self.checkpointing and self.training else block(x))
        return [F.pad(x, (0, 1), value=1.0) for x in (stages if self.training else stages[-1:])]


class FpnMaskHead(MaskHead):
    """A feature pyramid: the encoder's maps, deepest first, are added one by one to the projector's and smoothed.

    One plane serves the proposals and all decoder layers.
    """

    def __init__(self, channels: int, count: int, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.lateral = nn.ModuleList(nn.Linear(channels, width) for _ in range(count))
        self.smooth = nn.ModuleList(SmoothingBlock(width) for _ in range(count))
        self.finest = SmoothingBlock(width)
        self.queries = Perceptron(width, width, width, 3)

    def vectors(self, states: Tensor) -> Tensor:
        return self.queries(states)

    def vector_layers(self) -> list[nn.Module]:
        return [self.queries]

    def planes(self, maps: list[Tensor], feature: Tensor, size: tuple[int, int]) -> list[Tensor]:
        x = feature
        for lateral, smooth, level in zip(self.lateral, self.smooth, reversed(maps), strict=True):
            x = smooth(x + lateral(level))
        return [self.finest(resize(x, size))]


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

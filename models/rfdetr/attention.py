"""The decoder's two attentions: among the queries of a group, and to a few sampled points of the maps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deformable import full_precision
from models.linear import linear


class SelfAttention(nn.Module):
    """Attention among the tokens of each sequence; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(N, Q, D) of both → (N, Q, D)."""
        width = x.shape[-1]
        # Sliced, not split: the halves of a split share one backward pass over the whole matrix.
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query, key = linear(x + positions, weight[: 2 * width], bias[: 2 * width]).chunk(2, -1)
        value = linear(x, weight[2 * width :], bias[2 * width :])
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        rate = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], dropout_p=rate)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DeformableAttention(nn.Module):
    """Each head of each query reads `points` places of every map, near its box, and weighs them (Zhu et al., 2020,
    arXiv:2010.04159)."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._initialise()

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """What the queries read, (B, Q, D).

        Args:
            x: (B, Q, D) queries with their positions.
            boxes: (B, Q, 4) center x, center y, width, height as shares of the image.
            memory: (B, S, D), the maps one after the other.
            sizes: (height, width) of each map.
        """
        shape = (self.heads, self.levels, self.points)
        offsets = full_precision(self.sampling_offsets(x)).unflatten(-1, (*shape, 2))
        boxes = boxes[:, :, None, None, None]
        places = boxes[..., :2] + offsets * (boxes[..., 2:] * (0.5 / self.points))
        weights = self.attention_weights(x).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        return self.output_proj(sample_maps(self.value_proj(memory), sizes, places, weights))

    def _initialise(self) -> None:
        """Heads look in directions all around, farther with each point, and weigh them all alike."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        steps = ring[:, None, None] * torch.arange(1, self.points + 1)[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(steps.expand(-1, self.levels, -1, -1).flatten())
        for parameter in self.attention_weights.parameters():
            nn.init.zeros_(parameter)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)


def sample_maps(values: Tensor, sizes: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples, 0 outside the maps.

    Args:
        values: (B, S, D), the maps one after the other.
        sizes: (height, width) of each map.
        places: (B, Q, heads, levels, points, 2) x and y as shares of the image.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, D).
    """
    heads = places.shape[2]
    grid = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # B·heads, Q, levels, points, 2
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # B·heads, 1, Q, levels, points
    total: Any = 0
    for level, (part, size) in enumerate(zip(values.split([h * w for h, w in sizes], 1), sizes, strict=True)):
        plane = full_precision(part).transpose(1, 2).reshape(grid.shape[0], -1, *size)  # B·heads, D/heads, h, w
        sampled = F.grid_sample(plane, grid[:, :, level], mode="bilinear", align_corners=False)
        total = total + (sampled * weights[..., level, :]).sum(-1)
    return total.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)

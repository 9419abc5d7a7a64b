"""The decoder: queries that attend to each other within their group, and to points of the maps near their boxes."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import checkpointed
from models.deformable import full_precision
from models.rfdetr.attention import DeformableAttention, SelfAttention

FEEDFORWARD = 2048
TEMPERATURE = 10000.0  # of the sine codes


class Decoder(nn.Module):
    """Layers, their shared norm, and the position codes of boxes.

    Boxes stay where the proposals put them: positions and sampling places are computed once for all layers.
    """

    def __init__(
        self, width: int, layers: int, self_heads: int, cross_heads: int, levels: int, points: int, dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(width, self_heads, DeformableAttention(width, cross_heads, levels, points), dropout)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = Perceptron(2 * width, width, width, 2)
        self.checkpointing = False

    def forward(
        self, queries: Tensor, boxes: Tensor, memory: Tensor, sizes: list[tuple[int, int]], groups: int
    ) -> Tensor:
        """The normed states after each layer, (layers, B, G·Q, D); in evaluation after the last alone, (1, B, Q, D).

        Args:
            queries: (B, G·Q, D), those of a group together.
            boxes: (B, G·Q, 4) center x, center y, width, height as shares of the image.
            memory: (B, S, D), the maps one after the other.
            sizes: (height, width) of each map.
            groups: G.
        """
        positions = self.ref_point_head(sine_codes(boxes, queries.shape[-1] // 2).to(queries.dtype))
        x, states = queries, []
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpointed(layer, x, positions, boxes, memory, sizes, groups)
            else:
                x = layer(x, positions, boxes, memory, sizes, groups)
            states.append(x)
        return self.norm(torch.stack(states if self.training else states[-1:]))


class DecoderLayer(nn.Module):
    """Self attention, deformable attention and a two-layer perceptron, each added and then normed."""

    def __init__(self, width: int, heads: int, cross_attention: DeformableAttention, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = cross_attention
        self.linear1 = _linear(width, FEEDFORWARD)
        self.linear2 = _linear(FEEDFORWARD, width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor, boxes: Tensor, memory: Tensor, sizes: list[tuple[int, int]], groups: int
    ) -> Tensor:
        # A group is a sequence of its own: groups are part of the batch, and no mask is needed.
        alone = [part.reshape(part.shape[0] * groups, -1, part.shape[-1]) for part in (x, positions)]
        x = self.norm1(x + self.dropout(self.self_attn(*alone).view_as(x)))
        x = self.norm2(x + self.dropout(self.cross_attn(x + positions, boxes, memory, sizes)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, channels: int, hidden: int, width: int, depth: int) -> None:
        super().__init__()
        widths = [channels, *[hidden] * (depth - 1), width]
        self.layers = nn.ModuleList(_linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def sine_codes(boxes: Tensor, width: int) -> Tensor:
    """(…, 4) center x, center y, width, height → (…, 4·width) of y, x, width, height, sines and cosines in turn."""
    exponent = torch.arange(width // 2, device=boxes.device, dtype=boxes.dtype) * (-2 / width)
    rate = 2 * math.pi * TEMPERATURE**exponent
    angles = torch.stack([boxes[..., i] for i in (1, 0, 2, 3)], -1)[..., None] * rate
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def move_boxes(boxes: Tensor, delta: Tensor) -> Tensor:
    """Boxes (…, 4) moved by shares of their sides and scaled by exponentials, in full precision."""
    delta = full_precision(delta)
    return torch.cat([delta[..., :2] * boxes[..., 2:] + boxes[..., :2], delta[..., 2:].exp() * boxes[..., 2:]], -1)


def _linear(channels: int, width: int) -> nn.Linear:
    linear = nn.Linear(channels, width)
    nn.init.xavier_uniform_(linear.weight)
    return linear

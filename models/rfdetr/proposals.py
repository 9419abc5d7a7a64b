"""The first of the two stages: from each place of the maps a box is proposed, and the likeliest start the queries.

In training every group of queries has proposals of its own (Group DETR, Chen et al., 2022, arXiv:2207.13085).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import linear
from models.rfdetr.decoder import move_boxes

BOX_SIDE = 0.05  # of a proposal in the finest map, as a share of the image; twice as much in the next
BORDER = 0.01  # places nearer to the image's edge propose nothing


class Proposals(nn.Module):
    """The heads of all groups, their weights stacked so that all are applied at once."""

    def __init__(self, groups: int, width: int, num_logits: int, class_bias: float) -> None:
        super().__init__()
        self.groups = groups
        self.output = GroupLinear(groups, width, width)
        self.norm = GroupNorm(groups, width)
        self.box = nn.ModuleList(GroupLinear(groups, width, size) for size in (width, width, 4))
        self.classify = GroupLinear(groups, width, num_logits)
        nn.init.constant_(self.classify.bias, class_bias)
        for parameter in self.box[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, memory: Tensor, sizes: list[tuple[int, int]], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` likeliest places of each group, fewer where there are not so many.

        Args:
            memory: (B, S, D), the maps one after the other.
            sizes: (height, width) of each map.
            count: K.

        Returns:
            States (B, G, K, D), logits (B, G, K, C + 1) and boxes (B, G, K, 4), likeliest first; one group in
            evaluation.
        """
        groups = self.groups if self.training else 1
        boxes, valid = places(sizes, memory.device)
        memory = memory * valid.to(memory.dtype)
        with torch.no_grad():  # the ranking; gradients flow through the chosen alone, which are computed again
            every = self.output(memory[:, None], groups)
            scores = self.classify(self.norm(every, groups), groups).amax(-1)
        chosen = scores.topk(min(count, scores.shape[-1])).indices
        states = self.norm(self.output(pick(memory, chosen), groups), groups)
        delta = states
        for i, layer in enumerate(self.box):
            delta = layer(F.relu(delta) if i in (1, 2) else delta, groups)
        moved = move_boxes(pick((boxes * valid).expand(memory.shape[0], -1, -1), chosen), delta)
        return states, self.classify(states, groups), moved


class GroupLinear(nn.Module):
    """A linear layer for each group."""

    def __init__(self, groups: int, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width, channels))
        self.bias = nn.Parameter(torch.empty(groups, width))
        bound = 1 / math.sqrt(channels)
        for i in range(groups):
            nn.init.xavier_uniform_(self.weight[i])
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, groups: int) -> Tensor:
        """(B, G or 1, N, C) → (B, G, N, width)."""
        if groups == 1:
            return linear(x, self.weight[0], self.bias[0])
        if x.shape[1] == 1:
            return (
                linear(x[:, 0], self.weight.flatten(0, 1), self.bias.flatten())
                .unflatten(-1, (groups, -1))
                .transpose(1, 2)
            )
        rows = x.transpose(0, 1).flatten(1, 2)  # G, B·N, C
        rows = torch.baddbmm(self.bias[:, None], rows, self.weight.transpose(1, 2))
        return rows.unflatten(1, (x.shape[0], -1)).transpose(0, 1)


class GroupNorm(nn.Module):
    """A layer norm for each group."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, width))
        self.bias = nn.Parameter(torch.zeros(groups, width))

    def forward(self, x: Tensor, groups: int) -> Tensor:
        """(B, G, N, C) → the same."""
        if groups == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight[0], self.bias[0])
        return F.layer_norm(x, x.shape[-1:]) * self.weight[:, None] + self.bias[:, None]


def places(sizes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (S, 4) around the places of the maps, and whether (S, 1) they lie inside the border."""
    boxes = []
    for level, (height, width) in enumerate(sizes):
        y, x = torch.meshgrid(
            (torch.arange(height, device=device) + 0.5) / height,
            (torch.arange(width, device=device) + 0.5) / width,
            indexing="ij",
        )
        side = torch.full_like(x, BOX_SIDE * 2**level)
        boxes.append(torch.stack([x, y, side, side], -1).flatten(0, 1))
    every = torch.cat(boxes)
    return every, ((every > BORDER) & (every < 1 - BORDER)).all(-1, keepdim=True)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, S, C) at an index (B, G, K): (B, G, K, C)."""
    flat = index.flatten(1)[..., None].expand(-1, -1, rows.shape[-1])
    return rows.gather(1, flat).unflatten(1, index.shape[1:])

"""The features of a frame in the light of what other frames remember."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import KeyTable
from models.linear import linear
from models.sam2.image_encoder import WIDTH
from models.sam2.layers import Attention, Dropout
from models.sam2.memory_encoder import MEMORY_WIDTH
from models.sam2.positions import kept, rotate, rotations, sine_map

MEMORIES = 7  # what a moment may be: 1 to 6 frames away, or that of a prompt, whenever it was
MLP_WIDTH = 2048  # channels between the two layers of an MLP
Rotations = tuple[Tensor, Tensor]


class MemoryAttention(nn.Module):
    """Four blocks of attention: within the frame, and from the frame to the memories and pointers of others."""

    def __init__(self, dropout: float, depth: int = 4) -> None:
        super().__init__()
        self.moments = nn.Parameter(nn.init.trunc_normal_(torch.empty(MEMORIES, 1, 1, MEMORY_WIDTH), std=0.02))
        self.no_memory = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, WIDTH), std=0.02))
        # Nothing ever reads it; official checkpoints have it.
        self.no_memory_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, WIDTH), std=0.02))
        self.layers = nn.ModuleList(MemoryBlock(dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(
        self, features: Tensor, memories: Tensor, moments: Tensor, pointers: Tensor, pointer_positions: Tensor
    ) -> Tensor:
        """
        Args:
            features: (B, 256, h, w) of the frame.
            memories: (B, R, 64, h, w) of other frames.
            moments: (R,) int64, how many frames away each is (1 to 6), or 7 for a frame with a prompt.
            pointers: (B, P, 64) tokens of objects in other frames.
            pointer_positions: (P, 64) codes of their moments.

        Returns:
            (B, 256, h, w)
        """
        height, width = features.shape[-2:]
        device = features.device
        position = kept(sine_map, height, width, WIDTH, device)
        table = kept(rotations, height, width, WIDTH, device)
        places = kept(sine_map, height, width, MEMORY_WIDTH, device).flatten(1).mT + self.moments[moments - 1, 0]
        memory = memories.flatten(3).mT.flatten(1, 2)  # (B, R·h·w, 64)
        values = torch.cat((memory, pointers), 1)
        keys = values + torch.cat((places.flatten(0, 1), pointer_positions))
        x = (features + 0.1 * position).flatten(2).mT
        for layer in self.layers:
            x = layer(x, keys, values, table, pointers.shape[1])
        return self.norm(x).mT.unflatten(-1, (height, width))

    def official_keys(self) -> KeyTable:
        return [("layers", "layers"), ("norm", "norm")]


class MemoryBlock(nn.Module):
    """Self-attention, attention to memory, and an MLP, each behind a norm on its own residual branch."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(WIDTH, WIDTH, 1, dropout=dropout)
        self.cross_attn_image = Attention(WIDTH, WIDTH, 1, key_dim=MEMORY_WIDTH, dropout=dropout)
        self.linear1 = nn.Linear(WIDTH, MLP_WIDTH)
        self.linear2 = nn.Linear(MLP_WIDTH, WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, table: Rotations, pointers: int) -> Tensor:
        """x (B, N, 256); keys and values (B, M, 64), the last `pointers` of which have no place in a map."""
        x = x + self.dropout(self.look_around(self.norm1(x), table))
        x = x + self.dropout(self.remember(self.norm2(x), keys, values, table, pointers))
        return x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm3(x))))))

    def look_around(self, x: Tensor, table: Rotations) -> Tensor:
        attention = self.self_attn
        query, key = rotate(paired(attention.q_proj, x), table), rotate(paired(attention.k_proj, x), table)
        return attention.attend(query, key, attention.v_proj(x))

    def remember(self, x: Tensor, keys: Tensor, values: Tensor, table: Rotations, pointers: int) -> Tensor:
        attention = self.cross_attn_image
        maps, tokens = paired(attention.k_proj, keys).tensor_split([keys.shape[1] - pointers], 1)
        maps = rotate(maps.unflatten(1, (-1, x.shape[1])), table).flatten(1, 2)
        query = rotate(paired(attention.q_proj, x), table)
        return attention.attend_to_few(query, torch.cat((maps, tokens), 1), values)


def paired(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer's channels in the order of `rotate`: the weights have pairs of neighbours, but whole halves turn faster,
    and products of queries and keys are the same in any order."""
    weight, bias = (part.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for part in (layer.weight, layer.bias))
    return linear(x, weight, bias)

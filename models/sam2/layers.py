"""What several parts are made of."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import linear, pointwise


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W). No `nn.LayerNorm`, since weight decay tells the two apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def normalise(self, x: Tensor) -> Tensor:
        """The same of (..., C)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


class Pointwise(nn.Conv2d):
    """A 1×1 convolution, by `pointwise`."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight.flatten(1), self.bias)


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, width_in: int, width: int, width_out: int, depth: int) -> None:
        super().__init__()
        widths = [width_in, *[width] * (depth - 1), width_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class Attention(nn.Module):
    """Attention of (B, N, C) queries over (B, M, ·) keys and values, computed `inner` channels wide."""

    def __init__(self, dim: int, inner: int, heads: int, key_dim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(key_dim or dim, inner)
        self.v_proj = nn.Linear(key_dim or dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(self.q_proj(query), self.k_proj(key), self.v_proj(value))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of what is projected already."""
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if self.is_fused(query):
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        else:
            x = self.shares(query, key) @ value
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def attend_to_few(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of one head, with values (B, M, ·) of few channels that are not projected yet."""
        if self.is_fused(query):
            return self.attend(query, key, self.v_proj(value))
        # The few channels are weighted, then projected. Dropout leaves shares that do not sum to 1: so counts the bias.
        weight = torch.cat((self.v_proj.weight, self.v_proj.bias[:, None]), 1)
        return self.out_proj(linear(self.shares(query, key) @ F.pad(value, (0, 1), value=1.0), weight))

    def is_fused(self, query: Tensor) -> bool:
        """Whether torch has a fused kernel: on the CPU there is none with dropout."""
        return not (self.training and self.dropout and query.device.type == "cpu")

    def shares(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., N, M): how much of each key every query takes."""
        return drop((query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1), self.dropout)


class Dropout(nn.Dropout):
    """As `nn.Dropout`, with the values of `drop`."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training and self.p else x


def drop(x: Tensor, rate: float) -> Tensor:
    """Dropout. On the CPU, where torch takes longer to draw than a layer to compute, four values share one draw of 64
    bits, so the rate is a multiple of 2⁻¹⁶."""
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(rate * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - rate))

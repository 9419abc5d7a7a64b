"""timm's Hiera trunks, computed without the cells that pad a map to whole windows.

timm, like the official code, projects padded maps: one of 16² cells in windows of 14² becomes one of 28², three times
as large. But padding is 0, so its keys and values are the bias, which needs no product; what it sees is thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def stages(trunk: Any, images: Tensor) -> list[Tensor]:
    """(B, 3, H, W) → maps (B, h, w, C) at the ends of the stages, at strides 4, 8, 16 and 32."""
    x = trunk._pos_embed(trunk.patch_embed(images))
    maps = []
    for i, block in enumerate(trunk.blocks):
        x = checkpoint(run, block, x, use_reentrant=False) if trunk.grad_checkpointing else run(block, x)
        if i in trunk.stage_ends:
            maps.append(x)
    return maps


def run(block: Any, x: Tensor) -> Tensor:
    """A block: attention and MLP. (B, H, W, C) → the same, or half the sides and twice the channels."""
    y = block.norm1(x)
    if block.dim != block.dim_out:
        x = pooled(block.proj(y), block.pool)
    x = x + block.drop_path1(attend(block.attn, y, block.window_size[0]))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def pooled(x: Tensor, pool: Any) -> Tensor:
    """(B, H, W, C), with half the sides where there is a pool."""
    return x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def attend(attention: Any, x: Tensor, window: int) -> Tensor:
    """Attention in (B, H, W, C) within windows of window² cells, or where that is 0 in the whole map."""
    dim, heads = attention.dim_out, attention.num_heads
    query, memory = attention.qkv(x).split((dim, 2 * dim), -1)  # keys and values stay together
    query = pooled(query, attention.q_pool)
    stride = x.shape[1] // query.shape[1]
    padding = attention.qkv.bias[dim:].type_as(memory)
    rows = []
    for queries, memories in zip(parts(query, window // stride, 1), parts(memory, window, 1), strict=True):
        row = []
        for own, seen in zip(parts(queries, window // stride, 2), parts(memories, window, 2), strict=True):
            row.append(attend_windows(own, seen, padding, heads, window, stride))
        rows.append(row[0] if len(row) == 1 else torch.cat(row, 2))
    return attention.proj(rows[0] if len(rows) == 1 else torch.cat(rows, 1))


def parts(x: Tensor, window: int, dim: int) -> tuple[Tensor, ...]:
    """A map's whole windows along a side, and the rest of it; where the window is 0, all of it."""
    rest = x.shape[dim] % window if window else 0
    whole = x.shape[dim] - rest
    return x.split((whole, rest), dim) if whole and rest else (x,)


def attend_windows(query: Tensor, memory: Tensor, padding: Tensor, heads: int, window: int, stride: int) -> Tensor:
    """Attention of (B, h, w, C) in windows, of which the part of a map may hold less than the whole, to the keys and
    values (B, H, W, 2C) in them."""
    height, width = (min(window or side, side) for side in memory.shape[1:3])
    seen = to_windows(memory, height, width)
    if missing := window and window * window - height * width:
        seen = torch.cat((seen, padding.expand(len(seen), missing, -1)), 1)
    key, value = seen.unflatten(-1, (2, heads, -1)).transpose(1, 3).unbind(2)
    own = to_windows(query, height // stride, width // stride).unflatten(-1, (heads, -1)).transpose(1, 2)
    own = F.scaled_dot_product_attention(own, key, value).transpose(1, 2).flatten(2)
    return from_windows(own, height // stride, width // stride, query.shape)


def to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) → (B·windows, height·width, C)."""
    return x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, height: int, width: int, shape: torch.Size) -> Tensor:
    """The reverse: (B·windows, height·width, C) → (B, H, W, C), the shape."""
    x = x.view(shape[0], shape[1] // height, shape[2] // width, height, width, -1)
    return x.transpose(2, 3).reshape(shape)

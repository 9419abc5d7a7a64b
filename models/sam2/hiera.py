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
    x = trunk._pos_embed(trunk.patch_embed(images)).contiguous()  # channels last, as all that follows
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
    """Attention in (B, H, W, C) within windows of window² cells, or where that is 0 in the whole map.

    Cells are brought into the order of windows before they are projected, when they are a third of what they become.
    """
    bands = [cut(band, window, 2) for band in cut(x, window, 1)]
    parts = [part for band in bands for part in band]
    cells = [to_windows(part, *sides_in(part, window)) for part in parts]
    projected = attention.qkv(joined(cells, 0)).split([len(own) for own in cells])
    seen = [look(attention, own, window, *sides_in(part, window)) for own, part in zip(projected, parts, strict=True)]
    seen = list(attention.proj(joined(seen, 0)).split([len(own) for own in seen]))
    stride = 1 if attention.q_pool is None else attention.q_pool.stride[0]
    maps = (from_windows(own, part, window, stride) for own, part in zip(seen, parts, strict=True))
    return joined([joined([next(maps) for _ in band], 2) for band in bands], 1)


def sides_in(part: Tensor, window: int) -> tuple[int, int]:
    """Height and width of the windows in a part of a map, which may be less than a whole one's."""
    height, width = part.shape[1:3]
    return min(window or height, height), min(window or width, width)


def cut(x: Tensor, window: int, dim: int) -> tuple[Tensor, ...]:
    """A map's whole windows along a side, and the rest of it; where the window is 0, all of it."""
    rest = x.shape[dim] % window if window else 0
    whole = x.shape[dim] - rest
    return x.split((whole, rest), dim) if whole and rest else (x,)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def look(attention: Any, projected: Tensor, window: int, height: int, width: int) -> Tensor:
    """Attention among the height·width cells of each window, and the padding that makes it whole. Queries, keys and
    values (cells, 3C) → (cells, C), or a quarter of them."""
    heads = attention.num_heads
    query, key, value = projected.unflatten(0, (-1, height * width)).unflatten(-1, (3, heads, -1)).unbind(2)
    if missing := window and window * window - height * width:
        padding = attention.qkv.bias.type_as(key).view(3, 1, 1, heads, -1).expand(-1, len(key), missing, -1, -1)
        key, value = torch.cat((key, padding[1]), 1), torch.cat((value, padding[2]), 1)
    if attention.q_pool is not None:
        query = pooled(query.flatten(2).unflatten(1, (height, width)), attention.q_pool)
        query = query.flatten(1, 2).unflatten(2, (heads, -1))
    seen = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return seen.transpose(1, 2).flatten(2).flatten(0, 1)


def to_windows(part: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) → (cells, C), window by window."""
    return part.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3).flatten(0, 4)


def from_windows(cells: Tensor, part: Tensor, window: int, stride: int) -> Tensor:
    """The reverse: (cells, C') → (B, H / stride, W / stride, C') of the part (B, H, W, C) of the map."""
    height, width = sides_in(part, window)
    down, across = part.shape[1] // height, part.shape[2] // width
    x = cells.view(len(part), down, across, height // stride, width // stride, -1)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

"""Swin Transformer v1 as an encoder for any image size (Liu et al., 2021, arXiv:2103.14030).

Own code rather than timm's, because the numbers of the detection layout differ from it: here a map is padded to
whole windows after the first norm and shifted afterwards, also where it is smaller than a window. Parameter names
are the official ones.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from models.base import checkpointed


class Swin(nn.Module):
    """(B, 3, H, W) → four maps (B, C·2ⁱ, H/4/2ⁱ, W/4/2ⁱ), sides rounded up."""

    def __init__(self, width: int, depths: list[int], heads: list[int], window: int, drop_path: float) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        self.patch_embed = PatchEmbed(width)
        self.layers = nn.ModuleList(
            Stage(width * 2**i, heads[i], window, rates[i].tolist(), downsample=i < len(depths) - 1)
            for i in range(len(depths))
        )
        for i in range(len(depths)):
            self.add_module(f"norm{i}", nn.LayerNorm(width * 2**i))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)
        features = []
        for i, stage in enumerate(self.layers):
            feature, x = stage(x)
            features.append(getattr(self, f"norm{i}")(feature).permute(0, 3, 1, 2).contiguous())
        return features


class PatchEmbed(nn.Module):
    """4×4 patches to tokens (B, H/4, W/4, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(images).permute(0, 2, 3, 1).contiguous())


class Stage(nn.Module):
    """Blocks whose windows are shifted in turn. Returns the map and the half-sized input of the next stage."""

    def __init__(self, dim: int, heads: int, window: int, drop_path: list[float], downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, heads, window, shift=window // 2 if i % 2 else 0, drop_path=rate)
            for i, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else nn.Identity()
        self.checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = checkpointed(block, x) if self.checkpointing and self.training else block(x)
        return x, self.downsample(x)


class PatchMerging(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C); four neighbours are joined column by column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        neighbours = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class Block(nn.Module):
    """Window attention and MLP, each on its own residual branch."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Attention within windows of a (B, H, W, C) map, padded with zeros that take part in it."""
        height, width = x.shape[1:3]
        # Counts of windows, not sides, so that what traces shapes has less to reason about; and no division of what is
        # negative, which ONNX rounds to zero.
        rows, columns = ((side + self.window - 1) // self.window for side in (height, width))
        x = F.pad(x, (0, 0, 0, columns * self.window - width, 0, rows * self.window - height))
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            mask = shift_mask(rows, columns, self.window, x.device)
        x = from_windows(self.attn(to_windows(x, rows, columns), mask), rows, columns)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]


class WindowAttention(nn.Module):
    """Attention among the N tokens of each window, with a learned bias for every relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`x` (B, windows, N, C), `mask` (windows, N, N) or None → (B, windows, N, C)."""
        batch, windows, tokens, dim = x.shape
        # Windows stand beside heads, so that one mask broadcasts over the batch; without one, beside the batch.
        outer, inner = (batch * windows, 1) if mask is None else (batch, windows)
        qkv = self.qkv(x).view(outer, inner, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(1, tokens, tokens, self.heads).permute(0, 3, 1, 2)
        if mask is not None:
            bias = (bias + mask[:, None]).flatten(0, 1)[None]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        x = x.unflatten(1, (inner, self.heads)).transpose(2, 3).reshape(batch, windows, tokens, dim)
        return self.proj(x)


def to_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows·window, columns·window, C) → (B, rows·columns, window², C), rows of windows first."""
    x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `to_windows`."""
    window = math.isqrt(x.shape[2])
    x = x.unflatten(2, (window, window)).unflatten(1, (rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_positions(window: int) -> Tensor:
    """(N, N) int64: for two tokens of a window, the row of the bias table for their offset."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    rows = row[:, None] - row[None] + window - 1
    columns = column[:, None] - column[None] + window - 1
    return rows * (2 * window - 1) + columns


def shift_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """(windows, N, N): −inf between tokens of a shifted window that are no neighbours in the map, else 0."""
    # Sizes are symbols and tensors are fake while a graph is traced: nothing may be kept from there.
    if torch.compiler.is_compiling():
        return _build_shift_mask(rows, columns, window, device)
    return _kept_shift_mask(rows, columns, window, device)


@functools.lru_cache(maxsize=16)
def _kept_shift_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept here may next be used in training
        return _build_shift_mask(rows, columns, window, device)


def _build_shift_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    def bands(size: int) -> Tensor:  # 0, 1, 2: whole windows, the last window before the wrap, what wrapped around
        position = torch.arange(size, device=device)
        return (position >= size - window).long() + (position >= size - window // 2).long()

    regions = 3 * bands(rows * window)[:, None] + bands(columns * window)
    regions = to_windows(regions[None, :, :, None], rows, columns)[0, :, :, 0]
    return torch.zeros((), device=device).where(regions[:, None] == regions[:, :, None], float("-inf"))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

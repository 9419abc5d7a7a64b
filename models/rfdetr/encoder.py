"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193) with attention in windows, on timm's vision transformer.

A few blocks attend to the whole image, the others each within its window, which has a class token of its own.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from models.base import KeyTable, checkpointed, without_autocast
from models.deformable import full_precision

LAYER_SCALE = 1.0  # a fresh block's, as in the official code


class WindowedDino(nn.Module):
    """(B, 3, H, W), sides multiples of patch × windows → normed maps (B, H/patch, W/patch, C) after the `taps`."""

    def __init__(
        self,
        size: str,
        patch: int,
        windows: int,
        side: int,
        taps: tuple[int, ...],
        global_blocks: tuple[int, ...],
        drop_path: float,
    ) -> None:
        super().__init__()
        net: Any = timm.create_model(
            f"vit_{size}_patch14_dinov2",
            img_size=side * patch,
            patch_size=patch,
            num_classes=0,
            init_values=LAYER_SCALE,
            drop_path_rate=drop_path,
        )
        self.windows, self.taps, self.global_blocks = windows, taps, global_blocks
        self.cls_token, self.pos_embed = net.cls_token, net.pos_embed
        self.patch_embed, self.blocks, self.norm = net.patch_embed, net.blocks, net.norm
        # Of DINOv2's own training; in checkpoints, but nothing reads it.
        self.register_buffer("mask_token", torch.zeros(1, net.embed_dim))
        for block in self.blocks[taps[-1] + 1 :]:
            block.requires_grad_(False)  # in checkpoints too, and nothing reads what they compute
        self.checkpointing = False

    @property
    def width(self) -> int:
        return self.cls_token.shape[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        shape = x.shape
        x = self._into_windows(x + self._positions(*shape[1:3]))
        token = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([token.expand(x.shape[0], -1, -1), x], 1)
        maps = []
        for i, block in enumerate(self.blocks[: self.taps[-1] + 1]):
            wide = x.reshape(shape[0], -1, shape[-1]) if i in self.global_blocks else x
            wide = checkpointed(block, wide) if self.checkpointing and self.training else block(wide)
            x = wide.view_as(x)
            if i in self.taps:
                maps.append(self._out_of_windows(self.norm(x[:, 1:]), shape))
        return maps

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, height, width, C): the table, resampled where the map has another size."""
        table = self.pos_embed[:, 1:]
        side = round(table.shape[1] ** 0.5)
        return resample(table.unflatten(1, (side, side)), height, width)

    def _into_windows(self, x: Tensor) -> Tensor:
        """(B, h, w, C) → (B·windows², h·w/windows², C)."""
        count = self.windows
        batch, height, width, channels = x.shape
        x = x.view(batch, count, height // count, count, width // count, channels)
        return x.transpose(2, 3).reshape(batch * count**2, -1, channels)

    def _out_of_windows(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = self.windows
        batch, height, width, channels = shape
        x = x.reshape(batch, count, count, height // count, width // count, channels)
        return x.transpose(2, 3).reshape(batch, height, width, channels)


def resample(table: Tensor, height: int, width: int) -> Tensor:
    """(1, h, w, C) → (1, height, width, C) in full precision: bicubic, with antialiasing.

    `F.interpolate` does the same; its backward pass is not deterministic on CUDA, and ONNX has no operator for it.
    """
    if table.shape[1:3] == (height, width):
        return table
    table = full_precision(table)
    rows, columns = (cubic_weights(*sides).to(table) for sides in zip(table.shape[1:3], (height, width), strict=True))
    with without_autocast(table):
        return torch.einsum("yh,xw,bhwc->byxc", rows, columns, table)


def cubic_weights(old: int, new: int) -> Tensor:
    """(new, old) float64: how much each old position counts in each new one. Keys's kernel with a = -0.5."""
    scale = max(old / new, 1.0)  # wider than the old grid when there are fewer new positions: antialiasing
    places = torch.arange(old, dtype=torch.float64, device="cpu")
    centers = (torch.arange(new, dtype=torch.float64, device="cpu") + 0.5) * (old / new) - 0.5
    distance = (places - centers[:, None]).abs() / scale
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


# --- published weights ------------------------------------------------------------------------------------------------


def block_keys(depth: int, official: str, own: str) -> KeyTable:
    """Of transformers' DINOv2 blocks, whose attention has query, key and value apart."""
    parts = [
        ("norm1", "norm1"),
        ("attention.attention.query", "attn.qkv"),
        ("attention.attention.key", "attn.qkv"),
        ("attention.attention.value", "attn.qkv"),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("norm2", "norm2"),
        ("mlp", "mlp"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    ]
    return [(f"{official}.{i}.{theirs}", f"{own}.{i}.{ours}") for i in range(depth) for theirs, ours in parts]


def encoder_keys(depth: int, official: str, own: str) -> KeyTable:
    """Of transformers' DINOv2 (names under the prefix `official`) and of a `WindowedDino` (under `own`)."""
    return [
        (f"{official}embeddings.cls_token", f"{own}cls_token"),
        (f"{official}embeddings.mask_token", f"{own}mask_token"),
        (f"{official}embeddings.position_embeddings", f"{own}pos_embed"),
        (f"{official}embeddings.patch_embeddings.projection", f"{own}patch_embed.proj"),
        *block_keys(depth, f"{official}encoder.layer", f"{own}blocks"),
        (f"{official}layernorm", f"{own}norm"),
    ]


def fit_positions(table: Tensor, like: Tensor) -> Tensor:
    """A position table (1, 1 + h², C) with its class token, resampled to the shape of another."""
    sides = [round((positions.shape[1] - 1) ** 0.5) for positions in (table, like)]
    grid = resample(table[:, 1:].float().unflatten(1, (sides[0], sides[0])), sides[1], sides[1])
    return torch.cat([table[:, :1].float(), grid.flatten(1, 2)], 1)


def fit_patches(kernel: Tensor, like: Tensor) -> Tensor:
    """Patch weights (C, 3, p, p) for another patch size, such that resized patches embed alike (FlexiViT)."""
    return resample_patch_embed(kernel.float(), list(like.shape[-2:]))

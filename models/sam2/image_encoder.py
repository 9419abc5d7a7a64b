"""Images to features: the Hiera trunk and a neck that brings its maps to one width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import KeyTable
from models.linear import pointwise
from models.sam2.hiera import stages
from models.sam2.layers import Pointwise

WIDTH = 256  # channels of all features


@dataclass(frozen=True)
class Trunk:
    """timm's name of a Hiera trunk, and what tells its size from a checkpoint."""

    name: str
    width: int
    blocks: int


TRUNKS = {
    "tiny": Trunk("sam2_hiera_tiny", 96, 12),
    "small": Trunk("sam2_hiera_small", 96, 16),
    "base_plus": Trunk("sam2_hiera_base_plus", 112, 24),
    "large": Trunk("sam2_hiera_large", 144, 48),
}


class ImageEncoder(nn.Module):
    """(B, 3, H, W), sides multiples of 32 → maps at strides 4, 8 and 16."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        # Built with some stochastic depth whatever the rate, so that a schedule can raise it later.
        net: Any = timm.create_model(TRUNKS[variant].name, features_only=True, drop_path_rate=0.1)
        self.trunk = net.model
        channels = [info["num_chs"] for info in self.trunk.feature_info]
        self.neck = nn.ModuleList(Pointwise(count, WIDTH) for count in reversed(channels))

    def forward(
        self, images: Tensor, finest_proj: nn.Conv2d, finer_proj: nn.Conv2d, maps: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, ·, H/4, W/4) and (B, ·, H/8, W/8), as these convolutions of 256 channels make them, which nobody else
        reads; and (B, 256, H/16, W/16). `maps`: those of the trunk, where they are known."""
        maps = stages(self.trunk, images) if maps is None else maps
        finest, finer, coarse, coarsest = (x.permute(0, 3, 1, 2) for x in maps)
        top = F.interpolate(self.neck[0](coarsest).float(), scale_factor=2.0, mode="nearest")
        return (
            in_one(self.neck[3], finest_proj, finest),
            in_one(self.neck[2], finer_proj, finer),
            self.neck[1](coarse) + top,
        )

    def official_keys(self) -> KeyTable:
        table = [(f"trunk.{part}", f"trunk.{part}") for part in ("pos_embed", "pos_embed_window", "patch_embed")]
        for i in range(len(self.trunk.blocks)):
            block = f"trunk.blocks.{i}"
            table += [(f"{block}.{part}", f"{block}.{part}") for part in ("norm1", "attn", "norm2")]
            table += [(f"{block}.mlp.layers.{j}", f"{block}.mlp.fc{j + 1}") for j in range(2)]
            table += [(f"{block}.proj", f"{block}.proj")]
        return table + [(f"neck.convs.{i}.conv", f"neck.{i}") for i in range(4)]


def in_one(first: Any, second: Any, x: Tensor) -> Tensor:
    """Two 1×1 convolutions after each other, with nothing between, are one: a twelfth of the products."""
    inner, outer = first.weight[..., 0, 0], second.weight[..., 0, 0]
    return pointwise(x, outer @ inner, outer @ first.bias + second.bias)

"""A model of a million parameters with everything that a resume could get wrong; see `helpers.add_toy_family`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.base import Logits, Model


class Block(nn.Module):
    """Two convolutions with batch norm, stochastic depth and dropout around a residual."""

    def __init__(self, width: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Dropout(dropout), nn.Conv2d(2 * width, width, 3, padding=1),
        )  # fmt: skip
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.body(x))


class Toy(Model):
    """Outputs: `logits` (B, 1, H, W); in training also `levels`, one (B, 1, H/8, W/8)."""

    stride = 32
    encoder = "stem"

    def __init__(self, width: int = 64, dropout: float = 0.3, drop_path: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.ModuleList(Block(width, dropout, drop_path * (i + 1) / 6) for i in range(6))
        self.coarse = nn.Conv2d(width, 1, 1)
        self.head = nn.Conv2d(width, 64, 1)

    def forward(self, batch: Any) -> dict[str, Any]:
        images = batch if isinstance(batch, Tensor) else batch.images
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        outputs: dict[str, Any] = {"logits": F.pixel_shuffle(self.head(x), 8)}
        if self.training:
            outputs["levels"] = [self.coarse(x)]
        return outputs

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """One graph: normalised `images` (B, 3, H, W) -> `logits` (B, 1, H, W)."""
        axes = {0: "batch", 2: "height", 3: "width"}
        return {"toy": (Logits(self), (torch.zeros(2, 3, 64, 64),), {"images": axes, "logits": axes})}

"""What a frame leaves in memory: its features with the predicted mask in a few channels, and the object's pointer."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import KeyTable
from models.sam2.image_encoder import WIDTH
from models.sam2.layers import LayerNorm2d, Mlp, Pointwise
from models.sam2.positions import sine_steps

MEMORY_WIDTH = 64  # channels of a memory
TOKENS = WIDTH // MEMORY_WIDTH  # that a pointer is cut into


class MemoryEncoder(nn.Module):
    """Features (B, 256, h, w) and masks (B, 1, 16h, 16w) in [0, 1] → memories (B, 64, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.no_object = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, MEMORY_WIDTH), std=0.02))
        widths = (1, 4, 16, 64, 256)
        downsampler: list[nn.Module] = []
        for before, after in pairwise(widths):
            downsampler += [nn.Conv2d(before, after, 3, stride=2, padding=1), LayerNorm2d(after), nn.GELU()]
        self.mask_downsampler = nn.Sequential(*downsampler, Pointwise(widths[-1], WIDTH))
        self.features_proj = Pointwise(WIDTH, WIDTH)
        self.fuser = nn.Sequential(ConvNextBlock(WIDTH), ConvNextBlock(WIDTH))
        self.out_proj = Pointwise(WIDTH, MEMORY_WIDTH)

    def forward(self, features: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, 1): where not above 0, the memory says that there is no object."""
        x = self.features_proj(features) + self.mask_downsampler(masks * 20 - 10)
        x = self.out_proj(self.fuser(x))
        return x + ((scores <= 0) * self.no_object)[..., None, None]

    def official_keys(self) -> KeyTable:
        return [
            ("mask_downsampler.encoder", "mask_downsampler"),
            ("pix_feat_proj", "features_proj"),
            ("fuser.layers", "fuser"),
            ("out_proj", "out_proj"),
        ]


class ConvNextBlock(nn.Module):
    """A depthwise convolution and an MLP per cell (Liu et al., 2022, arXiv:2201.03545)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm2d(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ObjectPointers(nn.Module):
    """What an object is, in one vector, from the mask decoder's token."""

    def __init__(self) -> None:
        super().__init__()
        self.no_object = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, WIDTH), std=0.02))
        self.mask_downsample = nn.Conv2d(1, 1, 4, stride=4)  # a given mask to the decoder's prompt
        self.project = Mlp(WIDTH, WIDTH, WIDTH, 3)
        self.position = nn.Linear(WIDTH, MEMORY_WIDTH)

    def forward(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """(B, 256) tokens, (B, 1) scores → (B, 256)."""
        return self.present(self.project(tokens), scores > 0)

    def present(self, pointers: Tensor, there: Tensor) -> Tensor:
        """(B, 256) pointers, replaced where the object is not there (B, 1)."""
        return pointers.where(there, self.no_object)

    def tokens(self, pointers: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, 256) pointers and how far away in time each is, as (P,) shares of the longest way → the tokens
        (B, 4P, 64) that memory attention takes, and their codes (4P, 64)."""
        codes = self.position(sine_steps(steps, WIDTH))
        return pointers.unflatten(-1, (TOKENS, -1)).flatten(1, 2), codes.repeat_interleave(TOKENS, 0)

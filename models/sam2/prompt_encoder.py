"""Points, boxes and masks to what the mask decoder reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.base import KeyTable
from models.sam2.image_encoder import WIDTH
from models.sam2.layers import LayerNorm2d, Pointwise
from models.sam2.positions import RandomFrequencies

# Labels of points. A box is two points.
NOT_A_POINT, NEGATIVE, POSITIVE, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3


class PromptEncoder(nn.Module):
    """Sparse prompts to tokens, dense ones to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = RandomFrequencies(WIDTH)
        self.points = nn.ModuleList(nn.Embedding(1, WIDTH) for _ in (NEGATIVE, POSITIVE, TOP_LEFT, BOTTOM_RIGHT))
        self.not_a_point = nn.Embedding(1, WIDTH)
        self.masks = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2),
            LayerNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2),
            LayerNorm2d(16),
            nn.GELU(),
            Pointwise(16, WIDTH),
        )
        self.no_mask = nn.Embedding(1, WIDTH)

    def embed_points(self, points: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, P, 2) x and y in pixels of the (height, width) input, (B, P) labels → tokens (B, P + 1, 256).

        The last token stands for no point; the official code pads all prompts so.
        """
        embeddings: list[Any] = [self.not_a_point, *self.points]
        table = torch.cat([embedding.weight for embedding in embeddings])
        height, width = size
        x, y = (points.float() + 0.5).unbind(-1)
        codes = self.frequencies(torch.stack((x / width, y / height), -1)).where((labels != NOT_A_POINT)[..., None], 0)
        tokens = codes + table[labels.long() + 1]
        return torch.cat((tokens, self.not_a_point.weight.expand(len(tokens), 1, -1)), 1)

    def embed_masks(self, masks: Tensor | None) -> Tensor:
        """(B, 1, H/4, W/4) logits, or None → (B, 256, H/16, W/16), or what broadcasts to it."""
        return self.no_mask.weight[:, :, None, None] if masks is None else self.masks(masks)

    def official_keys(self) -> KeyTable:
        return [
            ("pe_layer.positional_encoding_gaussian_matrix", "frequencies.matrix"),
            ("point_embeddings", "points"),
            ("not_a_point_embed", "not_a_point"),
            ("mask_downscaling", "masks"),
            ("no_mask_embed", "no_mask"),
        ]

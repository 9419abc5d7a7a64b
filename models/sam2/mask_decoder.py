"""Image features and prompts to masks: a small transformer in which tokens and image attend to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.base import KeyTable
from models.linear import linear
from models.sam2.image_encoder import WIDTH
from models.sam2.layers import Attention, LayerNorm2d, Mlp, Pointwise

MASKS = 4  # the single mask, then three for when a prompt may mean several things
MLP_WIDTH = 2048  # channels between the two layers of an MLP
STABILITY_DELTA = 0.05  # a mask is stable when thresholds this far to both sides of 0 leave it the same


class MaskDecoder(nn.Module):
    """Masks, their predicted IoU, the tokens they come from, and whether there is an object at all."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer()
        self.iou_token = nn.Embedding(1, WIDTH)
        self.mask_tokens = nn.Embedding(MASKS, WIDTH)
        self.object_token = nn.Embedding(1, WIDTH)
        self.upscaling = nn.ModuleList(
            [
                nn.ConvTranspose2d(WIDTH, WIDTH // 4, 2, stride=2),
                LayerNorm2d(WIDTH // 4),
                nn.GELU(),
                nn.ConvTranspose2d(WIDTH // 4, WIDTH // 8, 2, stride=2),
                nn.GELU(),
            ]
        )
        self.finest_proj = Pointwise(WIDTH, WIDTH // 8)  # these two run once with the image, not for each prompt
        self.finer_proj = Pointwise(WIDTH, WIDTH // 4)
        self.hypernetworks = nn.ModuleList(Mlp(WIDTH, WIDTH, WIDTH // 8, 3) for _ in range(MASKS))
        self.iou_head = Mlp(WIDTH, WIDTH, MASKS, 3)
        self.object_head = Mlp(WIDTH, WIDTH, 1, 3)
        # Without other weights all objects count as present: the masks of an absent one are constant and learn nothing.
        nn.init.ones_(self.object_head.layers[-1].bias)  # type: ignore[arg-type]
        # A single mask less stable than this gives way, in evaluation, to the best of the other three.
        self.least_stability = 0.98

    def forward(
        self, image: Tensor, position: Tensor, tokens: Tensor, finest: Tensor, finer: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `predict`, of three masks (`multimask`) or of one, whose token is the first whichever mask it is."""
        inputs = (image, position, tokens, finest, finer)
        if multimask:
            return self.predict(*inputs, chosen=slice(1, MASKS))
        if not self.replaces_unstable:
            return self.predict(*inputs, chosen=slice(0, 1))
        logits, ious, mask_tokens, scores = self.predict(*inputs)
        logits, ious = self.take_stable(logits, ious)
        return logits, ious, mask_tokens[:, :1], scores

    def predict(
        self,
        image: Tensor,
        position: Tensor,
        tokens: Tensor,
        finest: Tensor,
        finer: Tensor,
        chosen: slice = slice(0, MASKS),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            image: (B, 256, h, w) with the dense prompt added.
            position: (256, h, w) code of every cell.
            tokens: (B, P, 256) of the prompt.
            finest, finer: (B, 32, 4h, 4w) and (B, 64, 2h, 2w), projected already.
            chosen: which M of the four masks.

        Returns:
            logits (B, M, 4h, 4w), predicted IoUs in [0, 1] (B, M), mask tokens (B, M, 256), object scores (B, 1).
        """
        own = torch.cat((self.object_token.weight, self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own.expand(len(tokens), -1, -1), tokens), 1)
        tokens, x = self.transformer(rows_of(image), rows_of(position), tokens)
        x = self.upscale(x, finest, finer)
        mask_tokens = tokens[:, 2 : 2 + MASKS][:, chosen]
        nets = zip(self.hypernetworks[chosen], mask_tokens.unbind(1), strict=True)
        filters = torch.stack([net(token) for net, token in nets], 1)
        logits = from_cells(filters @ x.mT, *image.shape[-2:])
        ious = self.iou_head(tokens[:, 1]).sigmoid()[:, chosen]
        return logits, ious, mask_tokens, self.object_head(tokens[:, 0])

    @property
    def replaces_unstable(self) -> bool:
        return not self.training and self.least_stability > 0

    def upscale(self, x: Tensor, finest: Tensor, finer: Tensor) -> Tensor:
        """(B, h·w, 256) → (B, 16·h·w, 32), with the finer maps of the image added on the way.

        Transposed convolutions whose patches do not overlap are products, so the parts of a cell may stay together, in
        the order of `to_cells`, and only finished masks are brought into rows.
        """
        norm: Any
        to_finer, norm, act, to_finest, last_act = self.upscaling
        x = act(norm.normalise(parts_of(x, to_finer) + to_cells(finer, 1)))
        return last_act(parts_of(x, to_finest) + to_cells(finest, 2))

    def take_stable(self, logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
        """The first of four masks where it is stable, else the one of the others with the highest predicted IoU."""
        single = logits[:, :1]
        inner = (single > STABILITY_DELTA).sum((-2, -1))
        outer = (single > -STABILITY_DELTA).sum((-2, -1))
        stable = (inner / outer >= self.least_stability) | (outer == 0)
        best = ious[:, 1:].argmax(1, keepdim=True) + 1
        index = torch.where(stable, 0, best)
        return take(logits, index), ious.gather(1, index)

    def official_keys(self) -> KeyTable:
        renamed = {
            "iou_token": "iou_token",
            "mask_tokens": "mask_tokens",
            "obj_score_token": "object_token",
            "output_upscaling": "upscaling",
            "conv_s0": "finest_proj",
            "conv_s1": "finer_proj",
            "output_hypernetworks_mlps": "hypernetworks",
            "iou_prediction_head": "iou_head",
            "pred_obj_score_head": "object_head",
        }
        return [("transformer", "transformer"), *renamed.items()]


def parts_of(x: Tensor, upscaling: Any) -> Tensor:
    """A 2×2 transposed convolution of stride 2, of cells each by itself: (B, N, C) → (B, 4·N, C')."""
    weight = upscaling.weight.permute(2, 3, 1, 0)  # (2, 2, C', C)
    return linear(x, weight.flatten(0, 2), upscaling.bias.repeat(4)).unflatten(-1, (4, -1)).flatten(1, 2)


def rows_of(maps: Tensor) -> Tensor:
    """(..., C, h, w) → (..., h·w, C), in memory too: many products read it."""
    return maps.flatten(-2).mT.contiguous()


def to_cells(x: Tensor, levels: int) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), where each 2×2 pixels that became of one stand together, so many times over."""
    sides = [2] * levels
    x = x.unflatten(3, (-1, *sides)).unflatten(2, (-1, *sides))
    order = [axis for level in range(levels + 1) for axis in (2 + level, 3 + levels + level)]  # rows, then columns
    return x.permute(0, *order, 1).flatten(1, -2)


def from_cells(x: Tensor, height: int, width: int) -> Tensor:
    """(B, M, 16·h·w), in that order → (B, M, 4·h, 4·w)."""
    x = x.unflatten(2, (height, width, 2, 2, 2, 2))
    return x.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)


def take(masks: Tensor, index: Tensor) -> Tensor:
    """(B, M, h, w), (B, 1) → (B, 1, h, w): one mask of each row."""
    return masks.gather(1, index[..., None, None].expand(-1, -1, *masks.shape[-2:]))


class TwoWayTransformer(nn.Module):
    """Tokens (B, P, 256) and image cells (B, N, 256), both updated; position (N, 256)."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(WIDTH, WIDTH // 2, 8)
        self.norm_final_attn = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor, position: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompt
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompt, position)
        attended = self.final_attn_token_to_image(tokens + prompt, image + position, image)
        return self.norm_final_attn(tokens + attended), image


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, then the image to the tokens. Norms come last.

    The prompt's own tokens are their position code; in the first block they are all there is.
    """

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(WIDTH, WIDTH, 8)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.cross_attn_token_to_image = Attention(WIDTH, WIDTH // 2, 8)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(WIDTH, MLP_WIDTH, WIDTH, 2)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.norm4 = nn.LayerNorm(WIDTH)
        self.cross_attn_image_to_token = Attention(WIDTH, WIDTH // 2, 8)

    def forward(self, tokens: Tensor, image: Tensor, prompt: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            query = tokens + prompt
            tokens = self.norm1(tokens + self.self_attn(query, query, tokens))
        cells = image + position
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + prompt, cells, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(cells, tokens + prompt, tokens))
        return tokens, image

"""Image features and prompts to masks: a small transformer in which tokens and image attend to each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.base import KeyTable
from models.sam2.image_encoder import WIDTH
from models.sam2.layers import Attention, LayerNorm2d, Mlp

MASKS = 4  # the single mask, then three for when a prompt may mean several things
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
        self.finest_proj = nn.Conv2d(WIDTH, WIDTH // 8, 1)  # these two run once with the image, not for each prompt
        self.finer_proj = nn.Conv2d(WIDTH, WIDTH // 4, 1)
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
        tokens, x = self.transformer(image.flatten(2).mT, position.flatten(1).mT, tokens)
        x = self.upscale(x.mT.unflatten(-1, image.shape[-2:]), finest, finer)
        mask_tokens = tokens[:, 2 : 2 + MASKS][:, chosen]
        nets = zip(self.hypernetworks[chosen], mask_tokens.unbind(1), strict=True)
        filters = torch.stack([net(token) for net, token in nets], 1)
        logits = (filters @ x.flatten(2)).unflatten(-1, x.shape[-2:])
        ious = self.iou_head(tokens[:, 1]).sigmoid()[:, chosen]
        return logits, ious, mask_tokens, self.object_head(tokens[:, 0])

    @property
    def replaces_unstable(self) -> bool:
        return not self.training and self.least_stability > 0

    def upscale(self, x: Tensor, finest: Tensor, finer: Tensor) -> Tensor:
        """(B, 256, h, w) → (B, 32, 4h, 4w), with the finer maps of the image added on the way."""
        to_finer, norm, act, to_finest, last_act = self.upscaling
        x = act(norm(to_finer(x) + finer))
        return last_act(to_finest(x) + finest)

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
        self.mlp = Mlp(WIDTH, 2048, WIDTH, 2)
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

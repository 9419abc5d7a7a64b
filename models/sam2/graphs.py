"""The four graphs that another program runs SAM 2 with, of tensors alone and for images of one size.

An image goes through `image_encoder`, a prompt through `mask_decoder`; in videos `memory_attention` stands between the
two for all but first prompts, and `memory_encoder` comes last. Numbers of images, objects, points, memories and
pointers are free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.sam2.image_encoder import WIDTH
from models.sam2.memory import POINTERS, PROMPTED
from models.sam2.memory_encoder import MEMORY_WIDTH
from models.sam2.parts import Features, Sam2Parts, resize

Graph = tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]


class ImageGraph(nn.Module):
    """`images` (B, 3, H, W) → the features at stride 16, with and without what stands for no memory, 8 and 4."""

    def __init__(self, model: Sam2Parts) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = self.model.encode(images)
        return features.coarse, self.model.without_memory(features), features.finer, features.finest


class PromptGraph(nn.Module):
    """Features and prompts of B objects → all four masks: the single one, then the three of an ambiguous prompt.

    `points` (B, P, 2) in pixels of the input with `labels` (B, P) as in `Points`, −1 where there is none; `mask_input`
    (B, 1, H/4, W/4) logits, which count where `has_mask` (B,) is 1. `pointers` (B, 4, 256) belong to the masks.
    """

    def __init__(self, model: Sam2Parts) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        conditioned: Tensor,
        finer: Tensor,
        finest: Tensor,
        points: Tensor,
        labels: Tensor,
        mask_input: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self.model
        features = Features(conditioned, finer, finest)
        encoder, decoder = model.prompt_encoder, model.mask_decoder
        share = has_mask[:, None, None, None]
        dense = encoder.embed_masks(mask_input) * share + encoder.embed_masks(None) * (1 - share)
        logits, ious, tokens, scores = decoder.predict(
            conditioned + dense,
            encoder.frequencies.grid(*conditioned.shape[-2:]),
            encoder.embed_points(points, labels, features.image_size),
            finest,
            finer,
        )
        there = scores > 0
        pointers = model.object_pointers.project(tokens).where(there[..., None], model.object_pointers.no_object)
        return logits, ious, scores, pointers


class RememberingGraph(nn.Module):
    """Features of a frame and what B objects left in R other frames → features for `mask_decoder`.

    `moments` (R,) and `steps` (P,) say when that was, as `memory.recall` does.
    """

    def __init__(self, model: Sam2Parts) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, memories: Tensor, moments: Tensor, pointers: Tensor, steps: Tensor) -> Tensor:
        return self.model.with_memory(features, memories, moments, pointers, steps)


class MemoryGraph(nn.Module):
    """Features and masks (B, 1, H/4, W/4), logits, with scores (B, 1) → memories (B, 64, H/16, W/16)."""

    def __init__(self, model: Sam2Parts) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, masks: Tensor, scores: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        return self.model.remember(features, resize(masks, 16 * height, 16 * width), scores)


def graphs_of(model: Sam2Parts, height: int, width: int) -> dict[str, Graph]:
    """{name: (module, example inputs, free axes by name)} for images of this size."""
    h, w = height // 16, width // 16
    coarse = torch.zeros(2, WIDTH, h, w)
    finer, finest = torch.zeros(2, WIDTH // 4, 2 * h, 2 * w), torch.zeros(2, WIDTH // 8, 4 * h, 4 * w)
    masks, scores = torch.zeros(2, 1, 4 * h, 4 * w), torch.ones(2, 1)
    points, labels = torch.full((2, 2, 2), min(height, width) / 2), torch.ones(2, 2, dtype=torch.int64)
    memories, moments = torch.zeros(2, 2, MEMORY_WIDTH, h, w), torch.tensor([PROMPTED, 1])
    pointers, steps = torch.zeros(2, 2, WIDTH), torch.ones(2) / (POINTERS - 1)

    def axes(*names: str, **further: dict[int, str]) -> dict[str, dict[int, str]]:
        return {name: {0: "batch", **further.get(name, {})} for name in names}

    prompt_axes = axes(
        *("conditioned", "finer", "finest", "points", "labels", "mask_input", "has_mask"),
        *("logits", "ious", "scores", "pointers"),
        points={1: "points"},
        labels={1: "points"},
    )
    past_axes = {
        "features": {0: "batch"},
        "memories": {0: "batch", 1: "frames"},
        "moments": {0: "frames"},
        "pointers": {0: "batch", 1: "pointers"},
        "steps": {0: "pointers"},
        "conditioned": {0: "batch"},
    }
    return {
        "image_encoder": (
            ImageGraph(model),
            (torch.zeros(2, 3, height, width),),
            axes("images", "features", "conditioned", "finer", "finest"),
        ),
        "mask_decoder": (
            PromptGraph(model),
            (coarse, finer, finest, points, labels, masks, torch.ones(2)),
            prompt_axes,
        ),
        "memory_attention": (RememberingGraph(model), (coarse, memories, moments, pointers, steps), past_axes),
        "memory_encoder": (
            MemoryGraph(model),
            (coarse, masks, scores),
            axes("features", "masks", "scores", "memories"),
        ),
    }

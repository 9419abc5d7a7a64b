"""What an image, a prompt and a memory become: the parts of SAM 2 and all that a frame goes through in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from models.base import Model
from models.sam2.image_encoder import WIDTH, ImageEncoder
from models.sam2.mask_decoder import MaskDecoder, take
from models.sam2.memory_attention import MemoryAttention
from models.sam2.memory_encoder import MemoryEncoder, ObjectPointers
from models.sam2.prompt_encoder import NOT_A_POINT, PromptEncoder

ABSENT = -1024.0  # the logits of an object that is not there


@dataclass(frozen=True)
class Features:
    """Of N images: `coarse` (N, 256, h, w) at stride 16; `finer` (N, 64, 2h, 2w) and `finest` (N, 32, 4h, 4w), as the
    mask decoder takes them."""

    coarse: Tensor
    finer: Tensor
    finest: Tensor

    def frames(self, count: int) -> list[Features]:
        """Of clips of so many frames, one after the other: those of each frame of all clips."""
        parts = (part.unflatten(0, (-1, count)).unbind(1) for part in (self.coarse, self.finer, self.finest))
        return [Features(*frame) for frame in zip(*parts, strict=True)]

    def of(self, images: Tensor) -> Features:
        """Those of the image that each object is in, (B,) int64."""
        # Copied with the channels last, as the encoder leaves them: so the mask decoder reads them again and again.
        parts = (part.permute(0, 2, 3, 1) for part in (self.coarse, self.finer, self.finest))
        return Features(*(part.index_select(0, images).permute(0, 3, 1, 2) for part in parts))

    def expand(self, objects: int) -> Features:
        """Those of the only image, for so many objects in it."""
        return Features(*(part.expand(objects, -1, -1, -1) for part in (self.coarse, self.finer, self.finest)))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        height, width = self.coarse.shape[-2:]
        return 16 * height, 16 * width


@dataclass(frozen=True)
class Points:
    """`positions` (B, P, 2) x and y in pixels of the input, `labels` (B, P): 1 on the object, 0 beside it, 2 and 3 the
    first and last corner of a box, −1 none."""

    positions: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many there are on each object."""
        return self.labels.shape[1]

    def then(self, more: Points) -> Points:
        """These, and more of them."""
        positions = torch.cat((self.positions, more.positions), 1)
        return Points(positions, torch.cat((self.labels, more.labels), 1))


@dataclass(frozen=True)
class Segmentation:
    """Of B objects: `candidates` (B, M, 4h, 4w) logits with their predicted `ious` (B, M); the one taken, `masks`
    (B, 1, 4h, 4w); `pointers` (B, 256); `scores` (B, 1), above 0 where the object is there."""

    candidates: Tensor
    ious: Tensor
    masks: Tensor
    pointers: Tensor
    scores: Tensor


class Sam2Parts(Model):
    """Images and clips of any size whose sides are multiples of 32. `dropout`: of the memory attention."""

    stride = 32

    def __init__(self, variant: str, dropout: float) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(variant)
        self.prompt_encoder = PromptEncoder()
        self.mask_decoder = MaskDecoder()
        self.memory_attention = MemoryAttention(dropout)
        self.memory_encoder = MemoryEncoder()
        self.object_pointers = ObjectPointers()

    def encode(self, images: Tensor, maps: list[Tensor] | None = None) -> Features:
        """Features of normalised images (N, 3, H, W), as many frames and clips at once as there is memory for; `maps`
        are those of the trunk, where they are known. Raises `UserError` for sides that are no multiples of 32."""
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and (height % self.stride or width % self.stride):
            raise UserError(f"an input of {width}×{height} pixels: SAM 2 needs sides that are multiples of 32")
        decoder = self.mask_decoder
        finest, finer, coarse = self.image_encoder(images, decoder.finest_proj, decoder.finer_proj, maps)
        return Features(coarse, finer, finest)

    def without_memory(self, features: Features) -> Tensor:
        """What `decode` and `segment` take of frames that remember nothing: images, and frames with a first prompt."""
        return features.coarse + self.memory_attention.no_memory[0, :, :, None, None]

    def with_memory(self, coarse: Tensor, memories: Tensor, moments: Tensor, pointers: Tensor, steps: Tensor) -> Tensor:
        """The same of frames of B objects that remember.

        Args:
            coarse: (B, 256, h, w), features of the frames.
            memories: (B, R, 64, h, w) of R other frames, which `memory.recall` chooses.
            moments: (R,) int64, of those frames, see there.
            pointers: (B, P, 256) of P other frames.
            steps: (P,) how far those are away, as shares of the longest way.
        """
        tokens, codes = self.object_pointers.tokens(pointers, steps)
        return self.memory_attention(coarse, memories, moments, tokens, codes)

    def decode(
        self,
        conditioned: Tensor,
        features: Features,
        points: Points | None = None,
        masks: Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Masks of B objects from prompts.

        Args:
            conditioned: (B, 256, h, w), features with or without memory.
            features: of the same frames.
            masks: (B, 1, ·, ·) logits of masks as they were predicted before, of any size.

        Returns:
            what `MaskDecoder` returns.
        """
        height, width = conditioned.shape[-2:]
        tokens = conditioned.new_zeros(len(conditioned), 0, WIDTH)
        if points is not None:
            tokens = self.prompt_encoder.embed_points(points.positions, points.labels, features.image_size)
        if masks is not None and masks.shape[-2:] != (4 * height, 4 * width):
            masks = resize(masks, 4 * height, 4 * width, antialias=True)
        return self.mask_decoder(
            conditioned + self.prompt_encoder.embed_masks(masks),
            self.prompt_encoder.frequencies.grid(height, width),
            tokens,
            features.finest,
            features.finer,
            multimask,
        )

    def segment(
        self,
        conditioned: Tensor,
        features: Features,
        points: Points | None = None,
        masks: Tensor | None = None,
        multimask: bool = False,
    ) -> Segmentation:
        """As `decode`, for frames of a video: with the best of the masks, and only where the object is there."""
        if points is None:
            none = conditioned.new_zeros(len(conditioned), 1)
            points = Points(none[..., None].expand(-1, -1, 2), torch.full_like(none, NOT_A_POINT))
        candidates, ious, tokens, scores = self.decode(conditioned, features, points, masks, multimask)
        candidates = candidates.float().where((scores > 0)[..., None, None], ABSENT)
        best = ious.argmax(1, keepdim=True)
        token = tokens.gather(1, best[..., None].expand(-1, -1, WIDTH))[:, 0]
        return Segmentation(candidates, ious, take(candidates, best), self.object_pointers(token, scores), scores)

    def adopt(self, features: Features, masks: Tensor) -> Segmentation:
        """The segmentation that given masks (B, 1, H, W), 0 or 1 in the size of the input, stand for."""
        prompt = self.object_pointers.mask_downsample(masks.float())
        pointers = self.segment(features.coarse, features, masks=prompt).pointers
        there = masks.flatten(1).any(1, keepdim=True)
        pointers = self.object_pointers.present(pointers, there)
        height, width = features.finest.shape[-2:]
        logits = resize(mask_logits(masks), height, width, antialias=True)
        return Segmentation(logits, torch.ones_like(pointers[:, :1]), logits, pointers, mask_logits(there))

    def remember(self, coarse: Tensor, masks: Tensor, scores: Tensor, binary: bool = False) -> Tensor:
        """What frames leave in memory, (B, 64, h, w).

        Args:
            coarse: (B, 256, h, w), features of the frames.
            masks: (B, 1, H, W) logits in the size of the input.
            scores: (B, 1), above 0 where the object is there.
            binary: the masks as they are drawn, without doubt: official for prompted frames in evaluation.
        """
        shares = (masks > 0).to(coarse.dtype) if binary else masks.sigmoid()
        return self.memory_encoder(coarse, shares, scores)


def mask_logits(masks: Tensor) -> Tensor:
    """Given masks, 0 or 1, as sure logits: −10 or 10."""
    return masks.float() * 20 - 10


def resize(masks: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """(B, M, ·, ·) → (B, M, height, width), bilinear, in float32."""
    return F.interpolate(masks.float(), (height, width), mode="bilinear", antialias=antialias)

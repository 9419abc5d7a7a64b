"""SAM 2.1 as one model: what an image, a prompt and a memory become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, nearest
from models.base import KeyTable, LoadReport, Model, unwrap
from models.sam2.image_encoder import TRUNKS, WIDTH, ImageEncoder
from models.sam2.mask_decoder import MaskDecoder, take
from models.sam2.memory_attention import MemoryAttention
from models.sam2.memory_encoder import MemoryEncoder, ObjectPointers
from models.sam2.prompt_encoder import NOT_A_POINT, PromptEncoder

OFFICIAL_WEIGHTS = "https://dl.fbaipublicfiles.com/segment_anything_2/092824"
ABSENT = -1024.0  # the logits of an object that is not there


@dataclass(frozen=True)
class Features:
    """Of N images: `coarse` (N, 256, h, w) at stride 16; `finer` (N, 64, 2h, 2w) and `finest` (N, 32, 4h, 4w), as the
    mask decoder takes them."""

    coarse: Tensor
    finer: Tensor
    finest: Tensor

    def of(self, images: Tensor) -> Features:
        """Those of the image that each object is in, (B,) int64."""
        return Features(*(part.index_select(0, images) for part in (self.coarse, self.finer, self.finest)))

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


class Sam2(Model):
    """Images and clips of any size whose sides are multiples of 32.

    Args:
        variant: "tiny", "small", "base_plus" or "large".
        trainable: the parts to train, of `PARTS`; none named: all.
        drop_path: stochastic depth of the image encoder.
        dropout: of the memory attention.
    """

    stride = 32
    encoder = "image_encoder."
    PARTS = (
        "image_encoder",
        "prompt_encoder",
        "mask_decoder",
        "memory_attention",
        "memory_encoder",
        "object_pointers",
    )

    def __init__(
        self,
        variant: str = "tiny",
        trainable: Sequence[str] = (),
        drop_path: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        """Raises `UserError` for an unknown variant or part."""
        super().__init__()
        if variant not in TRUNKS:
            raise UserError(
                f"model.variant: there is no {variant!r}{nearest(variant, TRUNKS)}; known: {', '.join(TRUNKS)}"
            )
        for part in trainable:
            if part not in self.PARTS:
                raise UserError(
                    f"model.trainable: there is no {part!r}{nearest(part, self.PARTS)}; known: {', '.join(self.PARTS)}"
                )
        self.variant = variant
        self.image_encoder = ImageEncoder(variant)
        self.set_drop_path(drop_path)
        self.prompt_encoder = PromptEncoder()
        self.mask_decoder = MaskDecoder()
        self.memory_attention = MemoryAttention(dropout)
        self.memory_encoder = MemoryEncoder()
        self.object_pointers = ObjectPointers()
        for part in self.PARTS if trainable else ():
            self.get_submodule(part).requires_grad_(part in trainable)

    # --- what a frame goes through --------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Features:
        """Features of normalised images (N, 3, H, W), as many frames and clips at once as there is memory for.
        Raises `UserError` for sides that are no multiples of 32."""
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and (height % self.stride or width % self.stride):
            raise UserError(f"an input of {width}×{height} pixels: SAM 2 needs sides that are multiples of 32")
        finest, finer, coarse = self.image_encoder(images)
        return Features(coarse, self.mask_decoder.finer_proj(finer), self.mask_decoder.finest_proj(finest))

    def without_memory(self, features: Features) -> Tensor:
        """What `decode` and `segment` take of frames that remember nothing: images, and frames with a first prompt."""
        return features.coarse + self.memory_attention.no_memory[0, :, :, None, None]

    def with_memory(
        self, features: Features, memories: Tensor, moments: Sequence[int], pointers: Tensor, steps: Sequence[float]
    ) -> Tensor:
        """The same of frames of B objects that remember.

        Args:
            memories: (B, R, 64, h, w) of R other frames, which `memory.recall` chooses.
            moments: of those frames, see there.
            pointers: (B, P, 256) of P other frames.
            steps: how far those are away, as shares of the longest way.
        """
        device = features.coarse.device
        tokens, codes = self.object_pointers.tokens(pointers, torch.tensor(steps, device=device))
        moment = torch.tensor(moments, device=device)
        return self.memory_attention(features.coarse, memories, moment, tokens, codes)

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

    def remember(self, features: Features, masks: Tensor, scores: Tensor, binary: bool = False) -> Tensor:
        """Memories (B, 64, h, w) of frames with masks (B, 1, H, W), logits in the size of the input, and scores of
        objects (B, 1). `binary`: of the masks as they are drawn, as is official for prompted frames in evaluation."""
        shares = (masks > 0).to(features.coarse.dtype) if binary else masks.sigmoid()
        return self.memory_encoder(features.coarse, shares, scores)

    # --- training -------------------------------------------------------------------------------------------------

    def decays(self, name: str) -> bool:
        """As official: all but biases and the norms of transformers."""
        module = self.get_submodule(name.rpartition(".")[0])
        return "bias" not in name and not isinstance(module, nn.LayerNorm)

    def layer_depth(self, name: str) -> tuple[int, int]:
        """As official: the tables of positions and the neck learn as fast as the last block's output."""
        total = len(self.image_encoder.trunk.blocks) + 1
        part = name.removeprefix("image_encoder.trunk.").split(".")
        if part[0] == "blocks":
            return int(part[1]) + 1, total
        return (0 if part[0] == "patch_embed" else total), total

    # --- official checkpoints -------------------------------------------------------------------------------------

    def published_weights(self) -> dict[str, str]:
        """Addresses of the trunk alone, as timm keeps it, and of the whole model."""
        side = 1024 if self.variant == "large" else 896
        return {
            "backbone": f"hf-hub:timm/{TRUNKS[self.variant].name}.fb_r{side}_2pt1",
            "official": f"{OFFICIAL_WEIGHTS}/sam2.1_hiera_{self.variant}.pt",
        }

    def official_keys(self) -> KeyTable:
        parts: list[tuple[str, str, KeyTable]] = [
            ("image_encoder", "image_encoder", self.image_encoder.official_keys()),
            ("", "object_pointers", [("mask_downsample", "mask_downsample")]),
            ("memory_attention", "memory_attention", self.memory_attention.official_keys()),
            ("memory_encoder", "memory_encoder", self.memory_encoder.official_keys()),
            ("sam_prompt_encoder", "prompt_encoder", self.prompt_encoder.official_keys()),
            ("sam_mask_decoder", "mask_decoder", self.mask_decoder.official_keys()),
            ("", "object_pointers", [("obj_ptr_proj", "project"), ("obj_ptr_tpos_proj", "position")]),
        ]
        table = list(LOOSE_KEYS)
        for official, own, keys in parts:
            table += [(f"{official}.{key}".lstrip("."), f"{own}.{name}") for key, name in keys]
        return table

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """As in `Model`. SAM 2.0 lacks two codes, and computes as if they were 0: they become that, and can be
        trained."""
        theirs = unwrap(state_dict)
        report = self.load_tensors(theirs, self.official_keys())
        if len(report.loaded) > len(report.missing) and set(report.missing) == set(ONLY_IN_2_1):
            own = {**self.object_pointers.position.state_dict(), "no_object": self.memory_encoder.no_object.data}
            for tensor in own.values():
                tensor.zero_()
            report.notes.append(
                "these are weights of SAM 2.0, which does not tell how old an object's pointer is nor "
                f"remembers that an object was absent: {', '.join(report.missing)} start from 0"
            )
            report.missing = []
        return report

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load the image encoder alone, from a whole checkpoint or from the trunk as timm keeps it."""
        trunk = "image_encoder.trunk."
        renamed = {}
        for key, tensor in unwrap(state_dict).items():
            if key.startswith(("blocks.", "patch_embed.", "pos_embed")):
                key = trunk + key.replace(".mlp.fc1.", ".mlp.layers.0.").replace(".mlp.fc2.", ".mlp.layers.1.")
            if key.startswith(self.encoder):
                renamed[key] = tensor
        report = self.load_tensors(renamed, self.official_keys())
        report.missing = [key for key in report.missing if key.startswith(trunk)]
        return report

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an official checkpoint of SAM 2.0 or 2.1. Raises `UserError` for what is none."""
        theirs = unwrap(state_dict)
        first = "image_encoder.trunk.patch_embed.proj.weight"
        if first not in theirs or "sam_mask_decoder.mask_tokens.weight" not in theirs:
            raise UserError(f"the checkpoint is no whole SAM 2: it lacks {first} or the mask decoder")
        prefix = "image_encoder.trunk.blocks."
        blocks = len({key[len(prefix) :].split(".")[0] for key in theirs if key.startswith(prefix)})
        width = theirs[first].shape[0]
        for name, row in TRUNKS.items():
            if (row.width, row.blocks) == (width, blocks):
                return {"variant": name}
        raise UserError(f"the checkpoint's trunk, {width} wide with {blocks} blocks, is none of {', '.join(TRUNKS)}")


def mask_logits(masks: Tensor) -> Tensor:
    """Given masks, 0 or 1, as sure logits: −10 or 10."""
    return masks.float() * 20 - 10


def resize(masks: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """(B, M, ·, ·) → (B, M, height, width), bilinear, in float32."""
    return F.interpolate(masks.float(), (height, width), mode="bilinear", antialias=antialias)


LOOSE_KEYS: KeyTable = [
    ("maskmem_tpos_enc", "memory_attention.moments"),
    ("no_mem_embed", "memory_attention.no_memory"),
    ("no_mem_pos_enc", "memory_attention.no_memory_position"),
    ("no_obj_ptr", "object_pointers.no_object"),
    ("no_obj_embed_spatial", "memory_encoder.no_object"),
]
ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")

"""RF-DETR (Robinson et al., 2025, arXiv:2511.09554), an LW-DETR on windowed DINOv2 with a mask head.

The numbers are those of Roboflow's package rfdetr 1.11. Its sizes under Apache-2.0 are here: all with masks, and nano
to large without; detection XL and 2XL have another licence and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, nearest
from models.base import KeyTable, LoadReport, Model, unwrap
from models.rfdetr.coco import coco_names
from models.rfdetr.decoder import Decoder, Perceptron, move_boxes
from models.rfdetr.encoder import WindowedDino, encoder_keys, fit_patches, fit_positions
from models.rfdetr.keys import (
    ENCODER,
    KEYPOINTS,
    PATCHES,
    POSITIONS,
    QUERIES,
    bare,
    group_of,
    groups_in,
    official_keys,
    position_side,
    recognise,
)
from models.rfdetr.masks import FpnMaskHead, OfficialMaskHead
from models.rfdetr.projector import Projector
from models.rfdetr.proposals import Proposals
from models.rfdetr.rows import few_rows
from models.rfdetr.variants import STORAGE, find_variant

DECODER_LR = 0.7  # the decoder's share of the learning rate, in the official code as here
COCO_CLASSES = 90  # of the official weights, whose labels are COCO's ids
PRIOR = 0.01  # probability that a fresh class head gives to each class
MASK_HEADS = ("official", "fpn")


class RFDETR(Model):
    """Detects objects in images whose sides are multiples of the stride: boxes, classes and masks.

    In evaluation: `logits` (B, Q, C + 1), a sigmoid each; `boxes` (B, Q, 4), center x, center y, width, height as
    shares of the image, which may reach beyond it; with masks `masks` (B, Q, H/4, W/4), logits.

    In training, for all L decoder layers and all G groups of queries (those of a group together):
    `logits` (L, B, G·Q, C + 1), `boxes` (L, B, G·Q, 4), and of the proposals that started the queries
    `encoder_logits` (B, G·Q, C + 1), `encoder_boxes` (B, G·Q, 4). With masks the factors of their logits:
    `mask_queries` (L, B, G·Q, E), `mask_features` (a tuple of L, (B, E, H/4, W/4)), `encoder_mask_queries` (B, G·Q, E),
    `encoder_mask_features` (B, E, H/4, W/4), and `mask_bias` (1,), which is added to the products.

    Officially class 0 of C + 1 is COCO's unused id 0; here labels are 0…C-1 and the last logit stays unused.

    Args:
        variant: a size: with masks "nano", "small", "medium", "large", "xlarge", "2xlarge" or "preview"; without
            "nano", "small", "medium", "large", "base" or "large_deprecated".
        num_classes: C, at least 1.
        masks: whether objects have masks.
        mask_head: "official", or "fpn" for one on a pyramid of the encoder's maps.
        num_queries: Q, how many objects an image can have at most; 0 for the size's own.
        groups: G, groups of queries in training, each matched to the objects by itself.
        position_side: of the encoder's table of positions, in patches; 0 for the size's own. Other input sizes are
            legal, the table is resampled for them.
        drop_path: stochastic depth of the encoder.
        dropout: in the decoder.
    """

    encoder = "backbone."

    def __init__(
        self,
        variant: str = "nano",
        num_classes: int = 0,
        masks: bool = True,
        mask_head: str = "official",
        num_queries: int = 0,
        groups: int = 13,
        position_side: int = 0,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        """Raises `UserError` for unknown names and without classes."""
        super().__init__()
        row = find_variant(variant, masks)
        if mask_head not in MASK_HEADS:
            known = ", ".join(MASK_HEADS)
            raise UserError(
                f"model.mask_head: there is no {mask_head!r}{nearest(mask_head, MASK_HEADS)}; known: {known}"
            )
        if num_classes < 1:
            raise UserError("model.num_classes is 0, which stands for the classes of the data, but there is no data")
        self.row, self.groups = row, groups
        self.stride = row.patch * row.windows
        self.num_queries = num_queries or row.queries
        side = position_side or row.side
        pixels = -(-side * row.patch // self.stride) * self.stride  # officially 560 where the table is of 518
        self.default_size = (pixels, pixels)
        self.official_class_names = coco_names() if num_classes == COCO_CLASSES else ()
        # Built with some stochastic depth whatever the rate, so that a schedule can raise it later.
        self.backbone = WindowedDino(row.encoder, row.patch, row.windows, side, row.taps, row.global_blocks, 0.1)
        self.set_drop_path(drop_path)
        channels, maps, width = self.backbone.width, len(row.taps), row.width
        self.projector = Projector(channels, maps, width, row.scales)
        bias = -math.log((1 - PRIOR) / PRIOR)
        self.proposals = Proposals(groups, width, num_classes + 1, bias)
        self.query_boxes = nn.Parameter(torch.zeros(groups, self.num_queries, 4))
        self.query_states = nn.Parameter(torch.randn(groups, self.num_queries, width))
        self.decoder = Decoder(width, row.layers, row.self_heads, row.cross_heads, len(row.scales), row.points, dropout)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.box_head = Perceptron(width, width, 4, 3)
        nn.init.constant_(self.class_head.bias, bias)
        for parameter in self.box_head.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.mask_head: FpnMaskHead | OfficialMaskHead | None = None
        if masks and mask_head == "fpn":
            self.mask_head = FpnMaskHead(channels, maps, width)
        elif masks:
            self.mask_head = OfficialMaskHead(width, row.layers)

    def forward(self, batch: Any) -> dict[str, Any]:
        images: Tensor = getattr(batch, "images", batch)
        self._check(images)
        maps = self.backbone(images)
        features = self.projector(maps)
        memory = torch.cat([feature.flatten(1, 2) for feature in features], 1)
        sizes = [(feature.shape[1], feature.shape[2]) for feature in features]

        proposed, encoder_logits, encoder_boxes = self.proposals(memory, sizes, self.num_queries)
        groups = proposed.shape[1]
        boxes = self._place_queries(encoder_boxes.detach()).flatten(1, 2)
        queries = self.query_states[:groups].flatten(0, 1).expand(images.shape[0], -1, -1)
        states = self.decoder(queries, boxes, memory, sizes, groups)
        delta = few_rows(self.box_head, states, self.box_head.parameters())
        outputs = {"logits": self.class_head(states), "boxes": move_boxes(boxes, delta)}
        if self.training:
            outputs |= {"encoder_logits": encoder_logits.flatten(1, 2), "encoder_boxes": encoder_boxes.flatten(1, 2)}
        else:
            outputs = {name: value[-1] for name, value in outputs.items()}
        if self.mask_head is not None:
            outputs |= self.mask_head(states, proposed.flatten(1, 2), maps, features[0], tuple(images.shape[-2:]))
        return outputs

    def _check(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        if not torch.compiler.is_compiling() and (height % self.stride or width % self.stride):
            raise UserError(
                f"an input of {width}×{height} pixels: this RF-DETR takes sides that are multiples of {self.stride} "
                f"(patches of {self.row.patch}, {self.row.windows} windows a side), such as data.size {self.size}"
            )

    @property
    def size(self) -> int:
        """The side in pixels of the square input that the position table is for, or of the next legal one."""
        side = position_side(self.backbone.pos_embed) * self.row.patch
        return -(-side // self.stride) * self.stride

    def _place_queries(self, proposals: Tensor) -> Tensor:
        """Boxes (B, G, Q, 4) of the queries: proposals (B, G, K, 4), each moved as its query has learnt.

        Where an image has fewer places than there are queries, the others keep what they have learnt.
        """
        learnt = self.query_boxes[: proposals.shape[1]].expand(proposals.shape[0], -1, -1, -1)
        count = proposals.shape[2]
        return torch.cat([move_boxes(proposals, learnt[:, :, :count]), learnt[:, :, count:]], 2)

    # --- training -------------------------------------------------------------------------------------------------

    def decays(self, name: str) -> bool:
        """As for all models, and neither to the patch embedding, as in the official code."""
        stacked = name.startswith("proposals.") and (name.endswith(".bias") or ".norm." in name)  # vectors, one a group
        return super().decays(name) and not stacked and ".patch_embed." not in name

    def layer_depth(self, name: str) -> tuple[int, int]:
        """Officially the last tap counts two more layers above its block: 0.8² is the rate of the deepest block."""
        total = self.row.taps[-1] + 3
        if name.startswith("backbone.blocks."):
            return int(name.split(".")[2]) + 1, total
        return (total, total) if not name.startswith("backbone.") or ".norm." in name else (0, total)

    def lr_scale(self, name: str, backbone_lr_scale: float = 1.0, layer_decay: float = 1.0) -> float:
        """The decoder moves at 0.7 of the learning rate, as in the official code, whatever the encoder does."""
        return DECODER_LR if name.startswith("decoder.") else super().lr_scale(name, backbone_lr_scale, layer_decay)

    # --- export ---------------------------------------------------------------------------------------------------

    def export_graphs(self) -> dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, dict[int, str]]]]:
        """One graph for any batch of images of the position table's size: normalised `images` (B, 3, S, S) → `boxes`,
        `logits` and, of a model that has them, `masks`, as `forward` returns them in evaluation."""
        names = ["images", "boxes", "logits"] + ["masks"] * (self.mask_head is not None)
        example = torch.zeros(2, 3, self.size, self.size)
        return {"rfdetr": (Detections(self), (example,), {name: {0: "batch"} for name in names})}

    # --- published weights ------------------------------------------------------------------------------------------

    def published_weights(self) -> dict[str, str]:
        """Addresses of DINOv2, and of the whole model trained on COCO (90 classes, whose labels are COCO's ids)."""
        return {
            "backbone": f"hf-hub:facebook/dinov2-{self.row.encoder}",
            "official": f"{STORAGE}/{self.row.weights}",
        }

    # --- official checkpoints -------------------------------------------------------------------------------------

    def official_keys(self) -> KeyTable:
        return official_keys(len(self.backbone.blocks), len(self.decoder.layers), self.groups)

    def official_part(self, key: str, tensor: Tensor) -> Tensor:
        """Officially query, key and value lie apart, and so do the groups' heads, while the groups' queries do not."""
        group = group_of(key)
        if group is not None:
            return tensor[group]
        for i, part in enumerate(("query", "key", "value")):
            if f".{part}." in key:
                return tensor.chunk(3)[i]
        return tensor.flatten(0, 1) if key in QUERIES else tensor

    def ignores(self, key: str) -> bool:
        """The mask of keypoint models, groups beyond this model's, and a mask head that is not wanted."""
        group = group_of(key)
        surplus = group is not None and group >= self.groups
        return surplus or key == KEYPOINTS or (self.mask_head is None and key.startswith("segmentation_head."))

    def load_official(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """As in `Model`. Positions of another input size are resampled; of other groups or numbers of queries those
        are taken that both have; heads of other classes start anew."""
        theirs = bare(state_dict)
        notes = self._fit_encoder(theirs, POSITIONS, PATCHES) + self._fit_queries(theirs)
        report = self.load_tensors(theirs, self.official_keys())
        report.notes += notes
        return report

    def load_encoder(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Load the encoder alone from DINOv2's weights, of transformers' layout or facebookresearch's."""
        theirs = unwrap(state_dict)
        theirs = {key.removeprefix("dinov2.").removeprefix("backbone."): tensor for key, tensor in theirs.items()}
        if "pos_embed" in theirs:
            notes = self._fit_encoder(theirs, "pos_embed", "patch_embed.proj.weight")
            report = self.load_tensors(theirs, [("", "backbone")])
        else:
            positions, patches = (key.removeprefix(ENCODER) for key in (POSITIONS, PATCHES))
            notes = self._fit_encoder(theirs, positions, patches)
            report = self.load_tensors(theirs, encoder_keys(len(self.backbone.blocks), "", "backbone."))
        report.notes += notes
        return report

    def official_state_dict(self) -> dict[str, Tensor]:
        """This model's weights under the official keys, in the official order."""
        return {KEYPOINTS: torch.zeros(0, 0, dtype=torch.bool)} | super().official_state_dict()

    @staticmethod
    def infer_settings(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an official checkpoint. Raises `UserError` for what is none.

        The number of windows leaves no trace in the tensors: where other positions or queries were trained, it is that
        of the nearest size.
        """
        theirs = bare(state_dict)
        name, masks = recognise(theirs)
        groups = groups_in(theirs)
        settings = {
            "variant": name,
            "num_classes": theirs["class_embed.weight"].shape[0] - 1,
            "masks": masks,
            "num_queries": theirs[QUERIES[0]].shape[0] // groups,
            "groups": groups,
            "position_side": position_side(theirs[POSITIONS]),
        }
        if "segmentation_head.queries.layers.0.weight" in theirs:
            settings["mask_head"] = "fpn"
        return settings

    def _fit_encoder(self, theirs: dict[str, Tensor], positions: str, patches: str) -> list[str]:
        """Bring positions and patch weights of other sizes to this model's, in place; returns what there is to say."""
        notes, ours = [], self.backbone
        for key, own, fit in (
            (positions, ours.pos_embed, fit_positions),
            (patches, ours.patch_embed.proj.weight, fit_patches),
        ):
            if key in theirs and theirs[key].shape != own.shape and theirs[key].ndim == own.ndim:
                notes.append(f"{key} resampled from {_sides(theirs[key])} to {_sides(own)}")
                theirs[key] = fit(theirs[key], own)
        return notes

    def _fit_queries(self, theirs: dict[str, Tensor]) -> list[str]:
        """The same for groups and queries: those that both models have are taken, others keep their initial values."""
        notes, groups = [], groups_in(theirs)
        for key, own in zip(QUERIES, (self.query_boxes, self.query_states), strict=True):
            if key not in theirs or not groups or len(theirs[key]) % groups:
                continue
            table = theirs[key].unflatten(0, (groups, -1))
            if table.shape == own.shape:
                continue
            fitted = own.detach().clone()
            shared, count = min(groups, self.groups), min(table.shape[1], self.num_queries)
            fitted[:shared, :count] = table[:shared, :count]
            theirs[key] = fitted.flatten(0, 1)
            notes.append(
                f"{key} has {groups} groups of {table.shape[1]} queries, this model {self.groups} of "
                f"{self.num_queries}: {shared} of {count} loaded"
            )
        return notes


class Detections(nn.Module):
    """A model's evaluation outputs as a tuple, for graphs that hold no dicts."""

    def __init__(self, model: RFDETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        return tuple(outputs[name] for name in ("boxes", "logits", "masks") if name in outputs)


def _sides(tensor: Tensor) -> str:
    """ "26×26" of positions or patches."""
    side = position_side(tensor) if tensor.ndim == 3 else tensor.shape[-1]
    return f"{side}×{side}"

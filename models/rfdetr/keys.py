"""The names of official checkpoints, and what a checkpoint's shapes say about the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errors import UserError
from models.base import KeyTable, unwrap
from models.rfdetr.encoder import encoder_keys
from models.rfdetr.variants import DETECTION, SEGMENTATION

ENCODER = "backbone.0.encoder.encoder."  # the prefix of the encoder's names
POSITIONS = f"{ENCODER}embeddings.position_embeddings"
PATCHES = f"{ENCODER}embeddings.patch_embeddings.projection.weight"
QUERIES = ("refpoint_embed.weight", "query_feat.weight")
# Registered for keypoint models since version 1.5: a mask of no rows in all others.
KEYPOINTS = "_kp_active_mask"


def official_keys(depth: int, layers: int, groups: int) -> KeyTable:
    """The official names, in their order, and this model's; of `depth` encoder blocks and `layers` of the decoder."""
    table: KeyTable = []
    for i in range(layers):
        table.append((f"transformer.decoder.layers.{i}", f"decoder.layers.{i}"))
    table += [(f"transformer.decoder.{name}", f"decoder.{name}") for name in ("norm", "ref_point_head")]
    for official, own in [("enc_output", "output"), ("enc_output_norm", "norm")]:
        table += [(f"transformer.{official}.{i}", f"proposals.{own}") for i in range(groups)]
    for i in range(groups):
        table += [(f"transformer.enc_out_bbox_embed.{i}.layers", "proposals.box")]
    table += [(f"transformer.enc_out_class_embed.{i}", "proposals.classify") for i in range(groups)]
    table += [("class_embed", "class_head"), ("bbox_embed", "box_head"), ("segmentation_head", "mask_head")]
    table += [("refpoint_embed.weight", "query_boxes"), ("query_feat.weight", "query_states")]
    return [*table, *encoder_keys(depth, ENCODER, "backbone."), ("backbone.0.projector", "projector")]


def bare(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; newer runs of the package prefix their names with `model.`."""
    return unwrap({key.removeprefix("model."): tensor for key, tensor in unwrap(state_dict).items()})


def group_of(key: str) -> int | None:
    """The query group that an official key of the proposals' heads belongs to."""
    parts = key.split(".")
    return int(parts[2]) if parts[0] == "transformer" and parts[1].startswith("enc_out") else None


def groups_in(theirs: Mapping[str, Tensor]) -> int:
    """How many query groups a checkpoint has."""
    return sum(key.startswith("transformer.enc_output.") and key.endswith(".weight") for key in theirs)


def layers_in(theirs: Mapping[str, Tensor]) -> int:
    """How many decoder layers a checkpoint has."""
    return sum(key.startswith("transformer.decoder.layers.") and key.endswith(".norm1.weight") for key in theirs)


def recognise(theirs: Mapping[str, Tensor]) -> tuple[str, bool]:
    """(name, with masks) of the size that a checkpoint is of, or, where another table of positions or number of
    queries was trained, that is nearest to it. Raises `UserError` for what is none."""
    for key in (PATCHES, POSITIONS, *QUERIES, "class_embed.weight"):
        if key not in theirs:
            raise UserError(f"the checkpoint is no whole RF-DETR: it lacks {key}")
    masks = any(key.startswith(("segmentation_head.", "mask_head.")) for key in theirs)
    shape = (theirs[PATCHES].shape[-1], layers_in(theirs), theirs["query_feat.weight"].shape[1])
    side = position_side(theirs[POSITIONS])
    queries = theirs["query_feat.weight"].shape[0] // max(groups_in(theirs), 1)
    table = SEGMENTATION if masks else DETECTION
    rows = [(name, row) for name, row in table.items() if (row.patch, row.layers, row.width) == shape]
    if not rows:
        raise UserError(
            f"the checkpoint, with patches of {shape[0]}, {shape[1]} decoder layers and a width of {shape[2]}, is none "
            f"of RF-DETR's sizes {'with' if masks else 'without'} masks: {', '.join(table)}"
        )
    name, _ = min(rows, key=lambda item: (abs(item[1].side - side), abs(item[1].queries - queries)))
    return name, masks


def position_side(table: Tensor) -> int:
    """Patches on a side of a position table (1, 1 + side², C)."""
    return round((table.shape[1] - 1) ** 0.5)

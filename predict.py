"""What wraps `model.predict`: test-time augmentation and tiling.

A room of its own because evaluation and inference both do it, and no one imports an entry script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from samples import Batch, Size

LIKE = 0.5  # IoU from which on boxes in two views are of one object

# ---------------------------------------------------------------- test-time augmentation


def predict(model: Any, batch: Batch, tta: Sequence[float] = ()) -> dict[str, Tensor]:
    """`model.predict(batch)`; with `tta` the mean probability over these scales, each with its mirror image, as logits.

    The sides of a scaled input are rounded to multiples of `model.stride`; its probabilities are brought to the plain
    output's size. Where all are sure to the last bit, the logits are infinite: their sigmoid is 0 or 1 again.
    """
    if not tta:
        return model.predict(batch)
    views = [view for scale in tta for view in mirrored_pair(model, batch, scale)]
    if "boxes" in views[0].outputs:
        return average_objects([view.outputs for view in views])
    return {"logits": logits_of(torch.stack([plain_map(view, batch.images.shape[-2:]) for view in views]).mean(0))}


def probabilities_of(logits: Tensor) -> Tensor:
    """(B, C, h, w): of something being there where there is one channel, else of classes that exclude each other."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def logits_of(probabilities: Tensor) -> Tensor:
    """What `probabilities_of` gives these probabilities for."""
    return torch.logit(probabilities) if probabilities.shape[1] == 1 else probabilities.log()


@dataclass
class View:
    """What a model says of scaled images, the right way round."""

    outputs: dict[str, Tensor]
    width: int  # of the scaled images


def mirrored_pair(model: Any, batch: Batch, scale: float) -> list[View]:
    """The views of the scaled images and of their mirror images."""
    sides = [max(1, round(side * scale / model.stride)) * model.stride for side in batch.images.shape[-2:]]
    scaled = resize(batch.images, sides)
    straight = model.predict(Batch(scaled, None, batch.samples))
    mirrored = mirror_back(model.predict(Batch(scaled.flip(-1), None, batch.samples)))
    return [View(straight, sides[1]), View(mirrored, sides[1])]


def mirror_back(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs for the mirror images of mirror images: maps (B, C, h, w) and `boxes`, whose first value is x."""
    turned = {name: value.flip(-1) if value.ndim == 4 else value for name, value in outputs.items()}
    if "boxes" in outputs:
        x, rest = outputs["boxes"].split((1, 3), -1)
        turned["boxes"] = torch.cat([1 - x, rest], -1)
    return turned


def plain_map(view: View, size: Sequence[int]) -> Tensor:
    """A view's probabilities at the size of the output for unscaled images of this size, where they have places."""
    logits = view.outputs["logits"]
    if logits.ndim == 2:
        return probabilities_of(logits)
    reduction = view.width // logits.shape[-1]
    return resize(probabilities_of(logits), [side // reduction for side in size])


def average_objects(views: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The objects of the first view, with the mean probabilities, box and mask of themselves and their likes elsewhere.

    An object's like is the one that overlaps it most. Where that is by less than half, its class probabilities there
    are 0, and box and mask are those of the others.

    Args:
        views: logits (B, Q, C), boxes (B, Q, 4) center x, center y, width, height, perhaps masks (B, Q, h, w), with any
            number of queries and any size of masks; what comes back is of the size of the first.
    """
    first, *others = views
    classes, boxes = first["logits"].sigmoid(), first["boxes"].clone()
    weights = torch.ones_like(boxes[..., :1])
    masks = first["masks"].sigmoid() if "masks" in first else None
    for view in others:
        overlap, like = box_overlaps(first["boxes"], view["boxes"]).max(-1)
        there, like = (overlap >= LIKE).to(boxes).unsqueeze(-1), like.unsqueeze(-1)
        classes += there * view["logits"].sigmoid().take_along_dim(like, 1)
        boxes += there * view["boxes"].take_along_dim(like, 1)
        weights += there
        if masks is not None:
            seen = resize(view["masks"].sigmoid(), masks.shape[-2:]).take_along_dim(like.unsqueeze(-1), 1)
            masks += there.unsqueeze(-1) * seen
    averaged = {"logits": torch.logit(classes / len(views)), "boxes": boxes / weights}
    return averaged if masks is None else {**averaged, "masks": torch.logit(masks / weights.unsqueeze(-1))}


def box_overlaps(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, M) IoU of boxes (B, N, 4) and (B, M, 4), center x, center y, width, height."""
    corners = [torch.cat([box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2], -1) for box in (a, b)]
    return torch.stack([box_iou(one, other) for one, other in zip(*corners, strict=True)])


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinear between pixel centres, as the images themselves were resized."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- tiling


def predict_tiled(
    predict_tiles: Callable[[np.ndarray], Tensor], picture: np.ndarray, *, tile: Size, overlap: float, batch_size: int
) -> Tensor:
    """(1, C, H, W) logits of a picture (H, W, 3) uint8, none of whose sides is shorter than the tile's.

    `predict_tiles` takes (B, *tile, 3) uint8 and returns logits (B, C, h, w) of any size. Probabilities of overlapping
    tiles are averaged with weights that fall smoothly towards a tile's edges, on the device that they are on: beside
    the result there is never more than `batch_size` tiles.
    """
    height, width = tile
    rows, columns = (place_tiles(*sides, overlap) for sides in zip(picture.shape[:2], tile, strict=True))
    places = iter(itertools.product(rows, columns))
    total: Tensor | None = None
    while chunk := list(itertools.islice(places, batch_size)):
        logits = predict_tiles(np.stack([picture[y : y + height, x : x + width] for (y, _), (x, _) in chunk]))
        probabilities = resize(probabilities_of(logits.float()), tile)
        if total is None:
            total = probabilities.new_zeros(probabilities.shape[1], *picture.shape[:2])
        for tile_map, ((y, down), (x, across)) in zip(probabilities, chunk, strict=True):
            weights = down.to(total.device)[:, None] * across.to(total.device)
            total[:, y : y + height, x : x + width] += tile_map * weights
    assert total is not None
    return logits_of(total[None].clamp(0, 1))


def place_tiles(length: int, tile: int, overlap: float) -> list[tuple[int, Tensor]]:
    """(start, weights (tile,) float32) of each tile along an axis: evenly spread, at least `overlap` of a tile shared.

    At every pixel the weights of the tiles there sum to 1, so those of a grid of tiles do, too.
    """
    count = 1 + math.ceil((length - tile) / (tile * (1 - overlap)))
    starts = [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]
    window = torch.sin(math.pi * (torch.arange(tile, dtype=torch.float64) + 0.5) / tile) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return [(start, (window / total[start : start + tile]).float()) for start in starts]

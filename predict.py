"""What wraps `model.predict`: test-time augmentation and tiling.

A room of its own because evaluation and inference both do it, and no one imports an entry script.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samples import Batch, Size

# ---------------------------------------------------------------- test-time augmentation


def predict(model: Any, batch: Batch, tta: Sequence[float] = ()) -> dict[str, Tensor]:
    """`model.predict(batch)`; with `tta` the mean probability over these scales, each with its mirror image, as logits.

    The sides of a scaled input are rounded to multiples of `model.stride`; its probabilities are brought to the plain
    output's size. Where all are sure to the last bit, the logits are infinite: their sigmoid is 0 or 1 again.
    """
    if not tta:
        return model.predict(batch)
    maps = [probabilities for scale in tta for probabilities in mirrored_pair(model, batch, scale)]
    return {"logits": logits_of(torch.stack(maps).mean(0))}


def probabilities_of(logits: Tensor) -> Tensor:
    """(B, C, h, w): of something being there where there is one channel, else of classes that exclude each other."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def logits_of(probabilities: Tensor) -> Tensor:
    """What `probabilities_of` gives these probabilities for."""
    return torch.logit(probabilities) if probabilities.shape[1] == 1 else probabilities.log()


def mirrored_pair(model: Any, batch: Batch, scale: float) -> list[Tensor]:
    """Probabilities of the scaled images and of their mirror images, both the right way round and at the plain size."""
    size = batch.images.shape[-2:]
    scaled = resize(batch.images, [max(1, round(side * scale / model.stride)) * model.stride for side in size])
    maps = []
    for flips in ([], [-1]):
        logits = model.predict(Batch(scaled.flip(flips), None, batch.samples))["logits"]
        reduction = scaled.shape[-1] // logits.shape[-1]
        maps.append(resize(probabilities_of(logits).flip(flips), [side // reduction for side in size]))
    return maps


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

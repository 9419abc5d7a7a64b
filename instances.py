"""From what an instance model says of a batch to its detections, with masks as run-length codes of the pictures' size.

Apart because metrics, inference and the pictures of a validation all need it. A mask of the full size never exists:
between two rows of the model's map a bilinear mask changes its sign once at most, so the places where a run begins
are computed from the map itself, in those of its cells alone whose corners are not all of one sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from samples import Rle, SampleInfo, Size

MAP_VALUES = 2**22  # rows of maps × columns of pictures that are looked at together
CELL_VALUES = 2**20  # columns of cells on an outline that are held together


@dataclass
class Detections:
    """What was found in one picture, the surest first, on the host."""

    labels: np.ndarray  # (n,) int64
    scores: np.ndarray  # (n,) float32 in [0, 1]
    boxes: np.ndarray  # (n, 4) float32 left, top, right, bottom in pixels, within the picture
    codes: list[Rle] | None  # masks of the picture's size, where the model has masks
    size: Size  # of the picture

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, 1 where the object is."""
        assert self.codes is not None
        return coco_mask.decode(self.codes[index])

    def above(self, threshold: float) -> Detections:
        """Those with scores of at least `threshold`."""
        count = int((self.scores >= threshold).sum())
        codes = None if self.codes is None else self.codes[:count]
        return Detections(self.labels[:count], self.scores[:count], self.boxes[:count], codes, self.size)


@torch.no_grad()
def detections(
    predictions: Mapping[str, Tensor],
    samples: Sequence[SampleInfo],
    *,
    top_k: int = 300,
    threshold: float = 0.0,
    num_classes: int | None = None,
    per_class: int | None = None,
) -> Iterator[Detections]:
    """The detections in each picture of a batch, as RF-DETR's authors take them.

    The `top_k` pairs of a query and a class with the best scores (of equal ones the first), of which those are dropped
    whose score is below `threshold`, whose label is not below `num_classes`, and from each class all but the best
    `per_class`. What is not a number scores nothing.

    Args:
        predictions: `logits` (B, Q, C), `boxes` (B, Q, 4) center x, center y, width, height as shares of the input,
            and perhaps `masks` (B, Q, h, w) logits over the input.
        samples: What is known of each picture: of its `size` the detections are.
    """
    logits = predictions["logits"]
    ranked = logits.float().sigmoid().nan_to_num(0).flatten(1).sort(descending=True, stable=True)
    scores, order = (each[:, :top_k].cpu().numpy() for each in ranked)
    shares = corners(predictions["boxes"].float().nan_to_num(0)).cpu().numpy()
    masks = predictions.get("masks")
    for index, sample in enumerate(samples):
        queries, labels = np.divmod(order[index], logits.shape[-1])
        kept = scores[index] >= threshold
        if num_classes is not None:
            kept &= labels < num_classes
        if per_class is not None:
            kept[kept] = ranks_within(labels[kept]) < per_class
        queries = queries[kept]
        sides = np.array([sample.size[1], sample.size[0]] * 2, np.float32)
        boxes = np.clip(shares[index, queries] * (sides / np.array(sample.content[::-1] * 2, np.float32)), 0, sides)
        codes = None
        if masks is not None:
            codes = encode_resized(masks[index], sample.size, content=sample.content, which=torch.from_numpy(queries))
        yield Detections(labels[kept], scores[index][kept], boxes, codes, sample.size)


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) center x, center y, width, height -> left, top, right, bottom; sides are never negative."""
    center, half = boxes[..., :2], boxes[..., 2:].clamp(min=0) / 2
    return torch.cat([center - half, center + half], -1)


def ranks_within(labels: np.ndarray) -> np.ndarray:
    """(n,) labels -> how many of the same label stand before each."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return ranks


# ---------------------------------------------------------------- masks


def encode_resized(
    maps: Tensor,
    size: Size,
    *,
    content: tuple[float, float] = (1.0, 1.0),
    which: Tensor | None = None,
    level: float = 0.0,
) -> list[Rle]:
    """Run-length codes of `F.interpolate(maps, size, mode="bilinear") > level`, and of nothing larger than the maps.

    Equal to that but for pixels whose value is `level` up to the rounding of float32.

    Args:
        maps: (N, h, w); what is not a number lies below the level.
        content: The shares of the maps' sides that hold the picture, from their top left corner on.
        which: (n,) int64, the maps to encode, in that order; by default all.
    """
    maps = maps.cpu() if maps.device.type == "mps" else maps  # it has no float64
    which = torch.arange(len(maps)) if which is None else which
    step = max(1, MAP_VALUES // (maps.shape[1] * size[1]))
    codes = []
    for chosen in which.split(step):
        values = (maps[chosen.to(maps.device)].float() - level).nan_to_num(-1.0, posinf=1e30, neginf=-1e30)
        codes += _to_codes(_run_starts(values, size, content), len(values), size)
    return codes


def _run_starts(maps: Tensor, size: Size, content: tuple[float, float]) -> np.ndarray:
    """Where the sign of the resized (N, h, w) maps changes: `map * (pixels + 1) + pixel`, int64, in any order.

    Pixels are counted down the columns. Some may stand there several times: each time is a change.
    """
    height, width = size
    stride = height * width + 1
    rows = _sources(maps.shape[1], height, content[0], maps.device)
    left, share = _split(_sources(maps.shape[2], width, content[1], maps.device))
    right = (left + 1).clamp(max=maps.shape[2] - 1)

    def across(rows_of_maps: Tensor) -> Tensor:  # (N, w) -> (N, width)
        return rows_of_maps[:, left] * (1 - share) + rows_of_maps[:, right] * share

    # From the foot of one column to the head of the next.
    touching = (maps[:, [0, -1]] > 0).flatten(1).any(1).nonzero().squeeze(1)
    head, foot = (across(maps[touching, row]) > 0 for row in (0, -1))
    before = torch.cat([torch.zeros_like(foot[:, :1]), foot[:, :-1]], 1)
    index, column = (head != before).nonzero().unbind(1)
    found = [touching[index] * stride + column * height]
    # Within a column: in the cells of the map whose corners differ, column by column.
    per_cell = torch.bincount(left, minlength=maps.shape[2])
    first = per_cell.cumsum(0) - per_cell
    for cells in _cells_on_outlines(maps > 0).split(max(1, CELL_VALUES // int(per_cell.max()))):
        index, row, column = cells.unbind(1)
        beside = (column + 1).clamp(max=maps.shape[2] - 1)
        above = torch.stack([maps[index, row, column], maps[index, row, beside]])
        below = torch.stack([maps[index, row + 1, column], maps[index, row + 1, beside]])
        cell = torch.repeat_interleave(per_cell[column])
        ends = per_cell[column].cumsum(0)
        x = torch.arange(len(cell), device=maps.device) + (first[column] - ends + per_cell[column])[cell]
        top, bottom = (values[0][cell] * (1 - share[x]) + values[1][cell] * share[x] for values in (above, below))
        crossing = ((top > 0) != (bottom > 0)).nonzero().squeeze(1)
        cell, x, top, bottom = cell[crossing], x[crossing], top[crossing].double(), bottom[crossing].double()
        place = row[cell] + top / (top - bottom)  # where the value is 0, in rows of the map
        # A pixel right there is not above 0, so it belongs to the side that is not.
        y = torch.where(top > 0, torch.searchsorted(rows, place), torch.searchsorted(rows, place, right=True))
        found.append(index[cell] * stride + x * height + y)
    return torch.cat(found).cpu().numpy()


def _sources(length: int, resized: int, content: float, device: torch.device) -> Tensor:
    """(resized,) float64: where each pixel lies on an axis of the map, as `F.interpolate` rounds it."""
    centers = torch.arange(resized, dtype=torch.float32, device=device) + 0.5
    return (centers * (length * content / resized) - 0.5).clamp(min=0, max=length - 1).double()


def _split(places: Tensor) -> tuple[Tensor, Tensor]:
    """The whole and the broken part of places on an axis, int64 and float32."""
    whole = places.long()
    return whole, (places - whole).float()


def _cells_on_outlines(positive: Tensor) -> Tensor:
    """(N, h, w) bool -> (cells, 3) int64 map, row and column of the upper left corner of cells of differing corners.

    The last column has cells, too, in which the picture ends, but the last row has none.
    """
    beside = torch.cat([positive[..., 1:], positive[..., -1:]], -1)
    some, every = positive | beside, positive & beside
    return ((some[:, :-1] | some[:, 1:]) & ~(every[:, :-1] & every[:, 1:])).nonzero()


# ---------------------------------------------------------------- run-length codes


def encode(mask: np.ndarray) -> Rle:
    """The run-length code of a mask (H, W) bool."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def as_json(code: Rle) -> dict[str, Any]:
    """A run-length code as COCO's files hold it."""
    return {**code, "counts": code["counts"].decode()}


def areas_of(codes: Sequence[Rle]) -> np.ndarray:
    """(n,) float64 pixels of masks."""
    # pycocotools 2.0.11 fails with more than 255 at a time.
    parts = [coco_mask.area(codes[start : start + 255]) for start in range(0, len(codes), 255)]
    return np.concatenate([np.zeros(0), *parts])


def _to_codes(starts: np.ndarray, count: int, size: Size) -> list[Rle]:
    """The codes of `count` masks from the starts of their runs, see `_run_starts`."""
    pixels = size[0] * size[1]
    starts, times = np.unique(starts, return_counts=True)
    starts = starts[(times % 2 == 1) & (starts % (pixels + 1) < pixels)]
    ends = np.arange(count) * (pixels + 1) + pixels
    borders = np.insert(starts, np.searchsorted(starts, ends), ends)  # of all runs of all masks
    owner, place = np.divmod(borders, pixels + 1)
    first = np.searchsorted(owner, np.arange(count))
    runs = np.diff(place, prepend=0)
    runs[first] = place[first]
    return [{"size": list(size), "counts": text} for text in compress(runs, first)]


def compress(runs: np.ndarray, first: np.ndarray) -> list[bytes]:
    """Runs as pycocotools writes them (maskApi.c, rleToString): (n,) int64 of masks that begin at `first`.

    From the fourth on a run is written as its difference from the one before the last; five bits to a character from
    the lowest on, with 48 added, a sixth one where more follow; the last one's fifth is the sign.
    """
    values = runs.copy()
    values[2:] -= runs[:-2]
    for position in range(3):
        early = first[first + position < np.append(first[1:], len(runs))] + position
        values[early] = runs[early]
    magnitude = np.where(values < 0, ~values, values)
    lengths = np.ones(len(values), np.int64)
    bits = 4
    while (longer := magnitude >> bits > 0).any():
        lengths += longer
        bits += 5
    ends = np.cumsum(lengths)
    text = np.empty(lengths.sum(), np.uint8)
    places, rest = ends - lengths, np.arange(len(values))
    while len(rest):
        lengths[rest] -= 1
        text[places[rest]] = 48 + (values[rest] & 31) + 32 * (lengths[rest] > 0)
        rest = rest[lengths[rest] > 0]
        values[rest] >>= 5
        places[rest] += 1
    borders = np.append(0, ends)[np.append(first, len(runs))]
    whole = text.tobytes()
    return [whole[start:end] for start, end in itertools.pairwise(borders)]

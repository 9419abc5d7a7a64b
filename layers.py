"""Objects of a picture as layers of label maps, which can be warped, cropped and pasted like pictures.

Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from samples import Layers, Objects, Rle, Sample, Size

MAX_OBJECTS = 32767  # of one sample: targets number them in int16
MAX_DEPTH = 100  # objects over one another, each of which takes a layer of the picture's size


def runs_of(code: Rle) -> np.ndarray:
    """The runs of a valid compressed code, (n,) int64, by turns 0 and 1, down the columns.

    `readers.coco.decode_counts` says how they are written, and tells what is none.
    """
    bits = np.frombuffer(code["counts"], np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((bits & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    shifts = 5 * (np.arange(len(bits)) - np.repeat(first, last - first + 1))
    runs = np.add.reduceat((bits & 31) << shifts, first)
    runs -= ((bits[last] >> 4) & 1) << (shifts[last] + 5)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def split_codes(joined: bytes, lengths: np.ndarray, size: Sequence[int]) -> list[Rle]:
    """The codes of a picture of this size, whose texts were joined."""
    ends = np.cumsum(lengths).tolist()
    return [
        {"size": list(size), "counts": joined[end - length : end]} for end, length in zip(ends, lengths, strict=True)
    ]


def patch_of(code: Rle) -> tuple[int, int, np.ndarray]:
    """(top, left, mask) of the rectangle that holds an object's pixels; the mask is (columns, rows) bool."""
    height, runs = code["size"][0], runs_of(code)
    ends = np.cumsum(runs)
    begins, ends = (ends - runs)[1::2], ends[1::2]
    if not (ends > begins).any():
        return 0, 0, np.zeros((0, 0), bool)
    first, last = int(begins[0]) // height, -(-int(ends[-1]) // height)
    edges = np.concatenate([[first * height], np.stack([begins, ends], axis=1).ravel(), [last * height]])
    columns = np.repeat(np.arange(len(edges) - 1) % 2 == 1, np.diff(edges)).reshape(-1, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    return top, first, columns[:, top:bottom]


def depth_of(codes: Sequence[Rle], size: Size) -> int:
    """How many of the objects lie over one another at most."""
    counts = np.zeros(size[::-1], np.uint16)
    for code in codes:
        top, left, patch = patch_of(code)
        counts[left : left + patch.shape[0], top : top + patch.shape[1]] += patch
    return int(counts.max())


def to_layers(objects: Objects, size: Size) -> Layers:
    """The objects of a picture of this size, crowds too, each on the first layer where it covers no other."""
    pages: list[np.ndarray] = [np.zeros(size[::-1], np.uint16)]  # turned, as the codes are
    layer_of = np.zeros(len(objects.codes), np.int64)
    for number, code in enumerate(objects.codes):
        top, left, patch = patch_of(code)
        place = slice(left, left + patch.shape[0]), slice(top, top + patch.shape[1])
        free = (layer for layer, page in enumerate(pages) if not page[place][patch].any())
        layer = next(free, len(pages))
        if layer == len(pages):
            pages.append(np.zeros_like(pages[0]))
        pages[layer][place][patch] = number + 1
        layer_of[number] = layer
    return Layers(np.dstack([cv2.transpose(page) for page in pages]), layer_of, objects.boxes.copy())


def layered(sample: Sample) -> Sample:
    """A sample whose masks are `Objects` with them as `Layers`: without crowds, boxes within the picture, and nothing
    that has no pixel or no box there. Other samples stay as they are."""
    objects = sample.masks
    if not isinstance(objects, Objects):
        return sample
    height, width = sample.frames[0].shape[:2]
    boxes = clipped(objects.boxes, (height, width))
    areas = np.array([coco_mask.area(code) for code in objects.codes])
    chosen = np.flatnonzero(~objects.crowd & (areas > 0) & has_sides(boxes))
    objects = Objects([objects.codes[i] for i in chosen], boxes[chosen], objects.crowd[chosen], objects.areas[chosen])
    class_ids = [sample.class_ids[i] for i in chosen]
    return replace(sample, masks=to_layers(objects, (height, width)), class_ids=class_ids)


def tidied(sample: Sample, least: np.ndarray | int = 1) -> Sample:
    """A sample with `Layers` whose objects all have a box within the picture and pixels, at least `least` of them.

    Pixels of the others are cleared, those that stay are numbered anew; layers that are left empty go.
    """
    layers: Layers = sample.masks
    height, width, _ = layers.maps.shape
    boxes = clipped(layers.boxes, (height, width))
    areas = pixel_counts(layers)
    stays = (areas >= least) & (areas > 0) & has_sides(boxes)
    if stays.all():
        return replace(sample, masks=replace(layers, boxes=boxes))
    numbers = np.zeros(len(boxes) + 1, np.uint16)
    numbers[1:][stays] = np.arange(1, stays.sum() + 1)
    used, layer_of = np.unique(layers.layer_of[stays], return_inverse=True)
    maps = numbers[layers.maps[..., used] if len(used) else layers.maps[..., :1]]
    class_ids = [label for label, kept in zip(sample.class_ids, stays, strict=True) if kept]
    return replace(sample, masks=Layers(maps, layer_of.astype(np.int64), boxes[stays]), class_ids=class_ids)


def pixel_counts(layers: Layers) -> np.ndarray:
    """(n,) pixels of each object."""
    return np.bincount(layers.maps[layers.maps > 0], minlength=len(layers.boxes) + 1)[1:]


def clipped(boxes: np.ndarray, size: Size) -> np.ndarray:
    """(n, 4) boxes as far as they are within a picture of this size."""
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))


def has_sides(boxes: np.ndarray) -> np.ndarray:
    """(n,) whether something is within the box."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def extents(layers: Layers) -> np.ndarray:
    """(n, 4) float32: the rectangles that just hold each object's pixels; left is above right where there are none."""
    height, width, _ = layers.maps.shape
    count = len(layers.layer_of)
    found = np.tile(np.array([width, height, 0, 0], np.float32), (count + 1, 1))
    rows, columns, layer = np.nonzero(layers.maps)
    numbers = layers.maps[rows, columns, layer]
    np.minimum.at(found[:, 0], numbers, columns)
    np.minimum.at(found[:, 1], numbers, rows)
    np.maximum.at(found[:, 2], numbers, columns + 1)
    np.maximum.at(found[:, 3], numbers, rows + 1)
    return found[1:]


def overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What (n, 4) boxes have in common with n others; the left is right of the right where that is nothing."""
    return np.hstack([np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])])

"""Combining several samples of a data set into one, for objects: mosaics and copy-paste.

That happens before augmentation and apart from batches (mixing.py has what happens in those). Everything is drawn from
the sample's own key, the partners too, so neither workers nor ranks nor resuming change what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from errors import UserError
from layers import MAX_OBJECTS, extents, layered, overlap, pixel_counts, tidied
from mixing import checked, stream, way_of
from samples import Layers, Sample, SampleKey, Size
from transforms import warp

COMBINATIONS = ("mosaic", "copy_paste")
LEAST_LEFT = 0.1  # of an object's pixels, for it to stay where others hide it or a picture ends


class Combine:
    """Combines a sample with others, in one of these ways with its probability, or leaves it.

    Called with a sample as read, its key and the reader for its partners, each drawn from all samples alike; returns a
    new sample with `Layers`, named as the first.

    Raises:
        UserError: an unknown way, or probabilities below 0 or of more than 1 together.
    """

    def __init__(self, probabilities: Mapping[str, float], *, seed: int):
        self.probabilities, self.seed = checked(probabilities, COMBINATIONS), seed

    def __call__(self, sample: Sample, key: SampleKey, reader: Any) -> Sample:
        rng = stream(self.seed, key, 3)
        way = way_of(self.probabilities, rng)
        if way is None:
            return sample
        if way == "copy_paste":
            return copy_paste(sample, reader.read(int(rng.integers(len(reader)))), rng)
        chosen = rng.choice(len(reader), size=3, replace=len(reader) < 3)
        return mosaic([sample, *(reader.read(int(index)) for index in chosen)], key.size, rng)


def mosaic(samples: Sequence[Sample], size: Size, rng: np.random.Generator) -> Sample:
    """Parts of four pictures around a point in the middle half of one of this size (YOLOv4, Bochkovskiy et al., 2020).

    Each fills its quarter, at one to one and a half times the scale at which it just would.
    """
    middle = [round(side * rng.uniform(0.25, 0.75)) for side in size]
    corners = [(top, left) for top in (0, middle[0]) for left in (0, middle[1])]
    sides = [(h, w) for h in (middle[0], size[0] - middle[0]) for w in (middle[1], size[1] - middle[1])]
    parts: list[Sample] = []
    for sample, quarter in zip(samples, sides, strict=True):
        height, width = sample.frames[0].shape[:2]
        scale = max(quarter[0] / height, quarter[1] / width) * rng.uniform(1, 1.5)
        top, left = rng.uniform(0, 1, 2) * np.maximum(0, np.array([height, width]) * scale - quarter)
        parts.append(_window(layered(sample), quarter, scale, top, left))
    image = np.empty((*size, 3), np.uint8)
    maps = np.zeros((*size, max(part.masks.maps.shape[2] for part in parts)), np.uint16)
    first = 0
    for part, (top, left), (height, width) in zip(parts, corners, sides, strict=True):
        rows, columns = slice(top, top + height), slice(left, left + width)
        image[rows, columns] = part.frames[0]
        numbers = _numbered(part.masks.maps, first)
        maps[rows, columns, : numbers.shape[2]] = numbers
        part.masks.boxes += np.array([left, top, left, top], np.float32)
        first += len(part.class_ids)
    masks = [part.masks for part in parts]
    joined = Layers(
        maps, np.concatenate([each.layer_of for each in masks]), np.concatenate([each.boxes for each in masks])
    )
    return replace(samples[0], frames=[image], masks=joined, class_ids=[i for part in parts for i in part.class_ids])


def copy_paste(sample: Sample, partner: Sample, rng: np.random.Generator) -> Sample:
    """Some objects of another picture on this one (Ghiasi et al., 2021), at half to one and a half times the scale at
    which that picture would just fit in, flipped or not, anywhere.

    Objects below lose the pixels that are hidden, and their boxes shrink to the rest. Edges are not blended, which the
    authors found to make no difference.
    """
    sample, partner = layered(sample), layered(partner)
    size = sample.frames[0].shape[:2]
    height, width = partner.frames[0].shape[:2]
    scale = min(size[0] / height, size[1] / width) * rng.uniform(0.5, 1.5)
    room = np.array([height, width]) * scale - size
    top, left = rng.uniform(0, 1, 2) * room
    chosen = rng.random(len(partner.class_ids)) < 0.5
    if rng.random() < 0.5:
        partner = _flipped(partner)
    boxes = np.where(chosen[:, None], partner.masks.boxes, 0)  # those without a box go
    partner = tidied(replace(partner, masks=replace(partner.masks, boxes=boxes)))
    pasted = _window(partner, (size[0], size[1]), scale, top, left)
    return _on_top(sample, pasted) if pasted.class_ids else sample


def _on_top(sample: Sample, pasted: Sample) -> Sample:
    """The objects of one sample pasted onto another of the same size."""
    below, above = sample.masks, pasted.masks
    count, layers = len(below.boxes), max(below.maps.shape[2], above.maps.shape[2])
    hidden = above.maps.any(axis=2)
    before = pixel_counts(below)
    maps = np.zeros((*below.maps.shape[:2], layers), np.uint16)
    maps[..., : below.maps.shape[2]] = below.maps
    maps[hidden] = 0
    left = Layers(maps, below.layer_of, below.boxes)
    after = pixel_counts(left)
    boxes = np.where((after < before)[:, None], overlap(below.boxes, extents(left)), below.boxes)
    maps[..., : above.maps.shape[2]] += _numbered(above.maps, count)
    least = np.concatenate([np.ceil(LEAST_LEFT * before), np.ones(len(above.boxes))])
    masks = Layers(maps, np.concatenate([below.layer_of, above.layer_of]), np.concatenate([boxes, above.boxes]))
    image = np.where(hidden[..., None], pasted.frames[0], sample.frames[0])
    class_ids = [*sample.class_ids, *pasted.class_ids]
    return tidied(replace(sample, frames=[image], masks=masks, class_ids=class_ids), least)


def _window(sample: Sample, size: Size, scale: float, top: float, left: float) -> Sample:
    """The part of a scaled picture that begins at a place, without objects that are cut off but for a little."""
    shift = (scale - 1) / 2  # of pixel centres
    matrix = np.array([[scale, 0, shift - left], [0, scale, shift - top]])
    masks = sample.masks
    image = warp(sample.frames[0], matrix, size, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
    maps = warp(masks.maps, matrix, size, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT).reshape(*size, -1)
    boxes = (masks.boxes * scale - np.array([left, top] * 2)).astype(np.float32)
    least = np.floor(LEAST_LEFT * scale**2 * pixel_counts(masks))
    return tidied(replace(sample, frames=[image], masks=Layers(maps, masks.layer_of, boxes)), least)


def _flipped(sample: Sample) -> Sample:
    """Left for right."""
    masks, width = sample.masks, sample.frames[0].shape[1]
    boxes = np.stack([width - masks.boxes[:, 2], masks.boxes[:, 1], width - masks.boxes[:, 0], masks.boxes[:, 3]], 1)
    masks = Layers(np.ascontiguousarray(masks.maps[:, ::-1]), masks.layer_of, boxes)
    return replace(sample, frames=[np.ascontiguousarray(sample.frames[0][:, ::-1])], masks=masks)


def _numbered(maps: np.ndarray, first: int) -> np.ndarray:
    """Maps whose objects are numbered from `first` on."""
    if first + int(maps.max(initial=0)) > MAX_OBJECTS:
        raise UserError(f"data.mix: combined pictures have more than {MAX_OBJECTS} objects; leave it out")
    return np.where(maps > 0, maps + np.uint16(first), np.uint16(0))

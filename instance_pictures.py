"""Pictures of objects: masks, outlines, boxes and names over an image, and which of them were found.

Boxes are (n, 4) left, top, right, bottom in pixels of the picture; codes are run-length codes of any size, which is
brought to the picture's, or None where there are boxes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from samples import Objects, Rle, Size

RIGHT, MISSED, WRONG = (70, 190, 110), (70, 140, 255), (255, 150, 30)  # apart also to colour-blind eyes
CROWD = (150, 150, 150)
MOST_CAPTIONS = 60  # of objects in a picture; beyond, names would hide them
OVERLAP = 0.5  # IoU of an object and what was found of it
Color = tuple[int, int, int]


def object_colors(count: int) -> np.ndarray:
    """(count, 3) uint8 RGB: hues by the golden ratio, so that neighbours in the list are far apart."""
    hues = (np.arange(count) * 0.6180339887498949 % 1 * 180).astype(np.uint8)
    hsv = np.stack([hues, np.full_like(hues, 185), np.full_like(hues, 255)], axis=-1)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] if count else np.zeros((0, 3), np.uint8)


def masks_of(boxes: np.ndarray, codes: Sequence[Rle] | None, size: Size) -> Iterator[np.ndarray]:
    """(H, W) uint8, 1 where the object is, one after the other; its box where there is no code."""
    for position, box in enumerate(boxes):
        if codes is not None:
            mask = coco_mask.decode(codes[position])
            yield mask if mask.shape == tuple(size) else cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        else:
            mask = np.zeros(size, np.uint8)
            left, top, right, bottom = (int(value) for value in np.rint(box))
            mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = 1
            yield mask


def id_map(boxes: np.ndarray, codes: Sequence[Rle] | None, size: Size) -> np.ndarray:
    """(H, W), at a pixel 1 + the number of the first object there, 0 where there is none; uint8 up to 255 objects."""
    ids = np.zeros(size, np.uint8 if len(boxes) < 256 else np.uint16)
    for number, mask in enumerate(masks_of(boxes, codes, size), 1):
        ids[(mask > 0) & (ids == 0)] = number
    return ids


def draw_objects(
    image: np.ndarray, boxes: np.ndarray, codes: Sequence[Rle] | None, captions: Sequence[str]
) -> np.ndarray:
    """Every object in its own colour over (H, W, 3) uint8 RGB, the first ones on top; a new picture."""
    picture = image.copy()
    colors: list[Any] = [tuple(map(int, color)) for color in object_colors(len(boxes))]
    order = range(len(boxes))[::-1]
    size = (image.shape[0], image.shape[1])
    if codes is not None:
        for number in order:
            (mask,) = masks_of(boxes[number : number + 1], codes[number : number + 1], size)
            paint(picture, mask, colors[number])
    line = line_width(size)
    for number in order:
        corners = [tuple(int(value) for value in np.rint(pair)) for pair in boxes[number].reshape(2, 2)]
        cv2.rectangle(picture, corners[0], corners[1], colors[number], line)
    for number in order if len(boxes) <= MOST_CAPTIONS else ():
        write_caption(picture, captions[number], boxes[number], colors[number])
    return picture


def paint(picture: np.ndarray, mask: np.ndarray, color: Color, share: float = 0.45) -> None:
    """Tint the mask's pixels in place and draw its outline."""
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return
    part, inside = picture[top : top + height, left : left + width], mask[top : top + height, left : left + width]
    tinted = cv2.addWeighted(part, 1 - share, np.full_like(part, color), share, 0)
    cv2.copyTo(tinted, inside, part)
    outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, color, line_width(picture.shape), offset=(left, top))


def line_width(shape: Sequence[int]) -> int:
    return max(1, round(min(shape[:2]) / 400))


def write_caption(picture: np.ndarray, text: str, box: np.ndarray, color: Color) -> None:
    """A label with a ground of the object's colour at the upper left corner of its box, within the picture."""
    height, width = picture.shape[:2]
    scale = min(1.2, max(0.35, min(height, width) / 1100))
    words = text.encode("ascii", "replace").decode()  # OpenCV's fonts know no other letters
    (across, up), below = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    left = int(np.clip(box[0], 0, max(0, width - across)))
    bottom = int(np.clip(box[1], up + below, height))
    cv2.rectangle(picture, (left, bottom - up - below), (left + across, bottom), color, -1)
    ink = (0, 0, 0) if sum(color) > 380 else (255, 255, 255)
    place = (left, bottom - below + 1)
    cv2.putText(picture, words, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)


def draw_outcome(image: np.ndarray, boxes: np.ndarray, truth: Objects, labels: Sequence[int], found: Any) -> np.ndarray:
    """Found, missed and wrong objects over the darkened image.

    What was found is taken in the order of its scores; each gets the object of its class with the largest IoU of
    masks (boxes where there are no masks) that is at least 0.5 and that none before it got.
    """
    size = (image.shape[0], image.shape[1])
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 3, cv2.COLOR_GRAY2RGB)
    there = list(masks_of(boxes, None if found.codes is None else truth.codes, size))
    free = {i for i, crowd in enumerate(truth.crowd) if not crowd}
    wrong = []
    for label, mask in zip(found.labels.tolist(), masks_of(found.boxes, found.codes, size), strict=True):
        overlaps = {i: iou(mask, there[i]) for i in free if labels[i] == label}
        best = max(overlaps, key=lambda i: overlaps[i], default=-1)
        if best >= 0 and overlaps[best] >= OVERLAP:
            free.discard(best)
            paint(grey, mask, RIGHT, 0.6)
        elif not any(is_inside(mask, there[i]) for i, crowd in enumerate(truth.crowd) if crowd):
            wrong.append(mask)
    for i, crowd in enumerate(truth.crowd):
        if crowd:
            paint(grey, there[i], CROWD, 0.3)
    for i in free:
        paint(grey, there[i], MISSED, 0.6)
    for mask in wrong:
        paint(grey, mask, WRONG, 0.6)
    return grey


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def is_inside(mask: np.ndarray, crowd: np.ndarray) -> bool:
    """Whether at least half of it lies in the crowd, where nobody counts."""
    area = np.count_nonzero(mask)
    return bool(area and np.count_nonzero(mask & crowd) / area >= OVERLAP)

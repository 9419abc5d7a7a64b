"""Everything in a picture: SAM 2 is asked at each point of a grid, and the best of its answers stay.

As the authors' SAM2AutomaticMaskGenerator does it without crops, with its defaults: of three masks for each point those
that the model thinks well of and that are stable, and of those that overlap the best. What differs: stability is taken
from the model's own maps, not from enlarged ones, which keeps more small masks, and specks of a few of their cells go,
which the authors leave.
"""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import nms

from instances import Detections, encode_resized
from models.sam2.parts import Features, Points, Sam2Parts
from models.sam2.tracker import fill_holes
from samples import Rle, Size

POINTS = 64  # that are asked at a time
OFFSET = 1.0  # a stable mask stays the same when its threshold moves so far up or down
OVERLAP = 0.7  # IoU of boxes from which on two masks are of one object
SPECK = 8  # cells of the model's maps


@torch.no_grad()
def segment_everything(
    model: Sam2Parts,
    image: Tensor,
    size: Size,
    *,
    points_per_side: int = 32,
    predicted_iou: float = 0.8,
    stability: float = 0.95,
) -> Detections:
    """The objects of a picture, all of them of the label 0, with predicted IoUs as scores.

    Args:
        model: in evaluation mode.
        image: (3, h, w) normalised, on the model's device.
        size: (height, width) of the picture, and of the masks.
        points_per_side: of the grid.
        predicted_iou: the least score.
        stability: the least share of a mask with a lower threshold that is left with a higher one.

    Raises:
        FloatingPointError: the model's output is not a number.
    """
    features = model.encode(image[None])
    grid = grid_points(points_per_side, features.image_size).to(image.device)
    scores: list[float] = []
    codes: list[Rle] = []
    for points in grid.split(POINTS):
        logits, ious = ask(model, features, points)
        if ious.isnan().any():
            raise FloatingPointError
        good = (ious > predicted_iou) & (stability_of(logits) >= stability)
        kept = without_specks(logits[good][:, None])[:, 0]
        for score, code in zip(ious[good].tolist(), encode_resized(kept, size), strict=True):
            if coco_mask.area(code):
                scores.append(score)
                codes.append(code)
    boxes = np.array([corners_of(code) for code in codes], np.float32).reshape(-1, 4)
    best = nms(torch.from_numpy(boxes), torch.tensor(scores), OVERLAP).tolist()  # the surest first
    return Detections(
        labels=np.zeros(len(best), np.int64),
        scores=np.array([scores[place] for place in best], np.float32),
        boxes=boxes[best],
        codes=[codes[place] for place in best],
        size=size,
    )


def grid_points(per_side: int, size: Size) -> Tensor:
    """(per_side ** 2, 2) x and y in the middle of equal parts of an input, row by row."""
    shares = (torch.arange(per_side) + 0.5) / per_side
    y, x = torch.meshgrid(shares * size[0], shares * size[1], indexing="ij")
    return torch.stack((x, y), -1).flatten(0, 1)


def ask(model: Sam2Parts, features: Features, points: Tensor) -> tuple[Tensor, Tensor]:
    """Three masks, (P, 3, h, w) logits, and their predicted IoUs (P, 3) for each of P points by itself."""
    features = features.expand(len(points))
    prompt = Points(points[:, None], torch.ones(len(points), 1, dtype=torch.int64, device=points.device))
    logits, ious, _, _ = model.decode(model.without_memory(features), features, prompt, multimask=True)
    return logits.float(), ious.float()


def stability_of(logits: Tensor) -> Tensor:
    """(..., h, w) logits -> (...) IoU of the masks above a higher and a lower threshold; 0 where there is neither."""
    inner, outer = ((logits > level).sum((-2, -1)) for level in (OFFSET, -OFFSET))
    return inner / outer.clamp(min=1)


def without_specks(masks: Tensor) -> Tensor:
    """Masks (N, 1, h, w) whose small holes are filled, and of which small pieces are gone."""
    return -fill_holes(-fill_holes(masks, SPECK), SPECK)


def corners_of(code: Rle) -> tuple[float, float, float, float]:
    """Left, top, right, bottom."""
    left, top, width, height = coco_mask.toBbox(code).tolist()
    return left, top, left + width, top + height

"""Everything in a picture, found from a grid of points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from automatic import grid_points, segment_everything, stability_of, without_specks
from models.sam2.parts import Features

SHARP = 20.0


def test_points_lie_in_the_middle_of_equal_parts() -> None:
    assert grid_points(2, (40, 80)).tolist() == [[20, 10], [60, 10], [20, 30], [60, 30]]
    assert len(grid_points(32, (64, 64))) == 1024


def test_stability_is_the_iou_of_two_thresholds() -> None:
    logits = torch.tensor([[[3.0, 0.5, -0.5, -3.0]], [[-5.0, -5, -5, -5]], [[5.0, 5, 5, 5]]])
    assert stability_of(logits).tolist() == pytest.approx([1 / 3, 0, 1])


def test_specks_and_small_holes_go() -> None:
    mask = torch.full((1, 1, 20, 20), -3.0)
    mask[..., 2:12, 2:12] = 3
    mask[..., 5:7, 5:7] = -3  # a hole
    mask[..., 15:17, 15:17] = 3  # a speck
    tidy = without_specks(mask)[0, 0] > 0
    assert tidy[2:12, 2:12].all()
    assert tidy.sum() == 100


class Squares:
    """A model that sees three squares of 8 cells in an input of 64 pixels, each when it is asked within; its second
    mask is of lower quality, its third one unstable."""

    corners = ((0, 0), (8, 0), (4, 8))  # top, left, in cells of the map
    prompts: list[int]

    def __init__(self) -> None:
        self.prompts = []

    def encode(self, images: torch.Tensor) -> Features:
        maps = torch.zeros(len(images), 1, 4, 4)
        return Features(maps, maps, maps)

    def without_memory(self, features: Features) -> torch.Tensor:
        return features.coarse

    def decode(self, conditioned: Any, features: Any, points: Any, multimask: bool) -> tuple[torch.Tensor, ...]:
        assert multimask
        assert points.labels.unique().tolist() == [1]
        self.prompts.append(len(points.positions))
        logits, ious = self.masks_at(points.positions[:, 0])
        return logits, ious, logits, ious

    def masks_at(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.full((len(points), 3, 16, 16), -SHARP)
        ious = torch.tensor([[0.9, 0.7, 0.95]]).repeat(len(logits), 1)
        for row, (x, y) in enumerate((points / 4).tolist()):
            for number, (top, left) in enumerate(self.corners):
                if top <= y < top + 8 and left <= x < left + 8:
                    logits[row, :, top : top + 8, left : left + 8] = SHARP
                    ious[row, 0] += number / 100 + row / 1e5
        logits[:, 2] /= 2 * SHARP
        return logits, ious


def test_the_best_of_those_that_overlap_stay() -> None:
    squares: Any = Squares()
    found = segment_everything(squares, torch.zeros(3, 64, 64), (32, 128), points_per_side=9)
    assert squares.prompts == [64, 17]  # a batch and the rest
    assert found.size == (32, 128)
    assert found.labels.tolist() == [0, 0, 0]
    assert (np.diff(found.scores) < 0).all()
    assert found.boxes.tolist() == [[64, 8, 128, 24], [0, 16, 64, 32], [0, 0, 64, 16]]
    assert found.codes is not None
    assert all(abs(int(coco_mask.area(code)) - 64 * 16) <= 2 for code in found.codes)  # resizing rounds corners
    lower = segment_everything(squares, torch.zeros(3, 64, 64), (32, 128), points_per_side=9, predicted_iou=0.905)
    assert len(lower.labels) == 2
    nothing = segment_everything(squares, torch.zeros(3, 64, 64), (32, 128), points_per_side=1, predicted_iou=1)
    assert (len(nothing.labels), nothing.boxes.shape, nothing.codes) == (0, (0, 4), [])


def test_a_model_that_fails_is_no_empty_picture() -> None:
    squares: Any = Squares()
    squares.masks_at = lambda points: (torch.zeros(len(points), 3, 16, 16), torch.full((len(points), 3), float("nan")))
    with pytest.raises(FloatingPointError):
        segment_everything(squares, torch.zeros(3, 64, 64), (32, 128))

"""The user's part in training: what is prompted in which frame, and where is clicked, drawn from the truth.

Decisions come from torch's generator on the CPU and points from that of the device, so the seed of a step decides
them and the host never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from models.sam2.parts import Points
from models.sam2.prompt_encoder import BOTTOM_RIGHT, NOT_A_POINT, TOP_LEFT

BOX_NOISE = 0.1  # of a box's sides, by which its corners are off
BOX_NOISE_PIXELS = 20.0  # but no more than that


@dataclass(frozen=True)
class Plan:
    """What a clip's user will do: prompt the `conditioning` frames, with `points` or else with the true masks, and
    correct the `corrected` frames with clicks."""

    points: bool
    conditioning: list[int]
    corrected: list[int]


class User(Protocol):
    """Who prompts. Masks are (B, 1, H, W) bool, of all objects at once."""

    clicks: int  # in a row on a frame that is corrected

    def plan(self, num_frames: int) -> Plan: ...

    def prompt(self, truth: Tensor) -> Points:
        """The first prompt in a frame, points or a box."""

    def correct(self, truth: Tensor, predicted: Tensor) -> Points:
        """One more click where the prediction is wrong."""


@dataclass
class RandomUser:
    """Prompts as in the official recipe.

    `points` and `boxes` are probabilities: of points rather than masks in a clip, and then of a box rather than a click
    in a frame. Up to `conditioning_frames` frames are prompted, the first one always, and up to `corrected_frames`
    corrected by so many `clicks`, each of which is on the object with probability `true_clicks`, right or wrong. A
    single frame is always prompted with points, and corrected.
    """

    points: float = 0.5
    boxes: float = 0.5
    conditioning_frames: int = 2
    corrected_frames: int = 2
    clicks: int = 7
    true_clicks: float = 0.1

    def plan(self, num_frames: int) -> Plan:
        points = chance(1.0 if num_frames == 1 else self.points)
        most = num_frames if points else num_frames - 1  # nothing is predicted where masks are given
        prompted = draw(1, min(self.conditioning_frames, most))
        order = [0, *(torch.randperm(num_frames - 1) + 1).tolist()]  # the prompted frames come first
        corrected = draw(prompted, max(prompted, min(self.corrected_frames, num_frames))) if points else 0
        return Plan(points, order[:prompted], order[:corrected])

    def prompt(self, truth: Tensor) -> Points:
        return noisy_boxes(truth) if chance(self.boxes) else random_clicks(truth, torch.zeros_like(truth))

    def correct(self, truth: Tensor, predicted: Tensor) -> Points:
        return random_clicks(truth, torch.zeros_like(truth) if chance(self.true_clicks) else predicted)


def chance(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def draw(low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


def random_clicks(truth: Tensor, predicted: Tensor) -> Points:
    """A click for each object, anywhere where the prediction is wrong; beside the object where nothing is."""
    wrong = truth ^ predicted
    area = torch.where(wrong.flatten(1).any(1)[:, None, None, None], wrong, ~truth)
    chosen = (torch.rand(truth.shape, device=truth.device) * area).flatten(1).argmax(1, keepdim=True)
    return clicks_at(chosen, truth)


def center_clicks(truth: Tensor, predicted: Tensor) -> Points:
    """A click for each object in the middle of the largest error: where it is farthest from the error's border, which
    the border of the picture counts as (Sofiiuk et al., 2021, arXiv:2102.06583). Computed on the host."""
    chosen = [
        farthest(*errors)
        for errors in zip(*(host_masks(m) for m in (truth & ~predicted, predicted & ~truth)), strict=True)
    ]
    return clicks_at(torch.tensor(chosen, device=truth.device)[:, None], truth)


def farthest(missing: np.ndarray, extra: np.ndarray) -> int:
    """Of two (H, W) masks, the index of the pixel that lies deepest in one of them."""
    depths = [cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 0)[1:-1, 1:-1] for mask in (extra, missing)]
    deepest = max(depths, key=np.max)  # the first where both are as deep
    return int(deepest.argmax())


def host_masks(masks: Tensor) -> np.ndarray:
    """(B, H, W) uint8."""
    return masks[:, 0].cpu().numpy().astype(np.uint8)


def clicks_at(pixels: Tensor, truth: Tensor) -> Points:
    """Clicks at (B, 1) indices of pixels, labelled by what is there."""
    width = truth.shape[-1]
    positions = torch.stack((pixels % width, pixels // width), -1).float()
    return Points(positions, truth.flatten(1).gather(1, pixels).long())


def boxes_around(truth: Tensor) -> Tensor:
    """(B, 4): the first and last column and row of each object, as left, top, right, bottom."""
    (left, right), (top, bottom) = ends(truth.any(2)[:, 0]), ends(truth.any(3)[:, 0])
    return torch.stack((left, top, right, bottom), 1).float()


def noisy_boxes(truth: Tensor) -> Points:
    """The corners of a box around each object, each side off by a little; of no object, no points."""
    height, width = truth.shape[-2:]
    box = boxes_around(truth)
    sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    noise = (2 * torch.rand_like(box) - 1) * (BOX_NOISE * sides).clamp(max=BOX_NOISE_PIXELS)
    x, y = (box + noise).view(-1, 2, 2).unbind(-1)
    corners = torch.stack((x.clamp(0, width - 1), y.clamp(0, height - 1)), -1)
    labels = torch.full_like(x, TOP_LEFT, dtype=torch.int64)
    labels[:, 1] = BOTTOM_RIGHT
    return Points(corners, labels.where(truth.flatten(1).any(1, keepdim=True), NOT_A_POINT))


def ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) bool → the first and the last index that is true."""
    return line.int().argmax(1), line.shape[1] - 1 - line.flip(1).int().argmax(1)

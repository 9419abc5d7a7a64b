"""Scores of contours: Boundary IoU, BiRefNet's BIoU, mean boundary accuracy, multi-scale IoU."""

from __future__ import annotations

import math

import cv2
import numpy as np

from metrics.pair import HALF, Pair, histogram
from metrics.saliency import divide, grown


def boundary_iou(pair: Pair) -> float:
    """Boundary IoU (Cheng et al., CVPR 2021) of prediction > 127 and truth > 128, as in its authors' API.

    NaN where neither has a boundary.
    """
    found, there = inner_boundary(pair.mask(HALF)), inner_boundary(pair.truth)
    union = cv2.countNonZero(found | there)
    return cv2.countNonZero(found & there) / union if union else math.nan


def biou_curve(pair: Pair) -> np.ndarray:
    """(256,) BiRefNet's BIoU at thresholds 255, ..., 0: IoU of the *grey* prediction's boundary with the truth's.

    evaluation/metrics.py subtracts the erosion of the stretched 8-bit map and takes the thresholds afterwards, so this
    is not Boundary IoU.
    """
    there = inner_boundary(pair.truth)
    found = inner_boundary(cv2.LUT(pair.prediction, pair.thresholds))
    hits = histogram(found, there)
    others = histogram(found) - hits
    return divide(np.cumsum(hits[::-1]), max(1, cv2.countNonZero(there)) + np.cumsum(others[::-1]))


def inner_boundary(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8 minus its erosion by a square of 2 % of the diagonal on each side; outside the image is black."""
    height, width = mask.shape
    distance = max(1, round(0.02 * math.hypot(height, width)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask - eroded[1:-1, 1:-1]


def mean_boundary_accuracy(pair: Pair, found: np.ndarray) -> float:
    """mBA (CascadePSP, Cheng et al., CVPR 2020): accuracy near the truth's boundary, averaged over five widths.

    `found` is the binary prediction, (H, W) uint8 of 0 and 1. NaN where the truth has no boundary.
    """
    if pair.foreground in (0, pair.size):
        return math.nan
    height, width = pair.truth.shape
    largest = (height + width) / 300
    accuracies: dict[int, float] = {}
    radii = [1 + int((largest - 1) / 5 * step) for step in range(5)]
    box = grown(cv2.boundingRect(pair.truth), max(radii) + 1, pair.truth.shape)
    truth, correct = pair.truth[box], found[box] == pair.truth[box]
    for radius in set(radii):
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        band = cv2.morphologyEx(truth, cv2.MORPH_GRADIENT, disk)
        accuracies[radius] = cv2.countNonZero(band & correct) / cv2.countNonZero(band)
    return sum(accuracies[radius] for radius in radii) / 5


def multi_scale_iou(pair: Pair, found: np.ndarray) -> float:
    """MSIoU (Ahmadzadeh et al., ICIP 2021) of a binary prediction, (H, W) uint8 of 0 and 1.

    How much of the truth's edges lies in cells of 1, 2, ..., 512 pixels that have an edge of the prediction, too: the
    area under these ten. In whole numbers, where PySODMetrics sums float16 maps, which are rounded above 2048.
    """
    ratios = []
    found, there = edges(found), edges(pair.truth)
    for _ in range(10):
        ratios.append((cv2.countNonZero(found & there) + 1) / (cv2.countNonZero(there) + 1))
        found, there = halved(found), halved(there)
    return (sum(ratios) - (ratios[0] + ratios[-1]) / 2) / 9


def edges(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8, 1 where a Sobel filter of a binary mask is not 0; outside the image is black."""
    vertical = cv2.Sobel(mask, cv2.CV_16S, 0, 1, borderType=cv2.BORDER_CONSTANT)
    horizontal = cv2.Sobel(mask, cv2.CV_16S, 1, 0, borderType=cv2.BORDER_CONSTANT)
    return (np.bitwise_or(vertical, horizontal) != 0).view(np.uint8)


def halved(cells: np.ndarray) -> np.ndarray:
    """Cells of twice the side, 1 where any of the four is; those at the top and left may be cut by the image."""
    height, width = cells.shape
    cells = cv2.copyMakeBorder(cells, height % 2, 0, width % 2, 0, cv2.BORDER_CONSTANT, value=0)
    rows = np.bitwise_or(cells[0::2], cells[1::2])
    return (rows.view(np.uint16) != 0).view(np.uint8)  # two neighbours in a row as one number

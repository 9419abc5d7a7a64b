"""Scores of alpha mattes (Rhemann et al., CVPR 2009), over the whole image and on the 8-bit values as they are."""

from __future__ import annotations

import math

import cv2
import numpy as np

from metrics.pair import Pair, above

SIGMA = 1.4  # pixels, of the gradient's Gaussian
STEPS = 10  # levels at which connectedness is looked at


def sad(pair: Pair) -> float:
    """Sum of |p − α| in thousands, p and α in [0, 1]."""
    return cv2.norm(pair.prediction, pair.alpha, cv2.NORM_L1) / 255 / 1000


def mad(pair: Pair) -> float:
    """Mean |p − α|."""
    return 1000 * sad(pair) / pair.size


def mse(pair: Pair) -> float:
    """Mean (p − α)²."""
    return cv2.norm(pair.prediction, pair.alpha, cv2.NORM_L2SQR) / 255**2 / pair.size


def gradient_error(pair: Pair) -> float:
    """Sum of (|∇p| − |∇α|)² in thousands, of Gaussian derivatives of both maps stretched to [0, 1], as in the
    benchmark's `gradient.m` (`mat2gray`, then `gaussgradient` with σ = 1.4)."""
    difference = gradient_magnitude(pair.prediction) - gradient_magnitude(pair.alpha)
    return float(np.vdot(difference, difference)) / 1000


def gradient_magnitude(image: np.ndarray) -> np.ndarray:
    """(H, W) float64: length of the Gaussian gradient of an image stretched to [0, 1]; edges are repeated."""
    low, high = int(image.min()), int(image.max())
    if low == high:
        return np.zeros(image.shape)
    reach = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * 0.01)))
    x = np.arange(-reach, reach + 1)
    smooth = np.exp(-(x**2) / (2 * SIGMA**2)) / (SIGMA * math.sqrt(2 * math.pi))
    slope = -x * smooth / SIGMA**2
    slope /= np.linalg.norm(np.outer(slope, smooth)) * (high - low)
    across = cv2.sepFilter2D(image, cv2.CV_64F, slope, smooth, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(image, cv2.CV_64F, smooth, slope, borderType=cv2.BORDER_REPLICATE)
    return cv2.magnitude(across, down)


def connectivity_error(pair: Pair) -> float:
    """Sum of |φ(p) − φ(α)| in thousands, as in the benchmark's `connectivity.m` with steps of 0.1.

    A pixel is connected up to the last level at which it belongs to the largest 4-connected region that both maps
    reach; φ = 1 − d for what exceeds that level by d ≥ 0.15, else 1.
    """
    lower = np.minimum(pair.prediction, pair.alpha)
    connected = np.zeros(lower.shape, np.uint8)  # the last step without a break before it
    for step in range(1, STEPS + 1):
        reached = above(lower, math.ceil(255 * step / STEPS) - 1)
        count, labels, statistics, _ = cv2.connectedComponentsWithStats(reached, connectivity=4)
        if count == 1:
            break
        largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
        connected += (labels == largest) & (connected == step - 1)
    level = connected / STEPS
    return float(np.abs(phi(pair.prediction / 255 - level) - phi(pair.alpha / 255 - level)).sum()) / 1000


def phi(excess: np.ndarray) -> np.ndarray:
    """How connected a pixel is that exceeds its level by `excess`."""
    return 1 - np.where(excess >= 0.15, excess, 0)

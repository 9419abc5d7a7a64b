"""Region scores of the saliency and dichotomous-segmentation field, as PySODMetrics 1.6 computes them.

Each function takes what `Pair` offers and costs little beside its histograms; only the weighted F-measure looks at
where pixels are. `EPS` and every order of operations that decides an edge case are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from metrics.pair import Counts, Pair

EPS = np.spacing(1)

# ---------------------------------------------------------------- from the four counts


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and 0 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator != 0)


def precision(c: Counts) -> np.ndarray:
    """TP / (TP + FP)."""
    return divide(c.tp, c.tp + c.fp)


def recall(c: Counts) -> np.ndarray:
    """TP / (TP + FN)."""
    return divide(c.tp, c.tp + c.fn)


def specificity(c: Counts) -> np.ndarray:
    """TN / (TN + FP)."""
    return divide(c.tn, c.tn + c.fp)


def f_measure(c: Counts) -> np.ndarray:
    """1.3·P·R / (0.3·P + R) (Achanta et al., CVPR 2009)."""
    p, r = precision(c), recall(c)
    return divide(1.3 * p * r, 0.3 * p + r)


def iou(c: Counts) -> np.ndarray:
    """TP / (TP + FP + FN)."""
    return divide(c.tp, c.tp + c.fp + c.fn)


def dice(c: Counts) -> np.ndarray:
    """2·TP / (2·TP + FP + FN), which is F1."""
    return divide(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def accuracy(c: Counts) -> np.ndarray:
    """(TP + TN) / all, the "overall accuracy"."""
    return divide(c.tp + c.tn, c.tp + c.fp + c.fn + c.tn)


def kappa(c: Counts) -> np.ndarray:
    """(accuracy − chance) / (1 − chance) with PySODMetrics' chance, which is not Cohen's: TN + TP for TN + FP."""
    chance = (c.tp + c.fp) * (c.tp + c.fn) + (c.tn + c.fn) * (c.tn + c.tp)
    chance = divide(chance, (c.tp + c.fp + c.fn + c.tn) ** 2)
    return divide(accuracy(c) - chance, 1 - chance)


def balanced_error(c: Counts) -> np.ndarray:
    """1 − (recall + specificity) / 2, the "BER"."""
    return 1 - 0.5 * (recall(c) + specificity(c))


def e_measure(c: Counts) -> np.ndarray:
    """Enhanced alignment (Fan et al., IJCAI 2018), which is the same for all pixels of a kind.

    The sum is divided by N − 1, as in the authors' code, so it can exceed 1.
    """
    size = c.tp + c.fp + c.fn + c.tn
    if not np.any(c.tp + c.fn):
        total = c.tn
    elif not np.any(c.fp + c.tn):
        total = c.tp
    else:
        predicted, there = (c.tp + c.fp) / size, (c.tp + c.fn) / size
        total = np.zeros(())
        for count, is_predicted, is_there in ((c.tp, 1, 1), (c.fp, 1, 0), (c.fn, 0, 1), (c.tn, 0, 0)):
            a, b = is_predicted - predicted, is_there - there
            total = total + count * (2 * a * b / (a * a + b * b + EPS) + 1) ** 2 / 4
    return total / (size - 1 + EPS)


# ---------------------------------------------------------------- from histograms


def mean_absolute_error(pair: Pair) -> float:
    """Mean |p − t| of the stretched prediction and the binary truth."""
    background, foreground = pair.histogram
    return float(background @ pair.levels + foreground @ (1 - pair.levels)) / pair.size


def mean_squared_error(pair: Pair) -> float:
    """Mean (p − t)² of the stretched prediction and the binary truth (BiRefNet's evaluation)."""
    background, foreground = pair.histogram
    return float(background @ pair.levels**2 + foreground @ (1 - pair.levels) ** 2) / pair.size


def s_measure(pair: Pair) -> float:
    """Structure measure (Fan et al., ICCV 2017): half object-aware, half region-aware similarity.

    NaN where the truth's centroid is in the last row or column, which leaves a quadrant empty, as in PySODMetrics.
    """
    mean = float(pair.histogram.sum(0) @ pair.levels) / pair.size
    if pair.foreground == 0:
        return 1 - mean
    if pair.foreground == pair.size:
        return mean
    score = 0.5 * object_similarity(pair) + 0.5 * region_similarity(pair)
    return float(np.maximum(0, score))


def s_measure_birefnet(pair: Pair) -> float:
    """`s_measure` as BiRefNet's evaluation has it: 0 where a variance of a single pixel, or of none, is asked for."""
    if 0 < pair.foreground < pair.size:
        parts = [pair.foreground, pair.size - pair.foreground, *pair.histograms.sum((1, 2))]
        if min(parts) <= 1:
            return 0.0
    return s_measure(pair)


def object_similarity(pair: Pair) -> float:
    """2x / (x² + 1 + σ) of the levels in the foreground and, inverted, in the background, weighted by area."""
    score = 0.0
    for counts, values in zip(pair.histogram, (1 - pair.levels, pair.levels), strict=True):
        area = int(counts.sum())
        mean = float(counts @ values) / area
        deviation = math.sqrt(float(counts @ (values - mean) ** 2) / (area - 1)) if area > 1 else 0.0
        score += area / pair.size * 2 * mean / (mean**2 + 1 + deviation + EPS)
    return score


def region_similarity(pair: Pair) -> float:
    """The structural similarity of the quadrants around the truth's centroid, weighted by area."""
    score = 0.0
    for quadrant, place in zip(pair.histograms, pair.quadrants, strict=True):
        area = int(quadrant.sum())
        if area == 0:
            return math.nan
        score += area / pair.size * structural_similarity(pair, quadrant, place)
    return score


def structural_similarity(pair: Pair, quadrant: np.ndarray, place: tuple[slice, slice]) -> float:
    """4·x·y·σxy / ((x² + y²)(σx² + σy²)) of a quadrant from its (2, 256) histogram; 1 where both parts are 0."""
    (background, foreground), area = quadrant, int(quadrant.sum())
    y = int(foreground.sum()) / area
    present = np.flatnonzero(quadrant.sum(0))
    if y in (0, 1) and present.size == 1:
        # Two flat maps have no variance and score 1, unless the reference's mean of the equal levels is rounded away
        # from them: then it sees a variance of 1e-34, and scores 0.
        return float(pair.stretched[place].mean() == pair.levels[present[0]])
    x = float((background + foreground) @ pair.levels) / area
    deviation = pair.levels - x
    variance_x = float((background + foreground) @ deviation**2) / (area - 1 + EPS)
    variance_y = area * y * (1 - y) / (area - 1 + EPS)
    covariance = float(foreground @ deviation * (1 - y) - background @ deviation * y) / (area - 1 + EPS)
    numerator = 4 * x * y * covariance
    denominator = (x * x + y * y) * (variance_x + variance_y)
    if numerator != 0:
        return numerator / (denominator + EPS)
    return float(denominator == 0)


# ---------------------------------------------------------------- from where pixels are

KERNEL = np.exp(-(np.arange(-3, 4) ** 2) / 50)
KERNEL /= KERNEL.sum()
REACH = 4  # rows or columns at most from a pixel within the 7 × 7 kernel of the foreground to the nearest foreground


def weighted_f(pair: Pair) -> float:
    """Weighted F-measure (Margolin et al., CVPR 2014), β = 1; 0 where the truth is empty.

    Float32 for distances and what they weigh, float64 for the foreground: within 1e-9 of all in float64.
    """
    if pair.foreground == 0:
        return 0.0
    # Beyond the foreground and what was predicted every error is 0. The kernel needs 3 pixels more.
    box = grown(cv2.boundingRect(cv2.max(pair.truth, pair.mask(first_above_zero(pair)))), 3, pair.truth.shape)
    prediction, truth = pair.prediction[box], pair.truth[box]
    distance: np.ndarray = cv2.distanceTransform(1 - truth, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)

    error = cv2.copyTo(cv2.LUT(prediction, 1 - pair.levels), truth)
    spread_from_the_nearest(error, truth, distance)
    blurred = cv2.sepFilter2D(error, cv2.CV_64F, KERNEL, KERNEL, borderType=cv2.BORDER_CONSTANT)
    missed = cv2.mean(cv2.min(error, blurred, dst=blurred), truth)[0]

    # An error in the background counts 2 − 0.5^(distance / 5).
    distance *= math.log(0.5) / 5
    weight = cv2.exp(distance, dst=distance)
    weighted = cv2.multiply(weight, cv2.LUT(prediction, pair.levels.astype(np.float32)), dst=weight)
    false = (
        2 * float(pair.histogram[0] @ pair.levels) - (truth.size - pair.foreground) * cv2.mean(weighted, 1 - truth)[0]
    )

    true = pair.foreground * (1 - missed)
    r, p = 1 - missed, true / (true + false + EPS)
    return float(2 * r * p / (r + p + EPS))


def first_above_zero(pair: Pair) -> int:
    """The first grey level that is above 0 when stretched."""
    return int(np.searchsorted(pair.levels, 0.0, side="right"))


def grown(box: Sequence[int], margin: int, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """An OpenCV rectangle with a margin on all sides, as far as the image goes."""
    x, y, width, height = box
    return (slice(max(0, y - margin), min(shape[0], y + height + margin)),
            slice(max(0, x - margin), min(shape[1], x + width + margin)))  # fmt: skip


def spread_from_the_nearest(error: np.ndarray, truth: np.ndarray, distance: np.ndarray) -> None:
    """Write the error of the nearest foreground pixel into each background pixel that the kernel brings to an error.

    `error`, 0 in the background until then, is changed in place. Of several nearest pixels it is the leftmost, and of
    those the uppermost, which is what SciPy's `distance_transform_edt` returns: it sweeps columns first, then rows, and
    keeps the first of equals.
    """
    wrong = (error > 0).view(np.uint8)
    places = np.flatnonzero(cv2.dilate(wrong, np.ones((7, 7), np.uint8)) & (1 - truth))
    foreground = np.pad(truth, REACH).view(bool).ravel()
    errors, width, padded_width = error.ravel(), truth.shape[1], truth.shape[1] + 2 * REACH
    squared = np.rint(distance.ravel()[places] ** 2).astype(np.uint8)
    for square in np.flatnonzero(np.bincount(squared)):
        here = places[squared == square]
        padded = here + here // width * (2 * REACH) + REACH * (padded_width + 1)
        for dx in range(-REACH, REACH + 1):
            for dy in range(-REACH, REACH + 1):
                if dx * dx + dy * dy == square:
                    is_there = foreground[padded + (dy * padded_width + dx)]
                    found = here[is_there]
                    errors[found] = errors[found + (dy * width + dx)]
                    here, padded = here[~is_there], padded[~is_there]

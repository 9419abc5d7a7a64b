"""One 8-bit prediction and its ground truth, with what several formulas need computed once."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

HALF = 128  # a ground truth is foreground above it


class Counts(NamedTuple):
    """Pixels by prediction and truth: numbers, or arrays over thresholds."""

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


class Pair:
    """`prediction` and `truth` are (H, W) uint8; anything else is a ValueError.

    Every formula of the saliency field binarises the truth above 128, and most stretch the prediction to [0, 1] by its
    own minimum and maximum (PySODMetrics' `prepare_data`). With 256 grey levels that stretch is a table, and everything
    that does not depend on where a pixel is follows from histograms.
    """

    def __init__(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        if prediction.shape != truth.shape or prediction.ndim != 2 or not prediction.size:
            raise ValueError(f"a prediction of shape {prediction.shape} cannot be scored against {truth.shape}")
        if prediction.dtype != np.uint8 or truth.dtype != np.uint8:
            raise ValueError(f"masks must be uint8, not {prediction.dtype} and {truth.dtype}")
        self.prediction, self.alpha = np.ascontiguousarray(prediction), np.ascontiguousarray(truth)
        self.truth = above(self.alpha, HALF)
        self.size = truth.size

    @cached_property
    def center(self) -> tuple[int, int]:
        """Row and column at which the S-measure cuts the image into quadrants: after the centroid of the truth."""
        if not self.foreground:
            return 1, 1  # the S-measure of an empty truth asks for no quadrant
        by_row = cv2.reduce(self.truth, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[:, 0].astype(np.int64)
        by_column = cv2.reduce(self.truth, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0].astype(np.int64)
        row, column = (int(counts @ np.arange(counts.size)) / self.foreground for counts in (by_row, by_column))
        return round(row) + 1, round(column) + 1

    @cached_property
    def quadrants(self) -> list[tuple[slice, slice]]:
        """Left top, right top, left bottom and right bottom of `center`; some may be empty."""
        row, column = self.center
        return [(rows, columns) for rows in (slice(row), slice(row, None))
                for columns in (slice(column), slice(column, None))]  # fmt: skip

    @cached_property
    def histograms(self) -> np.ndarray:
        """(4, 2, 256) int64: pixels by quadrant, truth and predicted grey level."""
        result = np.zeros((4, 2, 256), np.int64)
        for (background, foreground), place in zip(result, self.quadrants, strict=True):
            foreground += histogram(self.prediction[place], self.truth[place])
            background += histogram(self.prediction[place]) - foreground
        return result

    @cached_property
    def histogram(self) -> np.ndarray:
        """(2, 256) int64: pixels by truth and predicted grey level."""
        return self.histograms.sum(0)

    @cached_property
    def foreground(self) -> int:
        """Foreground pixels of the truth."""
        return cv2.countNonZero(self.truth)

    @cached_property
    def levels(self) -> np.ndarray:
        """(256,) float64 in [0, 1]: what each grey level of the prediction is stretched to."""
        low, high = self.prediction.min() / 255, self.prediction.max() / 255
        values = np.arange(256) / 255
        return values if low == high else np.clip((values - low) / (high - low), 0, 1)

    @cached_property
    def stretched(self) -> np.ndarray:
        """(H, W) float64: the prediction at its `levels`."""
        return self.levels[self.prediction]

    @cached_property
    def thresholds(self) -> np.ndarray:
        """(256,) uint8: the stretched levels in 8 bits, cut off."""
        return (self.levels * 255).astype(np.uint8)

    @cached_property
    def curve(self) -> Counts:
        """Counts at the 256 thresholds 255, 254, ..., 0 of the stretched 8-bit prediction."""
        return self.counts(*(np.cumsum(requantise(part, self.thresholds)[::-1]) for part in self.histogram))

    @cached_property
    def adaptive(self) -> int:
        """The first grey level that is foreground at the adaptive threshold: twice the mean level, at most 1."""
        present = self.histogram.sum(0)
        threshold = 2 * float(present @ self.levels) / self.size
        if threshold < 1 + 1e-9 and np.any(np.abs(self.levels[present > 0] - threshold) < 1e-9):
            # A level that meets the threshold is decided by how the mean is rounded, so round as PySODMetrics does.
            threshold = 2 * float(self.stretched.mean())
        return int(np.searchsorted(self.levels, min(threshold, 1.0)))

    @cached_property
    def half(self) -> int:
        """The first grey level that is above 0.5 when stretched."""
        return int(np.searchsorted(self.levels, 0.5, side="right"))

    def at(self, level: int) -> Counts:
        """Counts where grey levels from `level` on are foreground."""
        return self.counts(*self.histogram[:, level:].sum(1))

    def counts(self, fp: np.ndarray, tp: np.ndarray) -> Counts:
        """The four counts from two."""
        return Counts(tp, fp, self.foreground - tp, self.size - self.foreground - fp)

    def mask(self, level: int) -> np.ndarray:
        """(H, W) uint8, 1 where the prediction's grey level is `level` or more."""
        return above(self.prediction, level - 1)


def above(image: np.ndarray, limit: int) -> np.ndarray:
    """(H, W) uint8, 1 where `image` is above `limit`."""
    return cv2.threshold(image, limit, 1, cv2.THRESH_BINARY)[1]


def histogram(image: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """(256,) int64 counts of the grey levels of an (H, W) uint8 image, which may be empty."""
    counts = np.zeros(256, np.int64)
    if image.size:
        band = max(1, 2**24 // image.shape[1])  # cv2 returns float32, which counts exactly that far
        for start in range(0, image.shape[0], band):
            rows = slice(start, start + band)
            inside = None if mask is None else mask[rows]
            counts += cv2.calcHist([image[rows]], [0], inside, [256], [0, 256])[:, 0].astype(np.int64)
    return counts


def requantise(counts: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The histogram of an image whose grey level v became `levels[v]`."""
    return np.bincount(levels, counts, 256).astype(np.int64)

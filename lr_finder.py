"""The learning-rate range test: raise the rate from step to step and watch the loss.

It falls fastest at a rate that training can use, and explodes a little above (Smith, 2017, "Cyclical Learning Rates
for Training Neural Networks", section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch

LOW, HIGH = 1e-7, 1.0
STEPS = 100
WINDOW = 15  # steps, about a factor of ten in the rate
EXPLODED = 4.0  # times the least smoothed loss
WIDTH, HEIGHT, MARGIN = 900, 520, 70
INK, LINE, ACCENT, FAINT = (40, 40, 40), (190, 190, 190), (200, 90, 20), (225, 225, 225)  # RGB


class RisingRate:
    """Stands in for `optim.Schedule`: the largest of the groups' rates rises by equal factors from LOW to HIGH.

    The ratio between the groups (a backbone's factor, layer-wise decay) stays.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        self.optimizer, self.steps = optimizer, steps or STEPS
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.ratios = [peak / max(peaks) for peak in peaks] if max(peaks) > 0 else [1.0] * len(peaks)

    def rate(self, step: int) -> float:
        """The largest rate at `step`, from 0."""
        return LOW * (HIGH / LOW) ** (step / (self.steps - 1))

    def set(self, step: int) -> None:
        """Write the rates into the optimizer's groups."""
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = self.rate(step) * ratio


def smooth(losses: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the pull towards zero at its start."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = decay * average + (1 - decay) * loss
        smoothed.append(average / (1 - decay**count))
    return smoothed


def has_exploded(losses: Sequence[float]) -> bool:
    """Whether the sweep may end: the loss is not finite, or far above its least."""
    smoothed = smooth(losses)
    return not math.isfinite(losses[-1]) or (len(losses) > 10 and smoothed[-1] > EXPLODED * min(smoothed))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate around which the loss falls fastest over the logarithm of the rate; None where it never falls.

    The slope is that of a line through WINDOW losses as measured: the smoothed curve lags behind by as many steps as it
    averages, and its own slope is mostly noise.
    """
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    if len(finite) < WINDOW:
        return None
    offsets = np.arange(WINDOW) - WINDOW // 2  # steps are equal on the logarithmic axis
    slopes = np.convolve(finite, offsets[::-1], mode="valid") / (offsets**2).sum()
    steepest = int(slopes.argmin())
    return float(rates[steepest + WINDOW // 2]) if slopes[steepest] < 0 else None


def draw(rates: Sequence[float], losses: Sequence[float], suggestion: float | None) -> np.ndarray:
    """The loss over the rate as a picture, (H, W, 3) uint8 RGB: grey as measured, coloured smoothed."""
    canvas = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    finite = [loss for loss in losses if math.isfinite(loss)]
    smoothed = smooth(finite)
    low, high = min(smoothed), max(smoothed[: max(1, len(smoothed) // 2)])
    low, high = low - 0.1 * (high - low) - 1e-12, high + 0.25 * (high - low) + 1e-12

    def place(rate: float, loss: float) -> tuple[int, int]:
        x = MARGIN + (math.log10(rate) - math.log10(LOW)) / math.log10(HIGH / LOW) * (WIDTH - 1.5 * MARGIN)
        y = HEIGHT - MARGIN - (min(max(loss, low), high) - low) / (high - low) * (HEIGHT - 1.6 * MARGIN)
        return round(x), round(y)

    def write(text: str, x: int, y: int, color: tuple[int, int, int] = INK, size: float = 0.5) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, color, 1, cv2.LINE_AA)

    for exponent in range(round(math.log10(LOW)), round(math.log10(HIGH)) + 1):
        x, bottom = place(10**exponent, low)
        cv2.line(canvas, (x, place(LOW, high)[1]), (x, bottom), FAINT, 1)
        write(f"1e{exponent}", x - 18, bottom + 22)
    for fraction in np.linspace(0, 1, 5):
        loss = low + fraction * (high - low)
        left, y = place(LOW, loss)
        cv2.line(canvas, (left, y), (place(HIGH, loss)[0], y), FAINT, 1)
        write(f"{loss:.3g}", 12, y + 5)
    for values, color, width in ((finite, LINE, 1), (smoothed, ACCENT, 2)):
        points = np.array([place(rate, loss) for rate, loss in zip(rates, values, strict=False)], np.int32)
        cv2.polylines(canvas, [points], False, color, width, cv2.LINE_AA)
    if suggestion is not None:
        x, bottom = place(suggestion, low)
        cv2.line(canvas, (x, place(LOW, high)[1]), (x, bottom), INK, 1, cv2.LINE_AA)
        write(f"suggestion {suggestion:.1e}", x + 8, place(LOW, high)[1] + 16)
    write("loss over the learning rate (logarithmic); the line is smoothed", MARGIN, 34, size=0.6)
    return canvas

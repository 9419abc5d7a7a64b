"""Lines and bars as pictures, for what a validation says of all samples together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

PAPER, INK, GRID, FAINT = (252, 252, 252), (40, 40, 40), (225, 225, 225), (190, 200, 210)
COLORS = ((28, 84, 150), (214, 110, 30), (40, 140, 90), (170, 60, 120), (110, 110, 40), (90, 80, 180), (190, 60, 60),
          (20, 140, 160))  # fmt: skip
FONT = cv2.FONT_HERSHEY_SIMPLEX
SIDE, MARGIN, LEGEND = 400, 46, 250  # pixels of the plot's square, around it, and beside it
BAR, NAMES = 22, 170  # pixels of a bar's row, and of the names beside bars
FINE = 4  # binary digits of a pixel that lines are placed by

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """(n,) places and values in [0, 1], NaN where there is none. Without a name it is none of the legend's."""

    x: np.ndarray
    y: np.ndarray
    color: Color
    name: str = ""
    width: int = 1


def draw_lines(
    lines: Sequence[Line], x_title: str, y_title: str, marks: Sequence[tuple[float, float]] = ()
) -> np.ndarray:
    """(H, W, 3) uint8 RGB: the lines over the unit square, the last in front, rings at `marks`, and a legend."""
    picture = _paper(SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + LEGEND)
    for tick in np.linspace(0, 1, 6):
        x, y = _place(tick, tick)
        text = f"{tick:.1f}"
        cv2.line(picture, (x, MARGIN), (x, MARGIN + SIDE), GRID, 1)
        cv2.line(picture, (MARGIN, y), (MARGIN + SIDE, y), GRID, 1)
        _write(picture, text, (x - 10, MARGIN + SIDE + 16))
        _write(picture, text, (MARGIN - 28, y + 4))
    _write(picture, x_title, (MARGIN + SIDE // 2 - _length(x_title) // 2, MARGIN + SIDE + 36))
    _write(picture, y_title, (MARGIN - 28, MARGIN - 16))
    for line in lines:
        known = ~(np.isnan(line.x) | np.isnan(line.y))
        points = np.stack([MARGIN + line.x[known] * SIDE, MARGIN + (1 - line.y[known]) * SIDE], -1)
        fine = np.rint(points * 2**FINE).astype(np.int32)
        cv2.polylines(picture, [fine], False, line.color, line.width, cv2.LINE_AA, FINE)
    for mark in marks:
        cv2.circle(picture, _place(*mark), 6, INK, 2, cv2.LINE_AA)
    for position, line in enumerate(line for line in lines[::-1] if line.name):
        y = MARGIN + 10 + 20 * position
        cv2.line(picture, (SIDE + MARGIN + 16, y), (SIDE + MARGIN + 40, y), line.color, max(2, line.width), cv2.LINE_AA)
        _write(picture, _short(line.name, LEGEND - 56), (SIDE + MARGIN + 48, y + 4))
    return picture


def draw_bars(names: Sequence[str], values: Mapping[str, Sequence[float]]) -> np.ndarray:
    """(H, W, 3) uint8 RGB: for each name a bar in [0, 1] of each of a few series, which the legend names."""
    height = BAR * len(names)
    picture = _paper(height + 2 * MARGIN, NAMES + SIDE + MARGIN + 20)
    for tick in np.linspace(0, 1, 6):
        x = NAMES + round(tick * SIDE)
        cv2.line(picture, (x, MARGIN), (x, MARGIN + height), GRID, 1)
        _write(picture, f"{tick:.1f}", (x - 10, MARGIN + height + 16))
    thickness = (BAR - 6) // len(values)
    for place, (series, color) in enumerate(zip(values, COLORS, strict=False)):
        x = NAMES + 120 * place
        cv2.rectangle(picture, (x, MARGIN - 28), (x + 12, MARGIN - 16), color, -1)
        _write(picture, series, (x + 18, MARGIN - 17))
        for row, value in enumerate(values[series]):
            top = MARGIN + row * BAR + 3 + place * thickness
            end = (NAMES + round(value * SIDE), top + thickness - 1)
            cv2.rectangle(picture, (NAMES, top), end, color, -1)
    for row, name in enumerate(names):
        y = MARGIN + row * BAR + BAR // 2 + 4
        text = _short(name, NAMES - 20)
        _write(picture, text, (NAMES - 8 - _length(text), y))
        first = next(iter(values.values()))[row]
        _write(picture, f"{first:.3f}", (NAMES + SIDE + 8, y))
    return picture


def _paper(height: int, width: int) -> np.ndarray:
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = PAPER
    return picture


def _place(x: float, y: float) -> tuple[int, int]:
    return MARGIN + round(x * SIDE), MARGIN + round((1 - y) * SIDE)


def _length(text: str) -> int:
    return cv2.getTextSize(text, FONT, 0.4, 1)[0][0]


def _short(text: str, room: int) -> str:
    """What of the text has room; characters that OpenCV cannot draw are question marks."""
    text = text.encode("ascii", "replace").decode()
    fitting = (text[:end] + ".." * (end < len(text)) for end in range(len(text), 0, -1))
    return next((each for each in fitting if _length(each) <= room), "")


def _write(picture: np.ndarray, text: str, place: tuple[int, int]) -> None:
    cv2.putText(picture, text, place, FONT, 0.4, INK, 1, cv2.LINE_AA)

"""A confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

NAMED = 40  # classes up to which they are written beside the matrix
SIDE = 640  # pixels of the matrix, about
PAPER, BLUE, INK, LINE = (np.array(color) for color in ((252, 252, 252), (28, 84, 150), (40, 40, 40), (205, 205, 205)))
FONT = cv2.FONT_HERSHEY_SIMPLEX
TITLE = 20  # pixels above and beside the classes' names


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(C, C) pixels, row: truth, column: prediction -> (H, W, 3) uint8 RGB: the share of each row in blue.

    Up to NAMED classes are named, and where there is room the shares are written in percent.
    """
    classes = len(counts)
    cell = max(4, min(72, SIDE // classes))
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    scale = min(0.5, cell / 40)
    words = [name.encode("ascii", "replace").decode()[:20] for name in names] if classes <= NAMED else []
    margin = 30 + max((cv2.getTextSize(word, FONT, scale, 1)[0][0] for word in words), default=0)
    side = cell * classes
    canvas = np.empty((margin + side + 8, margin + side + 8, 3), np.uint8)
    canvas[:] = PAPER
    squares = PAPER + shares[..., None] * (BLUE - PAPER)
    canvas[margin : margin + side, margin : margin + side] = squares.repeat(cell, 0).repeat(cell, 1)
    for at in range(margin, margin + side + 1, cell):
        cv2.line(canvas, (margin, at), (margin + side, at), LINE.tolist(), 1)
        cv2.line(canvas, (at, margin), (at, margin + side), LINE.tolist(), 1)
    canvas[:TITLE, margin : margin + side] = _text("prediction", TITLE, side, 0.45, "middle")
    canvas[margin : margin + side, :TITLE] = np.rot90(_text("truth", TITLE, side, 0.45, "middle"))
    for position, word in enumerate(words):
        at, room = margin + position * cell, margin - TITLE
        canvas[at : at + cell, TITLE:margin] = _text(word, cell, room, scale, "right")
        canvas[TITLE:margin, at : at + cell] = np.rot90(_text(word, cell, room, scale, "left"))
    if cell >= 30:
        for row, column in np.ndindex(classes, classes):
            place = (margin + column * cell + cell // 2 - 10, margin + row * cell + cell // 2 + 5)
            color = PAPER if shares[row, column] > 0.5 else INK
            cv2.putText(canvas, f"{100 * shares[row, column]:.0f}", place, FONT, 0.42, color.tolist(), 1, cv2.LINE_AA)
    return canvas


def _text(word: str, height: int, width: int, scale: float, where: str) -> np.ndarray:
    """(height, width, 3): one line of text."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = PAPER
    length = cv2.getTextSize(word, FONT, scale, 1)[0][0]
    x = {"left": 6, "middle": (width - length) // 2, "right": width - 6 - length}[where]
    return cv2.putText(picture, word, (x, height // 2 + round(9 * scale)), FONT, scale, INK.tolist(), 1, cv2.LINE_AA)

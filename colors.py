"""Colours of classes."""

from __future__ import annotations

import numpy as np


def palette(count: int = 256) -> np.ndarray:
    """(count, 3) uint8 RGB of the labels from 0: the colours of PASCAL VOC (VOCdevkit, VOClabelcolormap.m).

    The bits of a label, from the lowest on, are dealt to red, green and blue in turn, highest bit of the colour first.
    0 is black and 255, which stands for ignored pixels, a pale beige.
    """
    labels = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colors

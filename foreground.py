"""The colours of an object without those of the ground behind it, for cut-outs with soft edges.

A pixel that is half object, half ground has a colour between both; pasted elsewhere by its alpha alone, it brings a rim
of the old ground along. Blur fusion (Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021), in the two
passes that the BiRefNet family takes, estimates what the object's own colour is there.
"""

from __future__ import annotations

import cv2
import numpy as np

WINDOWS = (90, 6)  # side of the averaged square in each pass: first from afar, where colours are pure, then from nearby
BAND = 512  # rows at a time: the floats of a large picture would take twenty times its own memory


def cut_out(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB and (H, W) uint8 alpha -> (H, W, 4) uint8 RGBA with the object's own colours."""
    return np.dstack([estimate_foreground(image, alpha), alpha])


def estimate_foreground(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The foreground's colours, (H, W, 3) uint8, of a picture (H, W, 3) uint8 and its alpha (H, W) uint8.

    Where alpha is 255 they are the picture's own. Where it is 0 the nearest pixels continue the object's colours, for
    programs that interpolate colours and alpha apart, and all others are black: nothing of the ground is left.
    """
    foreground = np.zeros_like(image)
    margin = sum(WINDOWS) // 2
    for start in range(0, len(image), BAND):
        first, stop = max(0, start - margin), start + BAND
        seen = slice(first, stop + margin)
        if alpha[seen].any():
            estimated = fuse_blurred(image[seen].astype(np.float32), alpha[seen].astype(np.float32) / 255)
            foreground[start:stop] = np.rint(estimated[start - first : stop - first])
    return foreground


def fuse_blurred(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The estimate of the paper, once for each window: float32 (H, W, 3) in 0..255 and (H, W) in 0..1.

    Foreground and ground are first taken to be averages around the pixel, weighted by how much of each is there; what
    then fails to add up to the picture is given to the foreground, by its share.
    """
    opacity = alpha[..., None]
    foreground = ground = image
    for window in WINDOWS:
        near = cv2.blur(alpha, (window, window))[..., None]
        ground = cv2.blur(ground * (1 - opacity), (window, window)) / (1 - near + 1e-5)
        foreground = cv2.blur(foreground * opacity, (window, window)) / (near + 1e-5)
        missing = image - opacity * foreground - (1 - opacity) * ground
        foreground = np.clip(foreground + opacity * missing, 0, 255)
    return foreground

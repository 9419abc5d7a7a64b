"""Foreground colours, where the true ones are known because the picture was composed from them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

import foreground
from foreground import cut_out, estimate_foreground
from tests.tiny import photo


def disc(height: int, width: int, softness: float) -> np.ndarray:
    """(H, W) uint8 alpha of a disc whose edge is that many pixels wide."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2) - min(height, width) / 3
    return (np.clip(0.5 - distance / softness, 0, 1) * 255).astype(np.uint8)


def composed(colours: np.ndarray, ground: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None] / 255
    return np.rint(colours * weight + ground * (1 - weight)).astype(np.uint8)


@pytest.mark.parametrize("softness", [4, 20])
def test_the_ground_bleeds_much_less_into_soft_edges(softness: float) -> None:
    alpha = disc(200, 260, softness)
    colours, ground = photo(0, 200, 260) // 2, 128 + photo(1, 200, 260) // 2
    picture = composed(colours, ground, alpha)
    soft = (alpha > 5) & (alpha < 250)
    weight = alpha[soft, None] / 255

    def bleeding(estimate: np.ndarray) -> float:
        """How wrong a composite on black or white would be, in levels."""
        return float((np.abs(estimate[soft].astype(float) - colours[soft]) * weight).mean())

    assert bleeding(picture) > 15
    assert bleeding(estimate_foreground(picture, alpha)) < bleeding(picture) / 3


def test_what_is_opaque_is_untouched_and_nothing_of_the_ground_is_left() -> None:
    alpha, picture = disc(200, 260, 6), photo(2, 200, 260)
    cut = cut_out(picture, alpha)
    assert (cut[..., 3] == alpha).all()
    assert (cut[alpha == 255, :3] == picture[alpha == 255]).all()
    far = cv2.dilate(alpha, np.ones((9, 9), np.uint8)) == 0
    assert far.any()
    assert (cut[far] == 0).all()


def test_colours_go_on_just_outside_the_object() -> None:
    """Programs that interpolate colours and alpha apart would otherwise draw a dark rim."""
    alpha = np.zeros((60, 60), np.uint8)
    alpha[:, :30] = 255
    picture = np.where(alpha[..., None] > 0, [200, 90, 40], [0, 0, 255]).astype(np.uint8)
    outside = estimate_foreground(picture, alpha)[:, 30].astype(int)
    assert np.abs(outside - [200, 90, 40]).max() <= 2


def test_bands_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha, picture = disc(300, 120, 30), photo(3, 300, 120)
    whole = estimate_foreground(picture, alpha)
    for band in (1, 64, 299):
        monkeypatch.setattr(foreground, "BAND", band)
        assert (estimate_foreground(picture, alpha) == whole).all(), band


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 3)])
def test_small_pictures_and_empty_masks(size: tuple[int, int]) -> None:
    picture = photo(4, *size)
    assert (estimate_foreground(picture, np.zeros(size, np.uint8)) == 0).all()
    assert (estimate_foreground(picture, np.full(size, 255, np.uint8)) == picture).all()

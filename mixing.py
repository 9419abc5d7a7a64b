"""Mixing the samples of a batch: CutMix and ClassMix for label maps.

A batch is mixed where it is collated, in the worker, when its pictures are still bytes at the model's size. What
happens to a sample is drawn from its own key, its partner is the next sample of the batch: so it is a pure function of
the seed and of which samples make up the batch, whichever worker or rank puts it together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from errors import UserError, nearest
from samples import IGNORED

MIXES = ("cutmix", "classmix")


class Mix:
    """Mixes each sample of a batch with the next, by one of these ways with its probability, or leaves it.

    Called with items that have `image` (H, W, 3) and `target.labels` (H, W), both uint8 of one size, and `key`; returns
    new items and changes none. A batch of one stays as it is.

    Raises:
        UserError: an unknown way, or probabilities below 0 or of more than 1 together.
    """

    def __init__(self, probabilities: Mapping[str, float], *, seed: int):
        for name in probabilities:
            if name not in MIXES:
                raise UserError(f"data.mix: there is no {name!r}{nearest(name, MIXES)}; it knows {', '.join(MIXES)}")
        if min(probabilities.values(), default=0) < 0 or sum(probabilities.values()) > 1 + 1e-9:
            raise UserError("data.mix: probabilities must be at least 0 and at most 1 together")
        self.probabilities, self.seed = dict(probabilities), seed

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        partners = [*items[1:], *items[:1]]
        return [self._mixed(item, partner) for item, partner in zip(items, partners, strict=True)]

    def _mixed(self, item: Any, partner: Any) -> Any:
        key = item.key
        seeds = np.random.SeedSequence([self.seed, key.epoch, key.index, key.occurrence], spawn_key=(1,))
        rng = np.random.Generator(np.random.PCG64(seeds))
        way = self._way(rng.random())
        if way is None or partner is item:
            return item
        labels, others = item.target.labels, partner.target.labels
        taken = cut_box(rng, labels.shape) if way == "cutmix" else half_of_classes(rng, others)
        return replace(
            item,
            image=cv2.copyTo(partner.image, taken, item.image.copy()),
            target=replace(item.target, labels=cv2.copyTo(others, taken, labels.copy())),
        )

    def _way(self, drawn: float) -> str | None:
        for name, probability in self.probabilities.items():
            if drawn < probability:
                return name
            drawn -= probability
        return None


def cut_box(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8, 1 in a box of the picture's shape, of an area drawn evenly from none to all of it, anywhere.

    CutMix (Yun et al., 2019) with alpha 1: the centre lies within the picture, what hangs over is cut off.
    """
    height, width = shape
    side = np.sqrt(rng.random())
    center = rng.random(2) * shape
    (top, left), (bottom, right) = (np.rint(center + sign * side / 2 * np.array(shape)).astype(int) for sign in (-1, 1))
    box = np.zeros((height, width), np.uint8)
    box[max(0, top) : bottom, max(0, left) : right] = 1
    return box


def half_of_classes(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """(H, W) uint8, 1 at the pixels of half of the classes there, rounded up (ClassMix, Olsson et al., 2021)."""
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORED])
    chosen = np.zeros(256, np.uint8)
    chosen[rng.choice(present, size=(len(present) + 1) // 2, replace=False)] = 1
    return chosen[labels]

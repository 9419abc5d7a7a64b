"""Mixing the samples of a batch: CutMix, ClassMix and MixUp for label maps.

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

MIXES = ("cutmix", "classmix", "mixup")
ALPHA = 0.4  # of the beta distribution that MixUp's share comes from


class Mix:
    """Mixes each sample of a batch with the next, by one of these ways with its probability, or leaves it.

    MixUp (Zhang et al., 2018) blends a whole batch with itself, by one share that the batch's first key decides, and
    keeps both label maps: the criterion takes its terms of each and adds them up by the shares.

    Called with items that have `image` (H, W, 3) and `target.labels` (H, W), both uint8 of one size, and `key`; returns
    new items and changes none. A batch of one stays as it is.

    Raises:
        UserError: an unknown way, or probabilities below 0 or of more than 1 together.
    """

    def __init__(self, probabilities: Mapping[str, float], *, seed: int):
        self.probabilities, self.seed = checked(probabilities, MIXES), seed

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        partners = [*items[1:], *items[:1]]
        rng = stream(self.seed, items[0].key, 2)
        if len(items) > 1 and way_of(self.probabilities, rng) == "mixup":
            share = float(rng.beta(ALPHA, ALPHA))
            return [blend(item, partner, share) for item, partner in zip(items, partners, strict=True)]
        return [self._mixed(item, partner) for item, partner in zip(items, partners, strict=True)]

    def _mixed(self, item: Any, partner: Any) -> Any:
        rng = stream(self.seed, item.key, 1)
        way = way_of(self.probabilities, rng)
        if way in (None, "mixup") or partner is item:
            return item
        labels, others = item.target.labels, partner.target.labels
        taken = cut_box(rng, item.image.shape[:2]) if way == "cutmix" else half_of_classes(rng, others)
        if np.ndim(labels):
            target = replace(item.target, labels=cv2.copyTo(others, taken, labels.copy()))
        else:  # of the whole picture
            target = replace(item.target, blended=others, share=1 - float(taken.mean()))
        return replace(item, image=cv2.copyTo(partner.image, taken, item.image.copy()), target=target)


def checked(probabilities: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
    """The probabilities of some of the known ways; raises `UserError` where they make no sense."""
    for name in probabilities:
        if name not in known:
            raise UserError(f"data.mix: there is no {name!r}{nearest(name, known)}; it knows {', '.join(known)}")
    if min(probabilities.values(), default=0) < 0 or sum(probabilities.values()) > 1 + 1e-9:
        raise UserError("data.mix: probabilities must be at least 0 and at most 1 together")
    return dict(probabilities)


def stream(seed: int, key: Any, purpose: int) -> np.random.Generator:
    """What is drawn for a sample, apart from what augmentation draws and from other purposes."""
    seeds = np.random.SeedSequence([seed, key.epoch, key.index, key.occurrence], spawn_key=(purpose,))
    return np.random.Generator(np.random.PCG64(seeds))


def way_of(probabilities: Mapping[str, float], rng: np.random.Generator) -> str | None:
    """One of the ways with its probability, or none of them."""
    drawn = rng.random()
    for name, probability in probabilities.items():
        if drawn < probability:
            return name
        drawn -= probability
    return None


def blend(item: Any, partner: Any, share: float) -> Any:
    """`share` of an item's picture and the rest of its partner's, with both label maps."""
    image = cv2.addWeighted(item.image, share, partner.image, 1 - share, 0)
    target = replace(item.target, blended=partner.target.labels, share=share)
    return replace(item, image=image, target=target)


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

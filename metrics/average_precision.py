"""Average precision and recall as COCO counts them (https://cocodataset.org/#detection-eval), to the last bit.

The detections of a picture are matched as it comes. What matters of them later fits into a few bits: for each range of
areas and at each IoU, whether one found an object, was wrong, or is left out. `Ranking` is then all that is known of
many pictures. A stands for the ranges of areas, T for the IoU thresholds, R for resamples of the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from instances import areas_of, ranks_within
from metrics.base import Row
from samples import Rle

THRESHOLDS = np.linspace(0.5, 0.95, 10)
IOU_50, IOU_75 = 0, 5  # among them
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
BITS = (len(AREAS), len(THRESHOLDS))

# ---------------------------------------------------------------- one picture


@dataclass
class Regions:
    """Objects or detections of one picture."""

    labels: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 left, top, width, height: pycocotools' way, as sums would round
    codes: list[Rle] | None  # None where there are no masks
    areas: np.ndarray | None = None  # (n,) float64 pixels of objects, as annotated; of detections they are measured

    @classmethod
    def of(
        cls, labels: np.ndarray, corners: np.ndarray, codes: list[Rle] | None, areas: np.ndarray | None = None
    ) -> Regions:
        """From (n, 4) left, top, right, bottom."""
        boxes = corners.astype(np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        return cls(labels, boxes, codes, areas)

    def chosen(self, which: np.ndarray) -> Regions:
        """Those at (m,) indices."""
        codes = None if self.codes is None else [self.codes[place] for place in which]
        return Regions(self.labels[which], self.boxes[which], codes, None if self.areas is None else self.areas[which])

    def shapes(self, kind: str) -> Any:
        """What pycocotools compares: codes, or boxes."""
        return self.boxes if kind == "box" else self.codes

    def areas_of(self, kind: str) -> np.ndarray:
        """(n,) float64 pixels."""
        if self.areas is not None:
            return self.areas
        if kind == "box":
            return self.boxes[:, 2] * self.boxes[:, 3]
        assert self.codes is not None
        return areas_of(self.codes)


def match_picture(
    kind: str, found: Regions, there: Regions, ignored: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(found, wrong), each (A, T, n) bool, of detections that are sorted by class and falling score.

    Args:
        kind: `mask` or `box`: what is compared.
        ignored: (A, g) bool, objects that do not count; all crowds are among them.
        crowd: (g,) bool.
    """
    outside = ~in_range(found.areas_of(kind))
    right = np.zeros((*BITS, len(found.labels)), bool)
    wrong = np.repeat(~outside[:, None], len(THRESHOLDS), 1)
    for label in np.intersect1d(found.labels, there.labels):
        ours, theirs = np.flatnonzero(found.labels == label), np.flatnonzero(there.labels == label)
        shapes = found.chosen(ours).shapes(kind), there.chosen(theirs).shapes(kind)
        ious = np.asarray(coco_mask.iou(*shapes, crowd[theirs].tolist()))
        right[..., ours], wrong[..., ours] = match(ious, ignored[:, theirs], crowd[theirs], outside[:, ours])
    return right, wrong


def match(
    ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(found, wrong), each (A, T, D) bool, of the detections of one class by falling score.

    Each takes the free object with the greatest IoU (of equal ones the last) from the threshold on, one that is ignored
    only where there is no other, and is left out then. A crowd is never used up.

    Args:
        ious: (D, G).
        ignored: (A, G) bool.
        crowd: (G,) bool.
        outside: (A, D) bool, detections that are left out where they take nothing: their area is out of the range.
    """
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    taken = np.zeros((*BITS, len(ious)), bool)
    left_out = np.repeat(outside[:, None], len(THRESHOLDS), 1)
    free = np.ones((*BITS, len(crowd)), bool)
    for index in np.flatnonzero(ious.max(1) >= limits[0]):
        near = np.flatnonzero(ious[index] >= limits[0])
        fits = free[..., near] & (ious[index, near] >= limits)
        counted = fits & ~ignored[:, None, near]
        fits = np.where(counted.any(-1, keepdims=True), counted, fits)
        best = len(near) - 1 - np.where(fits, ious[index, near], -1)[..., ::-1].argmax(-1)
        area, threshold = np.nonzero(fits.any(-1))
        chosen = near[best[area, threshold]]
        taken[area, threshold, index] = True
        left_out[area, threshold, index] = ignored[area, chosen]
        free[area, threshold, chosen] = crowd[chosen]
    return taken & ~left_out, ~taken & ~left_out


def in_range(areas: np.ndarray) -> np.ndarray:
    """(n,) areas in pixels -> (A, n) bool."""
    return np.stack([(areas >= low) & (areas <= high) for low, high in AREAS.values()])


def pack(found: np.ndarray, wrong: np.ndarray) -> dict[str, np.ndarray]:
    """What a row keeps of (A, T, n) bool: most detections are near no object, and so wrong alike at every IoU.

    `plain` (n,) uint8 are their bits, of each range one; of the others, `special` (s,) int32, all are kept, as `found`
    and `wrong` (5, s) uint8.
    """
    special = np.flatnonzero((found | (wrong != wrong[:, :1])).any((0, 1)))
    plain = wrong[:, 0].copy()
    plain[:, special] = False
    flat = (each[..., special].reshape(math.prod(BITS), len(special)) for each in (found, wrong))
    bits = (np.packbits(each, axis=0) for each in flat)
    return dict(zip(("plain", "special", "found", "wrong"),
                    (np.packbits(plain, axis=0)[0], special.astype(np.int32), *bits), strict=True))  # fmt: skip


@dataclass
class Outcomes:
    """What `pack` keeps, of the detections of many pictures."""

    plain: np.ndarray  # (n,) uint8
    column: np.ndarray  # (n,) int64 where special ones have their bits, -1 for the others
    found: np.ndarray  # (5, s) uint8
    wrong: np.ndarray  # (5, s) uint8

    def chosen(self, which: np.ndarray) -> Outcomes:
        return Outcomes(self.plain[which], self.column[which], self.found, self.wrong)

    def special(self) -> np.ndarray:
        """(s,) the places of special ones."""
        return np.flatnonzero(self.column >= 0)

    def bits(self, special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(found, wrong), each (A, T, s) bool, of the special ones at these places."""
        columns = self.column[special]
        flat = (np.unpackbits(packed[:, columns], axis=0).view(bool) for packed in (self.found, self.wrong))
        found, wrong = (each.reshape(*BITS, len(columns)) for each in flat)
        return found, wrong

    def plainly_wrong(self) -> np.ndarray:
        """(A, n) bool."""
        return np.unpackbits(self.plain[None], axis=0, count=len(AREAS)).view(bool)

    def at_iou_50(self) -> tuple[np.ndarray, np.ndarray]:
        """(found, wrong), each (n,) bool, at IoU .5 and for all areas."""
        special = self.special()
        right, wrong = np.zeros(len(self.plain), bool), self.plainly_wrong()[0]
        bits = self.bits(special)
        right[special], wrong[special] = bits[0][0, IOU_50], bits[1][0, IOU_50]
        return right, wrong


# ---------------------------------------------------------------- many pictures


@dataclass
class Ranking:
    """Detections of many pictures by falling score, and how many objects there were to be found."""

    owner: np.ndarray  # (n,) int64, the picture of each
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n,) float64
    ranks: np.ndarray  # (n,) int64, how many of its picture and class are better
    outcomes: dict[str, Outcomes]  # by kind
    holder: np.ndarray  # (g,) int64, a picture that has objects of a class
    classes: np.ndarray  # (g,) the class
    objects: np.ndarray  # (g, A) int64, how many of each range

    @classmethod
    def of(cls, rows: Sequence[Row], kinds: Sequence[str]) -> Ranking:
        """From the curves that `InstanceMetric` keeps; of equal scores the earlier row stands first."""

        def joined(name: str, axis: int = 0) -> np.ndarray:
            return np.concatenate([row.curves[name] for row in rows], axis)

        scores = joined("scores")
        order = np.argsort(-scores, kind="stable")
        counts = [len(row.curves["labels"]) for row in rows]
        outcomes = {}
        for kind in kinds:
            starts = np.cumsum([0, *counts[:-1]])
            special = [row.curves[f"{kind}_special"] + start for row, start in zip(rows, starts, strict=True)]
            column = np.full(len(scores), -1)
            column[np.concatenate(special)] = np.arange(sum(map(len, special)))
            bits = (joined(f"{kind}_{name}", 1) for name in ("found", "wrong"))
            outcomes[kind] = Outcomes(joined(f"{kind}_plain"), column, *bits).chosen(order)
        return cls(
            owner=np.repeat(np.arange(len(rows)), counts)[order],
            labels=joined("labels")[order],
            scores=scores[order],
            ranks=np.concatenate([ranks_within(row.curves["labels"]) for row in rows])[order],
            outcomes=outcomes,
            holder=np.repeat(np.arange(len(rows)), [len(row.curves["classes"]) for row in rows]),
            classes=joined("classes"),
            objects=joined("objects").astype(np.int64),
        )

    def by_class(self) -> Iterator[tuple[int, Ranking]]:
        """(label, its ranking) of each class that has detections or objects."""
        order, borders = _grouped(self.labels)
        holders, edges = _grouped(self.classes)
        for label in np.union1d(self.labels, self.classes):
            yield int(label), self._chosen(order[borders(label)], holders[edges(label)])

    def _chosen(self, which: np.ndarray, holders: np.ndarray) -> Ranking:
        return Ranking(
            self.owner[which],
            self.labels[which],
            self.scores[which],
            self.ranks[which],
            {kind: each.chosen(which) for kind, each in self.outcomes.items()},
            self.holder[holders],
            self.classes[holders],
            self.objects[holders],
        )

    def there(self, weights: np.ndarray) -> np.ndarray:
        """(R, A) objects, where pictures are taken (R, pictures) times."""
        return weights[:, self.holder] @ self.objects

    def precision_and_recall(
        self, kind: str, weights: np.ndarray, limits: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(R, A, T, 101) precision at each of `RECALLS`, and (R, A, T, M) the recall with the best 1, 10, … detections.

        Of a picture and class `limits` (M,) detections are taken, the most of them for the precision; NaN where no
        object is there. Pictures are taken `weights` (R, pictures) times.
        """
        outcomes = self.outcomes[kind]
        special = outcomes.special()  # precision falls everywhere else, so that only these can be on the curve
        found, wrong = outcomes.bits(special)
        times = weights[:, None, self.owner]
        right, missed = (bits * times[:, None, :, special] for bits in (found, wrong))
        missed = missed.cumsum(-1) + (outcomes.plainly_wrong() * times).cumsum(-1)[:, :, None, special]
        there = self.there(weights)
        is_absent = there == 0
        there = np.maximum(there, 1)[..., None]
        precision = interpolated(right.cumsum(-1), missed, there)
        recall = np.stack([(right * (self.ranks[special] < limit)).sum(-1) for limit in limits], -1) / there[..., None]
        precision[is_absent] = recall[is_absent] = np.nan
        return precision, recall

    def f1_curves(self, kind: str, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(R, n) F1, precision and recall at IoU .5 if all detections from a score on are believed, falling scores.

        They begin with none believed, whose score is NaN; 0 / 0 is NaN. `f1_threshold` (n,) are the scores.
        """
        ends = np.flatnonzero(np.diff(self.scores, append=-np.inf))  # equal scores are believed together
        found, wrong = (bits * weights[:, self.owner] for bits in self.outcomes[kind].at_iou_50())
        right, missed = (np.insert(each.cumsum(-1)[:, ends], 0, 0, axis=-1) for each in (found, wrong))
        there = self.there(weights)[:, :1]
        with np.errstate(invalid="ignore"):
            return {
                "f1": 2 * right / (right + missed + there),
                "f1_threshold": np.append(np.nan, self.scores[ends]),
                "precision": right / (right + missed),
                "recall": right / there,
            }

    def best_f1(self, kind: str, weights: np.ndarray) -> dict[str, np.ndarray]:
        """(R,) the best F1 of `f1_curves`, the highest score that has it, and what that score reaches.

        NaN where no object is there; where nothing is found F1 is 0 and has no such score.
        """
        curves = self.f1_curves(kind, weights)
        best = curves["f1"].argmax(-1)  # of equal ones the first; NaN counts as the greatest
        return {name: np.broadcast_to(curve, curves["f1"].shape)[np.arange(len(best)), best]
                for name, curve in curves.items()}  # fmt: skip

    def at(self, threshold: float, kind: str) -> tuple[float, float]:
        """(precision, recall) at IoU .5 of the detections whose score is `threshold` or more; NaN for 0 / 0."""
        right, wrong = (bits[self.scores >= threshold].sum() for bits in self.outcomes[kind].at_iou_50())
        with np.errstate(invalid="ignore"):
            return float(right / (right + wrong)), float(right / self.objects[:, 0].sum())


def _grouped(labels: np.ndarray) -> Any:
    """(an order by label that keeps equal ones as they were, label -> slice of it)."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    return order, lambda label: slice(*np.searchsorted(ordered, [label, label + 1]))


def interpolated(found: np.ndarray, wrong: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(..., 101) the best precision at each of `RECALLS` or beyond, 0 where that recall is never reached.

    Args:
        found: (..., n) how many up to each detection, by falling score, have found an object.
        wrong: The same of those that have not.
        there: (...) how many objects there are, more than 0.
    """
    precision = found / (wrong + found + np.spacing(1))
    envelope = np.maximum.accumulate(precision[..., ::-1], -1)[..., ::-1]
    # How many of the recalls each place reaches; the first to reach one has as many before it as reach fewer.
    reached = np.searchsorted(RECALLS, found / there[..., None], side="right")
    reached = reached.reshape(math.prod(found.shape[:-1]), found.shape[-1])
    steps = len(RECALLS) + 1
    cells = (reached + steps * np.arange(len(reached))[:, None]).ravel()
    counts = np.bincount(cells, minlength=steps * len(reached)).reshape(*found.shape[:-1], steps)
    padded = np.concatenate([envelope, np.zeros((*found.shape[:-1], 1))], -1)
    return np.take_along_axis(padded, counts.cumsum(-1)[..., :-1], -1)

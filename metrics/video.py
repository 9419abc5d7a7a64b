"""How well objects are followed through clips: region J and contour F (Perazzi et al., CVPR 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.base import Row, StreamingMetric
from samples import Masklets, Size

CONVENTIONS = ("sav", "davis")
OWN = {"j_and_f": "J&F", "j": "J", "f": "F"}
MORE = {"j_recall": "J recall", "j_decay": "J decay", "f_recall": "F recall", "f_decay": "F decay"}
HEADINGS = OWN | MORE
TOLERANCE = 0.008  # of the diagonal: how far a contour may be off
SQUARE = np.ones((2, 2), np.uint8)

# ---------------------------------------------------------------- one object in one frame


def region_and_contour(found: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    """(J, F) of two masks of one object in one frame, (H, W) bool; both 1 where neither has a pixel."""
    found, there = found.view(np.uint8), there.view(np.uint8)
    radius = math.ceil(TOLERANCE * math.hypot(*found.shape))
    left, top, width, height = cv2.boundingRect(found | there)
    if not width:
        return 1.0, 1.0
    box = slice(max(0, top - 1), top + height + 1), slice(max(0, left - 1), left + width + 1)
    found, there = found[box], there[box]
    region = cv2.countNonZero(found & there) / cv2.countNonZero(found | there)
    stride = found.shape[1] + radius
    return region, contour_accuracy(pack(contour(found), stride), pack(contour(there), stride), stride, radius)


def contour(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8, 1 where a pixel differs from its neighbour to the right, below or between these."""
    return cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, SQUARE, anchor=(0, 0))


def pack(mask: np.ndarray, stride: int) -> int:
    """A mask as one number of which pixel (y, x) is bit y·stride + x.

    Python shifts and combines such numbers a word at a time, so that `grown` takes a fraction of a dilation's time.
    """
    padded = np.zeros((len(mask), stride), np.uint8)
    padded[:, : mask.shape[1]] = mask
    return int.from_bytes(np.packbits(padded, bitorder="little").tobytes(), "little")


def grown(mask: int, stride: int, radius: int) -> int:
    """A packed mask dilated by a disk. Its rows must end with `radius` columns of nothing, into which they grow."""
    result, wide, reach = 0, mask, 0
    for distance in range(radius, -1, -1):  # of a row of the disk from its centre
        half = math.isqrt(radius**2 - distance**2)
        while reach < half:
            step = min(half - reach, 2 * reach + 1)  # what leaves no gap
            wide |= wide << step | wide >> step
            reach += step
        result |= wide << distance * stride | wide >> distance * stride
    return result


def contour_accuracy(found: int, there: int, stride: int, radius: int) -> float:
    """F of two packed contours, whose pixels match within `radius`; 1 where both are empty, 0 where one is."""
    if not (found and there):
        return float(found == there)
    precision = (found & grown(there, stride, radius)).bit_count() / found.bit_count()
    recall = (there & grown(found, stride, radius)).bit_count() / there.bit_count()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# ---------------------------------------------------------------- one clip


def label_map(logits: Tensor, size: Size) -> np.ndarray:
    """(n, h, w) mask logits of a frame -> labels at a size: 1 + the place of the object there, 0 where there is none.

    Each is resized bilinearly, > 0 is an object, and the larger logit has the pixel. uint8 where that suffices, else
    uint16.
    """
    labels = np.zeros(size, np.uint8 if len(logits) < 256 else np.uint16)
    highest = torch.zeros(size, device=logits.device)
    for number, plane in enumerate(logits.float(), 1):
        if plane.max() > 0:
            plane = F.interpolate(plane[None, None], size, mode="bilinear")[0, 0]
            labels[(plane > highest).cpu().numpy()] = number
            torch.maximum(highest, plane, out=highest)
    return labels


def scored_frames(annotated: Sequence[bool], skip_ends: bool = True) -> list[int]:
    """The annotated frames, without the first and the last of them as far as one remains."""
    frames = [frame for frame, is_known in enumerate(annotated) if is_known]
    return (frames[1:-1] or frames[1:] or frames) if skip_ends else frames


def score_clip(
    labels_of: Callable[[int], np.ndarray], truth: Masklets, *, convention: str = "sav", skip_ends: bool = True
) -> dict[str, np.ndarray]:
    """Scores of each object of a clip by name, (n,) float64, NaN for objects that are not scored.

    labels_of: frame -> (H, W) labels as of `label_map`, or (n, H, W) bool masks that may overlap, of the truth's size.
    convention: `sav` scores an object from the first frame in which it is there or found, as SA-V's evaluation does,
        and not where it is never there; `davis` scores the objects of the first annotated frame in all frames.
    """
    frames = scored_frames(truth.annotated, skip_ends)
    numbers = range(len(truth.object_ids))
    known = set(truth.visible(list(truth.annotated).index(True))) if convention == "davis" and frames else set()
    begun = set(known)
    pairs: list[list[tuple[float, float]]] = [[] for _ in numbers]
    for frame in frames:
        labels, visible = labels_of(frame), truth.visible(frame)
        masks = dict(zip(visible, truth.masks(frame, visible), strict=True))
        if convention == "sav":
            known.update(visible)
            begun.update(visible, (number for number in numbers if mask_of(labels, number).any()))
        for number in begun:
            found = mask_of(labels, number)
            pairs[number].append(region_and_contour(found, masks.get(number, np.zeros_like(found))))
    scores = [summary(np.array(pairs[number])) if number in known else dict.fromkeys(HEADINGS, math.nan)
              for number in numbers]  # fmt: skip
    return {name: np.array([each[name] for each in scores]) for name in HEADINGS}


def mask_of(labels: np.ndarray, number: int) -> np.ndarray:
    """(H, W) bool of one object, from the labels or masks of all."""
    return labels[number] if labels.ndim == 3 else labels == number + 1


def summary(pairs: np.ndarray) -> dict[str, float]:
    """Scores of an object from its J and F in (frames, 2): means, recalls and decays as DAVIS has them.

    Recall is the share of frames above 0.5, decay how much better the first quarter of the frames is than the last; the
    quarters share the frames at their ends.
    """
    count = len(pairs)
    first, last = pairs[: (count + 1) // 4 + 1], pairs[(3 * count - 1) // 4 :]
    mean, recall, decay = pairs.mean(0), (pairs > 0.5).mean(0), first.mean(0) - last.mean(0)
    return dict(zip(HEADINGS, (mean.mean(), *mean, recall[0], decay[0], recall[1], decay[1]), strict=True))


# ---------------------------------------------------------------- all clips


class VideoMetric(StreamingMetric):
    """J, F and their mean J&F of the objects in clips, equal to those of SA-V's evaluation and of DAVIS 2017.

    Every object weighs the same, whatever clip it is in. A row is a clip, whose scores are the means over its objects,
    NaN where none of them is scored; its curves keep those of each object.

    `names` are scores beside these: recall and decay, as DAVIS has them. `convention` and `skip_ends` are those of
    `score_clip`; the ends are left out because the first frame is given, and the last by custom.
    """

    primary = "j_and_f"
    higher_is_better: dict[str, bool] = dict.fromkeys(OWN, True)
    maybe_undefined = frozenset(OWN)
    headings: Mapping[str, str] = MappingProxyType(HEADINGS)

    def __init__(self, names: Sequence[str] = (), *, convention: str = "sav", skip_ends: bool = True) -> None:
        """Raises UserError for an unknown name, ValueError for an unknown convention."""
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; conventions: {', '.join(CONVENTIONS)}")
        measured = dict.fromkeys([*OWN, *self.resolve(names)])
        self.higher_is_better = {name: not name.endswith("decay") for name in measured}
        self.maybe_undefined = frozenset(measured)
        self.score_clip = partial(score_clip, convention=convention, skip_ends=skip_ends)

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """Of the masks that a training step predicts, see `models.sam2.training.segment_clips`: 0-dim, on the device.

        `mask_iou` is that of the candidates that are believed best, at their own size, where there is an object; 0
        where there is none. `object_accuracy` is how often it is known whether there is one.
        """
        truth = batch.targets.masks
        there = truth.flatten(2).any(2)
        covered, present, right = (torch.zeros((), device=truth.device) for _ in range(3))
        names = ("frames", "candidates", "ious", "scores")
        for frame, candidates, ious, scores in zip(*(outputs[name] for name in names), strict=True):
            best = ious.argmax(1)[:, None, None, None].expand(-1, 1, *candidates.shape[-2:])
            found = candidates.gather(1, best)[:, 0] > 0
            small = F.interpolate(truth[:, frame : frame + 1].float(), found.shape[-2:], mode="nearest-exact")[:, 0] > 0
            ious_found = (found & small).sum((1, 2)) / (found | small).sum((1, 2)).clamp(min=1)
            covered += (ious_found * there[:, frame]).sum()
            present += there[:, frame].sum()
            right += ((scores[:, 0] > 0) == there[:, frame]).sum()
        predicted = len(outputs["frames"]) * len(truth)
        return {"mask_iou": covered / present.clamp(min=1), "object_accuracy": right / max(1, predicted)}

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `predictions["logits"]`, of each clip (n, T, h, w), against the original objects, frame by frame."""
        for logits, sample, truth in zip(predictions["logits"], batch.samples, batch.targets.originals, strict=True):
            self.update_labels(
                partial(labels_in, logits, sample.size),
                truth,
                dataset=sample.dataset,
                sample_id=sample.sample_id,
                path=sample.path,
            )

    def update_labels(
        self, labels_of: Callable[[int], np.ndarray], truth: Masklets, *, dataset: str, sample_id: str, path: str
    ) -> None:
        """Score a clip by the labels of its frames, see `score_clip`."""
        curves = self.score_clip(labels_of, truth)
        scores = {name: mean_of(curves[name]) for name in self.higher_is_better}
        self.rows.append(Row(dataset, sample_id, path, scores, curves | {"object_ids": np.array(truth.object_ids)}))

    def mean(self, name: str, rows: list[Row]) -> float:
        """Mean of one score over all objects of some rows, NaN where none has it."""
        return mean_of(np.concatenate([row.curves[name] for row in rows]))

    def _resampled(self, name: str, rows: Sequence[Row], weights: np.ndarray) -> np.ndarray:
        sums = np.array([np.nansum(row.curves[name]) for row in rows])
        counts = np.array([np.count_nonzero(~np.isnan(row.curves[name])) for row in rows])
        with np.errstate(invalid="ignore"):  # a resample may hold no object
            return weights @ sums / (weights @ counts)

    def per_class(self) -> list[dict[str, Any]]:
        """The scores of every object of all rows, under its clip's id and its own."""
        return [
            {"name": f"{row.sample_id}/{number}"} | {name: float(row.curves[name][i]) for name in self.higher_is_better}
            for row in self.rows
            for i, number in enumerate(row.curves["object_ids"])
        ]


def labels_in(logits: Tensor, size: Size, frame: int) -> np.ndarray:
    """`label_map` of one frame of (n, T, h, w) logits."""
    return label_map(logits[:, frame], size)


def mean_of(values: np.ndarray) -> float:
    """Mean of those that are not NaN, NaN where there are none."""
    there = values[~np.isnan(values)].tolist()
    return fmean(there) if there else math.nan

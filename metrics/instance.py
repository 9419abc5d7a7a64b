"""COCO's scores of boxes and masks, and the score from which on detections are best believed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from instances import corners, detections, ranks_within
from metrics.average_precision import (
    AREAS,
    BITS,
    IOU_50,
    IOU_75,
    RECALLS,
    Ranking,
    Regions,
    in_range,
    match_picture,
    pack,
)
from metrics.base import Row, StreamingMetric
from plots import COLORS, FAINT, Line, draw_bars, draw_lines

KINDS = ("mask", "box")
PLURAL = {"mask": "masks", "box": "boxes"}
COCO = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl",
        "ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "ARs", "ar_medium": "ARm",
        "ar_large": "ARl"}  # fmt: skip
OPERATING = {"f1": "F1", "f1_threshold": "F1 threshold", "precision": "precision", "recall": "recall"}
HEADINGS = {f"{kind}_{name}": f"{kind} {heading}" for kind in KINDS for name, heading in COCO.items()} | OPERATING
MAX_DETECTIONS = 100
HELD = 2**23  # values that are held at once, of detections × IoU thresholds × areas × resamples
LIVE_MASKS = 64  # of a picture, that are compared while training
BARS = 40  # classes that are drawn, the weakest
KEPT = 8  # sets of rows whose scores are remembered


class InstanceMetric(StreamingMetric):
    """The twelve numbers of pycocotools for masks and for boxes, equal to the last bit, and the best F1.

    AP and AR are means over classes, IoUs from .50 to .95 and recalls, of all samples together: detections of all of
    them are ranked by score, of equal scores in the order of the rows. They are NaN (pycocotools: -1) where no object
    is in the range. Small is below 32² pixels of the annotation, large above 96². Of each picture and class the
    `max_detections` best detections count; `ar100` is the recall with that many.

    `f1`, `precision` and `recall` are those at `f1_threshold`, the score from which on detections of all classes
    together have the best F1, at IoU .5 of the masks, or boxes where there are no masks.

    A sample's own scores rank its detections of all classes together, so that a sure detection of a class that is not
    there counts. NaN where it has no objects, but for the primary score: that is 1 less the score of its surest wrong
    detection.

    A row keeps its detections as some 30 bytes each. Labels that are no class are left out.
    """

    primary = "mask_ap"
    higher_is_better = dict.fromkeys(HEADINGS, True)
    headings: Mapping[str, str] = MappingProxyType(HEADINGS)
    resamples = 1_000

    def __init__(
        self,
        names: Sequence[str] = (),
        *,
        class_names: Sequence[str],
        masks: bool = True,
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        """Raises UserError for an unknown name."""
        super().__init__()
        self.class_names, self.limits = list(class_names), (1, 10, max_detections)
        self.kinds = KINDS if masks else ("box",)
        self.primary = f"{self.kinds[0]}_ap"
        known = [f"{kind}_{name}" for kind in self.kinds for name in COCO] + list(OPERATING)
        self.higher_is_better = dict.fromkeys(known, True)
        self.headings = HEADINGS | {f"{kind}_ar100": f"{kind} AR{max_detections}" for kind in self.kinds}
        for name in self.resolve(names):
            if name not in self.higher_is_better:
                raise UserError(f"the metric {name!r} needs masks, which this model does not predict")
        self._known: list[tuple[list[Row], dict[str, float]]] = []
        self._ranked: tuple[list[Row], Any] = ([], None)

    # ------------------------------------------------------------ training

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """How well the best queries of a batch meet its objects: 0-dim means over objects, on the device.

        `box_iou` is that of the query of the last layer whose box lies best, `class_accuracy` whether its likeliest
        class is the object's, `mask_iou` that of its mask at the size of the features, for up to `LIVE_MASKS` objects
        of each picture. 0 without objects.
        """
        targets = batch.targets
        count, device = len(targets.labels), targets.labels.device
        owner = torch.arange(len(targets.counts)).repeat_interleave(torch.tensor(targets.counts))
        owner = owner.to(device, non_blocking=True)
        ious = box_iou(corners(targets.boxes.float())[:, None], corners(outputs["boxes"][-1].float())[owner])
        best_iou, query = ious.max(1)
        is_right = outputs["logits"][-1][owner, query].argmax(-1) == targets.labels
        scores = {"box_iou": best_iou.sum() / max(1, count), "class_accuracy": is_right.sum() / max(1, count)}
        if "mask_queries" in outputs:
            scores["mask_iou"] = _live_mask_iou(outputs, targets, outputs["mask_queries"][-1][owner, query])
        return scores

    # ------------------------------------------------------------ samples as they come

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `logits` (B, Q, C), `boxes` (B, Q, 4) and `masks` (B, Q, h, w), see `instances.detections`, against the
        original objects."""
        names = ("logits", "boxes", "masks") if "mask" in self.kinds else ("logits", "boxes")
        found = detections(
            {name: predictions[name] for name in names},
            batch.samples,
            num_classes=len(self.class_names),
            per_class=self.limits[-1],
        )
        truths = zip(batch.targets.originals, batch.targets.original_labels, strict=True)
        for sample, each, (objects, labels) in zip(batch.samples, found, truths, strict=True):
            self.update_regions(
                Regions.of(each.labels, each.boxes, each.codes),
                each.scores,
                Regions.of(np.array(labels, np.int64), objects.boxes, objects.codes, objects.areas),
                objects.crowd,
                dataset=sample.dataset,
                sample_id=sample.sample_id,
                path=sample.path,
            )

    def update_regions(
        self,
        found: Regions,
        scores: np.ndarray,
        there: Regions,
        crowd: np.ndarray,
        *,
        dataset: str,
        sample_id: str,
        path: str,
    ) -> None:
        """Score one picture's detections, in any order, with (n,) scores, against its objects, of which (g,) crowds.

        The labels of both are classes.
        """
        assert there.areas is not None
        order = np.lexsort((-scores, found.labels))  # pycocotools': by class, then score, then as they came
        order = order[ranks_within(found.labels[order]) < self.limits[-1]]
        found, scores = found.chosen(order), scores[order].astype(np.float64)
        ignored = ~in_range(there.areas) | crowd
        classes, place = np.unique(there.labels, return_inverse=True)
        objects = np.zeros((len(classes), len(AREAS)), np.int32)
        np.add.at(objects, place, ~ignored.T)
        curves = {"labels": found.labels.astype(np.int32), "scores": scores,
                  "classes": classes.astype(np.int32), "objects": objects}  # fmt: skip
        for kind in self.kinds:
            packed = pack(*match_picture(kind, found, there, ignored, crowd))
            curves |= {f"{kind}_{name}": values for name, values in packed.items()}
        row = Row(dataset, sample_id, path, {}, curves)
        row.scores.update(self._own_scores(row))
        self.rows.append(row)

    def _own_scores(self, row: Row) -> dict[str, float]:
        """What one sample scores by itself, see the class."""
        ranking, once = Ranking.of([row], self.kinds), np.ones((1, 1), np.int32)
        scores = self._scores(self.kinds, [ranking], ranking, once)
        own = {name: values.item() for name, values in scores.items()}
        if math.isnan(own[self.primary]):
            _, wrong = ranking.outcomes[self.kinds[0]].at_iou_50()
            own[self.primary] = 1 - float(ranking.scores[wrong].max(initial=0))
        return own

    # ------------------------------------------------------------ all samples together

    def means(self, rows: list[Row]) -> dict[str, float]:
        """Every score of some rows together. Raises ValueError without rows."""
        for known, scores in self._known:
            if are_same(known, rows):
                return dict(scores)
        drawn = self.resampled(list(self.higher_is_better), rows, np.ones((1, len(rows))))
        found = {name: values.item() for name, values in drawn.items()}
        self._known = [(list(rows), found), *self._known[: KEPT - 1]]
        return dict(found)

    def mean(self, name: str, rows: list[Row]) -> float:
        """One of `means`."""
        return self.means(rows)[name]

    def _rank(self, rows: Sequence[Row]) -> Ranking:
        """The ranking of some rows; the last one is remembered."""
        if not are_same(self._ranked[0], rows):
            self._ranked = (list(rows), Ranking.of(rows, self.kinds))
        return self._ranked[1]

    def resampled(self, names: Sequence[str], rows: Sequence[Row], weights: np.ndarray) -> dict[str, np.ndarray]:
        """See `StreamingMetric`; all scores of masks, or of boxes, take the time of one."""
        kinds = [kind for kind in self.kinds if any(name.startswith(kind) for name in names)]
        together = self._rank(rows)
        classes = [each for _, each in together.by_class()] or [together]
        longest = max(len(each.scores) for each in classes)
        step = max(1, HELD // (math.prod(BITS) * max(longest, len(RECALLS) * len(classes), 1)))
        parts = [self._scores(kinds, classes, together, weights[start : start + step].astype(np.int32))
                 for start in range(0, len(weights), step)]  # fmt: skip
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def per_class(self) -> list[dict[str, Any]]:
        """{name, AP and AP50 of each kind, precision, recall, objects} of each class over all rows.

        `precision` and `recall` are those at `f1_threshold`; NaN where a class has no objects, or nothing is believed.
        """
        once = np.ones((1, len(self.rows)), np.int32)
        found = dict(self._rank(self.rows).by_class())
        threshold = self.compute()["f1_threshold"]
        rows: list[dict[str, Any]] = []
        for label, name in enumerate(self.class_names):
            ranking = found.get(label)
            row: dict[str, Any] = {"name": name}
            for kind in self.kinds:
                parts = ranking and [part[..., None] for part in ranking.precision_and_recall(kind, once, self.limits)]
                scores = coco_scores(*parts) if parts else {}
                row |= {f"{kind}_{key}": scores[key].item() if scores else math.nan for key in ("ap", "ap50")}
            row["precision"], row["recall"] = ranking.at(threshold, self.kinds[0]) if ranking else (math.nan, math.nan)
            rows.append(row | {"objects": int(ranking.there(once)[0, 0]) if ranking else 0})
        return rows

    def figures(self) -> dict[str, np.ndarray]:
        """Precision against recall at IoU .5, F1 against the score that is believed, and the AP of classes."""
        kind, once = self.kinds[0], np.ones((1, len(self.rows)), np.int32)
        ranking = self._rank(self.rows)
        curves = {label: each.precision_and_recall(kind, once, self.limits)[0][0, 0, IOU_50]
                  for label, each in ranking.by_class() if each.there(once)[0, 0]}  # fmt: skip
        if not curves:
            return {}
        rows = sorted((row for row in self.per_class() if row["objects"]), key=lambda row: row[f"{kind}_ap"])
        bars = {HEADINGS[f"{kind}_ap"]: [row[f"{kind}_ap"] for row in rows[:BARS]] for kind in self.kinds}
        which = "classes" if len(rows) <= BARS else f"the {BARS} weakest of {len(rows)} classes"
        return {
            f"precision and recall of {PLURAL[kind]} at IoU .5": self._draw_precision(curves),
            "what to believe": self._draw_f1(ranking.f1_curves(kind, once)),
            f"AP of {which}": draw_bars([row["name"] for row in rows[:BARS]], bars),
        }

    def _draw_precision(self, curves: dict[int, np.ndarray]) -> np.ndarray:
        """(101,) precision by label; a few classes are named, many are grey."""
        few = len(curves) < len(COLORS)
        lines = []
        for place, (label, curve) in enumerate(curves.items()):
            name = f"{self.class_names[label]} {curve.mean():.3f}" if few else "" if place else "a class"
            lines.append(Line(RECALLS, curve, COLORS[1 + place] if few else FAINT, name))
        mean = np.mean(list(curves.values()), 0)
        lines.append(Line(RECALLS, mean, COLORS[0], f"all classes, AP50 {mean.mean():.3f}", 2))
        return draw_lines(lines, "recall", "precision")

    def _draw_f1(self, curves: dict[str, np.ndarray]) -> np.ndarray:
        """`Ranking.f1_curves` over the score, with a ring at the best F1."""
        best = self.compute()
        lines = [Line(curves["f1_threshold"], curves[name][0], color, f"{OPERATING[name]} {best[name]:.3f}", 2)
                 for name, color in zip(("recall", "precision", "f1"), COLORS[2::-1], strict=True)]  # fmt: skip
        mark = (best["f1_threshold"], best["f1"])
        return draw_lines(lines, "score from which on", "", [] if math.isnan(mark[0]) else [mark])

    def _scores(
        self, kinds: Sequence[str], classes: list[Ranking], together: Ranking, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """(R,) every score of these kinds, from the rankings of each class and of all classes together."""
        scores: dict[str, np.ndarray] = {}
        for kind in kinds:
            each = [ranking.precision_and_recall(kind, weights, self.limits) for ranking in classes]
            precision, recall = (np.stack(parts, -1) for parts in zip(*each, strict=True))
            scores |= {f"{kind}_{name}": values for name, values in coco_scores(precision, recall).items()}
        return scores | together.best_f1(self.kinds[0], weights)


def are_same(rows: Sequence[Row], others: Sequence[Row]) -> bool:
    """Whether both are the very same rows."""
    return len(rows) == len(others) > 0 and all(map(operator.is_, rows, others))


# ---------------------------------------------------------------- training


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoUs (...) of (..., 4) boxes left, top, right, bottom, broadcast against each other; 0 where both are empty."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (a, b)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-12)


def _live_mask_iou(outputs: Mapping[str, Any], targets: Any, queries: Tensor) -> Tensor:
    """The mean IoU of the masks of (N, D) queries, one for each object, a picture at a time."""
    features, bias = outputs["mask_features"][-1], outputs["mask_bias"]
    rows, columns = (
        ((torch.arange(small, device=features.device) + 0.5) * (large / small)).long()
        for small, large in zip(features.shape[-2:], targets.maps.shape[-2:], strict=True)
    )
    maps = targets.maps[:, :, rows[:, None], columns]
    total, seen, start = features.new_zeros((), dtype=torch.float32), 0, 0
    for index, count in enumerate(targets.counts):
        shown = slice(start, start + min(count, LIVE_MASKS))
        found = torch.einsum("nd,dhw->nhw", queries[shown], features[index]) + bias > 0
        numbers = torch.arange(1, len(found) + 1, device=maps.device)[:, None, None]
        there = maps[index, targets.layer_of[shown]] == numbers
        areas = [mask.sum((1, 2)) for mask in (found & there, found | there)]
        total += (areas[0] / areas[1].clamp(min=1)).sum()
        seen, start = seen + len(found), start + count
    return total / max(1, seen)


# ---------------------------------------------------------------- COCO's means


def coco_scores(precision: np.ndarray, recall: np.ndarray) -> dict[str, np.ndarray]:
    """(R,) each of `COCO` from (R, A, T, 101, classes) precision and (R, A, T, 3, classes) recall; NaN if all are."""
    parts = {"ap": precision[:, 0], "ap50": precision[:, 0, IOU_50], "ap75": precision[:, 0, IOU_75]}
    parts |= {f"ap_{area}": precision[:, place] for place, area in enumerate(AREAS) if place}
    parts |= {f"ar{limit}": recall[:, 0, :, place] for place, limit in enumerate((1, 10, 100))}
    parts |= {f"ar_{area}": recall[:, place, :, -1] for place, area in enumerate(AREAS) if place}
    return {name: np.array([mean_of(one) for one in values]) for name, values in parts.items()}


def mean_of(values: np.ndarray) -> float:
    """The mean of what is not NaN, in pycocotools' order; NaN where all is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan

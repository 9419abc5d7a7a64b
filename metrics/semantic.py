"""Scores of one class per pixel, all from one confusion matrix over the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from confusion import draw_confusion
from errors import UserError
from maps import argmax_at
from metrics.base import Row, StreamingMetric

# Areas are (..., 3, C): the pixels of each class that are found, that are there, and that are predicted.


def class_iou(areas: Tensor) -> Tensor:
    """(..., C), NaN for classes that are neither there nor predicted."""
    found, there, predicted = areas.unbind(-2)
    return found / (there + predicted - found)


def class_accuracy(areas: Tensor) -> Tensor:
    """(..., C): the share of its pixels that is found, NaN for classes that are not there."""
    found, there, _ = areas.unbind(-2)
    return found / there


def class_dice(areas: Tensor) -> Tensor:
    """(..., C), NaN for classes that are neither there nor predicted."""
    found, there, predicted = areas.unbind(-2)
    return 2 * found / (there + predicted)


def pixel_accuracy(areas: Tensor) -> Tensor:
    """(...): the share of all pixels that is found."""
    found, there, _ = areas.unbind(-2)
    return found.sum(-1) / there.sum(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "miou": lambda areas: class_iou(areas).nanmean(-1),
    "accuracy": pixel_accuracy,
    "mean_accuracy": lambda areas: class_accuracy(areas).nanmean(-1),
    "dice": lambda areas: class_dice(areas).nanmean(-1),
}
HEADINGS = {"miou": "mIoU", "accuracy": "aAcc", "mean_accuracy": "mAcc", "dice": "mDice"}


def from_curve(name: str, areas: np.ndarray) -> float:
    """A score from the flattened areas of one sample, or their sum or mean over many."""
    return SCORES[name](torch.from_numpy(areas).double().view(3, -1)).item()


def areas_of(confusion: Tensor) -> Tensor:
    """(..., C, C), row: truth, column: prediction -> (..., 3, C)."""
    return torch.stack([confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-1), confusion.sum(-2)], -2)


def confusion_of(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(C, C) int64 pixel counts, row: truth, column: prediction, of two label maps of one shape.

    Left out are pixels whose truth is no class, 255 above all. Predictions are in [0, C).
    """
    cells = torch.where(truth < classes, truth.long() * classes + prediction, classes**2)
    return torch.bincount(cells.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)


class SemanticMetric(StreamingMetric):
    """mIoU, pixel accuracy, mean accuracy and mean Dice of the data set, as mmsegmentation computes them.

    Pixels of all samples go into one confusion matrix. Classes that are neither there nor predicted are left out of
    the means; one that is only predicted has IoU and Dice 0 and no accuracy. Each row keeps its sample's own scores,
    NaN where every pixel is ignored, the areas of its classes, and those cells of its confusion matrix that are not 0:
    about 5 kB a sample with 150 classes. They are integers, so sums do not depend on how samples are dealt to ranks.

    `names` are those of the scores, all of which are always there; `resolve` knows them and the field's abbreviations.
    """

    primary = "miou"
    higher_is_better = dict.fromkeys(SCORES, True)
    maybe_undefined = frozenset(SCORES)
    curves = MappingProxyType({name: ("areas", partial(from_curve, name)) for name in SCORES})
    headings = HEADINGS

    def __init__(self, names: Sequence[str] = (), *, class_names: Sequence[str]) -> None:
        """Raises UserError for an unknown name."""
        super().__init__()
        self.resolve(names)
        self.class_names = list(class_names)

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """The scores of a batch as one, at the size of `outputs["logits"]` (B, C, h, w): 0-dim, on the device.

        Coarse but cheap: labels are taken by nearest neighbour. 0 where every pixel is ignored.
        """
        logits = outputs["logits"]
        classes = logits.shape[1]
        truth = F.interpolate(batch.targets.labels.unsqueeze(1), logits.shape[-2:], mode="nearest-exact").squeeze(1)
        prediction, truth = logits.argmax(1).flatten(), truth.long().clamp(max=classes).flatten()
        counted = (truth < classes).float()
        # The sum of what is counted at each label; `classes` collects what is ignored.
        count = partial(logits.new_zeros(classes + 1, dtype=torch.float32).scatter_add, 0)
        areas = torch.stack(
            [count(truth, counted * (prediction == truth)), count(truth, counted), count(prediction, counted)]
        )
        return {name: score(areas[:, :classes]).nan_to_num() for name, score in SCORES.items()}

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `predictions["logits"]` (B, C, h, w) against the original labels, or else those at the model's size.

        The counts of the batch come to the host in one transfer.
        """
        logits = predictions["logits"]
        confusions = []
        for index, truth in enumerate(batch.targets.originals or batch.targets.labels):
            prediction = argmax_at(logits[index : index + 1], (truth.shape[-2], truth.shape[-1]))[0]
            truth = truth.to(logits.device, non_blocking=True)
            confusions.append(confusion_of(prediction, truth, len(self.class_names)))
        for sample, confusion in zip(batch.samples, torch.stack(confusions).cpu(), strict=True):
            self._add(confusion, sample.dataset, sample.sample_id, sample.path)

    def update_masks(
        self, prediction: np.ndarray, truth: np.ndarray, *, dataset: str, sample_id: str, path: str
    ) -> None:
        """Score a finished label map, (H, W) uint8, against an (H, W) uint8 truth, of which 255 is ignored.

        Raises ValueError where the two do not fit each other, UserError for a prediction that is no class.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"the mask has shape {prediction.shape}, the ground truth {truth.shape}")
        classes = len(self.class_names)
        if prediction.max() >= classes:
            raise UserError(
                f"{path}: the predicted mask holds the label {prediction.max()}, but the {classes} classes are 0 to "
                f"{classes - 1}; every pixel must have one of them"
            )
        confusion = confusion_of(torch.from_numpy(prediction), torch.from_numpy(truth), classes)
        self._add(confusion, dataset, sample_id, path)

    def confusion(self) -> np.ndarray:
        """(C, C) int64 pixels of all rows, row: truth, column: prediction."""
        classes = len(self.class_names)
        total = np.zeros(classes**2, np.int64)
        for row in self.rows:
            cells, counts = row.curves["confusion"]
            total[cells] += counts
        return total.reshape(classes, classes)

    def per_class(self) -> list[dict[str, Any]]:
        """{name, iou, accuracy, dice, share} of each class over all rows; `share` is that of its pixels in the truth.

        NaN where a class has no such score, see `SemanticMetric`.
        """
        areas = areas_of(torch.from_numpy(self.confusion())).double()
        columns = [class_iou(areas), class_accuracy(areas), class_dice(areas), areas[1] / areas[1].sum()]
        rows = zip(self.class_names, *(column.tolist() for column in columns), strict=True)
        return [dict(zip(("name", "iou", "accuracy", "dice", "share"), row, strict=True)) for row in rows]

    def figures(self) -> dict[str, np.ndarray]:
        """The confusion matrix."""
        return {"confusion matrix": draw_confusion(self.confusion(), self.class_names)}

    def _add(self, confusion: Tensor, dataset: str, sample_id: str, path: str) -> None:
        """A row from one sample's (C, C) confusion matrix on the host."""
        areas = areas_of(confusion).flatten().numpy()
        cells = confusion.flatten().nonzero().squeeze(1)
        curves = {"areas": areas, "confusion": torch.stack([cells, confusion.flatten()[cells]]).numpy()}
        scores = {name: from_curve(name, areas) for name in SCORES}
        self.rows.append(Row(dataset, sample_id, path, scores, curves))

"""Streaming metrics, one class per task: a row per sample on the host, gathered from all ranks, averaged at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from loss import resize, ssim_map


@dataclass(frozen=True)
class Row:
    """One scored sample."""

    dataset: str
    sample_id: str
    path: str
    scores: dict[str, float]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 1 where both are 0: nothing there and nothing found."""
    return torch.where(denominator == 0, 1.0, numerator / denominator)


def binary_scores(probabilities: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Scores of each image, (B,), from probabilities and soft alpha of shape (B, H, W), both in [0, 1].

    With I = Σ p·t: `jaccard` = I / Σ (p + t − p·t), `dice` = 2·I / Σ (p + t), `iou` = Jaccard of the masks p > 0.5 and
    t > 0.5, each 1 where both maps are empty; `bce_accuracy` = 1 − BCE / 16 with p in [1e-7, 1 − 1e-7], about 0 for a
    sure mistake everywhere; `ssim` = mean of the map that the SSIM loss uses, in [-1, 1]; `mae` = mean |p − t|.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        intersection = (probabilities * target).sum((-2, -1))
        total = probabilities.sum((-2, -1)) + target.sum((-2, -1))
        found, there = probabilities > 0.5, target > 0.5
        # Not F.binary_cross_entropy: a NaN from a failing model would be a device assertion there.
        bounded = probabilities.clamp(1e-7, 1 - 1e-7)
        cross_entropy = -(target * bounded.log() + (1 - target) * (1 - bounded).log())
        return {
            "jaccard": ratio(intersection, total - intersection),
            "dice": ratio(2 * intersection, total),
            "iou": ratio((found & there).sum((-2, -1)), (found | there).sum((-2, -1))),
            "bce_accuracy": 1 - cross_entropy.mean((-2, -1)) / 16,
            "ssim": ssim_map(probabilities, target).mean((-2, -1)),
            "mae": (probabilities - target).abs().mean((-2, -1)),
        }


class BinaryMetric:
    """Scores of one soft mask per image, averaged over samples; see `binary_scores` for the formulas.

    Each sample is scored by itself, at its original size where the batch carries it, so that the figures do not
    depend on the batch size or the number of ranks.
    """

    primary = "jaccard"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "jaccard": True,
        "dice": True,
        "iou": True,
        "bce_accuracy": True,
        "ssim": True,
        "mae": False,
    }

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """Batch means of the scores of `outputs["logits"]` (B, 1, H, W) at the model's size: 0-dim, on the device."""
        probabilities = outputs["logits"].float().sigmoid().squeeze(1)
        scores = binary_scores(probabilities, batch.targets.masks.squeeze(1))
        return {name: score.mean() for name, score in scores.items()}

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `predictions["logits"]` (B, 1, H, W) against the original alphas, or else masks at the model's size.

        Probabilities, not logits, are resized to the original size, as the official evaluation does.
        The scores of the batch come to the host in one transfer.
        """
        probabilities = predictions["logits"].float().sigmoid()
        originals = batch.targets.originals
        scores = []
        for index in range(len(batch.samples)):
            prediction = probabilities[index : index + 1]
            if originals:
                target = originals[index].to(prediction.device, non_blocking=True)[None].float() / 255
                prediction = resize(prediction, (target.shape[-2], target.shape[-1]))
            else:
                target = batch.targets.masks[index]
            scores.append(binary_scores(prediction.squeeze(1), target))
        values = torch.stack([torch.cat(list(image_scores.values())) for image_scores in scores]).tolist()
        for sample, row in zip(batch.samples, values, strict=True):
            row_scores = dict(zip(scores[0], row, strict=True))
            self.rows.append(Row(sample.dataset, sample.sample_id, sample.path, row_scores))

    def reduce(self) -> None:
        """Bring the rows of all ranks to every rank, each sample once , by dataset and sample id."""
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, rows)
            rows = [row for rank_rows in gathered for row in rank_rows]
        unique = {(row.dataset, row.sample_id): row for row in rows}
        self.rows = [unique[key] for key in sorted(unique)]

    def compute(self) -> dict[str, float]:
        """Mean of each score over the samples, in float64. Raises ValueError if there are none."""
        return self._means(self.rows)

    def per_dataset(self) -> dict[str, dict[str, float]]:
        """`compute` for each dataset by itself."""
        datasets = sorted({row.dataset for row in self.rows})
        return {name: self._means([row for row in self.rows if row.dataset == name]) for name in datasets}

    def worst(self, count: int) -> list[Row]:
        """The samples with the lowest primary score, the lowest first; one that is not a number is lower than all."""

        def score(row: Row) -> float:
            value = row.scores[self.primary]
            return -math.inf if math.isnan(value) else value

        return sorted(self.rows, key=score)[:count]

    def best(self, count: int) -> list[Row]:
        """The samples with the highest primary score, the highest first."""
        return self.worst(len(self.rows))[::-1][:count]

    def _means(self, rows: list[Row]) -> dict[str, float]:
        return {name: fmean(row.scores[name] for row in rows) for name in self.higher_is_better}

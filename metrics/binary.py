"""Scores of one soft mask per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loss import resize, ssim_map
from metrics.base import Row, StreamingMetric

SOFT_SCORES = {"jaccard": True, "dice": True, "iou": True, "bce_accuracy": True, "ssim": True, "mae": False}


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


class BinaryMetric(StreamingMetric):
    """Scores of one soft mask per image, averaged over samples; see `binary_scores` for the formulas.

    Each sample is scored by itself, at its original size where the batch carries it, so that the figures do not
    depend on the batch size or the number of ranks.
    """

    primary = "jaccard"

    def __init__(self) -> None:
        super().__init__()
        self.higher_is_better = SOFT_SCORES

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

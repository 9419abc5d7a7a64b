"""Scores of one soft mask per image."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loss import resize, ssim_map
from metrics.base import Row, StreamingMetric
from metrics.scores import HEADINGS, SCORES, field_scores, resolve

SOFT_SCORES = {"jaccard": True, "dice": True, "iou": True, "bce_accuracy": True, "ssim": True, "mae": False}
WORKERS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
    """Scores of one soft mask per image: the six of `binary_scores`, and those of the field that are asked for.

    `names` are names, usual abbreviations and groups (`standard`, `birefnet`, `matting`, `all`) of metrics.scores; an
    unknown one is a `UserError`. Field scores are those of the 8-bit mask that inference writes. They are computed on
    the CPU while the next batch is predicted, and are in the rows after `reduce`.
    """

    primary = "jaccard"
    headings = HEADINGS

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = [name for name in self.resolve(names) if name not in SOFT_SCORES]
        self.higher_is_better = SOFT_SCORES | {name: SCORES[name].higher_is_better for name in self.names}
        self.maybe_undefined = frozenset(name for name in self.names if SCORES[name].maybe_undefined)
        self.curves = {name: (SCORES[name].curve, SCORES[name].value) for name in self.names if SCORES[name].curve}
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: deque[tuple[Row, Future[tuple[dict[str, float], dict[str, np.ndarray]]]]] = deque()

    @classmethod
    def resolve(cls, names: Sequence[str]) -> list[str]:
        """Score names from names, abbreviations and groups in any case; `UserError` for an unknown one.

        `mae` is the field's here, `normalized_mae`; the soft one needs no asking.
        """
        return resolve(names, others=SOFT_SCORES)

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """Batch means of the scores of `outputs["logits"]` (B, 1, h, w) at the masks' size: 0-dim, on the device."""
        masks = batch.targets.masks.squeeze(1)
        probabilities = resize(outputs["logits"].float().sigmoid(), (masks.shape[-2], masks.shape[-1])).squeeze(1)
        scores = binary_scores(probabilities, masks)
        return {name: score.mean() for name, score in scores.items()}

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `predictions["logits"]` (B, 1, H, W) against the original alphas, or else masks at the model's size.

        Probabilities, not logits, are resized to the original size, as the official evaluation does.
        The soft scores of the batch come to the host in one transfer.
        """
        probabilities = predictions["logits"].float().sigmoid()
        originals = batch.targets.originals
        scores, masks = [], []
        for index in range(len(batch.samples)):
            prediction = probabilities[index : index + 1]
            if originals:
                target = originals[index].to(prediction.device, non_blocking=True)[None].float() / 255
            else:
                target = batch.targets.masks[index]
            prediction = resize(prediction, (target.shape[-2], target.shape[-1]))
            scores.append(binary_scores(prediction.squeeze(1), target))
            if self.names:
                truth = target[0].mul(255).round().byte().cpu().numpy()
                masks.append((prediction[0, 0].mul(255).byte().cpu().numpy(), truth))
        values = torch.stack([torch.cat(list(image_scores.values())) for image_scores in scores]).tolist()
        for index, (sample, row) in enumerate(zip(batch.samples, values, strict=True)):
            row_scores = dict(zip(scores[0], row, strict=True))
            self.rows.append(Row(sample.dataset, sample.sample_id, sample.path, row_scores))
            if self.names:
                self._score_later(self.rows[-1], *masks[index])

    def update_masks(
        self, prediction: np.ndarray, truth: np.ndarray, *, dataset: str, sample_id: str, path: str
    ) -> None:
        """Score a finished mask, (H, W) uint8, against an (H, W) uint8 alpha; its grey levels / 255 are probabilities.

        Raises ValueError where the two do not fit each other.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"the mask has shape {prediction.shape}, the ground truth {truth.shape}")
        probabilities, target = (torch.from_numpy(mask)[None].float() / 255 for mask in (prediction, truth))
        scores = {name: score.item() for name, score in binary_scores(probabilities, target).items()}
        self.rows.append(Row(dataset, sample_id, path, scores))
        if self.names:
            self._score_later(self.rows[-1], prediction, truth)

    def reduce(self) -> None:
        """Wait for the field scores, then bring the rows of all ranks to every rank."""
        while self.waiting:
            self._finish_one()
        if self.pool:
            self.pool.shutdown()
            self.pool = None
        super().reduce()

    def _score_later(self, row: Row, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Have the row's field scores computed on one of a few threads, which OpenCV and NumPy let run side by side."""
        if math.isnan(row.scores[self.primary]):  # no mask can be cut from what is not a number
            row.scores.update(dict.fromkeys(self.names, math.nan))
            row.curves.update({curve: np.full(256, math.nan) for curve, _ in self.curves.values()})
            return
        self.pool = self.pool or ThreadPoolExecutor(WORKERS)
        self.waiting.append((row, self.pool.submit(field_scores, prediction, truth, self.names)))
        if len(self.waiting) > 2 * WORKERS:  # no more masks than these are held in memory
            self._finish_one()

    def _finish_one(self) -> None:
        row, future = self.waiting.popleft()
        scores, curves = future.result()
        row.scores.update(scores)
        row.curves.update(curves)

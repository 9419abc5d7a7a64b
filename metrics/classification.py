"""Scores of one class per picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from confusion import draw_confusion
from metrics.base import Row, StreamingMetric

HEADINGS = {"top1": "Top-1", "top5": "Top-5", "cross_entropy": "CE"}


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) int64: how many classes are more probable than the true one; equals count as more probable."""
    own = logits.gather(1, labels[:, None])
    return (logits >= own).sum(1) - 1


class ClassificationMetric(StreamingMetric):
    """Shares of the samples whose class is the most probable one, and among the five most probable, and cross entropy.

    `names` are those of the scores, all of which are always there.
    """

    primary = "top1"
    higher_is_better = {"top1": True, "top5": True, "cross_entropy": False}  # noqa: RUF012
    headings = HEADINGS

    def __init__(self, names: Sequence[str] = (), *, class_names: Sequence[str]) -> None:
        """Raises UserError for an unknown name."""
        super().__init__()
        self.resolve(names)
        self.class_names = list(class_names)

    @staticmethod
    @torch.no_grad()
    def batch_scores(outputs: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        """The scores of a batch in training, 0-dim, on the device; of mixed pictures by the class of the sample."""
        found = ranks(outputs["logits"], batch.targets.labels)
        return {"top1": (found < 1).float().mean(), "top5": (found < 5).float().mean()}

    @torch.no_grad()
    def update(self, predictions: Mapping[str, Any], batch: Any) -> None:
        """Score `predictions["logits"]` (B, C) float32."""
        logits, labels = predictions["logits"], batch.targets.labels
        entropies = F.cross_entropy(logits, labels, reduction="none")
        columns = torch.stack([labels, logits.argmax(1), ranks(logits, labels)]).tolist()
        for sample, truth, guess, rank, entropy in zip(batch.samples, *columns, entropies.tolist(), strict=True):
            scores = {"top1": float(rank < 1), "top5": float(rank < 5), "cross_entropy": entropy}
            curves = {"classes": np.array([truth, guess])}
            self.rows.append(Row(sample.dataset, sample.sample_id, sample.path, scores, curves))

    def confusion(self) -> np.ndarray:
        """(C, C) int64 samples of all rows, row: truth, column: the most probable class."""
        total = np.zeros((len(self.class_names),) * 2, np.int64)
        for row in self.rows:
            total[tuple(row.curves["classes"])] += 1
        return total

    def per_class(self) -> list[dict[str, Any]]:
        """{name, recall, precision, share} of each class; NaN where a class is not there or never predicted."""
        total = self.confusion().astype(np.float64)
        found, there, guessed = total.diagonal(), total.sum(1), total.sum(0)
        with np.errstate(invalid="ignore"):
            columns = [found / there, found / guessed, there / total.sum()]
        rows = zip(self.class_names, *(column.tolist() for column in columns), strict=True)
        return [dict(zip(("name", "recall", "precision", "share"), row, strict=True)) for row in rows]

    def figures(self) -> dict[str, np.ndarray]:
        """The confusion matrix."""
        return {"confusion matrix": draw_confusion(self.confusion(), self.class_names)}

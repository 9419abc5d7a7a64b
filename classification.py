"""What is learnt in `classification`: a class for each picture, as targets, and their criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loss import Criterion, full_precision
from samples import Sample


@dataclass
class ClassItem:
    """The target of one sample, and of the picture that was mixed in."""

    labels: np.int64
    blended: np.int64 | None = None
    share: float = 1.0  # of the sample's own picture


@dataclass
class ClassTarget:
    """Targets of `classification`. Where nothing was mixed in `blended` are the labels themselves."""

    labels: Tensor  # (B,) int64
    blended: Tensor  # (B,) int64
    share: Tensor  # (B,) float32 in [0, 1], of the picture that `labels` belong to

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClassTarget:
        return replace(self, **{name: each.to(device, non_blocking=non_blocking) for name, each in vars(self).items()})

    def pin_memory(self) -> ClassTarget:
        return replace(self, **{name: each.pin_memory() for name, each in vars(self).items()})

    def part(self, start: int, stop: int) -> ClassTarget:
        return replace(self, **{name: each[start:stop] for name, each in vars(self).items()})


def class_target(sample: Sample, original: Sample | None) -> ClassItem:
    """The target of one sample; its class does not depend on what the picture looked like before."""
    return ClassItem(np.int64(sample.class_ids[0]))


def collate_classes(items: Sequence[ClassItem]) -> ClassTarget:
    """See `ClassTarget`."""
    blended = [item.labels if item.blended is None else item.blended for item in items]
    return ClassTarget(
        labels=torch.tensor([int(item.labels) for item in items]),
        blended=torch.tensor([int(label) for label in blended]),
        share=torch.tensor([item.share for item in items]),
    )


class ClassificationCriterion(Criterion):
    """`ce`: the cross entropy, of both classes by their shares where pictures were mixed.

    The mean over the samples of the whole step: micro-batches and ranks sum to the value of the one big batch. Computed
    in float32 (float64 where the logits are) under any autocast.
    """

    terms = ("ce",)

    def __init__(self, weights: Mapping[str, float], *, label_smoothing: float = 0.0) -> None:
        super().__init__(weights)
        self.label_smoothing = label_smoothing

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """How many samples there are, 0-dim float32 on the device."""
        labels = batch.targets.labels
        return {"samples": torch.full((), float(len(labels)), device=labels.device)}

    def forward(self, outputs: Mapping[str, Any], batch: Any, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"ce": weighted scalar} of `outputs["logits"]` (B, C)."""
        targets = batch.targets
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            logits = full_precision(outputs["logits"])
            own, other = (
                F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
                for labels in (targets.labels, targets.blended)
            )
            loss = (targets.share * own + (1 - targets.share) * other).sum() / counts["samples"]
            return {term: loss * weight for term, weight in self.active.items()}

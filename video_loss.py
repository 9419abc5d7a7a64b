"""The losses of `video`: masks, how good they are said to be, and whether there is an object, summed over all frames
and all corrections of a clip (Ravi et al., 2024, arXiv:2408.00714)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loss import Criterion, full_precision

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


class VideoCriterion(Criterion):
    """Losses of objects in clips.

    weights: weight of each term; a term that is absent or 0 is not computed.
        `focal`: focal loss of the masks, α = 0.25 and γ = 2, averaged over pixels. `dice`: 1 − (2·Σ p·t + 1) /
        (Σ p + Σ t + 1). `iou`: how far each predicted IoU is from the true one, averaged over the candidates.
        `object`: cross entropy of the object's presence.

    Of several candidates for a mask only the one with the smallest weighted focal + Dice is trained. All but `object`
    count only where there is an object. Terms are sums over frames and steps, and averages over the objects of the
    whole step, micro-batches and ranks: additive.

    Computed in float32 (float64 where the logits are) under any autocast, without host synchronisation. Masks of the
    truth's size are made again in the backward pass rather than kept.
    """

    terms = ("focal", "dice", "iou", "object")

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """What the terms average over, 0-dim float32 on the device; to be summed over micro-batches and ranks."""
        masks = batch.targets.masks
        return {"objects": torch.full((), float(len(masks)), device=masks.device)}

    @torch.compiler.disable
    def forward(self, outputs: Mapping[str, Any], batch: Any, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: weighted scalar}; their sum is what is trained.

        outputs: as of `models.sam2.training.segment_clips`. batch: `targets.masks` (N, T, H, W), 0 or 1.
        """
        truth = batch.targets.masks
        with torch.autocast(truth.device.type, enabled=False):
            there = truth.flatten(2).any(2)  # (N, T)
            totals = dict.fromkeys(self.active, torch.zeros((), device=truth.device))
            names = ("frames", "candidates", "ious", "scores")
            for t, candidates, ious, scores in zip(*(outputs[name] for name in names), strict=True):
                logits, present = full_precision(candidates), there[:, t].float()
                values = self._mask_terms(logits, full_precision(ious), truth[:, t : t + 1])
                values = {term: (value * present).sum() for term, value in values.items()}
                known = full_precision(scores)[:, 0]
                values["object"] = F.binary_cross_entropy_with_logits(known, present.to(known), reduction="sum")
                totals = {term: total + values[term] for term, total in totals.items()}
            objects = counts["objects"].clamp(min=1)
            return {term: total * self.active[term] / objects for term, total in totals.items()}

    def _mask_terms(self, logits: Tensor, ious: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """(N,) unweighted terms of (N, M, h, w) logits and (N, M) predicted IoUs."""
        true_ious = None
        if logits.shape[1] > 1:
            with torch.no_grad():
                focal, dice, true_ious = mask_statistics(logits, truth)
                costs = self.active.get("focal", 0.0) * focal + self.active.get("dice", 0.0) * dice
                best = costs.argmin(1)[:, None, None, None].expand(-1, 1, *logits.shape[-2:])
            logits = logits.gather(1, best)
        focal, dice, own_ious = checkpoint(mask_statistics, logits, truth, use_reentrant=False)
        errors = (ious - (own_ious if true_ious is None else true_ious)).abs()
        return {"focal": focal[:, 0], "dice": dice[:, 0], "iou": errors.mean(1)}


def mask_statistics(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M) focal losses, Dice losses and IoUs of (N, M, h, w) logits, resized to the truth (N, 1, H, W)."""
    logits = F.interpolate(logits, truth.shape[-2:], mode="bilinear")
    truth = truth.to(logits.dtype)
    shares = logits.sigmoid()
    balance = (1 - FOCAL_ALPHA) - (1 - 2 * FOCAL_ALPHA) * truth
    cross_entropy = F.softplus(logits * (1 - 2 * truth))
    focal = (balance * (shares - truth).abs() ** FOCAL_GAMMA * cross_entropy).mean((-2, -1))
    area = truth.sum((-2, -1))
    dice = 1 - (2 * (shares * truth).sum((-2, -1)) + 1) / (shares.sum((-2, -1)) + area + 1)
    masks = (logits.detach() > 0).to(logits.dtype)
    common = (masks * truth).sum((-2, -1))
    return focal, dice, common / (masks.sum((-2, -1)) + area - common).clamp(min=1)

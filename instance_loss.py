"""The losses of `instance`: a set of queries, some of which are matched with objects (RF-DETR).

Masks of all queries never exist: a mask is a query times the features, so the matcher multiplies what it has sampled
of the features, and the losses build the masks of matched queries alone, a chunk of them at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from errors import UserError
from loss import Criterion, full_precision
from matcher import HungarianMatcher, Matches, Stages, blend, chunks, labels_at, neighbours, overlaps
from models.linear import linear
from samples import InstanceTarget

MATCHING = {"class": 2.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}
OVERSAMPLING = 3  # candidates for each point of the mask losses
UNCERTAIN = 0.75  # share of the points that are the least certain candidates; the rest is anywhere
LEAST_QUALITY = 0.01
POINT = 128  # values that one counts for in `chunks`: those of masks that are sampled at once stay in the cache


class InstanceCriterion(Criterion):
    """Hungarian set criterion over the decoder's layers and the encoder, as RF-DETR's.

    weights: weight of each term; a term that is absent or 0 is not computed. A term is the sum over all stages: the
        last decoder layer, those before it, and the encoder.
        `class`: IoU-aware BCE. A matched query's target for its object's class is t = max(p^α · IoU^(1 − α), 0.01);
        everything else is a negative that weighs p² (Cai et al. 2023, "Align-DETR", with α = focal_alpha).
        `box`: L1 of center and size as shares of the input. `giou`: 1 − GIoU. `mask`: cross entropy and `dice`:
        1 − (2·Σ p·t + 1) / (Σ p + Σ t + 1), both at points of which three quarters are uncertain (PointRend,
        Kirillov et al. 2020).
    matching: weights of the costs of a match, by the same names; those left out are as official.
    groups: groups of queries that are matched independently (Group DETR).
    focal_alpha: α above, and the weight of positives in the cost of the class.
    point_ratio: pixels of the masks for each random point, in matching and losses.

    All terms are sums over matches (`class`: over all queries and classes) divided by objects · groups, at least 1, of
    the whole step, so micro-batches and ranks add up to the value of the one big batch. They are finite, and have a
    gradient for every output, with any number of objects, none included. Masks absent from the outputs are no terms.

    Computed in float32 (float64 where the outputs are) under any autocast. The host waits for the device once.
    """

    terms = ("class", "box", "giou", "mask", "dice")

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        groups: int = 13,
        matching: Mapping[str, float] | None = None,
        focal_alpha: float = 0.25,
        point_ratio: int = 16,
    ) -> None:
        """Raises UserError for an unknown term or cost, or if none has a weight."""
        super().__init__(weights)
        self._check_terms(matching or {})
        costs = {**MATCHING, **(matching or {})}
        if not any(costs.values()):
            raise UserError("loss.matching leaves nothing to match by: give at least one cost a weight above 0")
        self.groups = groups
        self.focal_alpha = focal_alpha
        self.point_ratio = point_ratio
        self.matcher = HungarianMatcher(costs, groups=groups, point_ratio=point_ratio, focal_alpha=focal_alpha)

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """What the terms average over, 0-dim float32 on the device; to be summed over micro-batches and ranks."""
        return {"objects": torch.full((), float(len(batch.targets.labels)), device=batch.targets.labels.device)}

    @torch.compiler.disable
    def forward(self, outputs: Mapping[str, Any], batch: Any, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: weighted scalar}; their sum is what is trained.

        outputs, L being decoder layers of which the last counts, Q the queries of all groups, group after group:
        `logits` (L, B, Q, C) and `boxes` (L, B, Q, 4), center and size as shares of the input; where present
        `mask_queries` (L, B, Q, D), `mask_features`, L of (B, D, h, w), and `mask_bias` (1,), a mask being the product
        plus the bias; and each of these but the bias of the encoder, without L, as `encoder_…`.

        Raises UserError where no term is left, the outputs having no masks.
        """
        values = self.stage_terms(outputs, batch.targets, counts["objects"])
        if not values:
            raise UserError(
                "loss.weights has terms of masks alone, but the model has no masks (model.masks is false): "
                "give class, box or giou a weight above 0"
            )
        return {term: value.sum() * self.active[term] for term, value in values.items()}

    def stage_terms(self, outputs: Mapping[str, Any], targets: InstanceTarget, objects: Tensor) -> dict[str, Tensor]:
        """{term: (K,) unweighted} of the last decoder layer, the layers before it, and the encoder."""
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            stages = Stages.of(outputs)
            matches = self.matcher(stages, targets)
            values = self._box_terms(stages, targets, matches)
            if stages.mask_queries and ("mask" in self.active or "dice" in self.active):
                sums = [self._mask_terms(stages, k, targets, matches) for k in range(len(stages.logits))]
                values["mask"], values["dice"] = torch.stack(sums, 1)
            pairs = (objects * self.groups).clamp(min=1)
            return {term: values[term] / pairs for term in self.active if term in values}

    def _box_terms(self, stages: Stages, targets: InstanceTarget, matches: Matches) -> dict[str, Tensor]:
        """The terms of classes and boxes, (K,) sums over matches."""
        stage = torch.arange(len(stages.logits), device=stages.logits.device)[:, None]
        matched = (stage, matches.image, matches.query)
        boxes, wanted = stages.boxes[matched], targets.boxes[matches.object].to(stages.boxes.dtype)
        iou, giou = overlaps(boxes, wanted)
        logits = stages.logits[(*matched, targets.labels[matches.object])]
        p = logits.detach().sigmoid()
        quality = (p**self.focal_alpha * iou.detach() ** (1 - self.focal_alpha)).clamp(min=LEAST_QUALITY)
        positives = F.binary_cross_entropy_with_logits(logits, quality, reduction="none").sum(1)
        negatives = negative_sum(stages.logits.flatten(1)) - negative_sum(logits)
        return {
            "class": positives + negatives,
            "box": (boxes - wanted).abs().sum((1, 2)),
            "giou": (1 - giou).sum(1),
        }

    def _mask_terms(self, stages: Stages, k: int, targets: InstanceTarget, matches: Matches) -> Tensor:
        """(2,) sums over matches of cross entropy and Dice at uncertain points of one stage."""
        height, width = stages.mask_features[k][0].shape[:2]
        points = max(height, height * width // self.point_ratio)
        parts = list(chunks(len(matches.image), height * width))
        if len(parts) == 1:
            return mask_sums(stages, k, targets, matches, parts[0], points)
        # What backward needs of so many masks is computed again when it is needed.
        sums = [checkpoint(mask_sums, stages, k, targets, matches, part, points, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(0)


def mask_sums(stages: Stages, k: int, targets: InstanceTarget, matches: Matches, part: slice, points: int) -> Tensor:
    """(2,) sums of cross entropy and Dice at so many points of the matches `part` of stage `k`."""
    masks = matched_masks(stages, k, matches, part)
    where = uncertain_points([each.detach() for each in masks], stages.mask_bias, points)
    found = at_points(masks, where) + stages.mask_bias
    layer = targets.layer_of[matches.object[k, part]]
    labels = labels_at(targets.maps, matches.image[part, None], layer[:, None], where)
    truth = (labels == matches.label[k, part, None]).to(found.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(found, truth, reduction="none").mean(1)
    p = found.sigmoid()
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return torch.stack([cross_entropy.sum(), dice.sum()])


def matched_masks(stages: Stages, k: int, matches: Matches, part: slice) -> list[Tensor]:
    """Of each image the masks (n, h, w) of the matches `part` of stage `k`, without the bias: points get that."""
    queries = stages.mask_queries[k][matches.image[part], matches.query[k, part]]
    ends = np.cumsum(matches.per_image).clip(part.start, part.stop)
    own = queries.split(np.diff(ends, prepend=part.start).tolist())
    maps = [full_precision(each) for each in stages.mask_features[k]]
    return [linear(q, each.flatten(0, 1)).unflatten(1, each.shape[:2]) for q, each in zip(own, maps, strict=True)]


@torch.no_grad()
def uncertain_points(masks: Sequence[Tensor], bias: Tensor, count: int) -> Tensor:
    """Random points (n, count, 2) of n masks in all: most of them where a logit is nearest to 0 among candidates."""
    total, device = sum(map(len, masks)), bias.device
    candidates = torch.rand(total, OVERSAMPLING * count, 2, device=device)
    uncertain = int(UNCERTAIN * count)
    doubt = (at_points(masks, candidates) + bias).abs()
    index = doubt.topk(uncertain, largest=False, sorted=False).indices
    anywhere = torch.rand(total, count - uncertain, 2, device=device)
    return torch.cat([candidates.gather(1, index.unsqueeze(-1).expand(-1, -1, 2)), anywhere], 1)


def at_points(masks: Sequence[Tensor], points: Tensor) -> Tensor:
    """Masks (n, h, w) of each image, N in all, at points (N, P, 2): (N, P). Differentiable once, in the masks."""
    own = points.split([len(each) for each in masks])
    return torch.cat([_AtPoints.apply(each, at) for each, at in zip(masks, own, strict=True)])


class _AtPoints(torch.autograd.Function):
    """Keeps the points alone, where autograd would keep indices and neighbours, many times as large.

    A few masks at a time, which the cache holds.
    """

    @staticmethod
    def forward(ctx: Any, masks: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        ctx.shape = masks.shape
        values = []
        for part in chunks(len(masks), POINT * points.shape[1]):
            index, x, y = neighbours(points[part], ctx.shape[1:])
            values.append(blend(masks[part].flatten(1).gather(1, index), x, y))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (points,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        for part in chunks(len(points), POINT * points.shape[1]):
            index, x, y = neighbours(points[part], ctx.shape[1:])
            right = gradient[part] * x
            left = gradient[part] - right
            below = [left * y, right * y]
            shares = torch.cat([left - below[0], right - below[1], *below], -1).to(whole.dtype)
            whole[part].flatten(1).scatter_add_(1, index, shares)
        return whole, None


def negative_sum(logits: Tensor) -> Tensor:
    """Σ p²·softplus(x) of logits x (K, N), their BCE as negatives that weigh p²: (K,). Differentiable once."""
    return _NegativeSum.apply(logits)


class _NegativeSum(torch.autograd.Function):
    """Keeps the logits alone, where autograd would keep four tensors of their size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return (logits.sigmoid().square() * F.softplus(logits)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        p = logits.sigmoid()
        slope = p.square() * (2 * (1 - p) * F.softplus(logits) + p)
        return slope * gradient.unsqueeze(1)

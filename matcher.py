"""Which query answers for which object: the Hungarian matching of RF-DETR, and the boxes and points that it looks at.

Costs are computed on the device, an image at a time, for all layers and query groups at once, into one buffer that
goes to the host in one transfer: the only time in a step that the host waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from errors import UserError
from loss import full_precision
from samples import InstanceTarget, Size

# Values that a chunk of the largest intermediate may hold (128 MB in float32).
CHUNK = 2**25
TINY = 1e-7  # area by which degenerate boxes are divided


class Stages(NamedTuple):
    """What a model says K times: after its last decoder layer, after each before it, and after its encoder.

    The last decoder layer comes first because the official code draws its random points in this order.
    """

    logits: Tensor  # (K, B, Q, C), Q being the queries of all groups, group after group
    boxes: Tensor  # (K, B, Q, 4) center x, center y, width, height, as shares of the input's sides
    mask_queries: list[Tensor]  # K of (B, Q, D), or none
    mask_features: list[Sequence[Tensor]]  # K of B of (h, w, D), or none; in the outputs' own precision
    mask_bias: Tensor  # (1,), 0 where there is none

    @classmethod
    def of(cls, outputs: Mapping[str, Any]) -> Stages:
        """The stages of what RF-DETR returns in training, see `InstanceCriterion.forward`.

        Raises UserError where the encoder had fewer places to propose than there are queries.
        """

        def stages(name: str) -> list[Tensor]:
            if name not in outputs:
                return []
            *before, last = outputs[name]
            encoder = outputs.get(f"encoder_{name}")
            return [last, *before] if encoder is None else [last, *before, encoder]

        logits = stages("logits")
        if logits[-1].shape != logits[0].shape:
            raise UserError(
                "the input has fewer places for objects than model.num_queries: raise data.size, or lower it"
            )
        return cls(
            logits=full_precision(torch.stack(logits)),
            boxes=full_precision(torch.stack(stages("boxes"))),
            mask_queries=[full_precision(queries) for queries in stages("mask_queries")],
            # Channels last as they are in the model's memory, lest their gradients come back in another layout.
            mask_features=[features.permute(0, 2, 3, 1).unbind() for features in stages("mask_features")],
            mask_bias=full_precision(outputs.get("mask_bias", outputs["boxes"].new_zeros(1))),
        )


class Matches(NamedTuple):
    """R pairs of a query and an object for each of K stages, image after image, group after group."""

    image: Tensor  # (R,) int64 on the device, as the others
    query: Tensor  # (K, R), ascending within a group
    object: Tensor  # (K, R), of all objects of the batch
    label: Tensor  # (K, R), which the object has in its label map
    per_image: list[int]  # how many of the R belong to each image


class HungarianMatcher:
    """Pairs each object with one query of each group so that the summed cost is the least.

    weights: of the costs. `class`: focal cost of the object's class. `box`: L1 distance. `giou`: −GIoU.
        `mask`: cross entropy and `dice`: Dice loss at random points, which all pairs of a stage share.
    groups: how many groups of queries there are.
    point_ratio: pixels of the masks for each random point.
    focal_alpha: weight of the positive part of the focal cost; its exponent is 2.

    Where there are more objects than queries in a group, the cheapest objects get one. A cost that is not finite counts
    as worse than all that are.
    """

    def __init__(self, weights: Mapping[str, float], *, groups: int, point_ratio: int, focal_alpha: float) -> None:
        self.weights = dict(weights)
        self.groups = groups
        self.point_ratio = point_ratio
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def __call__(self, stages: Stages, targets: InstanceTarget) -> Matches:
        """Raises ValueError if the queries are not a multiple of the groups."""
        if stages.logits.shape[2] % self.groups:
            raise ValueError(f"{stages.logits.shape[2]} queries cannot be split into {self.groups} groups")
        costs = [cost.numpy() for cost in self._costs(stages, targets)]
        pairs = []  # of each image (4, K, R)
        for image, (cost, first) in enumerate(zip(costs, starts(targets.counts), strict=True)):
            query, own = assign(cost, self.groups)
            pairs.append(np.stack([np.full_like(query, image), query, first + own, own + 1]))
        indices = torch.from_numpy(np.concatenate(pairs, 2)).to(stages.logits.device, non_blocking=True)
        images, queries, objects, labels = indices.unbind()
        return Matches(images[0], queries, objects, labels, [each.shape[2] for each in pairs])

    def _costs(self, stages: Stages, targets: InstanceTarget) -> list[Tensor]:
        """For each image (K, Q, n) on the host: what it costs if a query answers for an object."""
        count, _, queries, _ = stages.logits.shape
        points, sampled = self._sample(stages)
        shapes = [(count, queries, objects) for objects in targets.counts]
        sizes = [count * queries * objects for objects in targets.counts]
        buffer = stages.logits.new_empty(sum(sizes))
        for image, (part, first) in enumerate(zip(buffer.split(sizes), starts(targets.counts), strict=True)):
            cost = part.view(shapes[image])
            if not len(part):
                continue
            own = slice(first, first + targets.counts[image])
            for k in chunks(count, queries * max(targets.counts[image], points.shape[1])):
                logits, boxes = stages.logits[k, image], stages.boxes[k, image]
                cost[k] = self._box_cost(logits, boxes, targets.labels[own], targets.boxes[own])
                if stages.mask_queries and points.shape[1]:
                    truth = labels_at(targets.maps, image, targets.layer_of[own, None], points[k, None])
                    number = torch.arange(1, len(truth[0]) + 1, device=truth.device)[:, None]
                    mask_queries = torch.stack([each[image] for each in stages.mask_queries[k]])
                    found = (mask_queries @ sampled[k, image]).add_(stages.mask_bias)
                    cost[k] += self._mask_cost(found, (truth == number).to(found.dtype))
        return [part.view(shape) for part, shape in zip(buffer.cpu().split(sizes), shapes, strict=True)]

    def _sample(self, stages: Stages) -> tuple[Tensor, Tensor]:
        """(random points of each stage, (K, P, 2); its mask features there, (K, B, D, P)), P being 0 without masks."""
        device = stages.logits.device
        if not stages.mask_features or not (self.weights["mask"] or self.weights["dice"]):
            return torch.empty(len(stages.logits), 0, 2, device=device), torch.empty(0)
        height, width = stages.mask_features[0][0].shape[:2]
        count = height * width // self.point_ratio
        points = torch.cat([torch.rand(1, count, 2, device=device) for _ in stages.mask_features])
        sampled = []
        for features, at in zip(stages.mask_features, points, strict=True):
            index, x, y = neighbours(at, (height, width))
            values = torch.stack([maps.flatten(0, 1)[index].T for maps in features])
            sampled.append(blend(full_precision(values), x, y))
        return points, torch.stack(sampled)

    def _box_cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        """(k, Q, n) from logits (k, Q, C), boxes (k, Q, 4) and those of n objects."""
        own = logits[..., labels]
        p = own.sigmoid()
        positive = self.focal_alpha * (1 - p).square() * -F.logsigmoid(own)
        negative = (1 - self.focal_alpha) * p.square() * -F.logsigmoid(-own)
        found, wanted = boxes.unsqueeze(-2), target_boxes
        distance = torch.stack([(a - b).abs() for a, b in zip(found.unbind(-1), wanted.unbind(-1), strict=True)]).sum(0)
        _, giou = overlaps(found, wanted)
        return (
            self.weights["class"] * (positive - negative)
            + self.weights["box"] * distance
            - self.weights["giou"] * giou
        )  # fmt: skip

    def _mask_cost(self, found: Tensor, truth: Tensor) -> Tensor:
        """(k, Q, n) from logits (k, Q, P) and truth (k, n, P) in {0, 1} at P points."""
        truth = truth.mT
        # softplus(x) - x·t is the cross entropy: a product of matrices instead of all pairs' points.
        cross_entropy = (F.softplus(found).sum(-1, keepdim=True) - found @ truth) / found.shape[-1]
        p = found.sigmoid()
        dice = 1 - (2 * (p @ truth) + 1) / (p.sum(-1, keepdim=True) + truth.sum(-2, keepdim=True) + 1)
        return self.weights["mask"] * cross_entropy + self.weights["dice"] * dice


def assign(costs: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(queries, objects), both (K, R) int64, of the least cost for costs (K, Q, n): R is groups · min(Q / groups, n).

    Costs that are not finite are replaced, in place, by one above all others.
    """
    count, queries, objects = costs.shape
    finite = np.isfinite(costs)
    if not finite.all():
        costs[~finite] = costs.max(where=finite, initial=0) + 1
    size = queries // groups
    pairs = [linear_sum_assignment(cost) for cost in costs.reshape(count * groups, size, objects)]
    shape = (count, groups, 2, min(size, objects))
    query, object_ = np.array(pairs, np.int64).reshape(shape).transpose(2, 0, 1, 3)
    query = query + size * np.arange(groups)[:, None]
    return query.reshape(count, -1), object_.reshape(count, -1)


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of the parts begins."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def chunks(count: int, values: int) -> Iterator[slice]:
    """Slices of `count` things of so many values each, one empty slice if there are none."""
    step = max(1, CHUNK // max(1, values))
    for start in range(0, max(1, count), step):
        yield slice(start, min(start + step, count))


# Boxes


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, generalized IoU: Rezatofighi et al. 2019) of boxes (..., 4) as center and size, which broadcast."""
    left, top, right, bottom, area = sides(first)
    left_, top_, right_, bottom_, area_ = sides(second)
    width = torch.minimum(right, right_) - torch.maximum(left, left_)
    height = torch.minimum(bottom, bottom_) - torch.maximum(top, top_)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = area + area_ - intersection
    iou = intersection / union.clamp(min=TINY)
    width = torch.maximum(right, right_) - torch.minimum(left, left_)
    height = torch.maximum(bottom, bottom_) - torch.minimum(top, top_)
    hull = width.clamp(min=0) * height.clamp(min=0)
    return iou, iou - (hull - union) / hull.clamp(min=TINY)


def sides(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(left, top, right, bottom, area) of boxes (..., 4) as center and size."""
    x, y, width, height = boxes.unbind(-1)
    left, top, right, bottom = x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height
    return left, top, right, bottom, (right - left) * (bottom - top)


# Points, (..., 2) x and y in [0, 1] over a whole map
#
# Bilinear values are those of `F.grid_sample` with its border and corners not aligned. Gathering takes as long, needs
# no copies of maps that share points, works on every device and is deterministic in backward.


def neighbours(points: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """(where in a flat map the four pixels around points (..., P, 2) are, (..., 4·P); the points' place between them,
    x and y, (..., P) in [0, 1])."""
    height, width = size
    x = (points[..., 0] * width - 0.5).clamp(0, width - 1)
    y = (points[..., 1] * height - 0.5).clamp(0, height - 1)
    left, top = x.long().clamp(max=max(0, width - 2)), y.long().clamp(max=max(0, height - 2))
    right, below = min(1, width - 1), min(1, height - 1) * width
    corner = top * width + left
    index = torch.cat([corner, corner + right, corner + below, corner + below + right], -1)
    return index, x - left, y - top


def blend(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values (..., 4·P) at neighbours: (..., P) in between."""
    upper_left, upper_right, lower_left, lower_right = values.unflatten(-1, (4, -1)).unbind(-2)
    x, y = x.to(values.dtype), y.to(values.dtype)
    return torch.lerp(torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x), y)


def labels_at(maps: Tensor, image: int | Tensor, layer: Tensor, points: Tensor) -> Tensor:
    """Label maps (B, L, H, W) at points (..., P, 2), of the nearest pixel: (..., P). Image and layer broadcast.

    Halves are rounded as `F.grid_sample` does it, but a label map need not be copied for each object.
    """
    height, width = maps.shape[-2:]
    x = (points[..., 0] * width - 0.5).round().clamp(0, width - 1)
    y = (points[..., 1] * height - 0.5).round().clamp(0, height - 1)
    return maps.flatten(2)[image, layer, y.long() * width + x.long()]

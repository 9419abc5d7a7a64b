"""The set criterion: equal to the plain way of computing it, and finite with whatever objects there are."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import instance_loss
import matcher
from errors import UserError
from instance_loss import InstanceCriterion, at_points, negative_sum
from matcher import HungarianMatcher, Stages, assign, blend, labels_at, neighbours, overlaps
from samples import InstanceTarget
from settings import InstanceLossSettings
from tests.conftest import needs_cuda

WEIGHTS = InstanceLossSettings().weights
GROUPS, QUERIES, CLASSES, WIDTH, SIZE, INPUT = 3, 7, 5, 6, (20, 24), (80, 96)


def outputs_of(images: int = 2, layers: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a model says in training, at random; every tensor is a leaf."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outputs = {}
    for prefix, lead in (("", (layers, images)), ("encoder_", (images,))):
        rows = (*lead, GROUPS * QUERIES)
        outputs[f"{prefix}logits"] = normal(*rows, CLASSES)
        outputs[f"{prefix}boxes"] = torch.cat([normal(*rows, 2) / 8 + 0.5, normal(*rows, 2).exp() / 5], -1)
        outputs[f"{prefix}mask_queries"] = normal(*rows, WIDTH)
        outputs[f"{prefix}mask_features"] = normal(*lead, WIDTH, *SIZE)
    outputs["mask_bias"] = normal(1)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in outputs.items()}


def targets_of(counts: list[int], boxes: Tensor | None = None) -> InstanceTarget:
    """Objects at random; the label maps have two layers, in which later objects hide parts of earlier ones."""
    generator = torch.Generator().manual_seed(2)
    total = sum(counts)
    if boxes is None:
        boxes = torch.rand(total, 4, generator=generator) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + 0.1
    maps = torch.zeros(len(counts), 2, *INPUT, dtype=torch.int16)
    layer_of = torch.arange(total) % 2
    scale = torch.tensor([INPUT[1], INPUT[0]])
    own = itertools.chain.from_iterable(((image, i + 1) for i in range(n)) for image, n in enumerate(counts))
    for (image, number), layer, box in zip(own, layer_of.tolist(), boxes, strict=True):
        (x0, y0), (x1, y1) = ((box[:2] + side * box[2:] / 2).mul(scale).round().int() for side in (-1, 1))
        maps[image, layer, max(0, y0) : y1, max(0, x0) : x1] = number
    labels = torch.randint(CLASSES, (total,), generator=generator)
    return InstanceTarget(counts=counts, labels=labels, boxes=boxes, maps=maps, layer_of=layer_of)


def criterion_of(weights: dict[str, float] | None = None, **settings: Any) -> InstanceCriterion:
    return InstanceCriterion(weights or WEIGHTS, groups=settings.pop("groups", GROUPS), **settings)


def losses_of(criterion: InstanceCriterion, outputs: dict[str, Tensor], targets: InstanceTarget) -> dict[str, Tensor]:
    batch = SimpleNamespace(targets=targets)
    return criterion(outputs, batch, criterion.counts(batch))


def gradients_of(losses: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.stack(list(losses.values())).sum()
    return dict(zip(outputs, torch.autograd.grad(total, list(outputs.values())), strict=True))


def same_rows(*shape: int, device: Any = None) -> Tensor:
    """In place of torch.rand(N, P, 2): the same points for each row."""
    points = torch.empty(shape[1:]).uniform_(generator=torch.Generator().manual_seed(shape[1]))
    return points.to(device or "cpu").expand(shape).contiguous()


# --- the plain way


def plain_terms(outputs: dict[str, Tensor], targets: InstanceTarget) -> dict[str, list[Tensor]]:
    """Every term of every stage, from full masks, one object and one query after the other."""
    last = len(outputs["logits"]) - 1
    stages = [{name: value[k] for name, value in outputs.items() if not name.startswith(("encoder", "mask_bias"))}
              for k in (last, *range(last))]  # fmt: skip
    stages.append({name[8:]: value for name, value in outputs.items() if name.startswith("encoder")})
    images = range(len(targets.counts))
    firsts = np.cumsum([0, *targets.counts])
    masks = [torch.stack([targets.maps[b, targets.layer_of[firsts[b] + i]] == i + 1 for i in range(n)]).double()
             if n else torch.zeros(0, *INPUT).double() for b, n in enumerate(targets.counts)]  # fmt: skip
    truth = torch.cat(masks)

    def sample(maps: Tensor, points: Tensor, mode: str = "bilinear") -> Tensor:
        grid = (2 * points.to(maps.dtype) - 1).unsqueeze(2)
        return F.grid_sample(maps.unsqueeze(1), grid, mode, "border", align_corners=False)[:, 0, :, 0]

    drawn = [torch.rand(1, SIZE[0] * SIZE[1] // 16, 2) for _ in stages]
    matches = []
    for stage, points in zip(stages, drawn, strict=True):
        found = torch.einsum("bqd,bdhw->bqhw", stage["mask_queries"], stage["mask_features"]) + outputs["mask_bias"]
        stage["masks"] = found
        pairs = []
        for b in images:
            objects = range(firsts[b], firsts[b + 1])
            at = sample(found[b], points.expand(found.shape[1], -1, -1))
            wanted = sample(masks[b], points.expand(len(objects), -1, -1), "nearest") if objects else None
            for g in range(GROUPS):
                cost = np.zeros((QUERIES, len(objects)))
                for q, i in itertools.product(range(QUERIES), objects):
                    row, t = g * QUERIES + q, wanted[i - firsts[b]]
                    x = stage["logits"][b, row, targets.labels[i]]
                    p, mask = x.sigmoid(), at[row].sigmoid()
                    box, other = stage["boxes"][b, row], targets.boxes[i].double()
                    dice = 1 - (2 * (mask * t).sum() + 1) / (mask.sum() + t.sum() + 1)
                    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
                    entropy = F.binary_cross_entropy_with_logits(at[row], t)
                    distance = (box - other).abs().sum() - 0.4 * plain_giou(box, other)[1]
                    cost[q, i - firsts[b]] = float((2 * focal + 5 * distance + 5 * entropy + 5 * dice).detach())
                for q, i in zip(*matcher.linear_sum_assignment(cost), strict=True):
                    pairs.append((b, g * QUERIES + q, firsts[b] + i))
        matches.append(pairs)

    terms: dict[str, list[Tensor]] = {name: [] for name in InstanceCriterion.terms}
    for stage, pairs in zip(stages, matches, strict=True):
        image, query, chosen = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3).unbind(1)
        p = stage["logits"].sigmoid()
        weight, target = p**2, torch.zeros_like(p)
        boxes, wanted = stage["boxes"][image, query], targets.boxes[chosen].double()
        giou = [plain_giou(a, b) for a, b in zip(boxes, wanted, strict=True)]
        for (b, q, i), (iou, _) in zip(pairs, giou, strict=True):
            label = targets.labels[i]
            quality = max(p[b, q, label].item() ** 0.25 * iou.item() ** 0.75, 0.01)
            target[b, q, label], weight[b, q, label] = quality, 1 - quality
        terms["class"].append((-target * p.log() - weight * (1 - p).log()).sum())
        terms["box"].append((boxes - wanted).abs().sum())
        terms["giou"].append(sum((1 - each for _, each in giou), torch.zeros(())))
        own = stage["masks"][image, query]
        count = max(SIZE[0], SIZE[0] * SIZE[1] // 16)
        candidates = torch.rand(len(pairs), 3 * count, 2)
        keep = sample(own, candidates).abs().argsort(1)[:, : int(0.75 * count)]
        hard = candidates[torch.arange(len(pairs))[:, None], keep]
        points = torch.cat([hard, torch.rand(len(pairs), count - int(0.75 * count), 2)], 1)
        at, t = sample(own, points), sample(truth[chosen], points, "nearest")
        terms["mask"].append(F.binary_cross_entropy_with_logits(at, t, reduction="none").mean(1).sum())
        dice = 1 - (2 * (at.sigmoid() * t).sum(1) + 1) / (at.sigmoid().sum(1) + t.sum(1) + 1)
        terms["dice"].append(dice.sum())
    pairs_in_all = max(1, sum(targets.counts) * GROUPS)
    return {name: [value / pairs_in_all for value in values] for name, values in terms.items()}


def plain_giou(box: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    (a0, a1), (b0, b1) = ((each[:2] - each[2:] / 2, each[:2] + each[2:] / 2) for each in (box, other))
    intersection = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod()
    union = box[2:].prod() + other[2:].prod() - intersection
    hull = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod()
    return intersection / union, intersection / union - (hull - union) / hull


@pytest.mark.parametrize("counts", [[4, 3], [2, 0], [1, 9]])
def test_it_is_what_the_plain_way_computes(counts: list[int]) -> None:
    outputs, targets = outputs_of(), targets_of(counts)
    criterion = criterion_of()
    torch.manual_seed(0)
    terms = criterion.stage_terms(outputs, targets, torch.tensor(float(sum(counts))))
    torch.manual_seed(0)
    plain = {name: torch.stack(values) for name, values in plain_terms(outputs, targets).items()}
    for name in InstanceCriterion.terms:
        torch.testing.assert_close(terms[name], plain[name], rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    found = gradients_of(losses_of(criterion, outputs, targets), outputs)
    wanted = gradients_of({name: values.sum() * WEIGHTS[name] for name, values in plain.items()}, outputs)
    for name in outputs:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)


# --- what they are made of


@pytest.mark.parametrize("size", [(9, 13), (1, 4), (16, 16)])
def test_points_are_sampled_as_grid_sample_does(size: tuple[int, int]) -> None:
    maps = torch.randn(3, *size, dtype=torch.float64, requires_grad=True)
    points = torch.rand(3, 50, 2)
    points[:, :5] = torch.tensor([[0, 0], [1, 1], [0, 1], [0.5, 0.5], [1, 0]])
    grid = (2 * points.double() - 1).unsqueeze(2)
    wanted = F.grid_sample(maps.unsqueeze(1), grid, "bilinear", "border", align_corners=False)[:, 0, :, 0]
    torch.testing.assert_close(at_points(maps.split([2, 0, 1]), points), wanted, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda maps: at_points([maps], points), maps)
    index, x, y = neighbours(points[0], size)  # the same points for all
    shared = blend(maps.flatten(1)[:, index], x, y)
    torch.testing.assert_close(shared, at_points([maps], points[:1].expand(3, -1, -1)))

    labels = torch.randint(0, 4, (3, 2, *size), dtype=torch.int16)
    layer = torch.tensor([0, 1, 1])
    chosen = labels[torch.arange(3), layer].unsqueeze(1).double()
    nearest = F.grid_sample(chosen, grid, "nearest", "border", align_corners=False)[:, 0, :, 0]
    inner = points.mul(torch.tensor([size[1], size[0]])).frac().sub(0.5).abs().amin(-1) < 0.499  # ties are no one's
    found = labels_at(labels, torch.arange(3)[:, None], layer[:, None], points)
    assert torch.equal(found[inner], nearest[inner].to(torch.int16))


def test_sums_of_negatives_and_overlaps() -> None:
    logits = torch.cat([torch.randn(2, 6, dtype=torch.float64) * 5, torch.tensor([[-800.0], [90.0]])], 1)
    wanted = (logits.sigmoid() ** 2 * -F.logsigmoid(-logits)).sum(1)
    torch.testing.assert_close(negative_sum(logits), wanted)
    assert torch.autograd.gradcheck(negative_sum, logits.requires_grad_())
    point = torch.zeros(4).requires_grad_()
    for other in (torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 1.0, 1.0])):
        iou, giou = overlaps(point, other)
        assert iou == 0
        assert torch.isfinite(torch.autograd.grad(giou, point)[0]).all()
    assert overlaps(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 1.0])) == (1.0, 1.0)


@pytest.mark.parametrize(("queries", "objects"), [(4, 3), (3, 4), (2, 0)])
def test_an_assignment_is_the_best_of_all(queries: int, objects: int) -> None:
    costs = np.random.default_rng(0).normal(size=(2, 3 * queries, objects)).astype(np.float32)
    query, chosen = assign(costs, 3)
    assert query.shape == chosen.shape == (2, 3 * min(queries, objects))
    for k, g in itertools.product(range(2), range(3)):
        part = slice(g * min(queries, objects), (g + 1) * min(queries, objects))
        cost = costs[k, g * queries : (g + 1) * queries]
        wide = cost if queries >= objects else cost.T
        best = min(
            sum(wide[q, i] for i, q in enumerate(order))
            for order in itertools.permutations(range(max(queries, objects)), min(queries, objects))
        )
        assert costs[k, query[k, part], chosen[k, part]].sum() == pytest.approx(best, abs=1e-6)
        assert (np.diff(query[k, part]) > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_the_worst(value: float) -> None:
    costs = np.array([[[-9.0, value], [value, -1.0], [3e38, 3e38]]], np.float32)
    query, chosen = assign(costs, 1)
    assert query.tolist() == [[0, 1]]
    assert chosen.tolist() == [[0, 1]]
    assert assign(np.full((1, 4, 2), value, np.float32), 2)[0].shape == (1, 4)


# --- whatever comes


def full_boxes(count: int) -> Tensor:
    return torch.tensor([[0.5, 0.5, 1.0, 1.0]]).repeat(count, 1)


@pytest.mark.parametrize(
    ("counts", "boxes"),
    [
        ([0, 0], None),
        ([0, 5], None),
        ([30, 2], None),  # more than queries
        ([2, 1], full_boxes(3)),
        ([2, 1], full_boxes(3) * torch.tensor([1, 1, 0, 0])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_and_every_output_has_a_gradient(
    counts: list[int], boxes: Tensor | None, dtype: torch.dtype
) -> None:
    outputs, targets = outputs_of(dtype=dtype), targets_of(counts, boxes)
    losses = losses_of(criterion_of(), outputs, targets)
    assert list(losses) == list(InstanceCriterion.terms)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        assert loss > 0 if sum(counts) or name == "class" else loss == 0
    for gradient in gradients_of(losses, outputs).values():
        assert torch.isfinite(gradient).all()


def test_outputs_that_are_not_finite_never_raise() -> None:
    outputs = {name: tensor.detach() for name, tensor in outputs_of().items()}
    outputs["boxes"][0, 0, :9] = torch.inf
    outputs["logits"][1, 1] = torch.nan
    outputs["encoder_mask_features"][0] = -torch.inf
    losses = losses_of(criterion_of(), outputs, targets_of([3, 2]))
    assert any(loss.isnan() for loss in losses.values())


@pytest.mark.parametrize("groups", [1, 3, 7, 21])
def test_groups_are_matched_independently(groups: int) -> None:
    outputs, targets = outputs_of(), targets_of([2, 1])
    matches = HungarianMatcher(WEIGHTS, groups=groups, point_ratio=16, focal_alpha=0.25)(Stages.of(outputs), targets)
    each = min(2, 21 // groups) * groups
    assert matches.per_image == [each, groups]
    assert matches.query.shape == (3, each + groups)
    found = matches.query // (21 // groups)
    assert (found[:, each:].sort(1).values == torch.arange(groups)).all()
    assert matches.object[:, each:].eq(2).all()
    with pytest.raises(ValueError, match="21 queries cannot be split into 4 groups"):
        HungarianMatcher(WEIGHTS, groups=4, point_ratio=16, focal_alpha=0.25)(Stages.of(outputs), targets)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, targets = outputs_of(), targets_of([6, 4])
    monkeypatch.setattr(torch, "rand", same_rows)
    whole = losses_of(criterion_of(), outputs, targets)
    expected = gradients_of(whole, outputs)
    monkeypatch.setattr(matcher, "CHUNK", 4 * SIZE[0] * SIZE[1])
    plain, calls = instance_loss.matched_masks, itertools.count()

    def counted(*args: Any) -> list[Tensor]:
        next(calls)
        return plain(*args)

    monkeypatch.setattr(instance_loss, "matched_masks", counted)
    parts = losses_of(criterion_of(), outputs, targets)
    for name, loss in whole.items():
        torch.testing.assert_close(parts[name], loss)
    forward = next(calls)
    for name, gradient in gradients_of(parts, outputs).items():
        torch.testing.assert_close(gradient, expected[name])
    assert next(calls) == 2 * forward + 1 > 7  # each chunk was computed again in backward


def test_micro_batches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, whole, criterion = outputs_of(3), targets_of([4, 0, 3]), criterion_of()
    monkeypatch.setattr(torch, "rand", same_rows)
    expected = losses_of(criterion, outputs, whole)
    counts = {"objects": torch.tensor(7.0)}
    sums = dict.fromkeys(expected, torch.zeros(()))
    for image, objects in enumerate([slice(0, 4), slice(4, 4), slice(4, 7)]):
        b = slice(image, image + 1)
        part = {name: value if name == "mask_bias" else value[b] if name.startswith("encoder") else value[:, b]
                for name, value in outputs.items()}  # fmt: skip
        own = InstanceTarget([whole.counts[image]], whole.labels[objects], whole.boxes[objects], whole.maps[b],
                             whole.layer_of[objects])  # fmt: skip
        for name, loss in criterion(part, SimpleNamespace(targets=own), counts).items():
            sums[name] = sums[name] + loss
    for name, loss in expected.items():
        torch.testing.assert_close(sums[name], loss)


def test_masks_may_be_absent() -> None:
    outputs = {name: value for name, value in outputs_of().items() if "mask" not in name}
    state = torch.get_rng_state()
    losses = losses_of(criterion_of(), outputs, targets_of([2, 3]))
    assert list(losses) == ["class", "box", "giou"]
    assert torch.equal(state, torch.get_rng_state())  # no masks, no points
    single = {name: value for name, value in outputs.items() if not name.startswith("encoder")}
    assert losses_of(criterion_of(), single, targets_of([2, 3]))["box"] < losses["box"]
    with pytest.raises(UserError, match="terms of masks alone, but the model has no masks"):
        losses_of(criterion_of({"mask": 1.0, "dice": 1.0, "box": 0.0}), outputs, targets_of([2, 3]))


def test_weights_and_phases() -> None:
    outputs, targets = outputs_of(), targets_of([2, 3])

    def seeded(criterion: InstanceCriterion) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return losses_of(criterion, outputs, targets)

    expected = seeded(criterion_of())
    some = seeded(criterion_of({"box": 1.0, "mask": 2.0, "dice": 0.0}))
    assert set(some) == {"box", "mask"}
    torch.testing.assert_close(some["box"] * 5, expected["box"])
    torch.testing.assert_close(some["mask"] * 2.5, expected["mask"])
    criterion = criterion_of()
    criterion.set_phase({"class": 0.5, "giou": 0})
    phased = seeded(criterion)
    torch.testing.assert_close(phased["class"] * 2, expected["class"])
    assert "giou" not in phased
    # Matched by boxes alone, boxes are nearer.
    others = dict.fromkeys(("class", "giou", "mask", "dice"), 0.0)
    assert seeded(criterion_of(matching=others))["box"] < expected["box"]


def test_what_cannot_be_meant() -> None:
    with pytest.raises(UserError, match=r"unknown term 'masks' \(did you mean mask\?\)"):
        criterion_of({"masks": 1.0})
    with pytest.raises(UserError, match="unknown term 'bbox'"):
        criterion_of(matching={"bbox": 1.0})
    with pytest.raises(UserError, match="nothing to match by"):
        criterion_of(matching=dict.fromkeys(WEIGHTS, 0.0))
    few = {name: each[:, GROUPS:] if name.startswith("encoder_") else each for name, each in outputs_of().items()}
    with pytest.raises(UserError, match=r"fewer places for objects than model\.num_queries"):
        losses_of(criterion_of(), few, targets_of([1, 1]))
    settings = asdict(InstanceLossSettings())
    for name in ("last_epochs", "last_epochs_factors"):
        settings.pop(name)
    assert vars(InstanceCriterion(**settings).matcher) == vars(criterion_of(groups=13).matcher)


@needs_cuda
def test_the_host_waits_once_on_a_gpu() -> None:
    outputs = {name: value.detach().cuda().requires_grad_() for name, value in outputs_of(dtype=torch.float32).items()}
    targets = targets_of([4, 3]).to("cuda")

    def step() -> None:
        torch.stack(list(losses_of(criterion_of(), outputs, targets).values())).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing") as waits:
        step()
    torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in waits if "synchronizing" in str(each.message)]) == 1

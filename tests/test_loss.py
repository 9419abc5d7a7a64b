"""What the criterion promises beyond the official values: additivity, finite extremes, phases, plain errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from loss import BinaryCriterion, iou, patch_iou, ssim_map, structure

ALL_TERMS = dict.fromkeys(BinaryCriterion.terms, 1.0)


def batch_of(masks: Tensor, class_ids: list[int] | None = None) -> SimpleNamespace:
    ids = torch.tensor(class_ids if class_ids is not None else [-1] * len(masks))
    return SimpleNamespace(targets=SimpleNamespace(masks=masks, class_ids=ids))


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def loss_of(criterion: BinaryCriterion, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    batch = batch_of(masks)
    return criterion({"logits": logits}, batch, criterion.counts(batch))


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def all_outputs(images: int, size: int = 72, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def maps(*shape: int) -> Tensor:
        return torch.randn(images, *shape, dtype=dtype).requires_grad_()

    return {
        "logits": maps(1, size, size),
        "levels": [maps(1, size // 8, size // 8), maps(1, size // 4, size // 4)],
        "gradient_logits": [maps(1, size // 8, size // 8), maps(1, size // 4, size // 4)],
        "gradient_labels": [maps(1, size, size), maps(1, size, size)],
        "class_logits": maps(5),
    }


def part(outputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {k: [m[rows] for m in v] if isinstance(v, list) else v[rows] for k, v in outputs.items()}


def flat(outputs: dict[str, Any]) -> list[Tensor]:
    return [m for v in outputs.values() for m in (v if isinstance(v, list) else [v])]


@pytest.mark.parametrize("iou_reduction", ["mean", "sum"])
def test_unequal_micro_batches_add_up_to_the_big_batch(iou_reduction: Any) -> None:
    torch.manual_seed(0)
    criterion = BinaryCriterion(ALL_TERMS, iou_reduction=iou_reduction)
    outputs = all_outputs(5)
    masks, class_ids = torch.rand(5, 1, 72, 72, dtype=torch.float64), [0, -1, -1, 4, 2]
    whole = batch_of(masks, class_ids)
    expected = criterion(outputs, whole, criterion.counts(whole))
    assert set(expected) == set(BinaryCriterion.terms)
    expected_gradients = torch.autograd.grad(total(expected), flat(outputs))

    rows = [slice(0, 3), slice(3, 4), slice(4, 5)]
    batches = [batch_of(masks[r], class_ids[r]) for r in rows]
    per_batch = [criterion.counts(batch) for batch in batches]
    counts = {name: torch.stack([c[name] for c in per_batch]).sum() for name in per_batch[0]}
    losses = [criterion(part(outputs, r), batch, counts) for r, batch in zip(rows, batches, strict=True)]
    for term in expected:
        torch.testing.assert_close(sum(loss[term] for loss in losses), expected[term], rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(torch.stack([total(loss) for loss in losses]).sum(), flat(outputs))
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_micro_batches_of_different_sizes_average_over_pixels() -> None:
    criterion = BinaryCriterion({"mae": 1})
    batches = [batch_of(torch.zeros(1, 1, 8, 8)), batch_of(torch.ones(2, 1, 16, 4))]
    logits = [torch.zeros(1, 1, 8, 8), torch.full((2, 1, 16, 4), 30.0)]
    counts = {"pixels": sum(criterion.counts(batch)["pixels"] for batch in batches)}
    losses = [criterion({"logits": x}, batch, counts)["mae"] for x, batch in zip(logits, batches, strict=True)]
    assert sum(losses).item() == pytest.approx(0.5 * 64 / 192)


def test_an_empty_mask_predicted_as_empty_costs_nothing() -> None:
    logits = torch.full((2, 1, 96, 80), -200.0, requires_grad=True)
    losses = loss_of(
        BinaryCriterion({"iou": 1, "iou_patch": 1, "ssim": 1, "structure": 1}), logits, torch.zeros(2, 1, 96, 80)
    )
    for value in losses.values():
        assert value.item() == pytest.approx(0, abs=1e-6)
    total(losses).backward()
    assert torch.isfinite(gradient_of(logits)).all()
    assert loss_of(BinaryCriterion({"iou": 1}, iou_smooth=0), logits, torch.zeros(2, 1, 96, 80))["iou"].isnan()


def test_predicting_on_an_empty_mask_is_pushed_down() -> None:
    logits = torch.zeros(1, 1, 64, 64, requires_grad=True)
    loss_of(BinaryCriterion({"iou": 1}), logits, torch.zeros(1, 1, 64, 64))["iou"].backward()
    assert (gradient_of(logits) > 0).all()


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(logit: float, alpha: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, 1, 70, 66), logit, dtype=dtype, requires_grad=True)
    losses = loss_of(BinaryCriterion(ALL_TERMS), logits, torch.full((1, 1, 70, 66), alpha))
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert all(torch.isfinite(value) for value in losses.values())
    total(losses).backward()
    assert torch.isfinite(gradient_of(logits)).all()


def test_autocast_does_not_change_the_losses() -> None:
    torch.manual_seed(0)
    criterion, outputs = BinaryCriterion(ALL_TERMS), all_outputs(2, dtype=torch.float32)
    batch = batch_of(torch.rand(2, 1, 72, 72), [1, -1])
    expected = criterion(outputs, batch, criterion.counts(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(outputs, batch, criterion.counts(batch))
    assert {name: value.item() for name, value in losses.items()} == {
        name: value.item() for name, value in expected.items()
    }


def test_a_soft_alpha_is_learned_as_soft() -> None:
    alpha = torch.full((1, 1, 64, 64), 0.3)
    for weights in ({"bce": 1}, {"mae": 1}, {"mse": 1}, {"ssim": 1}):
        criterion = BinaryCriterion(weights)
        values = [total(loss_of(criterion, torch.full_like(alpha, p).logit(), alpha)).item() for p in (0.1, 0.3, 0.5)]
        assert min(values) == values[1]


def test_ssim_equals_a_direct_window_sum() -> None:
    torch.manual_seed(0)
    prediction, target = torch.rand(2, 20, 24, dtype=torch.float64)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def local_mean(maps: Tensor) -> Tensor:
        return (F.pad(maps, (5, 5, 5, 5)).unfold(0, 11, 1).unfold(1, 11, 1) * window).sum((-2, -1))

    mean_p, mean_t = local_mean(prediction), local_mean(target)
    var_p, var_t = local_mean(prediction**2) - mean_p**2, local_mean(target**2) - mean_t**2
    covariance = local_mean(prediction * target) - mean_p * mean_t
    expected = (2 * mean_p * mean_t + 1e-4) * (2 * covariance + 9e-4)
    expected = expected / ((mean_p**2 + mean_t**2 + 1e-4) * (var_p + var_t + 9e-4))
    torch.testing.assert_close(ssim_map(prediction, target), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(48, 40), (64, 64), (130, 200)])
def test_patch_iou_sees_every_window(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    prediction, target = torch.rand(2, 3, *size, dtype=torch.float64)
    windows = [
        iou(prediction[:, y : y + 64, x : x + 64], target[:, y : y + 64, x : x + 64])
        for y in range(0, size[0], 64)
        for x in range(0, size[1], 64)
    ]
    torch.testing.assert_close(patch_iou(prediction, target), torch.stack(windows, -1))


def test_the_corner_switch_ignores_the_rest() -> None:
    masks = torch.zeros(1, 1, 128, 128)
    masks[..., 64:, 64:] = 1
    logits = torch.full((1, 1, 128, 128), -200.0)
    corner = BinaryCriterion({"iou_patch": 1}, patch_iou="corner")
    assert loss_of(corner, logits, masks)["iou_patch"].item() == 0
    missed = loss_of(BinaryCriterion({"iou_patch": 1}), logits, masks)["iou_patch"].item()
    assert missed == pytest.approx((1 - 1 / 4097) / 4)


def test_structure_weighs_edges_more() -> None:
    target = torch.zeros(1, 96, 96)
    target[:, :, 48:] = 1
    sure = (2 * target - 1) * 20
    at_edge, inside = sure.clone(), sure.clone()
    at_edge[:, :, 47], inside[:, :, 10] = 20, 20
    assert structure(at_edge, target).item() > 2 * structure(inside, target).item() > 0


@pytest.mark.parametrize(("reduction", "growth"), [("mean", 1), ("sum", 3)])
def test_iou_mean_does_not_grow_with_the_batch(reduction: Any, growth: int) -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 1, 64, 64), (torch.rand(1, 1, 64, 64) > 0.5).float()
    criterion = BinaryCriterion({"iou": 1}, iou_reduction=reduction)
    one = loss_of(criterion, logits, masks)["iou"]
    three = loss_of(criterion, logits.repeat(3, 1, 1, 1), masks.repeat(3, 1, 1, 1))["iou"]
    torch.testing.assert_close(three, growth * one)


def test_the_class_term_averages_over_images_that_have_a_class() -> None:
    torch.manual_seed(0)
    class_logits = torch.randn(3, 4)
    outputs = {"logits": torch.zeros(3, 1, 8, 8), "class_logits": class_logits}
    criterion = BinaryCriterion({"class": 5})
    batch = batch_of(torch.zeros(3, 1, 8, 8), [2, -1, 0])
    expected = 5 * F.cross_entropy(class_logits[[0, 2]], torch.tensor([2, 0]))
    torch.testing.assert_close(criterion(outputs, batch, criterion.counts(batch))["class"], expected)
    nobody = batch_of(torch.zeros(3, 1, 8, 8), [-1, -1, -1])
    assert criterion(outputs, nobody, criterion.counts(nobody))["class"].item() == 0


def test_optional_outputs_may_be_absent() -> None:
    losses = loss_of(BinaryCriterion(ALL_TERMS), torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))
    assert set(losses) == set(BinaryCriterion.terms) - {"gradient", "class"}


def test_a_phase_applies_once_and_can_be_left() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    criterion = BinaryCriterion({"bce": 30, "iou": 0.5, "mae": 100, "ssim": 0})
    normal = loss_of(criterion, logits, masks)
    assert set(normal) == {"bce", "iou", "mae"}
    for _ in range(3):
        criterion.set_phase({"bce": 0, "iou": 0.5, "mae": 0.9})
        phased = loss_of(criterion, logits, masks)
        assert set(phased) == {"iou", "mae"}
        torch.testing.assert_close(phased["iou"], 0.5 * normal["iou"])
        torch.testing.assert_close(phased["mae"], 0.9 * normal["mae"])
    criterion.set_phase({})
    assert loss_of(criterion, logits, masks) == normal


def test_an_unknown_term_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'iou_pach' \(did you mean iou_patch\?\)"):
        BinaryCriterion({"iou_pach": 1})
    with pytest.raises(UserError, match="'maee'"):
        BinaryCriterion({"mae": 1}).set_phase({"maee": 0.9})
    with pytest.raises(UserError, match="no term"):
        BinaryCriterion({"mae": 0})


def test_the_criterion_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    criterion, outputs = BinaryCriterion(ALL_TERMS), all_outputs(2, dtype=torch.float32)
    batch = batch_of(torch.rand(2, 1, 72, 72), [1, -1])
    counts = criterion.counts(batch)
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, batch, counts), criterion(outputs, batch, counts))

"""The semantic criterion: equal to the plain way of computing it, at any size, over bands, micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import semantic_loss
from errors import UserError
from samples import SemanticTarget
from semantic_loss import SemanticCriterion, class_weights, lovasz_softmax, pixel_statistics

CLASSES = 5
ALL_TERMS = dict.fromkeys(SemanticCriterion.terms, 1.0)
# (logits, labels): four times as large, odd, equal, smaller, one row
SIZES = [((8, 12), (32, 48)), ((7, 9), (25, 34)), ((10, 6), (10, 6)), ((16, 18), (9, 5)), ((1, 4), (13, 1))]


def batch_of(labels: Tensor) -> SimpleNamespace:
    return SimpleNamespace(targets=SemanticTarget(labels))


def data(
    images: int = 3, small: tuple[int, int] = (8, 12), large: tuple[int, int] = (32, 48), dtype: Any = torch.float64
) -> tuple[Tensor, Tensor]:
    """(logits, labels): class 3 is nowhere, and every sixth pixel is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(images, CLASSES, *small, generator=generator, dtype=dtype)
    labels = torch.randint(0, 6, (images, *large), generator=generator)
    labels[labels == 3] = 4
    labels[labels == 5] = 255
    return logits.requires_grad_(), labels.byte()


@contextmanager
def small_bands(values: int) -> Iterator[None]:
    kept, semantic_loss.CPU_BAND = semantic_loss.CPU_BAND, values
    try:
        yield
    finally:
        semantic_loss.CPU_BAND = kept


def criterion_of(weights: dict[str, float] | None = None, **settings: Any) -> SemanticCriterion:
    return SemanticCriterion(weights or ALL_TERMS, num_classes=CLASSES, **settings)


def losses_of(criterion: SemanticCriterion, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    batch = batch_of(labels)
    return criterion({"logits": logits}, batch, criterion.counts(batch))


def loss_of(term: str, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return losses_of(criterion_of({term: 1.0}, **settings), logits, labels)[term]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(logits, labels.shape[1:], mode="bilinear")


def assert_same(value: Tensor, expected: Tensor, logits: Tensor, rtol: float = 1e-10) -> None:
    """Two losses and their gradients agree."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    (gradient,), (wanted,) = (torch.autograd.grad(loss, logits) for loss in (value, expected))
    assert wanted.abs().max() > 0
    torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())


# ---------------------------------------------------------------- the plain way


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs_on_resized_logits(small: Any, large: Any, smoothing: float, weighted: bool) -> None:
    logits, labels = data(2, small, large)
    weights = [0.5, 2, 1, 0.25, 3] if weighted else None
    with small_bands(500):
        value = loss_of("ce", logits, labels, class_weights=weights, label_smoothing=smoothing)
        expected = F.cross_entropy(
            resized(logits, labels), labels.long(), ignore_index=255, label_smoothing=smoothing,
            weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        )  # fmt: skip
        assert_same(value, expected, logits, rtol=2e-7)  # the counts are float32


def test_float32_is_as_close_to_float64_as_torchs_own() -> None:
    logits, labels = data(2, (25, 37), (100, 149), dtype=torch.float32)
    exact = F.cross_entropy(resized(logits.double(), labels), labels.long(), ignore_index=255)
    (wanted,) = torch.autograd.grad(exact, logits)
    errors = []
    for loss in (
        loss_of("ce", logits, labels),
        F.cross_entropy(resized(logits, labels), labels.long(), ignore_index=255),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        errors.append((abs(loss.item() - exact.item()), (gradient - wanted).abs().max().item()))
    assert errors[0][0] < 1e-6
    assert errors[0][1] < max(2 * errors[1][1], 1e-9)


def test_focal_is_cross_entropy_of_what_is_not_sure() -> None:
    logits, labels = data()
    for gamma in (0.5, 2.0):
        nll = F.cross_entropy(resized(logits, labels), labels.long(), ignore_index=255, reduction="none")
        expected = ((1 - (-nll).exp()) ** gamma * nll)[labels != 255].mean()
        assert_same(loss_of("focal", logits, labels, focal_gamma=gamma), expected, logits, rtol=2e-7)
    plain = loss_of("ce", logits, labels)
    torch.testing.assert_close(loss_of("focal", logits, labels, focal_gamma=0), plain)


def plain_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition word by word."""
    p = resized(logits, labels).softmax(1) * (labels != 255).unsqueeze(1)
    losses = []
    for label in range(CLASSES):
        truth = (labels == label).double()
        if truth.any():
            losses.append(1 - 2 * (p[:, label] * truth).sum() / (p[:, label].sum() + truth.sum()))
    return torch.stack(losses).mean()


def test_dice_is_over_the_whole_batch_and_the_classes_that_are_there() -> None:
    logits, labels = data()
    with small_bands(500):
        assert_same(loss_of("dice", logits, labels), plain_dice(logits, labels), logits)


def plain_lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Algorithm 1 of the paper, differences and all."""
    valid = labels != 255
    p, truth = resized(logits, labels).softmax(1).movedim(1, -1)[valid], labels[valid]
    losses = []
    for label in truth.unique().tolist():
        there = (truth == label).double()
        errors, order = (there - p[:, label]).abs().sort(descending=True)
        there = there[order]
        jaccard = 1 - (there.sum() - there.cumsum(0)) / (there.sum() + (1 - there).cumsum(0))
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


def test_lovasz_is_that_of_the_paper() -> None:
    logits, labels = data()
    assert_same(loss_of("lovasz", logits, labels), plain_lovasz(logits, labels), logits)
    batch = batch_of(labels)
    criterion = criterion_of({"lovasz": 3.0})
    tripled = criterion({"logits": logits}, batch, criterion.counts(batch))["lovasz"]
    assert_same(tripled, 3 * plain_lovasz(logits, labels), logits)


@pytest.mark.parametrize(("threshold", "kept"), [(0.3, 0.0), (0.7, 1 / 16), (1e-9, 0.25)])
def test_ohem_averages_the_hard_pixels(threshold: float, kept: float) -> None:
    logits, labels = data()
    nll = F.cross_entropy(resized(logits, labels), labels.long(), ignore_index=255, reduction="none")[labels != 255]
    ranked = nll.sort(descending=True).values
    count = max(int((ranked > -math.log(threshold)).sum()), round(kept * labels.numel()))
    assert 0 < count < len(ranked)
    value = loss_of("ohem", logits, labels, ohem_threshold=threshold, ohem_min_kept=kept)
    assert_same(value, ranked[:count].mean(), logits)


def test_ohem_keeps_all_of_fewer_pixels_than_it_is_to_keep() -> None:
    logits, labels = data()
    labels[:, 4:] = 255
    value = loss_of("ohem", logits, labels, ohem_threshold=1e-9, ohem_min_kept=0.9)
    assert_same(value, loss_of("ce", logits, labels), logits, rtol=2e-7)


# ---------------------------------------------------------------- gradients and memory


def test_gradients_of_the_parts_are_those_of_finite_differences() -> None:
    logits, labels = data(2, (4, 3), (9, 10))
    spread = torch.rand(CLASSES, dtype=torch.float64)

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return pixel_statistics(x, labels, spread=spread, sum_classes=True)

    with small_bands(200):
        assert torch.autograd.gradcheck(statistics, (logits,))
    assert torch.autograd.gradcheck(
        lambda x: lovasz_softmax(x, pixel_statistics(x, labels)[1], labels), (logits,), eps=1e-7
    )


def test_bands_do_not_change_the_losses() -> None:
    logits, labels = data(dtype=torch.float32)
    criterion = criterion_of(label_smoothing=0.1, class_weights=[1.0, 2.0, 3.0, 4.0, 5.0])
    found = []
    for values in (1, 3000, 2**30):
        with small_bands(values):
            loss = total(losses_of(criterion, logits, labels))
            found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return result


def test_full_size_logits_never_exist() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 40, 8, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 40, (1, 128, 128), generator=generator).byte()
    criterion = SemanticCriterion(ALL_TERMS, num_classes=40, label_smoothing=0.1)
    with small_bands(40 * 128 * 2), Largest() as largest:
        total(losses_of(criterion, logits, labels)).backward()
    assert largest.values <= 2 * labels.numel()  # of 40 times as many full-size logits
    with Largest() as largest:
        F.cross_entropy(resized(logits, labels), labels.long()).backward()
    assert largest.values == 40 * labels.numel()


# ---------------------------------------------------------------- micro-batches and ranks


def step_loss(
    criterion: SemanticCriterion, logits: Tensor, labels: Tensor, parts: list[slice]
) -> tuple[dict[str, Tensor], Tensor]:
    """(losses, gradient) of one optimizer step over micro-batches, as the loop computes them."""
    batches = [batch_of(labels[part]) for part in parts]
    counts = {"pixels": torch.stack([criterion.counts(batch)["pixels"] for batch in batches]).sum()}
    found = [criterion({"logits": logits[part]}, batch, counts) for part, batch in zip(parts, batches, strict=True)]
    losses = {term: torch.stack([each[term] for each in found]).sum() for term in found[0]}
    return losses, torch.autograd.grad(total(losses), logits)[0]


def test_additive_terms_of_unequal_micro_batches_are_those_of_the_big_batch() -> None:
    logits, labels = data(4)
    labels[1] = 255
    labels[2, :20] = 255
    criterion = criterion_of({"ce": 1, "focal": 2}, class_weights=[1.0, 0.5, 2.0, 1.0, 3.0], label_smoothing=0.1)
    whole, gradient = step_loss(criterion, logits, labels, [slice(0, 4)])
    for parts in ([slice(0, 1), slice(1, 2), slice(2, 4)], [slice(0, 3), slice(3, 4)]):
        losses, found = step_loss(criterion, logits, labels, parts)
        torch.testing.assert_close(losses, whole, rtol=1e-6, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("term", ["dice", "lovasz", "ohem"])
def test_terms_of_a_whole_batch_count_by_their_share_of_the_pixels(term: str) -> None:
    logits, labels = data(3)
    labels[2, :16] = 255
    parts = [slice(0, 2), slice(2, 3)]
    losses, _ = step_loss(criterion_of({term: 1.0}), logits, labels, parts)
    pixels = [(labels[part] != 255).sum().item() for part in parts]
    alone = [loss_of(term, logits[part], labels[part]).item() for part in parts]
    expected = sum(value * count for value, count in zip(alone, pixels, strict=True)) / sum(pixels)
    assert losses[term].item() == pytest.approx(expected, rel=1e-6)


def loss_on_rank(rank: int, world_size: int, folder: str) -> None:
    """As train.py does: counts summed over the ranks, the loss times their number, the gradient's mean."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    logits, labels = data(4)
    labels[3, :16] = 255
    scale = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.ones_(scale.weight)
    model = torch.nn.parallel.DistributedDataParallel(scale)
    criterion, batch = criterion_of(), batch_of(labels[2 * rank : 2 * rank + 2])
    counts = criterion.counts(batch)
    dist.all_reduce(counts["pixels"])
    outputs = model(logits[2 * rank : 2 * rank + 2].detach().unsqueeze(-1)).squeeze(-1)
    losses = criterion({"logits": outputs}, batch, counts)
    (total(losses) * world_size).backward()
    values = torch.stack([losses[term].detach() for term in sorted(losses)])
    dist.all_reduce(values)
    torch.save({"losses": values, "gradient": scale.weight.grad}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_on_what_two_micro_batches_do(tmp_path: Path) -> None:
    logits, labels = data(4)
    labels[3, :16] = 255
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses, _ = step_loss(criterion_of(), logits, labels, [slice(0, 2), slice(2, 4)])
    scaled = logits.detach() * scale
    batches = [batch_of(part) for part in labels.split(2)]
    criterion = criterion_of()
    counts = {"pixels": torch.stack([criterion.counts(batch)["pixels"] for batch in batches]).sum()}
    for part, batch in zip(scaled.split(2), batches, strict=True):
        total(criterion({"logits": part}, batch, counts)).backward(retain_graph=True)
    mp.spawn(loss_on_rank, args=(2, str(tmp_path)), nprocs=2)
    assert scale.grad is not None
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["losses"], torch.stack([losses[term] for term in sorted(losses)]))
        torch.testing.assert_close(found["gradient"].squeeze(), scale.grad)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("term", ALL_TERMS)
def test_ignored_pixels_change_nothing(term: str) -> None:
    logits, labels = data(1, (8, 12), (8, 12))
    value = loss_of(term, logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    ignored = (labels == 255).unsqueeze(1).expand_as(logits)
    assert gradient[ignored].abs().max() == 0
    changed = torch.where(ignored, torch.randn_like(logits), logits)
    assert loss_of(term, changed, labels).item() == pytest.approx(value.item(), rel=1e-12)
    out_of_range = torch.where(labels == 255, torch.tensor(CLASSES + 3, dtype=torch.uint8), labels)
    assert loss_of(term, logits, out_of_range).item() == value.item()


def test_nothing_but_ignored_pixels_costs_nothing() -> None:
    logits, labels = data()
    losses = losses_of(criterion_of(label_smoothing=0.1), logits, torch.full_like(labels, 255))
    assert {term: value.item() for term, value in losses.items()} == dict.fromkeys(ALL_TERMS, 0.0)
    assert torch.autograd.grad(total(losses), logits)[0].abs().max() == 0


@pytest.mark.parametrize("size", [1e-30, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(size: float, dtype: torch.dtype) -> None:
    logits, labels = data(dtype=torch.float32)
    for gamma in (0.0, 0.5, 2.0):
        sure = (size * logits.detach()).to(dtype).requires_grad_()
        losses = losses_of(criterion_of(focal_gamma=gamma, label_smoothing=0.1), sure, labels)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
        assert torch.autograd.grad(total(losses), sure)[0].isfinite().all()


def test_what_is_right_and_sure_costs_nothing() -> None:
    _, labels = data()
    logits = 200 * F.one_hot(labels.long().clamp(max=CLASSES - 1), CLASSES).movedim(-1, 1).float()
    for term, value in losses_of(criterion_of(), logits, labels).items():
        assert value.item() == pytest.approx(0, abs=1e-6), term


def test_autocast_does_not_change_the_losses() -> None:
    logits, labels = data(dtype=torch.float32)
    expected = losses_of(criterion_of(), logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses_of(criterion_of(), logits, labels) == expected


def test_a_compiled_step_leaves_the_criterion_as_it_is() -> None:
    logits, labels = data(dtype=torch.float32)
    criterion, batch = criterion_of(), batch_of(labels)
    counts = criterion.counts(batch)
    compiled = torch.compile(lambda x: total(criterion({"logits": 2 * x}, batch, counts)), backend="eager")
    torch.testing.assert_close(compiled(logits), total(criterion({"logits": 2 * logits}, batch, counts)))


def test_terms_weights_and_phases() -> None:
    logits, labels = data()
    criterion = criterion_of({"ce": 2.0, "dice": 0.5, "lovasz": 0.0})
    normal = losses_of(criterion, logits, labels)
    assert set(normal) == {"ce", "dice"}
    torch.testing.assert_close(normal["ce"], 2 * loss_of("ce", logits, labels))
    criterion.set_phase({"ce": 0.0})
    assert losses_of(criterion, logits, labels) == {"dice": normal["dice"]}
    criterion.set_phase({})
    assert losses_of(criterion, logits, labels) == normal
    with pytest.raises(UserError, match=r"'lovas' \(did you mean lovasz\?\)"):
        criterion_of({"lovas": 1})
    with pytest.raises(UserError, match="no term"):
        criterion_of({"ce": 0})
    with pytest.raises(UserError, match="has 2 numbers, but there are 5 classes"):
        criterion_of({"ce": 1}, class_weights=[1.0, 2.0])


# ---------------------------------------------------------------- class weights


@pytest.mark.parametrize(
    ("how", "ratio"),
    [("inverse_sqrt", math.sqrt(9)), ("median", 9), ("enet", math.log(1.02 + 0.9) / math.log(1.02 + 0.1))],
)
def test_rare_classes_weigh_more(how: Any, ratio: float) -> None:
    weights = class_weights([900, 100, 0], how)
    assert weights[1] / weights[0] == pytest.approx(ratio)
    assert 0.9 * weights[0] + 0.1 * weights[1] == pytest.approx(1)
    assert weights[2] == 1


def test_class_weights_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"'medain' \(did you mean median\?\)"):
        class_weights([1, 2], "medain")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="need labelled pixels"):
        class_weights([0, 0])


@pytest.mark.parametrize("term", SemanticCriterion.terms)
def test_a_blended_batch_is_the_mixture_of_two_plain_ones(term: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 8, 9, generator=generator, dtype=torch.float64)
    both = torch.randint(0, 4, (2, 2, 32, 36), generator=generator, dtype=torch.uint8)
    criterion = SemanticCriterion({term: 2.0}, num_classes=4)

    def value(target: SemanticTarget) -> float:
        batch = SimpleNamespace(targets=target)
        return criterion({"logits": logits}, batch, criterion.counts(batch))[term].item()

    plain = [value(SemanticTarget(labels)) for labels in both]
    mixed = value(SemanticTarget(both[0], blended=both[1], share=0.7))
    assert mixed == pytest.approx(0.7 * plain[0] + 0.3 * plain[1], rel=1e-6)

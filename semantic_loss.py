"""The losses of `semantic`: a class for each pixel, from logits that are smaller than the labels.

All terms are made of three quantities of the upsampled logits (`pixel_statistics`): the negative log likelihood and
the log-sum-exp of each pixel, and the summed probability of each class. These are computed over bands of rows, forward
and backward, so the logits of all classes at the labels' size, by far the largest tensor of a step, never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from errors import UserError, nearest
from loss import Criterion, full_precision
from maps import source_rows

# Logits that a band holds: what stays in the cache of each core, and enough to keep an accelerator busy (128 MB).
CPU_BAND = 2**18
DEVICE_BAND = 2**25
LABELS = 256  # that a byte can hold
TINY = 1e-12


class SemanticCriterion(Criterion):
    """Losses of one class per pixel.

    weights: weight of each term; a term that is absent or 0 is not computed. CE + Dice is a weight for each.
        `ce`: cross entropy. `focal`: (1 − p)^γ · cross entropy, p the probability of the true class (Lin et al. 2017,
        equation 4). `dice`: 1 − 2·Σ p·t / (Σ p + Σ t) of each class over the whole batch, averaged over the classes
        that are there. `lovasz`: Lovász-Softmax over the whole batch and the classes that are there (Berman et al.
        2018, algorithm 1). `ohem`: cross entropy of the hard pixels alone, averaged over them.
    class_weights: a factor for the pixels of each class in `ce`, `focal` and `ohem`; see the function `class_weights`.
        `dice` and `lovasz` weigh all classes alike as they are.
    label_smoothing: share of the truth that `ce` spreads over all classes, in [0, 1), as `F.cross_entropy` does.
    focal_gamma: γ; 0 makes `focal` the cross entropy.
    ohem_threshold: pixels whose true class is less probable than this are hard.
    ohem_min_kept: so large a share of the batch's pixels, the hardest ones, is hard in any case.

    `ce` and `focal` are additive: with the counts of the whole step, micro-batches and ranks sum to the value of the
    one big batch. `dice`, `lovasz` and `ohem` are of all pixels of a batch at once; each micro-batch on each rank
    computes its own value, which counts by its share of the step's pixels. Pixels are counted with their class's
    weight. Ignored are the labels from `num_classes` on, 255 among them, so no label can be out of range on a device;
    that others than 255 do not occur is what the check of the data sees to.

    Of a batch that MixUp blended every term is taken of both label maps and added up by their shares.

    Computed in float32 (float64 where the logits are) under any autocast. The host waits for the device in `lovasz`
    alone, which asks which classes are there.
    """

    terms = ("ce", "dice", "focal", "lovasz", "ohem")
    label_weights: Tensor

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 2.0,
        ohem_threshold: float = 0.7,
        ohem_min_kept: float = 1 / 16,
    ) -> None:
        """Raises UserError for an unknown term, if no term has a weight, or for class weights of another number."""
        super().__init__(weights)
        if class_weights is not None and len(class_weights) != num_classes:
            raise UserError(f"loss.class_weights has {len(class_weights)} numbers, but there are {num_classes} classes")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        known = torch.ones(num_classes) if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("label_weights", F.pad(known, (0, LABELS - num_classes)), persistent=False)

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """What the terms average over, 0-dim float32 on the device; to be summed over micro-batches and ranks."""
        pixels = [share * self._pixel_weights(labels).sum() for labels, share in batch.targets.parts()]
        return {"pixels": torch.stack(pixels).sum()}

    @torch.compiler.disable
    def forward(self, outputs: Mapping[str, Any], batch: Any, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: weighted scalar}; their sum is what is trained.

        outputs: `logits` (B, C, h, w). They are resized to the labels, (B, H, W) uint8 of any size, bilinear with
        corners not aligned.
        """
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            logits = full_precision(outputs["logits"])
            values = dict.fromkeys(self.active, logits.new_zeros(()))
            for labels, share in batch.targets.parts():
                for term, value in self._terms(logits, labels, counts["pixels"]).items():
                    values[term] = values[term] + share * value
            return {term: value * self.active[term] for term, value in values.items()}

    def _terms(self, logits: Tensor, labels: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """The terms, unweighted; `pixels` is the count of the whole step."""
        weights = self._pixel_weights(labels).to(logits.dtype)
        share = ratio(weights.sum(), pixels)
        smoothed = self.label_smoothing > 0 and "ce" in self.active
        spread = self.label_weights[: self.num_classes].to(logits) / self.num_classes if smoothed else None
        nll, log_sum, class_sums, spread_nll = pixel_statistics(
            logits, labels, spread=spread, sum_classes="dice" in self.active
        )
        values: dict[str, Tensor] = {}
        for term in self.active:
            match term:
                case "ce":
                    total = (weights * nll).sum()
                    if spread_nll is not None:
                        total = (1 - self.label_smoothing) * total + self.label_smoothing * spread_nll.sum()
                    values[term] = ratio(total, pixels)
                case "focal":
                    values[term] = ratio((weights * focal(nll, self.focal_gamma)).sum(), pixels)
                case "ohem":
                    values[term] = share * self._ohem(nll, weights)
                case "dice":
                    values[term] = share * dice(nll, class_sums, labels)
                case "lovasz":
                    values[term] = share * lovasz_softmax(logits, log_sum, labels)
        return values

    def _ohem(self, nll: Tensor, weights: Tensor) -> Tensor:
        """Mean `nll` over the pixels that are hard."""
        hardness = torch.where(weights > 0, nll.detach(), -1.0).flatten()
        kept = max(1, round(self.ohem_min_kept * len(hardness)))
        least = hardness.kthvalue(len(hardness) - kept + 1).values.clamp(max=-math.log(self.ohem_threshold))
        chosen = weights * (hardness >= least).view(weights.shape)
        return ratio((chosen * nll).sum(), chosen.sum())

    def _pixel_weights(self, labels: Tensor) -> Tensor:
        """(B, H, W): the weight of each pixel's class, 0 where it is ignored."""
        return self.label_weights[labels.long()]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where both are 0: nothing but ignored pixels costs nothing."""
    return numerator / denominator.clamp(min=TINY)


# Terms


def focal(nll: Tensor, gamma: float) -> Tensor:
    """(1 − p)^γ · nll of each pixel, p = exp(−nll)."""
    # A power below 1 has no finite slope at 0.
    return (-torch.expm1(-nll)).clamp(min=TINY).pow(gamma) * nll


def dice(nll: Tensor, class_sums: Tensor, labels: Tensor) -> Tensor:
    """1 − 2·Σ p·t / (Σ p + Σ t) of each class, averaged over those that are there; no smoothing.

    nll and labels are (B, H, W), class_sums (C,) is Σ p over the pixels that are not ignored.
    """
    valid = labels < len(class_sums)
    index = labels.long().clamp(max=len(class_sums) - 1).flatten()
    found = torch.zeros_like(class_sums).index_add(0, index, torch.where(valid, (-nll).exp(), 0).flatten())
    there = torch.zeros_like(class_sums).index_add(0, index, valid.to(class_sums.dtype).flatten())
    present = there > 0
    losses = 1 - 2 * found / (class_sums + there).clamp(min=1)  # which it is for all that are present
    return ratio((losses * present).sum(), present.sum())


def lovasz_softmax(logits: Tensor, log_sum: Tensor, labels: Tensor) -> Tensor:
    """The Lovász extension of 1 − IoU of each class, averaged over those that are there (Berman et al. 2018).

    logits (B, C, h, w), before they are resized; log_sum and labels (B, H, W). Memory does not grow with the classes.
    """
    return _LovaszSoftmax.apply(logits, log_sum, labels)


class _LovaszSoftmax(torch.autograd.Function):
    """A class at a time. Given the order of the errors the loss is linear in them, so its gradient is known at once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_sum: Tensor, labels: Tensor) -> Tensor:
        valid = labels < logits.shape[1]
        present = labels[valid].unique().tolist()
        loss, to_logits, to_log_sum = log_sum.new_zeros(()), torch.zeros_like(logits), torch.zeros_like(log_sum)
        for label in present:
            narrow = logits[:, label : label + 1].detach().requires_grad_()
            with torch.enable_grad():
                wide = F.interpolate(narrow, labels.shape[1:], mode="bilinear")
            probabilities = (wide.detach().squeeze(1) - log_sum).exp()
            truth = labels == label
            errors = torch.where(valid, (truth.to(log_sum.dtype) - probabilities).abs(), 0).flatten()
            ranked, order = errors.sort(descending=True)
            steps = jaccard_steps(truth.flatten()[order], ranked.dtype)
            loss += (ranked * steps).sum() / len(present)
            slope = torch.empty_like(steps).scatter_(0, order, steps).view(labels.shape) / len(present)
            slope = torch.where(truth, -slope, slope) * probabilities * valid
            to_logits[:, label : label + 1] = torch.autograd.grad(wide, narrow, slope.unsqueeze(1))[0]
            to_log_sum -= slope
        ctx.save_for_backward(to_logits, to_log_sum)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        to_logits, to_log_sum = ctx.saved_tensors
        return gradient * to_logits, gradient * to_log_sum, None


def jaccard_steps(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much 1 − IoU grows as the ranked pixels, (N,) bool with at least one, become wrong one after the other.

    The differences of algorithm 1 written out: as differences they would drown in float32's rounding.
    """
    missed = truth.cumsum(0)
    rank = torch.arange(1, len(truth) + 1, device=truth.device)
    intersection = (missed[-1] - missed).to(dtype)
    union = (missed[-1] + rank - missed).to(dtype)
    return torch.where(truth, 1 / union, intersection / (union * (union - 1)))


# What they are made of


def pixel_statistics(
    logits: Tensor, labels: Tensor, *, spread: Tensor | None = None, sum_classes: bool = False
) -> tuple[Tensor, Tensor, Any, Any]:
    """Of logits (B, C, h, w) resized to labels (B, H, W), bilinear with corners not aligned:

    (negative log likelihood of the label, (B, H, W), 0 where it is ignored; log-sum-exp over classes, (B, H, W);
    where asked for, else None, Σ p of each class over the pixels that are not ignored, (C,), and Σ_c spread_c · nll_c
    of each pixel, (B, H, W), 0 where it is ignored). Differentiable once.
    """
    return _PixelStatistics.apply(logits, labels, spread, sum_classes)


class _PixelStatistics(torch.autograd.Function):
    """Band by band, with classes last: resizing and softmax are several times faster there than on (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, spread: Tensor | None, sum_classes: bool) -> Any:
        ctx.save_for_backward(logits, labels, spread)
        nll, log_sum, spread_nll = [], [], []
        class_sums = logits.new_zeros(logits.shape[1]) if sum_classes else None
        for band in bands(logits, labels):
            log_p = band.wide.log_softmax(-1)
            own = -log_p.gather(-1, band.target).squeeze(-1)
            nll.append(own * band.valid)
            log_sum.append(band.wide.gather(-1, band.target).squeeze(-1) + own)
            if spread is not None:
                spread_nll.append(-(log_p @ spread) * band.valid)
            if class_sums is not None:
                class_sums += (log_p.exp_() * band.valid.unsqueeze(-1)).sum((0, 1, 2))
        return torch.cat(nll, 1), torch.cat(log_sum, 1), class_sums, torch.cat(spread_nll, 1) if spread_nll else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_nll: Tensor, to_log_sum: Tensor, to_sums: Tensor | None, to_spread: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, labels, spread = ctx.saved_tensors
        total = torch.zeros_like(logits.permute(0, 2, 3, 1), memory_format=torch.contiguous_format)
        for band in bands(logits, labels):
            p = band.wide.softmax(-1)
            own = to_nll[:, band.rows] * band.valid
            pull = own + to_log_sum[:, band.rows]
            if to_spread is not None:
                others = to_spread[:, band.rows] * band.valid
                pull += others * spread.sum()
            pull = pull.unsqueeze(-1)
            if to_sums is not None:
                pull = pull + (to_sums - (p @ to_sums).unsqueeze(-1)) * band.valid.unsqueeze(-1)
            slope = p.mul_(pull).scatter_add_(-1, band.target, -own.unsqueeze(-1))
            if to_spread is not None:
                slope -= others.unsqueeze(-1) * spread
            (narrow,) = torch.autograd.grad(band.wide, band.narrow, slope)
            total.index_add_(1, band.lower, narrow * band.fraction)
            total.index_add_(1, band.upper, narrow * (1 - band.fraction))
        return total.permute(0, 3, 1, 2), None, None, None


class Band(NamedTuple):
    """Some rows of the logits at the labels' size."""

    rows: slice  # of the labels
    wide: Tensor  # (B, rows, W, C), with a graph that leads to `narrow` alone
    narrow: Tensor  # (B, rows, w, C): row upper · (1 − fraction) + row lower · fraction of the logits
    upper: Tensor  # (rows,)
    lower: Tensor
    fraction: Tensor  # (rows, 1, 1)
    valid: Tensor  # (B, rows, W) bool: not ignored
    target: Tensor  # (B, rows, W, 1) int64: the label, and any class where it is ignored


def bands(logits: Tensor, labels: Tensor) -> Iterator[Band]:
    """Logits (B, C, h, w) at the size of labels (B, H, W), from top to bottom."""
    batch, classes, source_height, _ = logits.shape
    height, width = labels.shape[1:]
    maps = logits.permute(0, 2, 3, 1).contiguous()
    upper, lower, fraction = source_rows(source_height, height, logits.dtype, logits.device)
    fraction = fraction.unsqueeze(-1)
    held = CPU_BAND * torch.get_num_threads() if logits.device.type == "cpu" else DEVICE_BAND
    step = max(1, held // (batch * classes * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        own = labels[:, rows]
        narrow = torch.lerp(maps[:, upper[rows]], maps[:, lower[rows]], fraction[rows]).requires_grad_()
        with torch.enable_grad():
            wide = F.interpolate(narrow.permute(0, 3, 1, 2), (own.shape[1], width), mode="bilinear")
            wide = wide.permute(0, 2, 3, 1)
        yield Band(rows, wide, narrow, upper[rows], lower[rows], fraction[rows], own < classes,
                   own.long().clamp(max=classes - 1).unsqueeze(-1))  # fmt: skip


# Class weights


def class_weights(
    pixel_counts: Sequence[float], how: Literal["inverse_sqrt", "median", "enet"] = "inverse_sqrt"
) -> list[float]:
    """A weight for each class from its pixels in the training data, by its share f of all pixels:

    `inverse_sqrt`: 1 / √f. `median`: median(f) / f (Eigen & Fergus 2015, section 6.3.2, but with shares of all
    pixels). `enet`: 1 / ln(1.02 + f), at most 50.5 (Paszke et al. 2016, section 5.2). Scaled so that the pixels' mean
    weight is 1; classes without pixels get 1.

    The default halves the imbalance in orders of magnitude: a class with a ten-thousandth of the pixels of another
    counts a hundredth of it. `median` makes all classes count the same, and the few pixels of the rarest, with the
    errors of their annotation, steer the training; `enet` hardly tells apart classes below a hundredth.
    Raises UserError for another `how`, and where there are no pixels at all.
    """
    total = sum(pixel_counts)
    if not total:
        raise UserError("class weights need labelled pixels, but all of the training data are ignored")
    shares = [count / total for count in pixel_counts]
    middle = median(share for share in shares if share)
    formulas = {
        "inverse_sqrt": lambda f: f**-0.5,
        "median": lambda f: middle / f,
        "enet": lambda f: 1 / math.log(1.02 + f),
    }
    if how not in formulas:
        raise UserError(f"unknown class weights {how!r}{nearest(how, formulas)}; there are {', '.join(formulas)}")
    weights = [formulas[how](share) if share else 0.0 for share in shares]
    mean = sum(weight * share for weight, share in zip(weights, shares, strict=True))
    return [weight / mean if weight else 1.0 for weight in weights]

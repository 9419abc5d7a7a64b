"""Losses: the pixel terms as plain functions, and the criterion of each task that weighs and sums them.

A term takes maps of shape (..., H, W), the leading dimensions being levels and images, and returns what its
docstring says: a sum over pixels, or one value per image. Dividing by the counts of the whole optimizer step
is the criterion's work, so that micro-batches and ranks add up to the loss of the one big batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, nearest

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
PATCH = 64
STRUCTURE_WINDOW = 31
CONTOUR_LENGTH_WEIGHT = 10.0
UNKNOWN_CLASS = -1


def full_precision(maps: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinear with aligned corners, as everywhere in BiRefNet."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


# Terms that sum over pixels


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, summed over pixels; `target` in [0, 1] and may carry a gradient."""
    return F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="sum")


def mae(probabilities: Tensor, target: Tensor) -> Tensor:
    """Absolute error, summed over pixels."""
    return (probabilities - target).abs().sum()


def mse(probabilities: Tensor, target: Tensor) -> Tensor:
    """Squared error, summed over pixels."""
    return (probabilities - target).square().sum()


def threshold_regulariser(probabilities: Tensor) -> Tensor:
    """1 − p² − (1 − p)², summed over pixels: 0 where p is 0 or 1, 0.5 where it is 0.5."""
    return (1 - probabilities.square() - (1 - probabilities).square()).sum()


def gaussian_blur(maps: Tensor) -> Tensor:
    """Blur (..., H, W) with the SSIM window (11 × 11, σ = 1.5, zero padding).

    All maps are the channels of one depthwise convolution per axis. On a CPU this is some fifty times faster than the
    11 × 11 convolution of single-channel images. On CUDA depthwise kernels compute in true float32, where TF32
    would ruin the variances that SSIM takes as differences.
    """
    offsets = torch.arange(SSIM_WINDOW, device=maps.device, dtype=maps.dtype) - SSIM_WINDOW // 2
    gaussian = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    channels = maps.reshape(1, -1, *maps.shape[-2:])
    count = channels.shape[1]
    kernel = (gaussian / gaussian.sum()).repeat(count, 1, 1, 1)
    blurred = F.conv2d(channels, kernel, padding=(0, SSIM_WINDOW // 2), groups=count)
    blurred = F.conv2d(blurred, kernel.transpose(-1, -2).contiguous(), padding=(SSIM_WINDOW // 2, 0), groups=count)
    return blurred.view(maps.shape)


def ssim_map(probabilities: Tensor, target: Tensor) -> Tensor:
    """Structural similarity at every pixel, in [-1, 1] (Wang et al. 2004, constants 0.01² and 0.03² for a range of 1).

    `target` may lack leading dimensions of `probabilities`: its statistics are then computed once for all levels.
    """
    c1, c2 = 0.01**2, 0.03**2
    target_mean, target_square = gaussian_blur(torch.stack([target, target.square()]))
    maps = torch.stack([probabilities, probabilities.square(), probabilities * target])
    mean, square, product = gaussian_blur(maps)
    means = mean * target_mean
    means_squared = mean.square() + target_mean.square()
    numerator = (2 * means + c1) * (2 * (product - means) + c2)
    denominator = (means_squared + c1) * (square + target_square - means_squared + c2)
    return numerator / denominator


def ssim(probabilities: Tensor, target: Tensor) -> Tensor:
    """(1 − SSIM) / 2, in [0, 1], summed over pixels."""
    return ((1 - ssim_map(probabilities, target)) / 2).sum()


def contour_length(probabilities: Tensor) -> Tensor:
    """Length of the soft contour, summed over the (H − 2)(W − 2) inner windows (Chen et al. 2019, equation 11).

    Each window takes its vertical difference a row below and its horizontal one a column right of the corner, as the
    official code does.
    """
    vertical = probabilities.diff(dim=-2)[..., 1:, :-2]
    horizontal = probabilities.diff(dim=-1)[..., :-2, 1:]
    # The square root has no finite gradient at 0.
    return (vertical.square() + horizontal.square() + 1e-8).sqrt().sum()


def contour_region(probabilities: Tensor, target: Tensor) -> Tensor:
    """Foreground on background and background on foreground, summed over pixels (Chen et al. 2019, equation 12)."""
    return (probabilities * (1 - target).square() + (1 - probabilities) * target.square()).sum()


# Terms with one value per image


def iou(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft IoU loss of each image, (...), in [0, 1].

    `smooth` pixels are added to intersection and union: an empty mask predicted as empty costs 0, and predicting
    something on it has a gradient. With 0 (official) the first is NaN and the second has none.
    """
    intersection = (probabilities * target).sum((-2, -1))
    union = probabilities.sum((-2, -1)) + target.sum((-2, -1)) - intersection
    return 1 - (intersection + smooth) / (union + smooth)


def patch_iou(probabilities: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft IoU loss of each 64 × 64 window, (..., windows); windows at the bottom and right edge may be smaller."""

    def window_sums(maps: Tensor) -> Tensor:
        stacked = maps.reshape(1, -1, *maps.shape[-2:])
        sums = F.avg_pool2d(stacked, PATCH, ceil_mode=True, divisor_override=1)
        return sums.view(*maps.shape[:-2], -1)

    intersection = window_sums(probabilities * target)
    union = window_sums(probabilities) + window_sums(target) - intersection
    return 1 - (intersection + smooth) / (union + smooth)


def structure(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted BCE + weighted IoU of each image, (...); edges of the target weigh up to 6 (F³Net, Wei et al. 2020)."""
    # Two passes give the same box mean as one 31 × 31 pass, because the zero padding is counted.
    pad = STRUCTURE_WINDOW // 2
    stacked = target.reshape(1, -1, *target.shape[-2:])
    rows = F.avg_pool2d(stacked, (1, STRUCTURE_WINDOW), stride=1, padding=(0, pad))
    surround = F.avg_pool2d(rows, (STRUCTURE_WINDOW, 1), stride=1, padding=(pad, 0)).view(target.shape)
    weight = 1 + 5 * (surround - target).abs()

    cross_entropy = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    weighted_bce = (weight * cross_entropy).sum((-2, -1)) / weight.sum((-2, -1))
    probabilities = logits.sigmoid()
    intersection = (weight * probabilities * target).sum((-2, -1))
    union = (weight * (probabilities + target)).sum((-2, -1)) - intersection
    return weighted_bce + 1 - (intersection + 1) / (union + 1)


class Criterion(nn.Module):
    """Terms with weights that a phase of the training may change: what the criteria of all tasks have.

    `counts(batch)` says what the terms average over; `forward(outputs, batch, counts)` returns them, weighted, by name.
    """

    terms: tuple[str, ...]

    def __init__(self, weights: Mapping[str, float]) -> None:
        """A term that is absent or 0 is not computed. UserError for an unknown one, or if none has a weight."""
        super().__init__()
        self._check_terms(weights)
        self.weights = dict(weights)
        self.set_phase({})

    def set_phase(self, factors: Mapping[str, float]) -> None:
        """Multiply the configured weights by `factors`, absent terms by 1; `{}` returns to the configured weights.

        Factors never compound, whereas BiRefNet's official last-epochs phase multiplies again in every epoch.
        Raises UserError for an unknown term, or if no term is left.
        """
        self._check_terms(factors)
        phased = {term: weight * factors.get(term, 1.0) for term, weight in self.weights.items()}
        self.active = {term: weight for term, weight in phased.items() if weight}
        if not self.active:
            raise UserError("the loss weights leave no term to train: give at least one a weight above 0")

    @classmethod
    def _check_terms(cls, names: Mapping[str, float]) -> None:
        for name in names:
            if name not in cls.terms:
                known = ", ".join(cls.terms)
                raise UserError(
                    f"the loss weights name an unknown term '{name}'{nearest(name, cls.terms)}; the terms are {known}"
                )


class BinaryCriterion(Criterion):
    """Multi-level supervision of one soft mask per image, with BiRefNet's terms.

    weights: weight of each term; a term that is absent or 0 is not computed.
        Of the final map and of every level, resized to the target: `bce`, `iou`, `iou_patch`, `mae`, `mse`, `ssim`,
        `contour`, `structure`, `reg`. A term is the sum over levels.
        Of the optional outputs: `gradient`, BCE between the sigmoids of gradient logits and labels, summed over levels
        (the labels come from the model and pass gradients on, as in the official code); `class`, cross entropy of the
        auxiliary class, averaged over the images that have one.
    iou_reduction: `mean` averages `iou` over images and `iou_patch` over images and their windows;
        `sum` (official) adds them up, so that the weight grows with the batch.
    iou_smooth: pixels added to intersection and union of `iou` and `iou_patch`; the official value is 0, see `iou`.
    patch_iou: `all` windows of the image, or only the one in the top left `corner` (official).
    structure_on: `logits`, or `probabilities`, of which the sigmoid is then taken a second time (official).

    All terms are additive: with the counts of the whole step, micro-batches and ranks sum to the value of the one
    big batch. Computed in float32 (float64 where the logits are) under any autocast, without host synchronisation.
    """

    terms = ("bce", "iou", "iou_patch", "mae", "mse", "ssim", "contour", "structure", "reg", "gradient", "class")

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        iou_reduction: Literal["mean", "sum"] = "mean",
        iou_smooth: float = 1.0,
        patch_iou: Literal["all", "corner"] = "all",
        structure_on: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        """Raises UserError for an unknown term, or if no term has a weight."""
        super().__init__(weights)
        self.iou_reduction = iou_reduction
        self.iou_smooth = iou_smooth
        self.patch_iou = patch_iou
        self.structure_on = structure_on

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """What the terms average over, 0-dim float32 on the device; to be summed over micro-batches and ranks."""
        masks, class_ids = batch.targets.masks, batch.targets.class_ids
        images, _, height, width = masks.shape
        sizes = {
            "images": images,
            "pixels": images * height * width,
            "contour_windows": images * (height - 2) * (width - 2),
        }
        counts = {name: torch.full((), float(size), device=masks.device) for name, size in sizes.items()}
        counts["labelled"] = (class_ids != UNKNOWN_CLASS).sum().float()
        return counts

    def forward(self, outputs: Mapping[str, Any], batch: Any, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{term: weighted scalar}; their sum is what is trained.

        outputs: `logits` (B, 1, H, W); where present `levels`, a list of (B, 1, h, w) logits; `gradient_logits` and
        `gradient_labels`, lists of (B, 1, h, w) and (B, 1, H, W) before the sigmoid; `class_logits` (B, C).
        """
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            values = self._mask_terms(outputs, batch.targets.masks, counts)
            if "gradient" in self.active and "gradient_logits" in outputs:
                values["gradient"] = self._gradient_term(outputs, counts)
            if "class" in self.active and "class_logits" in outputs:
                values["class"] = self._class_term(outputs, batch.targets.class_ids, counts)
            return {term: value * self.active[term] for term, value in values.items()}

    def _mask_terms(self, outputs: Mapping[str, Any], masks: Tensor, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms on the mask itself, unweighted, all levels at once: maps are (levels, B, H, W)."""
        size = (masks.shape[-2], masks.shape[-1])
        levels = [*outputs.get("levels", []), outputs["logits"]]
        logits = torch.stack([resize(full_precision(level), size).squeeze(1) for level in levels])
        probabilities = logits.sigmoid()
        target = masks.squeeze(1).to(logits.dtype)
        values: dict[str, Tensor] = {}
        for term in self.active:
            match term:
                case "bce":
                    values[term] = bce(logits, target) / counts["pixels"]
                case "mae":
                    values[term] = mae(probabilities, target) / counts["pixels"]
                case "mse":
                    values[term] = mse(probabilities, target) / counts["pixels"]
                case "ssim":
                    values[term] = ssim(probabilities, target) / counts["pixels"]
                case "reg":
                    values[term] = threshold_regulariser(probabilities) / counts["pixels"]
                case "contour":
                    length = contour_length(probabilities) / counts["contour_windows"]
                    region = contour_region(probabilities, target) / counts["pixels"]
                    values[term] = CONTOUR_LENGTH_WEIGHT * length + region
                case "iou":
                    values[term] = self._reduce_iou(iou(probabilities, target, self.iou_smooth).unsqueeze(-1), counts)
                case "iou_patch":
                    values[term] = self._reduce_iou(self._patch_iou(probabilities, target), counts)
                case "structure":
                    maps = logits if self.structure_on == "logits" else probabilities
                    values[term] = structure(maps, target).sum() / counts["images"]
        return values

    def _gradient_term(self, outputs: Mapping[str, Any], counts: Mapping[str, Tensor]) -> Tensor:
        labels = full_precision(torch.stack(list(outputs["gradient_labels"]))).sigmoid()
        size = (labels.shape[-2], labels.shape[-1])
        logits = torch.stack([resize(full_precision(level), size) for level in outputs["gradient_logits"]])
        return bce(logits, labels) / counts["pixels"]

    def _class_term(self, outputs: Mapping[str, Any], class_ids: Tensor, counts: Mapping[str, Tensor]) -> Tensor:
        logits = full_precision(outputs["class_logits"])
        cross_entropy = F.cross_entropy(logits, class_ids, ignore_index=UNKNOWN_CLASS, reduction="sum")
        return cross_entropy / counts["labelled"].clamp(min=1)

    def _patch_iou(self, probabilities: Tensor, target: Tensor) -> Tensor:
        if self.patch_iou == "corner":
            probabilities, target = probabilities[..., :PATCH, :PATCH], target[..., :PATCH, :PATCH]
        return patch_iou(probabilities, target, self.iou_smooth)

    def _reduce_iou(self, losses: Tensor, counts: Mapping[str, Tensor]) -> Tensor:
        """losses: (levels, B, windows)."""
        return losses.sum() if self.iou_reduction == "sum" else losses.mean(-1).sum() / counts["images"]

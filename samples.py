"""What is passed around: samples as they are read, what identifies them, targets, and batches.

A room of its own, because readers, transforms and the data set all speak of these. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]

IGNORED = 255  # the label of pixels that count nowhere


@dataclass
class Sample:
    """What every reader yields: a picture as it is on disk, with its annotation in the compact form it came in."""

    frames: list[np.ndarray]  # each (H, W, 3) uint8 RGB; one for a still image
    masks: Any = None  # binary: (H, W) uint8 alpha; semantic: (H, W) uint8 labels; None at inference
    class_ids: list[int] = field(default_factory=list)  # binary: the auxiliary class, or none
    sample_id: str = ""
    path: str = ""
    dataset: str = ""
    are_labels: bool = False  # masks are labels: never interpolated, and ignored where there is no picture


@dataclass
class SampleInfo:
    """Where a sample of a batch came from; `size` is (H, W) of its original image."""

    sample_id: str
    path: str
    dataset: str
    size: Size


class Targets(Protocol):
    """What a task must offer for its targets to ride in a `Batch`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...

    def pin_memory(self) -> Any: ...


@dataclass
class BinaryTarget:
    """Targets of `binary`: soft masks in [0, 1]."""

    masks: Tensor  # (B, 1, H, W) float32 at the model's size
    class_ids: Tensor  # (B,) int64, -1 where unknown
    originals: list[Tensor] = field(default_factory=list)  # evaluation: per sample (h, w) uint8 alpha at its own size

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BinaryTarget:
        """Move what losses read; the originals, which may be huge, stay on the host."""
        return replace(
            self,
            masks=self.masks.to(device, non_blocking=non_blocking),
            class_ids=self.class_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> BinaryTarget:
        return replace(self, masks=self.masks.pin_memory(), class_ids=self.class_ids.pin_memory())


@dataclass
class SemanticTarget:
    """Targets of `semantic`: a class for each pixel, or `IGNORED`."""

    labels: Tensor  # (B, H, W) uint8 at the model's size
    originals: list[Tensor] = field(default_factory=list)  # evaluation: per sample (h, w) uint8 labels at its own size
    blended: Tensor | None = None  # MixUp: (B, H, W) labels of the pictures that were blended in
    share: float = 1.0  # of the picture that `labels` belong to

    def parts(self) -> list[tuple[Tensor, float]]:
        """The label maps of the batch, each with its share."""
        both = [(self.labels, self.share)]
        return both if self.blended is None else [*both, (self.blended, 1 - self.share)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SemanticTarget:
        """Move what losses read; the originals, which may be huge, stay on the host."""
        return self._each(lambda labels: labels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SemanticTarget:
        return self._each(lambda labels: labels.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> SemanticTarget:
        blended = None if self.blended is None else change(self.blended)
        return replace(self, labels=change(self.labels), blended=blended)


@dataclass
class Batch:
    """What models, criteria and metrics are given."""

    images: Tensor  # (B, 3, H, W) float32, normalised
    targets: Any  # `Targets` of the task, or None at inference
    samples: list[SampleInfo]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        targets = None if self.targets is None else self.targets.to(device, non_blocking=non_blocking)
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Batch:
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=targets)

    @classmethod
    def from_images(cls, images: Tensor) -> Batch:
        """A batch without targets around already normalised (B, 3, H, W) images."""
        size = (images.shape[-2], images.shape[-1])
        samples = [SampleInfo(sample_id=str(i), path="", dataset="", size=size) for i in range(images.shape[0])]
        return cls(images=images, targets=None, samples=samples)


@dataclass(frozen=True)
class SampleKey:
    """All that decides what a sample looks like, beside the seed: samplers yield it, `Dataset` takes it."""

    epoch: int
    index: int
    occurrence: int  # how often the index has come before in this epoch
    size: Size

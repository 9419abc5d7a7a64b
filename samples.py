"""What is passed around: samples as they are read, what identifies them, targets, and batches.

A room of its own, because readers, transforms and the data set all speak of these. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]

IGNORED = 255  # the label of pixels that count nowhere


Rle = dict[str, Any]  # {"size": [h, w], "counts": bytes}: a mask as pycocotools compresses it


@dataclass
class Objects:
    """The objects of one picture in the compact form they came in; their classes are the sample's `class_ids`."""

    codes: list[Rle]  # of the picture's size; the boxes' own rectangles where the data has boxes alone
    boxes: np.ndarray  # (n, 4) float32 left, top, right, bottom, in pixels
    crowd: np.ndarray  # (n,) bool: a region of many objects, which evaluation ignores and training leaves out
    areas: np.ndarray  # (n,) float64 pixels, as evaluation counts them


@dataclass
class Layers:
    """Objects of one picture as label maps that transforms can warp, as few of them as overlaps allow.

    Object `i` covers the pixels of `maps[..., layer_of[i]]` that are `i + 1`; no crowds are among them.
    """

    maps: np.ndarray  # (H, W, L) uint16, L >= 1, 0 where there is nothing
    layer_of: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float32 left, top, right, bottom, in pixels


class Masklets(Protocol):
    """The objects of a clip, whose masks are decoded when they are asked for; frames are counted from 0."""

    object_ids: Sequence[int]  # what the data calls each object of the clip, ascending
    annotated: Sequence[bool]  # of each frame: whether anything is known of it

    def visible(self, frame: int) -> list[int]:
        """Which objects, by their places in `object_ids`, have a pixel in an annotated frame."""

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        """(objects, H, W) bool of those in an annotated frame, at the size of the frame; they may overlap."""


@dataclass
class Sample:
    """What every reader yields: a picture or clip as it is on disk, its annotation in the compact form it came in."""

    frames: Sequence[np.ndarray]  # each (H, W, 3) uint8 RGB, of one size; one for a still image, decoded late for clips
    # binary: (H, W) uint8 alpha; semantic: (H, W) uint8 labels; instance: Objects or Layers; video: Masklets; None at
    # inference
    masks: Any = None
    class_ids: list[int] = field(default_factory=list)  # binary: the auxiliary class, or none; instance: one each
    sample_id: str = ""
    path: str = ""
    dataset: str = ""
    are_labels: bool = False  # masks are labels: never interpolated, and ignored where there is no picture
    numbers: Sequence[int] = ()  # of the frames, where they were drawn from a clip


@dataclass
class SampleInfo:
    """Where a sample of a batch came from; `size` is (H, W) of its original image."""

    sample_id: str
    path: str
    dataset: str
    size: Size
    content: tuple[float, float] = (1.0, 1.0)  # shares of the input's sides that hold the picture, from the top left
    frames: Sequence[int] = ()  # of a clip of which some were drawn: their numbers


class Targets(Protocol):
    """What a task must offer for its targets to ride in a `Batch`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...

    def pin_memory(self) -> Any: ...

    def part(self, start: int, stop: int) -> Any:
        """The targets of the samples from `start` to before `stop`."""


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

    def part(self, start: int, stop: int) -> BinaryTarget:
        return BinaryTarget(self.masks[start:stop], self.class_ids[start:stop], self.originals[start:stop])


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

    def part(self, start: int, stop: int) -> SemanticTarget:
        return replace(self._each(lambda labels: labels[start:stop]), originals=self.originals[start:stop])

    def _each(self, change: Callable[[Tensor], Tensor]) -> SemanticTarget:
        blended = None if self.blended is None else change(self.blended)
        return replace(self, labels=change(self.labels), blended=blended)


@dataclass
class InstanceTarget:
    """Targets of `instance`: the objects of all samples one after the other, `counts[b]` of them in sample `b`.

    The mask of object `i` of a sample is where `maps[b, layer_of]` is `i + 1`, so masks of any number of objects take
    the memory of a few label maps.
    """

    counts: list[int]
    labels: Tensor  # (N,) int64
    boxes: Tensor  # (N, 4) float32 center x, center y, width, height, as shares of the input's sides
    maps: Tensor  # (B, L, H, W) int16 at the model's size
    layer_of: Tensor  # (N,) int64
    originals: list[Objects] = field(default_factory=list)  # evaluation: per sample, as read, with its crowds
    original_labels: list[list[int]] = field(default_factory=list)  # evaluation: the classes of those

    def to(self, device: torch.device | str, non_blocking: bool = False) -> InstanceTarget:
        """Move what losses read; the originals stay on the host."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> InstanceTarget:
        return self._each(lambda tensor: tensor.pin_memory())

    def part(self, start: int, stop: int) -> InstanceTarget:
        first, last = sum(self.counts[:start]), sum(self.counts[:stop])
        return InstanceTarget(
            counts=self.counts[start:stop],
            labels=self.labels[first:last],
            boxes=self.boxes[first:last],
            maps=self.maps[start:stop],
            layer_of=self.layer_of[first:last],
            originals=self.originals[start:stop],
            original_labels=self.original_labels[start:stop],
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> InstanceTarget:
        return replace(
            self,
            labels=change(self.labels),
            boxes=change(self.boxes),
            maps=change(self.maps),
            layer_of=change(self.layer_of),
        )


@dataclass
class VideoTarget:
    """Targets of `video`: the objects of all clips one after the other."""

    masks: Tensor  # (N, T, H, W) bool at the model's size; no frames in evaluation
    clips: Tensor  # (N,) int64, the clip of each object
    originals: list[Masklets] = field(default_factory=list)  # evaluation: per clip, as read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> VideoTarget:
        """Move what losses read; the originals stay on the host."""
        return replace(
            self,
            masks=self.masks.to(device, non_blocking=non_blocking),
            clips=self.clips.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> VideoTarget:
        return replace(self, masks=self.masks.pin_memory(), clips=self.clips.pin_memory())

    def part(self, start: int, stop: int) -> VideoTarget:
        inside = (self.clips >= start) & (self.clips < stop)
        return VideoTarget(self.masks[inside], self.clips[inside] - start, self.originals[start:stop])


@dataclass
class Batch:
    """What models, criteria and metrics are given."""

    images: Any  # (B, 3, H, W) or (B, T, 3, H, W) float32, normalised; clips in evaluation: `streams.Streams`
    targets: Any  # `Targets` of the task, or None at inference
    samples: list[SampleInfo]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        targets = None if self.targets is None else self.targets.to(device, non_blocking=non_blocking)
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Batch:
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=targets)

    def channels_last(self) -> Batch:
        """The same images with the channels of a pixel side by side in memory."""
        if not isinstance(self.images, Tensor):
            return self
        flat = self.images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
        return replace(self, images=flat.unflatten(0, self.images.shape[:-3]))

    def split(self, pieces: int) -> list[Batch]:
        """The samples in order as so many batches of nearly equal size, at most one for each sample."""
        count = len(self.samples)
        ends = [count * piece // min(pieces, count) for piece in range(min(pieces, count) + 1)]
        return [self] if len(ends) == 2 else [self._part(*part) for part in pairwise(ends)]

    def _part(self, start: int, stop: int) -> Batch:
        targets = None if self.targets is None else self.targets.part(start, stop)
        return Batch(self.images[start:stop], targets, self.samples[start:stop])

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

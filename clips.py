"""Clips for training and evaluation: which frames and objects of a video are looked at, and what becomes of them.

A reader's sample is a whole clip, whose frames and masks are decoded when they are asked for. Training draws some of
the frames (`DrawClip`) and does the same to each of them (`AugmentClip`); evaluation streams them all (streams.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dataset import Dataset, Item
from mixing import stream
from readers import DataError, Fault
from samples import Masklets, Sample, SampleInfo, SampleKey, Size, VideoTarget
from streams import FrameStream
from transforms import Augment, resize

TRIES = 4  # to find frames that begin with an object, and an augmentation that keeps the objects in the first frame


class DrawClip:
    """Draws `frames` annotated frames of a clip, `stride` apart, and up to `objects` of the objects in the first.

    The stride is drawn from a range, as far as the clip is long enough, and time runs backwards with probability
    `reverse`. A shorter clip is walked to and fro; so a still image becomes a clip in which nothing moves. The first
    frame always shows an object.

    Called with a sample as read, its key and its reader; returns a sample with decoded frames whose masks are a list of
    (H, W, objects) uint8, 1 on an object, one for each frame.

    Raises:
        DataError: no annotated frame shows an object.
    """

    def __init__(self, *, frames: int, stride: Sequence[int], objects: int, reverse: float, seed: int):
        self.frames, self.stride, self.objects, self.reverse, self.seed = frames, stride, objects, reverse, seed

    def __call__(self, sample: Sample, key: SampleKey, reader: Any = None) -> Sample:
        rng = stream(self.seed, key, 4)
        masklets: Masklets = sample.masks
        numbers, seen = self._draw(sample, masklets, rng)
        chosen = sorted(rng.permutation(seen)[: self.objects].tolist())
        frames = {number: sample.frames[number] for number in dict.fromkeys(numbers)}
        maps = {
            number: np.ascontiguousarray(masklets.masks(number, chosen).transpose(1, 2, 0), np.uint8)
            for number in frames
        }
        return replace(
            sample,
            frames=[frames[number] for number in numbers],
            masks=[maps[number] for number in numbers],
            numbers=numbers,
        )

    def _draw(self, sample: Sample, masklets: Masklets, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """(numbers of the frames, objects in the first of them)."""
        there = np.flatnonzero(masklets.annotated)
        for _ in range(TRIES):
            numbers = self._window(there, rng)
            if seen := masklets.visible(numbers[0]):
                return numbers, seen
        for place in rng.permutation(len(there)):
            if seen := masklets.visible(int(there[place])):
                return walk(there[place:] if rng.random() < 0.5 else there[place::-1], self.frames), seen
        raise DataError(Fault(sample.path, "shows no object in any annotated frame"))

    def _window(self, there: np.ndarray, rng: np.random.Generator) -> list[int]:
        low, high = min(self.stride), max(self.stride)
        longest = max(1, (len(there) - 1) // max(1, self.frames - 1))
        stride = int(rng.integers(min(low, longest), min(high, longest) + 1))
        first = int(rng.integers(max(1, len(there) - stride * (self.frames - 1))))
        drawn = there[first::stride][: self.frames]
        return walk(drawn[::-1] if rng.random() < self.reverse else drawn, self.frames)


def walk(numbers: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """`count` of the numbers in order, to and fro where there are fewer: 0 1 2 1 0 1 …"""
    turns = [*numbers, *numbers[-2:0:-1]]
    return [int(turns[place % len(turns)]) for place in range(count)]


class AugmentClip:
    """The same to every frame of a clip: an `Augment` whose transforms draw the same numbers for each.

    Where that takes an object out of the first frame it is drawn again, and after some tries left out.
    """

    def __init__(self, augment: Augment):
        self.augment = augment
        self.takes_originals = augment.takes_originals

    def __call__(self, sample: Sample, size: Size, seeds: np.random.SeedSequence) -> Sample:
        stills = [Sample([frame], masks, path=sample.path, are_labels=True)
                  for frame, masks in zip(sample.frames, sample.masks, strict=True)]  # fmt: skip
        for attempt in range(TRIES):
            again = np.random.SeedSequence(seeds.entropy, spawn_key=(attempt,))
            first = self.augment(stills[0], size, again)
            if objects_of(first).any((0, 1)).all():
                return joined(sample, [first, *(self.augment(still, size, again) for still in stills[1:])])
        return joined(sample, [resize(still, size) for still in stills])


def objects_of(still: Sample) -> np.ndarray:
    """(H, W, objects) bool; transforms drop the last axis of one object, and mark what they filled up as ignored."""
    return (still.masks == 1).reshape(*still.frames[0].shape[:2], -1)


def joined(sample: Sample, stills: Sequence[Sample]) -> Sample:
    return replace(sample, frames=[still.frames[0] for still in stills], masks=[objects_of(each) for each in stills])


@dataclass
class VideoItem:
    """The target of one clip."""

    masks: np.ndarray  # (objects, T, H, W) bool at the model's size; no frames in evaluation
    original: Masklets | None = None  # in evaluation


def video_target(sample: Sample, original: Sample | None) -> VideoItem:
    """The target of a clip that was drawn, or of a whole one, `original`, in evaluation."""
    if original is not None:
        return VideoItem(np.zeros((len(original.masks.object_ids), 0, 0, 0), bool), original.masks)
    return VideoItem(np.stack(sample.masks).transpose(3, 0, 1, 2))


def collate_video(items: Sequence[VideoItem]) -> VideoTarget:
    """The objects of all clips one after the other; see `VideoTarget`."""
    counts = torch.tensor([len(item.masks) for item in items])
    return VideoTarget(
        masks=torch.from_numpy(np.concatenate([item.masks for item in items])),
        clips=torch.arange(len(items)).repeat_interleave(counts),
        originals=[item.original for item in items if item.original is not None],
    )


class ClipDataset(Dataset):
    """`Dataset` of clips: in training those that `combine` draws, (T, H, W, 3); in evaluation `FrameStream`s."""

    def __getitem__(self, key: SampleKey) -> Item:
        whole = self.reader.read(key.index)
        sample = whole if self.augment is None else self._drawn(whole, key)
        height, width = sample.frames[0].shape[:2]
        info = SampleInfo(whole.sample_id, whole.path, whole.dataset, (height, width), frames=sample.numbers)
        if self.augment is None:
            return Item(FrameStream(whole.frames, key.size), self.make_target(whole, whole), info, key)
        sample = self.augment(sample, key.size, self._seeds(key))
        return Item(np.stack(sample.frames), self.make_target(sample, None), info, key)

    def prepared(self, key: SampleKey) -> Sample:
        """The frames that the model will see, one below the other, with the objects as labels from 1."""
        assert self.augment is not None
        sample = self.augment(self._drawn(self.reader.read(key.index), key), key.size, self._seeds(key))
        labels = [(masks * np.arange(1, masks.shape[2] + 1, dtype=np.uint8)).max(2) for masks in sample.masks]
        return replace(sample, frames=[np.vstack(sample.frames)], masks=np.vstack(labels), are_labels=True)

    def _drawn(self, whole: Sample, key: SampleKey) -> Sample:
        assert self.combine is not None
        return self.combine(whole, key, self.reader)

"""Data: the one `Dataset`, the resumable samplers, and batches, over the samples of a reader (readers/).

    dataset = Dataset(training, augment=augment, make_target=binary_target, seed=0)
    sampler = TrainSampler(training, batch_size=4, seed=0, size=(1024, 1024))
    loader = build_loader(dataset, sampler, workers=4, collate_targets=collate_binary)

What a sample looks like is a pure function of (seed, epoch, index, occurrence, size), all of which the sampler
hands out; so neither workers nor ranks nor resuming change it. Sizes are always (height, width).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_all_start_methods
from multiprocessing.queues import Queue
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from errors import NO_SHARED_MEMORY, UserError
from readers import Reader
from samples import (
    Batch,
    BinaryTarget,
    InstanceTarget,
    Objects,
    Sample,
    SampleInfo,
    SampleKey,
    SemanticTarget,
    Size,
)
from streams import Streams
from transforms import content_share, resize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# The Dataset


@dataclass
class Item:
    """One sample on its way into a batch, as small as it gets: worker processes send these."""

    image: Any  # (H, W, 3) or, of a clip, (T, H, W, 3) uint8 at the model's size; a `FrameStream` in evaluation
    target: Any  # what the task's `make_target` returned, or None at inference
    info: SampleInfo
    key: SampleKey


class Dataset(torch.utils.data.Dataset[Item]):
    """Samples of a reader at the size that the sampler's key asks for, augmented in training.

    `augment(sample, size, seed_sequence)` augments and resizes, as `transforms.Augment` does; None only resizes, and
    the targets then carry what evaluation needs of the original. `make_target(sample, original)` is the task's:
    `sample` is at model size, `original` is the sample as read in evaluation and None in training. With `pad` pictures
    keep their aspect ratio, and the samples' `content` says how much of the input they take. `combine(sample, key,
    reader)` comes before `augment` (`combining.Combine`).
    """

    def __init__(
        self,
        reader: Reader,
        *,
        make_target: Callable[[Sample, Sample | None], Any],
        augment: Callable[[Sample, Size, np.random.SeedSequence], Sample] | None = None,
        seed: int = 0,
        pad: bool = False,
        combine: Callable[[Sample, SampleKey, Reader], Sample] | None = None,
    ):
        self.reader, self.make_target, self.augment = reader, make_target, augment
        self.seed, self.pad, self.combine = seed, pad, combine

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: SampleKey) -> Item:
        original = self.reader.read(key.index)
        sample = self._prepare(original, key)
        height, width = original.frames[0].shape[:2]
        info = SampleInfo(original.sample_id, original.path, original.dataset, (height, width))
        if self.pad and self.augment is None:
            info.content = content_share(info.size, key.size)
        target = None
        if sample.masks is not None or sample.class_ids:
            target = self.make_target(sample, original if self.augment is None else None)
        return Item(image=sample.frames[0], target=target, info=info, key=key)

    def prepared(self, key: SampleKey) -> Sample:
        """The sample that the model will see, for previews."""
        return self._prepare(self.reader.read(key.index), key)

    def _prepare(self, sample: Sample, key: SampleKey) -> Sample:
        if self.augment is None:
            return resize(sample, key.size, pad=self.pad)
        if self.combine is not None:
            sample = self.combine(sample, key, self.reader)
        return self.augment(sample, key.size, self._seeds(key))

    def _seeds(self, key: SampleKey) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.seed, key.epoch, key.index, key.occurrence])


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


class TrainSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one rank, all of them a pure function of (seed, epoch).

    An epoch is one shuffled list that all ranks share, in which each dataset has `weight * count` entries (the whole
    part of the weight repeats every sample, the rest is a subset drawn anew each epoch). Step `s`, micro-step `a` of
    `A`, rank `r` of `W` take the `B` entries from `((s*A + a)*W + r) * B`. Entries that do not fill an effective batch
    `B*A*W` at the end are left out of this epoch; a list shorter than one is repeated up to it.

    With `dynamic_size=[(h_min, h_max), (w_min, w_max)]` every `dynamic_size_batch` micro-steps get another size, each
    side drawn from the multiples of `stride` in its range, the same on all ranks; otherwise all have `size`. One range
    alone is of squares.

    Raises:
        UserError: a range of `dynamic_size` without a multiple of `stride`, or an empty reader.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        batch_size: int,
        size: Size,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        dynamic_size: Sequence[tuple[int, int]] | None = None,
        dynamic_size_batch: int = 1,
        stride: int = 32,
    ):
        if not len(reader):
            raise UserError("data: there are no samples to train on")
        self.batch_size, self.grad_accum_steps = batch_size, grad_accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.size, self.dynamic_size_batch, self.stride = size, dynamic_size_batch, stride
        self.multiples = [_multiples(side, stride) for side in dynamic_size or ()]
        self._groups = [(np.array(indices), reader.weight_of(name)) for name, indices in reader.by_dataset().items()]
        self.epoch = self.start = 0
        effective = batch_size * grad_accum_steps * world_size
        self.samples_per_epoch = sum(_weighted_count(len(indices), weight) for indices, weight in self._groups)
        self.steps_per_epoch = max(1, self.samples_per_epoch // effective)
        self._taken = self.steps_per_epoch * effective

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, from its first micro-step."""
        self.epoch, self.start = epoch, 0

    def set_start(self, micro_step: int) -> None:
        """Leave out the epoch's first micro-steps, as a resumed run does."""
        self.start = micro_step

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank."""
        return self.steps_per_epoch * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, occurrences = self._order()
        for micro_step in range(self.start, len(self)):
            first = (micro_step * self.world_size + self.rank) * self.batch_size
            size = self._size_at(micro_step)
            yield [
                SampleKey(self.epoch, int(order[i]), int(occurrences[i]), size)
                for i in range(first, first + self.batch_size)
            ]

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's indices over all ranks, and how often each has come before."""
        seeds = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(0,))
        generator = np.random.Generator(np.random.PCG64(seeds))
        rounds: list[np.ndarray] = []
        while sum(map(len, rounds)) < self._taken:
            entries = [_weighted(indices, weight, generator) for indices, weight in self._groups]
            rounds.append(generator.permutation(np.concatenate(entries)))
        order = np.concatenate(rounds)[: self._taken]
        by_index = np.argsort(order, kind="stable")
        ranked = order[by_index]
        first_of_index = np.searchsorted(ranked, ranked)
        occurrences = np.empty_like(order)
        occurrences[by_index] = np.arange(len(order)) - first_of_index
        return order, occurrences

    def _size_at(self, micro_step: int) -> Size:
        if not self.multiples:
            return self.size
        seeds = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(1, micro_step // self.dynamic_size_batch))
        generator = np.random.Generator(np.random.PCG64(seeds))
        sides = [self.stride * int(generator.integers(low, high + 1)) for low, high in self.multiples]
        return sides[0], sides[-1]


def _multiples(side: tuple[int, int], stride: int) -> tuple[int, int]:
    low, high = -(-min(side) // stride), max(side) // stride
    if low > high or high < 1:
        raise UserError(f"data.dynamic_size: no multiple of the model's stride {stride} in {side[0]}..{side[1]}")
    return max(low, 1), high


def _weighted_count(count: int, weight: float) -> int:
    return max(1, round(count * weight))


def _weighted(indices: np.ndarray, weight: float, generator: np.random.Generator) -> np.ndarray:
    """That many of the indices, none taken more than once oftener than another."""
    whole, rest = divmod(_weighted_count(len(indices), weight), len(indices))
    return np.concatenate([np.repeat(indices, whole), generator.choice(indices, size=rest, replace=False)])


class EvalSampler(Sampler[list[SampleKey]]):
    """Every sample once, in order. Whole batches are dealt to the ranks in turn, so what is in a batch with what does
    not depend on how many ranks there are; nothing is padded, so ranks may have different numbers of batches."""

    def __init__(self, length: int, *, batch_size: int, size: Size, rank: int = 0, world_size: int = 1):
        self.size = size
        starts = range(0, length, batch_size)
        self._batches = [range(start, min(start + batch_size, length)) for start in starts][rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in self._batches:
            yield [SampleKey(0, index, 0, self.size) for index in batch]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def normalize(images: np.ndarray, statistics: str | tuple[float, float] = "imagenet") -> Tensor:
    """(..., H, W, 3) uint8 → (..., 3, H, W) float32 `(x / 255 - mean) / std`.

    `imagenet` takes the mean and deviation of ImageNet's channels, in the order of operations of torchvision's
    ToTensor and Normalize, so that the bits agree. `image` takes each image's own, over all channels: for microscopy
    and the like, where brightness says more about the lamp than about the object. A pair is a mean and a deviation for
    all channels: those of a whole picture, for its tiles.
    """
    planar = torch.from_numpy(images).movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    planar.div_(255)
    if statistics == "image":
        std, mean = torch.std_mean(planar, dim=(-3, -2, -1), keepdim=True, correction=0)
        return planar.sub_(mean).div_(std.clamp(min=1 / 255))  # a flat image stays flat
    if not isinstance(statistics, str):
        return planar.sub_(statistics[0]).div_(max(statistics[1], 1 / 255))
    means, stds = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return planar.sub_(means).div_(stds)


def collate(
    items: Sequence[Item],
    *,
    collate_targets: Callable[[list[Any]], Any],
    statistics: str = "imagenet",
    mix: Callable[[Sequence[Item]], Sequence[Item]] | None = None,
) -> Batch:
    """Stack items of one size into a batch; `collate_targets` is the task's, and is not asked at inference.

    `mix` makes mixtures of the items first, in training (`mixing.Mix`).
    """
    items = items if mix is None else mix(items)
    targets, images = [item.target for item in items], [item.image for item in items]
    normal = functools.partial(normalize, statistics=statistics)
    return Batch(
        images=normal(np.stack(images)) if isinstance(images[0], np.ndarray) else Streams(images, normal),
        targets=None if any(target is None for target in targets) else collate_targets(targets),
        samples=[item.info for item in items],
    )


def build_loader(
    dataset: Dataset,
    sampler: Sampler[list[SampleKey]],
    *,
    collate_targets: Callable[[list[Any]], Any],
    statistics: str = "imagenet",
    mix: Callable[[Sequence[Item]], Sequence[Item]] | None = None,
    workers: int = 0,
    persistent: bool = False,
    pin: bool = False,
    prefetch: int = 2,
    timeout: float = 0,
) -> DataLoader[Batch]:
    """A loader of `Batch` over a batch sampler, normalised by `statistics`; nothing else changes a byte of any batch.

    A worker may be silent for `timeout` seconds, 0 for ever, before the loader raises.

    Workers are forked where the system can: they inherit the cache's mapping, and decoding needs no clean start.
    """
    forks = workers > 0 and "fork" in get_all_start_methods()
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # of items; what the loader yields is collated
        batch_sampler=sampler,
        collate_fn=functools.partial(collate, collate_targets=collate_targets, statistics=statistics, mix=mix),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers > 0 else None,
        pin_memory=pin,
        timeout=timeout if workers > 0 else 0,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if forks else None,
        generator=torch.Generator(),  # its own, or every pass over the loader would move the global stream
    )


def _start_worker(worker: int) -> None:
    """One thread per worker, and deaf to everyone but the process it serves.

    Launchers signal whole process groups; a worker that died of it would make the loop fail where it means to save.
    """
    cv2.setNumThreads(0)
    Queue._on_queue_feeder_error = staticmethod(_end_of_failure)  # type: ignore[attr-defined]
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_of_failure(error: Exception, item: Any) -> None:
    """Exit when a batch cannot be handed over. By itself a worker only says so, and the loop waits for ever."""
    if "shared memory" in str(error):
        os._exit(NO_SHARED_MEMORY)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _end_when_told_by(process: int) -> None:
    """Exit on a SIGTERM of that process, as a loader sends to workers that it could not stop otherwise."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        continue
    os._exit(0)


def composition(samples: Iterable[SampleInfo], names: Sequence[str]) -> list[int]:
    """How many of the samples come from each of the named datasets."""
    counts = Counter(sample.dataset for sample in samples)
    return [counts[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# The binary task


@dataclass
class BinaryItem:
    alpha: np.ndarray  # (H, W) uint8 at the model's size
    class_id: int  # -1 where unknown
    original: np.ndarray | None  # (h, w) uint8 at the sample's own size, in evaluation


def binary_target(sample: Sample, original: Sample | None) -> BinaryItem:
    """The target of one sample; `original` is the sample as read, in evaluation."""
    return BinaryItem(
        alpha=sample.masks,
        class_id=sample.class_ids[0] if sample.class_ids else -1,
        original=None if original is None else original.masks,
    )


def collate_binary(items: Sequence[BinaryItem]) -> BinaryTarget:
    """Alpha / 255 as float32 (B, 1, H, W); see `BinaryTarget`."""
    return BinaryTarget(
        masks=torch.from_numpy(np.stack([item.alpha for item in items])).unsqueeze(1).float().div_(255),
        class_ids=torch.tensor([item.class_id for item in items], dtype=torch.int64),
        originals=[torch.from_numpy(item.original) for item in items if item.original is not None],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The semantic task


@dataclass
class SemanticItem:
    labels: np.ndarray  # (H, W) uint8 at the model's size
    original: np.ndarray | None  # (h, w) uint8 at the sample's own size, in evaluation
    blended: np.ndarray | None = None  # labels of the picture that was blended in
    share: float = 1.0  # of the sample's own picture, the same in a whole batch


def semantic_target(sample: Sample, original: Sample | None) -> SemanticItem:
    """The target of one sample; `original` is the sample as read, in evaluation."""
    return SemanticItem(labels=sample.masks, original=None if original is None else original.masks)


def collate_semantic(items: Sequence[SemanticItem]) -> SemanticTarget:
    """Labels as uint8 (B, H, W); see `SemanticTarget`."""
    blended = [item.blended for item in items if item.blended is not None]
    return SemanticTarget(
        labels=torch.from_numpy(np.stack([item.labels for item in items])),
        originals=[torch.from_numpy(item.original) for item in items if item.original is not None],
        blended=torch.from_numpy(np.stack(blended)) if blended else None,
        share=items[0].share,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The instance task


@dataclass
class InstanceItem:
    labels: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float32 center x, center y, width, height, as shares of the sides
    maps: np.ndarray  # (L, H, W) int16 at the model's size
    layer_of: np.ndarray  # (n,) int64
    original: Objects | None  # the objects as read, in evaluation
    original_labels: list[int]


def instance_target(sample: Sample, original: Sample | None) -> InstanceItem:
    """The target of one sample; `original` is the sample as read, in evaluation."""
    layers = sample.masks
    height, width, _ = layers.maps.shape
    corners = layers.boxes / np.array([width, height, width, height], np.float32)
    return InstanceItem(
        labels=np.array(sample.class_ids, np.int64),
        boxes=np.hstack([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]]),
        maps=np.ascontiguousarray(layers.maps.transpose(2, 0, 1)).view(np.int16),
        layer_of=layers.layer_of,
        original=None if original is None else original.masks,
        original_labels=[] if original is None else original.class_ids,
    )


def collate_instance(items: Sequence[InstanceItem]) -> InstanceTarget:
    """The objects of all items one after the other, layers filled up with empty ones; see `InstanceTarget`."""
    most = max(len(item.maps) for item in items)
    evaluated = [item for item in items if item.original is not None]
    maps = [np.pad(item.maps, ((0, most - len(item.maps)), (0, 0), (0, 0))) for item in items]
    return InstanceTarget(
        counts=[len(item.labels) for item in items],
        labels=torch.from_numpy(np.concatenate([item.labels for item in items])),
        boxes=torch.from_numpy(np.concatenate([item.boxes for item in items])),
        maps=torch.from_numpy(np.stack(maps)),
        layer_of=torch.from_numpy(np.concatenate([item.layer_of for item in items])),
        originals=[item.original for item in evaluated if item.original is not None],
        original_labels=[item.original_labels for item in evaluated],
    )

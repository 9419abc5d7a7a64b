"""Clips of any length as models take them in evaluation: one frame after the other, none of them kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from samples import Size

AHEAD = 4  # frames that are decoded before they are asked for

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int, depth: int) -> Iterator[R]:
    """`map(work, items)`, in order, on threads; at most `depth` results wait to be asked for. Without threads a `map`.

    Items are taken by who asks, on whose thread an iterator within thus runs: one of these before the model and one
    after it decode, predict and write at once, in bounded memory.
    """
    if not threads:
        yield from map(work, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class FrameStream:
    """The frames of a clip at a size.

    Bicubic and antialiased, as the official predictor reads frames of a video (sam2/utils/misc.py).
    """

    def __init__(self, frames: Sequence[np.ndarray], size: Size):
        self.frames, self.size = frames, size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return resized(self.frames[number], self.size)

    def __iter__(self) -> Iterator[np.ndarray]:
        """All frames in order; the next ones are decoded on another thread meanwhile."""
        return ahead(self.__getitem__, range(len(self)), 1, AHEAD)


def resized(frame: np.ndarray, size: Size, how: InterpolationMode = InterpolationMode.BICUBIC) -> np.ndarray:
    """(H, W, 3) uint8 at another size, antialiased."""
    if frame.shape[:2] == tuple(size):
        return frame
    planes = torch.from_numpy(frame).permute(2, 0, 1)
    return resize(planes, list(size), how, antialias=True).permute(1, 2, 0).numpy()


class Streams:
    """The clips of a batch in evaluation: `for clip in streams: for frame in clip:` (3, H, W) float32, normalised.

    Stands where other batches have a tensor; frames go to a device when the model takes them.
    """

    def __init__(self, clips: Sequence[FrameStream], normalize: Callable[[np.ndarray], Tensor]):
        self.clips, self.normalize = list(clips), normalize

    def __len__(self) -> int:
        return len(self.clips)

    def __iter__(self) -> Iterator[Iterator[Tensor]]:
        for clip in self.clips:
            yield (self.normalize(frame[None])[0] for frame in clip)

    def __getitem__(self, part: slice) -> Streams:
        return Streams(self.clips[part], self.normalize)

    def to(self, *where: Any, **how: Any) -> Streams:
        return self

    def pin_memory(self) -> Streams:
        return self

"""What a clip is made of, decoded when it is asked for: frames, and the masks of objects over them.

All of it is small and can be pickled, as long as the files stay where they are.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from readers.base import DataError, Fault
from readers.films import FilmFrames
from readers.images import read_alpha, read_image, read_labels
from samples import Rle, Size

Seen = tuple[int, ...] | None  # the places of objects that a frame shows; None where nobody has looked


# ---------------------------------------------------------------------------------------------------------------------
# Frames


class FrameFiles(Sequence[np.ndarray]):
    """Pictures below one folder, (H, W, 3) uint8 RGB each."""

    def __init__(self, folder: str, names: Sequence[str]):
        self.folder, self.names = folder, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: Any) -> Any:
        return read_image(self.path(number))

    def path(self, number: int) -> str:
        return os.path.join(self.folder, self.names[number])


Frames = FrameFiles | FilmFrames


# ---------------------------------------------------------------------------------------------------------------------
# Masks


class SeenMasklets(ABC):
    """`samples.Masklets` of which it is known beforehand what each frame shows; subclasses know the masks."""

    def __init__(self, object_ids: Sequence[int], seen: Sequence[Seen]):
        self.object_ids, self.seen = tuple(object_ids), tuple(seen)
        self.annotated = tuple(places is not None for places in seen)

    def visible(self, frame: int) -> list[int]:
        return list(self.seen[frame] or ())

    @abstractmethod
    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray: ...


class LabelMasklets(SeenMasklets):
    """A label map for each annotated frame, in which the pixels of an object have its value."""

    def __init__(
        self, folder: str, names: Sequence[str], values: Sequence[int], object_ids: Sequence[int], seen: Sequence[Seen]
    ):
        super().__init__(object_ids, seen)
        self.folder, self.names, self.values = folder, tuple(names), tuple(values)

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        labels = read_ids(os.path.join(self.folder, self.names[frame]))
        return labels == np.array([self.values[place] for place in objects], np.uint8)[:, None, None]


class FileMasklets(SeenMasklets):
    """A mask file, black and white, for each object in each annotated frame; where there is none, the frame does not
    show the object."""

    def __init__(self, files: Sequence[Sequence[str]], size: Size, object_ids: Sequence[int], seen: Sequence[Seen]):
        super().__init__(object_ids, seen)
        self.files, self.size = files, size  # files[frame][object], "" where there is none

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        masks = np.zeros((len(objects), *self.size), bool)
        for row, place in enumerate(objects):
            if self.files[frame][place]:
                masks[row] = read_mask(self.files[frame][place], self.size)
        return masks


class CodeMasklets(SeenMasklets):
    """Run-length codes of what each frame shows, in the order of `seen`."""

    def __init__(self, codes: Sequence[Sequence[bytes]], size: Size, object_ids: Sequence[int], seen: Sequence[Seen]):
        super().__init__(object_ids, seen)
        self.codes, self.size = codes, size

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        found = dict(zip(self.visible(frame), self.codes[frame], strict=True))
        return drawn([found.get(place) for place in objects], self.size)


def drawn(codes: Sequence[bytes | None], size: Size) -> np.ndarray:
    """(n, H, W) bool masks of run-length codes, empty where there is none."""
    masks = np.zeros((len(codes), *size), bool)
    for row, code in enumerate(codes):
        if code is not None:
            rle: Rle = {"size": list(size), "counts": code}
            masks[row] = coco_mask.decode(rle)
    return masks


def read_ids(path: str) -> np.ndarray:
    """A mask (H, W) uint8 whose pixels hold the ids of objects, 0 where there is none; see `images.read_labels`."""
    return read_labels(path, what="object ids")


def read_mask(path: str, size: Size) -> np.ndarray:
    """A mask (H, W) bool of one object; see `images.read_alpha`."""
    mask = read_alpha(path) > 127
    check_size(path, mask, size)
    return mask


def check_size(path: str, picture: np.ndarray, size: Size) -> None:
    """Raise a `DataError` where a mask, or a frame, is not of the size of the clip's first frame."""
    (height, width), (first_height, first_width) = picture.shape[:2], size
    if (height, width) != (first_height, first_width):
        problem = f"is {width}x{height}, the first frame of its clip {first_width}x{first_height} (upright)"
        raise DataError(Fault(path, problem))


# ---------------------------------------------------------------------------------------------------------------------
# Clips


class Clip(ABC):
    """One clip as it was listed, nothing of it decoded."""

    def __init__(self, name: str, path: str):
        self.name, self.path = name, path

    @abstractmethod
    def frames(self) -> Frames:
        """Its frames; a `DataError` where there are none."""

    @abstractmethod
    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        """Decode all masks, which should be of this size: the objects, and what is wrong with their masks."""

    @abstractmethod
    def files(self) -> list[str]:
        """All that it is read from, by the paths that faults have."""


class ClipSet:
    """One data set as it was listed."""

    def __init__(self, name: str, weight: float = 1.0):
        self.name, self.weight = name, weight
        self.clips: list[Clip] = []
        self.faults: list[Fault] = []

    def fault(self, path: str | os.PathLike[str], problem: str) -> None:
        self.faults.append(Fault(os.fspath(path), problem))

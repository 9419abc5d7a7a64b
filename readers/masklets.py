"""What a clip is made of, decoded when it is asked for: frames, and the masks of objects over them.

All of it is small and can be pickled, as long as the files stay where they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from readers.base import DataError, Fault
from readers.images import read_image, read_labels
from samples import Size

MAX_IDS = 254  # of a label map: 0 is the ground, 255 is void

Seen = tuple[int, ...] | None  # the places of objects that a frame shows; None where nobody has looked


class FrameFiles(Sequence[np.ndarray]):
    """Pictures of one folder, (H, W, 3) uint8 RGB each."""

    def __init__(self, folder: str, names: Sequence[str]):
        self.folder, self.names = folder, tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: Any) -> Any:
        return read_image(self.path(number))

    def path(self, number: int) -> str:
        return os.path.join(self.folder, self.names[number])


class SeenMasklets:
    """`samples.Masklets` of which it is known beforehand what each frame shows; subclasses know the masks."""

    def __init__(self, object_ids: Sequence[int], seen: Sequence[Seen]):
        self.object_ids, self.seen = tuple(object_ids), tuple(seen)
        self.annotated = tuple(places is not None for places in seen)

    def visible(self, frame: int) -> list[int]:
        return list(self.seen[frame] or ())

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        raise NotImplementedError


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


def read_ids(path: str) -> np.ndarray:
    """A mask (H, W) uint8 whose pixels hold the ids of objects, 0 where there is none; see `images.read_labels`."""
    return read_labels(path, what="object ids")


def look_through(folder: str, names: Sequence[str], size: Size) -> tuple[LabelMasklets, list[Fault]]:
    """The objects of a clip's label maps, named by frame, nothing where there is none; and what is wrong with them.

    Where nothing has another value than 0 and 255, 255 is the object 1 (DAVIS 2016); beside ids it is void, which
    belongs to no object.
    """
    found: list[np.ndarray | None] = []
    faults: list[Fault] = []
    for name in names:
        values = None
        if name:
            try:
                values = _values(os.path.join(folder, name), size)
            except DataError as error:
                faults.append(error.fault)
        found.append(values)
    present = np.unique(np.concatenate([np.zeros(0, np.int64), *(values for values in found if values is not None)]))
    values = present[(present > 0) & (present <= MAX_IDS)]
    object_ids = values
    if not len(values) and 255 in present:
        values, object_ids = np.array([255]), np.array([1])
    seen = [None if each is None else tuple(np.flatnonzero(np.isin(values, each)).tolist()) for each in found]
    return LabelMasklets(folder, names, values.tolist(), object_ids.tolist(), seen), faults


def _values(path: str, size: Size) -> np.ndarray:
    labels = read_ids(path)
    check_size(path, labels, size)
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=256))


def check_size(path: str, picture: np.ndarray, size: Size) -> None:
    """Raise a `DataError` where a mask, or a frame, is not of the size of the clip's first frame."""
    (height, width), (first_height, first_width) = picture.shape[:2], size
    if (height, width) != (first_height, first_width):
        problem = f"is {width}x{height}, the first frame of its clip {first_width}x{first_height} (upright)"
        raise DataError(Fault(path, problem))

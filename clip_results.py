"""Objects followed through clips as masks on disk, of any program and our own, as servers of benchmarks take them.

Those are label maps, <clip>/<frame>.png, whose pixels hold the ids of objects, 0 where there is none; or, as SA-V has
them, a mask of each object, <clip>/<object>/<frame>.png, not 0 where it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from errors import UserError
from metrics.video import label_map, scored_frames
from readers import DataError, Fault, Reader
from readers.images import read_alpha
from readers.masklets import read_ids
from readers.masks import inner_folder
from samples import Batch, Sample, Size
from writers import write_palette

MAX_IDS = 254  # of a label map: 0 is the ground
UNKNOWN = 255  # the place of values that are no object's


def clip_names(reader: Reader) -> list[str]:
    """The names of all clips without those of their data sets; `UserError` where two clips have the same."""
    names = [reader.sample_id(index).removeprefix(f"{reader.dataset_of(index)}/") for index in range(len(reader))]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"several data sets have a clip {doubled[0]}: masks by the names of clips are of one set alone")
    return names


def frame_names(frames: Any) -> list[str]:
    """What frames of `readers.masklets` are called: their files without suffixes, or their numbers in a video file."""
    names = [Path(frames.path(number)).stem for number in range(len(frames))]
    return names if len({*names}) == len(names) else [f"{number:05d}" for number in range(len(names))]


def nameless(object_ids: Sequence[int]) -> list[int]:
    """Objects that a label map has no value for."""
    return [number for number in object_ids if not 0 < number <= MAX_IDS]


def object_folders(clip: str) -> dict[int, str]:
    """{object: folder} of a clip's masks, none where they are label maps."""
    folders = Path(clip).iterdir() if os.path.isdir(clip) else ()
    return {int(path.name): str(path) for path in folders if path.name.isdecimal() and path.is_dir()}


# ---------------------------------------------------------------- of any program


class FoundLabels(Sequence[np.ndarray]):
    """The label maps of a clip's frames, (H, W) uint8: 1 + the place of an object among the clip's, decoded late.

    255 is an object, too, where it is the only one, as masks of one object often have it.
    """

    def __init__(self, paths: Sequence[str], object_ids: Sequence[int], size: Size, *, resize: bool):
        self.paths, self.object_ids, self.size, self.resize = paths, object_ids, size, resize
        self.places = np.full(256, UNKNOWN, np.uint8)
        self.places[0] = 0
        for place, number in enumerate(object_ids, 1):
            if 0 < number <= MAX_IDS:
                self.places[number] = place
        if len(object_ids) == 1:
            self.places[255] = 1

    def __len__(self) -> int:
        return len(self.paths)

    def files(self, frame: int) -> list[str]:
        return [self.paths[frame]]

    def __getitem__(self, frame: Any) -> Any:
        """Raises DataError for one that cannot be scored."""
        (path,) = self.files(frame)
        ids = of_size(path, read_ids(path), self.size, resize=self.resize)
        labels = cv2.LUT(ids, self.places)
        if labels.max() == UNKNOWN:
            unknown, known = (", ".join(map(str, ids)) for ids in (np.unique(ids[labels == UNKNOWN]), self.object_ids))
            raise DataError(Fault(path, f"holds what its clip does not have: {unknown}; the objects there are {known}"))
        return labels


class FoundMasks(Sequence[np.ndarray]):
    """The masks of a clip's objects in its frames, (n, H, W) bool, decoded late."""

    def __init__(self, folders: Sequence[str], names: Sequence[str], size: Size, *, resize: bool):
        self.folders, self.names, self.size, self.resize = folders, names, size, resize

    def __len__(self) -> int:
        return len(self.names)

    def files(self, frame: int) -> list[str]:
        return [os.path.join(folder, self.names[frame]) for folder in self.folders]

    def __getitem__(self, frame: Any) -> Any:
        """Raises DataError for one that cannot be scored."""
        masks = (of_size(path, read_alpha(path), self.size, resize=self.resize) for path in self.files(frame))
        return np.stack([mask > 0 for mask in masks])


def of_size(path: str, mask: np.ndarray, size: Size, *, resize: bool) -> np.ndarray:
    """A mask at the size of its clip; where it is of another, brought there by nearest neighbour, or a DataError."""
    (height, width), shape = size, mask.shape
    if shape == (height, width):
        return mask
    if not resize:
        problem = f"is {shape[1]}x{shape[0]}, its clip is {width}x{height}"
        raise DataError(Fault(path, f"{problem}; --resize_predictions brings it to that size"))
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


class FinishedClips(Reader):
    """Masks below a folder, of any program, and the clips of `truth` that they are of.

    A sample's frames are `FoundLabels`, or `FoundMasks` where its folder has folders. Only frames that are scored must
    be there. `folder` may be what inference.py wrote, with `masks/`. Clips without truth are no fault but stand in
    `extra`. With `resize` masks of another size are brought to the clip's by nearest neighbour.
    """

    def __init__(self, folder: str | os.PathLike[str], truth: Reader, *, resize: bool = False):
        self.folder, self.truth, self.resize = inner_folder(Path(folder), "masks"), truth, resize
        self.names = clip_names(truth)
        self.faults = [*truth.faults]
        found = {path.name for path in self.folder.iterdir() if path.is_dir()} if self.folder.is_dir() else set()
        if not found:
            self.faults.append(Fault(str(self.folder), "holds no folders of masks, one for each clip"))
        self.extra = sorted(str(self.folder / name) for name in found - {*self.names})

    def __len__(self) -> int:
        return len(self.truth)

    def read(self, index: int) -> Sample:
        sample, path = self.truth.read(index), self._path(index)
        height, width = sample.frames[0].shape[:2]
        names = [f"{name}.png" for name in frame_names(sample.frames)]
        found: FoundLabels | FoundMasks
        if folders := object_folders(path):
            chosen = [folders.get(number, os.path.join(path, str(number))) for number in sample.masks.object_ids]
            found = FoundMasks(chosen, names, (height, width), resize=self.resize)
        else:
            paths = [os.path.join(path, name) for name in names]
            found = FoundLabels(paths, sample.masks.object_ids, (height, width), resize=self.resize)
        return replace(sample, frames=found, path=path)

    def find_faults(self, index: int) -> list[Fault]:
        if faults := self.truth.find_faults(index):
            return faults
        sample, faults = self.read(index), []
        found, scored = sample.frames, scored_frames(sample.masks.annotated)
        assert isinstance(found, FoundLabels | FoundMasks)
        if isinstance(found, FoundLabels) and (unnamed := nameless(found.object_ids)):
            problem = f"label maps cannot hold the object {unnamed[0]}; masks are wanted, <object>/<frame>.png"
            return [Fault(sample.path, problem)]
        files = [path for frame in scored for path in found.files(frame)]
        lacking = [os.path.relpath(path, sample.path) for path in files if not os.path.isfile(path)]
        if lacking:
            names = ", ".join(lacking[:3]) + (" …" if len(lacking) > 3 else "")
            what = "frames" if isinstance(found, FoundLabels) else "masks"
            faults.append(Fault(sample.path, f"lacks {len(lacking)} of {len(files)} scored {what}: {names}"))
        for frame in scored:
            if all(map(os.path.isfile, found.files(frame))):
                try:
                    found[frame]
                except DataError as error:
                    faults.append(error.fault)
        return faults

    def findings(self) -> Any:
        return self.truth.findings()

    def adopt(self, findings: Any) -> None:
        self.truth.adopt(findings)

    def sample_id(self, index: int) -> str:
        return self.truth.sample_id(index)

    def dataset_of(self, index: int) -> str:
        return self.truth.dataset_of(index)

    def files(self, index: int) -> list[str]:
        path = self._path(index)
        return [*self.truth.files(index), path, *map(str, Path(path).rglob("*.png"))]

    def _path(self, index: int) -> str:
        return str(self.folder / self.names[index])


# ---------------------------------------------------------------- our own


class SavedMasks:
    """Writes what was found in the clips of a reader below a folder, each file atomically; to be called with batches.

    Label maps, or where they cannot hold the ids of all objects, as those of SA-V, masks of each object.

    Raises:
        UserError: two clips have one name.
    """

    def __init__(self, folder: str | os.PathLike[str], reader: Reader):
        self.folder, self.reader, self.names = Path(folder), reader, clip_names(reader)
        self.places = {reader.sample_id(index): index for index in range(len(reader))}
        self.are_labels = not any(nameless(reader.read(index).masks.object_ids) for index in range(len(reader)))

    def __call__(self, predictions: dict[str, Any], batch: Batch) -> None:
        for logits, truth, sample in zip(predictions["logits"], batch.targets.originals, batch.samples, strict=True):
            index = self.places[sample.sample_id]
            clip = self.folder / self.names[index]
            for frame, name in enumerate(frame_names(self.reader.read(index).frames)):
                labels = label_map(logits[:, frame], sample.size)
                if self.are_labels:
                    ids = np.array([0, *truth.object_ids], np.uint8)
                    write_palette(clip / f"{name}.png", ids[labels])
                    continue
                for place, number in enumerate(truth.object_ids, 1):
                    write_palette(clip / f"{number:03d}" / f"{name}.png", (labels == place).astype(np.uint8))

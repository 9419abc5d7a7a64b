"""Objects followed through clips as label maps on disk, those of any program and our own: <clip>/<frame>.png each.

That is the layout of DAVIS, which servers of benchmarks take. Pixels hold the ids of objects, 0 where there is none.
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
from readers.masklets import read_ids
from readers.masks import inner_folder
from samples import Batch, Sample, Size
from writers import write_palette

MAX_IDS = 255  # values of a label map beside 0
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
            self.places[number] = place
        if len(object_ids) == 1:
            self.places[255] = 1

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, frame: Any) -> Any:
        """Raises DataError for one that cannot be scored."""
        path = self.paths[frame]
        ids = read_ids(path)
        (height, width), shape = self.size, ids.shape
        if shape != (height, width):
            if not self.resize:
                problem = f"is {shape[1]}x{shape[0]}, its clip is {width}x{height}"
                raise DataError(Fault(path, f"{problem}; --resize_predictions brings it to that size"))
            ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        labels = cv2.LUT(ids, self.places)
        if labels.max() == UNKNOWN:
            unknown, known = (", ".join(map(str, ids)) for ids in (np.unique(ids[labels == UNKNOWN]), self.object_ids))
            raise DataError(Fault(path, f"holds what its clip does not have: {unknown}; the objects there are {known}"))
        return labels


class FinishedClips(Reader):
    """Label maps below a folder, of any program, and the clips of `truth` that they are of.

    A sample's frames are the label maps, see `FoundLabels`. Only frames that are scored must be there. `folder` may be
    what inference.py wrote, with `masks/`. Clips without truth are no fault but stand in `extra`. With `resize` maps of
    another size are brought to the clip's by nearest neighbour.
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
        sample = self.truth.read(index)
        height, width = sample.frames[0].shape[:2]
        paths = [os.path.join(self._path(index), f"{name}.png") for name in frame_names(sample.frames)]
        labels = FoundLabels(paths, sample.masks.object_ids, (height, width), resize=self.resize)
        return replace(sample, frames=labels, path=self._path(index))

    def find_faults(self, index: int) -> list[Fault]:
        if faults := self.truth.find_faults(index):
            return faults
        masklets = self.truth.read(index).masks
        if unnamed := nameless(masklets.object_ids):
            problem = f"has an object {unnamed[0]}; those of label maps are 1 to {MAX_IDS}"
            return [Fault(self.truth.files(index)[0], problem)]
        labels, scored = self.read(index).frames, scored_frames(masklets.annotated)
        assert isinstance(labels, FoundLabels)
        lacking = [labels.paths[frame] for frame in scored if not os.path.isfile(labels.paths[frame])]
        if lacking:
            names = ", ".join(os.path.basename(path) for path in lacking[:3]) + (" …" if len(lacking) > 3 else "")
            faults.append(Fault(self._path(index), f"lacks {len(lacking)} of {len(scored)} scored frames: {names}"))
        for frame in scored:
            if labels.paths[frame] not in lacking:
                try:
                    labels[frame]
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
        return [*self.truth.files(index), path, *map(str, Path(path).glob("*.png"))]

    def _path(self, index: int) -> str:
        return str(self.folder / self.names[index])


# ---------------------------------------------------------------- our own


class SavedLabels:
    """Writes what was found in the clips of a reader below a folder, each frame atomically; to be called with batches.

    Raises:
        UserError: two clips have one name, or an object has an id that no label map can hold.
    """

    def __init__(self, folder: str | os.PathLike[str], reader: Reader):
        self.folder, self.reader, self.names = Path(folder), reader, clip_names(reader)
        self.places = {reader.sample_id(index): index for index in range(len(reader))}

    def __call__(self, predictions: dict[str, Any], batch: Batch) -> None:
        for logits, truth, sample in zip(predictions["logits"], batch.targets.originals, batch.samples, strict=True):
            if unnamed := nameless(truth.object_ids):
                problem = f"{sample.path} has an object {unnamed[0]}, and label maps have values from 1 to {MAX_IDS}"
                raise UserError(f"{problem}: leave out --output_masks")
            index, ids = self.places[sample.sample_id], np.array([0, *truth.object_ids], np.uint8)
            for frame, name in enumerate(frame_names(self.reader.read(index).frames)):
                labels = ids[label_map(logits[:, frame], sample.size)]
                write_palette(self.folder / self.names[index] / f"{name}.png", labels)

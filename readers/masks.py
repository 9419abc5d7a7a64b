"""Finished masks, of any program, beside the ground truth that they are scored against."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from readers.base import DataError, Fault, Reader
from readers.folders import IMAGE_SUFFIXES, Pair, list_stems
from readers.images import read_alpha
from samples import Sample


class FinishedMasks(Reader):
    """Masks below one folder and the truth below another, of the same stems, sub-folders included.

    `ground_truth` may be a data set with `gt/`, `predictions` what inference.py wrote, with `masks/`. A sample's
    picture, `frames[0]`, is the prediction, (H, W) uint8, `masks` the truth. Sample ids are those that the data set's
    own samples have. A prediction without truth is no fault but stands in `extra`: a folder may serve several test
    sets. With `resize` a prediction of another size is brought to that of the truth bilinearly, as the official
    evaluations do.

    Masks of which none has a value above 1 hold labels, and 1 means 255. One dark mask among others is just dark.
    """

    def __init__(
        self, predictions: str | os.PathLike[str], ground_truth: str | os.PathLike[str], *, resize: bool = False
    ):
        self.faults: list[Fault] = []
        self.resize = resize
        folder, truth = inner_folder(Path(predictions), "masks"), inner_folder(Path(ground_truth), "gt")
        found, wanted = (self._list(path) for path in (folder, truth))
        dataset = (truth.parent if truth.name == "gt" else truth).resolve().name
        self._pairs = [Pair(found[stem], wanted[stem], stem, dataset) for stem in sorted(found.keys() & wanted.keys())]
        self.extra = [found[stem] for stem in sorted(found.keys() - wanted.keys())]
        if found and wanted:
            self.faults += [Fault(wanted[stem], f"has no prediction of the same name in {folder}")
                            for stem in sorted(wanted.keys() - found.keys())]  # fmt: skip
        self._are_labels = all(_brightest(pair.image) <= 1 for pair in self._pairs)

    def _list(self, folder: Path) -> dict[str, str]:
        """{stem: path} of the masks in a folder; one without any is a fault."""
        found = list_stems(folder, "", self.faults) if folder.is_dir() else {}
        if not found:
            self.faults.append(Fault(str(folder), f"holds no masks ({' '.join(s[1:] for s in IMAGE_SUFFIXES)})"))
        return found

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> Sample:
        pair = self._pairs[index]
        truth, prediction = read_alpha(pair.mask), read_alpha(pair.image, labels=self._are_labels)
        if prediction.shape != truth.shape:
            if not self.resize:
                raise DataError(_size_fault(pair, prediction, truth))
            prediction = cv2.resize(prediction, truth.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return Sample([prediction], truth, sample_id=self.sample_id(index), path=pair.image, dataset=pair.dataset)

    def find_faults(self, index: int) -> list[Fault]:
        pair, decoded, faults = self._pairs[index], [], []
        for path in (pair.image, pair.mask):
            try:
                decoded.append(read_alpha(path))
            except DataError as error:
                faults.append(error.fault)
        if not (faults or self.resize) and decoded[0].shape != decoded[1].shape:
            faults.append(_size_fault(pair, *decoded))
        return faults

    def sample_id(self, index: int) -> str:
        return f"{self._pairs[index].dataset}/{self._pairs[index].stem}"

    def dataset_of(self, index: int) -> str:
        return self._pairs[index].dataset

    def files(self, index: int) -> list[str]:
        return [self._pairs[index].image, self._pairs[index].mask]


def inner_folder(folder: Path, name: str) -> Path:
    """The folder of that name inside, where there is one."""
    return folder / name if (folder / name).is_dir() else folder


def _size_fault(pair: Pair, prediction: np.ndarray, truth: np.ndarray) -> Fault:
    (h, w), (truth_h, truth_w) = prediction.shape, truth.shape
    problem = f"is {w}x{h}, its truth {pair.mask} is {truth_w}x{truth_h}; --resize_predictions brings it to that size"
    return Fault(pair.image, problem)


def _brightest(path: str) -> int:
    """The largest value of a mask; of one that cannot be read, which is another's business, 0."""
    try:
        return int(np.max(read_alpha(path, labels=False)))
    except DataError:
        return 0

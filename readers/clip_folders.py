"""Clips in folders, as DAVIS, MOSE, YouTube-VOS and the test sets of SA-V have them."""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from readers.base import DataError, Fault
from readers.folders import IMAGE_SUFFIXES
from readers.masklets import (
    Clip,
    ClipSet,
    FileMasklets,
    FrameFiles,
    Frames,
    LabelMasklets,
    Seen,
    SeenMasklets,
    check_size,
    read_ids,
    read_mask,
)
from samples import Size

FRAME_FOLDERS, MASK_FOLDERS = ("JPEGImages", "JPEGImages_24fps"), ("Annotations", "Annotations_6fps")
SIZES = ("480p", "Full-Resolution", "1080p")  # levels that DAVIS has; it evaluates at the first


def list_folder(root: Path, found: ClipSet, wanted: dict[str, str] | None = None) -> None:
    """`JPEGImages/<clip>/<frame>.jpg` and `Annotations/<clip>/<frame>.png`, all clips or those in `wanted`.

    A frame without a mask is not annotated. A mask is a label map: palette or grey, with the ids of objects, 1 to 254,
    and 255 for void, which belongs to none; or nothing but 0 and 255 in the whole clip, for one object, as DAVIS 2016.
    Instead there may be a black and white mask for each object, `Annotations/<clip>/<object>/<frame>.png`. Above the
    clips there may be a level of sizes, `480p/` or `Full-Resolution/`; the first of them is taken.

    `wanted` is {name: the file that names it}.
    """
    frames, masks = frames_folder(root), _inner(root, MASK_FOLDERS)
    if frames is None or masks is None:
        absent = "Annotations" if frames else "JPEGImages"
        found.fault(
            root, f"has no folder {absent}; clips are in JPEGImages/<clip>/, their masks in Annotations/<clip>/"
        )
        return
    size = next((size for size in SIZES if (frames / size).is_dir() and (masks / size).is_dir()), "")
    frames, masks = frames / size, masks / size
    for name in sorted(wanted if wanted is not None else subfolders(frames, found), key=natural):
        if not (frames / name).is_dir():
            found.fault((wanted or {}).get(name, frames), f"names the clip {name}, which is not in {frames}")
        elif not (masks / name).is_dir():
            found.fault(frames / name, f"has no masks: there is no folder {masks / name}")
        elif all(is_inside(folder / name, root, found) for folder in (frames, masks)):
            _add_clip(name, frames / name, masks / name, root, found)
    if not found.clips and not found.faults:
        found.fault(frames, "holds no clips, each a folder of frames")


def list_names(file: Path, root: Path, found: ClipSet) -> None:
    """The clips of `list_folder` that a text names, one in each line; DAVIS 2016 names a frame and a mask instead."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError:
        found.fault(file, "is no text in UTF-8")
        return
    names = dict.fromkeys(
        PurePosixPath(words[0]).parent.name if "/JPEGImages/" in words[0] else " ".join(words) for words in lines
    )
    for name in [name for name in names if not is_plain(name)]:
        found.fault(file, f"names the clip {name!r}, which is no name of a folder")
        del names[name]
    if not lines:
        found.fault(file, "names no clips")
    elif names:
        list_folder(root, found, dict.fromkeys(names, str(file)))


def frames_folder(root: Path) -> Path | None:
    """Where the frames of a data set are, if it is one in this layout."""
    return _inner(root, FRAME_FOLDERS)


def _inner(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _add_clip(name: str, frames: Path, masks: Path, root: Path, found: ClipSet) -> None:
    pictures = list_files(frames, root, found)
    if not pictures:
        found.fault(frames, "holds no frames")
        return
    files = FrameFiles(str(frames), list(pictures.values()))
    objects = subfolders(masks, found)
    maps = {} if objects else _named_as(pictures, masks, frames, root, found)
    if not objects:
        found.clips.append(LabelledClip(name, files, str(masks), [maps.get(stem, "") for stem in pictures]))
        return
    for words in [words for words in objects if not re.fullmatch("[0-9]{1,18}", words)]:
        found.fault(masks / words, "is no number of an object")
        objects.remove(words)
    numbers = sorted(objects, key=int)
    listed = {words: _named_as(pictures, masks / words, frames, root, found) for words in numbers}
    by_frame = [tuple(listed[words].get(stem, "") for words in numbers) for stem in pictures]
    found.clips.append(ObjectsClip(name, files, str(masks), numbers, by_frame))


def _named_as(pictures: dict[str, str], masks: Path, frames: Path, root: Path, found: ClipSet) -> dict[str, str]:
    """The masks in a folder, each of which should have its frame."""
    maps = list_files(masks, root, found) if is_inside(masks, root, found) else {}
    for stem in sorted(maps.keys() - pictures.keys()):
        found.fault(masks / maps[stem], f"has no frame of the same name in {frames}")
    return maps


class FolderClip(Clip):
    """Frames in a folder of their own."""

    def __init__(self, name: str, frames: FrameFiles):
        super().__init__(name, frames.folder)
        self._frames = frames

    def frames(self) -> Frames:
        return self._frames

    def files(self) -> list[str]:
        return [self.path, *map(self._frames.path, range(len(self._frames)))]


class LabelledClip(FolderClip):
    """With label maps of some of the frames in another folder."""

    def __init__(self, name: str, frames: FrameFiles, masks: str, names: Sequence[str]):
        super().__init__(name, frames)
        self.masks, self.names = masks, tuple(names)  # "" where there is none

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        there: list[np.ndarray | None] = []  # values in each map
        faults = []
        for name in self.names:
            try:
                there.append(_values(os.path.join(self.masks, name), size) if name else None)
            except DataError as error:
                faults.append(error.fault)
                there.append(None)
        present = set(np.concatenate([np.zeros(1, int), *(each for each in there if each is not None)]).tolist())
        object_ids = values = sorted(present - {0, 255})
        if present == {0, 255}:
            values, object_ids = [255], [1]
        seen = [None if each is None else tuple(np.flatnonzero(np.isin(values, each)).tolist()) for each in there]
        return LabelMasklets(self.masks, self.names, values, object_ids, seen), faults

    def files(self) -> list[str]:
        return [*super().files(), self.masks, *(os.path.join(self.masks, name) for name in self.names if name)]


def _values(path: str, size: Size) -> np.ndarray:
    """What values the pixels of a label map have."""
    labels = read_ids(path)
    check_size(path, labels, size)
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=256))


class ObjectsClip(FolderClip):
    """With a mask for each object, in a folder for each of them."""

    def __init__(
        self, name: str, frames: FrameFiles, masks: str, numbers: Sequence[str], by_frame: Sequence[Sequence[str]]
    ):
        super().__init__(name, frames)
        self.masks, self.numbers, self.by_frame = masks, tuple(numbers), tuple(by_frame)  # by_frame[frame][object]

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        seen: list[Seen] = []
        faults = []
        for names in self.by_frame:
            shown = []
            for place, path in enumerate(self._paths(names)):
                try:
                    if path and read_mask(path, size).any():
                        shown.append(place)
                except DataError as error:
                    faults.append(error.fault)
            seen.append(tuple(shown) if any(names) else None)
        files = [self._paths(names) for names in self.by_frame]
        return FileMasklets(files, size, [int(number) for number in self.numbers], seen), faults

    def _paths(self, names: Sequence[str]) -> list[str]:
        folders = (os.path.join(self.masks, number) for number in self.numbers)
        return [os.path.join(folder, name) if name else "" for folder, name in zip(folders, names, strict=True)]

    def files(self) -> list[str]:
        masks = [path for names in self.by_frame for path in self._paths(names) if path]
        return [*super().files(), self.masks, *(os.path.join(self.masks, number) for number in self.numbers), *masks]


class StillClip(FolderClip):
    """One picture, and a mask whose pixels above 127 are the object 1."""

    def __init__(self, name: str, image: str, mask: str):
        super().__init__(name, FrameFiles(*_split(image)))
        self.path, self.mask = image, mask

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        try:
            seen: tuple[int, ...] = (0,) if read_mask(self.mask, size).any() else ()
        except DataError as error:
            return FileMasklets([[self.mask]], size, [1], [()]), [error.fault]
        return FileMasklets([[self.mask]], size, [1], [seen]), []

    def files(self) -> list[str]:
        return [self.path, self.mask]


def _split(path: str) -> tuple[str, list[str]]:
    folder, name = os.path.split(path)
    return folder, [name]


# ---------------------------------------------------------------------------------------------------------------------
# Names


def list_files(folder: Path, root: Path, found: ClipSet) -> dict[str, str]:
    """{stem: name} of the images in a folder, in natural order: 2 before 10."""
    stems: dict[str, list[str]] = defaultdict(list)
    for name in _entries(folder, found, lambda entry: not entry.is_dir()):
        if name.lower().endswith(IMAGE_SUFFIXES) and is_inside(folder / name, root, found):
            stems[os.path.splitext(name)[0]].append(sys.intern(name))  # clips share most of their frames' names
    for names in stems.values():
        if len(names) > 1:
            found.fault(folder / names[0], f"shares its stem with {', '.join(names[1:])}")
    return {stem: stems[stem][0] for stem in sorted(stems, key=natural)}


def subfolders(folder: Path, found: ClipSet) -> list[str]:
    return _entries(folder, found, os.DirEntry.is_dir)


def _entries(folder: Path, found: ClipSet, kind: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """The names of what is in a folder, hidden ones left out."""
    try:
        with os.scandir(folder) as listed:
            return sorted(entry.name for entry in listed if kind(entry) and not entry.name.startswith("."))
    except OSError as error:
        found.fault(folder, f"cannot be listed ({error.strerror})")
        return []


def is_inside(path: Path, root: Path, found: ClipSet) -> bool:
    """Whether it is no link out of the data set, which is a fault."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        found.fault(path, "links out of the dataset; copy it there, or link the whole dataset")
        return False
    return True


def is_plain(name: str) -> bool:
    """Whether it can only be meant for something in one folder."""
    try:
        fits = 0 < len(os.fsencode(name)) < 256
    except UnicodeEncodeError:
        return False
    return fits and not name.startswith(".") and not {"/", "\\", "\0"} & set(name)


def natural(name: str) -> list[tuple[int, str, str]]:
    """A key that sorts numbers in names by their values, however many digits they have."""
    parts = re.split(r"(\d+)", name)
    return [_by_value(part) if part.isdecimal() else (-1, part, "") for part in parts]


def _by_value(number: str) -> tuple[int, str, str]:
    digits = number.lstrip("0")
    return len(digits), digits, number

"""Clips with objects that keep their identity: folders in the layout of DAVIS and MOSE.

    reader = video_reader("davis/ImageSets/2017/train.txt+MOSE/train:0.5")
    fail_on(check(reader))
    print(video_table(reader))

A sample is a whole clip, whose frames and masks are decoded when they are asked for. Which object is seen in which
frame the check finds out, and keeps; without a check it is found out when a clip is read first.
"""

from __future__ import annotations

import os
import re
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from readers.base import DataError, Fault, Reader
from readers.folders import IMAGE_SUFFIXES, parse_spec
from readers.masklets import FrameFiles, SeenMasklets, check_size, look_through
from samples import Sample, Size

LAYOUT = (
    "a data set of clips is a folder with JPEGImages/<clip>/ and Annotations/<clip>/, "
    "or a .txt beside them with a clip in each line"
)


class Clip(ABC):
    """One clip as it was listed, nothing of it decoded."""

    def __init__(self, name: str, path: str, frames: FrameFiles):
        self.name, self.path, self.frames = name, path, frames

    @abstractmethod
    def learn(self, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        """Decode all masks of a clip of this size: its objects, and what is wrong with their masks."""

    @abstractmethod
    def files(self) -> list[str]:
        """All that it is read from, by the paths that faults have."""


@dataclass
class ClipSet:
    """One data set."""

    name: str
    weight: float = 1.0
    clips: list[Clip] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


class ClipReader(Reader):
    """The clips of several data sets; see `video_reader`."""

    def __init__(self, sets: Sequence[ClipSet]):
        self.sets = {each.name: each for each in sets}
        self.faults = [fault for each in sets for fault in each.faults]
        self._clips = [(each.name, clip) for each in sets for clip in each.clips]
        self._known: dict[int, SeenMasklets] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def read(self, index: int) -> Sample:
        dataset, clip = self._clips[index]
        return Sample(
            frames=clip.frames,
            masks=self.masklets(index),
            sample_id=self.sample_id(index),
            path=clip.path,
            dataset=dataset,
            are_labels=True,
        )

    def masklets(self, index: int) -> SeenMasklets:
        """The objects of a clip; looks through its masks where no check has."""
        if index not in self._known:
            _, clip = self._clips[index]
            height, width, _ = clip.frames[0].shape
            if faults := self._learn(index, (height, width)):
                raise DataError(faults[0])
        return self._known[index]

    def _learn(self, index: int, size: Size) -> list[Fault]:
        _, clip = self._clips[index]
        masklets, faults = clip.learn(size)
        if not faults and not masklets.object_ids:
            faults = [Fault(clip.path, "shows no object in any annotated frame")]
        if not faults:
            self._known[index] = masklets
        return faults

    def find_faults(self, index: int) -> list[Fault]:
        _, clip = self._clips[index]
        size, faults = None, []
        for number in range(len(clip.frames)):
            try:
                frame = clip.frames[number]
                size = size or (frame.shape[0], frame.shape[1])
                check_size(clip.frames.path(number), frame, size)
            except DataError as error:
                faults.append(error.fault)
        return faults + self._learn(index, size) if size else faults

    def findings(self) -> dict[int, SeenMasklets]:
        return self._known

    def adopt(self, findings: dict[int, SeenMasklets]) -> None:
        self._known.update(findings)

    def sample_id(self, index: int) -> str:
        dataset, clip = self._clips[index]
        return f"{dataset}/{clip.name}"

    def dataset_of(self, index: int) -> str:
        return self._clips[index][0]

    def files(self, index: int) -> list[str]:
        _, clip = self._clips[index]
        return [clip.path, *map(clip.frames.path, range(len(clip.frames))), *clip.files()]

    def frame_names(self, index: int) -> list[str]:
        """What the frames of a clip are called, without suffixes."""
        _, clip = self._clips[index]
        return [Path(clip.frames.path(number)).stem for number in range(len(clip.frames))]

    def weight_of(self, dataset: str) -> float:
        return self.sets[dataset].weight


def video_reader(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    images: str | os.PathLike[str] = "",
) -> ClipReader:
    """A reader of data sets joined with `+`, each `name[:weight]`, that are by what lies there:

      * a folder as those of DAVIS, MOSE and YouTube-VOS are, or a list of some of its clips; see `list_folder`.

    A name means `<root>/<name>` where that exists, else a path as given. Objects have no classes here: `class_names`
    is taken as other readers take it, and does nothing.

    Raises:
        UserError: `spec` itself makes no sense.
    """
    return ClipReader([_open(*entry) for entry in parse_spec(spec, root)])


def _open(name: str, path: Path, weight: float) -> ClipSet:
    found = ClipSet(name, weight)
    if path.suffix.lower() == ".txt" and path.is_file():
        above = next((folder for folder in path.absolute().parents if frames_folder(folder)), path.parent)
        found.name = f"{above.name}/{path.stem}" if name == path.name else name
        list_folder(above, found, _names_in(path, found.faults))
    else:
        list_folder(path, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def list_folder(root: Path, found: ClipSet, wanted: dict[str, str] | None = None) -> None:
    """`JPEGImages/<clip>/<frame>.jpg` and `Annotations/<clip>/<frame>.png`, all clips or those in `wanted`.

    A frame without a mask is not annotated. A mask is a label map: palette or grey, with the ids of objects, 1 to 254,
    or nothing but 0 and 255 for one object alone. Both folders may have one more level, `480p/` (taken first, the size
    that DAVIS evaluates at) or `Full-Resolution/`.

    `wanted` is {name: the file that names it}.
    """
    frames, masks = frames_folder(root), _inner(root, "Annotations")
    if frames is None or masks is None:
        parts = [part.name for part in sorted(root.iterdir()) if frames_folder(part)] if root.is_dir() else []
        problem = (
            f"has parts of its own; name one of them, as {root / parts[0]}" if parts else f"is no data set; {LAYOUT}"
        )
        found.faults.append(Fault(str(root), problem))
        return
    frames, masks = _of_one_size(frames, masks)
    for name in sorted(wanted if wanted is not None else _entries(frames, os.DirEntry.is_dir), key=natural):
        if not (frames / name).is_dir():
            found.faults.append(Fault((wanted or {})[name], f"names the clip {name}, which is not in {frames}"))
        elif not (masks / name).is_dir():
            found.faults.append(Fault(str(frames / name), f"has no masks: there is no folder {masks / name}"))
        elif _is_inside(frames / name, root, found.faults) and _is_inside(masks / name, root, found.faults):
            _add_clip(name, frames / name, masks / name, root, found)
    if not found.clips and not found.faults:
        found.faults.append(Fault(str(frames), "holds no clips, each a folder of frames"))


def frames_folder(root: Path) -> Path | None:
    return _inner(root, "JPEGImages")


def _inner(root: Path, name: str) -> Path | None:
    """The folder of that name in another."""
    return root / name if (root / name).is_dir() else None


def _of_one_size(frames: Path, masks: Path) -> tuple[Path, Path]:
    """Where the clips are, if there is a level of sizes between."""
    sizes = (
        size for size in ("480p", "Full-Resolution", "1080p") if (frames / size).is_dir() and (masks / size).is_dir()
    )
    size = next(sizes, "")
    return frames / size, masks / size


def _names_in(file: Path, faults: list[Fault]) -> dict[str, str]:
    """{name: the file} of the clips in a list; DAVIS 2016 has the files of each frame in a line instead."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError:
        faults.append(Fault(str(file), "is no text in UTF-8"))
        return {}
    names = [PurePosixPath(words[0]).parent.name if "/JPEGImages/" in words[0] else " ".join(words) for words in lines]
    for name in dict.fromkeys(names):
        if "/" in name or "\\" in name or name.startswith("."):
            faults.append(Fault(str(file), f"names the clip {name!r}, which is no name of a folder"))
    if not names:
        faults.append(Fault(str(file), "names no clips"))
    return {name: str(file) for name in names if not ("/" in name or "\\" in name or name.startswith("."))}


def _add_clip(name: str, frames: Path, masks: Path, root: Path, found: ClipSet) -> None:
    pictures = list_files(frames, root, found.faults)
    if not pictures:
        found.faults.append(Fault(str(frames), "holds no frames"))
        return
    maps = list_files(masks, root, found.faults)
    for stem in maps.keys() - pictures.keys():
        found.faults.append(Fault(str(masks / maps[stem]), f"has no frame of the same name in {frames}"))
    files = FrameFiles(str(frames), list(pictures.values()))
    found.clips.append(LabelledClip(name, files, str(masks), [maps.get(stem, "") for stem in pictures]))


class LabelledClip(Clip):
    """Frames in one folder, label maps of some of them in another."""

    def __init__(self, name: str, frames: FrameFiles, mask_folder: str, mask_names: Sequence[str]):
        super().__init__(name, frames.folder, frames)
        self.mask_folder, self.mask_names = mask_folder, tuple(mask_names)

    def learn(self, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        return look_through(self.mask_folder, self.mask_names, size)

    def files(self) -> list[str]:
        return [self.mask_folder, *(os.path.join(self.mask_folder, name) for name in self.mask_names if name)]


def list_files(folder: Path, root: Path, faults: list[Fault]) -> dict[str, str]:
    """{stem: name} of the images in a folder, in natural order: 2 before 10."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in _entries(folder, os.DirEntry.is_file):
        if name.lower().endswith(IMAGE_SUFFIXES) and _is_inside(folder / name, root, faults):
            found[os.path.splitext(name)[0]].append(sys.intern(name))  # clips share most of their frames' names
    for names in found.values():
        if len(names) > 1:
            faults.append(Fault(str(folder / names[0]), f"shares its stem with {', '.join(names[1:])}"))
    return {stem: found[stem][0] for stem in sorted(found, key=natural)}


def _entries(folder: Path, kind: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    """The names of what is in a folder, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if kind(entry) and not entry.name.startswith("."))


def _is_inside(path: Path, root: Path, faults: list[Fault]) -> bool:
    """Whether it is no link out of the data set, which is a fault."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        faults.append(Fault(str(path), "links out of the dataset; copy it there, or link the whole dataset"))
        return False
    return True


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their values."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------------------------------------------------------------
# What there is


class VideoRow(NamedTuple):
    dataset: str
    clips: int
    frames: int
    annotated: int  # of the frames
    objects: int


def video_rows(reader: Reader) -> list[VideoRow]:
    """A row for each data set, over the clips of a `ClipReader` or a part of one."""
    rows = []
    for name, indices in reader.by_dataset().items():
        masklets = []
        for index in indices:
            whole, position = reader.origin(index)
            assert isinstance(whole, ClipReader)
            masklets.append(whole.masklets(position))
        frames = sum(len(each.annotated) for each in masklets)
        annotated = sum(sum(each.annotated) for each in masklets)
        objects = sum(len(each.object_ids) for each in masklets)
        rows.append(VideoRow(name, len(indices), frames, annotated, objects))
    return rows


def video_table(reader: Reader) -> str:
    """`video_rows` as aligned text."""
    rows = video_rows(reader)
    width = max([len("data set"), *(len(row.dataset) for row in rows)])
    lines = [f"  {'data set':<{width}}  {'clips':>7}  {'frames':>9}  {'annotated':>9}  {'objects':>8}"]
    for name, clips, frames, annotated, objects in rows:
        lines.append(f"  {name:<{width}}  {clips:>7}  {frames:>9}  {annotated:>9}  {objects:>8}")
    return "\n".join(lines)

"""Clips with objects that keep their identity, from whatever layout they are in.

    reader = video_reader("davis/ImageSets/2017/train.txt+MOSE/train:0.5")
    fail_on(check(reader))
    print(video_table(reader))

A sample is a whole clip, whose frames and masks are decoded when they are asked for. Which frame shows which object the
check finds out, and keeps; without a check it is found out when a clip is first read.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from readers.base import DataError, Fault, Reader
from readers.clip_codes import is_masklets, list_masklets, list_objects, masklet_files, masklet_name
from readers.clip_folders import StillClip, frames_folder, list_folder, list_names
from readers.folders import list_pairs, locate, parse_spec
from readers.instance import CocoObjects, YoloFolder
from readers.masklets import ClipSet, Frames, SeenMasklets, check_size
from samples import Sample


class Known(NamedTuple):
    """What is known of a clip once it was looked through."""

    frames: Frames
    masklets: SeenMasklets


class ClipReader(Reader):
    """The clips of several data sets; see `video_reader`."""

    def __init__(self, sets: Sequence[ClipSet]):
        self._weights = {each.name: each.weight for each in sets}
        self.faults = [fault for each in sets for fault in each.faults]
        self._clips = [(each.name, clip) for each in sets for clip in each.clips]
        self._known: dict[int, Known] = {}

    def __len__(self) -> int:
        return len(self._clips)

    def read(self, index: int) -> Sample:
        dataset, clip = self._clips[index]
        known = self.known(index)
        return Sample(
            frames=copy.copy(known.frames),  # a video that it opens is closed with the sample
            masks=known.masklets,
            sample_id=self.sample_id(index),
            path=clip.path,
            dataset=dataset,
            are_labels=True,
        )

    def known(self, index: int) -> Known:
        """The frames and objects of a clip; looks through its masks where no check has."""
        if index not in self._known and (faults := self._look(index, all_frames=False)):
            raise DataError(faults[0])
        return self._known[index]

    def find_faults(self, index: int) -> list[Fault]:
        return self._look(index, all_frames=True)

    def _look(self, index: int, *, all_frames: bool) -> list[Fault]:
        """Decode all masks, and all frames or the first alone; keep what they show, or say what is wrong."""
        _, clip = self._clips[index]
        try:
            frames = clip.frames()
        except DataError as error:
            return [error.fault]
        size, faults = None, []
        for number in range(len(frames) if all_frames else 1):
            try:
                frame = frames[number]
                size = size or (frame.shape[0], frame.shape[1])
                check_size(frames.path(number), frame, size)
            except DataError as error:
                faults.append(error.fault)
        if size is None:
            return faults
        masklets, found = clip.learn(frames, size)
        faults += found
        if not faults and not any(masklets.seen):
            faults = [Fault(clip.path, "shows no object in any annotated frame")]
        if not faults:
            self._known[index] = Known(copy.copy(frames), masklets)
        return faults

    def findings(self) -> dict[int, Known]:
        return self._known

    def adopt(self, findings: dict[int, Known]) -> None:
        self._known.update(findings)

    def sample_id(self, index: int) -> str:
        dataset, clip = self._clips[index]
        return f"{dataset}/{clip.name}"

    def dataset_of(self, index: int) -> str:
        return self._clips[index][0]

    def files(self, index: int) -> list[str]:
        return self._clips[index][1].files()

    def weight_of(self, dataset: str) -> float:
        return self._weights[dataset]


def video_reader(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    images: str | os.PathLike[str] = "",
) -> ClipReader:
    """A reader of data sets joined with `+`, each `name[:weight]`. What lies there decides how each is read:

      * a folder with `JPEGImages/` and `Annotations/`, or a .txt below such a folder with the names of some of its
        clips, as `davis/ImageSets/2017/train.txt` (`clip_folders.list_folder`);
      * SA-V: a `<video>_manual.json` or `<video>_auto.json`, or a folder of them (`clip_codes.list_masklets`);
      * a COCO json whose images have a `video_id`, and annotations a `track_id` (`clip_codes.list_objects`);
      * still images, each a clip of one frame: a folder with pictures in `im/` and masks in `gt/`, above 127 where the
        one object is, or another COCO json, or a folder with `images/` and `labels/` (`instance.YoloFolder`).

    A name means `<root>/<name>` where that exists, else a path as given, as does `images`, the folder of a json's
    images or videos. Objects have no classes here, so `class_names`, which all readers take, does nothing.

    Raises:
        UserError: `spec` itself makes no sense, or `images` is no folder.
    """
    folder = locate(os.fspath(images), root) if images else None
    if folder and not folder.is_dir():
        raise UserError(f"data.images: {folder} is no folder")
    return ClipReader([_listed(*entry, folder) for entry in parse_spec(spec, root)])


def _listed(name: str, path: Path, weight: float, images: Path | None) -> ClipSet:
    """One data set by what lies at the path."""
    found = ClipSet(name, weight)
    if path.suffix.lower() == ".txt" and path.is_file():
        root = next((folder for folder in path.absolute().parents if frames_folder(folder)), path.parent)
        found.name = f"{root.name}/{path.stem}" if name == path.name else name
        list_names(path, root, found)
    elif path.suffix.lower() == ".json":
        if is_masklets(path):
            list_masklets({masklet_name(path): path}, images, found)
        else:
            list_objects(CocoObjects(name, path, weight, images), found)
    elif frames_folder(path):
        list_folder(path, found)
    elif files := masklet_files(path):
        list_masklets(files, images, found)
    elif (path / "im").is_dir() or (path / "gt").is_dir():
        found.clips += [StillClip(pair.stem, pair.image, pair.mask) for pair in list_pairs(path, name, found.faults)]
    elif parts := sorted(part for part in path.glob("*/") if frames_folder(part) or (part / "im").is_dir()):
        found.fault(path, f"has parts of its own; name one of them, as {parts[0]}")
    elif (source := YoloFolder(name, path, weight)).items or (path / "images").is_dir():
        list_objects(source, found)
    else:
        found.fault(path, f"is no data set of clips; {LAYOUT}")
    return found


LAYOUT = (
    "that is a folder with JPEGImages/<clip>/ and Annotations/<clip>/, a .txt below it that names clips, json of SA-V "
    "or COCO, or still images with their masks"
)


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
        masklets = [_masklets(reader, index) for index in indices]
        frames = sum(len(each.annotated) for each in masklets)
        annotated = sum(sum(each.annotated) for each in masklets)
        objects = sum(len(each.object_ids) for each in masklets)
        rows.append(VideoRow(name, len(indices), frames, annotated, objects))
    return rows


def _masklets(reader: Reader, index: int) -> SeenMasklets:
    whole, position = reader.origin(index)
    assert isinstance(whole, ClipReader)
    return whole.known(position).masklets


def video_table(reader: Reader) -> str:
    """`video_rows` as aligned text."""
    rows = video_rows(reader)
    width = max([len("data set"), *(len(row.dataset) for row in rows)])
    lines = [f"  {'data set':<{width}}  {'clips':>7}  {'frames':>9}  {'annotated':>9}  {'objects':>8}"]
    for name, clips, frames, annotated, objects in rows:
        lines.append(f"  {name:<{width}}  {clips:>7}  {frames:>9}  {annotated:>9}  {objects:>8}")
    return "\n".join(lines)

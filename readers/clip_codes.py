"""Clips whose objects are run-length codes or outlines: SA-V's masklets, COCO json, and still images with objects."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from layers import split_codes
from readers.base import DataError, Fault
from readers.clip_folders import FolderClip, is_inside, is_plain, list_files, natural
from readers.coco import CocoAnnotation, CocoFile, CocoImage, Id, shown, size_fault, to_rle, version_of
from readers.films import FilmFrames
from readers.folders import VIDEO_SUFFIXES
from readers.instance import CocoObjects, InstanceReader, Item, ObjectSource
from readers.json_lists import elements
from readers.masklets import Clip, ClipSet, CodeMasklets, FrameFiles, Frames, Seen, SeenMasklets, drawn
from samples import Size

ENDINGS = ("_manual.json", "_auto.json")  # of SA-V's files: what people drew, and what a model did
MOST_ID = 2**63  # below which arrays can hold the numbers of objects
STEP = 4  # SA-V: of 24 frames a second every fourth has masks


# ---------------------------------------------------------------------------------------------------------------------
# SA-V


def is_masklets(path: Path) -> bool:
    """Whether a json is one of SA-V, by the first list in it that only one of both formats has."""
    try:
        known = {"masklet": True, "images": False, "annotations": False, "categories": False}
        return next((known[each.key] for each in elements(path) if each.position < 0 and each.key in known), False)
    except (OSError, ValueError, RecursionError):  # what is wrong the reader of COCO json says
        return False


def masklet_files(path: Path) -> dict[str, Path]:
    """{video: json} in a folder of SA-V; of a video that people and a model annotated, what people did."""
    files: dict[str, Path] = {}
    for ending in reversed(ENDINGS):
        files |= {masklet_name(file): file for file in path.glob(f"*{ending}")}
    return dict(sorted(files.items()))


def masklet_name(file: Path) -> str:
    """The video that a json is about."""
    return file.stem.removesuffix("_manual").removesuffix("_auto")


def list_masklets(files: dict[str, Path], images: Path | None, found: ClipSet) -> None:
    """The clips of SA-V's json files {video: json}, each with the masklets of a video.

    Its frames are in a folder `<video>/`, or in the file `<video>.mp4`: in `images`, beside the json, or in
    `JPEGImages_24fps/` beside it or its folder. There are as many masks as frames, or one for every fourth frame.
    """
    for video, file in files.items():
        here = file.absolute().parent
        folders = [*([images] if images else []), here, here / "JPEGImages_24fps", here.parent / "JPEGImages_24fps"]
        frames = _frames_of(video, folders, found)
        if frames is None:
            looked = f"looked for {video}/ and {video}.mp4 in {', '.join(map(str, folders))}"
            found.fault(file, f"has no frames: {looked}; name their folder with data.images")
        elif is_inside(file, here, found):
            found.clips.append(MaskletClip(video, str(file), frames))


def _frames_of(video: str, folders: Sequence[Path], found: ClipSet) -> FrameFiles | str | None:
    """The pictures of a video, or the file that holds them."""
    for folder in folders:
        inner = folder / video
        if inner.is_dir() and is_inside(inner, folder, found) and (names := list_files(inner, folder, found)):
            return FrameFiles(str(inner), list(names.values()))
        for file in (folder / f"{video}{suffix}" for suffix in VIDEO_SUFFIXES):
            if file.is_file() and is_inside(file, folder, found):
                return str(file)
    return None


class MaskletClip(Clip):
    """A video and the json of its masklets, a list of objects for each annotated frame."""

    def __init__(self, name: str, path: str, source: FrameFiles | str):
        super().__init__(name, path)
        self.source = source

    def frames(self) -> Frames:
        return FilmFrames(self.source) if isinstance(self.source, str) else self.source

    def files(self) -> list[str]:
        if isinstance(self.source, str):
            return [self.path, self.source]
        return [self.path, *map(self.source.path, range(len(self.source)))]

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        scan = _MaskletScan(self.path, size)
        try:
            scan.take_in()
        except (OSError, ValueError, RecursionError) as error:
            scan.report(
                f"cannot be read as json with masklets ({' '.join(str(error).split()) or type(error).__name__})"
            )
        step = 1 if len(scan.places) == len(frames) else STEP
        if step * (len(scan.places) - 1) >= len(frames):
            scan.report(f"has masks of {len(scan.places)} frames, every fourth, but there are {len(frames)} in all")
        return scan.masklets(len(frames), step), scan.faults


class Place(NamedTuple):
    """Where in a json the objects of a frame are, in bytes."""

    start: int
    length: int


class _MaskletScan:
    """What one pass over SA-V's json finds."""

    def __init__(self, path: str, size: Size):
        self.path, self.size = path, size
        self.faults: list[Fault] = []
        self.ids: list[Any] = []
        self.places: list[Place] = []
        self.shown: list[list[int]] = []  # of each annotated frame the objects, by their places in the json

    def report(self, problem: str) -> None:
        self.faults.append(Fault(self.path, problem))

    def take_in(self) -> None:
        with open(self.path, "rb") as file:
            self.version = version_of(file)
        heads = set()
        for each in elements(Path(self.path)):
            if each.key not in ("masklet", "masklet_id"):
                continue
            if each.position < 0:
                if each.key in heads:
                    raise ValueError(f"it has {each.key} twice")
                heads.add(each.key)
            elif each.key == "masklet_id":
                self.ids.append(each.value)
            else:
                self.places.append(Place(each.start, each.length))
                self.shown.append(self._look_at(each.value, each.position))
        if "masklet" not in heads:
            raise ValueError("it has no list masklet")
        self._check_ids()

    def _look_at(self, row: Any, number: int) -> list[int]:
        if not isinstance(row, list):
            self.report(f"masklet[{number}] is no list")
            return []
        found = []
        for place, code in enumerate(row):
            try:
                if code is not None and coco_mask.area(_code(code, self.size)):
                    found.append(place)
            except ValueError as error:
                self.report(f"masklet[{number}][{place}] {error}")
        return found

    def _check_ids(self) -> None:
        most = max((place + 1 for places in self.shown for place in places), default=0)
        if not self.ids:
            self.ids = list(range(most))
        elif not all(map(_is_number, self.ids)) or len(set(self.ids)) < len(self.ids):
            self.report("has a masklet_id that is no whole number, or that two masklets have")
        elif most > len(self.ids):
            self.report(f"has masks of {most} objects, but {len(self.ids)} in masklet_id")

    def masklets(self, length: int, step: int) -> SeenMasklets:
        if self.faults:
            return CodeMasklets([], self.size, [], [])
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        rank = {place: number for number, place in enumerate(order)}
        seen: list[Seen] = [None] * length
        places: list[Place | None] = [None] * length
        for number, (shown_places, place) in enumerate(zip(self.shown, self.places, strict=True)):
            seen[number * step] = tuple(sorted(rank[each] for each in shown_places))
            places[number * step] = place
        return JsonMasklets(self.path, self.version, places, order, self.size, sorted(self.ids), seen)


def _is_number(value: Any) -> bool:
    """Whether it can be that of an object."""
    return type(value) is int and abs(value) < MOST_ID


def _code(code: Any, size: Size) -> Any:
    if not isinstance(code, dict):
        raise ValueError(f"is no run-length code: {shown(code)}")
    return to_rle(code, size)


class JsonMasklets(SeenMasklets):
    """The masklets of a json of SA-V, read from there frame by frame: those of all videos would fill the memory."""

    def __init__(
        self,
        file: str,
        version: tuple[int, int],
        places: Sequence[Place | None],
        columns: Sequence[int],
        size: Size,
        object_ids: Sequence[int],
        seen: Sequence[Seen],
    ):
        super().__init__(object_ids, seen)
        self.file, self.version, self.places, self.size = file, version, tuple(places), size
        self.columns = tuple(columns)  # where each object is in a frame's list

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        place = self.places[frame]
        assert place
        try:
            with open(self.file, "rb") as file:
                if version_of(file) != self.version:
                    raise ValueError("it has changed since it was looked through")
                file.seek(place.start)
                row = json.loads(file.read(place.length))
            there = set(self.visible(frame))
            codes = [_code(row[self.columns[each]], self.size)["counts"] if each in there else None for each in objects]
        except (OSError, ValueError) as error:
            raise DataError(Fault(self.file, f"cannot be read any more ({error})")) from error
        return drawn(codes, self.size)


# ---------------------------------------------------------------------------------------------------------------------
# COCO json and the text files of YOLO


def list_objects(source: ObjectSource, found: ClipSet) -> None:
    """The clips of a COCO json whose images have a `video_id`; of others and of YOLO's files each image is one.

    Frames are in the order of a `frame_id`, `frame_index` or `frame_number`, if all of a clip have one, else of their
    names. The annotations of an object have the same `track_id`, `instance_id` or `object_id` in all frames; a frame
    without any shows none. Crowds are left out, and so are still images without an object.
    """
    if isinstance(source, CocoObjects) and any(item.image and item.image.video is not None for item in source.items):
        found.faults += source.faults
        _list_linked(source.file, found)
        return
    reader = InstanceReader([source])
    found.faults += reader.faults
    for index, item in enumerate(source.items):
        if _has_objects(item):
            found.clips.append(ObjectsStill(item, reader, index))
    if not found.clips and not found.faults:
        found.fault(source.path, "has no image with an object")


def _has_objects(item: Item) -> bool:
    if item.image:
        return item.image.objects > 0
    return bool(item.outlines) and os.path.getsize(item.outlines) > 0


def _list_linked(file: CocoFile, found: ClipSet) -> None:
    clips: dict[Id | None, list[CocoImage]] = defaultdict(list)
    for image in file.images:
        clips[image.video].append(image)
    for image in clips.pop(None, []):
        found.fault(image.path, f"has no video_id in {file.path}, where others have one")
    for video, images in sorted(clips.items(), key=lambda clip: natural(str(clip[0]))):
        numbers = {image.number for image in images}
        if None in numbers:
            images.sort(key=lambda image: natural(image.path))
        elif len(numbers) == len(images):
            images.sort(key=lambda image: image.number or 0)
        else:
            found.fault(file.path, f"has two frames of one number in the video {shown(video)}")
            continue
        if isinstance(video, str) and not all(map(is_plain, video.split("/"))):
            found.fault(file.path, f"has the video_id {shown(video)}, which is no name")
            continue
        found.clips.append(LinkedClip(str(video), file, images))


class LinkedClip(FolderClip):
    """Images of a COCO json that are the frames of one clip."""

    def __init__(self, name: str, file: CocoFile, images: Sequence[CocoImage]):
        folder = os.path.commonpath([os.path.dirname(image.path) for image in images])
        super().__init__(name, FrameFiles(folder, [os.path.relpath(image.path, folder) for image in images]))
        self.path, self.file, self.images = images[0].path, file, images  # the folder may hold other clips, too

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        faults: list[Fault] = []
        by_frame = [self._codes(image, size, faults) for image in self.images]
        tracks = sorted({track for codes in by_frame for track in codes}, key=lambda track: natural(str(track)))
        numbers = sorted(track for track in tracks if isinstance(track, int))
        if len(numbers) == len(tracks):
            tracks = [*numbers]
        else:
            numbers = list(range(1, len(tracks) + 1))
        rank = {track: place for place, track in enumerate(tracks)}
        rows = [sorted((rank[track], code) for track, code in codes.items()) for codes in by_frame]
        codes = [[code for _, code in row] for row in rows]
        return CodeMasklets(codes, size, numbers, [tuple(place for place, _ in row) for row in rows]), faults

    def _codes(self, image: CocoImage, size: Size, faults: list[Fault]) -> dict[Id, bytes]:
        """{track: run-length code} of the objects in a frame that have a pixel."""
        if fault := size_fault(image, size, self.file.path):
            faults.append(fault)
            return {}
        annotations, found = self.file.annotations(image)
        faults += found
        codes: dict[Id, bytes] = {}
        for annotation in annotations:
            if annotation.is_crowd:
                continue
            try:
                track, code = self._object(annotation, size)
                if track in codes:
                    raise ValueError(f"is the second of object {shown(track)} in this image")
            except ValueError as error:
                faults.append(Fault(image.path, f"annotation {annotation.id} in {self.file.path} {error}"))
                continue
            codes[track] = code
        return {track: code for track, code in codes.items() if code}

    def _object(self, annotation: CocoAnnotation, size: Size) -> tuple[Id, bytes]:
        track = annotation.track
        if not (isinstance(track, str) or _is_number(track)):
            raise ValueError("has no track_id, nor an instance_id or object_id, that is a number or a text")
        code = to_rle(annotation.segmentation, size)
        return track, code["counts"] if coco_mask.area(code) else b""


class ObjectsStill(FolderClip):
    """One image with the objects that an `InstanceReader` reads, crowds left out."""

    def __init__(self, item: Item, reader: InstanceReader, index: int):
        folder, name = os.path.split(item.path)
        super().__init__(item.stem, FrameFiles(folder, [name]))
        self.path, self.reader, self.index = item.path, reader, index

    def learn(self, frames: Frames, size: Size) -> tuple[SeenMasklets, list[Fault]]:
        if faults := self.reader.find_faults(self.index):
            return CodeMasklets([[]], size, [], [()]), faults
        _, rows, joined = self.reader.checked(self.index)
        objects = zip(split_codes(joined, rows["length"], size), rows["crowd"], strict=True)
        codes = [code["counts"] for code, is_crowd in objects if not is_crowd and coco_mask.area(code)]
        seen = tuple(range(len(codes)))
        return CodeMasklets([codes], size, [place + 1 for place in seen], [seen]), []

    def files(self) -> list[str]:
        return self.reader.files(self.index)

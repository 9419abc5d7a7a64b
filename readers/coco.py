"""COCO json (https://cocodataset.org/#format-data): its images and annotations, checked before anything draws them.

pycocotools draws the outlines, and is not memory-safe: NaN or far coordinates crash the interpreter, a run-length code
of another size reads past its end. So nothing reaches it that has not been looked through here.
"""

from __future__ import annotations

import json
import os
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from readers.base import DataError, Fault
from readers.json_lists import Element, NoObject, elements
from samples import Rle, Size

Id = int | str

_abridged = reprlib.Repr()  # names values of a json in a sentence, whatever they are
_abridged.maxstring = _abridged.maxother = 100
shown = _abridged.repr

# What those who link the objects of clips call a frame's number and an object (MMTracking, TAO, BDD100K and others).
NUMBERS = ("frame_id", "frame_index", "frame_number")
TRACKS = ("track_id", "instance_id", "object_id")

MAX_OUTLINE = 4_000_000  # pixels along one polygon; pycocotools takes 80 bytes of memory for each


@dataclass(slots=True)
class CocoAnnotation:
    id: str  # as it is named in a fault
    category: Id
    is_crowd: bool
    segmentation: Any  # as the json has it; see `to_rle`
    bbox: Any  # as the json has it, too
    area: Any
    track: Any = None  # as the json has it: what the object is called in all images of its clip


@dataclass(slots=True)
class CocoImage:
    id: Id
    path: str
    name: str  # file_name without its suffix
    size: Size | None  # as the json says
    rows: tuple[int, int] = (0, 0)  # of the file's annotations in the order of their images
    objects: int = 0  # of these, without the crowds
    video: Id | None = None  # the clip that it is a frame of
    number: int | None = None  # there


def coco_json(path: Path) -> Path | None:
    """The json that a data set's path stands for: itself, or what Roboflow puts into a folder of images."""
    if path.suffix.lower() == ".json":
        return path
    exported = path / "_annotations.coco.json"
    return exported if exported.is_file() else None


class CocoFile:
    """Images in the order of their names; `categories` is {id: name} in the order of the ids.

    Of the annotations only their places in the file are kept, 16 bytes for each, and `annotations` reads those of an
    image from there: so data sets fit whose annotations as Python objects would not.

    Images are looked for by `file_name` in `images` (and its folder of the split's name), in the json's folder,
    `../images/<split>`, `../<split>` and `../images`, where `instances_train.json` is of the split `train`. Names that
    lead out of that folder are faults. So is everything that is not as the format wants it; what remains is usable.

    Raises:
        DataError: not a COCO json at all.
    """

    def __init__(self, path: Path, *, images: Path | None = None):
        self.path = path
        listing = _Listing(path, _folders(path, images))
        try:
            listing.scan()
            self._version, self._places = listing.version, listing.sort_places()
            for image_id, rows in listing.strays():
                listing.report_stray(self._read(rows[0], rows[0] + 1)[0], image_id, rows[1] - rows[0] - 1)
        except NoObject as error:
            problem = "is no COCO json: it holds no object with images, annotations and categories"
            raise DataError(Fault(str(path), problem)) from error
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(Fault(str(path), f"cannot be read as json ({reason})")) from error
        self.faults = listing.faults
        self.categories = dict(sorted(listing.categories.items(), key=lambda row: (str(type(row[0])), row[0])))
        self.images = sorted((image for image in listing.images.values() if image), key=lambda image: image.path)

    def annotations(self, image: CocoImage) -> tuple[list[CocoAnnotation], list[Fault]]:
        """The annotations of one image, read from the file, and those that cannot be had."""
        found, faults = [], []
        try:
            rows = self._read(*image.rows)
        except OSError as error:
            problem = f"has annotations in {self.path}, which cannot be read any more ({error.strerror or error})"
            return [], [Fault(image.path, problem)]
        for row in rows:
            number, category, crowd = shown(row.get("id")), row.get("category_id"), bool(row.get("iscrowd", 0))
            if is_id(category) and category in self.categories:
                outline, box, area = (row.get(key) for key in ("segmentation", "bbox", "area"))
                track = next((row[key] for key in TRACKS if row.get(key) is not None), None)
                found.append(CocoAnnotation(number, category, crowd, outline, box, area, track))
            else:
                problem = f"annotation {number} in {self.path} has the unknown category {shown(category)}"
                faults.append(Fault(image.path, problem))
        return found, faults

    def _read(self, first: int, last: int) -> list[dict[str, Any]]:
        """Annotations as they are in the file."""
        if first == last:
            return []
        with open(self.path, "rb") as file:
            if version_of(file) != self._version:
                raise OSError("it has changed since it was listed")
            rows = []
            for start, length in self._places[first:last].tolist():
                file.seek(start)
                rows.append(json.loads(file.read(length)))
        return rows


class _Listing:
    """What one pass over a json finds."""

    def __init__(self, path: Path, folders: list[Path]):
        self.path, self.folders = path, folders
        self.faults: list[Fault] = []
        self.categories: dict[Id, str] = {}
        self.images: dict[Id, CocoImage | None] = {}  # None where the image cannot be had
        self._names: set[str] = set()  # of images
        self._absent: list[str] = []  # names of images that are nowhere
        self._owners: dict[Id, int] = {}  # ids of images, numbered as annotations name them
        self._owner, self._start, self._length = array("q"), array("q"), array("q")  # of annotations
        self._objects: Counter[Id] = Counter()  # annotations of each image, crowds not counted

    def scan(self) -> None:
        """Take in the whole file."""
        take = {"images": self._add_image, "categories": self._add_category, "annotations": self._add_annotation}
        seen: set[str] = set()
        with open(self.path, "rb") as file:
            self.version = version_of(file)
        for element in elements(self.path):
            if element.key not in take:
                continue
            if element.position < 0:
                if element.key in seen:
                    raise ValueError(f"it has {element.key} twice")
                seen.add(element.key)
            elif isinstance(element.value, dict):
                take[element.key](element)
            else:
                self._report(f"{element.key}[{element.position}] is no object")
        for key in take:
            if key not in seen:
                self._report(f"has no list of {key}")
        self._report_absent()

    def _report(self, problem: str) -> None:
        self.faults.append(Fault(str(self.path), problem))

    def _add_category(self, element: Element) -> None:
        number, name = element.value.get("id"), element.value.get("name")
        words = " ".join(name.split()) if isinstance(name, str) else ""
        if not (is_id(number) and words and words.isprintable()):
            self._report(f"a category needs an id and a name, not {shown(number)} and {shown(name)}")
        elif number in self.categories or words in self.categories.values():
            self._report(f"category {shown(number)} ({words}) has an id or a name that another one has")
        else:
            self.categories[number] = words

    def _add_image(self, element: Element) -> None:
        number, file_name = element.value.get("id"), element.value.get("file_name")
        if not (is_id(number) and isinstance(file_name, str) and file_name):
            self._report(f"an image needs an id and a file_name, not {shown(number)} and {shown(file_name)}")
            return
        name = PurePosixPath(file_name).with_suffix("").as_posix() if PurePosixPath(file_name).name else file_name
        if number in self.images or name in self._names:
            self._report(f"image {shown(number)} ({shown(file_name)}) has an id or a name that another one has")
            return
        self._names.add(name)
        path = self._locate(file_name)
        self.images[number] = _image(number, path, name, element.value) if path else None
        if path == "":
            self._absent.append(file_name)

    def _locate(self, file_name: str) -> str | None:
        """Where the image is, "" where it is nowhere, None where its name is not to be followed."""
        relative = PurePosixPath(file_name)
        if relative.is_absolute() or ".." in relative.parts:
            self._report(f"the file_name {shown(file_name)} leads out of the images' folder")
            return None
        for folder in self.folders:
            path = os.path.join(folder, file_name)
            if os.path.isfile(path):
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                    return path
                self._report(f"{path} links out of its folder; copy it there, or link the whole folder")
                return None
        return ""

    def _report_absent(self) -> None:
        looked = f"looked in {', '.join(map(str, self.folders))}; name their folder with data.images"
        if self._absent and not any(self.images.values()):
            self._report(f"none of its {len(self._absent)} images is there ({shown(self._absent[0])} …): {looked}")
            return
        for file_name in self._absent:
            self._report(f"the image {shown(file_name)} is not there: {looked}")

    def _add_annotation(self, element: Element) -> None:
        owner = element.value.get("image_id")
        if not is_id(owner):
            self.report_stray(element.value, owner)
            return
        self._owner.append(self._owners.setdefault(owner, len(self._owners)))
        self._start.append(element.start)
        self._length.append(element.length)
        self._objects[owner] += not element.value.get("iscrowd", 0)

    def report_stray(self, row: dict[str, Any], image_id: Any, others: int = 0) -> None:
        more = f"; so are {others} more" if others else ""
        self._report(f"annotation {shown(row.get('id'))} is of image {shown(image_id)}, which is not in the file{more}")

    def sort_places(self) -> np.ndarray:
        """(n, 2) start and length of the annotations in the file, by image; tells the images which are theirs."""
        owner = np.array(self._owner, dtype=np.int64)
        order = np.argsort(owner, kind="stable")
        self._bounds = np.searchsorted(owner[order], np.arange(len(self._owners) + 1)).tolist()
        for image_id, position in self._owners.items():
            image = self.images.get(image_id)
            if image is not None:
                image.rows = self._bounds[position], self._bounds[position + 1]
                image.objects = self._objects[image_id]
        return np.stack([np.array(self._start), np.array(self._length)], axis=1).astype(np.int64)[order]

    def strays(self) -> Iterator[tuple[Id, tuple[int, int]]]:
        """The ids of images that only annotations know, each with the rows of its places."""
        for image_id, position in self._owners.items():
            if image_id not in self.images:
                yield image_id, (self._bounds[position], self._bounds[position + 1])


def version_of(file: BinaryIO) -> tuple[int, int]:
    """What changes when a file does."""
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


def _folders(path: Path, images: Path | None) -> list[Path]:
    """Where to look for the images of a json, in order."""
    above, split = Path(os.path.abspath(path)).parent.parent, path.stem.rpartition("_")[2]
    given = [images / split, images] if images else []
    return [*given, path.parent, above / "images" / split, above / split, above / "images"]


def is_id(value: Any) -> TypeGuard[Id]:
    return type(value) in (int, str)


def _image(number: Id, path: str, name: str, row: dict[str, Any]) -> CocoImage:
    video, place = row.get("video_id"), next((row[key] for key in NUMBERS if type(row.get(key)) is int), None)
    return CocoImage(number, path, name, _size_in(row), video=video if is_id(video) else None, number=place)


def _size_in(row: dict[str, Any]) -> Size | None:
    height, width = row.get("height"), row.get("width")
    return (height, width) if type(height) is int and type(width) is int else None


def size_fault(image: CocoImage, size: Size, path: Path) -> Fault | None:
    """What is wrong if the picture has this size, and the json at `path` says another."""
    if image.size is None or image.size == size:
        return None
    height, width = image.size
    return Fault(image.path, f"is {size[1]}x{size[0]} (upright), but {width}x{height} by {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Segmentations


def to_rle(segmentation: Any, size: Size) -> Rle:
    """Polygons, an uncompressed or a compressed run-length code as the one that pycocotools computes with.

    Polygons may reach out of the picture by its longer side; what is out there is cut off.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    if isinstance(segmentation, dict):
        return _checked_rle(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("has no segmentation")
    for polygon in segmentation:
        _check_polygon(polygon, size)
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))


def _check_polygon(polygon: Any, size: Size) -> None:
    if not isinstance(polygon, list) or not all(type(value) in (int, float) for value in polygon):
        raise ValueError("has a polygon that is no list of numbers")
    if len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(f"has a polygon of {len(polygon)} numbers, not of x and y of three points or more")
    reach = max(size)
    if not all(-reach <= value <= 2 * reach for value in polygon):  # nor is NaN
        raise ValueError("has a polygon with coordinates that are not finite, or far outside of the picture")
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > MAX_OUTLINE:
        raise ValueError(f"has a polygon that is longer than {MAX_OUTLINE} pixels")


def _checked_rle(code: dict[str, Any], size: Size) -> Rle:
    if code.get("size") != list(size):
        raise ValueError(f"has a run-length code of size {shown(code.get('size'))}, its picture has {list(size)}")
    counts = code.get("counts")
    runs = decode_counts(counts) if isinstance(counts, str) else counts
    pixels = size[0] * size[1]
    if not isinstance(runs, list) or not all(type(run) is int and 0 <= run <= pixels for run in runs):
        raise ValueError(f"has a run-length code whose counts are no list of numbers from 0 to {pixels}")
    if sum(runs) != pixels:
        raise ValueError(f"has a run-length code of {sum(runs)} pixels, its picture has {pixels}")
    return coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)


def decode_counts(code: str) -> list[int]:
    """The runs in the text of a compressed run-length code.

    A run is written as its difference from the run before the last, five bits to a character from the lowest on, with
    48 added; a sixth bit says that more follow, and the last one's fifth is the sign (pycocotools, maskApi.c).

    Raises:
        ValueError: characters that do not occur, or the text ends within a run.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("has a compressed run-length code that is none")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("has a compressed run-length code that breaks off")
    return runs


def draw_labels(objects: list[tuple[int, bool, Rle]], size: Size, ground: int) -> np.ndarray:
    """Objects as (label, is crowd, code) → (H, W) uint8 labels, `ground` where there is none.

    Crowds lie lowest, then the largest first, so that small objects stay visible; of equal ones the later is on top.
    """
    ordered = sorted(objects, key=lambda each: (not each[1], -int(coco_mask.area(each[2]))))
    turned = np.full(size[::-1], ground, np.uint8)  # run-length codes go down the columns
    for label, _, code in ordered:
        turned[coco_mask.decode(code).T.view(bool)] = label
    return np.ascontiguousarray(turned.T)

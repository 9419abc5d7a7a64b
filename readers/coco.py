"""COCO json (https://cocodataset.org/#format-data): its images and annotations, checked before anything draws them.

pycocotools draws the outlines, and is not memory-safe: NaN or far coordinates crash the interpreter, a run-length code
of another size reads past its end. So nothing reaches it that has not been looked through here.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from readers.base import DataError, Fault
from samples import Size

Id = int | str
Rle = dict[str, Any]  # {"size": [h, w], "counts": bytes}, as pycocotools compresses it

_abridged = reprlib.Repr()  # names values of a json in a sentence, whatever they are
_abridged.maxstring = _abridged.maxother = 100
_shown = _abridged.repr

MAX_OUTLINE = 4_000_000  # pixels along one polygon; pycocotools takes 80 bytes of memory for each


@dataclass
class CocoAnnotation:
    id: str  # as it is named in a fault
    category: Id
    is_crowd: bool
    segmentation: Any  # as the json has it; see `to_rle`


@dataclass
class CocoImage:
    path: str
    name: str  # file_name without its suffix
    size: Size | None  # as the json says
    annotations: list[CocoAnnotation] = field(default_factory=list)


class CocoFile:
    """Images in the order of their names, with their annotations; `categories` is {id: name} in the order of the ids.

    Images are looked for by `file_name` in `images` (and its folder of the split's name), in the json's folder,
    `../images/<split>`, `../<split>` and `../images`, where `instances_train.json` is of the split `train`. Names that
    lead out of that folder are faults. So is everything that is not as the format wants it; what remains is usable.

    Raises:
        DataError: not a COCO json at all.
    """

    def __init__(self, path: Path, *, images: Path | None = None):
        self.path = path
        self.faults: list[Fault] = []
        content = _load(path)
        self.categories = dict(sorted(self._categories(content).items(), key=lambda row: (str(type(row[0])), row[0])))
        found = self._images(content, _folders(path, images))
        self._attach(content, found)
        self.images = sorted((image for image in found.values() if image), key=lambda image: image.path)

    def _rows(self, content: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        """The objects in a list of the json."""
        rows = content.get(key)
        if not isinstance(rows, list):
            self._report(f"has no list of {key}")
            return
        for position, row in enumerate(rows):
            if isinstance(row, dict):
                yield row
            else:
                self._report(f"{key}[{position}] is no object")

    def _report(self, problem: str) -> None:
        self.faults.append(Fault(str(self.path), problem))

    def _categories(self, content: dict[str, Any]) -> dict[Id, str]:
        categories: dict[Id, str] = {}
        for row in self._rows(content, "categories"):
            number, name = row.get("id"), row.get("name")
            words = " ".join(name.split()) if isinstance(name, str) else ""
            if not (_is_id(number) and words and words.isprintable()):
                self._report(f"a category needs an id and a name, not {_shown(number)} and {_shown(name)}")
            elif number in categories or words in categories.values():
                self._report(f"category {_shown(number)} ({words}) has an id or a name that another one has")
            else:
                categories[number] = words
        return categories

    def _images(self, content: dict[str, Any], folders: list[Path]) -> dict[Id, CocoImage | None]:
        """{id: image}, None for those that cannot be had."""
        images: dict[Id, CocoImage | None] = {}
        names: set[str] = set()
        absent = []
        for row in self._rows(content, "images"):
            number, file_name = row.get("id"), row.get("file_name")
            if not (_is_id(number) and isinstance(file_name, str) and file_name):
                self._report(f"an image needs an id and a file_name, not {_shown(number)} and {_shown(file_name)}")
                continue
            name = PurePosixPath(file_name).with_suffix("").as_posix() if PurePosixPath(file_name).name else file_name
            if number in images or name in names:
                self._report(f"image {_shown(number)} ({_shown(file_name)}) has an id or a name that another one has")
                continue
            names.add(name)
            path = self._locate(file_name, folders)
            images[number] = CocoImage(path, name, _size_in(row)) if path else None
            if path == "":
                absent.append(file_name)
        self._report_absent(absent, folders, any_found=any(images.values()))
        return images

    def _locate(self, file_name: str, folders: list[Path]) -> str | None:
        """Where the image is, "" where it is nowhere, None where its name is not to be followed."""
        relative = PurePosixPath(file_name)
        if relative.is_absolute() or ".." in relative.parts:
            self._report(f"the file_name {_shown(file_name)} leads out of the images' folder")
            return None
        for folder in folders:
            path = os.path.join(folder, file_name)
            if os.path.isfile(path):
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
                    return path
                self._report(f"{path} links out of its folder; copy it there, or link the whole folder")
                return None
        return ""

    def _report_absent(self, absent: list[str], folders: list[Path], *, any_found: bool) -> None:
        looked = f"looked in {', '.join(map(str, folders))}; name their folder with data.images"
        if absent and not any_found:
            self._report(f"none of its {len(absent)} images is there ({_shown(absent[0])} …): {looked}")
            return
        for file_name in absent:
            self._report(f"the image {_shown(file_name)} is not there: {looked}")

    def _attach(self, content: dict[str, Any], images: dict[Id, CocoImage | None]) -> None:
        """Give every image its annotations."""
        for row in self._rows(content, "annotations"):
            number, owner, category = row.get("id"), row.get("image_id"), row.get("category_id")
            if not (_is_id(owner) and owner in images):
                self._report(f"annotation {_shown(number)} is of image {_shown(owner)}, which is not in the file")
                continue
            image = images[owner]
            if image is None:
                continue
            if not (_is_id(category) and category in self.categories):
                problem = f"annotation {_shown(number)} in {self.path} has the unknown category {_shown(category)}"
                self.faults.append(Fault(image.path, problem))
                continue
            crowd = bool(row.get("iscrowd", 0))
            image.annotations.append(CocoAnnotation(_shown(number), category, crowd, row.get("segmentation")))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(Fault(str(path), f"cannot be read as json ({reason})")) from error
    if not isinstance(content, dict):
        raise DataError(Fault(str(path), "is no COCO json: it holds no object with images, annotations and categories"))
    return content


def _folders(path: Path, images: Path | None) -> list[Path]:
    """Where to look for the images of a json, in order."""
    above, split = Path(os.path.abspath(path)).parent.parent, path.stem.rpartition("_")[2]
    given = [images / split, images] if images else []
    return [*given, path.parent, above / "images" / split, above / split, above / "images"]


def _is_id(value: Any) -> TypeGuard[Id]:
    return type(value) in (int, str)


def _size_in(row: dict[str, Any]) -> Size | None:
    height, width = row.get("height"), row.get("width")
    return (height, width) if type(height) is int and type(width) is int else None


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
        raise ValueError(f"has a run-length code of size {_shown(code.get('size'))}, its picture has {list(size)}")
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

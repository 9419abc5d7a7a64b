"""COCO results of any program (https://cocodataset.org/#format-results) and the annotations that they are scored by.

    results = CocoResults(Path("results.json"), Path("instances_val.json"))
    fail_on(results.faults)
    metric = InstanceMetric(class_names=results.class_names, masks=results.has_masks)
    results.score(metric, range(len(results)))

Everything is looked through before pycocotools sees it, which is not memory-safe. An object is as large as its mask,
also where a result names a box: pycocotools' `loadRes` would take the box's area, and so count others as small, medium
and large ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from metrics import InstanceMetric
from metrics.average_precision import Regions
from readers import DataError, Fault
from readers.coco import Id, is_id, shown, to_rle
from samples import Rle, Size

Row = dict[str, Any]


@dataclass
class Shapes:
    """Objects or detections of an image as the files have them."""

    labels: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)  # left, top, width, height
    codes: list[Rle] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # scores of detections, areas of objects
    crowd: list[bool] = field(default_factory=list)


@dataclass
class Scene:
    """One image: what is there and what was found."""

    name: str
    size: Size
    there: Shapes = field(default_factory=Shapes)
    found: Shapes = field(default_factory=Shapes)


class CocoResults:
    """Images in the order of their ids, which decides among equal scores as it does in pycocotools.

    With masks where the results have them; boxes that they lack are those around the masks. `faults` are of both files;
    score only without any.

    Raises:
        DataError: a file that is no json of its kind at all.
    """

    def __init__(self, results: Path, truth: Path):
        self.faults: list[Fault] = []
        self.path, self.truth = results, truth
        content, found = _load(truth), _load(results)
        if not isinstance(content, dict):
            raise DataError(Fault(str(truth), "is no COCO json: it holds no object with images and annotations"))
        if not isinstance(found, list):
            raise DataError(Fault(str(results), "is no list of COCO results"))
        self.labels: dict[Id, int] = {}
        self.class_names: list[str] = []
        self._read_categories(content)
        self.scenes = self._read_images(content)
        self.has_masks = any(isinstance(row, dict) and "segmentation" in row for row in found)
        self._read_shapes(truth, content.get("annotations"), "annotation", "there")
        self._read_shapes(results, found, "result", "found")

    def __len__(self) -> int:
        return len(self.scenes)

    def score(self, metric: InstanceMetric, indices: Iterable[int]) -> None:
        """Score some of the images; their ids stand for them, with zeros in front as in COCO's own names."""
        scenes = list(self.scenes.items())
        for number, scene in (scenes[index] for index in indices):
            found, there = scene.found, scene.there
            metric.update_regions(
                self._regions(found),
                np.array(found.weights, np.float64),
                self._regions(there, np.array(there.weights, np.float64)),
                np.array(there.crowd, bool),
                dataset=self.truth.stem,
                sample_id=f"{number:012d}" if isinstance(number, int) else number,
                path=scene.name,
            )

    def _regions(self, shapes: Shapes, areas: np.ndarray | None = None) -> Regions:
        boxes = np.array(shapes.boxes, np.float64).reshape(-1, 4)
        return Regions(np.array(shapes.labels, np.int64), boxes, shapes.codes if self.has_masks else None, areas)

    # ------------------------------------------------------------ reading

    def _report(self, path: Path, problem: str) -> None:
        self.faults.append(Fault(str(path), problem))

    def _rows(self, path: Path, rows: Any, what: str) -> Iterator[tuple[int, Row]]:
        if not isinstance(rows, list):
            self._report(path, f"has no list of {what}s")
            return
        for position, row in enumerate(rows):
            if isinstance(row, dict):
                yield position, row
            else:
                self._report(path, f"{what} {position} is no object")

    def _read_categories(self, content: Row) -> None:
        names: dict[Id, str] = {}
        for position, row in self._rows(self.truth, content.get("categories"), "category"):
            number, name = row.get("id"), row.get("name")
            if not is_id(number) or not isinstance(name, str) or number in names:
                self._report(self.truth, f"category {position} needs an id of its own and a name")
            else:
                names[number] = name
        ordered = _in_order(names)
        self.labels = {number: label for label, number in enumerate(ordered)}
        self.class_names = [names[number] for number in ordered]

    def _read_images(self, content: Row) -> dict[Id, Scene]:
        scenes: dict[Id, Scene] = {}
        for position, row in self._rows(self.truth, content.get("images"), "image"):
            number, height, width = row.get("id"), row.get("height"), row.get("width")
            if not is_id(number) or number in scenes:
                self._report(self.truth, f"image {position} needs an id of its own")
            elif not (_is_side(height) and _is_side(width)):
                size = f"{shown(height)} and {shown(width)}"
                self._report(self.truth, f"image {shown(number)} needs a height and a width, not {size}")
            else:
                scenes[number] = Scene(str(row.get("file_name", number)), (height, width))
        return {number: scenes[number] for number in _in_order(scenes)}

    def _read_shapes(self, path: Path, rows: Any, what: str, place: str) -> None:
        """Put the rows of a file into the scenes; what is wrong with one is a fault and leaves it out."""
        for position, row in self._rows(path, rows, what):
            owner, category = row.get("image_id"), row.get("category_id")
            named = f"{what} {position}"
            if not is_id(owner) or owner not in self.scenes:
                self._report(path, f"{named} is of image {shown(owner)}, which {self.truth} does not have")
            elif not is_id(category) or category not in self.labels:
                self._report(path, f"{named} has the category {shown(category)}, which {self.truth} does not have")
            else:
                scene = self.scenes[owner]
                try:
                    self._add(getattr(scene, place), row, scene.size, self.labels[category], is_result=what == "result")
                except ValueError as error:
                    self._report(path, f"{named} {error}")

    def _add(self, shapes: Shapes, row: Row, size: Size, label: int, *, is_result: bool) -> None:
        box, outline = row.get("bbox"), row.get("segmentation")
        code = to_rle(outline, size) if self.has_masks else None
        if box:
            _check_box(box)
        elif code is None:
            raise ValueError("has no bbox")
        else:
            box = coco_mask.toBbox(code).tolist()
        measured = float(coco_mask.area(code)) if code else box[2] * box[3]
        weight = row.get("score") if is_result else row.get("area", measured)
        if not _is_number(weight):
            raise ValueError(f"has the {'score' if is_result else 'area'} {shown(weight)}, which is no number")
        shapes.labels.append(label)
        shapes.boxes.append(box)
        shapes.codes += [code] if code else []
        shapes.weights.append(float(weight))
        shapes.crowd.append(bool(row.get("iscrowd", 0)))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(Fault(str(path), f"cannot be read as json ({reason})")) from error


def _in_order(ids: Iterable[Id]) -> list[Id]:
    """Numbers before words."""
    return sorted(ids, key=lambda number: (isinstance(number, str), number))


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _is_side(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**20


def _check_box(box: Any) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise ValueError(f"has the bbox {shown(box)}, which is no left, top, width and height")

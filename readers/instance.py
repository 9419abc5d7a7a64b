"""Objects of a class each: COCO json, or text files of outlines in the layout of YOLO.

    reader = instance_reader("cells/train+coco/annotations/instances_train.json:0.5")
    fail_on(check(reader))
    print(show_objects(object_table(reader)))

Labels are those of `class_names`, from 0 on without gaps, whatever ids the files give the classes: those are kept, as
`file_ids`, for results that others score. Classes of several data sets, and of validation and training, meet by their
names. Nothing is left out here that evaluation counts: objects without a single pixel stay, and so do crowds.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from errors import UserError
from layers import MAX_OBJECTS
from readers.base import DataError, Fault, Reader
from readers.coco import CocoAnnotation, CocoFile, CocoImage, Id, size_fault, to_rle
from readers.folders import locate, parse_spec
from readers.images import read_image
from samples import Objects, Rle, Sample, Size


@dataclass(slots=True)
class Item:
    """One image and where its objects are."""

    path: str
    stem: str
    outlines: str = ""  # YOLO: the text file; nothing where the image has none
    image: CocoImage | None = None


class Found(NamedTuple):
    """One object as a source has it."""

    label: int
    code: Rle
    box: tuple[float, float, float, float]  # left, top, right, bottom
    area: float
    is_crowd: bool
    has_mask: bool  # or is a box alone, and its code the box's rectangle


class ObjectSource(ABC):
    """One data set: its items, the names of its classes by the ids in its files, and their objects."""

    def __init__(self, name: str, path: Path, weight: float):
        self.name, self.path, self.weight = name, path, weight
        self.faults: list[Fault] = []
        self.items: list[Item] = []
        self.classes: dict[Id, str] = {}
        self.labels: dict[Id, int] = {}

    def use(self, class_names: Sequence[str]) -> None:
        """Learn which label each name stands for."""
        self.labels = {number: class_names.index(name) for number, name in self.classes.items() if name in class_names}
        unknown = [name for name in self.classes.values() if name not in class_names]
        if unknown:
            listed = ", ".join(unknown[:10]) + (" …" if len(unknown) > 10 else "")
            self.faults.append(Fault(str(self.path), f"has classes that the training data lack: {listed}"))

    @abstractmethod
    def find(self, item: Item, size: Size) -> tuple[list[Found], list[Fault]]:
        """The objects of an image of this size, and what is wrong with others."""

    def image_id(self, item: Item) -> Id:
        """What stands for the image in the source, and in results."""
        return item.stem


class CocoObjects(ObjectSource):
    """COCO json. The mask's own box and area take the place of those that make no sense; a box without a mask is a
    rectangle."""

    def __init__(self, name: str, path: Path, weight: float, images: Path | None):
        super().__init__(name, path, weight)
        try:
            self.file = CocoFile(path, images=images)
        except DataError as error:
            self.faults.append(error.fault)
            return
        self.faults += self.file.faults
        self.classes = dict(self.file.categories)
        self.items = [Item(image.path, image.name, image=image) for image in self.file.images]

    def image_id(self, item: Item) -> Id:
        assert item.image
        return item.image.id

    def find(self, item: Item, size: Size) -> tuple[list[Found], list[Fault]]:
        assert item.image
        if fault := size_fault(item.image, size, self.path):
            return [], [fault]
        annotations, faults = self.file.annotations(item.image)
        found = []
        for annotation in annotations:
            if annotation.category not in self.labels:  # the class itself is a fault already
                continue
            try:
                found.append(self._object(annotation, size))
            except ValueError as error:
                faults.append(Fault(item.path, f"annotation {annotation.id} in {self.path} {error}"))
        return found, faults

    def _object(self, annotation: CocoAnnotation, size: Size) -> Found:
        box = _usable_box(annotation.bbox, size)
        has_mask = bool(annotation.segmentation)
        if has_mask:
            code = to_rle(annotation.segmentation, size)
        elif box:
            code = rectangle(box, size)
        else:
            raise ValueError("has neither a segmentation nor a usable bbox")
        area = annotation.area
        if type(area) not in (int, float) or not 0 <= area <= 1e15:
            area = coco_mask.area(code)
        label = self.labels[annotation.category]
        return Found(label, code, box or box_of(code), float(area), annotation.is_crowd, has_mask)


def _usable_box(box: Any, size: Size) -> tuple[float, float, float, float] | None:
    """[left, top, width, height] → left, top, right, bottom, if it is a box and not far out of the picture."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(value) in (int, float) for value in box):
        return None
    left, top, width, height = box
    reach = max(size)
    near = -reach <= left <= 2 * reach and -reach <= top <= 2 * reach
    if not (near and 0 < width <= 3 * reach and 0 < height <= 3 * reach):  # nor is NaN
        return None
    return float(left), float(top), float(left + width), float(top + height)


def rectangle(box: Sequence[float], size: Size) -> Rle:
    """The code of the pixels of a box, whatever of it is within the picture."""
    left, top, right, bottom = box
    return coco_mask.merge(coco_mask.frPyObjects([[left, top, right, top, right, bottom, left, bottom]], *size))


def box_of(code: Rle) -> tuple[float, float, float, float]:
    """The rectangle that just holds a code's pixels, all 0 where it has none."""
    left, top, width, height = (float(value) for value in coco_mask.toBbox(code))
    return left, top, left + width, top + height


class Checked(NamedTuple):
    """What the check learned of a sample: its objects in a few bytes."""

    size: Size
    labels: np.ndarray  # (n,) int32
    boxes: np.ndarray  # (n, 4) float32
    crowd: np.ndarray  # (n,) bool
    areas: np.ndarray  # (n,) float64
    has_mask: np.ndarray  # (n,) bool
    codes: bytes
    lengths: np.ndarray  # (n,) int32 of each code


class InstanceReader(Reader):
    """The samples of several sources with objects of one list of classes; see `instance_reader`.

    What the check drew it keeps, as run-length codes, so that no outline is drawn twice.
    """

    def __init__(self, sources: Sequence[ObjectSource], class_names: Sequence[str] | None = None):
        found = dict.fromkeys(name for source in sources for name in source.classes.values())
        self.class_names = list(found if class_names is None else class_names)
        for source in sources:
            source.use(self.class_names)
        self.sources = {source.name: source for source in sources}
        self.faults = [fault for source in sources for fault in source.faults]
        self._items = [(source, item) for source in sources for item in source.items]
        self._checked: dict[int, Checked] = {}

    @property
    def file_ids(self) -> list[Id]:
        """What stands for each class in the files, by label; of several data sets the first that has it decides, and a
        class that none has goes by its label."""
        ids: dict[int, Id] = {}
        for source in self.sources.values():
            for number, label in source.labels.items():
                ids.setdefault(label, number)
        return [ids.get(label, label) for label in range(len(self.class_names))]

    def image_id(self, index: int) -> Id:
        """What stands for the image in its file, for results: COCO's id, or the name of an image without one."""
        source, item = self._items[index]
        return source.image_id(item)

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Sample:
        source, item = self._items[index]
        image = read_image(item.path)
        checked, faults = self._objects(index, (image.shape[0], image.shape[1]))
        if checked is None:
            raise DataError(faults[0])
        ends = np.cumsum(checked.lengths).tolist()
        texts = [checked.codes[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return Sample(
            frames=[image],
            masks=Objects(
                codes=[{"size": list(checked.size), "counts": text} for text in texts],
                boxes=checked.boxes.copy(),
                crowd=checked.crowd.copy(),
                areas=checked.areas.copy(),
            ),
            class_ids=checked.labels.tolist(),
            are_labels=True,
            sample_id=self.sample_id(index),
            path=item.path,
            dataset=source.name,
        )

    def _objects(self, index: int, size: Size) -> tuple[Checked | None, list[Fault]]:
        source, item = self._items[index]
        checked = self._checked.get(index)
        if checked is None:
            found, faults = source.find(item, size)
            if len(found) > MAX_OBJECTS:
                faults.append(Fault(item.path, f"has {len(found)} objects, which are more than {MAX_OBJECTS}"))
            return (None, faults) if faults else (_checked(found, size), [])
        if checked.size != size:
            return None, [Fault(item.path, "has changed since it was checked")]
        return checked, []

    def find_faults(self, index: int) -> list[Fault]:
        _, item = self._items[index]
        try:
            height, width, _ = read_image(item.path).shape
        except DataError as error:
            return [error.fault]
        checked, faults = self._objects(index, (height, width))
        if checked is not None:
            self._checked[index] = checked
        return faults

    def findings(self) -> dict[int, Checked]:
        return self._checked

    def adopt(self, findings: dict[int, Checked]) -> None:
        self._checked.update(findings)

    def checked(self, index: int) -> Checked:
        """What is known of a sample's objects; reads them where no check has."""
        if index not in self._checked and (faults := self.find_faults(index)):
            raise DataError(faults[0])
        return self._checked[index]

    def sample_id(self, index: int) -> str:
        source, item = self._items[index]
        return f"{source.name}/{item.stem}"

    def dataset_of(self, index: int) -> str:
        return self._items[index][0].name

    def files(self, index: int) -> list[str]:
        item = self._items[index][1]
        return [item.path, item.outlines] if item.outlines else [item.path]

    def weight_of(self, dataset: str) -> float:
        return self.sources[dataset].weight


def _checked(found: list[Found], size: Size) -> Checked:
    codes = [each.code["counts"] for each in found]
    return Checked(
        size=size,
        labels=np.array([each.label for each in found], np.int32),
        boxes=np.array([each.box for each in found], np.float32).reshape(-1, 4),
        crowd=np.array([each.is_crowd for each in found], bool),
        areas=np.array([each.area for each in found], np.float64),
        has_mask=np.array([each.has_mask for each in found], bool),
        codes=b"".join(codes),
        lengths=np.array([len(code) for code in codes], np.int32),
    )


def instance_reader(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    images: str | os.PathLike[str] = "",
) -> InstanceReader:
    """A reader of data sets joined with `+`, each `name[:weight]`: a COCO json or a folder (`YoloFolder`).

    A name means `<root>/<name>` where that exists, else a path as given, as does `images`, the folder of a json's
    images (`CocoFile` says where else they are looked for). `class_names` are the classes by their labels: those of the
    training data, or what the data sets name, in their order.

    Raises:
        UserError: `spec` itself makes no sense, or `images` is no folder.
    """
    folder = locate(os.fspath(images), root) if images else None
    if folder and not folder.is_dir():
        raise UserError(f"data.images: {folder} is no folder")
    return InstanceReader([_open(*entry, folder) for entry in parse_spec(spec, root)], class_names)


def _open(name: str, path: Path, weight: float, images: Path | None) -> ObjectSource:
    return CocoObjects(name, path, weight, images)


# ---------------------------------------------------------------------------------------------------------------------
# Classes and their objects


class ObjectRow(NamedTuple):
    file_ids: str  # what stands for the class in the files; several where data sets differ
    label: int  # what the model learns
    name: str
    objects: int  # crowds not among them
    crowds: int
    without_mask: int  # of the objects: boxes alone


def object_table(reader: Reader) -> list[ObjectRow]:
    """A row for each class, over the samples of an `InstanceReader` or a part of one."""
    whole: Reader | None = None
    counts = np.zeros((3, len(reader.class_names)), np.int64)
    for index in range(len(reader)):
        whole, position = reader.origin(index)
        assert isinstance(whole, InstanceReader)
        known = whole.checked(position)
        for row, chosen in enumerate((~known.crowd, known.crowd, ~known.crowd & ~known.has_mask)):
            counts[row] += np.bincount(known.labels[chosen], minlength=counts.shape[1])
    rows = []
    sources = whole.sources.values() if isinstance(whole, InstanceReader) else []
    for label, name in enumerate(reader.class_names):
        ids = dict.fromkeys(str(number) for s in sources for number, to in s.labels.items() if to == label)
        rows.append(ObjectRow(", ".join(ids) or "-", label, name, *counts[:, label].tolist()))
    return rows


def show_objects(rows: Sequence[ObjectRow]) -> str:
    """The rows of `object_table` as aligned text."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"  {'in files':>10}  {'label':>5}  {'class':<{width}}  objects  crowds"]
    lines += [f"  {r.file_ids:>10}  {r.label:>5}  {r.name:<{width}}  {r.objects:>7}  {r.crowds:>6}" for r in rows]
    boxes = sum(row.without_mask for row in rows)
    if boxes:
        lines.append(f"  {boxes} of {sum(row.objects for row in rows)} objects are boxes alone, without a mask")
    return "\n".join(lines)

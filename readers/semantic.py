"""A class for each pixel: class-id masks in folders, or COCO json drawn as label maps.

    reader = semantic_reader("scenes/train+coco/annotations/instances_train.json:0.5")
    fail_on(check(reader))
    print(show_classes(class_table(reader)))

Labels are those of `class_names`, 255 is ignored. Classes of several data sets, and of validation and training, meet
by their names, whatever ids the files give them.
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError
from readers.base import DataError, Fault, Reader
from readers.coco import CocoFile, CocoImage, Id, coco_json, draw_labels, size_fault, to_rle
from readers.folders import list_pairs, locate, parse_spec
from readers.images import read_image, read_labels
from samples import IGNORED, Sample, Size

MAX_CLASSES = IGNORED  # that a byte can tell from each other and from what is ignored
NO_OBJECT, BACKGROUND = "no object", "background"  # id and name of the class of pixels that no object of COCO covers


@dataclass
class Item:
    """One image and where its labels are."""

    path: str
    stem: str
    mask: str = ""  # class-id masks
    drawn: CocoImage | None = None  # COCO: whose annotations are drawn


class LabelSource(ABC):
    """One data set: its items, the names of its classes by the ids in its files, and how labels are drawn."""

    def __init__(self, name: str, path: Path, weight: float):
        self.name, self.path, self.weight = name, path, weight
        self.faults: list[Fault] = []
        self.items: list[Item] = []
        self.classes: dict[Id, str] = {}

    def use(self, class_names: Sequence[str]) -> None:
        """Learn which label each name stands for."""
        self.labels = {number: class_names.index(name) for number, name in self.classes.items() if name in class_names}
        unknown = [name for name in self.classes.values() if name not in class_names]
        if unknown:
            listed = ", ".join(unknown[:10]) + (" …" if len(unknown) > 10 else "")
            self.faults.append(Fault(str(self.path), f"has classes that the training data lack: {listed}"))

    @abstractmethod
    def draw(self, item: Item, size: Size | None) -> tuple[np.ndarray | None, list[Fault]]:
        """(H, W) uint8 labels of an image of this size, or what is wrong with them; a size of None is not known."""


class SemanticFolder(LabelSource):
    """`images/` and `masks/` with the same stems, and `classes.txt` there or in the folder above: a name a line, from
    id 0 on. `im/`, and `gt/` or `labels/`, do as well."""

    def __init__(self, name: str, path: Path, weight: float):
        super().__init__(name, path, weight)
        pairs = list_pairs(path, name, self.faults, images=("images", "im"), masks=("masks", "gt", "labels"))
        self.classes = self._read_classes() if pairs else {}
        if self.classes:
            self.items = [Item(pair.image, pair.stem, mask=pair.mask) for pair in pairs]

    def _read_classes(self) -> dict[Id, str]:
        file = next((f / "classes.txt" for f in (self.path, self.path.parent) if (f / "classes.txt").is_file()), None)
        if file is None:
            problem = "has no classes.txt, in it or in the folder above, with the name of a class in each line"
            self.faults.append(Fault(str(self.path), problem))
            return {}
        try:
            names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
        except ValueError:
            self.faults.append(Fault(str(file), "is no text in UTF-8"))
            return {}
        _limit_classes(len(names), str(file))
        for number, name in enumerate(names):
            if not name or name in names[:number]:
                problem = f"line {number + 1} repeats the class {name!r}" if name else f"line {number + 1} is empty"
                self.faults.append(Fault(str(file), problem))
        return dict(enumerate(names))

    def draw(self, item: Item, size: Size | None) -> tuple[np.ndarray | None, list[Fault]]:
        try:
            ids = read_labels(item.mask)
        except DataError as error:
            return None, [error.fault]
        if size and ids.shape != size:
            sides = f"is {ids.shape[1]}x{ids.shape[0]}, its image {item.path} is {size[1]}x{size[0]} (upright)"
            return None, [Fault(item.mask, sides)]
        table = np.full(256, IGNORED, np.uint8)
        table[[int(number) for number in self.labels]] = list(self.labels.values())
        present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256))
        unknown = [str(value) for value in present if value not in self.classes and value != IGNORED]
        if unknown:
            known = f"the classes have 0 to {len(self.classes) - 1}, ignored pixels {IGNORED}"
            return None, [Fault(item.mask, f"has the values {', '.join(unknown)}; {known}")]
        return table[ids], []


class CocoLabels(LabelSource):
    """COCO json, its objects drawn one over the other; what no object covers is `background`.

    A crowd is drawn as its class, below all objects (torchvision's references/segmentation leave crowds in, too).
    """

    def __init__(self, name: str, path: Path, weight: float, images: Path | None):
        super().__init__(name, path, weight)
        try:
            self.file = CocoFile(path, images=images)
        except DataError as error:
            self.faults.append(error.fault)
            return
        self.faults += self.file.faults
        self.classes = {NO_OBJECT: BACKGROUND, **self.file.categories}
        self.items = [Item(image.path, image.name, drawn=image) for image in self.file.images]

    def draw(self, item: Item, size: Size | None) -> tuple[np.ndarray | None, list[Fault]]:
        if size is None or item.drawn is None:
            return None, []
        if fault := size_fault(item.drawn, size, self.path):
            return None, [fault]
        objects = []
        annotations, faults = self.file.annotations(item.drawn)
        for annotation in annotations:
            try:
                code = to_rle(annotation.segmentation, size)
                objects.append((self.labels.get(annotation.category, IGNORED), annotation.is_crowd, code))
            except ValueError as error:
                faults.append(Fault(item.path, f"annotation {annotation.id} in {self.path} {error}"))
        ground = self.labels.get(NO_OBJECT, IGNORED)
        return (None, faults) if faults else (draw_labels(objects, size, ground), [])


class Checked(NamedTuple):
    """What the check learned of a sample."""

    counts: np.ndarray  # (number of classes + 1,) uint32 pixels of each class, and of those ignored
    size: Size
    packed: bytes  # the labels, where drawing them again would cost more


class SemanticReader(Reader):
    """The samples of several sources with labels of one list of classes; see `semantic_reader`.

    What the check draws from COCO json it keeps, compressed, so that no polygon is drawn twice.
    """

    def __init__(self, sources: Sequence[LabelSource], class_names: Sequence[str] | None = None):
        found = dict.fromkeys(name for source in sources for name in source.classes.values())
        self.class_names = list(found if class_names is None else class_names)
        _limit_classes(len(self.class_names), "data")
        for source in sources:
            source.use(self.class_names)
        self.sources = {source.name: source for source in sources}
        self.faults = [fault for source in sources for fault in source.faults]
        self._items = [(source, item) for source in sources for item in source.items]
        self._checked: dict[int, Checked] = {}

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Sample:
        source, item = self._items[index]
        image = read_image(item.path)
        labels, faults = self._labels(index, (image.shape[0], image.shape[1]))
        if labels is None:
            raise DataError(faults[0])
        return Sample(
            frames=[image],
            masks=labels,
            are_labels=True,
            sample_id=self.sample_id(index),
            path=item.path,
            dataset=source.name,
        )

    def _labels(self, index: int, size: Size | None) -> tuple[np.ndarray | None, list[Fault]]:
        source, item = self._items[index]
        checked = self._checked.get(index)
        if not (checked and checked.packed):
            return source.draw(item, size)
        if checked.size != size:
            return None, [Fault(item.path, "has changed since it was checked")]
        return np.frombuffer(bytearray(zlib.decompress(checked.packed)), np.uint8).reshape(size), []

    def find_faults(self, index: int) -> list[Fault]:
        _, item = self._items[index]
        size, faults = None, []
        try:
            height, width, _ = read_image(item.path).shape
            size = (height, width)
        except DataError as error:
            faults.append(error.fault)
        labels, found = self._labels(index, size)
        if labels is not None and size:
            self.adopt({index: self._learn(item, labels)})
        return faults + found

    def _learn(self, item: Item, labels: np.ndarray) -> Checked:
        counts = np.bincount(labels.ravel(), minlength=256)
        counts = np.append(counts[: len(self.class_names)], counts[IGNORED]).astype(np.uint32)
        packed = b"" if item.mask else zlib.compress(labels.tobytes(), 1)
        return Checked(counts, (labels.shape[0], labels.shape[1]), packed)

    def findings(self) -> dict[int, Checked]:
        return self._checked

    def adopt(self, findings: dict[int, Checked]) -> None:
        self._checked.update(findings)

    def counts_of(self, index: int) -> np.ndarray:
        """(number of classes + 1,) pixels of each class in a sample, and of those ignored last."""
        checked = self._checked.get(index) or self._learn(self._items[index][1], self.read(index).masks)
        return checked.counts

    def sample_id(self, index: int) -> str:
        source, item = self._items[index]
        return f"{source.name}/{item.stem}"

    def dataset_of(self, index: int) -> str:
        return self._items[index][0].name

    def files(self, index: int) -> list[str]:
        item = self._items[index][1]
        return [item.path, item.mask] if item.mask else [item.path]

    def weight_of(self, dataset: str) -> float:
        return self.sources[dataset].weight


def semantic_reader(
    spec: str,
    *,
    root: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    images: str | os.PathLike[str] = "",
) -> SemanticReader:
    """A reader of data sets joined with `+`, each `name[:weight]`: a folder (`SemanticFolder`) or a COCO json.

    A name means `<root>/<name>` where that exists, else a path as given, as does `images`, the folder of a json's
    images (`CocoFile` says where else they are looked for). `class_names` are the classes by their labels: those of the
    training data, or what the data sets name, in their order; COCO json begins with `background`.

    Raises:
        UserError: `spec` itself makes no sense, `images` is no folder, or there are more than 255 classes.
    """
    folder = locate(os.fspath(images), root) if images else None
    if folder and not folder.is_dir():
        raise UserError(f"data.images: {folder} is no folder")
    return SemanticReader([_open(*entry, folder) for entry in parse_spec(spec, root)], class_names)


def _open(name: str, path: Path, weight: float, images: Path | None) -> LabelSource:
    file = coco_json(path)
    return CocoLabels(name, file, weight, images) if file else SemanticFolder(name, path, weight)


def _limit_classes(count: int, where: str) -> None:
    if count > MAX_CLASSES:
        raise UserError(f"{where}: {count} classes are more than the {MAX_CLASSES} that label maps can hold")


# ---------------------------------------------------------------------------------------------------------------------
# Classes and their share


def pixel_counts(reader: Reader) -> np.ndarray:
    """(number of classes + 1,) float64 pixels of each class, and of those ignored last, as an epoch sees them.

    `reader` is a `SemanticReader` or a part of one, best a checked one; data sets count by their weight.
    """
    total = np.zeros(len(reader.class_names) + 1)
    for index in range(len(reader)):
        whole, position = reader.origin(index)
        assert isinstance(whole, SemanticReader)
        total += whole.counts_of(position) * reader.weight_of(reader.dataset_of(index))
    return total


class ClassRow(NamedTuple):
    file_ids: str  # what stands for the class in the files; several where data sets differ
    label: int  # what the model learns
    name: str
    share: float  # of all pixels


def class_table(reader: Reader) -> list[ClassRow]:
    """A row for each class, and one for ignored pixels, over the samples of a `SemanticReader` or a part of one."""
    whole, _ = reader.origin(0)
    assert isinstance(whole, SemanticReader)
    counts = pixel_counts(reader)
    shares = counts / max(1.0, counts.sum())
    rows = []
    for label, name in enumerate(reader.class_names):
        found = {str(number): None for s in whole.sources.values() for number, to in s.labels.items() if to == label}
        rows.append(ClassRow(", ".join(found) or "-", label, name, float(shares[label])))
    return [*rows, ClassRow(str(IGNORED), IGNORED, "(ignored)", float(shares[-1]))]


def show_classes(rows: Sequence[ClassRow]) -> str:
    """The rows of `class_table` as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"  {'in files':>10}  {'label':>5}  {'class':<{width}}  pixels"]
    lines += [f"  {row.file_ids:>10}  {row.label:>5}  {row.name:<{width}}  {row.share:>6.2%}" for row in rows]
    return "\n".join(lines)

"""Objects of a class each: COCO json, or text files of outlines in the layout of YOLO.

    reader = instance_reader("cells/train+coco/annotations/instances_train.json:0.5")
    fail_on(check(reader))
    print(instance_table(reader))

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
import yaml
from pycocotools import mask as coco_mask

from errors import UserError
from layers import MAX_DEPTH, MAX_OBJECTS, depth_of, split_codes
from readers.base import DataError, Fault, Reader
from readers.coco import CocoAnnotation, CocoFile, CocoImage, Id, coco_json, shown, size_fault, to_rle
from readers.folders import list_stems, locate, parse_spec
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


class YoloFolder(ObjectSource):
    """Images, and text files of the same stems, in the layout that Ultralytics made common.

    `set/train` is either a folder with `images/` and `labels/`, or stands for `set/images/train` and
    `set/labels/train`, or for what `set/data.yaml` calls `train`. Classes have their names in `names` of a `data.yaml`,
    or line by line in `classes.txt`, beside the images or in one of the two folders above. An image without a text file
    has no objects.

    A line is an object: the class's number, from 0 on, then x and y of three points or more, or center x, center y,
    width and height of a box alone; all as shares of the picture's sides. The box of an outline is that of its points.
    """

    def __init__(self, name: str, path: Path, weight: float):
        super().__init__(name, path, weight)
        images = self._images(path)
        if images is None:
            return
        labels = _beside(images)
        self.classes = self._read_classes(images)
        if not labels.is_dir():
            self.faults.append(Fault(str(labels), f"is no folder; it would hold the text files for {images}"))
        elif self.classes:
            self._list(images, labels)

    def _images(self, path: Path) -> Path | None:
        """The folder of the images."""
        above = path.parent
        folders = [path / "images", above / "images" / path.name, *([path] if "images" in path.parts else [])]
        listed = self._yaml(above).get(path.name)
        if isinstance(listed, str) and not path.exists():
            base = self._yaml(above).get("path")
            named = [above / part / listed for part in (base if isinstance(base, str) else "", "")]
            folders += [each for folder in named for each in (folder / "images", folder)]
        folder = next((folder for folder in folders if os.path.isdir(folder)), None)
        if folder is None or "images" not in folder.parts:
            layout = (
                "a data set is a COCO .json, or a folder with images/ and labels/, or with _annotations.coco.json, "
                "or what a data.yaml calls so"
            )
            self.faults.append(Fault(str(path), f"is no data set: {layout}"))
        elif not folder.resolve().is_relative_to(above.resolve()):
            self.faults.append(Fault(str(above / "data.yaml"), f"{path.name} leads out of its folder, to {folder}"))
        elif (folder / "train").is_dir():
            self.faults.append(Fault(str(path), f"has parts of its own; name one of them, as {path / 'train'}"))
        else:
            return folder
        return None

    def _yaml(self, folder: Path) -> dict[str, Any]:
        """What the folder's `data.yaml` says, nothing where there is none."""
        file = folder / "data.yaml"
        if not file.is_file():
            return {}
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        except (ValueError, yaml.YAMLError, RecursionError, OSError) as error:
            self.faults.append(Fault(str(file), f"cannot be read as YAML ({' '.join(str(error).split())})"))
            return {}
        return content if isinstance(content, dict) else {}

    def _read_classes(self, images: Path) -> dict[Id, str]:
        for folder in [images, *images.absolute().parents[:2]]:
            names = self._yaml(folder).get("names")
            if names is not None:
                rows = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
                return self._named(folder / "data.yaml", list(rows))
            if (folder / "classes.txt").is_file():
                return self._named(folder / "classes.txt", list(enumerate(_lines(folder / "classes.txt"))))
        problem = "has no names of classes: a data.yaml with names, or a classes.txt, there or above"
        self.faults.append(Fault(str(images), problem))
        return {}

    def _named(self, file: Path, rows: list[tuple[Any, Any]]) -> dict[Id, str]:
        classes: dict[Id, str] = {}
        for number, name in rows:
            words = " ".join(str(name).split()) if type(name) in (str, int, float, bool) else ""
            if type(number) is not int or number < 0 or not words.isprintable() or not words:
                self.faults.append(
                    Fault(str(file), f"class {shown(number)} has no usable number or name: {shown(name)}")
                )
            elif words in classes.values():
                self.faults.append(Fault(str(file), f"class {number} has the name {words}, which another one has"))
            else:
                classes[number] = words
        if not rows:
            self.faults.append(Fault(str(file), "names no classes"))
        return classes

    def _list(self, images: Path, labels: Path) -> None:
        pictures = list_stems(images.parent, images.name, self.faults)
        texts = list_stems(labels.parent, labels.name, self.faults, suffixes=(".txt",))
        texts.pop("classes", None)
        for stem in sorted(texts.keys() - pictures.keys()):
            self.faults.append(Fault(texts[stem], f"has no image of the same name in {images}"))
        if not texts or not pictures:
            self.faults.append(Fault(str(labels if pictures else images), "holds nothing of use"))
        self.items = [Item(pictures[stem], stem, outlines=texts.get(stem, "")) for stem in sorted(pictures)]

    def find(self, item: Item, size: Size) -> tuple[list[Found], list[Fault]]:
        if not item.outlines:
            return [], []
        try:
            lines = _lines(Path(item.outlines))
        except (ValueError, OSError) as error:
            return [], [Fault(item.outlines, f"is no text in UTF-8 ({error})")]
        found, faults = [], []
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                each = self._object(line.split(), size)
            except ValueError as error:
                faults.append(Fault(item.outlines, f"line {number + 1} {error}"))
                continue
            if each is not None:
                found.append(each)
        return found, faults

    def _object(self, words: list[str], size: Size) -> Found | None:
        number = int(words[0]) if words[0].isascii() and words[0].isdigit() and len(words[0]) < 10 else None
        if number is None or number not in self.classes:
            raise ValueError(f"has the class {shown(words[0])}, not one of {len(self.classes)} numbers from 0 on")
        shares = _shares(words[1:])
        has_mask = len(shares) != 4
        if has_mask and (len(shares) < 6 or len(shares) % 2):
            raise ValueError(f"has {len(shares)} numbers, neither x and y of three points or more nor a box")
        if number not in self.labels:  # the class itself is a fault already
            return None
        points = (shares.reshape(-1, 2) if has_mask else _box_corners(shares)) * size[::-1]
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        code = to_rle([points.ravel().tolist()], size) if has_mask else rectangle((left, top, right, bottom), size)
        area = float(coco_mask.area(code))
        return Found(self.labels[number], code, (left, top, right, bottom), area, False, has_mask)


def _beside(images: Path) -> Path:
    """The folder of the text files: the last `images` of the path reads `labels`."""
    parts = list(images.absolute().parts)
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig").rstrip().splitlines()


def _shares(words: list[str]) -> np.ndarray:
    """Numbers from 0 to 1, and what rounding makes of them; those are cut off."""
    try:
        shares = np.array([float(word) for word in words])
    except ValueError:
        raise ValueError("has something that is no number") from None
    if not ((shares >= -0.01) & (shares <= 1.01)).all():  # nor is NaN
        raise ValueError("has numbers that are not shares of the picture's sides, from 0 to 1")
    return shares.clip(0, 1)


def _box_corners(box: np.ndarray) -> np.ndarray:
    """Center x, center y, width, height → two opposite corners, within the picture."""
    return np.stack([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2]).clip(0, 1)


ROW = np.dtype(
    [("label", "i4"), ("box", "f4", 4), ("area", "f8"), ("crowd", "?"), ("has_mask", "?"), ("length", "i4")]
)  # of an object, `length` of its code


class Checked(NamedTuple):
    """What the check learned of a sample: its objects in a few bytes each."""

    size: Size
    rows: np.ndarray  # (n,) of `ROW`
    codes: bytes  # one after the other


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
        return Sample(
            frames=[image],
            masks=Objects(
                codes=split_codes(checked.codes, checked.rows["length"], checked.size),
                boxes=checked.rows["box"].copy(),
                crowd=checked.rows["crowd"].copy(),
                areas=checked.rows["area"].copy(),
            ),
            class_ids=checked.rows["label"].tolist(),
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
            codes = [each.code for each in found if not each.is_crowd]
            if MAX_DEPTH < len(codes) <= MAX_OBJECTS and depth_of(codes, size) > MAX_DEPTH:
                faults.append(Fault(item.path, f"has more than {MAX_DEPTH} objects over one another"))
            return (None, faults) if faults else (_packed(found, size), [])
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


def _packed(found: list[Found], size: Size) -> Checked:
    codes = [each.code["counts"] for each in found]
    rows = [
        (each.label, each.box, each.area, each.is_crowd, each.has_mask, len(code))
        for each, code in zip(found, codes, strict=True)
    ]
    return Checked(size, np.array(rows, ROW), b"".join(codes))


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
    file = coco_json(path)
    return CocoObjects(name, file, weight, images) if file else YoloFolder(name, path, weight)


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
        rows = whole.checked(position).rows
        crowd = rows["crowd"]
        for row, chosen in enumerate((~crowd, crowd, ~crowd & ~rows["has_mask"])):
            counts[row] += np.bincount(rows["label"][chosen], minlength=counts.shape[1])
    table = []
    sources = whole.sources.values() if isinstance(whole, InstanceReader) else []
    for label, name in enumerate(reader.class_names):
        ids = dict.fromkeys(str(number) for s in sources for number, to in s.labels.items() if to == label)
        table.append(ObjectRow(", ".join(ids) or "-", label, name, *counts[:, label].tolist()))
    return table


def instance_table(reader: Reader) -> str:
    """`object_table` as aligned text."""
    rows = object_table(reader)
    width = max([len("class"), *(len(row.name) for row in rows)])
    lines = [f"  {'in files':>10}  {'label':>5}  {'class':<{width}}  objects  crowds"]
    lines += [f"  {r.file_ids:>10}  {r.label:>5}  {r.name:<{width}}  {r.objects:>7}  {r.crowds:>6}" for r in rows]
    boxes = sum(row.without_mask for row in rows)
    if boxes:
        lines.append(f"  {boxes} of {sum(row.objects for row in rows)} objects are boxes alone, without a mask")
    return "\n".join(lines)

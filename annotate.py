"""What SAM 2 found as training data of the other families.

    with Annotator(Path("out/instance"), "instance", ["dog", "cat"]) as annotator:
        with annotator.of(clip, {1: 1, 2: 1, 3: 2}) as annotate:
            annotate(0, picture, labels)

Pictures are copied as they are, frames of videos become .png:
  * binary: `im/` and `gt/`, all objects white;
  * semantic: `images/` and `masks/` of class ids, and `classes.txt`: background, then the classes in order;
  * instance: `images/` and `annotations.json`, a COCO file.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from pycocotools import mask as coco_mask

from checkpoint import TEMPORARY
from clip_files import Clip
from errors import UserError
from instances import as_json, encode
from prompting import MAX_OBJECT
from writers import JsonList, write_image, write_palette, writing

AnnotatedTask = Literal["binary", "semantic", "instance"]
Annotate = Callable[[int, np.ndarray, np.ndarray], None]  # (number of the frame, picture, labels (H, W) of objects)
FOLDERS = {"binary": ("im", "gt"), "semantic": ("images", "masks"), "instance": ("images", "")}
BACKGROUND = "background"


class Annotator:
    """A data set in a folder that must be new: `with` it, whole at the end of the block, and nothing of it before.

    Args:
        class_names: of the categories that objects have, from 1 on.
        every: of the frames of a clip; neighbours are much alike.

    Raises:
        UserError: there is such a folder already, classes that a data set cannot have, or nothing can be written.
    """

    def __init__(self, path: Path, task: AnnotatedTask, class_names: Sequence[str], every: int = 1):
        if path.exists():
            raise UserError(f"{path} exists already: annotations go into a new folder; name another --output")
        if task == "semantic" and (BACKGROUND in class_names or len(class_names) > MAX_OBJECT):
            raise UserError(f"semantic annotations have up to {MAX_OBJECT} classes, none of them called {BACKGROUND}: "
                            "that is what no object covers")  # fmt: skip
        self.path, self.task, self.class_names, self.every = path, task, class_names, every
        self._folder = path.with_name(path.name + TEMPORARY)
        self._images, self._masks = FOLDERS[task]
        self._counts = {"images": 0, "annotations": 0}

    def __enter__(self) -> Annotator:
        with writing(self.path):
            shutil.rmtree(self._folder, ignore_errors=True)
            (self._folder / self._images).mkdir(parents=True)
        self._files = ExitStack()
        self._lists = {name: self._files.enter_context(JsonList(self._part(name))) for name in self._counts}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            self._files.__exit__(kind, error, trace)
            if kind is None:
                with writing(self.path):
                    self._finish()
                    self._folder.rename(self.path)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def of(self, clip: Clip, categories: Mapping[int, int]) -> Iterator[Annotate]:
        """A function that takes frames of a clip whose objects have these categories; an exception in the block leaves
        nothing of them."""

        def annotate(number: int, picture: np.ndarray, labels: np.ndarray) -> None:
            if number % self.every:
                return
            stem = clip.name if clip.is_still else f"{clip.name}/{clip.frame_name(number)}"
            file = self._write_picture(clip.frame_path(number), stem, picture)
            if self.task == "instance":
                self._note(file, labels, categories)
            else:
                self._write_mask(stem, labels, categories)

        with ExitStack() as rows:
            for records in self._lists.values():
                rows.enter_context(records.whole())
            try:
                yield annotate
            except BaseException:
                self._remove(clip)
                raise

    def _remove(self, clip: Clip) -> None:
        for part in filter(None, FOLDERS[self.task]):
            pattern = f"{glob.escape(clip.name)}.*" if clip.is_still else f"{glob.escape(clip.name)}/*.*"
            for file in filter(Path.is_file, (self._folder / part).glob(pattern)):
                file.unlink()

    def _write_picture(self, source: str, stem: str, picture: np.ndarray) -> Path:
        """A copy of the file that it is, or else a .png."""
        file = self._folder / self._images / f"{stem}{Path(source).suffix or '.png'}"
        if source:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, file)
        else:
            write_image(file, picture)
        return file

    def _write_mask(self, stem: str, labels: np.ndarray, categories: Mapping[int, int]) -> None:
        file = self._folder / self._masks / f"{stem}.png"
        if self.task == "binary":
            write_image(file, np.where(labels > 0, 255, 0).astype(np.uint8))
        else:
            classes = np.zeros(256, np.uint8)
            classes[list(categories)] = list(categories.values())
            write_palette(file, classes[labels])

    def _note(self, file: Path, labels: np.ndarray, categories: Mapping[int, int]) -> None:
        """A picture and its objects as rows of a COCO file."""
        self._counts["images"] += 1
        image = self._counts["images"]
        height, width = labels.shape
        name = file.relative_to(self._folder).as_posix()
        self._lists["images"].extend([{"id": image, "file_name": name, "height": height, "width": width}])
        for number in np.unique(labels[labels > 0]).tolist():
            self._counts["annotations"] += 1
            code = encode(labels == number)
            record = {
                "id": self._counts["annotations"],
                "image_id": image,
                "category_id": categories[number],
                "segmentation": as_json(code),
                "bbox": coco_mask.toBbox(code).tolist(),
                "area": int(coco_mask.area(code)),
                "iscrowd": 0,
            }
            self._lists["annotations"].extend([record])

    def _part(self, name: str) -> Path:
        return self._folder / f"{name}.list"

    def _finish(self) -> None:
        """Join the lists to a COCO file, or write the names of the classes."""
        if self.task == "semantic":
            (self._folder / "classes.txt").write_text("\n".join([BACKGROUND, *self.class_names, ""]), encoding="utf-8")
        if self.task == "instance":
            categories = [{"id": number, "name": name} for number, name in enumerate(self.class_names, 1)]
            with open(self._folder / "annotations.json", "w", encoding="utf-8") as joined:
                joined.write('{"categories": ' + json.dumps(categories))
                for name in self._lists:
                    joined.write(f',\n"{name}": ')
                    with open(self._part(name), encoding="utf-8") as part:
                        shutil.copyfileobj(part, joined)
                joined.write("}\n")
        for name in self._lists:
            self._part(name).unlink()

"""A class for each picture: a folder for each class, with its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from readers.base import Fault, Reader
from readers.folders import list_stems, parse_spec, walk_images
from readers.images import read_image
from samples import Sample


class ClassFile(NamedTuple):
    path: str
    stem: str  # within the folder of its class
    class_name: str
    dataset: str


class ClassFolders(Reader):
    """The images of data sets joined with `+`, each `name[:weight]`: `<root>/<name>/<class>/…`.

    Classes are called as their folders are, in alphabetical order over all sets, or `class_names`: those of the
    training data. Classes of several sets meet by their names. Faults (a set without classes, a class without images or
    unknown to the training data, images outside of a class, two files with one stem) are collected in `faults`.

    Raises:
        UserError: `spec` itself makes no sense.
    """

    def __init__(
        self, spec: str, *, root: str | os.PathLike[str] | None = None, class_names: Sequence[str] | None = None
    ):
        self.faults: list[Fault] = []
        self._weights: dict[str, float] = {}
        self._files: list[ClassFile] = []
        for name, folder, weight in parse_spec(spec, root):
            self._weights[name] = weight
            self._files += self._list(name, folder)
        found = sorted({file.class_name for file in self._files})
        self.class_names = found if class_names is None else list(class_names)
        unknown = [file for file in self._files if file.class_name not in self.class_names]
        for file in {(file.dataset, file.class_name): file for file in unknown}.values():
            self.faults.append(Fault(file.path, f"is of the class {file.class_name}, which the training data lack"))
        self._files = [file for file in self._files if file.class_name in self.class_names]

    def _list(self, dataset: str, folder: Path) -> list[ClassFile]:
        classes = sorted(each.name for each in folder.glob("[!.]*") if each.is_dir())
        if not classes:
            self.faults.append(Fault(str(folder), "is no folder with a folder of images for each class"))
        strays = [path for path in walk_images(folder, []) if path.parent == folder]
        self.faults += [Fault(str(path), "lies outside the folders of the classes") for path in strays]
        files = []
        for name in classes:
            stems = list_stems(folder, name, self.faults)
            if not stems:
                self.faults.append(Fault(str(folder / name), "holds no images"))
            files += [ClassFile(path, stem, name, dataset) for stem, path in sorted(stems.items())]
        return files

    @property
    def file_ids(self) -> Sequence[int | str]:
        return self.class_names

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Sample:
        file = self._files[index]
        return Sample(
            frames=[read_image(file.path)],
            class_ids=[self.class_names.index(file.class_name)],
            sample_id=self.sample_id(index),
            path=file.path,
            dataset=file.dataset,
        )

    def sample_id(self, index: int) -> str:
        file = self._files[index]
        return f"{file.dataset}/{file.class_name}/{file.stem}"

    def dataset_of(self, index: int) -> str:
        return self._files[index].dataset

    def files(self, index: int) -> list[str]:
        return [self._files[index].path]

    def weight_of(self, dataset: str) -> float:
        return self._weights[dataset]


def share_table(reader: Reader) -> str:
    """How many samples of each class there are in a `ClassFolders` or a part of one, as text."""
    places = [reader.origin(index) for index in range(len(reader))]
    found = [whole._files[index].class_name for whole, index in places if isinstance(whole, ClassFolders)]
    return "\n".join(f"  {found.count(name):>7} of the class {name}" for name in reader.class_names)

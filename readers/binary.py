"""Soft masks in folders."""

from __future__ import annotations

import os
from collections.abc import Sequence

from readers.base import DataError, Fault, Reader
from readers.folders import Pair, list_pairs, parse_spec, size_fault
from readers.images import read_alpha, read_image
from samples import Sample


class BinaryFolders(Reader):
    """`<dataset>/im` and `<dataset>/gt` with the same stems, several datasets joined with `+`, each `name[:weight]`.

    Sub-folders of `im` and `gt` are part of the stem. Hidden files and files that are no images are passed over.
    A name means `<root>/<name>` where that exists, else a path as given. With stems like DIS5K's
    `a#b#c#class#d` each sample carries an auxiliary class, an index into `class_names` (sorted, found here unless
    given: validation takes those of training); a class that `class_names` lacks counts as unknown.

    Faults (missing folders, unpaired files, two files with one stem, links out of the dataset, nothing there) are
    collected in `faults`; the samples are what remains.

    Raises:
        UserError: `spec` itself makes no sense.
    """

    def __init__(
        self, spec: str, *, root: str | os.PathLike[str] | None = None, class_names: Sequence[str] | None = None
    ):
        self.faults: list[Fault] = []
        self._weights: dict[str, float] = {}
        self._pairs: list[Pair] = []
        for name, folder, weight in parse_spec(spec, root):
            self._weights[name] = weight
            self._pairs += list_pairs(folder, name, self.faults)
        found = sorted({name for pair in self._pairs if (name := _class_in(pair.stem))})
        self.class_names: list[str] = found if class_names is None else list(class_names)
        self._class_ids = {name: i for i, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> Sample:
        pair = self._pairs[index]
        image, alpha = read_image(pair.image), read_alpha(pair.mask)
        if image.shape[:2] != alpha.shape:
            raise DataError(size_fault(pair, image, alpha))
        class_id = self._class_ids.get(_class_in(pair.stem), -1)
        return Sample(
            frames=[image],
            masks=alpha,
            class_ids=[class_id] if class_id >= 0 else [],
            sample_id=self.sample_id(index),
            path=pair.image,
            dataset=pair.dataset,
        )

    def find_faults(self, index: int) -> list[Fault]:
        pair, decoded, faults = self._pairs[index], [], []
        for decode, path in ((read_image, pair.image), (read_alpha, pair.mask)):
            try:
                decoded.append(decode(path))
            except DataError as error:
                faults.append(error.fault)
        if not faults and decoded[0].shape[:2] != decoded[1].shape:
            faults.append(size_fault(pair, *decoded))
        return faults

    def sample_id(self, index: int) -> str:
        return f"{self._pairs[index].dataset}/{self._pairs[index].stem}"

    def dataset_of(self, index: int) -> str:
        return self._pairs[index].dataset

    def files(self, index: int) -> list[str]:
        return [self._pairs[index].image, self._pairs[index].mask]

    def weight_of(self, dataset: str) -> float:
        return self._weights[dataset]


def _class_in(stem: str) -> str:
    """The class in a DIS5K file name `a#b#c#class#d`, or nothing."""
    fields = stem.rsplit("/", 1)[-1].split("#")
    return fields[3] if len(fields) >= 5 else ""

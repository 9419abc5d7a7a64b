"""Data: readers that list and decode what is on disk, the one `Dataset`, the resumable samplers, and batches.

A reader lists its samples without decoding them, collects every fault it sees, and decodes one sample at a time:

    reader = BinaryFolders(root="data", spec="DIS5K+HRSOD:0.5")
    fail_on(check(reader))
    training = split(reader, part="train", fold="0/5", seed=0)
    dataset = Dataset(training, augment=augment, make_target=binary_target, seed=0)
    sampler = TrainSampler(training, batch_size=4, seed=0, size=(1024, 1024))
    loader = build_loader(dataset, sampler, workers=4, collate_targets=collate_binary)

What a sample looks like is a pure function of (seed, epoch, index, occurrence, size), all of which the sampler
hands out; so neither workers nor ranks nor resuming change it. Sizes are always (height, width).
"""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import signal
import tempfile
import threading
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from errors import UserError
from transforms import resize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 400_000_000
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # temporary folders are shared with other users

Size = tuple[int, int]
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# What is passed around


@dataclass
class Sample:
    """What every reader yields: a picture as it is on disk, with its annotation in the compact form it came in."""

    frames: list[np.ndarray]  # each (H, W, 3) uint8 RGB; one for a still image
    masks: Any = None  # binary: (H, W) uint8 alpha; None at inference
    class_ids: list[int] = field(default_factory=list)  # binary: the auxiliary class, or none
    sample_id: str = ""
    path: str = ""
    dataset: str = ""


@dataclass
class SampleInfo:
    """Where a sample of a batch came from; `size` is (H, W) of its original image."""

    sample_id: str
    path: str
    dataset: str
    size: Size


class Targets(Protocol):
    """What a task must offer for its targets to ride in a `Batch`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...

    def pin_memory(self) -> Any: ...


@dataclass
class BinaryTarget:
    """Targets of `binary`: soft masks in [0, 1]."""

    masks: Tensor  # (B, 1, H, W) float32 at the model's size
    class_ids: Tensor  # (B,) int64, -1 where unknown
    originals: list[Tensor] = field(default_factory=list)  # evaluation: per sample (h, w) uint8 alpha at its own size

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BinaryTarget:
        """Move what losses read; the originals, which may be huge, stay on the host."""
        return replace(
            self,
            masks=self.masks.to(device, non_blocking=non_blocking),
            class_ids=self.class_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> BinaryTarget:
        return replace(self, masks=self.masks.pin_memory(), class_ids=self.class_ids.pin_memory())


@dataclass
class Batch:
    """What models, criteria and metrics are given."""

    images: Tensor  # (B, 3, H, W) float32, ImageNet-normalised
    targets: Any  # `Targets` of the task, or None at inference
    samples: list[SampleInfo]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        targets = None if self.targets is None else self.targets.to(device, non_blocking=non_blocking)
        return replace(self, images=self.images.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> Batch:
        targets = None if self.targets is None else self.targets.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=targets)

    @classmethod
    def from_images(cls, images: Tensor) -> Batch:
        """A batch without targets around already normalised (B, 3, H, W) images."""
        size = (images.shape[-2], images.shape[-1])
        samples = [SampleInfo(sample_id=str(i), path="", dataset="", size=size) for i in range(images.shape[0])]
        return cls(images=images, targets=None, samples=samples)


@dataclass(frozen=True)
class SampleKey:
    """All that decides what a sample looks like, beside the seed: samplers yield it, `Dataset` takes it."""

    epoch: int
    index: int
    occurrence: int  # how often the index has come before in this epoch
    size: Size


@dataclass(frozen=True)
class Fault:
    """Something wrong with the data: a path and what is wrong there."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class DataError(UserError):
    """A file that cannot be used. `fault` says which and why."""

    def __init__(self, fault: Fault | str):
        if isinstance(fault, str):
            # A DataLoader worker passes an exception on as its printed traceback, whose last line is the sentence.
            path, _, problem = fault.rsplit("DataError: ", 1)[-1].strip().partition(": ")
            fault = Fault(path, problem)
        super().__init__(str(fault))
        self.fault = fault


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: strict, and the same way up for image and mask


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a picture into (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Grey, palette, 1-bit, CMYK and animated (first frame) pictures become RGB. Alpha is dropped, not composited: the
    colours under it are the picture. 16-bit grey is scaled by 1/257; of 16-bit colour PIL keeps the high byte, at most
    one level from that.

    Raises:
        DataError: unreadable, truncated, or more than 400 megapixels by its header (nothing is decoded then).
    """
    image = _decode(path)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return np.repeat(_to_bytes(np.asarray(image), path)[:, :, None], 3, axis=2)
    image.info.pop("transparency", None)  # else PIL would bring a transparent colour into the conversion
    return np.array(image.convert("RGB"))


def read_alpha(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode a mask into (H, W) uint8 alpha, 0 background to 255 foreground, upright by its EXIF orientation.

    Soft values are kept. By kind of file:
      * 1-bit, or values of 0 and 1 alone: 1 means 255;
      * 16-bit: scaled by 1/257;
      * palette: a palette of greys gives those greys; any other is a label map, where every index but 0 is foreground;
      * with an alpha channel: that channel, unless it is opaque everywhere;
      * RGB: its luminance, as long as the picture is grey.

    Raises:
        DataError: as `read_image`, or a coloured picture, which is no mask.
    """
    image = _decode(path)
    if image.mode == "P":
        palette = np.array(image.getpalette() or [], dtype=np.uint8).reshape(-1, 3)
        if (palette == palette[:, :1]).all():
            values = np.array(image.convert("L"))
        else:
            values = np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8)
    elif image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = _to_bytes(np.asarray(image), path)
    elif image.mode in ("1", "L"):
        values = np.array(image.convert("L"))
    else:
        values = _alpha_of_colours(image, path)
    return values * np.uint8(255) if values.max() == 1 else values


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    """Open and fully decode the first frame; PIL raises on truncation, where OpenCV fills with grey."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # PIL warns from here on, which we refuse, and raises from twice as much
    try:
        # Only formats decoded in this process: PIL hands some others to external programs.
        image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError as error:
        raise DataError(Fault(os.fspath(path), "does not exist")) from error
    except Image.DecompressionBombError as error:
        problem = f"its header announces more than {MAX_PIXELS // 10**6} megapixels; scale it down or leave it out"
        raise DataError(Fault(os.fspath(path), problem)) from error
    except Exception as error:  # decoders raise nearly every kind of exception on broken files
        problem = f"cannot be read as an image ({error or type(error).__name__})"
        raise DataError(Fault(os.fspath(path), problem)) from error
    return image


def _to_bytes(values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Wide grey values to uint8: integers by 1/257 (0 and 1 alone stay), floats in [0, 1] by 255."""
    low, high = values.min(), values.max()
    top = 1 if np.issubdtype(values.dtype, np.floating) else 65535
    if not (low >= 0 and high <= top):
        raise DataError(Fault(os.fspath(path), f"has values from {low} to {high}, not from 0 to {top}"))
    if top == 65535 and high == 1:
        return values.astype(np.uint8)
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def _alpha_of_colours(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """The mask in a picture with alpha or colour channels."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        alpha = np.array(image.getchannel("A"))
        if alpha.min() < 255:
            return alpha
    colours = np.asarray(image.convert("RGB"))
    # JPEG may tint a grey picture by a few levels; a coloured one would give arbitrary alpha.
    if int((colours.max(axis=2) - colours.min(axis=2)).max()) > 32:
        raise DataError(Fault(os.fspath(path), "is a coloured picture, not a mask; save it as grey or palette PNG"))
    return np.array(image.convert("RGB").convert("L"))


# ---------------------------------------------------------------------------------------------------------------------
# Readers


@dataclass(frozen=True)
class DatasetSummary:
    count: int
    weight: float  # how often an epoch takes each of its samples


class Reader(ABC):
    """Samples in a fixed order that no file system decides, and the faults seen while listing them."""

    faults: Sequence[Fault] = ()
    class_names: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Decode one sample; `DataError` names the file that cannot be used."""

    @abstractmethod
    def sample_id(self, index: int) -> str: ...

    @abstractmethod
    def dataset_of(self, index: int) -> str: ...

    @abstractmethod
    def files(self, index: int) -> list[str]:
        """The files that the sample is read from."""

    def weight_of(self, dataset: str) -> float:
        """How often the sampler takes each sample of this dataset in an epoch."""
        return 1.0

    def find_faults(self, index: int) -> list[Fault]:
        """Everything wrong with one sample, by decoding all of it."""
        try:
            self.read(index)
        except DataError as error:
            return [error.fault]
        return []

    @property
    def datasets(self) -> dict[str, DatasetSummary]:
        """{name: (count, weight)} in order of appearance."""
        return {name: DatasetSummary(len(found), self.weight_of(name)) for name, found in self.by_dataset().items()}

    def by_dataset(self) -> dict[str, list[int]]:
        """{name: indices} in order of appearance."""
        found: dict[str, list[int]] = defaultdict(list)
        for index in range(len(self)):
            found[self.dataset_of(index)].append(index)
        return found


@dataclass(frozen=True)
class _Pair:
    image: str
    mask: str
    stem: str
    dataset: str


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
        self._pairs: list[_Pair] = []
        for name, folder, weight in _parse_spec(spec, root):
            self._weights[name] = weight
            self._pairs += _list_pairs(folder, name, self.faults)
        found = sorted({name for pair in self._pairs if (name := _class_in(pair.stem))})
        self.class_names: list[str] = found if class_names is None else list(class_names)
        self._class_ids = {name: i for i, name in enumerate(self.class_names)}

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, index: int) -> Sample:
        pair = self._pairs[index]
        image, alpha = read_image(pair.image), read_alpha(pair.mask)
        if image.shape[:2] != alpha.shape:
            raise DataError(_size_fault(pair, image, alpha))
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
            faults.append(_size_fault(pair, *decoded))
        return faults

    def sample_id(self, index: int) -> str:
        return f"{self._pairs[index].dataset}/{self._pairs[index].stem}"

    def dataset_of(self, index: int) -> str:
        return self._pairs[index].dataset

    def files(self, index: int) -> list[str]:
        return [self._pairs[index].image, self._pairs[index].mask]

    def weight_of(self, dataset: str) -> float:
        return self._weights[dataset]


def _parse_spec(spec: str, root: str | os.PathLike[str] | None) -> list[tuple[str, Path, float]]:
    """`A+B:0.5` → [(name, folder, weight)]; names are the folders' own unless two of them are called the same."""

    def locate(text: str) -> Path:
        inside = Path(root or "") / text
        return Path(text) if Path(text).exists() and not inside.exists() else inside

    parts = [spec] if locate(spec).is_dir() else [part.strip() for part in spec.split("+")]  # a path may hold a +
    found = []
    for part in parts:
        text, colon, number = part.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:  # the colon belongs to the path
            colon, weight = "", 1.0
        text = text if colon else part
        if not text:
            raise UserError(f"data: an empty dataset name in {spec!r}; write name[:weight], joined with +")
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data: the weight in {part!r} must be a number above 0")
        found.append((text, locate(text), weight))
    repeated = [text for text, count in Counter(text for text, _, _ in found).items() if count > 1]
    if repeated:
        raise UserError(f"data: {repeated[0]!r} is named twice in {spec!r}; give it a weight instead ({repeated[0]}:2)")
    last_names = Counter(folder.name for _, folder, _ in found)
    return [(f.name if f.name and last_names[f.name] == 1 else text, f, weight) for text, f, weight in found]


def _list_pairs(folder: Path, dataset: str, faults: list[Fault]) -> list[_Pair]:
    """The pairs of one dataset, sorted by stem; whatever is wrong goes to `faults`."""
    for needed in (folder, folder / "im", folder / "gt"):
        if not needed.is_dir():
            faults.append(Fault(str(needed), "is no folder; a dataset holds im/ with images and gt/ with masks"))
            return []
    images, masks = (_list_stems(folder, sub, faults) for sub in ("im", "gt"))
    for stem in sorted(images.keys() - masks.keys()):
        faults.append(Fault(images[stem], "has no mask of the same name in gt/"))
    for stem in sorted(masks.keys() - images.keys()):
        faults.append(Fault(masks[stem], "has no image of the same name in im/"))
    if not images and not masks:
        faults.append(Fault(str(folder), f"holds no images ({' '.join(s[1:] for s in IMAGE_SUFFIXES)})"))
    return [_Pair(images[stem], masks[stem], stem, dataset) for stem in sorted(images.keys() & masks.keys())]


def _list_stems(folder: Path, sub: str, faults: list[Fault]) -> dict[str, str]:
    """{stem relative to `folder/sub`: path} of all images there."""
    inside = folder.resolve()
    found: dict[str, list[str]] = defaultdict(list)
    for path in _walk_images(folder / sub, faults):
        if not path.resolve().is_relative_to(inside):
            faults.append(Fault(str(path), "links out of the dataset; copy it there, or link the whole dataset"))
            continue
        found[path.relative_to(folder / sub).with_suffix("").as_posix()].append(str(path))
    for paths in found.values():
        if len(paths) > 1:
            faults.append(Fault(paths[0], f"shares its stem with {', '.join(Path(p).name for p in paths[1:])}"))
    return {stem: paths[0] for stem, paths in found.items()}


def _walk_images(folder: Path, faults: list[Fault]) -> list[Path]:
    """All image files below `folder`, sorted; hidden ones left out, linked folders reported instead of followed."""

    def report(error: OSError) -> None:
        faults.append(Fault(str(error.filename), f"cannot be listed ({error.strerror})"))

    images = []
    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(parent, name).is_symlink():
                faults.append(Fault(str(Path(parent, name)), "is a linked folder, which is not followed"))
        images += [
            Path(parent, name) for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(images)


def _class_in(stem: str) -> str:
    """The class in a DIS5K file name `a#b#c#class#d`, or nothing."""
    fields = stem.rsplit("/", 1)[-1].split("#")
    return fields[3] if len(fields) >= 5 else ""


def _size_fault(pair: _Pair, image: np.ndarray, alpha: np.ndarray) -> Fault:
    """Sizes in the order that people write them, width first."""
    (h, w), (mask_h, mask_w) = image.shape[:2], alpha.shape
    return Fault(pair.mask, f"is {mask_w}x{mask_h}, its image {pair.image} is {w}x{h} (upright)")


class ImageList(Reader):
    """Images alone, for inference: files, folders (with all below them) and glob patterns.

    `sample_id` is the path without suffix relative to the folder, to the pattern's fixed part, or to the file's
    folder, so that outputs can keep names and structure.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.faults: list[Fault] = []
        self._entries: dict[str, str] = {}  # sample id -> path
        for path in paths:
            images, base = self._expand(path)
            if not images:
                self.faults.append(
                    Fault(os.fspath(path), "is no image, no folder with images and no pattern that matches any")
                )
            for image in images:
                sample_id = image.relative_to(base).with_suffix("").as_posix()
                known = self._entries.setdefault(sample_id, str(image))
                if not os.path.samefile(known, image):
                    self.faults.append(Fault(str(image), f"would write the same outputs as {known}"))
        self._ids = list(self._entries)

    def _expand(self, path: str | os.PathLike[str]) -> tuple[list[Path], Path]:
        """The images that one argument means, and the folder that their ids are relative to."""
        if os.path.isdir(path):
            return _walk_images(Path(path), self.faults), Path(path)
        if os.path.exists(path):
            return [Path(path)], Path(path).parent
        matches = sorted(glob.glob(os.fspath(path), recursive=True))
        return [Path(m) for m in matches if m.lower().endswith(IMAGE_SUFFIXES)], _fixed_part(path)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> Sample:
        path = self._entries[self._ids[index]]
        return Sample(frames=[read_image(path)], sample_id=self._ids[index], path=path)

    def sample_id(self, index: int) -> str:
        return self._ids[index]

    def dataset_of(self, index: int) -> str:
        return ""

    def files(self, index: int) -> list[str]:
        return [self._entries[self._ids[index]]]


def _fixed_part(pattern: str | os.PathLike[str]) -> Path:
    """The leading folders of a glob pattern, up to the first with a wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1]))


class Subset(Reader):
    """Some samples of another reader, in the order given."""

    def __init__(self, reader: Reader, indices: Sequence[int], *, faults: Sequence[Fault] | None = None):
        self.reader, self.indices = reader, list(indices)
        self.faults = reader.faults if faults is None else faults
        self.class_names = reader.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Sample:
        return self.reader.read(self.indices[index])

    def find_faults(self, index: int) -> list[Fault]:
        return self.reader.find_faults(self.indices[index])

    def sample_id(self, index: int) -> str:
        return self.reader.sample_id(self.indices[index])

    def dataset_of(self, index: int) -> str:
        return self.reader.dataset_of(self.indices[index])

    def files(self, index: int) -> list[str]:
        return self.reader.files(self.indices[index])

    def weight_of(self, dataset: str) -> float:
        return self.reader.weight_of(dataset)


# ---------------------------------------------------------------------------------------------------------------------
# The data check


def check(reader: Reader, *, workers: int = 4, progress: bool = True) -> list[Fault]:
    """Decode everything once and return every fault, those seen while listing first."""
    per_sample = _in_threads(reader.find_faults, len(reader), workers)
    bar = tqdm(per_sample, desc="check data", total=len(reader), disable=not progress, leave=False)
    return [*reader.faults, *(fault for faults in bar for fault in faults)]


def _in_threads(work: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """`work(0)` to `work(count - 1)` in order, never far ahead: neither results nor, on an interrupt, work pile up."""
    workers = max(1, workers)
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, count, 8 * workers):
            yield from pool.map(work, range(first, min(first + 8 * workers, count)))


def fail_on(faults: Sequence[Fault]) -> None:
    """Raise one `UserError` that lists the faults (the first 50 of them), if there are any."""
    if not faults:
        return
    lines = [f"  {fault}" for fault in faults[:50]]
    if len(faults) > 50:
        lines.append(f"  … and {len(faults) - 50} more")
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise UserError("\n".join([f"{count} in the data; mend them or set data.on_error: skip", *lines]))


def drop(reader: Reader, faults: Sequence[Fault]) -> tuple[Reader, int]:
    """The reader without its faulty samples, and how many files the faults concern.

    Raises:
        UserError: nothing is left.
    """
    faulty = {fault.path for fault in faults}
    kept = [index for index in range(len(reader)) if faulty.isdisjoint(reader.files(index))]
    if not kept:
        fail_on(faults or [Fault("data", "holds no samples")])
    return Subset(reader, kept, faults=()), len(faulty)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def split(
    reader: Reader, *, part: str, fold: str | None = None, fraction: float | None = None, seed: int = 0
) -> Reader:
    """The "train" or "val" part of a reader: fold `k/n` of a cross-validation, or a fraction held out.

    Each dataset is split on its own, in the order of a hash of (seed, sample id): other datasets do not matter, and a
    file more or less moves few samples to the other part of a fraction split.

    Raises:
        UserError: a fold that is no `k/n` with 0 <= k < n and n >= 2, a fraction outside (0, 1), or an empty part.
    """
    if (fold is None) == (fraction is None):
        raise UserError("data: give either data.fold or a fraction for the validation split")
    held_out: set[int] = set()
    for indices in reader.by_dataset().values():
        ordered = sorted(indices, key=lambda i: hashlib.sha256(f"{seed}:{reader.sample_id(i)}".encode()).digest())
        held_out.update(ordered[_fold_slice(fold) if fold is not None else _fraction_slice(fraction, len(ordered))])
    kept = [index for index in range(len(reader)) if (index in held_out) == (part == "val")]
    if not kept:
        raise UserError(f"data: the split leaves no samples for the {part} part of {len(reader)}")
    return Subset(reader, kept)


def _fold_slice(fold: str) -> slice:
    number, _, count = fold.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) and int(count) >= 2):
        raise UserError(f"data.fold: {fold!r} must be k/n with k from 0 to n-1, for example 0/5")
    return slice(int(number), None, int(count))


def _fraction_slice(fraction: float | None, count: int) -> slice:
    if not (fraction and 0 < fraction < 1):
        raise UserError(f"data: a validation fraction of {fraction} must lie between 0 and 1")
    return slice(min(max(1, round(count * fraction)), count - 1))


def limit(reader: Reader, max_samples: int | None) -> Reader:
    """At most `max_samples`, evenly spaced through the reader, so each dataset keeps its share."""
    if max_samples is None or max_samples >= len(reader):
        return reader
    if max_samples < 1:
        raise UserError(f"data.max_samples: {max_samples} must be at least 1")
    return Subset(reader, [i * len(reader) // max_samples for i in range(max_samples)])


# ---------------------------------------------------------------------------------------------------------------------
# load_all: decode once, share the bytes


class Cached(Subset):
    """Another reader, decoded once into one memory-mapped file that workers and ranks share through the page cache.

    One process of each machine writes (`write=True`), all map the same `path`, and the writer then unlinks it, so
    nothing is left behind however the run ends. `barrier` waits for all of them, between writing and mapping and
    between mapping and unlinking. Alone, the defaults do. Forked workers inherit the mapping.

    With `size` samples are stored as `transforms.resize` makes them, what augmentation begins with anyway: the same
    bytes reach it, but an original size is no longer known, so evaluation and a dynamic size cache without.

    Raises:
        UserError: no room for the file, by its path.
        DataError: a sample cannot be read.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        path: str | os.PathLike[str] | None = None,
        size: Size | None = None,
        write: bool = True,
        barrier: Callable[[], None] = lambda: None,
        workers: int = 4,
        progress: bool = True,
    ):
        super().__init__(reader, range(len(reader)))
        target = os.fspath(path or Path(tempfile.gettempdir(), f"cache-{os.getpid()}-{id(self)}"))
        if write:
            bar = tqdm(total=len(reader), desc="load all", disable=not progress, leave=False)
            _write_cache(reader, target, size, workers, bar)
        barrier()
        self._bytes, self._index = _map_cache(target)
        barrier()
        if write:
            os.unlink(target)

    def read(self, index: int) -> Sample:
        """The sample on arrays that are copies: augmentation may write into them."""
        entry = self._index[index]
        ends = [(start, start + math.prod(shape), shape) for start, shape in entry["arrays"]]
        arrays = [self._bytes[start:end].reshape(shape).copy() for start, end, shape in ends]
        masks = arrays.pop() if entry["has_masks"] else None
        return Sample(frames=arrays, masks=masks, **entry["about"])


def _write_cache(reader: Reader, path: str, size: Size | None, workers: int, bar: tqdm) -> None:
    """All arrays (uint8) one after the other, then a JSON index of them, then 8 bytes with the index's length."""

    def load(index: int) -> Sample:
        sample = reader.read(index)
        return sample if size is None else resize(sample, size)

    index: list[dict[str, Any]] = []
    written = 0
    try:
        with bar, open(path, "wb", opener=lambda name, flags: os.open(name, flags | NO_LINKS, 0o600)) as file:
            for sample in _in_threads(load, len(reader), workers):
                places = []
                for array in [*sample.frames, *([] if sample.masks is None else [sample.masks])]:
                    places.append((written, array.shape))
                    written += file.write(np.ascontiguousarray(array).data.cast("B"))
                about = {key: getattr(sample, key) for key in ("class_ids", "sample_id", "path", "dataset")}
                index.append({"arrays": places, "has_masks": sample.masks is not None, "about": about})
                bar.update()
            encoded = json.dumps(index).encode()
            file.write(encoded + len(encoded).to_bytes(8, "little"))
    except BaseException as error:
        Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"data.load_all: no room for the cache {path} after {written / 2**20:.0f} MiB; "
                "point TMPDIR at a larger disk or set data.load_all: false"
            ) from error
        raise


def _map_cache(path: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(mapped[-8:].tobytes(), "little")
    return mapped, json.loads(mapped[-8 - length : -8].tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# The Dataset


@dataclass
class Item:
    """One sample on its way into a batch, as small as it gets: worker processes send these."""

    image: np.ndarray  # (H, W, 3) uint8 at the model's size
    target: Any  # what the task's `make_target` returned, or None at inference
    info: SampleInfo


class Dataset(torch.utils.data.Dataset[Item]):
    """Samples of a reader at the size that the sampler's key asks for, augmented in training.

    `augment(sample, size, seed_sequence)` augments and resizes, as `transforms.Augment` does; None only resizes, and
    the targets then carry what evaluation needs of the original. `make_target(sample, original)` is the task's:
    `sample` is at model size, `original` is the sample as read in evaluation and None in training.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        make_target: Callable[[Sample, Sample | None], Any],
        augment: Callable[[Sample, Size, np.random.SeedSequence], Sample] | None = None,
        seed: int = 0,
    ):
        self.reader, self.make_target, self.augment, self.seed = reader, make_target, augment, seed

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: SampleKey) -> Item:
        original = self.reader.read(key.index)
        sample = self._prepare(original, key)
        height, width = original.frames[0].shape[:2]
        info = SampleInfo(original.sample_id, original.path, original.dataset, (height, width))
        target = None
        if sample.masks is not None:
            target = self.make_target(sample, original if self.augment is None else None)
        return Item(image=sample.frames[0], target=target, info=info)

    def prepared(self, key: SampleKey) -> Sample:
        """The sample that the model will see, for previews."""
        return self._prepare(self.reader.read(key.index), key)

    def _prepare(self, sample: Sample, key: SampleKey) -> Sample:
        if self.augment is None:
            return resize(sample, key.size)
        seeds = np.random.SeedSequence([self.seed, key.epoch, key.index, key.occurrence])
        return self.augment(sample, key.size, seeds)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


class TrainSampler(Sampler[list[SampleKey]]):
    """Micro-batches of one rank, all of them a pure function of (seed, epoch).

    An epoch is one shuffled list that all ranks share, in which each dataset has `weight * count` entries (the whole
    part of the weight repeats every sample, the rest is a subset drawn anew each epoch). Step `s`, micro-step `a` of
    `A`, rank `r` of `W` take the `B` entries from `((s*A + a)*W + r) * B`. Entries that do not fill an effective batch
    `B*A*W` at the end are left out of this epoch; a list shorter than one is repeated up to it.

    With `dynamic_size=((h_min, h_max), (w_min, w_max))` every `dynamic_size_batch` micro-steps get another size, each
    side drawn from the multiples of `stride` in its range, the same on all ranks; otherwise all have `size`.

    Raises:
        UserError: a range of `dynamic_size` without a multiple of `stride`, or an empty reader.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        batch_size: int,
        size: Size,
        grad_accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        dynamic_size: tuple[tuple[int, int], tuple[int, int]] | None = None,
        dynamic_size_batch: int = 1,
        stride: int = 32,
    ):
        if not len(reader):
            raise UserError("data: there are no samples to train on")
        self.batch_size, self.grad_accum_steps = batch_size, grad_accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.size, self.dynamic_size_batch, self.stride = size, dynamic_size_batch, stride
        self.multiples = dynamic_size and tuple(_multiples(side, stride) for side in dynamic_size)
        self._groups = [(np.array(indices), reader.weight_of(name)) for name, indices in reader.by_dataset().items()]
        self.epoch = self.start = 0
        effective = batch_size * grad_accum_steps * world_size
        self.samples_per_epoch = sum(_weighted_count(len(indices), weight) for indices, weight in self._groups)
        self.steps_per_epoch = max(1, self.samples_per_epoch // effective)
        self._taken = self.steps_per_epoch * effective

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch, from its first micro-step."""
        self.epoch, self.start = epoch, 0

    def set_start(self, micro_step: int) -> None:
        """Leave out the epoch's first micro-steps, as a resumed run does."""
        self.start = micro_step

    def __len__(self) -> int:
        """Micro-batches of a whole epoch on this rank."""
        return self.steps_per_epoch * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order, occurrences = self._order()
        for micro_step in range(self.start, len(self)):
            first = (micro_step * self.world_size + self.rank) * self.batch_size
            size = self._size_at(micro_step)
            yield [
                SampleKey(self.epoch, int(order[i]), int(occurrences[i]), size)
                for i in range(first, first + self.batch_size)
            ]

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's indices over all ranks, and how often each has come before."""
        seeds = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(0,))
        generator = np.random.Generator(np.random.PCG64(seeds))
        rounds: list[np.ndarray] = []
        while sum(map(len, rounds)) < self._taken:
            entries = [_weighted(indices, weight, generator) for indices, weight in self._groups]
            rounds.append(generator.permutation(np.concatenate(entries)))
        order = np.concatenate(rounds)[: self._taken]
        by_index = np.argsort(order, kind="stable")
        ranked = order[by_index]
        first_of_index = np.searchsorted(ranked, ranked)
        occurrences = np.empty_like(order)
        occurrences[by_index] = np.arange(len(order)) - first_of_index
        return order, occurrences

    def _size_at(self, micro_step: int) -> Size:
        if not self.multiples:
            return self.size
        seeds = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(1, micro_step // self.dynamic_size_batch))
        generator = np.random.Generator(np.random.PCG64(seeds))
        height, width = (self.stride * int(generator.integers(low, high + 1)) for low, high in self.multiples)
        return height, width


def _multiples(side: tuple[int, int], stride: int) -> tuple[int, int]:
    low, high = -(-min(side) // stride), max(side) // stride
    if low > high or high < 1:
        raise UserError(f"data.dynamic_size: no multiple of the model's stride {stride} in {side[0]}..{side[1]}")
    return max(low, 1), high


def _weighted_count(count: int, weight: float) -> int:
    return max(1, round(count * weight))


def _weighted(indices: np.ndarray, weight: float, generator: np.random.Generator) -> np.ndarray:
    """That many of the indices, none taken more than once oftener than another."""
    whole, rest = divmod(_weighted_count(len(indices), weight), len(indices))
    return np.concatenate([np.repeat(indices, whole), generator.choice(indices, size=rest, replace=False)])


class EvalSampler(Sampler[list[SampleKey]]):
    """Every sample once, in order. Whole batches are dealt to the ranks in turn, so what is in a batch with what does
    not depend on how many ranks there are; nothing is padded, so ranks may have different numbers of batches."""

    def __init__(self, length: int, *, batch_size: int, size: Size, rank: int = 0, world_size: int = 1):
        self.size = size
        starts = range(0, length, batch_size)
        self._batches = [range(start, min(start + batch_size, length)) for start in starts][rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in self._batches:
            yield [SampleKey(0, index, 0, self.size) for index in batch]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def normalize(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 `(x / 255 - mean) / std`, in the order of operations of torchvision's
    ToTensor and Normalize, so that the bits agree."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    planar = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planar.div_(255).sub_(mean).div_(std)


def collate(items: Sequence[Item], *, collate_targets: Callable[[list[Any]], Any]) -> Batch:
    """Stack items of one size into a batch; `collate_targets` is the task's, and is not asked at inference."""
    targets = [item.target for item in items]
    return Batch(
        images=normalize(np.stack([item.image for item in items])),
        targets=None if any(target is None for target in targets) else collate_targets(targets),
        samples=[item.info for item in items],
    )


def build_loader(
    dataset: Dataset,
    sampler: Sampler[list[SampleKey]],
    *,
    collate_targets: Callable[[list[Any]], Any],
    workers: int = 0,
    persistent: bool = False,
    pin: bool = False,
    prefetch: int = 2,
) -> DataLoader[Batch]:
    """A loader of `Batch` over a batch sampler. No setting of it changes a byte of any batch.

    Workers are forked where the system can: they inherit the cache's mapping, and decoding needs no clean start.
    """
    forks = workers > 0 and "fork" in get_all_start_methods()
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # of items; what the loader yields is collated
        batch_sampler=sampler,
        collate_fn=functools.partial(collate, collate_targets=collate_targets),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers > 0 else None,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if forks else None,
        generator=torch.Generator(),  # its own, or every pass over the loader would move the global stream
    )


def _start_worker(worker: int) -> None:
    """One thread per worker, and deaf to everyone but the process it serves.

    Launchers signal whole process groups; a worker that died of it would make the loop fail where it means to save.
    """
    cv2.setNumThreads(0)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere torch's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    """Exit on a SIGTERM of that process, as a loader sends to workers that it could not stop otherwise."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        continue
    os._exit(0)


def composition(samples: Iterable[SampleInfo], names: Sequence[str]) -> list[int]:
    """How many of the samples come from each of the named datasets."""
    counts = Counter(sample.dataset for sample in samples)
    return [counts[name] for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# The binary task


@dataclass
class BinaryItem:
    alpha: np.ndarray  # (H, W) uint8 at the model's size
    class_id: int  # -1 where unknown
    original: np.ndarray | None  # (h, w) uint8 at the sample's own size, in evaluation


def binary_target(sample: Sample, original: Sample | None) -> BinaryItem:
    """The target of one sample; `original` is the sample as read, in evaluation."""
    return BinaryItem(
        alpha=sample.masks,
        class_id=sample.class_ids[0] if sample.class_ids else -1,
        original=None if original is None else original.masks,
    )


def collate_binary(items: Sequence[BinaryItem]) -> BinaryTarget:
    """Alpha / 255 as float32 (B, 1, H, W); see `BinaryTarget`."""
    return BinaryTarget(
        masks=torch.from_numpy(np.stack([item.alpha for item in items])).unsqueeze(1).float().div_(255),
        class_ids=torch.tensor([item.class_id for item in items], dtype=torch.int64),
        originals=[torch.from_numpy(item.original) for item in items if item.original is not None],
    )

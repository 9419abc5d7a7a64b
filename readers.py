"""Readers: they list what is on disk, collect every fault they see, and decode one sample at a time, strictly.

    reader = BinaryFolders("DIS5K+HRSOD:0.5", root="data")
    fail_on(check(reader))
    training = split(reader, part="train", fold="0/5", seed=0)

Apart from dataset.py, which turns samples into batches: this is what grows with every format. Sizes are always
(height, width).
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from errors import UserError
from samples import Sample, Size
from transforms import resize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
MAX_PIXELS = 400_000_000
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # temporary folders are shared with other users

T = TypeVar("T")


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


def _walk_images(folder: Path, faults: list[Fault], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """All such files below `folder`, sorted; hidden ones left out, linked folders reported instead of followed."""

    def report(error: OSError) -> None:
        faults.append(Fault(str(error.filename), f"cannot be listed ({error.strerror})"))

    images = []
    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(parent, name).is_symlink():
                faults.append(Fault(str(Path(parent, name)), "is a linked folder, which is not followed"))
        images += [Path(parent, name) for name in files if name.lower().endswith(suffixes) and not name.startswith(".")]
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
    folder, so that outputs can keep names and structure. Videos among them are no samples: `videos` holds their paths
    by their ids.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]):
        self.faults: list[Fault] = []
        self._entries: dict[str, str] = {}  # sample id -> path
        self.videos: dict[str, str] = {}
        for path in paths:
            files, base = self._expand(path)
            if not files:
                self.faults.append(
                    Fault(os.fspath(path), "is no image or video, no folder with any and no pattern that matches any")
                )
            for file in files:
                sample_id = file.relative_to(base).with_suffix("").as_posix()
                entries = self.videos if file.name.lower().endswith(VIDEO_SUFFIXES) else self._entries
                known = entries.setdefault(sample_id, str(file))
                if not os.path.samefile(known, file):
                    self.faults.append(Fault(str(file), f"would write the same outputs as {known}"))
        self._ids = list(self._entries)

    def _expand(self, path: str | os.PathLike[str]) -> tuple[list[Path], Path]:
        """The files that one argument means, and the folder that their ids are relative to."""
        suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES
        if os.path.isdir(path):
            return _walk_images(Path(path), self.faults, suffixes), Path(path)
        if os.path.exists(path):
            return [Path(path)], Path(path).parent
        matches = sorted(glob.glob(os.fspath(path), recursive=True))
        return [Path(m) for m in matches if m.lower().endswith(suffixes)], _fixed_part(path)

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

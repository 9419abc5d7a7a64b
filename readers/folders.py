"""Which files a data set holds: named sets, pairs of an image and a mask, everything below a folder."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from readers.base import Fault

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class Pair:
    image: str
    mask: str
    stem: str
    dataset: str


def parse_spec(spec: str, root: str | os.PathLike[str] | None) -> list[tuple[str, Path, float]]:
    """`A+B:0.5` → [(name, folder or json, weight)]; names are their own unless two of them are called the same."""
    parts = [spec] if locate(spec, root).exists() else [part.strip() for part in spec.split("+")]  # a path may hold a +
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
        path = locate(text, root)
        if path.exists() and not (path.is_file() or path.is_dir()):  # its end would be waited for
            raise UserError(f"data: {path} is a pipe or a device; give a folder or a file")
        found.append((text, path, weight))
    repeated = [text for text, count in Counter(text for text, _, _ in found).items() if count > 1]
    if repeated:
        raise UserError(f"data: {repeated[0]!r} is named twice in {spec!r}; give it a weight instead ({repeated[0]}:2)")
    names = [path.name.removesuffix(".json") for _, path, _ in found]
    return [
        (name if name and names.count(name) == 1 else text, path, weight)
        for name, (text, path, weight) in zip(names, found, strict=True)
    ]


def locate(text: str, root: str | os.PathLike[str] | None) -> Path:
    """`<root>/<text>` where that exists, else the path as given if that does."""
    inside = Path(root or "") / text
    return Path(text) if Path(text).exists() and not inside.exists() else inside


def list_pairs(
    folder: Path,
    dataset: str,
    faults: list[Fault],
    *,
    images: tuple[str, ...] = ("im",),
    masks: tuple[str, ...] = ("gt",),
) -> list[Pair]:
    """The pairs of one dataset, sorted by stem; whatever is wrong goes to `faults`.

    Of the names that the two sub-folders may have, the first that is there is taken.
    """
    subs = [next((name for name in names if (folder / name).is_dir()), names[0]) for names in (images, masks)]
    for needed in (folder, *(folder / sub for sub in subs)):
        if not needed.is_dir():
            layout = f"a dataset holds {images[0]}/ with images and {masks[0]}/ with masks"
            faults.append(Fault(str(needed), f"is no folder; {layout}"))
            return []
    found, found_masks = (list_stems(folder, sub, faults) for sub in subs)
    for stem in sorted(found.keys() - found_masks.keys()):
        faults.append(Fault(found[stem], f"has no mask of the same name in {subs[1]}/"))
    for stem in sorted(found_masks.keys() - found.keys()):
        faults.append(Fault(found_masks[stem], f"has no image of the same name in {subs[0]}/"))
    if not found and not found_masks:
        faults.append(Fault(str(folder), f"holds no images ({' '.join(s[1:] for s in IMAGE_SUFFIXES)})"))
    return [Pair(found[stem], found_masks[stem], stem, dataset) for stem in sorted(found.keys() & found_masks.keys())]


def list_stems(
    folder: Path, sub: str, faults: list[Fault], suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, str]:
    """{stem relative to `folder/sub`: path} of all images there, or files with other suffixes."""
    inside = folder.resolve()
    found: dict[str, list[str]] = defaultdict(list)
    for path in walk_images(folder / sub, faults, suffixes):
        if not path.resolve().is_relative_to(inside):
            faults.append(Fault(str(path), "links out of the dataset; copy it there, or link the whole dataset"))
            continue
        found[path.relative_to(folder / sub).with_suffix("").as_posix()].append(str(path))
    for paths in found.values():
        if len(paths) > 1:
            faults.append(Fault(paths[0], f"shares its stem with {', '.join(Path(p).name for p in paths[1:])}"))
    return {stem: paths[0] for stem, paths in found.items()}


def walk_images(folder: Path, faults: list[Fault], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
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


def size_fault(pair: Pair, image: np.ndarray, alpha: np.ndarray) -> Fault:
    """Sizes in the order that people write them, width first."""
    (h, w), (mask_h, mask_w) = image.shape[:2], alpha.shape
    return Fault(pair.mask, f"is {mask_w}x{mask_h}, its image {pair.image} is {w}x{h} (upright)")

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


def list_pairs(folder: Path, dataset: str, faults: list[Fault]) -> list[Pair]:
    """The pairs of one dataset, sorted by stem; whatever is wrong goes to `faults`."""
    for needed in (folder, folder / "im", folder / "gt"):
        if not needed.is_dir():
            faults.append(Fault(str(needed), "is no folder; a dataset holds im/ with images and gt/ with masks"))
            return []
    images, masks = (list_stems(folder, sub, faults) for sub in ("im", "gt"))
    for stem in sorted(images.keys() - masks.keys()):
        faults.append(Fault(images[stem], "has no mask of the same name in gt/"))
    for stem in sorted(masks.keys() - images.keys()):
        faults.append(Fault(masks[stem], "has no image of the same name in im/"))
    if not images and not masks:
        faults.append(Fault(str(folder), f"holds no images ({' '.join(s[1:] for s in IMAGE_SUFFIXES)})"))
    return [Pair(images[stem], masks[stem], stem, dataset) for stem in sorted(images.keys() & masks.keys())]


def list_stems(folder: Path, sub: str, faults: list[Fault]) -> dict[str, str]:
    """{stem relative to `folder/sub`: path} of all images there."""
    inside = folder.resolve()
    found: dict[str, list[str]] = defaultdict(list)
    for path in walk_images(folder / sub, faults):
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

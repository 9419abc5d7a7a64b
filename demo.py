"""The demo data: pictures that the program draws itself, so that the first run needs no data of its own.

Cut-outs of leaves, rings, gears, wires, letters and lattices lie on a soft ground. Both take their colours from the
same palette in the same proportions, so no threshold on any colour finds the objects; what sets them apart is that
objects carry a fine regular pattern where the ground is smooth. Edges are soft, some of them very.

The semantic data show the same cut-outs, larger and more of them. Which class one is of its pattern alone tells.
The instance data show more of them still, partly over each other. Which class one is of its shape alone tells.
In the clips they move, turn and grow, pass over each other, and leave the picture and come back.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from errors import UserError
from samples import IGNORED
from writers import write_palette

VERSION, SEMANTIC_VERSION, INSTANCE_VERSION = 2, 1, 1  # of what is drawn; raise it whenever a pixel changes
CLASSIFICATION_VERSION = VIDEO_VERSION = 1
COUNTS = {"train": 64, "val": 16}
COUNTS_OF_CLASS = {"train": 48, "val": 12}
COUNTS_OF_CLIPS = {"train": 12, "val": 4}
CLIP_LENGTH = 12
MARKER = "DEMO"  # a file in the folder, written last, that says which drawing it holds
SUPERSAMPLING = 4

Generator = np.random.Generator
Shape = Callable[[Generator, np.ndarray, np.ndarray, float], None]  # (random stream, canvas, centre, radius)
Draw = Callable[[Generator], tuple[np.ndarray, np.ndarray]]  # an image and its mask


def write_demo(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Draw 64 training and 16 validation pairs as `<folder>/{train,val}/{im,gt}/<number>.png`, or keep them if there.

    The folder appears whole or not at all; several processes may ask for it at once.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    return _write_once(Path(folder), f"version {VERSION}, seed {seed}\n", lambda target: _draw_binary(target, seed))


def write_semantic_demo(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """The same as `<folder>/{train,val}/{images,masks}/<number>.png` and `<folder>/classes.txt`, with a class id in
    each pixel of a mask and 255, ignored, around the objects. Raises as `write_demo`."""
    marker = f"semantic version {SEMANTIC_VERSION}, seed {seed}\n"
    return _write_once(Path(folder), marker, lambda target: _draw_semantic(target, seed))


def write_instance_demo(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """The same as `<folder>/images/{train,val}/<number>.png` and `<folder>/annotations/instances_{train,val}.json`,
    COCO's format, with polygons, run lengths where an object has holes, and some crowds. Raises as `write_demo`."""
    marker = f"instance version {INSTANCE_VERSION}, seed {seed}\n"
    return _write_once(Path(folder), marker, lambda target: _draw_instance(target, seed))


def write_classification_demo(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Draw 48 training and 12 validation pictures of each of `KINDS` as `<folder>/{train,val}/<kind>/<number>.png`, one
    shape in each. Raises as `write_demo`."""
    marker = f"classification version {CLASSIFICATION_VERSION}, seed {seed}\n"
    return _write_once(Path(folder), marker, lambda target: _draw_classes(target, seed))


def write_video_demo(folder: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Draw 12 training and 4 validation clips of 12 frames, 160x120 pixels, in the layout of DAVIS:
    `<folder>/JPEGImages/<clip>/<number>.jpg`, `<folder>/Annotations/<clip>/<number>.png` with the ids of objects, and
    the names of the clips in `<folder>/ImageSets/{train,val}.txt`. Raises as `write_demo`."""
    marker = f"video version {VIDEO_VERSION}, seed {seed}\n"
    return _write_once(Path(folder), marker, lambda target: _draw_clips(target, seed))


def _write_once(folder: Path, marker: str, draw_all: Callable[[Path], None]) -> Path:
    """Draw into a folder beside it and move that into place, unless what the marker says is there already."""
    if _is_complete(folder, marker):
        return folder
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no demo data; name another folder for it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        drawing = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            draw_all(drawing)
            (drawing / MARKER).write_text(marker)
            _move_into_place(drawing, folder, marker)
        finally:
            shutil.rmtree(drawing, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: the demo data cannot be written ({error.strerror}); name another folder") from error
    return folder


def _is_complete(folder: Path, marker: str) -> bool:
    return (folder / MARKER).is_file() and (folder / MARKER).read_text() == marker


def _move_into_place(drawing: Path, folder: Path, marker: str) -> None:
    """Rename, unless another process was faster; an older drawing makes room."""
    drawing.chmod(0o755)  # temporary folders are private
    if folder.exists() and not _is_complete(folder, marker):
        shutil.rmtree(folder)
    try:
        drawing.rename(folder)
    except OSError:
        if not _is_complete(folder, marker):
            raise


def _draw_binary(folder: Path, seed: int) -> None:
    _draw_all(folder, seed, draw_pair, ("im", "gt"))


def _draw_semantic(folder: Path, seed: int) -> None:
    _draw_all(folder, seed, draw_scene, ("images", "masks"))
    (folder / "classes.txt").write_text("\n".join(["ground", *PATTERNS]) + "\n")


def _draw_instance(folder: Path, seed: int) -> None:
    (folder / "annotations").mkdir()
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(KINDS)]
    for part, (name, count) in enumerate(COUNTS.items()):
        (folder / "images" / name).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            image, things = draw_group(_stream(seed, part, index))
            file_name = f"{index:04d}.png"
            Image.fromarray(image).save(folder / "images" / name / file_name, compress_level=1)
            images.append({"id": index + 1, "file_name": file_name, "height": image.shape[0], "width": image.shape[1]})
            for thing in things:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation(thing)})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def _stream(seed: int, part: int, index: int) -> Generator:
    """The random numbers of one picture."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, part, index])))


def _draw_all(folder: Path, seed: int, draw: Draw, subs: tuple[str, str]) -> None:
    for part, (name, count) in enumerate(COUNTS.items()):
        for sub in subs:
            (folder / name / sub).mkdir(parents=True)
        for index in range(count):
            pictures = draw(_stream(seed, part, index))
            for sub, picture in zip(subs, pictures, strict=True):
                Image.fromarray(picture).save(folder / name / sub / f"{index:04d}.png", compress_level=1)


# ---------------------------------------------------------------------------------------------------------------------
# One picture


def draw_pair(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 RGB and its alpha (H, W) uint8, 192 to 256 pixels a side."""
    height, width = (int(side) for side in rng.integers(12, 17, size=2) * 16)
    alpha = draw_alpha(rng, height, width)
    palette = draw_palette(rng)
    ground = paint(palette, smooth_noise(rng, height, width))
    objects = paint(palette, fine_pattern(rng, height, width))
    shadow = 1 - 0.35 * cv2.GaussianBlur(np.roll(alpha, (5, 4), axis=(0, 1)), (0, 0), 5)
    rim = np.clip(0.1 + cv2.GaussianBlur(alpha, (0, 0), 2), 0, 1)
    opacity = alpha[:, :, None]
    image = opacity * objects * rim[:, :, None] + (1 - opacity) * ground * shadow[:, :, None]
    image += rng.normal(0, 3, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), np.rint(alpha * 255).astype(np.uint8)


def draw_scene(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 RGB and its labels (H, W) uint8, 192 to 256 pixels a side.

    Three to five objects of different classes, the later over the earlier; a border of two pixels around each is
    ignored.
    """
    height, width = (int(side) for side in rng.integers(12, 17, size=2) * 16)
    palette = draw_palette(rng)
    image = paint(palette, smooth_noise(rng, height, width))
    labels = np.zeros((height, width), np.uint8)
    names = list(PATTERNS)
    covered = np.zeros((height, width), np.float32)
    for number in rng.permutation(len(names))[: rng.integers(3, 6)]:
        radius = rng.uniform(0.22, 0.36) * min(height, width)
        shape = (_blob, _gear, _leaf)[rng.integers(3)]  # those with room for a pattern
        alpha = draw_shape(rng, shape, find_place(rng, covered, radius), radius, (height, width)).astype(np.float32)
        covered = np.maximum(covered, alpha)
        shadow = 1 - 0.35 * cv2.GaussianBlur(np.roll(alpha, (3, 2), axis=(0, 1)), (0, 0), 3)
        pattern = PATTERNS[names[number]](*pattern_axes(rng, height, width)) + 0.15 * smooth_noise(rng, height, width)
        opacity = alpha[:, :, None]
        image = opacity * paint(palette, pattern) + (1 - opacity) * image * shadow[:, :, None]
        inside = (alpha > 0.5).astype(np.uint8)
        labels[inside > 0] = number + 1
        labels[cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = IGNORED
    image += rng.normal(0, 3, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), labels


class Thing(NamedTuple):
    """What is to be seen of an object of the instance data, or of a crowd of small ones."""

    kind: str
    alpha: np.ndarray  # (H, W) in [0, 1]
    is_crowd: bool = False


def draw_group(rng: Generator) -> tuple[np.ndarray, list[Thing]]:
    """An image (H, W, 3) uint8 RGB, 192 to 256 pixels a side, and one to eight objects, the later over the earlier.

    A third and more of each is to be seen. In some pictures the second is a crowd.
    """
    height, width = size = (int(rng.integers(12, 17) * 16), int(rng.integers(12, 17) * 16))
    palette = draw_palette(rng)
    image = paint(palette, smooth_noise(rng, height, width))
    things: list[Thing] = []
    whole: list[float] = []  # area of each thing if nothing lay over it
    has_crowd = rng.random() < 0.15
    for position in range(rng.integers(1, 9)):
        is_crowd = has_crowd and position == 1
        kind = list(KINDS)[rng.integers(len(KINDS))]
        alpha = _draw_crowd(rng, kind, size) if is_crowd else _draw_thing(rng, kind, things, size)
        left = [np.minimum(thing.alpha, 1 - alpha) for thing in things]
        if any(part.sum() < area / 3 for part, area in zip(left, whole, strict=True)):
            continue  # it would hide another
        things = [thing._replace(alpha=part) for thing, part in zip(things, left, strict=True)]
        things.append(Thing(kind, alpha, is_crowd))
        whole.append(alpha.sum())
        shadow = 1 - 0.5 * cv2.GaussianBlur(np.roll(alpha, (2, 1), axis=(0, 1)), (0, 0), 2.5)
        rim = np.clip(0.3 + cv2.GaussianBlur(alpha, (0, 0), 1.5), 0, 1)
        opacity = alpha[:, :, None]
        objects = paint(palette, fine_pattern(rng, height, width)) * rim[:, :, None]
        image = opacity * objects + (1 - opacity) * image * shadow[:, :, None]
    image += rng.normal(0, 3, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), things


def _draw_thing(rng: Generator, kind: str, things: list[Thing], size: tuple[int, int]) -> np.ndarray:
    """An object where there is room, or half of the time anywhere."""
    radius = rng.uniform(0.11, 0.24) * min(size)
    covered = np.zeros(size, np.float32)
    if rng.random() < 0.5:
        covered = np.max([covered, *(thing.alpha for thing in things)], 0).astype(np.float32)
    return draw_shape(rng, KINDS[kind], find_place(rng, covered, radius), radius, size)


def _draw_crowd(rng: Generator, kind: str, size: tuple[int, int]) -> np.ndarray:
    """A dozen small objects close together."""
    radius = 0.05 * min(size)
    centre = rng.uniform(6 * radius, np.array([size[1], size[0]]) - 6 * radius)
    places = centre + rng.uniform(-5 * radius, 5 * radius, size=(12, 2))
    return np.max([draw_shape(rng, KINDS[kind], place, radius, size) for place in places], 0)


def annotation(thing: Thing) -> dict[str, Any]:
    """An object as COCO writes it, but for the ids of itself and of its picture."""
    outline = run_lengths(thing.alpha > 0.5) if thing.is_crowd else polygons(thing.alpha)
    outline = run_lengths(thing.alpha > 0.5) if outline is None else outline
    code = coco_mask.frPyObjects(outline, *thing.alpha.shape)
    code = coco_mask.merge(code) if isinstance(code, list) else code
    return {
        "category_id": list(KINDS).index(thing.kind) + 1,
        "segmentation": outline,
        "area": float(coco_mask.area(code)),
        "bbox": coco_mask.toBbox(code).tolist(),
        "iscrowd": int(thing.is_crowd),
    }


def polygons(alpha: np.ndarray) -> list[list[float]] | None:
    """The outlines of what is more than half opaque in (H, W), x and y in turn; None if it has holes."""
    fine = cv2.resize(alpha, None, fx=SUPERSAMPLING, fy=SUPERSAMPLING, interpolation=cv2.INTER_LINEAR) > 0.5
    contours, tree = cv2.findContours(fine.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    large = [cv2.contourArea(contour) > 2 * SUPERSAMPLING**2 for contour in contours]  # specks are let go
    if any(is_large and row[3] >= 0 for is_large, row in zip(large, tree[0], strict=True)):
        return None
    outlines = [
        cv2.approxPolyDP(contour, 1, True) for contour, is_large in zip(contours, large, strict=True) if is_large
    ]
    return [((outline.ravel() + 0.5) / SUPERSAMPLING).round(2).tolist() for outline in outlines]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as COCO's uncompressed run lengths: of zeros first, column after column."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=flat.size).tolist()}


def draw_palette(rng: Generator) -> np.ndarray:
    """Three colours (3, 3) in [0, 255]: dark, middle, light, in neighbouring or opposite hues."""
    hue = rng.uniform(0, 180)
    hues = hue + np.array([0, rng.choice([15, 30, 60]), rng.choice([30, 60, 90])])
    hsv = np.stack([hues % 180, rng.uniform(70, 190, 3), [rng.uniform(50, 90), rng.uniform(120, 170), 235]], axis=1)
    return cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0].astype(np.float64)


def paint(palette: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as colours between the palette's; ranks instead of values, so all colours are equally common."""
    ranks = np.empty(values.size)
    ranks[np.argsort(values, axis=None, kind="stable")] = np.linspace(0, 2, values.size)
    lower = np.minimum(ranks.astype(int), 1)
    blend = (ranks - lower)[:, None]
    return (palette[lower] * (1 - blend) + palette[lower + 1] * blend).reshape(*values.shape, 3)


def smooth_noise(rng: Generator, height: int, width: int) -> np.ndarray:
    """Clouds: noise of a few coarse scales, nothing as fine as the patterns."""
    noise = np.zeros((height, width))
    for cells, weight in ((3, 1.0), (5, 0.6), (8, 0.25)):
        noise += weight * cv2.resize(rng.normal(size=(cells, cells)), (width, height), interpolation=cv2.INTER_CUBIC)
    return noise


def fine_pattern(rng: Generator, height: int, width: int) -> np.ndarray:
    """Stripes, waves, checks or dots of 9 to 14 pixels' period, turned by any angle."""
    u, v = pattern_axes(rng, height, width)
    patterns = list(PATTERNS.values())[:4]
    return patterns[rng.integers(len(patterns))](u, v) + 0.15 * smooth_noise(rng, height, width)


def pattern_axes(rng: Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The phases along and across a pattern, 2 pi for each period of 9 to 14 pixels, turned by any angle."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    angle, frequency = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(9, 14)
    u = frequency * (x * np.cos(angle) + y * np.sin(angle))
    v = frequency * (y * np.cos(angle) - x * np.sin(angle))
    return u, v


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda u, v: np.sin(u),
    "waves": lambda u, v: np.sin(u + 1.5 * np.sin(v / 3)),
    "checks": lambda u, v: np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v),
    "bricks": lambda u, v: np.maximum(np.cos(u), np.cos((v + np.pi * np.floor(u / (2 * np.pi))) / 2)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, in supersampled pixels around a centre


def draw_alpha(rng: Generator, height: int, width: int) -> np.ndarray:
    """One to three shapes in [0, 1], beside each other if there is room, antialiased, some with much softer edges."""
    alpha = np.zeros((height, width))
    sizes = [rng.uniform(0.38, 0.46), *rng.uniform(0.18, 0.28, size=rng.integers(0, 3))]
    for i, size in enumerate(sizes):
        radius = size * min(height, width)
        centre = find_place(rng, alpha, radius)
        shape = SHAPES[rng.integers(len(SHAPES) - (i == 0))]  # the largest is no wires: each picture has some area
        drawn = draw_shape(rng, shape, centre, radius, (height, width))
        if rng.random() < 0.25:
            drawn = cv2.GaussianBlur(drawn, (0, 0), rng.uniform(0.8, 2.0))
        alpha = np.maximum(alpha, drawn)
    return alpha


def find_place(rng: Generator, covered: np.ndarray, radius: float) -> np.ndarray:
    """Of some centres (x, y) drawn at random the one that is least crowded."""
    height, width = covered.shape
    crowd = cv2.GaussianBlur(covered, (0, 0), radius / 2)
    places = rng.uniform(0.8 * radius, np.array([width, height]) - 0.8 * radius, size=(12, 2))
    return min(places, key=lambda place: crowd[int(place[1]), int(place[0])])


def draw_shape(rng: Generator, shape: Shape, centre: np.ndarray, radius: float, size: tuple[int, int]) -> np.ndarray:
    """A shape in [0, 1], antialiased."""
    height, width = size
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    shape(rng, canvas, centre * SUPERSAMPLING, radius * SUPERSAMPLING)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA) / 255


def _fill(canvas: np.ndarray, points: np.ndarray, value: int = 255) -> None:
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], value)


def _stroke(canvas: np.ndarray, points: np.ndarray, thickness: float, value: int = 255, closed: bool = False) -> None:
    cv2.polylines(canvas, [np.rint(points).astype(np.int32)], closed, value, max(1, round(thickness)))


def _polar(centre: np.ndarray, angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    return centre + (radii * np.array([np.cos(angles), np.sin(angles)])).T


def _disc(centre: np.ndarray, radius: float) -> np.ndarray:
    return _polar(centre, np.linspace(0, 2 * np.pi, 90, endpoint=False), radius)


def _blob(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A closed smooth outline, with up to two holes."""
    angles = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    waves = [rng.uniform(0, 0.25 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 6)]
    _fill(canvas, _polar(centre, angles, radius * (0.9 + np.sum(waves, axis=0))))
    for _ in range(rng.integers(0, 3)):
        hole = _polar(centre, rng.uniform(0, 2 * np.pi, 1), radius * rng.uniform(0.1, 0.5))[0]
        _fill(canvas, _disc(hole, radius * rng.uniform(0.12, 0.22)), 0)


def _ring(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """One to three rings in each other."""
    for outer in np.linspace(1, 0.4, rng.integers(1, 4)):
        _stroke(canvas, _disc(centre, radius * outer), radius * rng.uniform(0.12, 0.26), closed=True)


def _gear(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A gear, a flower or a star, with a hole in the middle."""
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    wave = np.cos(rng.integers(5, 11) * angles + rng.uniform(0, 2 * np.pi))
    outline = (np.sign(wave), wave, np.abs(wave))[rng.integers(3)]
    _fill(canvas, _polar(centre, angles, radius * (0.85 + 0.18 * outline)))
    _fill(canvas, _disc(centre, radius * rng.uniform(0.2, 0.4)), 0)


def _leaf(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A pointed leaf on a stem, its veins cut out."""
    turn = rng.uniform(0, 2 * np.pi)
    along, across = _polar(np.zeros(2), np.array([turn, turn + np.pi / 2]), 1.0)
    t = np.linspace(0, 1, 120)
    half_width = radius * rng.uniform(0.4, 0.6) * np.sin(np.pi * t) * (1 - 0.35 * t)
    spine = centre + np.outer(radius * (2 * t - 1), along)
    edges = [spine + np.outer(side * half_width, across) for side in (1, -1)]
    _fill(canvas, np.concatenate([edges[0], edges[1][::-1]]))
    for position in range(20, 100, 16):
        for edge in edges:
            tip = 0.2 * spine[position] + 0.8 * edge[min(position + 14, 119)]
            _stroke(canvas, np.stack([spine[position], tip]), 0.035 * radius, 0)
    _stroke(canvas, np.stack([spine[0] - 0.4 * radius * along, spine[10]]), 0.09 * radius)


def _letter(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A capital or an ampersand in heavy strokes."""
    letter = "ABEGHKMRSXZ&"[rng.integers(12)]
    scale, thickness = radius / 13, round(radius * rng.uniform(0.22, 0.34))
    (width, height), _ = cv2.getTextSize(letter, cv2.FONT_HERSHEY_DUPLEX, scale, thickness)
    origin = (round(centre[0] - width / 2), round(centre[1] + height / 2))
    cv2.putText(canvas, letter, origin, cv2.FONT_HERSHEY_DUPLEX, scale, 255, thickness, cv2.LINE_AA)


def _lattice(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A disc of crossed bars with a rim."""
    bars, inside = np.zeros_like(canvas), np.zeros_like(canvas)
    gap, thickness = radius * rng.uniform(0.4, 0.5), radius * rng.uniform(0.15, 0.2)
    turn = rng.uniform(0, np.pi / 2)
    for direction in (turn, turn + np.pi / 2):
        along, across = _polar(np.zeros(2), np.array([direction, direction + np.pi / 2]), 1.0)
        for offset in np.arange(-radius, radius, gap):
            middle = centre + (offset + gap / 2) * across
            _stroke(bars, np.stack([middle - radius * along, middle + radius * along]), thickness)
    _fill(inside, _disc(centre, radius))
    np.maximum(canvas, bars & inside, out=canvas)
    _stroke(canvas, _disc(centre, radius), thickness, closed=True)


def _wires(rng: Generator, canvas: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """A bundle of curled wires that end in a bead."""
    t = np.linspace(0, 1, 160)[:, None]
    for _ in range(rng.integers(3, 6)):
        a, b, c, d = _polar(centre, rng.uniform(0, 2 * np.pi, 4), radius * rng.uniform(0.6, 1.3, 4))
        curve = (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
        _stroke(canvas, curve, SUPERSAMPLING * rng.uniform(5, 9))
        _fill(canvas, _disc(curve[-1], radius * rng.uniform(0.12, 0.2)))


SHAPES: tuple[Shape, ...] = (
    _blob,
    _ring,
    _gear,
    _leaf,
    _letter,
    _lattice,
    _wires,
)
KINDS: dict[str, Shape] = {
    "blob": _blob,
    "ring": _ring,
    "gear": _gear,
    "leaf": _leaf,
    "letter": _letter,
    "lattice": _lattice,
}


# ---------------------------------------------------------------------------------------------------------------------
# One shape for a class


def _draw_classes(folder: Path, seed: int) -> None:
    for part, (split, count) in enumerate(COUNTS_OF_CLASS.items()):
        for number, name in enumerate(KINDS):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                seeds = np.random.SeedSequence([seed, part, number, index])
                picture = draw_kind(np.random.Generator(np.random.PCG64(seeds)), KINDS[name])
                Image.fromarray(picture).save(folder / split / name / f"{index:04d}.png", compress_level=1)


def draw_kind(rng: Generator, shape: Shape, side: int = 96) -> np.ndarray:
    """One shape on a soft ground of other colours, (side, side, 3) uint8 RGB."""
    radius = rng.uniform(0.3, 0.42) * side
    centre = rng.uniform(1.05 * radius, side - 1.05 * radius, 2)
    opacity = draw_shape(rng, shape, centre, radius, (side, side))[:, :, None]
    ground, objects = (paint(draw_palette(rng), smooth_noise(rng, side, side)) for _ in range(2))
    (a, b), (c, d) = ((90, 0.6), (0, 0.45))[:: rng.choice([1, -1])]  # one of them is light, the other dark
    image = opacity * (a + b * objects) + (1 - opacity) * (c + d * ground) + rng.normal(0, 3, ground.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Clips


class Mover(NamedTuple):
    """An object as it is painted once, and where it is in each frame."""

    colors: np.ndarray  # (side, side, 3) in [0, 255]
    alpha: np.ndarray  # (side, side) in [0, 1]
    places: np.ndarray  # (T, 2) x and y of its centre
    angles: np.ndarray  # (T,) degrees
    radii: np.ndarray  # (T,) pixels


def _draw_clips(folder: Path, seed: int) -> None:
    (folder / "ImageSets").mkdir()
    for part, (split, count) in enumerate(COUNTS_OF_CLIPS.items()):
        names = [f"{split}_{index:02d}" for index in range(count)]
        (folder / "ImageSets" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            (folder / "JPEGImages" / name).mkdir(parents=True)
            for number, (frame, labels) in enumerate(draw_clip(_stream(seed, part, index), comes_back=index % 2 == 0)):
                Image.fromarray(frame).save(folder / "JPEGImages" / name / f"{number:05d}.jpg", quality=95)
                write_palette(folder / "Annotations" / name / f"{number:05d}.png", labels)


def draw_clip(
    rng: Generator, *, comes_back: bool, size: tuple[int, int] = (120, 160)
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Frames (H, W, 3) uint8 RGB and their labels (H, W) uint8: one to three objects, the later over the earlier.

    The ground drifts. All objects are to be seen in the first frame; with `comes_back` the last of several leaves the
    picture and enters it again.
    """
    height, width = size
    movers: list[Mover] = []
    covered = np.zeros(size, np.float32)
    for left in range(int(rng.integers(1 + comes_back, 4)))[::-1]:
        mover = _draw_mover(rng, covered, comes_back and left == 0)
        movers.append(mover)
        covered = np.maximum(covered, _laid(mover, 0, size)[1])
    margin = 2 * CLIP_LENGTH
    ground = 40 + 0.45 * paint(draw_palette(rng), smooth_noise(rng, height + 2 * margin, width + 2 * margin))
    drift = rng.uniform(-2, 2, 2)
    clip = []
    for number in range(CLIP_LENGTH):
        x, y = (round(margin + number * step) for step in drift)
        image, labels = ground[y : y + height, x : x + width], np.zeros(size, np.uint8)
        for position, mover in enumerate(movers):
            colors, alpha = _laid(mover, number, size)
            shadow = 1 - 0.4 * cv2.GaussianBlur(np.roll(alpha, (2, 1), axis=(0, 1)), (0, 0), 2)
            image = alpha[:, :, None] * colors + (1 - alpha[:, :, None]) * image * shadow[:, :, None]
            labels[alpha > 0.5] = position + 1
        image = image + rng.normal(0, 3, image.shape)
        clip.append((np.clip(np.rint(image), 0, 255).astype(np.uint8), labels))
    return clip


def _draw_mover(rng: Generator, covered: np.ndarray, comes_back: bool, side: int = 96) -> Mover:
    """An object that goes straight and turns back at the borders, or leaves to the left or right in between."""
    (height, width), t = covered.shape, np.linspace(0, 1, CLIP_LENGTH)
    shape = (_blob, _gear, _letter)[rng.integers(3)]  # nothing that is too fine at this size
    alpha = draw_shape(rng, shape, np.full(2, side / 2), 0.4 * side, (side, side))
    colors = 90 + 0.65 * paint(draw_palette(rng), fine_pattern(rng, side, side))
    radii = rng.uniform(17, 23) * rng.uniform(0.8, 1.4) ** t
    start = find_place(rng, covered, radii[0])
    if comes_back:
        reach = 1.3 * radii.max()
        way = -reach - start[0] if start[0] < width / 2 else width + reach - start[0]
        places = start + np.outer(np.sin(np.pi * t), [way, 0]) + np.outer(t, [0, rng.uniform(-15, 15)])
    else:
        turn = rng.uniform(0, 2 * np.pi)
        path = start + np.outer(t, rng.uniform(40, 90) * np.array([np.cos(turn), np.sin(turn)]))
        places = np.abs(path)  # a border is a mirror
        places = np.array([width, height]) - np.abs(np.array([width, height]) - places)
    angles = rng.uniform(0, 360) + rng.uniform(-90, 90) * t
    return Mover(colors, alpha, places, angles, radii)


def _laid(mover: Mover, number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Colours (H, W, 3) and alpha (H, W) of an object in a frame."""
    height, width = size
    side = mover.alpha.shape[0]
    scale = 2 * mover.radii[number] / (0.4 * side)  # drawn twice as large, then averaged
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), mover.angles[number], scale)
    matrix[:, 2] = matrix[:, 2] + 2 * mover.places[number] - side / 2
    double = (2 * width, 2 * height)
    colors, alpha = (
        cv2.resize(cv2.warpAffine(each, matrix, double, borderMode=mode), (width, height), interpolation=cv2.INTER_AREA)
        for each, mode in ((mover.colors, cv2.BORDER_REPLICATE), (mover.alpha, cv2.BORDER_CONSTANT))
    )
    return colors, alpha

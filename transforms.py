"""Augmentation by name: albumentations' transforms and a few of its own kind, with a random stream per sample.

The only file that imports albumentations. A list of `{name: ..., p: ..., **arguments}`, as YAML gives it, becomes an
`Augment`, whose output is a pure function of (sample, size, seed sequence), in whichever process it runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version
import albumentations as A
from albumentations.core.composition import BaseCompose
from albumentations.core.transforms_interface import BasicTransform

from colors import palette
from errors import UserError, nearest
from instance_pictures import object_colors
from layers import extents, layered, tidied
from samples import IGNORED, Layers, Sample, Size

Range = tuple[float, float]

BOX_PARAMS = A.BboxParams(format="pascal_voc", label_fields=["numbers"], clip=True)

MEAN_COLOR = (124, 116, 104)  # ImageNet's: what pictures are filled up with becomes 0 when it is normalised

OFFICIAL_BINARY: list[dict[str, Any]] = [
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "Rotate", "p": 0.2, "limit": 15, "interpolation": "INTER_CUBIC", "border_mode": "BORDER_CONSTANT"},
    {"name": "Enhance", "p": 1.0},
    {"name": "PepperNoise", "p": 1.0, "amount": 0.0015},
]
"""BiRefNet's recipe: flip, rotate, brightness, contrast, colour, sharpness, and scattered black and white pixels."""

OFFICIAL_SEMANTIC: list[dict[str, Any]] = [
    {"name": "ScaleCrop", "p": 1.0, "scale": [0.5, 2.0], "cat_max_ratio": 0.75},
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "PhotometricDistortion", "p": 1.0},
]
"""SegFormer's recipe, which is MMSegmentation's: a crop at half to double scale of which no class takes over three
quarters, flip, brightness, contrast, saturation and hue."""


OFFICIAL_INSTANCE: list[dict[str, Any]] = [
    {"name": "SizeCrop", "p": 0.5, "shorter": [400, 500, 600], "sides": [384, 600]},
    {"name": "HorizontalFlip", "p": 0.5},
]
"""RF-DETR's recipe, which is DETR's: of every second picture a part, brought to the model's size, and flip."""

OFFICIAL_VIDEO: list[dict[str, Any]] = [
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "Affine", "p": 1.0, "rotate": [-25, 25], "shear": [-20, 20]},
    {"name": "ColorJitter", "p": 1.0, "brightness": 0.1, "contrast": 0.03, "saturation": 0.03, "hue": 0},
    {"name": "ToGray", "p": 0.05},
]
"""SAM 2's recipe for fine-tuning (sam2.1_hiera_b+_MOSE_finetune.yaml), without the colours that change from frame to
frame: flip, turn and shear, brightness, contrast and saturation, and now and then grey, the same through a clip."""


# ---------------------------------------------------------------------------------------------------------------------
# From a list of names to one sample


def resize(sample: Sample, size: Size, *, pad: bool = False) -> Sample:
    """Frames and masks at `size`; the aspect ratio is not kept, as in the official pipelines, unless with `pad`.

    With `pad` the picture lies at the top left, as large as fits (`content_size`); the rest has ImageNet's mean colour
    and is ignored. Bilinear without antialiasing (OpenCV's), for alpha as well: its edges become soft. Labels are those
    of the nearest pixel. Objects come back as `Layers`.
    """
    sample = layered(sample)
    height, width = sample.frames[0].shape[:2]
    inside = content_size((height, width), size) if pad else size
    frames = [_padded(_resize(frame, inside), size, MEAN_COLOR) for frame in sample.frames]
    masks = sample.masks
    kind = cv2.INTER_NEAREST_EXACT if sample.are_labels else cv2.INTER_LINEAR
    if isinstance(masks, Layers):
        scale = np.array([inside[1] / width, inside[0] / height] * 2, np.float32)
        maps = _padded(_resize(masks.maps, inside, kind), size, 0).reshape(*size, -1)
        masks = dataclasses.replace(masks, maps=maps, boxes=masks.boxes * scale)
        return tidied(dataclasses.replace(sample, frames=frames, masks=masks))  # small objects may be gone
    if masks is not None:
        masks = _padded(_resize(masks, inside, kind), size, IGNORED if sample.are_labels else 0)
    return dataclasses.replace(sample, frames=frames, masks=masks)


def content_size(picture: Size, size: Size) -> Size:
    """How large a picture is that just fits into `size`."""
    scale = min(size[0] / picture[0], size[1] / picture[1])
    return min(size[0], max(1, round(picture[0] * scale))), min(size[1], max(1, round(picture[1] * scale)))


def content_share(picture: Size, size: Size) -> tuple[float, float]:
    """The shares of the input's height and width that a padded picture takes."""
    inside = content_size(picture, size)
    return inside[0] / size[0], inside[1] / size[1]


def _resize(image: np.ndarray, size: Size, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    if image.shape[:2] == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=interpolation)


def _padded(image: np.ndarray, size: Size, fill: Any) -> np.ndarray:
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return image
    padded = np.full((*size, *image.shape[2:]), fill, image.dtype)
    padded[:height, :width] = image
    return padded


class Augment:
    """The listed transforms, in order, on a still image and its masks at the model's size.

    Each entry is `{name, p, **arguments}`: a transform of this file, or of albumentations; a composition (`OneOf`,
    `SomeOf`, `Sequential`) has its own list under `transforms`. OpenCV's constants go by name ("INTER_CUBIC"). A
    transform that needs a size and is given none gets the model's. Alpha is interpolated linearly throughout; labels
    never are, and what a transform fills up is ignored. Boxes of objects move with them, and are cut off at the
    picture's sides; where a list turns or bends pictures, or takes them to pieces, they are those of the objects'
    pixels, since the box of a turned box is too large.

    `takes_originals` says that the list chooses its own part of the picture at its own size (`ScaleCrop`, `SizeCrop`);
    else the picture is brought to the model's size first, as `resize` does it with `pad`.

    Raises:
        UserError: an unknown name or argument, a value that the transform refuses, or a transform that cannot do with
            such samples.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]], *, pad: bool = False):
        self.transforms, self.pad = list(transforms), pad
        self._composed: dict[tuple[Size, str], A.Compose] = {}
        built = self._compose((64, 64), "alpha").transforms  # so that mistakes show before the first sample
        self.takes_originals = any(isinstance(transform, (ScaleCrop, SizeCrop)) for transform in built)
        self._turns = _any_turns(built)

    def __call__(self, sample: Sample, size: Size, seeds: np.random.SeedSequence) -> Sample:
        sample = layered(sample) if self.takes_originals else resize(sample, size, pad=self.pad)
        objects = isinstance(sample.masks, Layers)
        composed = self._compose(size, "objects" if objects else "labels" if sample.are_labels else "alpha")
        generator = np.random.Generator(np.random.PCG64(seeds))
        # One pair of streams for the whole list; albumentations' own seeding would give each transform the same one.
        composed.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        cv2.setRNGSeed(int(generator.integers(2**31)))  # some transforms draw from OpenCV
        try:
            with np.errstate(invalid="ignore"):  # it divides by the area of boxes that a crop has left nothing of
                result = composed(**_targets(sample))
            if not isinstance(result["image"], np.ndarray) or result["image"].dtype != np.uint8:
                raise ValueError("a transform of the list returns no bytes; the program normalises pictures by itself")
        except Exception as error:  # whatever albumentations or OpenCV find in a sample that they were not made for
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            where = sample.path or "a sample"
            raise UserError(f"augmentation: the list cannot be applied to {where}: {reason}") from error
        return resize(self._changed(sample, result), size, pad=self.pad)

    def _changed(self, sample: Sample, result: dict[str, Any]) -> Sample:
        """The sample with what the transforms made of it, objects not yet tidied."""
        sample = dataclasses.replace(sample, frames=[result["image"]])
        layers = sample.masks
        if not isinstance(layers, Layers):
            return dataclasses.replace(sample, masks=result.get("mask"))
        maps = result["mask"].reshape(*result["image"].shape[:2], -1)
        boxes = _gathered(result["bboxes"], result["numbers"], len(layers.boxes))
        changed = Layers(maps, layers.layer_of, boxes)
        if self._turns:
            changed.boxes = extents(changed)
        return dataclasses.replace(sample, masks=changed)

    def _compose(self, size: Size, kind: str) -> A.Compose:
        """The transforms for a size and masks that are alpha, labels or objects."""
        if (size, kind) not in self._composed:
            built = [_build(entry, size, kind) for entry in self.transforms]
            if kind == "objects":
                built.append(A.NoOp(p=1))  # a list that leaves boxes alone would be warned about
            self._composed[size, kind] = A.Compose(
                built,
                mask_interpolation=cv2.INTER_LINEAR if kind == "alpha" else cv2.INTER_NEAREST,
                bbox_params=BOX_PARAMS if kind == "objects" else None,
            )
            if kind != "alpha":
                _center_labels(built)
        return self._composed[size, kind]


def _targets(sample: Sample) -> dict[str, Any]:
    """A sample as albumentations takes it; boxes carry the numbers of their objects."""
    (image,) = sample.frames
    masks = sample.masks
    if masks is None:
        return {"image": image}
    if isinstance(masks, Layers):
        return {"image": image, "mask": masks.maps, "bboxes": masks.boxes, "numbers": np.arange(len(masks.boxes))}
    return {"image": image, "mask": masks}


def _gathered(boxes: Any, numbers: Any, count: int) -> np.ndarray:
    """(count, 4) boxes by the numbers of their objects: around all parts of one, all 0 where none is left."""
    found = np.tile(np.array([np.inf, np.inf, 0, 0], np.float32), (count, 1))
    numbers = np.asarray(numbers, np.int64)
    np.minimum.at(found[:, :2], numbers, np.asarray(boxes, np.float32).reshape(-1, 4)[:, :2])
    np.maximum.at(found[:, 2:], numbers, np.asarray(boxes, np.float32).reshape(-1, 4)[:, 2:])
    found[np.isinf(found[:, 0])] = 0
    return found


def _center_labels(transforms: Sequence[Any]) -> None:
    """Where transforms resize, labels are those of the nearest centre, as pictures are: OpenCV's other nearest
    neighbour is half a pixel off, which is several where a small part is enlarged."""
    for each in transforms:
        if isinstance(each, RESIZING):
            each.mask_interpolation = cv2.INTER_NEAREST_EXACT
        _center_labels(getattr(each, "transforms", ()))


def _any_turns(transforms: Sequence[Any]) -> bool:
    """Whether boxes may come back larger than their objects."""
    return any(isinstance(each, TURNING) or _any_turns(getattr(each, "transforms", ())) for each in transforms)


def _build(entry: dict[str, Any], size: Size, kind: str) -> BasicTransform | BaseCompose:
    """One transform, or a composition with its children, from its entry in the list, for that kind of masks."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"augmentation: {entry!r} must be a mapping with the name of a transform, as {{name: Rotate}}")
    arguments = {key: _constant(value) for key, value in entry.items() if key != "name"}
    made = _transform_named(entry["name"])
    accepted = inspect.signature(made).parameters
    for key in arguments:
        if key not in accepted:
            known = f"it takes {', '.join(sorted(accepted))}"
            raise UserError(f"augmentation: {entry['name']} has no argument {key!r}{nearest(key, accepted)}; {known}")
    for key, value in (("size", size), ("height", size[0]), ("width", size[1])):
        if key in accepted:
            arguments.setdefault(key, value)
    if "fill_mask" in accepted:
        usual = accepted["fill_mask"].default
        if kind == "labels" and usual == 0:
            arguments.setdefault("fill_mask", IGNORED)
        if kind == "objects" and usual is None:  # of what holes hide, boxes are cut off as well
            arguments.setdefault("fill_mask", 0)
    if "transforms" in accepted:
        arguments["transforms"] = [_build(child, size, kind) for child in arguments.get("transforms", [])]
    try:
        return made(**arguments)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"augmentation: {entry['name']} refuses its arguments: {reason}") from error


def _constant(value: Any) -> Any:
    """`"INTER_CUBIC"` → `cv2.INTER_CUBIC`."""
    if isinstance(value, str) and value.startswith(("INTER_", "BORDER_")) and hasattr(cv2, value):
        return getattr(cv2, value)
    return value


def _transform_named(name: str) -> type:
    own = {kind.__name__: kind for kind in OWN_TRANSFORMS}
    found = own.get(name) or getattr(A, name, None)
    if inspect.isclass(found) and issubclass(found, (BasicTransform, BaseCompose)):
        return found
    known = [key for key, kind in vars(A).items() if inspect.isclass(kind) and issubclass(kind, BasicTransform)]
    raise UserError(f"augmentation: there is no transform {name!r}{nearest(name, [*own, *known])}")


# ---------------------------------------------------------------------------------------------------------------------
# Own transforms


class Enhance(A.ImageOnlyTransform):
    """Brightness, contrast, colour and sharpness, each by a factor drawn from its range; 1 leaves the image as it is.

    What PIL's ImageEnhance classes compute, in that order, with the two colour operations and the sharpening kernel
    each applied in one pass and rounded where PIL truncates (a level or two of difference).
    """

    class InitSchema(BasicTransform.InitSchema):
        brightness: Range
        contrast: Range
        color: Range
        sharpness: Range

    def __init__(
        self,
        brightness: Range = (0.5, 1.5),
        contrast: Range = (0.5, 1.5),
        color: Range = (0.0, 2.0),
        sharpness: Range = (0.0, 3.0),
        p: float = 0.5,
    ):
        super().__init__(p=p)
        self.brightness, self.contrast, self.color, self.sharpness = brightness, contrast, color, sharpness

    def get_params(self) -> dict[str, Any]:
        return {
            "factors": tuple(
                self.py_random.uniform(*limits)
                for limits in (self.brightness, self.contrast, self.color, self.sharpness)
            )
        }

    def apply(self, img: np.ndarray, factors: tuple[float, float, float, float], **params: Any) -> np.ndarray:
        brightness, contrast, color, sharpness = factors
        return sharpen(saturate(scale_contrast(scale_brightness(img, brightness), contrast), color), sharpness)


LUMINANCE = np.array([0.299, 0.587, 0.114])  # of RGB, ITU-R 601


def scale_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Towards (below 1) or away from (above 1) black."""
    return cv2.LUT(image, np.clip(np.arange(256) * factor, 0, 255).astype(np.uint8))


def scale_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Towards or away from the grey of the image's mean luminance."""
    mean = round(float(LUMINANCE @ cv2.mean(image)[:3]))
    return cv2.LUT(image, np.clip(mean + factor * (np.arange(256) - mean), 0, 255).astype(np.uint8))


def saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """Towards or away from each pixel's own luminance."""
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * np.tile(LUMINANCE, (3, 1)))


def sharpen(image: np.ndarray, factor: float) -> np.ndarray:
    """Towards or away from a smoothed image; the outermost pixels stay, as in PIL."""
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    identity = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    result = image.copy()
    result[1:-1, 1:-1] = cv2.filter2D(image, -1, factor * identity + (1 - factor) * smooth)[1:-1, 1:-1]
    return result


class PepperNoise(A.ImageOnlyTransform):
    """A share of the pixels, at random places, turned black or white."""

    class InitSchema(BasicTransform.InitSchema):
        amount: float

    def __init__(self, amount: float = 0.0015, p: float = 0.5):
        super().__init__(p=p)
        self.amount = amount

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        places = self.random_generator.integers(height * width, size=int(self.amount * height * width))
        return {"places": places, "values": 255 * self.random_generator.integers(2, size=len(places), dtype=np.uint8)}

    def apply(self, img: np.ndarray, places: np.ndarray, values: np.ndarray, **params: Any) -> np.ndarray:
        noisy = img.copy()
        noisy.reshape(-1, img.shape[-1])[places] = values[:, None]
        return noisy


class RotateZoom(A.DualTransform):
    """Rotation by up to `limit` degrees and a zoom about the centre, without black corners.

    `border="crop"` first enlarges as far as the rotation needs to fill the frame, and zooms from there (zoom >= 1);
    `border="reflect"` mirrors the picture at its edges, and may zoom out; mirrored parts of objects are none.
    """

    class InitSchema(BasicTransform.InitSchema):
        limit: float
        zoom: Range
        border: str

    def __init__(self, limit: float = 30.0, zoom: Range = (1.0, 1.5), border: str = "crop", p: float = 0.5):
        super().__init__(p=p)
        if border not in ("crop", "reflect"):
            raise ValueError(f"border must be crop or reflect, not {border!r}")
        if min(zoom) < (1.0 if border == "crop" else 0.1):
            raise ValueError(f"zoom {zoom} must be at least 1 with border crop, 0.1 with border reflect")
        self.limit, self.zoom, self.border = limit, zoom, border
        self.mask_interpolation = cv2.INTER_LINEAR

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        angle, zoom = self.py_random.uniform(-self.limit, self.limit), self.py_random.uniform(*self.zoom)
        if self.border == "crop":
            radians, aspect = math.radians(abs(angle)), max(height / width, width / height)
            # The frame's corners, turned back, must fall inside the picture; linear interpolation needs one pixel more.
            zoom *= (abs(math.cos(radians)) + aspect * math.sin(radians)) * (1 + 2 / min(height, width))
        return {"matrix": cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, zoom)}

    def apply(self, img: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        return warp(img, matrix, (img.shape[0], img.shape[1]), cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101)

    def apply_to_mask(self, mask: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        border = cv2.BORDER_CONSTANT if mask.ndim == 3 else cv2.BORDER_REFLECT_101
        return warp(mask, matrix, (mask.shape[0], mask.shape[1]), self.mask_interpolation, border)

    def apply_to_bboxes(self, bboxes: np.ndarray, matrix: np.ndarray, **params: Any) -> np.ndarray:
        size = params["shape"][:2]
        return move_boxes(bboxes, matrix, size, size)


def warp(image: np.ndarray, matrix: np.ndarray, size: Size, interpolation: int, border: int) -> np.ndarray:
    """`cv2.warpAffine` for any number of channels."""
    parts = [image] if image.ndim == 2 or image.shape[2] <= 4 else np.split(image, range(4, image.shape[2], 4), axis=2)
    warped = [cv2.warpAffine(part, matrix, size[::-1], flags=interpolation, borderMode=border) for part in parts]
    return warped[0] if len(warped) == 1 else np.dstack(warped)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, before: Size, after: Size) -> np.ndarray:
    """Boxes (n, 4 or more) as shares of a picture's sides → those around them when `matrix` has moved its pixels.

    `matrix` (2, 3) takes centres of pixels to centres of pixels, as OpenCV's functions do; a pixel's own corners are
    half a pixel from there.
    """
    height, width = before
    corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2) * [width, height] - 0.5
    moved = (corners @ matrix[:, :2].T + matrix[:, 2] + 0.5) / [after[1], after[0]]
    return np.hstack([moved.min(axis=1), moved.max(axis=1), boxes[:, 4:]]).astype(boxes.dtype)


class BackgroundSynthesis(A.ImageOnlyTransform):
    """The foreground on one flat colour, composited with its soft alpha.

    As in the official code: 40 % one grey, 40 % the foreground's mean colour made up to 20 % lighter or darker (hard
    negatives), 20 % any colour. The mean is weighted by alpha here (there: over all of alpha above 0), and an image
    without foreground stays as it is (there: not a number).
    """

    @property
    def targets_as_params(self) -> list[str]:
        return ["image", "mask"]

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        image, alpha = data["image"], data["mask"]
        total = float(alpha.sum(dtype=np.int64))
        if total == 0:
            return {"alpha": np.full_like(alpha, 255), "color": np.zeros(3)}
        choice = self.py_random.random()
        if choice < 0.4:
            color = np.full(3, self.py_random.randint(0, 255))
        elif choice < 0.8:
            mean = np.einsum("hwc,hw->c", image, alpha, dtype=np.float64) / total
            lighter, amount = self.py_random.random() < 0.5, self.py_random.uniform(0, 0.2)
            color = mean + amount * (255 - mean) if lighter else mean - amount * mean
        else:
            color = np.array([self.py_random.randint(0, 255) for _ in range(3)])
        return {"alpha": alpha, "color": color}

    def apply(self, img: np.ndarray, alpha: np.ndarray, color: np.ndarray, **params: Any) -> np.ndarray:
        weight = alpha[:, :, None].astype(np.float32) / 255
        return np.rint(img * weight + color.astype(np.float32) * (1 - weight)).astype(np.uint8)


class ScaleCrop(A.DualTransform):
    """A window of `size` on the picture at a scale drawn from its range.

    At 1 the picture just covers the window, or with `fit="inside"` just fits in: large-scale jitter (Ghiasi et al.,
    2021) is that, from 0.1 to 2. Where the picture ends the window is filled up: the image with ImageNet's mean, masks
    with `fill_mask`. Of labels no class shall take `cat_max_ratio` of the window or more, for which ten places are
    tried (MMSegmentation's RandomCrop); ignored ones do not count. Takes the picture as it is, and resamples nothing
    but the window.
    """

    class InitSchema(BasicTransform.InitSchema):
        size: tuple[int, int]
        scale: Range
        fit: str
        cat_max_ratio: float
        fill_mask: float

    def __init__(
        self,
        size: tuple[int, int],
        scale: Range = (0.5, 2.0),
        fit: str = "cover",
        cat_max_ratio: float = 1.0,
        fill_mask: float = 0,
        p: float = 1.0,
    ):
        super().__init__(p=p)
        if min(scale) <= 0:
            raise ValueError(f"scale {scale} must be above 0")
        if fit not in ("cover", "inside"):
            raise ValueError(f"fit must be cover or inside, not {fit!r}")
        self.fit = max if fit == "cover" else min
        self.size, self.scale, self.cat_max_ratio, self.fill_mask = size, scale, cat_max_ratio, fill_mask
        self.mask_interpolation = cv2.INTER_LINEAR

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        (height, width), (rows, columns) = params["shape"][:2], self.size
        factor = self.py_random.uniform(*self.scale) * self.fit(rows / height, columns / width)
        scaled = round(height * factor), round(width * factor)
        for _ in range(10):
            top, left = (self.py_random.uniform(0, max(0, a - b)) for a, b in zip(scaled, self.size, strict=True))
            if self.cat_max_ratio >= 1 or not self._is_dominated(data["mask"], top, left, factor):
                break
        shift = (factor - 1) / 2  # of pixel centres
        matrix = np.array([[factor, 0, shift - left], [0, factor, shift - top]])
        return {"matrix": matrix, "inside": (min(rows, scaled[0]), min(columns, scaled[1]))}

    def _is_dominated(self, labels: np.ndarray, top: float, left: float, factor: float) -> bool:
        """Whether one class takes too much of the window, by about as many of its pixels as the window will have."""
        if labels.ndim == 3:
            raise ValueError("cat_max_ratio is for label maps, not for objects")
        step = max(1, int(1 / factor))
        rows, columns = (
            slice(int(start / factor), math.ceil((start + side) / factor), step)
            for start, side in zip((top, left), self.size, strict=True)
        )
        counts = np.bincount(labels[rows, columns].ravel(), minlength=256)[:IGNORED]
        return counts.max() >= self.cat_max_ratio * counts.sum()

    def apply(self, img: np.ndarray, matrix: np.ndarray, inside: Size, **params: Any) -> np.ndarray:
        return self._window(img, matrix, inside, cv2.INTER_LINEAR, MEAN_COLOR)

    def apply_to_mask(self, mask: np.ndarray, matrix: np.ndarray, inside: Size, **params: Any) -> np.ndarray:
        return self._window(mask, matrix, inside, self.mask_interpolation, self.fill_mask)

    def apply_to_bboxes(self, bboxes: np.ndarray, matrix: np.ndarray, inside: Size, **params: Any) -> np.ndarray:
        moved = move_boxes(bboxes, matrix, params["shape"][:2], self.size)
        ends = [inside[1] / self.size[1], inside[0] / self.size[0]] * 2
        return np.hstack([np.clip(moved[:, :4], 0, ends), moved[:, 4:]]).astype(bboxes.dtype)

    def _window(self, image: np.ndarray, matrix: np.ndarray, inside: Size, interpolation: int, fill: Any) -> np.ndarray:
        window = warp(image, matrix, self.size, interpolation, cv2.BORDER_REPLICATE)
        window[inside[0] :] = fill
        window[:, inside[1] :] = fill
        return window


class SizeCrop(A.DualTransform):
    """A part of the picture of random sides, cut out and not resampled (DETR, Carion et al., 2020).

    With the picture's shorter side at one of `shorter` pixels, each side of the part is drawn from the range `sides`,
    as far as the picture goes.
    """

    class InitSchema(BasicTransform.InitSchema):
        shorter: list[int]
        sides: tuple[int, int]

    def __init__(self, shorter: Sequence[int] = (400, 500, 600), sides: tuple[int, int] = (384, 600), p: float = 0.5):
        super().__init__(p=p)
        if not shorter or min(shorter) < 1 or not 1 <= sides[0] <= sides[1]:
            raise ValueError("shorter must be sides in pixels, sides a range of them")
        self.shorter, self.sides = shorter, sides

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        whole = params["shape"][:2]
        scale = self.py_random.choice(self.shorter) / min(whole)
        part = []
        for length in (whole[1], whole[0]):
            high = min(self.sides[1], round(length * scale))
            side = min(length, max(1, round(self.py_random.randint(min(self.sides[0], high), high) / scale)))
            first = self.py_random.randint(0, length - side)
            part.append((first, first + side))
        return {"part": part}

    def apply(self, img: np.ndarray, part: list[tuple[int, int]], **params: Any) -> np.ndarray:
        (left, right), (top, bottom) = part
        return np.ascontiguousarray(img[top:bottom, left:right])

    def apply_to_mask(self, mask: np.ndarray, part: list[tuple[int, int]], **params: Any) -> np.ndarray:
        return self.apply(mask, part)

    def apply_to_bboxes(self, bboxes: np.ndarray, part: list[tuple[int, int]], **params: Any) -> np.ndarray:
        (left, right), (top, bottom) = part
        matrix = np.array([[1, 0, -left], [0, 1, -top]], np.float64)
        return move_boxes(bboxes, matrix, params["shape"][:2], (bottom - top, right - left))


class PhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each changed in every second picture (SSD, Liu et al., 2016).

    As in MMSegmentation: brightness in levels, contrast as a factor of all values, before or after the colours, hue in
    OpenCV's 180 steps.
    """

    class InitSchema(BasicTransform.InitSchema):
        brightness: float
        contrast: Range
        saturation: Range
        hue: int

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: Range = (0.5, 1.5),
        saturation: Range = (0.5, 1.5),
        hue: int = 18,
        p: float = 0.5,
    ):
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def get_params(self) -> dict[str, Any]:
        draw = self.py_random
        return {
            "brightness": draw.uniform(-self.brightness, self.brightness) if draw.random() < 0.5 else 0.0,
            "contrast": draw.uniform(*self.contrast) if draw.random() < 0.5 else 1.0,
            "contrast_first": draw.random() < 0.5,
            "saturation": draw.uniform(*self.saturation) if draw.random() < 0.5 else 1.0,
            "hue": draw.randint(-self.hue, self.hue) if draw.random() < 0.5 else 0,
        }

    def apply(
        self,
        img: np.ndarray,
        brightness: float,
        contrast: float,
        contrast_first: bool,
        saturation: float,
        hue: int,
        **params: Any,
    ) -> np.ndarray:
        levels = np.clip(np.arange(256) + brightness, 0, 255)
        if contrast_first:
            levels = np.clip(levels * contrast, 0, 255)
        image = cv2.LUT(img, levels.astype(np.uint8))
        if saturation != 1 or hue:
            image = change_colors(image, saturation, hue)
        return image if contrast_first else scale_brightness(image, contrast)


def change_colors(image: np.ndarray, saturation: float, hue: int) -> np.ndarray:
    """Saturation by a factor, hue by steps of two degrees."""
    levels = np.arange(256)
    table = np.stack([(levels + hue) % 180, np.clip(levels * saturation, 0, 255), levels], axis=-1).astype(np.uint8)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None]), cv2.COLOR_HSV2RGB)


# ---------------------------------------------------------------------------------------------------------------------
# Policies: one or a few operations of a list for each picture


def policy_operations(strength: float, fill_mask: float) -> list[BasicTransform]:
    """The fourteen operations of RandAugment (Cubuk et al., 2019, table 6 of AutoAugment), each drawing its amount from
    the share `strength` of its range to both sides. Masks follow those that move pixels."""

    def move(**how: Any) -> BasicTransform:
        constant = cv2.BORDER_CONSTANT
        return A.Affine(**how, border_mode=constant, fill=MEAN_COLOR, fill_mask=fill_mask, p=1)

    def enhance(what: str) -> BasicTransform:
        unchanged: dict[str, Any] = dict.fromkeys(("brightness", "contrast", "color", "sharpness"), (1.0, 1.0))
        return Enhance(**{**unchanged, what: (1 - 0.9 * strength, 1 + 0.9 * strength)}, p=1)

    def both_ways(limit: float) -> Range:
        return (-limit * strength, limit * strength)

    return [
        A.NoOp(p=1),
        A.AutoContrast(method="pil", p=1),
        A.Equalize(mode="pil", p=1),
        A.Solarize(threshold_range=(1 - strength, 1.0), p=1),
        A.Posterize(num_bits=(round(8 - 4 * strength), 8), p=1),
        enhance("brightness"),
        enhance("contrast"),
        enhance("color"),
        enhance("sharpness"),
        move(rotate=both_ways(30)),
        move(shear={"x": both_ways(17), "y": 0}),
        move(shear={"x": 0, "y": both_ways(17)}),
        move(translate_percent={"x": both_ways(0.3), "y": 0}),
        move(translate_percent={"x": 0, "y": both_ways(0.3)}),
    ]


class TrivialAugment(A.OneOf):
    """One operation for each picture, of any amount (Müller and Hutter, 2021, over RandAugment's operations)."""

    def __init__(self, fill_mask: float = 0, p: float = 1.0):
        super().__init__(policy_operations(1.0, fill_mask), p=p)


class RandAugment(A.SomeOf):
    """`operations` of them one after the other, of amounts up to `magnitude` thirtieths (Cubuk et al., 2019, where each
    has that amount exactly)."""

    def __init__(self, operations: int = 2, magnitude: float = 9, fill_mask: float = 0, p: float = 1.0):
        if not (operations >= 1 and 0 < magnitude <= 30):
            raise ValueError("operations must be at least 1, magnitude above 0 and at most 30")
        super().__init__(policy_operations(magnitude / 30, fill_mask), n=operations, replace=True, p=p)


OWN_TRANSFORMS: tuple[type, ...] = (
    Enhance,
    PepperNoise,
    RotateZoom,
    BackgroundSynthesis,
    ScaleCrop,
    SizeCrop,
    PhotometricDistortion,
    TrivialAugment,
    RandAugment,
)

TURNING = (
    RotateZoom,
    A.Affine,
    A.ElasticTransform,
    A.FrequencyMasking,
    A.GridDistortion,
    A.GridElasticDeform,
    A.Morphological,
    A.OpticalDistortion,
    A.Perspective,
    A.PiecewiseAffine,
    A.RandomGridShuffle,
    A.Rotate,
    A.SafeRotate,
    A.ThinPlateSpline,
    A.TimeMasking,
)  # that know of an object too little to say what its box becomes

RESIZING = (
    A.CropAndPad,
    A.LongestMaxSize,
    A.RandomResizedCrop,
    A.RandomScale,
    A.RandomSizedBBoxSafeCrop,
    A.RandomSizedCrop,
    A.Resize,
    A.SmallestMaxSize,
)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


def preview_sheet(samples: Sequence[Sample], *, columns: int = 4, cell: int = 192) -> np.ndarray:
    """A contact sheet, (H, W, 3) uint8 RGB: each sample's image beside its masks, `cell` pixels wide, with its name.

    Labels have the colours of `colors.palette`, objects one each, with their boxes.
    """
    cells = [_preview_cell(sample, cell) for sample in samples]
    columns = min(columns, len(cells))
    height, width = max(c.shape[0] for c in cells), cells[0].shape[1]
    sheet = np.full((math.ceil(len(cells) / columns) * height, columns * width, 3), 32, np.uint8)
    for i, picture in enumerate(cells):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + picture.shape[0], left : left + width] = picture
    return sheet


def _preview_cell(sample: Sample, cell: int) -> np.ndarray:
    """Image and masks side by side, a caption below, a margin around."""
    height, width = sample.frames[0].shape[:2]
    sample = resize(sample, (max(1, round(height * cell / width)), cell))
    both = np.hstack([sample.frames[0], _drawn(sample)])
    framed = cv2.copyMakeBorder(both, 4, 20, 4, 4, cv2.BORDER_CONSTANT, value=(32, 32, 32))
    place = (6, framed.shape[0] - 6)
    caption = sample.sample_id.encode("ascii", "replace").decode()  # OpenCV's fonts know no other letters
    return cv2.putText(framed, caption, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (220, 220, 220), 1, cv2.LINE_AA)


def _drawn(sample: Sample) -> np.ndarray:
    """The masks as people see them, (H, W, 3)."""
    masks = sample.masks
    if masks is None:
        return np.zeros_like(sample.frames[0])
    if not isinstance(masks, Layers):
        return palette()[masks] if sample.are_labels else np.repeat(masks[:, :, None], 3, axis=2)
    colors = np.concatenate([np.zeros((1, 3), np.uint8), object_colors(len(masks.boxes))])
    picture = colors[masks.maps.max(axis=2)]
    for color, box in zip(colors[1:].tolist(), np.rint(masks.boxes).astype(int).tolist(), strict=True):
        cv2.rectangle(picture, box[:2], (box[2] - 1, box[3] - 1), color, 1)
    return picture

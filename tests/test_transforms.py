"""Augmentation keeps image and mask together, is a pure function of its seed, and says what it does not know."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance
from pycocotools import mask as coco_mask

import transforms
from colors import palette
from errors import UserError
from layers import extents
from samples import Objects, Sample
from tests.conftest import ROOT
from transforms import (
    OFFICIAL_BINARY,
    OFFICIAL_INSTANCE,
    OFFICIAL_SEMANTIC,
    Augment,
    ScaleCrop,
    content_size,
    preview_sheet,
    resize,
)

SIZE = (72, 96)
BACKGROUND = {"name": "BackgroundSynthesis", "p": 1.0}

STRONG: list[dict[str, Any]] = [
    {"name": "HorizontalFlip", "p": 0.5},
    {"name": "VerticalFlip", "p": 0.5},
    {"name": "RandomResizedCrop", "p": 0.7, "scale": [0.5, 1.0], "ratio": [0.75, 1.333]},
    {"name": "RotateZoom", "p": 0.5, "limit": 45, "zoom": [0.9, 1.2], "border": "reflect"},
    {"name": "Enhance", "p": 0.8, "brightness": [0.6, 1.4], "contrast": [0.6, 1.4], "color": [0.3, 1.7]},
    {"name": "HueSaturationValue", "p": 0.3},
    {"name": "GaussianBlur", "p": 0.1, "sigma_limit": [0.3, 1.5]},
    {"name": "GaussNoise", "p": 0.2, "std_range": [0.01, 0.06]},
]


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Sample:
    """A smooth random image whose red channel is also its alpha."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
    image = np.clip(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    return Sample([image], image[:, :, 0].copy(), [3], f"picture/{seed}", "x.png", "a")


def scene(seed: int = 0, size: tuple[int, int] = (90, 150)) -> Sample:
    """A smooth random picture and labels 0 to 4 that follow its red channel, the darkest ignored."""
    sample = picture(seed, size)
    labels = sample.masks // 50
    labels[labels == 5] = 255
    return Sample(sample.frames, labels, are_labels=True, sample_id=f"scene/{seed}")


def seeds(*key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([7, *key])


POLICIES: list[dict[str, Any]] = [{"name": "TrivialAugment"}, {"name": "RandAugment", "operations": 3, "magnitude": 20}]


@pytest.mark.parametrize(
    "recipe",
    [OFFICIAL_BINARY, STRONG, [BACKGROUND], OFFICIAL_SEMANTIC, POLICIES],
    ids=["official", "strong", "background", "semantic", "policies"],
)
def test_recipes_are_pure_functions_of_the_seed(recipe: list[dict]) -> None:
    augment, sample = Augment(recipe), picture()
    kept = copy.deepcopy(sample)
    results = [augment(sample, SIZE, seeds(i)) for i in range(12)]
    for i in (11, 3, 7):  # in another order, by another object
        again = Augment(recipe)(sample, SIZE, seeds(i))
        np.testing.assert_array_equal(again.frames[0], results[i].frames[0])
        np.testing.assert_array_equal(again.masks, results[i].masks)
    assert len({result.frames[0].tobytes() for result in results}) > 6
    np.testing.assert_array_equal(sample.frames[0], kept.frames[0])
    np.testing.assert_array_equal(sample.masks, kept.masks)
    for result in results:
        assert result.frames[0].shape == (*SIZE, 3)
        assert result.masks.shape == SIZE
        assert result.frames[0].dtype == result.masks.dtype == np.uint8
        assert (result.class_ids, result.sample_id) == ([3], "picture/0")


def _digest(seed: int) -> bytes:
    return Augment(STRONG)(picture(), SIZE, seeds(seed)).frames[0].tobytes()


def test_another_process_computes_the_same() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_digest, range(4)) == [_digest(i) for i in range(4)]


def test_transforms_of_a_list_draw_independently() -> None:
    """With one stream for each transform the two flips would always coincide."""
    flips = Augment([{"name": "HorizontalFlip"}, {"name": "VerticalFlip"}])
    alpha = picture().masks
    expected = {"none": alpha, "h": alpha[:, ::-1], "v": alpha[::-1], "both": alpha[::-1, ::-1]}
    counts = dict.fromkeys(expected, 0)
    for i in range(200):
        result = flips(picture(), SIZE, seeds(i)).masks
        counts[next(name for name, array in expected.items() if np.array_equal(result, array))] += 1
    assert min(counts.values()) > 25


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "RotateZoom", "p": 1.0, "limit": 40},
        {"name": "RotateZoom", "p": 1.0, "limit": 40, "zoom": [0.7, 1.2], "border": "reflect"},
        {"name": "RandomResizedCrop", "p": 1.0, "scale": [0.5, 1.0]},
        {"name": "Affine", "p": 1.0, "rotate": [-20, 20], "border_mode": "BORDER_REFLECT_101"},
        {
            "name": "OneOf",
            "p": 1.0,
            "transforms": [{"name": "HorizontalFlip", "p": 1.0}, {"name": "Transpose", "p": 1.0}],
        },
    ],
    ids=lambda entry: entry["name"],
)
def test_geometry_moves_alpha_with_the_image_and_keeps_it_soft(entry: dict) -> None:
    augment = Augment([entry])
    for i in range(10):
        result = augment(picture(i), SIZE, seeds(i))
        difference = np.abs(result.frames[0][:, :, 0].astype(int) - result.masks)
        assert difference.max() <= 1  # nearest-neighbour masks would differ by many levels
        assert len(np.unique(result.masks)) > 60


def test_rotate_zoom_leaves_no_border() -> None:
    white = Sample([np.full((*SIZE, 3), 255, np.uint8)], np.full(SIZE, 255, np.uint8))
    marked = copy.deepcopy(white)
    for array in (marked.frames[0], marked.masks):
        array[[0, -1]] = 0
        array[:, [0, -1]] = 0
    crop = Augment([{"name": "RotateZoom", "p": 1.0, "limit": 45, "zoom": [1.0, 1.0]}])
    black = Augment([{"name": "Rotate", "p": 1.0, "limit": [20, 45], "border_mode": "BORDER_CONSTANT"}])
    for i in range(20):
        assert crop(white, SIZE, seeds(i)).masks.min() == 255
        assert crop(marked, SIZE, seeds(i)).masks.mean() > 250  # at most touches the picture's own edge
    assert black(white, SIZE, seeds(0)).masks.min() == 0


def test_enhancing_agrees_with_pil() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image[:20] = picture(size=(20, 50)).frames[0]
    ours = (transforms.scale_brightness, transforms.scale_contrast, transforms.saturate, transforms.sharpen)
    theirs = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, ImageEnhance.Sharpness)
    for enhance, reference in zip(ours, theirs, strict=True):
        for factor in (0.0, 0.5, 1.0, 1.4, 2.0, 3.0):
            expected = np.asarray(reference(Image.fromarray(image)).enhance(factor)).astype(int)
            # PIL rounds the smoothed picture or the luminance first, and multiplies that error by the factor.
            assert np.abs(enhance(image, factor) - expected).max() <= max(1, np.ceil(factor)), (reference, factor)


def test_pepper_noise_is_rare_and_black_or_white() -> None:
    grey = Sample([np.full((200, 200, 3), 90, np.uint8)], np.zeros((200, 200), np.uint8))
    noisy = Augment([{"name": "PepperNoise", "p": 1.0, "amount": 0.0015}])(grey, (200, 200), seeds(0))
    changed = (noisy.frames[0] != 90).any(axis=2)
    assert 50 <= changed.sum() <= 60
    assert set(np.unique(noisy.frames[0][changed])) == {0, 255}
    assert not noisy.masks.any()


def test_background_synthesis_composites_with_soft_alpha() -> None:
    image = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    image[:, 20:] = (0, 255, 255)
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 255, 128
    augment = Augment([BACKGROUND])
    greys = near = 0
    for i in range(100):
        result = augment(Sample([image], alpha), (20, 30), seeds(i)).frames[0].astype(float)
        background = result[0, 25]
        assert (result[:, 20:] == background).all()
        assert (result[:, :10] == (200, 100, 50)).all()
        share = 128 / 255
        np.testing.assert_allclose(result[0, 15], share * np.array([200, 100, 50]) + (1 - share) * background, atol=1)
        is_grey = np.ptp(background) == 0
        lighter = np.array([200, 100, 50]) + 0.2 * (255 - np.array([200, 100, 50])) + 1
        darker = 0.8 * np.array([200, 100, 50]) - 1
        greys += is_grey
        near += not is_grey and bool(((background >= darker) & (background <= lighter)).all())
    assert 25 <= greys <= 55  # 40 % one grey
    assert 25 <= near <= 58  # 40 % the foreground's colour


def test_background_synthesis_without_foreground_changes_nothing() -> None:
    sample = Sample(picture().frames, np.zeros(SIZE, np.uint8))
    np.testing.assert_array_equal(Augment([BACKGROUND])(sample, SIZE, seeds(0)).frames[0], sample.frames[0])


def test_resize_is_opencvs_linear_and_leaves_equal_sizes_alone() -> None:
    sample = picture()
    assert resize(sample, SIZE).frames[0] is sample.frames[0]
    smaller = resize(sample, (30, 50))
    np.testing.assert_array_equal(smaller.masks, cv2.resize(sample.masks, (50, 30), interpolation=cv2.INTER_LINEAR))
    assert resize(Sample(sample.frames), (30, 50)).masks is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"name": "HorizontalFlop"}], "did you mean HorizontalFlip"),
        ([{"name": "RotateZoon"}], "did you mean RotateZoom"),
        ([{"name": "HorizontalFlip", "prob": 0.5}], "no argument 'prob'"),
        ([{"name": "RotateZoom", "limmit": 3}], "did you mean limit"),
        ([{"name": "RotateZoom", "border": "black"}], "RotateZoom refuses"),
        ([{"name": "Rotate", "limit": "much"}], "Rotate refuses"),
        ([{"name": "HorizontalFlip", "p": 1.5}], "HorizontalFlip refuses"),
        ([{"p": 0.5}], "must be a mapping with the name"),
        (["HorizontalFlip"], "must be a mapping with the name"),
        ([{"name": "os"}], "there is no transform 'os'"),
        ([{"name": "OneOf", "transforms": [{"name": "Nope"}]}], "there is no transform 'Nope'"),
    ],
)
def test_mistakes_are_named_before_the_first_sample(entries: list, message: str) -> None:
    with pytest.raises(UserError, match="augmentation") as caught:
        Augment(entries)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_preview_shows_each_image_beside_its_mask() -> None:
    samples = [picture(i) for i in range(5)] + [Sample(picture(9).frames, sample_id="größe/9")]
    sheet = preview_sheet(samples, columns=4, cell=96)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 4
    assert sheet.dtype == np.uint8
    for i, sample in enumerate(samples[:5]):
        cell = sheet[i // 4 * height :, i % 4 * width :][4:76, 4:196]
        np.testing.assert_array_equal(cell[:, :96], sample.frames[0])
        np.testing.assert_array_equal(cell[:, 96:], np.dstack([sample.masks] * 3))
    assert preview_sheet(samples[:1]).shape[1] == 2 * 192 + 8


# --- label maps


GEOMETRY: list[dict[str, Any]] = [
    {"name": "ScaleCrop", "scale": [0.3, 2.5]},
    {"name": "RandomResizedCrop", "p": 1.0, "scale": [0.2, 0.9]},
    {"name": "Rotate", "p": 1.0, "limit": 40, "border_mode": "BORDER_CONSTANT"},
    {"name": "RotateZoom", "p": 1.0, "limit": 40, "zoom": [0.7, 1.2], "border": "reflect"},
    {"name": "Affine", "p": 1.0, "shear": [-20, 20], "scale": [0.5, 1.5]},
    {"name": "ElasticTransform", "p": 1.0, "alpha": 60},
    {"name": "Perspective", "p": 1.0},
    {"name": "TrivialAugment"},
    {"name": "OneOf", "p": 1.0, "transforms": [{"name": "Rotate", "p": 1.0, "limit": [30, 40]}]},
]


@pytest.mark.parametrize("entry", GEOMETRY, ids=lambda entry: entry["name"])
def test_labels_are_never_interpolated(entry: dict) -> None:
    augment = Augment([entry])
    known = np.array([0, 4, 255])  # a mean of any two of them is none of them
    for i in range(12):
        sample = scene(i)
        sample.masks = known[sample.masks % 3].astype(np.uint8)
        assert set(np.unique(augment(sample, SIZE, seeds(i)).masks)) <= {0, 4, 255}


@pytest.mark.parametrize("name", ["Rotate", "Affine", "TrivialAugment", "RandAugment", "OneOf", "ScaleCrop"])
def test_what_is_filled_up_is_ignored_in_labels_and_empty_in_alpha(name: str) -> None:
    turn = {"name": "Rotate", "p": 1.0, "limit": [30, 40]}
    entries: dict[str, dict[str, Any]] = {
        "Rotate": turn,
        "Affine": {"name": "Affine", "p": 1.0, "translate_percent": [0.2, 0.3]},
        "ScaleCrop": {"name": "ScaleCrop", "scale": [0.4, 0.6]},
        "OneOf": {"name": "OneOf", "p": 1.0, "transforms": [turn]},
    }
    entry = entries.get(name, {"name": name})
    white = np.full((*SIZE, 3), 255, np.uint8)
    filled = 0
    for i in range(30):
        labels = Augment([entry])(Sample([white], np.full(SIZE, 3, np.uint8), are_labels=True), SIZE, seeds(i)).masks
        alpha = Augment([entry])(Sample([white], np.full(SIZE, 255, np.uint8)), SIZE, seeds(i)).masks
        assert set(np.unique(labels)) <= {3, 255}
        assert (alpha[labels == 3] > 100).all()
        assert (alpha[labels == 255] < 160).all()
        filled += (labels == 255).any()
    assert filled >= (5 if "Augment" in name else 30)


def test_dropped_out_parts_keep_their_labels() -> None:
    dropout = Augment([{"name": "CoarseDropout", "p": 1.0}])
    sample = scene(0, SIZE)
    result = dropout(sample, SIZE, seeds(0))
    assert (result.frames[0] != sample.frames[0]).any()
    np.testing.assert_array_equal(result.masks, sample.masks)


def test_geometry_moves_labels_with_the_image() -> None:
    """Labels are levels of the red channel, so wherever it is clear of a limit they can be read off the picture."""
    augment = Augment([{"name": "ScaleCrop", "scale": [0.6, 2.0]}, {"name": "HorizontalFlip"}])
    for i in range(10):
        result = augment(scene(i), SIZE, seeds(i))
        red = result.frames[0][:, :, 0]
        clear = (result.masks < 255) & (red % 50 > 10) & (red % 50 < 40)
        assert clear.sum() > 500
        np.testing.assert_array_equal(result.masks[clear], red[clear] // 50)


def test_resized_labels_are_those_of_the_nearest_centre() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(2, 6)
    sample = Sample([np.zeros((2, 6, 3), np.uint8)], labels, are_labels=True)
    np.testing.assert_array_equal(resize(sample, (2, 2)).masks, [[1, 4], [7, 10]])  # the middle ones of three
    np.testing.assert_array_equal(resize(sample, (4, 12)).masks, labels.repeat(2, 0).repeat(2, 1))


def test_a_crop_has_the_scale_that_it_is_asked_for() -> None:
    """A picture whose red and green tell the place: neighbours differ by as much as the scale says."""
    y, x = np.mgrid[:200, :240]
    place = np.dstack([x, y, 0 * x]).astype(np.uint8)
    for scale in (0.5, 1.0, 2.0):
        crop = Augment([{"name": "ScaleCrop", "scale": [scale, scale]}])
        assert crop.takes_originals
        for i in range(5):
            result = crop(Sample([place], y.astype(np.uint8), are_labels=True), (100, 100), seeds(i))
            window, labels = result.frames[0].astype(int), result.masks
            inside = labels != 255
            assert inside.mean() == pytest.approx(min(1, scale) * min(1, 1.2 * scale), abs=0.01)
            rows, columns = inside.any(1).sum(), inside.any(0).sum()
            slopes = (
                np.polyfit(range(columns), window[5, :columns, 0], 1),
                np.polyfit(range(rows), window[:rows, 5, 1], 1),
            )
            for slope, _ in slopes:
                assert slope == pytest.approx(2 / scale, rel=0.01)  # at 1 the short side of 200 becomes 100
            assert np.abs(window[:rows, :columns, 1] - labels[:rows, :columns]).max() <= 1
            assert (window[~inside] == transforms.MEAN_COLOR).all()


def test_a_crop_avoids_places_that_one_class_takes_over() -> None:
    labels = np.zeros((100, 800), np.uint8)
    labels[:, 600:650] = 1
    labels[:, :300] = 255  # ignored pixels count for no class
    sample = Sample([np.zeros((100, 800, 3), np.uint8)], labels, are_labels=True)

    def dominated(cat_max_ratio: float) -> int:
        crop = Augment([{"name": "ScaleCrop", "scale": [1.0, 1.0], "cat_max_ratio": cat_max_ratio}])
        found = [np.bincount(crop(sample, (100, 100), seeds(i)).masks.ravel(), minlength=256)[:2] for i in range(60)]
        return sum(counts.max() >= 0.75 * counts.sum() for counts in found)

    assert dominated(1.0) > 45
    assert dominated(0.75) < 30  # ten places are tried: about one in ten suits


def test_a_crop_at_any_place_needs_no_masks() -> None:
    result = Augment(OFFICIAL_SEMANTIC[1:])(Sample(scene().frames), SIZE, seeds(0))
    assert result.masks is None
    assert ScaleCrop((32, 32))(image=scene().frames[0])["image"].shape == (32, 32, 3)


def test_photometric_distortion_stays_within_its_ranges() -> None:
    grey = Sample([np.full((8, 8, 3), 100, np.uint8)])
    drawn = np.array([Augment([{"name": "PhotometricDistortion", "p": 1.0}])(grey, (8, 8), seeds(i)).frames[0][0, 0]
                      for i in range(300)]).astype(int)  # fmt: skip
    assert (drawn == drawn[:, :1]).all()  # grey has no colour to change
    assert 0.2 < (drawn[:, 0] == 100).mean() < 0.3  # neither brightness nor contrast
    assert 34 <= drawn.min() < 55
    assert 150 < drawn.max() <= 198
    red = np.full((1, 1, 3), (200, 40, 40), np.uint8)
    np.testing.assert_array_equal(transforms.change_colors(red, 1.0, 60), [[[40, 200, 40]]])
    np.testing.assert_allclose(transforms.change_colors(red, 0.5, 0)[0, 0], [200, 120, 120], atol=1)


def test_a_policy_is_one_operation_of_many() -> None:
    sample = scene(3, SIZE)
    results = [Augment([{"name": "TrivialAugment"}])(sample, SIZE, seeds(i)) for i in range(140)]
    moved = [not np.array_equal(result.masks, sample.masks) for result in results]
    changed = [not np.array_equal(result.frames[0], sample.frames[0]) for result in results]
    assert 30 < sum(moved) < 70  # five of fourteen move pixels
    assert sum(changed) > 100
    assert any(c and not m for c, m in zip(changed, moved, strict=True))
    with pytest.raises(UserError, match="RandAugment refuses its arguments: operations"):
        Augment([{"name": "RandAugment", "magnitude": 31}])


def test_the_preview_shows_labels_in_their_colours() -> None:
    sample = scene(0, SIZE)
    cell = preview_sheet([sample], cell=96)[4:76, 4:196]
    np.testing.assert_array_equal(cell[:, 96:], palette()[sample.masks])


# --- objects


def crowded(seed: int = 0, size: tuple[int, int] = (90, 150)) -> Sample:
    """Seven discs in overlap, and a crowd, on a black picture; discs are of their number's colour in three layers.

    The picture shows, in the channels, discs 0 to 2, so what transforms do to masks can be compared with it.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    discs = [np.hypot(y - rng.uniform(0, size[0]), x - rng.uniform(0, size[1])) < rng.uniform(12, 30) for _ in range(8)]
    codes = [coco_mask.encode(np.asfortranarray(disc.astype(np.uint8))) for disc in discs]
    boxes = np.array([coco_mask.toBbox(code) for code in codes])
    boxes[:, 2:] += boxes[:, :2]
    objects = Objects(codes, boxes.astype(np.float32), np.arange(8) == 3, np.zeros(8))
    image = 255 * np.dstack(discs[:3]).astype(np.uint8)
    return Sample([image], objects, list(range(8)), f"crowded/{seed}", are_labels=True)


def mask(sample: Sample, number: int) -> np.ndarray:
    return sample.masks.maps[..., sample.masks.layer_of[number]] == number + 1


def in_step(result: Sample, share: float = 0.9, reach: float = 1.0) -> None:
    """Masks are where the picture has their discs, boxes around them, and every object has both."""
    layers = result.masks
    height, width = result.frames[0].shape[:2]
    assert layers.maps.dtype == np.uint16
    assert layers.maps.shape[:2] == (height, width)
    assert layers.boxes.shape == (len(result.class_ids), 4)
    assert layers.boxes.min(initial=0) >= 0
    assert (layers.boxes <= np.array([width, height] * 2)).all()
    assert set(np.unique(layers.maps)) - {0} == set(range(1, len(result.class_ids) + 1))
    tight = extents(layers)
    for number, label in enumerate(result.class_ids):
        if label < 3 and mask(result, number).sum() > 100:
            drawn = result.frames[0][..., label] > 127
            assert drawn[mask(result, number)].mean() >= share, label
        assert (layers.boxes[number] - tight[number])[:2].max() <= reach
        assert (tight[number] - layers.boxes[number])[2:].max() <= reach


def test_objects_become_layers_without_crowds() -> None:
    sample = crowded()
    result = resize(sample, (90, 150))
    assert result.class_ids == [0, 1, 2, 4, 5, 6, 7]
    assert 1 < result.masks.maps.shape[2] < 7
    for number, label in enumerate(result.class_ids):
        np.testing.assert_array_equal(mask(result, number), coco_mask.decode(sample.masks.codes[label]))
    np.testing.assert_array_equal(extents(result.masks), result.masks.boxes)
    in_step(resize(sample, (45, 200)))
    in_step(resize(sample, (45, 40), pad=True))
    assert resize(crowded(), (4, 4)).masks.maps.shape[:2] == (4, 4)


def test_objects_without_pixels_or_a_box_are_left_out_where_the_model_looks() -> None:
    sample = crowded()
    objects = sample.masks
    objects.codes[0] = coco_mask.encode(np.zeros((90, 150), np.uint8, order="F"))
    objects.boxes[1] = (10, 10, 10, 20)
    objects.boxes[2] = (-20, 0, -10, 90)
    dot = np.zeros((90, 150), np.uint8)
    dot[7, 37] = 1  # which no centre of the small picture's pixels meets
    objects.codes[4] = coco_mask.encode(np.asfortranarray(dot))
    assert resize(sample, (90, 150)).class_ids == [4, 5, 6, 7]
    assert 4 not in resize(sample, (3, 5)).class_ids
    nothing = Sample(sample.frames, Objects([], np.zeros((0, 4), np.float32), np.zeros(0, bool), np.zeros(0)))
    empty = Augment([{"name": "HorizontalFlip"}, {"name": "Rotate", "p": 1}])(nothing, SIZE, seeds(0))
    assert (empty.class_ids, empty.masks.maps.shape) == ([], (*SIZE, 1))
    assert empty.masks.boxes.shape == (0, 4)


OBJECT_LISTS: dict[str, list[dict[str, Any]]] = {
    "official": OFFICIAL_INSTANCE,
    "size crop": [{"name": "SizeCrop", "p": 1.0, "shorter": [100], "sides": [40, 90]}],
    "jitter": [{"name": "ScaleCrop", "scale": [0.1, 2.0], "fit": "inside"}],
    "zoom": [{"name": "RotateZoom", "p": 1.0, "limit": 40}],
    "reflect": [{"name": "RotateZoom", "p": 1.0, "limit": 40, "zoom": [0.6, 1.2], "border": "reflect"}],
    "policies": POLICIES,
    **{entry["name"]: [entry] for entry in GEOMETRY},
}


@pytest.mark.parametrize("name", OBJECT_LISTS)
@pytest.mark.parametrize("pad", [False, True])
def test_masks_boxes_and_classes_move_with_the_picture(name: str, pad: bool) -> None:
    augment = Augment(OBJECT_LISTS[name], pad=pad)
    share = 0.0 if name in ("policies", "TrivialAugment") else 0.85  # those change colours
    for i in range(8):
        result = augment(crowded(i), SIZE, seeds(i))
        in_step(result, share, reach=3)  # a pixel of a small part becomes several
        again = augment(crowded(i), SIZE, seeds(i))
        np.testing.assert_array_equal(result.masks.maps, again.masks.maps)
        np.testing.assert_array_equal(result.masks.boxes, again.masks.boxes)
        assert result.class_ids == again.class_ids


def test_boxes_keep_their_fractions_where_pictures_are_only_cut_and_flipped() -> None:
    sample = crowded()
    sample.masks.boxes += np.array([-0.25, 0.125, 0.25, -0.125], np.float32)
    flipped = Augment([{"name": "HorizontalFlip", "p": 1.0}])(sample, (90, 150), seeds(0))
    boxes = resize(sample, (90, 150)).masks.boxes
    np.testing.assert_allclose(flipped.masks.boxes[:, [2, 0]], 150 - boxes[:, [0, 2]], atol=1e-4)
    np.testing.assert_allclose(flipped.masks.boxes[:, [1, 3]], boxes[:, [1, 3]], atol=1e-4)
    crop = Augment([{"name": "SizeCrop", "p": 1.0, "shorter": [90], "sides": [40, 60]}])
    assert crop.takes_originals
    whole = Augment([{"name": "ScaleCrop", "scale": [1.0, 1.0], "fit": "inside"}])(sample, (60, 100), seeds(0))
    np.testing.assert_allclose(whole.masks.boxes, boxes / 1.5, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of its own transforms that are slow or have other names now
def test_every_transform_by_name_moves_objects_or_is_refused_in_a_sentence() -> None:
    needed: dict[str, dict[str, Any]] = {
        "Crop": {"x_max": 60, "y_max": 50},
        "CropAndPad": {"px": 5},
        "GridElasticDeform": {"num_grid_xy": [3, 3], "magnitude": 5},
        "LongestMaxSize": {"max_size": 80},
        "PadIfNeeded": {"min_height": 99, "min_width": 99},
        "RandomSizedCrop": {"min_max_height": [30, 60]},
        "SmallestMaxSize": {"max_size": 50},
    }
    names = [name for name, kind in vars(A).items() if isinstance(kind, type) and issubclass(kind, A.DualTransform)]
    refused = []
    for name in names:
        try:
            augment = Augment([{"name": name, "p": 1.0, **needed.get(name, {})}])
            for i in range(2):
                result = augment(crowded(i), SIZE, seeds(i))
                assert result.frames[0].shape[:2] == SIZE
                in_step(result, share=0.0, reach=2)
        except UserError as error:
            refused.append(name if "\n" not in str(error) else str(error))
    assert len(names) > 50
    assert all("3D" in name or name in REFUSED for name in refused), refused


REFUSED = (  # what they are named after, for several pictures, or in need of what a list in YAML cannot give
    "DualTransform", "CubicSymmetry", "Transform3D", "MaskDropout", "Mosaic", "OverlayElements", "RandomCropNearBBox",
    "Lambda",
)  # fmt: skip


def test_lists_that_do_not_suit_the_sample_are_named() -> None:
    for entry, problem in (
        ({"name": "MaskDropout", "p": 1.0}, "cannot be applied to"),
        ({"name": "ScaleCrop", "cat_max_ratio": 0.5}, "cat_max_ratio is for label maps"),
        ({"name": "Normalize", "p": 1.0}, "returns no bytes"),
        ({"name": "ToTensorV2", "p": 1.0}, "returns no bytes"),
    ):
        with pytest.raises(UserError, match=problem):
            Augment([entry])(crowded(), SIZE, seeds(0))
    with pytest.raises(UserError, match="fit must be cover or inside"):
        Augment([{"name": "ScaleCrop", "fit": "outside"}])
    with pytest.raises(UserError, match="SizeCrop refuses"):
        Augment([{"name": "SizeCrop", "sides": [5, 4]}])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("augment_*.yml")), ids=lambda path: path.stem)
def test_the_presets_of_augmentation_apply_to_objects(path: Path) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    augment = Augment(data["augment"])
    for i in range(6):
        result = augment(crowded(i, (300, 400)), (160, 160), seeds(i))
        assert result.frames[0].shape == (160, 160, 3)
        in_step(result, share=0.0)


# --- pictures that keep their aspect ratio


def test_padding_keeps_the_aspect_ratio() -> None:
    sample = picture(size=(40, 100))
    padded = resize(sample, (64, 50), pad=True)
    assert content_size((40, 100), (64, 50)) == (20, 50)
    np.testing.assert_array_equal(padded.frames[0][:20], resize(sample, (20, 50)).frames[0])
    assert (padded.frames[0][20:] == transforms.MEAN_COLOR).all()
    np.testing.assert_array_equal(padded.masks[:20], resize(sample, (20, 50)).masks)
    assert not padded.masks[20:].any()
    labels = resize(scene(0), (99, 50), pad=True).masks
    assert labels.shape == (99, 50)
    assert (labels[30:] == 255).all()
    assert content_size((1, 1000), (8, 8)) == (1, 8)
    assert content_size((1000, 3), (8, 8)) == (8, 1)


def test_the_preview_shows_objects_in_colours_with_their_boxes() -> None:
    sample = resize(crowded(), (90, 120))
    cell = preview_sheet([sample], cell=120)[4:94, 4:244]
    np.testing.assert_array_equal(cell[:, :120], sample.frames[0])
    drawn = cell[:, 120:]
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == len(sample.class_ids) + 1
    assert not drawn[sample.masks.maps.max(axis=2) == 0].all()


def test_the_palette_is_that_of_pascal_voc() -> None:
    colors = palette(256)
    assert colors[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    assert len({tuple(color) for color in colors.tolist()}) == 256

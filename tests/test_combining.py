"""Combined pictures hold whole objects in step with their boxes, and depend on nothing but the sample's own key."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from combining import Combine, copy_paste, mosaic
from dataset import Dataset, Item, TrainSampler, build_loader, collate_instance, instance_target
from errors import UserError
from layers import extents
from readers import Cached, check, instance_reader
from samples import Layers, Sample, SampleKey
from tests.sets import save
from tests.test_readers_semantic import coco_set, square
from transforms import OFFICIAL_INSTANCE, Augment

SIZE = (80, 96)


def scene(seed: int, count: int = 5, size: tuple[int, int] = (60, 100)) -> Sample:
    """Rectangles on noise below 100, each of a bright colour of its own, `10 * label + 150` in the red channel."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 100, (*size, 3), dtype=np.uint8)
    maps, boxes, class_ids = np.zeros((*size, 1), np.uint16), [], []
    for number in range(count):
        top, left = 10 * (number % 5) + 2, int(rng.integers(0, 70))
        image[top : top + 8, left : left + 20] = (150 + 10 * number, 200, seed)
        maps[top : top + 8, left : left + 20] = number + 1
        boxes.append([left, top, left + 20, top + 8])
        class_ids.append(number)
    layers = Layers(maps, np.zeros(count, np.int64), np.array(boxes, np.float32).reshape(-1, 4))
    return Sample([image], layers, class_ids, f"scene/{seed}", are_labels=True)


class Scenes:
    def __len__(self) -> int:
        return 20

    def read(self, index: int) -> Sample:
        return scene(index)


def consistent(sample: Sample, reach: float = 1.0) -> None:
    """Every object has pixels, of its own colour, and its box is around them."""
    layers, image = sample.masks, sample.frames[0]
    assert len(layers.boxes) == len(layers.layer_of) == len(sample.class_ids)
    tight = extents(layers)
    assert (np.abs(tight - layers.boxes) <= reach).all()
    for number, (layer, label) in enumerate(zip(layers.layer_of, sample.class_ids, strict=True)):
        pixels = image[layers.maps[..., layer] == number + 1]
        assert len(pixels)
        if len(pixels) > 40:  # of slivers most pixels are interpolated
            assert np.median(np.abs(pixels[:, 0].astype(int) - 150 - 10 * label)) <= 3


def test_a_mosaic_has_parts_of_four_pictures_and_the_objects_in_them() -> None:
    seen: Counter[int] = Counter()
    for seed in range(20):
        result = mosaic([scene(i) for i in range(4)], SIZE, np.random.default_rng(seed))
        assert result.frames[0].shape == (*SIZE, 3)
        assert result.sample_id == "scene/0"
        consistent(result)
        layers = result.masks
        for number, layer in enumerate(layers.layer_of):
            rows, columns = np.nonzero(layers.maps[..., layer] == number + 1)
            seen[int(np.median(result.frames[0][rows, columns, 2]))] += 1
        bright = result.frames[0][..., 1] > 180
        assert (layers.maps.any(axis=2) == bright).mean() > 0.95  # but for interpolated edges, and tiny rests
    assert min(seen[part] for part in range(4)) > 10


def test_pasted_objects_hide_those_below() -> None:
    pasted = hidden = 0
    for seed in range(30):
        below = scene(0)
        result = copy_paste(below, scene(9), np.random.default_rng(seed))
        consistent(result)
        pixels = result.frames[0]
        kept = sum(1 for i, layer in enumerate(result.masks.layer_of)
                   if np.median(pixels[result.masks.maps[..., layer] == i + 1][:, 2]) == 0)  # fmt: skip
        pasted += len(result.class_ids) > kept
        hidden += kept < 5 or (result.masks.boxes[:kept] != below.masks.boxes[:kept]).any()
        untouched = ~(pixels != below.frames[0]).any(axis=2)
        np.testing.assert_array_equal(result.masks.maps.any(axis=2)[untouched], below.masks.maps.any(axis=2)[untouched])
    assert pasted > 20
    assert hidden > 4
    empty = scene(3, count=0)
    assert copy_paste(below, empty, np.random.default_rng(0)).class_ids == below.class_ids
    assert len(copy_paste(empty, below, np.random.default_rng(1)).class_ids)


def test_what_is_combined_depends_on_the_key_alone() -> None:
    combine = Combine({"mosaic": 0.5, "copy_paste": 0.3}, seed=3)
    sizes: Counter[bool] = Counter()
    for index in range(12):
        key = SampleKey(1, index, 0, SIZE)
        one, other = combine(scene(index), key, Scenes()), combine(scene(index), key, Scenes())
        np.testing.assert_array_equal(one.frames[0], other.frames[0])
        np.testing.assert_array_equal(one.masks.maps, other.masks.maps)
        again = combine(scene(index), SampleKey(2, index, 0, SIZE), Scenes())
        sizes[np.array_equal(one.frames[0], again.frames[0])] += 1
    assert sizes[False] > 8


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean copy_paste"):
        Combine({"copy_past": 0.5}, seed=0)
    with pytest.raises(UserError, match="at most 1 together"):
        Combine({"mosaic": 0.6, "copy_paste": 0.5}, seed=0)
    count, side = 32766, 182
    maps = np.arange(1, side**2 + 1).reshape(side, side, 1)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (count, 1))
    layers = Layers(np.where(maps <= count, maps, 0).astype(np.uint16), np.zeros(count, np.int64), boxes)
    many = Sample([np.zeros((side, side, 3), np.uint8)], layers, [0] * count)
    with pytest.raises(UserError, match="more than 32767 objects"):
        copy_paste(many, scene(1), np.random.default_rng(1))


def test_workers_and_the_cache_combine_the_same(tmp_path: Path) -> None:
    rows = [{"category_id": 1, "segmentation": square(4 * i, 1, 5), "image_id": 7 - 4 * (i % 2)} for i in range(4)]
    reader = instance_reader(str(coco_set(tmp_path, rows)))
    save(tmp_path / "images/train/a.png", np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8))
    assert check(reader, progress=False) == []

    def items(source: Any, workers: int) -> list[Any]:
        data = Dataset(
            source,
            make_target=instance_target,
            augment=Augment(OFFICIAL_INSTANCE),
            combine=Combine({"mosaic": 0.5, "copy_paste": 0.5}, seed=1),
        )
        sampler = TrainSampler(source, batch_size=2, size=(32, 32))
        return list(build_loader(data, sampler, collate_targets=collate_instance, workers=workers))

    expected = items(reader, 0)
    for batches in (items(reader, 1), items(Cached(reader, progress=False), 0)):
        for one, other in zip(expected, batches, strict=True):
            np.testing.assert_array_equal(one.images, other.images)
            np.testing.assert_array_equal(one.targets.maps, other.targets.maps)
            np.testing.assert_array_equal(one.targets.boxes, other.targets.boxes)
            assert one.targets.counts == other.targets.counts


def test_an_item_is_named_by_its_own_picture() -> None:
    data = Dataset(
        Scenes(),  # type: ignore[arg-type]
        make_target=instance_target,
        augment=Augment([]),
        combine=Combine({"mosaic": 1.0}, seed=0),
    )
    item = data[SampleKey(0, 4, 0, SIZE)]
    assert isinstance(item, Item)
    assert item.info.sample_id == "scene/4"
    assert item.image.shape == (*SIZE, 3)
    assert item.target.maps.dtype == np.int16

"""Detections of a batch, and masks that become run-length codes without ever being resized."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

from instances import areas_of, detections, encode_resized, ranks_within
from samples import SampleInfo as Info
from samples import Size


def blobs(count: int, size: Size, seed: int = 0) -> Tensor:
    """(count, *size) maps, positive in discs with uneven edges, some of which reach over the border."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*(torch.linspace(0, 1, length) for length in size), indexing="ij")
    center, radius = torch.rand(2, count, 1, 1, generator=generator), torch.rand(count, 1, 1, generator=generator) / 2
    distance = ((y - center[0]) ** 2 + (x - center[1]) ** 2).sqrt()
    return radius - distance + torch.randn(count, *size, generator=generator) / 20


def official(maps: Tensor, size: Size) -> list[dict]:
    """What resizing, thresholding and pycocotools make of it."""
    masks = F.interpolate(maps[None], size, mode="bilinear")[0] > 0
    return coco_mask.encode(np.asfortranarray(masks.byte().permute(1, 2, 0).numpy()))


@pytest.mark.parametrize(
    ("small", "large"),
    [((26, 30), (101, 133)), ((26, 30), (26, 30)), ((40, 40), (17, 9)), ((1, 6), (5, 11)), ((6, 1), (11, 5)),
     ((5, 5), (1, 1)), ((12, 12), (400, 3))],
)  # fmt: skip
def test_codes_are_those_of_resized_masks(small: Size, large: Size) -> None:
    for maps in (blobs(20, small), torch.randn(20, *small, generator=torch.Generator().manual_seed(1))):
        assert encode_resized(maps, large) == official(maps, large)


def test_codes_of_zeros_empty_full_and_rounded_maps() -> None:
    # Whole lines of exactly 0, which is outside, at a size where sums of eighths make no rounding errors.
    rounded = blobs(6, (12, 14)).mul(3).round()
    maps = torch.cat([torch.zeros(1, 12, 14), -torch.ones(1, 12, 14), torch.ones(1, 12, 14), rounded])
    codes = encode_resized(maps, (48, 56))
    assert codes == official(maps, (48, 56))
    assert areas_of(codes)[:3].tolist() == [0, 0, 48 * 56]
    assert encode_resized(maps[:0], (48, 56)) == []


def test_memory_is_bounded_by_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = blobs(30, (20, 20))
    whole = encode_resized(maps, (90, 110))
    monkeypatch.setattr("instances.MAP_VALUES", 20 * 110 * 7)
    monkeypatch.setattr("instances.CELL_VALUES", 50)
    assert encode_resized(maps, (90, 110)) == whole


def test_chosen_maps_a_level_and_what_is_no_number() -> None:
    maps = blobs(5, (10, 10))
    which = torch.tensor([3, 0, 3])
    assert encode_resized(maps, (40, 40), which=which) == official(maps[which], (40, 40))
    assert encode_resized(maps + 2, (40, 40), level=2.0) == official(maps + 2 - 2.0, (40, 40))
    maps[0, 3:6], maps[0, 7, 7] = math.nan, math.inf
    mask = coco_mask.decode(encode_resized(maps[:1], (20, 20))[0])
    assert not mask[7:12].any()
    assert mask[15, 15]


def test_a_picture_in_a_corner_of_the_input() -> None:
    """Twice as wide as high in a square input: the upper half of the maps, which go on below it."""
    maps = blobs(6, (16, 16))
    codes = encode_resized(maps, (32, 64), content=(0.5, 1.0))
    below = F.interpolate(maps[None], (64, 64), mode="bilinear")[0, :, :32] > 0
    assert codes == coco_mask.encode(np.asfortranarray(below.byte().permute(1, 2, 0).numpy()))


def test_many_areas() -> None:
    codes = encode_resized(blobs(300, (5, 5)), (5, 5))
    assert areas_of(codes).tolist() == (blobs(300, (5, 5)) > 0).sum((1, 2)).tolist()
    assert areas_of([]).shape == (0,)


# ---------------------------------------------------------------- detections


def predictions() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"logits": torch.randn(2, 8, 4, generator=generator), "boxes": torch.rand(2, 8, 4, generator=generator),
            "masks": torch.randn(2, 8, 6, 6, generator=generator)}  # fmt: skip


SAMPLES = [Info("a", "", "d", (30, 50)), Info("b", "", "d", (20, 20))]


def test_the_best_pairs_of_query_and_class() -> None:
    said = predictions()
    found = list(detections(said, SAMPLES, top_k=12))
    scores, order = said["logits"].sigmoid().flatten(1).sort(1, descending=True)
    for index, each in enumerate(found):
        height, width = SAMPLES[index].size
        assert each.scores.tolist() == scores[index, :12].tolist()
        assert each.labels.tolist() == (order[index, :12] % 4).tolist()
        x, y, w, h = said["boxes"][index, order[index, :12] // 4].double().unbind(1)
        corners = torch.stack([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], 1)
        limit = torch.tensor([width, height, width, height])
        np.testing.assert_allclose(each.boxes, corners.clamp(min=0).minimum(limit), atol=1e-4)
        assert each.codes == official(said["masks"][index, order[index, :12] // 4], (height, width))
        assert each.mask(0).shape == each.size == (height, width)


def test_thresholds_classes_and_how_many() -> None:
    said = predictions()
    (all_of_them, _), (some, _) = detections(said, SAMPLES), detections(said, SAMPLES, threshold=0.6, num_classes=3)
    kept = (all_of_them.scores >= 0.6) & (all_of_them.labels < 3)
    assert len(all_of_them.labels) == 32
    assert some.scores.tolist() == all_of_them.scores[kept].tolist()
    assert some.codes == [code for code, each in zip(all_of_them.codes or [], kept, strict=True) if each]
    above = all_of_them.above(0.6)
    assert len(above.labels) == len(above.codes or []) == (all_of_them.scores >= 0.6).sum()
    (few, _) = detections(said, SAMPLES, per_class=2)
    assert np.bincount(few.labels).tolist() == [2, 2, 2, 2]
    assert ranks_within(np.array([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]


def test_equal_scores_go_by_query_and_class_and_nan_is_nothing() -> None:
    said = {"logits": torch.full((1, 2, 3), 0.5), "boxes": torch.rand(1, 2, 4)}
    said["logits"][0, 0, 1] = math.nan
    (found,) = detections(said, SAMPLES[:1])
    assert found.labels.tolist() == [0, 2, 0, 1, 2, 1]
    assert found.scores[-1] == 0
    assert found.codes is None


def test_boxes_of_a_picture_in_a_corner_of_the_input() -> None:
    said = {"logits": torch.zeros(1, 1, 1), "boxes": torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])}
    (found,) = detections(said, [Info("a", "", "d", (50, 100), content=(0.5, 1.0))])
    assert found.boxes.tolist() == [[0, 0, 50, 50]]

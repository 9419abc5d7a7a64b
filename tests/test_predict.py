"""Test-time augmentation and tiling, on models whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from predict import place_tiles, predict, predict_tiled, probabilities_of
from samples import Batch

Answer = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, C, h, w)


class Answering(nn.Module):
    """A model that answers by a formula and remembers the sizes it was asked about."""

    stride = 32

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[int, ...]] = []

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        self.asked.append(tuple(batch.images.shape[-2:]))
        return {"logits": self.answer(batch.images)}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def brightness(images: Tensor) -> Tensor:
    return images.sum(1, keepdim=True)


# ---------------------------------------------------------------- test-time augmentation


def test_without_scales_it_is_the_model() -> None:
    images = noise(2, 3, 64, 96)
    model = Answering(brightness)
    assert torch.equal(predict(model, Batch.from_images(images))["logits"], brightness(images))
    assert model.asked == [(64, 96)]


def test_scaled_sides_are_multiples_of_the_stride_and_each_scale_is_mirrored() -> None:
    model = Answering(brightness)
    logits = predict(model, Batch.from_images(noise(1, 3, 128, 160)), [0.75, 1.0, 1.25, 0.1])["logits"]
    assert model.asked == [(96, 128)] * 2 + [(128, 160)] * 2 + [(160, 192)] * 2 + [(32, 32)] * 2
    assert logits.shape == (1, 1, 128, 160)


def test_probabilities_are_averaged_not_logits() -> None:
    answers = iter([-6.0, -4.0, 0.0, 0.0, 1.0, 3.0])
    model = Answering(lambda images: torch.full_like(images[:, :1], next(answers)))
    probability = predict(model, Batch.from_images(noise(1, 3, 64, 64)), [0.75, 1.0, 1.25])["logits"].sigmoid()
    mean = sum(1 / (1 + math.exp(-logit)) for logit in (-6, -4, 0, 0, 1, 3)) / 6
    assert (probability - mean).abs().max() < 1e-6


def test_mirror_images_come_back_the_right_way_round() -> None:
    images = noise(2, 3, 64, 96)
    same = predict(Answering(brightness), Batch.from_images(images), [1.0])["logits"]
    assert (same - brightness(images)).abs().max() < 1e-4
    ramp = torch.linspace(-3, 3, 96).expand(1, 1, 64, 96)
    one_sided = predict(Answering(lambda images: ramp), Batch.from_images(images[:1]), [1.0])["logits"].sigmoid()
    assert (one_sided - 0.5).abs().max() < 1e-6  # the ramp and its mirror image


def test_an_object_stays_in_its_place_at_every_scale() -> None:
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(192.0), indexing="ij")
    images = (3 - ((y - 60) ** 2 + (x - 110) ** 2) / 200).expand(1, 3, 128, 192) / 3
    for scale in (0.5, 0.75, 1.25, 1.5):
        seen = predict(Answering(brightness), Batch.from_images(images), [scale])["logits"][0, 0].sigmoid()
        center = torch.stack([(seen * y).sum(), (seen * x).sum()]) / seen.sum()
        assert (center - torch.tensor([60.0, 110.0])).abs().max() < 0.05, scale


def test_small_outputs_keep_the_plain_outputs_size() -> None:
    model = Answering(lambda images: nn.functional.avg_pool2d(brightness(images), 4))
    assert predict(model, Batch.from_images(noise(1, 3, 64, 96)), [0.75, 1.25])["logits"].shape == (1, 1, 16, 24)


class Finding(Answering):
    """A model that finds bright objects: a query for the left half of the images and one for the right, told apart by
    their columns; in mirror images it is surer, and its boxes are a little larger."""

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.images
        self.asked.append(tuple(images.shape[-2:]))
        halves = images.mean(1).chunk(2, -1)
        is_mirrored = len(self.asked) % 2 == 0
        logits = torch.stack([half.amax((1, 2)) for half in halves], 1)[..., None] + is_mirrored
        boxes = torch.tensor([[0.2, 0.5, 0.2, 0.4], [0.7, 0.5, 0.2, 0.4]])
        if is_mirrored:
            boxes = torch.tensor([[0.3, 0.5, 0.3, 0.4], [0.8, 0.1, 0.1, 0.1]])
        masks = nn.functional.avg_pool2d(brightness(images), 4).expand(-1, 2, -1, -1)
        return {"logits": logits, "boxes": boxes.expand(len(images), -1, -1), "masks": masks}


def test_objects_are_averaged_with_their_likes_in_mirror_images() -> None:
    images = torch.zeros(1, 3, 64, 96)
    images[..., 20:30, 10:20], images[..., 20:30, 70:80] = 2.0, 3.0
    plain = Finding(brightness).predict(Batch.from_images(images))
    found = predict(Finding(brightness), Batch.from_images(images), [1.0])
    # The right object is the left query's in the mirror image; the left one has no like there.
    logistic = lambda logit: 1 / (1 + math.exp(-logit))  # noqa: E731
    expected = torch.tensor([[logistic(2) / 2, (logistic(3) + logistic(4)) / 2]])
    assert (found["logits"][..., 0].sigmoid() - expected).abs().max() < 1e-6
    assert (found["boxes"] - torch.tensor([[[0.2, 0.5, 0.2, 0.4], [0.7, 0.5, 0.25, 0.4]]])).abs().max() < 1e-6
    assert (found["masks"].sigmoid() - plain["masks"].sigmoid()).abs().max() < 1e-6
    scaled = predict(Finding(brightness), Batch.from_images(images), [1.0, 0.75])
    assert {name: value.shape for name, value in scaled.items()} == {n: v.shape for n, v in plain.items()}


def test_a_box_without_an_area_is_left_alone() -> None:
    model = Answering(brightness)
    flat = {"logits": torch.zeros(1, 1, 2), "boxes": torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])}
    model.predict = lambda batch: {name: value.clone() for name, value in flat.items()}  # type: ignore[method-assign]
    assert torch.equal(predict(model, Batch.from_images(noise(1, 3, 64, 64)), [1.0])["boxes"], flat["boxes"])


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("length", [32, 33, 63, 64, 65, 100, 1000])
def test_tiles_cover_an_axis_and_their_weights_sum_to_one(length: int, overlap: float) -> None:
    tiles = place_tiles(length, 32, overlap)
    total = torch.zeros(length)
    for start, weights in tiles:
        assert 0 <= start <= length - 32
        assert (weights > 0).all()
        total[start : start + 32] += weights
    assert (total - 1).abs().max() < 1e-6
    starts = [start for start, _ in tiles]
    assert starts[0] == 0
    assert starts[-1] == length - 32
    assert all(b - a <= math.ceil(32 * (1 - overlap)) for a, b in pairwise(starts))
    assert len(tiles) <= 1 + math.ceil((length - 32) / (32 * (1 - overlap)))


def tiled(answer: Answer, picture: np.ndarray, overlap: float = 0.25, batch_size: int = 4) -> Tensor:
    """Probabilities (C, H, W) of a picture in tiles of 48 x 32."""

    def predict_tiles(tiles: np.ndarray) -> Tensor:
        assert tiles.shape[0] <= batch_size
        assert tiles.shape[1:] == (48, 32, 3)
        return answer(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255)

    logits = predict_tiled(predict_tiles, picture, tile=(48, 32), overlap=overlap, batch_size=batch_size)
    return probabilities_of(logits)[0]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [(48, 32), (49, 32), (48, 33), (97, 101), (48, 200), (131, 64)])
def test_what_does_not_depend_on_position_is_the_same_untiled(size: tuple[int, int], channels: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)

    def answer(images: Tensor) -> Tensor:
        return torch.cat([4 * images[:, :1] - 2, images[:, 1:2] - images[:, 2:]], 1)[:, :channels]

    logits = answer(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)[0]
    whole = logits.sigmoid() if channels == 1 else logits.softmax(0)  # classes exclude each other
    for overlap in (0.0, 0.25, 0.6):
        assert (tiled(answer, picture, overlap) - whole).abs().max() < 1e-6


def test_sure_probabilities_stay_zero_and_one() -> None:
    picture = np.zeros((97, 101, 3), np.uint8)
    for logit, probability in ((200.0, 1), (-200.0, 0)):
        seen = tiled(lambda images, logit=logit: torch.full_like(images[:, :1], logit), picture)
        assert (seen - probability).abs().max() < 1e-6


def test_tiles_that_disagree_are_joined_without_a_step() -> None:
    signs = iter([10.0, -10.0] * 50)

    def answer(images: Tensor) -> Tensor:
        return torch.stack([torch.full((1, 48, 32), next(signs)) for _ in images])

    seen = tiled(answer, np.zeros((48, 600, 3), np.uint8), overlap=0.5)
    assert seen.max() - seen.min() > 0.9
    assert (seen[..., 1:] - seen[..., :-1]).abs().max() < 0.15  # over the 16 pixels that two tiles share


def test_how_many_tiles_a_forward_pass_takes_changes_nothing() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (150, 90, 3), dtype=np.uint8)

    def answer(images: Tensor) -> Tensor:  # depends on what else is in the tile
        return (images - images.mean((2, 3), keepdim=True))[:, :1] * 5

    assert (tiled(answer, picture, batch_size=1) - tiled(answer, picture, batch_size=7)).abs().max() < 1e-6


def test_small_outputs_are_brought_to_the_tile() -> None:
    seen = tiled(lambda images: images[:, :1, ::4, ::4] + 1, np.full((60, 70, 3), 255, np.uint8))
    assert seen.shape == (1, 60, 70)
    assert (seen - torch.tensor(2.0).sigmoid()).abs().max() < 1e-6

"""Mixing moves pixels and labels together, by the samples' own keys, and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import Dataset, Item, SemanticItem, TrainSampler, build_loader, collate_semantic, semantic_target
from errors import UserError
from mixing import Mix, way_of
from readers import semantic_reader
from samples import SampleInfo, SampleKey
from tests.sets import save
from transforms import OFFICIAL_SEMANTIC, Augment

SIZE = (24, 32)


def items(count: int, epoch: int = 0) -> list[Item]:
    """Each of four classes and some ignored pixels; a picture's channels tell its item, its label and its place."""
    result = []
    for i in range(count):
        labels = np.random.default_rng(i).integers(0, 5, SIZE, dtype=np.uint8)
        labels[labels == 4] = 255
        place = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE)
        image = np.dstack([np.full(SIZE, i, np.uint8), labels, place])
        key = SampleKey(epoch, i, 0, SIZE)
        result.append(Item(image, SemanticItem(labels, None), SampleInfo(str(i), "", "", SIZE), key))
    return result


@pytest.mark.parametrize("way", ["cutmix", "classmix"])
def test_pixels_and_labels_move_together_to_the_same_place(way: str) -> None:
    batch = items(6)
    place = batch[0].image[:, :, 2]
    mixed = Mix({way: 1.0}, seed=3)(batch)
    for i, (item, before) in enumerate(zip(mixed, batch, strict=True)):
        np.testing.assert_array_equal(item.image[:, :, 1], item.target.labels)
        np.testing.assert_array_equal(item.image[:, :, 2], place)
        sources = item.image[:, :, 0]
        assert set(np.unique(sources)) <= {i, (i + 1) % 6}
        for source in (i, (i + 1) % 6):
            np.testing.assert_array_equal(item.image[sources == source], batch[source].image[sources == source])
        assert (item.info, item.key) == (before.info, before.key)
        assert (before.image[:, :, 0] == i).all()  # the batch itself is as it was


def test_cutmix_takes_a_box_of_any_area() -> None:
    shares = []
    for epoch in range(300):
        taken = Mix({"cutmix": 1.0}, seed=0)(items(2, epoch))[0].image[:, :, 0] == 1
        shares.append(taken.mean())
        if taken.any():
            rows, columns = np.flatnonzero(taken.any(1)), np.flatnonzero(taken.any(0))
            assert taken[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    # The area before its overhang is cut off is even in 0..1; its mean within the picture is 0.5 * E[what stays].
    assert 0.2 < np.mean(shares) < 0.5
    assert min(shares) < 0.02
    assert max(shares) > 0.8


def test_classmix_takes_whole_classes_half_of_them_and_nothing_ignored() -> None:
    chosen: Counter[int] = Counter()
    for epoch in range(50):
        batch = items(2, epoch)
        others = batch[1].target.labels
        taken = Mix({"classmix": 1.0}, seed=0)(batch)[0].image[:, :, 0] == 1
        classes = set(np.unique(others[taken]).tolist())
        assert len(classes) == 2
        assert 255 not in classes
        np.testing.assert_array_equal(taken, np.isin(others, list(classes)))
        chosen.update(classes)
    assert min(chosen[label] for label in range(4)) > 10


def test_a_partner_without_any_class_gives_nothing() -> None:
    first, second = items(2)
    second.target.labels[:] = 255
    np.testing.assert_array_equal(Mix({"classmix": 1.0}, seed=0)([first, second])[0].image, first.image)


def test_ways_come_as_often_as_asked_for() -> None:
    rng = np.random.default_rng(0)
    ways: Counter[str | None] = Counter(way_of({"cutmix": 0.25, "classmix": 0.5}, rng) for _ in range(4000))
    assert {way: round(count / 1000) for way, count in ways.items()} == {"cutmix": 1, "classmix": 2, None: 1}
    assert abs(ways["cutmix"] - 1000) < 100
    alone = items(1)
    assert Mix({"cutmix": 1.0}, seed=0)(alone)[0] is alone[0]


def test_a_sample_is_mixed_by_its_own_key_and_its_neighbour_alone() -> None:
    mix = Mix({"cutmix": 0.5, "classmix": 0.5}, seed=1)
    whole, part = mix(items(8)), mix(items(8)[2:5])
    for one, other in itertools.islice(zip(whole[2:], part, strict=False), 2):
        np.testing.assert_array_equal(one.image, other.image)
    for epoch, occurrence in ((1, 0), (0, 1)):
        again = [replace(item, key=replace(item.key, epoch=epoch, occurrence=occurrence)) for item in items(8)]
        assert any((a.image != b.image).any() for a, b in zip(whole, mix(again), strict=True))
    other_seed = Mix(mix.probabilities, seed=2)(items(8))
    assert any((a.image != b.image).any() for a, b in zip(whole, other_seed, strict=True))


def test_workers_change_no_byte_of_a_mixed_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        save(tmp_path / f"images/{i}.png", rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        save(tmp_path / f"masks/{i}.png", np.kron(rng.integers(0, 3, (4, 5)), np.ones((10, 10))).astype(np.uint8))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    reader = semantic_reader(str(tmp_path))
    recipe = [*OFFICIAL_SEMANTIC, {"name": "TrivialAugment"}, {"name": "RandAugment"}]
    data = Dataset(reader, make_target=semantic_target, augment=Augment(recipe), seed=4)
    batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for workers in (0, 1, 2):
        sampler = TrainSampler(reader, batch_size=4, size=(32, 32), seed=4)
        mix = Mix({"cutmix": 0.5, "classmix": 0.5}, seed=4)
        loader = build_loader(data, sampler, collate_targets=collate_semantic, mix=mix, workers=workers)
        batches.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch)
            batches[-1] += [(batch.images, batch.targets.labels) for batch in loader]
    for others in batches[1:]:
        for one, other in zip(batches[0], others, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    assert not torch.equal(batches[0][0][0], batches[0][2][0])
    assert batches[0][0][1].dtype == torch.uint8
    assert batches[0][0][1].shape == (4, 32, 32)


@pytest.mark.parametrize(
    ("probabilities", "problem"),
    [({"cutmixx": 0.5}, "did you mean cutmix"), ({"cutmix": 0.7, "classmix": 0.7}, "together"), ({"cutmix": -1}, "0")],
)
def test_mistakes_are_named(probabilities: dict[str, float], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Mix(probabilities, seed=0)


def test_mixup_blends_a_whole_batch_by_one_share_and_keeps_both_label_maps() -> None:
    shares = []
    for epoch in range(60):
        batch = items(4, epoch)
        mixed = Mix({"mixup": 1.0}, seed=5)(batch)
        share = mixed[0].target.share
        shares.append(share)
        for item, own, partner in zip(mixed, batch, [*batch[1:], batch[0]], strict=True):
            assert item.target.share == share
            np.testing.assert_array_equal(item.target.labels, own.target.labels)
            np.testing.assert_array_equal(item.target.blended, partner.target.labels)
            expected = share * own.image.astype(float) + (1 - share) * partner.image.astype(float)
            assert np.abs(item.image - expected).max() <= 0.5 + 1e-6
            assert own.target.blended is None
        collated = collate_semantic([item.target for item in mixed])
        assert [(part.shape, weight) for part, weight in collated.parts()] == [
            ((4, *SIZE), share), ((4, *SIZE), 1 - share),
        ]  # fmt: skip
    assert min(shares) < 0.1
    assert max(shares) > 0.9
    again = Mix({"mixup": 1.0}, seed=5)(items(4, 59))
    assert again[0].target.share == shares[-1]
    assert Mix({"mixup": 1.0}, seed=5)(items(1))[0].target.blended is None  # nobody to blend with


def test_mixup_happens_to_its_share_of_the_batches() -> None:
    blended = sum(Mix({"mixup": 0.3}, seed=1)(items(2, epoch))[0].target.blended is not None for epoch in range(400))
    assert 80 < blended < 160

"""Samplers and loaders never change what a sample looks like."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import dataset
from dataset import (
    Dataset,
    EvalSampler,
    TrainSampler,
    binary_target,
    build_loader,
    collate_binary,
    collate_instance,
    collate_semantic,
    composition,
    instance_target,
    normalize,
    semantic_target,
)
from errors import UserError
from readers import BinaryFolders, Cached, DataError, ImageList, instance_reader, semantic_reader
from samples import Batch, SampleInfo, SampleKey
from tests.conftest import ROOT, SHARED, needs_shared
from tests.sets import Numbers, pairs, save
from tests.test_readers_semantic import coco_set, square
from transforms import MEAN_COLOR, OFFICIAL_BINARY, OFFICIAL_INSTANCE, OFFICIAL_SEMANTIC, Augment, resize

# --- samplers


def entries(sampler: TrainSampler, epoch: int = 0) -> list[list[SampleKey]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_sample_once_per_epoch_and_another_order_each() -> None:
    sampler = TrainSampler(Numbers(12), batch_size=3, size=(32, 32), seed=1)
    first, second = entries(sampler, 0), entries(sampler, 1)
    assert sorted(key.index for batch in first for key in batch) == list(range(12))
    assert [k.index for b in first for k in b] != [k.index for b in second for k in b]
    assert first == entries(sampler, 0)
    assert {key.epoch for batch in second for key in batch} == {1}
    assert first != entries(TrainSampler(Numbers(12), batch_size=3, size=(32, 32), seed=2))


@pytest.mark.parametrize(("world_size", "accum", "batch"), [(1, 1, 12), (1, 3, 4), (2, 2, 3), (3, 4, 1), (4, 1, 3)])
def test_each_step_takes_the_same_samples_however_it_is_dealt(world_size: int, accum: int, batch: int) -> None:
    reader = Numbers(100, 31, weights=(0.5, 1.7))
    whole = entries(TrainSampler(reader, batch_size=12, size=(8, 8), seed=5), 2)
    ranks = [
        entries(
            TrainSampler(
                reader, batch_size=batch, grad_accum_steps=accum, rank=rank, world_size=world_size, size=(8, 8), seed=5
            ),
            2,
        )
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    for step, expected in enumerate(whole):
        micro = range(step * accum, (step + 1) * accum)
        assert [key for m in micro for rank in ranks for key in rank[m]] == expected


def test_weights_repeat_and_thin_out() -> None:
    sampler = TrainSampler(Numbers(10, 20, weights=(2.5, 0.25)), batch_size=1, size=(8, 8))
    assert len(sampler) == sampler.steps_per_epoch == 30
    subsets = set()
    for epoch in range(4):
        keys = [key for batch in entries(sampler, epoch) for key in batch]
        counts = Counter(key.index for key in keys)
        assert sorted(counts[i] for i in range(10)) == [2] * 5 + [3] * 5
        assert sum(counts[i] for i in range(10, 30)) == 5
        assert max(counts[i] for i in range(10, 30)) == 1
        assert len({(key.index, key.occurrence) for key in keys}) == 30
        assert all(key.occurrence < counts[key.index] for key in keys)
        subsets.add(frozenset(i for i in counts if i >= 10))
    assert len(subsets) > 1  # the part of a weight is another subset each epoch


def test_a_set_smaller_than_an_effective_batch_repeats() -> None:
    sampler = TrainSampler(Numbers(3), batch_size=4, grad_accum_steps=2, size=(8, 8))
    keys = [key for batch in entries(sampler) for key in batch]
    assert len(keys) == 8
    assert sorted(Counter(key.index for key in keys).values()) == [2, 3, 3]
    assert len(set(keys)) == 8
    with pytest.raises(UserError):
        TrainSampler(Numbers(0), batch_size=1, size=(8, 8))


def test_resuming_and_the_dropped_tail() -> None:
    sampler = TrainSampler(Numbers(29), batch_size=2, grad_accum_steps=3, size=(8, 8), seed=9)
    whole = entries(sampler, 4)
    assert len(whole) == len(sampler) == 12
    sampler.set_epoch(4)
    sampler.set_start(7)
    assert list(sampler) == whole[7:]
    assert entries(sampler, 4) == whole  # the next epoch starts at its beginning again


def test_dynamic_sizes_are_shared_by_ranks_and_change_every_n_batches() -> None:
    settings: dict[str, Any] = {
        "batch_size": 1,
        "size": (8, 8),
        "dynamic_size": ((100, 260), (64, 64)),
        "dynamic_size_batch": 3,
        "seed": 3,
    }
    ranks = [entries(TrainSampler(Numbers(60), rank=r, world_size=2, **settings)) for r in range(2)]
    sizes = [[batch[0].size for batch in rank] for rank in ranks]
    assert sizes[0] == sizes[1]
    groups = [set(sizes[0][i : i + 3]) for i in range(0, 30, 3)]
    assert all(len(group) == 1 for group in groups)
    drawn = set().union(*groups)
    assert len(drawn) > 2
    assert {h for h, _ in drawn} <= {128, 160, 192, 224, 256}
    assert {w for _, w in drawn} == {64}
    one_rank = entries(TrainSampler(Numbers(60), **settings))
    assert [b[0].size for b in one_rank][:30] == sizes[0]
    squares = entries(TrainSampler(Numbers(60), **{**settings, "dynamic_size": [(100, 260)]}))
    drawn = {batch[0].size for batch in squares}
    assert len(drawn) > 2
    assert all(height == width for height, width in drawn)
    with pytest.raises(UserError, match="dynamic_size"):
        TrainSampler(Numbers(9), batch_size=1, size=(8, 8), dynamic_size=((33, 63), (64, 64)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_deals_whole_batches_and_each_sample_once(world_size: int) -> None:
    alone = list(EvalSampler(11, batch_size=4, size=(8, 8)))
    ranks = [EvalSampler(11, batch_size=4, size=(8, 8), rank=r, world_size=world_size) for r in range(world_size)]
    dealt = [batch for rank in ranks for batch in rank]
    assert sorted(dealt, key=lambda b: b[0].index) == alone
    assert [key.index for batch in alone for key in batch] == list(range(11))
    assert sum(len(rank) for rank in ranks) == 3


# --- datasets, batches, loaders


def test_normalize_has_torchvisions_bits() -> None:
    from torchvision.transforms import Compose, Normalize, ToTensor

    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images[0, :, :, 0] = np.arange(256).reshape(16, 16)
    reference = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    assert torch.equal(normalize(images), torch.stack([reference(image) for image in images]))
    assert normalize(images).is_contiguous()


@needs_shared
def test_evaluation_inputs_match_the_official_pipeline(tmp_path: Path) -> None:
    sys.path.insert(0, str(SHARED / "golden"))
    from golden import make_image, make_mask, sample

    case = json.loads((SHARED / "golden/birefnet/pipeline.json").read_text())
    expected = np.load(SHARED / "golden/birefnet/pipeline.npz")
    for row in case["samples"]:
        name, shape = f"birefnet/visible/pipeline/{row['name']}", (1, 3, row["height"], row["width"])
        image = (make_image(name, shape) * 56 + 120).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        mask = (make_mask(name, (1, 1, *shape[2:])) * 255).to(torch.uint8)[0, 0].numpy()
        save(tmp_path / row["name"] / "im/x.png", np.ascontiguousarray(image))
        save(tmp_path / row["name"] / "gt/x.png", mask)
        width, height = row["data_size_width_height"]
        reader = BinaryFolders(row["name"], root=tmp_path)
        sampler = EvalSampler(1, batch_size=1, size=(height, width))
        data = Dataset(reader, make_target=binary_target)
        (batch,) = build_loader(data, sampler, collate_targets=collate_binary)
        np.testing.assert_allclose(sample(batch.images[0]), expected[f"{row['name']}_input"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(sample(batch.targets.masks[0]), expected[f"{row['name']}_label"], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(batch.targets.originals[0], mask)
        assert batch.samples[0].size == (row["height"], row["width"])


@pytest.fixture
def training(tmp_path: Path) -> tuple[Dataset, TrainSampler]:
    pairs(tmp_path / "a", 7, size=(40, 50))
    pairs(tmp_path / "b", 2, size=(30, 30), seed=1)
    reader = BinaryFolders("a+b:2", root=tmp_path)
    data = Dataset(reader, make_target=binary_target, augment=Augment(OFFICIAL_BINARY), seed=4)
    sampler = TrainSampler(
        reader, batch_size=2, size=(64, 64), seed=4, dynamic_size=((32, 64), (32, 96)), dynamic_size_batch=2
    )
    return data, sampler


def batches(data: Dataset, sampler: TrainSampler, epochs: int = 2, **options: Any) -> list[Batch]:
    loader = build_loader(data, sampler, collate_targets=collate_binary, **options)
    result = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        result += list(loader)
    return result


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets.masks, b.targets.masks) and a.samples == b.samples
        for a, b in zip(left, right, strict=True)
    )


def test_workers_prefetch_and_persistence_never_change_a_byte(training: tuple[Dataset, TrainSampler]) -> None:
    data, sampler = training
    alone = batches(data, sampler)
    before = torch.get_rng_state()
    assert same(alone, batches(data, sampler, workers=1, prefetch=3))
    assert same(alone, batches(data, sampler, workers=2, persistent=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(alone[0].images, alone[5].images)


def test_a_mid_epoch_start_gives_the_remaining_batches(training: tuple[Dataset, TrainSampler]) -> None:
    data, sampler = training
    whole = batches(data, sampler, epochs=1)
    loader = build_loader(data, sampler, collate_targets=collate_binary, workers=2)
    sampler.set_epoch(0)
    sampler.set_start(2)
    assert same(whole[2:], list(loader))


def test_the_cache_changes_no_byte_of_a_batch(training: tuple[Dataset, TrainSampler]) -> None:
    data, sampler = training
    uncached = batches(data, sampler, epochs=1)
    data.reader = Cached(data.reader)
    assert same(uncached, batches(data, sampler, epochs=1, workers=2))


def test_an_unreadable_file_is_named_from_a_worker(tmp_path: Path) -> None:
    reader = BinaryFolders(str(pairs(tmp_path / "a", 2)))
    (tmp_path / "a/im/001.png").write_bytes(b"")
    data = Dataset(reader, make_target=binary_target)
    loader = build_loader(data, EvalSampler(2, batch_size=1, size=(8, 8)), collate_targets=collate_binary, workers=1)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(str(tmp_path / "a/im/001.png"))
    assert "\n" not in str(caught.value)
    assert caught.value.fault.path == str(tmp_path / "a/im/001.png")


def test_workers_outlive_signals_to_the_process_group(training: tuple[Dataset, TrainSampler]) -> None:
    data, sampler = training
    loader = build_loader(data, sampler, collate_targets=collate_binary, workers=1, persistent=True)
    first = list(loader)
    worker = cast(Any, loader._iterator)._workers[0]
    for name in ("-TERM", "-INT", "-USR1"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    assert same(first, list(loader))
    assert worker.is_alive()
    worker.terminate()  # ... but not the process that they serve
    worker.join(timeout=20)
    assert not worker.is_alive()


def test_a_program_ends_although_its_loader_is_never_collected(tmp_path: Path) -> None:
    pairs(tmp_path / "a", 4)
    program = f"""
import builtins
from dataset import *
from readers import *
data = Dataset(BinaryFolders({str(tmp_path / "a")!r}), make_target=binary_target)
loader = build_loader(data, EvalSampler(4, batch_size=1, size=(8, 8)), collate_targets=collate_binary, workers=2)
builtins.kept = iter(loader)
print(len(next(builtins.kept).samples))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "1\n")


def test_inference_batches_have_no_targets(tmp_path: Path) -> None:
    save(tmp_path / "x.png", np.zeros((10, 20, 3), np.uint8))
    data = Dataset(ImageList([tmp_path]), make_target=binary_target)
    (batch,) = build_loader(data, EvalSampler(1, batch_size=4, size=(8, 8)), collate_targets=collate_binary)
    assert batch.targets is None
    assert batch.samples == [SampleInfo("x", str(tmp_path / "x.png"), "", (10, 20))]
    assert batch.to("cpu").targets is None


def test_batches_move_pickle_and_come_from_images() -> None:
    batch = Batch.from_images(torch.zeros(2, 3, 8, 16))
    assert batch.samples[1].size == (8, 16)
    target = dataset.BinaryTarget(torch.zeros(1, 1, 4, 4), torch.tensor([3]), [torch.zeros(5, 5, dtype=torch.uint8)])
    moved = Batch(torch.zeros(1, 3, 4, 4), target, batch.samples[:1]).to("meta")
    assert moved.images.device.type == moved.targets.masks.device.type == moved.targets.class_ids.device.type == "meta"
    assert moved.targets.originals[0].device.type == "cpu"
    assert pickle.loads(pickle.dumps(SampleKey(1, 2, 3, (4, 5)))) == SampleKey(1, 2, 3, (4, 5))


def test_composition_counts_by_dataset() -> None:
    samples = [SampleInfo("", "", name, (1, 1)) for name in ("a", "c", "a")]
    assert composition(samples, ["a", "b", "c"]) == [2, 0, 1]


def test_semantic_batches_hold_labels_and_in_evaluation_the_originals(tmp_path: Path) -> None:
    for i, size in enumerate(((12, 16), (20, 10))):
        save(tmp_path / f"images/{i}.png", np.zeros((*size, 3), np.uint8))
        save(tmp_path / f"masks/{i}.png", np.full(size, i, np.uint8))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    reader = semantic_reader(str(tmp_path))
    sampler = EvalSampler(2, batch_size=2, size=(8, 24))
    (batch,) = build_loader(Dataset(reader, make_target=semantic_target), sampler, collate_targets=collate_semantic)
    assert batch.targets.labels.dtype == torch.uint8
    assert batch.targets.labels.shape == (2, 8, 24)
    assert [tuple(original.shape) for original in batch.targets.originals] == [(12, 16), (20, 10)]
    assert [original.unique().tolist() for original in batch.targets.originals] == [[0], [1]]
    training = Dataset(reader, make_target=semantic_target, augment=Augment(OFFICIAL_SEMANTIC))
    (batch,) = build_loader(training, sampler, collate_targets=collate_semantic)
    assert batch.targets.originals == []
    assert batch.targets.labels.shape == (2, 8, 24)


def test_instance_batches_hold_all_objects_one_after_the_other(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"category_id": 90, "segmentation": square(2, 2, 6), "bbox": [2, 2, 6, 6]},
        {"category_id": 1, "segmentation": square(4, 4, 5)},
        {"category_id": 44, "segmentation": {"size": [10, 20], "counts": [0, 200]}, "iscrowd": 1},
    ]
    reader = instance_reader(str(coco_set(tmp_path, rows)))
    sampler = EvalSampler(2, batch_size=2, size=(20, 40))
    (batch,) = build_loader(Dataset(reader, make_target=instance_target), sampler, collate_targets=collate_instance)
    targets = batch.targets
    assert targets.counts == [2, 0]
    assert targets.labels.tolist() == [2, 0]  # of 1, 44 and 90
    assert targets.layer_of.tolist() == [0, 1]
    assert targets.maps.shape == (2, 2, 20, 40)
    assert (targets.labels.dtype, targets.maps.dtype) == (torch.int64, torch.int16)
    expected = torch.tensor([[5 / 20, 5 / 10, 6 / 20, 6 / 10], [6.5 / 20, 6.5 / 10, 5 / 20, 5 / 10]])
    assert torch.allclose(targets.boxes, expected)
    assert (targets.maps[0, 0] == 1).nonzero().tolist() == [[y, x] for y in range(4, 16) for x in range(4, 16)]
    assert (targets.maps[0, 1] == 2).sum() == 100
    assert targets.maps[1].sum() == 0
    assert [len(objects.codes) for objects in targets.originals] == [3, 0]
    assert targets.original_labels == [[2, 0, 1], []]
    assert batch.to("meta").targets.maps.device.type == "meta"
    augmented = Dataset(reader, make_target=instance_target, augment=Augment(OFFICIAL_INSTANCE))
    (batch,) = build_loader(augmented, sampler, collate_targets=collate_instance)
    assert (batch.targets.originals, batch.targets.original_labels) == ([], [])
    empty = [instance_target(resize(reader.read(1), (8, 8)), None)] * 2
    assert collate_instance(empty).boxes.shape == (0, 4)


def test_a_padded_input_says_how_much_of_it_the_picture_takes(tmp_path: Path) -> None:
    reader = instance_reader(str(coco_set(tmp_path, [{"category_id": 1, "segmentation": square(2, 2, 6)}])))
    padded = Dataset(reader, make_target=instance_target, pad=True)
    item = padded[SampleKey(0, 0, 0, (40, 40))]
    assert item.info.content == (0.5, 1.0)
    assert (item.image[20:] == MEAN_COLOR).all()
    np.testing.assert_allclose(item.target.boxes, [[5 / 20, 5 / 20, 6 / 20, 6 / 20]])
    plain = Dataset(reader, make_target=instance_target)[SampleKey(0, 0, 0, (40, 40))]
    assert plain.info.content in (None, (1.0, 1.0))
    cached = Cached(reader, size=(40, 40), pad=True, progress=False)
    training = Dataset(cached, make_target=instance_target, augment=Augment([], pad=True), pad=True)
    np.testing.assert_array_equal(training[SampleKey(0, 0, 0, (40, 40))].image, item.image)

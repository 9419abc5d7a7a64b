"""Readers decode strictly and report everything; samplers, cache and loaders never change what a sample looks like."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
from dataset import (
    Dataset,
    EvalSampler,
    TrainSampler,
    binary_target,
    build_loader,
    collate_binary,
    composition,
    normalize,
)
from errors import UserError
from readers import (
    BinaryFolders,
    Cached,
    DataError,
    Fault,
    ImageList,
    Reader,
    check,
    drop,
    fail_on,
    limit,
    read_alpha,
    read_image,
    split,
)
from samples import Batch, Sample, SampleInfo, SampleKey
from tests.conftest import ROOT, SHARED, needs_shared
from transforms import OFFICIAL_BINARY, Augment, resize

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 11  # asymmetric, so every flip and turn shows


def save(path: Path, picture: Image.Image | np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def pairs(folder: Path, count: int, *, size: tuple[int, int] = (12, 16), seed: int = 0) -> Path:
    """A dataset of `count` random pairs."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        save(folder / "im" / f"{i:03d}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        save(folder / "gt" / f"{i:03d}.png", rng.integers(0, 256, size, dtype=np.uint8))
    return folder


class Numbers(Reader):
    """A reader without files: datasets "a" and "b" of the given counts and weights."""

    def __init__(self, a: int, b: int = 0, weights: tuple[float, float] = (1.0, 1.0)):
        self.a, self.b, self.weights = a, b, weights

    def __len__(self) -> int:
        return self.a + self.b

    def read(self, index: int) -> Sample:
        raise AssertionError("a sampler decodes nothing")

    def sample_id(self, index: int) -> str:
        return f"{self.dataset_of(index)}/{index}"

    def dataset_of(self, index: int) -> str:
        return "a" if index < self.a else "b"

    def files(self, index: int) -> list[str]:
        return []

    def weight_of(self, dataset: str) -> float:
        return self.weights["ab".index(dataset)]


# --- decoding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_image_and_mask_alike(tmp_path: Path, orientation: int) -> None:
    turn = {  # what a viewer must do to a stored picture to show it upright, by the EXIF standard
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "d/im/x.png", np.stack([RAMP] * 3, axis=2), exif=exif)
    save(tmp_path / "d/gt/x.png", RAMP, exif=exif)
    sample = BinaryFolders("d", root=tmp_path).read(0)
    np.testing.assert_array_equal(sample.masks, turn(RAMP))
    np.testing.assert_array_equal(sample.frames[0][:, :, 1], turn(RAMP))


def test_exif_of_a_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 250  # left half bright; turned a quarter clockwise it is the upper half
    image = read_image(save(tmp_path / "x.jpg", stored, exif=exif))
    assert image.shape == (32, 16, 3)
    assert image[:14].min() > 200
    assert image[18:].max() < 50


def test_image_modes_become_rgb(tmp_path: Path) -> None:
    color = np.array([[[10, 200, 30], [40, 50, 220]]], np.uint8)
    rgb = Image.fromarray(color)
    np.testing.assert_array_equal(read_image(save(tmp_path / "rgb.png", rgb)), color)

    rgba = np.dstack([color, np.array([[0, 128]], np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "rgba.png", rgba)), color)  # not composited

    grey = np.array([[0, 77, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "l.png", grey)), np.dstack([grey] * 3))
    la = Image.fromarray(np.dstack([grey, grey[:, ::-1]]), "LA")
    np.testing.assert_array_equal(read_image(save(tmp_path / "la.png", la)), np.dstack([grey] * 3))

    wide = np.array([[0, 257 * 77, 65535, 128, 129]], np.uint16)  # 128/257 rounds down, 129/257 up
    expected = np.array([[0, 77, 255, 0, 1]], np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "16.png", wide)), np.dstack([expected] * 3))
    np.testing.assert_array_equal(read_image(save(tmp_path / "16.tif", wide)), np.dstack([expected] * 3))

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 200, 30, 40, 50, 220])
    np.testing.assert_array_equal(read_image(save(tmp_path / "p.png", palette)), color)
    np.testing.assert_array_equal(read_image(save(tmp_path / "pt.png", palette, transparency=bytes([0, 90]))), color)

    frames = [palette, Image.new("P", (2, 1), 1)]
    animated = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(animated), color)

    stereo = Image.new("RGB", (16, 16), (90, 90, 90))  # what some cameras and telephones write as .jpg
    save(tmp_path / "mpo.jpg", stereo, format="MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    np.testing.assert_array_equal(read_image(tmp_path / "mpo.jpg"), np.full((16, 16, 3), 90))

    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(read_image(save(tmp_path / "1.png", bits))[..., 0], [[255, 0]])

    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    pixel = read_image(save(tmp_path / "cmyk.jpg", cmyk, quality=100))[8, 8]
    np.testing.assert_allclose(pixel, [0, 255, 255], atol=4)


def test_mask_modes_become_alpha(tmp_path: Path) -> None:
    soft = np.array([[0, 77, 255]], np.uint8)
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "l.png", soft)), soft)
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "rgb.png", np.dstack([soft] * 3))), soft)
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "1.png", Image.fromarray(soft > 80))), [[0, 0, 255]])
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "01.png", (soft > 80).astype(np.uint8))), [[0, 0, 255]])
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "16.png", soft.astype(np.uint16) * 257)), soft)
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "01w.png", (soft > 80).astype(np.uint16))), [[0, 0, 255]])
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "f.tif", soft.astype(np.float32) / 255)), soft)

    hole = np.dstack([np.full((1, 3, 3), 200, np.uint8), soft])  # the mask is in the alpha channel
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "rgba.png", hole)), soft)
    opaque = np.dstack([soft, soft, soft, np.full_like(soft, 255)])  # ... or in the colours
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "opaque.png", opaque)), soft)
    la = Image.fromarray(np.dstack([np.zeros_like(soft), soft]), "LA")
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "la.png", la)), soft)

    labels = Image.fromarray(np.array([[0, 1, 7]], np.uint8), "P")
    labels.putpalette([0, 0, 0, 128, 0, 0, *[0] * 15, 64, 64, 64])
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "labels.png", labels)), [[0, 255, 255]])
    greys = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    greys.putpalette([0, 0, 0, 90, 90, 90, 255, 255, 255])
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "greys.png", greys)), [[0, 90, 255]])
    black = np.zeros((1, 3), np.uint8)
    np.testing.assert_array_equal(read_alpha(save(tmp_path / "black.png", black)), black)


def test_a_coloured_mask_is_refused(tmp_path: Path) -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[1:3, 1:3, 0] = 255
    with pytest.raises(DataError, match="coloured"):
        read_alpha(save(tmp_path / "red.png", red))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_truncation_raises_at_any_length(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / f"x.{suffix}", noise).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.9):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"cut\."):
            read_image(cut)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    save(tmp_path / "page.eps", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "page.eps").rename(tmp_path / "page.png")  # would start Ghostscript
    for name in ("text.png", "page.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [25_000, 40_000])  # where PIL itself would only warn, and where it raises
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(DataError, match=r"bomb\.png.*400 megapixels"):
        read_image(tmp_path / "bomb.png")


# --- readers and the check


def test_folders_join_with_weights_in_sorted_order(tmp_path: Path) -> None:
    pairs(tmp_path / "a", 3)
    pairs(tmp_path / "b", 2)
    save(tmp_path / "b/im/deep/X.JPG", np.zeros((12, 16, 3), np.uint8))
    save(tmp_path / "b/gt/deep/X.Png", np.zeros((12, 16), np.uint8))
    (tmp_path / "b/im/.hidden.png").write_text("")
    (tmp_path / "b/im/notes.txt").write_text("")
    reader = BinaryFolders(f"a+{tmp_path / 'b'}:0.5", root=tmp_path)
    assert not reader.faults
    assert {name: (row.count, row.weight) for name, row in reader.datasets.items()} == {"a": (3, 1.0), "b": (3, 0.5)}
    assert [reader.sample_id(i) for i in range(6)] == ["a/000", "a/001", "a/002", "b/000", "b/001", "b/deep/X"]
    assert reader.read(5).dataset == "b"


@pytest.mark.parametrize("spec", ["a+a", "a:0", "a:-1", "a:nan", "a++b", ""])
def test_a_senseless_spec_is_refused(tmp_path: Path, spec: str) -> None:
    pairs(tmp_path / "a", 1)
    with pytest.raises(UserError, match="data:"):
        BinaryFolders(spec, root=tmp_path)


def test_dis_names_carry_classes(tmp_path: Path) -> None:
    for name in ("1#Sports#2#Yacht#77", "1#Sports#2#Axe#78", "plain"):
        save(tmp_path / "im" / f"{name}.png", np.zeros((4, 4, 3), np.uint8))
        save(tmp_path / "gt" / f"{name}.png", np.zeros((4, 4), np.uint8))
    reader = BinaryFolders(str(tmp_path))
    assert reader.class_names == ["Axe", "Yacht"]
    assert [reader.read(i).class_ids for i in range(3)] == [[0], [1], []]
    other = BinaryFolders(str(tmp_path), class_names=["Tree", "Yacht"])  # a class that training did not know
    assert [other.read(i).class_ids for i in range(3)] == [[], [1], []]


def broken_set(folder: Path) -> set[str]:
    """Three good pairs among every kind of fault; the paths that must be named."""
    pairs(folder, 3)
    grey = np.zeros((12, 16), np.uint8)
    save(folder / "im/only_image.png", grey)
    save(folder / "gt/only_mask.png", grey)
    save(folder / "im/twice.png", grey)
    save(folder / "im/twice.jpg", grey)
    save(folder / "gt/twice.png", grey)
    save(folder / "im/size.png", grey)
    save(folder / "gt/size.png", grey.T)
    save(folder / "im/cut.png", grey)
    save(folder / "gt/cut.png", grey)
    for sub in ("im", "gt"):
        whole = (folder / sub / "cut.png").read_bytes()
        (folder / sub / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(folder.parent / "outside.png", grey)
    (folder / "im/link.png").symlink_to(folder.parent / "outside.png")
    save(folder / "gt/link.png", grey)
    (folder / "im/linked").symlink_to(folder.parent)
    names = "im/only_image.png gt/only_mask.png im/twice.jpg gt/size.png im/cut.png gt/cut.png im/link.png im/linked"
    return {str(folder / name) for name in names.split()}


def test_one_check_reports_every_fault_and_writes_nothing(tmp_path: Path) -> None:
    expected = broken_set(tmp_path / "d")
    before = sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    reader = BinaryFolders("d+absent", root=tmp_path)
    faults = check(reader, workers=2, progress=False)
    assert expected | {str(tmp_path / "absent")} <= {fault.path for fault in faults}
    with pytest.raises(UserError) as caught:
        fail_on(faults)
    assert all(path in str(caught.value) for path in expected)
    assert "16x12" in str(caught.value)
    assert "12x16" in str(caught.value)
    assert before == sorted((p, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))


def test_skipping_keeps_the_good_samples(tmp_path: Path) -> None:
    expected = broken_set(tmp_path / "d")
    reader = BinaryFolders("d", root=tmp_path)
    faults = check(reader, progress=False)
    kept, count = drop(reader, faults)
    assert [kept.sample_id(i) for i in range(len(kept))] == ["d/000", "d/001", "d/002"]
    assert count >= len(expected)
    assert check(kept, progress=False) == []
    with pytest.raises(UserError):
        drop(kept, [Fault(path, "bad") for i in range(3) for path in kept.files(i)])


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="and 7 more"):
        fail_on([Fault(f"{i}.png", "is bad") for i in range(57)])
    fail_on([])


def test_an_empty_or_missing_folder_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "empty/im").mkdir(parents=True)
    (tmp_path / "empty/gt").mkdir()
    (tmp_path / "half/im").mkdir(parents=True)
    faults = BinaryFolders("empty+half", root=tmp_path).faults
    assert [fault.path for fault in faults] == [str(tmp_path / "empty"), str(tmp_path / "half/gt")]


def test_image_list_takes_files_folders_and_patterns(tmp_path: Path) -> None:
    grey = np.zeros((4, 4), np.uint8)
    for name in ("a.png", "deep/b.jpg", "deep/c.txt.png", "other/d.png"):
        save(tmp_path / name, grey)
    (tmp_path / "deep/readme.txt").write_text("")
    reader = ImageList([tmp_path / "a.png", tmp_path / "deep", f"{tmp_path}/o*/*.png", tmp_path / "none"])
    assert [reader.sample_id(i) for i in range(len(reader))] == ["a", "b", "c.txt", "other/d"]
    assert [fault.path for fault in reader.faults] == [str(tmp_path / "none")]
    assert reader.read(0).masks is None
    save(tmp_path / "a.jpg", grey)
    assert ImageList([tmp_path]).faults[0].path == str(tmp_path / "a.png")  # both would be written as a.*
    assert not ImageList([tmp_path / "a.png", tmp_path / "a.png"]).faults


# --- splits


def test_folds_partition_every_dataset() -> None:
    reader = Numbers(23, 11)
    seen: Counter[str] = Counter()
    for k in range(5):
        parts = {part: split(reader, part=part, fold=f"{k}/5", seed=3) for part in ("train", "val")}
        ids = {part: {sub.sample_id(i) for i in range(len(sub))} for part, sub in parts.items()}
        assert not ids["train"] & ids["val"]
        assert len(ids["train"] | ids["val"]) == 34
        assert {name: row.count for name, row in parts["val"].datasets.items()}["b"] in (2, 3)
        seen.update(ids["val"])
    assert set(seen.values()) == {1}


def test_a_fraction_depends_on_seed_and_ids_alone() -> None:
    def held_out(reader: Reader, seed: int) -> set[str]:
        part = split(reader, part="val", fraction=0.2, seed=seed)
        return {part.sample_id(i) for i in range(len(part))}

    assert held_out(Numbers(50), 0) == held_out(Numbers(50), 0)
    assert held_out(Numbers(50), 0) != held_out(Numbers(50), 1)
    assert len(held_out(Numbers(50), 0)) == 10
    assert {i for i in held_out(Numbers(50, 30), 0) if i[0] == "a"} == held_out(Numbers(50), 0)
    assert len(held_out(Numbers(2), 0)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"fold": "5/5"},
        {"fold": "0/1"},
        {"fold": "x"},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {},
        {"fold": "0/2", "fraction": 0.1},
    ],
)
def test_a_senseless_split_is_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="data"):
        split(Numbers(10), part="train", **settings)


def test_limit_spreads_over_the_reader() -> None:
    small = limit(Numbers(60, 40), 10)
    assert {name: row.count for name, row in small.datasets.items()} == {"a": 6, "b": 4}
    assert limit(Numbers(5), None).datasets["a"].count == 5
    assert len(limit(Numbers(5), 9)) == 5


# --- the cache


@pytest.mark.parametrize("size", [None, (20, 24)])
def test_the_cache_returns_the_same_bytes_and_leaves_nothing(tmp_path: Path, size: tuple[int, int] | None) -> None:
    pairs(tmp_path / "a", 3)
    pairs(tmp_path / "b", 2, size=(9, 31))
    reader = BinaryFolders("a+b:2", root=tmp_path)
    calls: list[bool] = []
    path = tmp_path / "cache.bin"
    cached = Cached(reader, path=path, size=size, barrier=lambda: calls.append(path.exists()))
    assert calls == [True, True]
    assert not path.exists()
    for i in range(5):
        expected, got = reader.read(i), cached.read(i)
        if size:
            expected = resize(expected, size)
        np.testing.assert_array_equal(got.frames[0], expected.frames[0])
        np.testing.assert_array_equal(got.masks, expected.masks)
        assert (got.sample_id, got.path, got.dataset) == (expected.sample_id, expected.path, expected.dataset)
        got.frames[0][:] = 0  # a copy: the next reading is whole again
        assert cached.read(i).frames[0].any()
    assert cached.datasets == reader.datasets


def test_ranks_map_what_one_of_them_wrote(tmp_path: Path) -> None:
    reader = BinaryFolders(str(pairs(tmp_path / "a", 3)))
    path = tmp_path / "cache.bin"
    others: list[Cached] = []

    def barrier() -> None:  # another rank's turn: it maps between the writer's two barriers
        if not others:
            others.append(Cached(reader, path=path, write=False))

    mine = Cached(reader, path=path, barrier=barrier)
    assert not path.exists()
    np.testing.assert_array_equal(mine.read(2).frames[0], others[0].read(2).frames[0])


def test_a_full_disk_is_said_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = BinaryFolders(str(pairs(tmp_path / "a", 3, size=(200, 200))))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match="no room"):
            Cached(reader, path=tmp_path / "cache.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "cache.bin").exists()


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


@needs_shared
@pytest.mark.parametrize(("name", "train", "val"), [("davis_binary", 54, 12), ("nuclei_binary", 48, 16)])
def test_the_real_sets_read_without_fault(name: str, train: int, val: int) -> None:
    reader = BinaryFolders("train+val", root=SHARED / "data" / name)
    assert [row.count for row in reader.datasets.values()] == [train, val]
    assert check(reader, workers=2, progress=False) == []
    share = np.mean([reader.read(i).masks.mean() / 255 for i in range(0, train, 6)])
    assert 0.01 < share < 0.35


def test_a_whole_dataset_may_be_a_link_but_its_parts_may_not_lead_out(tmp_path: Path) -> None:
    pairs(tmp_path / "real", 2)
    os.symlink(tmp_path / "real", tmp_path / "link")
    reader = BinaryFolders("link", root=tmp_path)
    assert not reader.faults
    assert len(reader) == 2
    (tmp_path / "mixed").mkdir()
    for sub in ("im", "gt"):
        os.symlink(tmp_path / "real" / sub, tmp_path / "mixed" / sub)
    reader = BinaryFolders("mixed", root=tmp_path)
    assert len(reader) == 0
    assert len(reader.faults) >= 4

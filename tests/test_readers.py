"""Readers decode strictly and report everything; the check lists it; splits and the cache change no sample."""

from __future__ import annotations

import os
import resource
import signal
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
from tests.conftest import SHARED, needs_shared
from tests.sets import Numbers, pairs, save
from transforms import resize

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 11  # asymmetric, so every flip and turn shows


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
    os.mkfifo(tmp_path / "pipe.png")  # would be waited for
    for name in ("text.png", "page.png", "absent.png", "pipe.png"):
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


@pytest.mark.parametrize("spec", ["a+a", "a:0", "a:-1", "a:nan", "a++b", "", "pipe"])
def test_a_senseless_spec_is_refused(tmp_path: Path, spec: str) -> None:
    pairs(tmp_path / "a", 1)
    os.mkfifo(tmp_path / "pipe")
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

"""The demo data is always the same, whole, and not to be had by a threshold."""

from __future__ import annotations

import hashlib
import io
import time
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from demo import (
    CLIP_LENGTH,
    annotation,
    draw_clip,
    draw_group,
    run_lengths,
    write_demo,
    write_instance_demo,
    write_semantic_demo,
    write_video_demo,
)
from errors import UserError
from readers import BinaryFolders, Reader, check, class_table, semantic_reader, video_reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_semantic_demo(tmp_path_factory.mktemp("semantic") / "demo")


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_it_is_a_faultless_binary_set(folder: Path) -> None:
    reader = BinaryFolders("train+val", root=folder)
    assert [row.count for row in reader.datasets.values()] == [64, 16]
    assert check(reader, progress=False) == []
    samples = [reader.read(i) for i in range(len(reader))]
    shares = [sample.masks.mean() / 255 for sample in samples]
    assert min(shares) > 0.05
    assert max(shares) < 0.7
    assert len({sample.frames[0].tobytes() for sample in samples}) == 80
    assert any(((s.masks > 60) & (s.masks < 200)).mean() > 0.03 for s in samples)  # soft edges
    holes = [cv2.findContours(s.masks // 128, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[1][0, :, 3].max() for s in samples]
    assert sum(parent >= 0 for parent in holes) > 30  # contours with a parent are holes


def test_it_is_drawn_again_alike_and_kept_when_there(folder: Path, tmp_path: Path) -> None:
    start = time.process_time()
    again = write_demo(tmp_path / "again")
    assert time.process_time() - start < 10
    assert digest(again) == digest(folder)
    before = [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    write_demo(again)
    assert before == [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_another_seed_replaces_it_and_a_broken_off_one_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demo.COUNTS", {"train": 2, "val": 1})
    target = tmp_path / "demo"
    first = digest(write_demo(target))
    assert digest(write_demo(target, seed=1)) != first
    assert digest(write_demo(target)) == first

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        write_demo(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="is no demo data"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def jaccard(found: np.ndarray, alpha: np.ndarray) -> float:
    overlap = (found * alpha).sum()
    return float(overlap / (found.sum() + alpha.sum() - overlap))


def test_no_threshold_finds_the_objects(folder: Path) -> None:
    reader = BinaryFolders("val", root=folder)
    otsu: dict[tuple[int, bool], list[float]] = {}
    fixed: dict[tuple[int, int, bool], list[float]] = {}
    for i in range(len(reader)):
        sample = reader.read(i)
        image, alpha = sample.frames[0], sample.masks / 255
        grey, hsv = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for c, channel in enumerate([grey, *cv2.split(image), *cv2.split(hsv)]):
            above = cv2.threshold(channel, 0, 1, cv2.THRESH_OTSU)[1] > 0
            for inverted in (False, True):
                otsu.setdefault((c, inverted), []).append(jaccard(above ^ inverted, alpha))
                for level in range(0, 256, 16):
                    fixed.setdefault((c, level, inverted), []).append(jaccard((channel > level) ^ inverted, alpha))
    assert max(np.mean(values) for values in otsu.values()) < 0.45
    assert max(np.mean(values) for values in fixed.values()) < 0.45


# --- semantic


def test_the_semantic_set_has_every_class_everywhere(semantic: Path) -> None:
    reader = semantic_reader("train+val", root=semantic)
    assert [row.count for row in reader.datasets.values()] == [64, 16]
    assert check(reader, progress=False) == []
    assert reader.class_names == ["ground", "stripes", "waves", "checks", "dots", "bricks"]
    for part in ("train", "val"):
        shares = [row.share for row in class_table(semantic_reader(part, root=semantic))]
        assert 0.3 < shares[0] < 0.6
        assert min(shares[1:-1]) > 0.04
        assert 0.02 < shares[-1] < 0.12
    labels = [reader.read(i).masks for i in range(len(reader))]
    assert all(len(np.unique(each)) >= 4 for each in labels)
    # Wherever two classes meet lies a border of ignored pixels.
    assert not any(
        ((each[:, 1:] != each[:, :-1]) & (each[:, 1:] < 255) & (each[:, :-1] < 255)).any() for each in labels
    )


def test_the_semantic_set_is_drawn_again_alike(semantic: Path, tmp_path: Path) -> None:
    start = time.process_time()
    again = write_semantic_demo(tmp_path / "again")
    assert time.process_time() - start < 12
    assert digest(again) == digest(semantic)
    before = [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    write_semantic_demo(again)
    assert before == [path.stat().st_mtime_ns for path in sorted(again.rglob("*"))]
    write_demo(again)  # either kind of demo data makes room for the other
    assert (again / "train/im").is_dir()


def test_no_table_of_colours_finds_the_classes(semantic: Path) -> None:
    """The best guess from a pixel's colour, learnt on the training pictures or even on the validation ones."""
    train, val = (semantic_reader(part, root=semantic) for part in ("train", "val"))

    def colors_and_labels(reader: Reader) -> tuple[np.ndarray, np.ndarray]:
        samples = [reader.read(i) for i in range(len(reader))]
        colors = np.concatenate([sample.frames[0].reshape(-1, 3) // 16 for sample in samples]).astype(int)
        labels = np.concatenate([sample.masks.ravel() for sample in samples])
        kept = labels < 255
        return (colors @ [256, 16, 1])[kept], labels[kept]

    colors, labels = colors_and_labels(val)
    for learnt in (train, val):
        counts = np.zeros((4096, 6))
        np.add.at(counts, colors_and_labels(learnt), 1)
        for weights in (1.0, 1 / counts.sum(0)):  # as they come, and with all classes alike
            guessed = (counts * weights).argmax(1)[colors]
            overlap = [
                ((guessed == c) & (labels == c)).sum() / ((guessed == c) | (labels == c)).sum() for c in range(6)
            ]
            assert np.mean(overlap) < 0.2


# --- instance


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instance_demo(tmp_path_factory.mktemp("instance") / "demo")


@pytest.mark.parametrize(("part", "count"), [("train", 64), ("val", 16)])
def test_the_instance_set_is_coco(part: str, count: int, instance: Path) -> None:
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(instance / f"annotations/instances_{part}.json"))
    assert [row["name"] for row in coco.loadCats(coco.getCatIds())] == [
        "blob", "ring", "gear", "leaf", "letter", "lattice",
    ]  # fmt: skip
    assert len(coco.imgs) == count
    objects = {image: coco.loadAnns(coco.getAnnIds(imgIds=[image])) for image in coco.imgs}
    assert {len(each) for each in objects.values()} == set(range(1, 9))
    every = [row for each in objects.values() for row in each]
    for category in coco.cats:
        assert sum(row["category_id"] == category for row in every) > len(every) / 12
    assert 0 < sum(row["iscrowd"] for row in every) < count / 5
    assert 0.15 < sum(isinstance(row["segmentation"], list) for row in every) / len(every) < 0.5
    overlapping = 0
    for image, each in objects.items():
        size = (coco.imgs[image]["height"], coco.imgs[image]["width"])
        with Image.open(instance / f"images/{part}/{coco.imgs[image]['file_name']}") as picture:
            assert picture.size == size[::-1]
        masks = np.stack([coco.annToMask(row) for row in each])
        for row, mask in zip(each, masks, strict=True):
            assert mask.sum() == row["area"] > 150
            ys, xs = np.nonzero(mask)
            left, top, width, height = row["bbox"]
            assert (left, top) == pytest.approx((xs.min(), ys.min()), abs=1)
            assert (left + width, top + height) == pytest.approx((xs.max() + 1, ys.max() + 1), abs=1)
        assert (masks.sum(0) > 1).mean() < 0.005  # what lies under another is not annotated
        boxes = np.array([row["bbox"] for row in each])
        shared = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], boxes[:, :2] + boxes[:, 2:])
        shared = (shared - np.maximum(boxes[:, None, :2], boxes[:, :2])).min(-1) > 8
        overlapping += shared.sum() > len(each)
    assert overlapping > count / 3


def test_outlines_are_those_of_the_objects() -> None:
    rng = np.random.default_rng(3)
    things = [thing for _ in range(12) for thing in draw_group(rng)[1]]
    has_polygons: dict[str, set[bool]] = {}
    for thing in things:
        row = annotation(thing)
        outline = row["segmentation"]
        code = coco_mask.frPyObjects(outline, *thing.alpha.shape)
        mask = coco_mask.decode(coco_mask.merge(code) if isinstance(outline, list) else code)
        truth = thing.alpha > 0.5
        overlap = (mask & truth).sum() / (mask | truth).sum()
        assert overlap > 0.9 if isinstance(outline, list) else overlap == 1
        has_polygons.setdefault(thing.kind, set()).add(isinstance(outline, list))
    assert has_polygons["lattice"] == {False}  # polygons have no holes
    assert True in has_polygons["leaf"]
    full = run_lengths(np.ones((3, 4), bool))
    assert full == {"size": [3, 4], "counts": [0, 12]}
    assert run_lengths(np.zeros((3, 4), bool))["counts"] == [12]


def test_the_instance_set_is_drawn_again_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.COUNTS", {"train": 3, "val": 1})
    once, again = (write_instance_demo(tmp_path / name) for name in ("once", "again"))
    assert digest(again) == digest(once) != digest(write_instance_demo(once, seed=1))
    write_semantic_demo(again)  # the kinds of demo data make room for each other
    assert not (again / "annotations").exists()


def test_the_clips_show_all_objects_first_and_some_come_back(tmp_path: Path) -> None:
    reader = video_reader("ImageSets/train.txt+ImageSets/val.txt", root=write_video_demo(tmp_path / "demo"))
    assert check(reader, progress=False) == []
    assert [summary.count for summary in reader.datasets.values()] == [12, 4]
    returns, numbers = 0, set()
    for index in range(len(reader)):
        sample = reader.read(index)
        masklets = sample.masks
        everyone = list(range(len(masklets.object_ids)))
        assert all(masklets.annotated)
        assert masklets.visible(0) == masklets.visible(CLIP_LENGTH - 1) == everyone
        assert min(masklets.masks(0, everyone).sum((1, 2))) > 100
        returns += any(masklets.visible(number) != everyone for number in range(CLIP_LENGTH))
        numbers.add(len(everyone))
    assert returns >= 8
    assert numbers == {1, 2, 3}


def test_a_clip_is_drawn_again_alike_and_moves() -> None:
    one, other = (draw_clip(np.random.default_rng(3), comes_back=True) for _ in range(2))
    for (frame, labels), (again, the_same) in zip(one, other, strict=True):
        np.testing.assert_array_equal(frame, again)
        np.testing.assert_array_equal(labels, the_same)
        assert frame.shape == (120, 160, 3)
        assert frame.dtype == labels.dtype == np.uint8
    assert all((labels != one[0][1]).any() for _, labels in one[1:])

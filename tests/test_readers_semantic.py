"""Label maps arrive as they are meant, classes meet by name, and whatever is wrong is listed before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import readers.semantic
from dataset import Dataset, TrainSampler, build_loader, collate_semantic, semantic_target
from errors import UserError
from readers import (
    Cached,
    DataError,
    SemanticReader,
    check,
    class_table,
    drop,
    limit,
    pixel_counts,
    semantic_reader,
    show_classes,
    split,
)
from readers.images import read_labels
from tests.conftest import SHARED, needs_shared
from tests.sets import save

IDS = np.array([[0, 1, 2, 2], [255, 1, 1, 2]], np.uint8)
WHITE = np.full((2, 4, 3), 255, np.uint8)
RED = np.array([1, 0, 0], np.uint8)


def label_set(folder: Path, masks: dict[str, Any], classes: str = "sky\nroad\ncar\n", sub: str = "masks") -> Path:
    """A white picture beside each mask."""
    for name, mask in masks.items():
        save(folder / sub / f"{name}.png", mask)
        save(folder / "images" / f"{name}.png", WHITE)
    (folder / "classes.txt").write_text(classes)
    return folder


def problems(reader: SemanticReader) -> str:
    return "\n".join(map(str, check(reader, progress=False)))


# --- label maps


def test_ids_are_read_as_they_stand_in_every_kind_of_file(tmp_path: Path) -> None:
    def read(name: str, picture: Any, **options: Any) -> np.ndarray:
        return read_labels(save(tmp_path / name, picture, **options))

    np.testing.assert_array_equal(read("grey.png", IDS), IDS)
    np.testing.assert_array_equal(read("wide.png", IDS.astype(np.uint16)), IDS)
    np.testing.assert_array_equal(read("grey.tif", IDS), IDS)
    np.testing.assert_array_equal(read("rgb.png", np.dstack([IDS] * 3)), IDS)
    palette = Image.fromarray(IDS, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 250] + [7] * 759)
    np.testing.assert_array_equal(read("palette.png", palette), IDS)
    np.testing.assert_array_equal(read("few.png", palette.point(lambda v: v % 255), bits=2), IDS % 255)
    np.testing.assert_array_equal(read("1.png", Image.fromarray(IDS == 1)), (IDS == 1).astype(np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_grey_png_of_few_bits_keeps_its_ids(tmp_path: Path, bits: int) -> None:
    """PIL would spread them over 0 to 255; it writes none itself, so this one is made by hand."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ids = np.arange(8, dtype=np.uint8)[None] % 2**bits
    row = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].ravel()).tobytes()
    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(read_labels(tmp_path / "x.png"), ids)


@pytest.mark.parametrize(
    ("name", "picture", "problem"),
    [
        ("colour.png", np.dstack([IDS, IDS, IDS * 0]), "coloured.*save it as grey or palette PNG"),
        ("lossy.jpg", IDS, "JPEG, which changes class ids"),
        ("lossless.webp", np.dstack([IDS] * 3), "WEBP"),
        ("wide.png", IDS.astype(np.uint16) * 300, "values up to 10964"),
        ("float.tif", IDS / np.float32(2), "float32 values"),
    ],
)
def test_what_is_no_label_map_says_what_to_do(tmp_path: Path, name: str, picture: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_labels(save(tmp_path / name, picture))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_turns_image_and_labels_alike(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "images/x.png", np.dstack([IDS] * 3), exif=exif)
    save(tmp_path / "masks/x.png", IDS, exif=exif)
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    sample = semantic_reader(str(tmp_path)).read(0)
    np.testing.assert_array_equal(sample.frames[0][:, :, 0], sample.masks)
    assert sample.masks.shape == ((2, 4) if orientation == 3 else (4, 2))


# --- folders and classes


@pytest.mark.parametrize("sub", ["masks", "gt", "labels"])
def test_a_folder_with_its_classes_beside_or_above(tmp_path: Path, sub: str) -> None:
    label_set(tmp_path / "train", {"x": IDS}, sub=sub)
    (tmp_path / "train/classes.txt").rename(tmp_path / "classes.txt")
    reader = semantic_reader("train:2", root=tmp_path)
    assert reader.class_names == ["sky", "road", "car"]
    assert check(reader, progress=False) == []
    sample = reader.read(0)
    assert sample.are_labels
    assert (sample.sample_id, sample.dataset, reader.weight_of("train")) == ("train/x", "train", 2)
    np.testing.assert_array_equal(sample.masks, IDS)


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    label_set(
        tmp_path, {"good": IDS, "high": IDS + np.uint8(5), "turned": IDS.T, "colour": WHITE - IDS[..., None] * RED}
    )
    save(tmp_path / "images/alone.png", WHITE)
    save(tmp_path / "images/cut.png", WHITE).write_bytes(b"")
    save(tmp_path / "masks/cut.png", IDS * 0 + 9)
    reader = semantic_reader(str(tmp_path))
    text = problems(reader)
    for line in (
        f"{tmp_path}/images/alone.png: has no mask of the same name in masks/",
        f"{tmp_path}/images/cut.png: cannot be read as an image",
        f"{tmp_path}/masks/cut.png: has the values 9; the classes have 0 to 2, ignored pixels 255",
        f"{tmp_path}/masks/high.png: has the values 4, 5, 6, 7;",
        f"{tmp_path}/masks/turned.png: is 2x4, its image {tmp_path}/images/turned.png is 4x2 (upright)",
        f"{tmp_path}/masks/colour.png: is a coloured picture",
    ):
        assert line in text
    kept, _ = drop(reader, check(reader, progress=False))
    assert [kept.sample_id(i) for i in range(len(kept))] == [f"{tmp_path.name}/good"]


@pytest.mark.parametrize(
    ("classes", "problem"),
    [("a\n\nc", "line 2 is empty"), ("a\nb\na\n", "line 3 repeats the class 'a'"), (None, "has no classes.txt")],
)
def test_what_is_wrong_with_the_classes_is_a_fault(tmp_path: Path, classes: str | None, problem: str) -> None:
    label_set(tmp_path / "s/d", {"x": IDS}, classes or "")
    if classes is None:
        (tmp_path / "s/d/classes.txt").unlink()
    assert problem in problems(semantic_reader("s/d", root=tmp_path))


def test_more_classes_than_a_byte_holds_are_refused(tmp_path: Path) -> None:
    label_set(tmp_path, {"x": IDS}, "\n".join(map(str, range(255))))
    assert check(semantic_reader(str(tmp_path)), progress=False) == []
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(UserError, match="256 classes are more than the 255"):
        semantic_reader(str(tmp_path))


def test_classes_of_several_sets_meet_by_name(tmp_path: Path) -> None:
    label_set(tmp_path / "a", {"x": IDS}, "sky\nroad\ncar")
    label_set(tmp_path / "b", {"x": IDS}, "car\ntree\nsky")
    reader = semantic_reader("a+b:0.5", root=tmp_path)
    assert reader.class_names == ["sky", "road", "car", "tree"]
    np.testing.assert_array_equal(reader.read(1).masks, [[2, 3, 0, 0], [255, 3, 3, 0]])
    assert check(reader, progress=False) == []
    np.testing.assert_array_equal(pixel_counts(reader), [1 + 1.5, 3, 3 + 0.5, 1.5, 1 + 0.5])
    rows = class_table(reader)
    assert [(row.file_ids, row.label, row.name) for row in rows] == [
        ("0, 2", 0, "sky"),
        ("1", 1, "road"),
        ("2, 0", 2, "car"),
        ("1", 3, "tree"),
        ("255", 255, "(ignored)"),
    ]
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert "0, 2      0  sky        20.83%" in show_classes(rows)
    text = problems(semantic_reader("b", root=tmp_path, class_names=["sky", "road", "car"]))
    assert "classes that the training data lack: tree" in text


def test_counts_are_those_of_the_part_that_trains(tmp_path: Path) -> None:
    label_set(tmp_path, {f"{i}": IDS * 0 + i % 3 for i in range(12)})
    reader = semantic_reader(str(tmp_path))
    parts = [split(reader, part=part, fold="0/3") for part in ("train", "val")]
    np.testing.assert_array_equal(sum(map(pixel_counts, parts)), pixel_counts(reader))
    kept = limit(parts[0], 3)
    ids = [int(kept.sample_id(i).rpartition("/")[2]) % 3 for i in range(3)]
    np.testing.assert_array_equal(pixel_counts(kept)[:3], [8 * ids.count(label) for label in range(3)])


def test_the_cache_keeps_labels_labels(tmp_path: Path) -> None:
    label_set(tmp_path / "d", {"x": IDS})
    reader = semantic_reader("d", root=tmp_path)
    cached = Cached(reader, path=tmp_path / "cache", size=(4, 8), progress=False)
    sample = cached.read(0)
    assert sample.are_labels
    np.testing.assert_array_equal(sample.masks, IDS.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(pixel_counts(cached), pixel_counts(reader))


# --- COCO as label maps


def square(left: int, top: int, side: int) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def coco_set(folder: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    """One picture of 20 x 10 pixels with these annotations, and another one without any; the path of its json."""
    for name in ("a", "b"):
        save(folder / "images/train" / f"{name}.png", np.full((10, 20, 3), 90, np.uint8))
    content = {
        "images": [{"id": i, "file_name": f"{n}.png", "width": 20, "height": 10} for i, n in ((7, "a"), (3, "b"))],
        "annotations": [{"id": i, "image_id": 7, "iscrowd": 0, **row} for i, row in enumerate(annotations)],
        "categories": [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 90, "name": "cup"}],
        **changes,
    }
    path = folder / "annotations/instances_train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_small_objects_lie_on_large_ones_and_those_on_crowds(tmp_path: Path) -> None:
    crowd = {"size": [10, 20], "counts": [0, 200]}
    path = coco_set(
        tmp_path,
        [
            {"category_id": 90, "segmentation": square(4, 4, 2)},
            {"category_id": 1, "segmentation": square(2, 2, 6), "area": 1},  # what the file says of areas is no matter
            {"category_id": 44, "segmentation": crowd, "iscrowd": 1},
        ],
    )
    reader = semantic_reader(str(path))
    assert reader.class_names == ["background", "person", "bottle", "cup"]
    expected = np.full((10, 20), 2, np.uint8)
    expected[2:8, 2:8] = 1
    expected[4:6, 4:6] = 3
    np.testing.assert_array_equal(reader.read(0).masks, expected)
    assert reader.sample_id(1) == "instances_train/b"
    assert not reader.read(1).masks.any()
    assert [(row.file_ids, row.label) for row in class_table(reader)][:2] == [("no object", 0), ("1", 1)]


def test_folders_and_json_join_by_names(tmp_path: Path) -> None:
    save(tmp_path / "d/images/x.png", WHITE)
    save(tmp_path / "d/masks/x.png", IDS)
    (tmp_path / "d/classes.txt").write_text("person\nbackground\nroad")
    path = coco_set(tmp_path, [{"category_id": 1, "segmentation": square(0, 0, 5)}])
    reader = semantic_reader(f"d+{path}", root=tmp_path)
    assert reader.class_names == ["person", "background", "road", "bottle", "cup"]
    np.testing.assert_array_equal(np.unique(reader.read(1).masks, return_counts=True), [[0, 1], [25, 175]])


@pytest.mark.parametrize("place", ["annotations", "images/train", "train", "images", "elsewhere", "elsewhere/train"])
def test_images_are_looked_for_where_they_usually_are(tmp_path: Path, place: str) -> None:
    path = coco_set(tmp_path, [])
    moved = [file.rename(tmp_path / file.name) for file in (tmp_path / "images/train").iterdir()]
    reader = semantic_reader(str(path))
    assert len(reader) == 0
    assert f"none of its 2 images is there ('a.png' …): looked in {tmp_path}/annotations" in problems(reader)
    for file in moved:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / place / file.name)
    reader = semantic_reader(str(path), images=tmp_path / "elsewhere" if "elsewhere" in place else "")
    assert problems(reader) == ""
    assert reader.files(0) == [str(tmp_path / place / "a.png")]
    with pytest.raises(UserError, match=r"data\.images: .* is no folder"):
        semantic_reader(str(path), images=tmp_path / "nowhere")


def test_what_an_image_is_and_what_the_json_says_must_agree(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.png", "width": 10, "height": 20}, {"id": 3, "file_name": "b.png"}]
    reader = semantic_reader(str(coco_set(tmp_path, [], images=images)))
    assert "a.png: is 20x10 (upright), but 10x20 by" in problems(reader)
    assert reader.read(1).masks.shape == (10, 20)  # a json need not say


def test_an_annotation_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco_set(tmp_path, [{"category_id": 90, "segmentation": square(4, 4, 2)}] * 3)
    reader = semantic_reader(str(path))
    untouched = [semantic_reader(str(path)).read(i).masks for i in range(2)]
    drawn: list[Any] = []
    to_rle = readers.semantic.to_rle

    def noted(*both: Any) -> Any:
        drawn.append(both)
        return to_rle(*both)

    monkeypatch.setattr(readers.semantic, "to_rle", noted)
    assert check(reader, progress=False) == []
    assert len(drawn) == 3
    other = semantic_reader(str(path))
    other.adopt(reader.findings())  # as another rank's reader does
    monkeypatch.setattr(readers.semantic, "to_rle", None)  # also in the workers
    for each in (reader, other):
        data = Dataset(each, make_target=semantic_target)
        sampler = TrainSampler(each, batch_size=2, size=(10, 20))
        loader = build_loader(data, sampler, collate_targets=collate_semantic, workers=1)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            (batch,) = loader
            order = np.argsort([sample.sample_id for sample in batch.samples])
            np.testing.assert_array_equal(batch.targets.labels.numpy()[order], untouched)
        assert check(each, progress=False) == []
        np.testing.assert_array_equal(pixel_counts(each), [396, 0, 0, 4, 0])


def test_an_image_that_changes_after_the_check_is_noticed(tmp_path: Path) -> None:
    reader = semantic_reader(str(coco_set(tmp_path, [])))
    check(reader, progress=False)
    save(tmp_path / "images/train/a.png", WHITE)
    with pytest.raises(DataError, match="changed since it was checked"):
        reader.read(0)


# --- real data


@needs_shared
def test_the_land_cover_of_dubai_reads_without_fault() -> None:
    train, val = (semantic_reader(part, root=SHARED / "data/dubai_semantic") for part in ("train", "val"))
    assert (len(train), len(val)) == (45, 18)
    assert check(train, progress=False) == check(val, progress=False) == []
    assert train.class_names == ["building", "land", "road", "vegetation", "water"]
    shares = [[row.share for row in class_table(reader)] for reader in (train, val)]
    np.testing.assert_allclose(shares[0], [0.07, 0.50, 0.08, 0.13, 0.21, 0.01], atol=0.01)
    np.testing.assert_allclose(shares[1], [0.29, 0.42, 0.13, 0.06, 0.09, 0.01], atol=0.01)


@needs_shared
def test_coco_has_the_labels_of_its_smallest_objects() -> None:
    """By pycocotools' own reading of the file: at each pixel the object of the smallest area, else the crowd."""
    from pycocotools.coco import COCO

    folder = SHARED / "data/coco_cc_instance/annotations"
    train = semantic_reader("instances_train.json", root=folder)
    reader = semantic_reader("instances_val.json", root=folder, class_names=train.class_names)
    assert (len(train), len(reader), len(train.class_names)) == (32, 11, 81)
    assert check(train, progress=False) == check(reader, progress=False) == []
    for part in (train, reader):
        name = "train" if part is train else "val"
        coco = COCO(str(folder / f"instances_{name}.json"))
        labels = {number: i + 1 for i, number in enumerate(sorted(coco.cats))}
        images = {Path(image["file_name"]).stem: image["id"] for image in coco.imgs.values()}
        for index in range(len(part)):
            sample = part.read(index)
            expected = np.zeros(sample.masks.shape, np.uint8)
            smallest = np.full(sample.masks.shape, np.inf)
            for row in coco.imgToAnns[images[part.sample_id(index).rpartition("/")[2]]]:
                mask = coco.annToMask(row) > 0
                rank = int(mask.sum()) + 1e9 * row["iscrowd"]
                over = mask & (rank <= smallest)
                expected[over], smallest[over] = labels[row["category_id"]], rank
            np.testing.assert_array_equal(sample.masks, expected)
    assert any(not part.read(i).masks.any() for part in (train, reader) for i in range(len(part)))

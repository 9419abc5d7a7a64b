"""Objects arrive as evaluation counts them, under labels without gaps, and whatever is wrong is listed at once."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as oracle

from errors import UserError
from layers import patch_of, runs_of
from readers import (
    Cached,
    DataError,
    InstanceReader,
    check,
    drop,
    instance_reader,
    instance_table,
    object_table,
    semantic_reader,
    split,
)
from readers.coco import decode_counts
from samples import Objects, Sample
from tests.conftest import SHARED, needs_shared
from tests.sets import save
from tests.test_readers_semantic import coco_set, square

PICTURE = np.zeros((10, 20, 3), np.uint8)  # as those of `coco_set`


def read_all(reader: InstanceReader) -> list[Sample]:
    assert [str(fault) for fault in check(reader, progress=False)] == []
    return [reader.read(index) for index in range(len(reader))]


def problems(reader: InstanceReader) -> str:
    return "\n".join(map(str, check(reader, progress=False)))


def masks_of(sample: Sample) -> list[np.ndarray]:
    return [oracle.decode(code) for code in sample.masks.codes]


def same_objects(one: Sample, other: Sample) -> None:
    assert one.class_ids == other.class_ids
    assert one.masks.codes == other.masks.codes
    for name in ("boxes", "crowd", "areas"):
        np.testing.assert_array_equal(getattr(one.masks, name), getattr(other.masks, name))
        assert getattr(one.masks, name).dtype == getattr(other.masks, name).dtype


# --- COCO json


def test_objects_keep_what_evaluation_counts(tmp_path: Path) -> None:
    box = [1.25, 1.5, 3.5, 3.0]
    rows: list[dict[str, Any]] = [
        {"category_id": 7, "segmentation": square(1, 1, 4), "bbox": box, "area": 12.5},
        {"category_id": 3, "segmentation": {"size": [10, 20], "counts": [60, 10, 130]}, "iscrowd": 1},
        {"category_id": 3, "segmentation": square(2, 3, 5), "bbox": [0, 0, float("nan"), 1], "area": -1},
        {"category_id": 3, "segmentation": [[1, 1, 1, 1, 1, 1]], "bbox": [0, 0, 0, 0], "area": None},
        {"category_id": 7, "bbox": [2, 3, 4, 5]},
    ]
    names = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 5, "name": "none"}]
    reader = instance_reader(str(coco_set(tmp_path, rows, categories=names)))
    sample = read_all(reader)[0]
    assert reader.class_names == ["dog", "none", "cat"]
    assert reader.file_ids == [3, 5, 7]
    assert sample.class_ids == [2, 0, 0, 0, 2]
    assert sample.masks.crowd.tolist() == [False, True, False, False, False]
    inside = [1.25, 1.5, 4.75, 4.5]
    assert sample.masks.boxes.tolist() == [inside, [6, 0, 7, 10], [2, 3, 7, 8], [0, 0, 0, 0], [2, 3, 6, 8]]
    assert sample.masks.areas.tolist() == [12.5, 10, 25, 0, 20]
    expected = np.zeros((10, 20), np.uint8)
    expected[3:8, 2:6] = 1
    np.testing.assert_array_equal(masks_of(sample)[4], expected)
    table = object_table(reader)
    assert [(row.file_ids, row.label, row.name, row.objects, row.crowds, row.without_mask) for row in table] == [
        ("3", 0, "dog", 2, 1, 0), ("5", 1, "none", 0, 0, 0), ("7", 2, "cat", 2, 0, 1),
    ]  # fmt: skip
    assert "1 of 4 objects are boxes alone" in instance_table(reader)


def test_images_without_objects_stay_and_ids_of_images_are_theirs(tmp_path: Path) -> None:
    images = [{"id": "z", "file_name": "b.png"}, {"id": 0, "file_name": "a.png"}]
    rows = [{"category_id": 1, "image_id": "z", "segmentation": square(1, 1, 4)}]
    reader = instance_reader(str(coco_set(tmp_path, rows, images=images)))
    empty, one = read_all(reader)
    assert [reader.image_id(i) for i in range(2)] == [0, "z"]
    assert (empty.class_ids, empty.masks.codes, empty.masks.boxes.shape) == ([], [], (0, 4))
    assert len(one.masks.codes) == 1


def test_classes_meet_by_name(tmp_path: Path) -> None:
    row = {"category_id": 4, "segmentation": square(1, 1, 4)}
    first = coco_set(tmp_path / "a", [row], categories=[{"id": 4, "name": "cat"}])
    second = coco_set(tmp_path / "b", [row], categories=[{"id": 4, "name": "dog"}, {"id": 9, "name": "cat"}])
    reader = instance_reader(f"{first}+{second}:2")
    assert reader.class_names == ["cat", "dog"]
    assert reader.file_ids == [4, 4]
    assert [sample.class_ids for sample in read_all(reader)] == [[0], [], [1], []]
    assert {summary.weight for summary in reader.datasets.values()} == {1, 2}
    assert object_table(reader)[0].file_ids == "4, 9"
    other = instance_reader(str(second), class_names=["person", "cat"])
    assert "has classes that the training data lack: dog" in problems(other)
    assert [other.read(0).class_ids, other.file_ids] == [[], [0, 9]]


def test_what_is_wrong_is_named_and_can_be_dropped(tmp_path: Path) -> None:
    good = {"category_id": 1, "segmentation": square(1, 1, 4)}
    rows: list[dict[str, Any]] = [
        good,
        {"category_id": 1},
        {"category_id": 1, "bbox": [0, 0, 1e9, 1]},
        {**good, "segmentation": "x"},
    ]
    path = coco_set(tmp_path, rows)
    reader = instance_reader(str(path))
    picture = tmp_path / "images/train/a.png"
    assert set(problems(reader).splitlines()) == {
        f"{picture}: annotation 1 in {path} has neither a segmentation nor a usable bbox",
        f"{picture}: annotation 2 in {path} has neither a segmentation nor a usable bbox",
        f"{picture}: annotation 3 in {path} has no segmentation",
    }
    with pytest.raises(DataError, match="annotation 1 in"):
        reader.read(0)
    kept, count = drop(reader, check(reader, progress=False))
    assert (len(kept), count) == (1, 1)
    with pytest.raises(UserError, match="is no folder"):
        instance_reader(str(path), images=tmp_path / "nowhere")


def test_more_objects_than_layers_can_hold_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = [{"category_id": 1, "segmentation": square(i % 18, i // 18, 1)} for i in range(101)]
    read_all(instance_reader(str(coco_set(tmp_path, apart))))
    stacked = [{"category_id": 1, "segmentation": square(1, 1, 4)}] * 101
    assert "more than 100 objects over one another" in problems(instance_reader(str(coco_set(tmp_path, stacked))))
    monkeypatch.setattr("readers.instance.MAX_OBJECTS", 90)
    assert "101 objects, which are more than 90" in problems(instance_reader(str(coco_set(tmp_path, apart))))


def test_what_a_check_learned_is_handed_on_and_not_drawn_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco_set(tmp_path, [{"category_id": 1, "segmentation": square(1, 1, 4)}] * 3)
    reader, other = (instance_reader(str(path)) for _ in range(2))
    before = [reader.read(i) for i in range(2)]
    check(reader, progress=False)
    monkeypatch.setattr("readers.instance.to_rle", None)
    other.adopt(pickle.loads(pickle.dumps(reader.findings())))
    for index in range(2):
        same_objects(reader.read(index), before[index])
        same_objects(other.read(index), before[index])
    save(tmp_path / "images/train/a.png", PICTURE[:5])
    with pytest.raises(DataError, match="changed since"):
        other.read(0)


def test_a_json_that_changes_after_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = coco_set(tmp_path, [{"category_id": 1, "segmentation": square(1, 1, 4)}])
    reader = instance_reader(str(path))
    path.write_text(path.read_text() + " ")
    assert "changed since it was listed" in problems(reader)
    path.unlink()
    assert f"{path}, which cannot be read any more" in problems(reader)


def test_a_cache_gives_the_same_objects(tmp_path: Path) -> None:
    rows = [{"category_id": 1, "segmentation": square(i, 1, 4), "iscrowd": i == 3} for i in range(5)]
    reader = instance_reader(str(coco_set(tmp_path, rows)))
    cached = Cached(reader, progress=False)
    for index in range(2):
        same_objects(cached.read(index), reader.read(index))
        assert cached.read(index).sample_id == reader.sample_id(index)
    small = Cached(reader, size=(5, 10), progress=False).read(0)
    assert small.masks.maps.shape[:2] == (5, 10)
    assert (small.masks.maps.dtype, small.masks.layer_of.tolist()) == (np.uint16, [0, 1, 2, 0])
    assert small.class_ids == [0] * 4


def test_parts_of_a_reader_have_a_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"category_id": 1, "segmentation": square(1, 1, 4)}] * 2
    reader = instance_reader(str(coco_set(tmp_path, rows)))
    counts = [object_table(split(reader, part=part, fraction=0.5))[0].objects for part in ("train", "val")]
    assert sorted(counts) == [0, 2]


# --- run-length codes


@pytest.mark.parametrize("seed", range(8))
def test_codes_become_runs_and_patches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((70, 90), np.uint8)
    top, left = rng.integers(0, 50, 2)
    mask[top : top + 20, left : left + 30] = rng.random((20, 30)) < (seed % 4) / 3
    code = oracle.encode(np.asfortranarray(mask))
    assert runs_of(code).tolist() == decode_counts(code["counts"].decode())
    top, left, patch = patch_of(code)
    again = np.zeros_like(mask)
    again[top : top + patch.shape[1], left : left + patch.shape[0]] = patch.T
    np.testing.assert_array_equal(again, mask)
    assert patch.size <= 600


# --- YOLO


def yolo_set(root: Path, lines: dict[str, str | None], names: str = "names: [cat, dog]", part: str = "train") -> Path:
    """Black pictures of 10 x 20 with these label files, None for one without."""
    for stem, text in lines.items():
        save(root / "images" / part / f"{stem}.png", PICTURE)
        if text is not None:
            (root / "labels" / part).mkdir(parents=True, exist_ok=True)
            (root / "labels" / part / f"{stem}.txt").write_text(text)
    (root / "data.yaml").write_text(f"path: ../somewhere\ntrain: images/train\nval: images/val\n{names}\n")
    return root


OUTLINE = "1 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6"
BOX = "0 0.5 0.5 0.5 0.4"


def test_yolo_outlines_and_boxes(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set", {"a": f"{OUTLINE}\n{BOX}\n\n", "b": None, "c": ""})
    reader = instance_reader("set/train", root=tmp_path)
    sample, *others = read_all(reader)
    assert reader.class_names == ["cat", "dog"]
    assert (reader.file_ids, reader.image_id(0), sample.class_ids) == ([0, 1], "a", [1, 0])
    np.testing.assert_allclose(sample.masks.boxes, [[2, 2, 6, 6], [5, 3, 15, 7]], atol=1e-5)
    assert sample.masks.areas.tolist() == [16, 40]
    expected = np.zeros((2, 10, 20), np.uint8)
    expected[0, 2:6, 2:6] = expected[1, 3:7, 5:15] = 1
    np.testing.assert_array_equal(masks_of(sample), expected)
    assert [other.class_ids for other in others] == [[], []]
    assert [row.without_mask for row in object_table(reader)] == [1, 0]
    assert [str(root / "labels/train/a.txt") in reader.files(i) for i in range(3)] == [True, False, False]


def test_yolo_layouts_and_names(tmp_path: Path) -> None:
    yolo_set(tmp_path / "a", {"x": BOX}, "names: {0: cat, 5: dog}")
    flat = tmp_path / "b"
    save(flat / "train/images/x.jpg", PICTURE)
    (flat / "train/labels").mkdir()
    (flat / "train/labels/x.txt").write_text(BOX)
    (flat / "classes.txt").write_text("cat\n")
    named = tmp_path / "c"
    save(named / "pictures/images/x.jpg", PICTURE)
    (named / "pictures/labels").mkdir()
    (named / "pictures/labels/x.txt").write_text(BOX)
    (named / "data.yaml").write_text("{train: pictures, names: [cat]}")
    for spec in ("a/train", "a/images/train", "b/train", "c/train"):
        assert [sample.class_ids for sample in read_all(instance_reader(spec, root=tmp_path))] == [[0]]
    assert instance_reader("a/train", root=tmp_path).file_ids == [0, 5]
    both = instance_reader("a/train+b/train", root=tmp_path)
    assert len(read_all(both)) == 2
    assert "name one of them" in problems(instance_reader("a", root=tmp_path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2 0.1 0.2 0.3 0.2 0.3 0.6", "has the class '2'"),
        ("-1 0.1 0.2 0.3 0.2 0.3 0.6", "has the class '-1'"),
        ("cat 0.5 0.5 0.5 0.5", "has the class 'cat'"),
        ("1.0 0.5 0.5 0.5 0.5", "has the class '1.0'"),
        ("9" * 5000 + " 0.5 0.5 0.5 0.5", "has the class"),
        ("0", "has 0 numbers"),
        ("0 0.5 0.5 0.5", "has 3 numbers"),
        ("0 0.1 0.2 0.3 0.2 0.3 0.6 0.1", "has 7 numbers"),
        ("0 0.1 0.2 0.3 nan 0.3 0.6", "not shares"),
        ("0 0.1 0.2 0.3 1e400 0.3 0.6", "not shares"),
        ("0 10 20 30 20 30 60", "not shares"),
        ("0 0.1 0.2 0.3 x 0.3 0.6", "no number"),
        ("0 " + "0 0 1 1 " * 200_000, "longer than"),
    ],
)
def test_bad_lines_are_named_by_file_and_number(tmp_path: Path, line: str, problem: str) -> None:
    root = yolo_set(tmp_path, {"a": f"{BOX}\n{line}", "b": BOX})
    faults = check(instance_reader(str(root / "train")), progress=False)
    assert [fault.path for fault in faults] == [str(root / "labels/train/a.txt")]
    assert faults[0].problem.startswith("line 2 has ")
    assert problem in faults[0].problem
    assert len(faults[0].problem) < 300


def test_folders_that_are_none_are_faults(tmp_path: Path) -> None:
    assert "is no data set" in problems(instance_reader("nothing", root=tmp_path))
    save(tmp_path / "a/images/x.png", PICTURE)
    assert "labels: is no folder" in problems(instance_reader("a", root=tmp_path))
    assert "has no names of classes" in problems(instance_reader("a", root=tmp_path))
    for names, problem in {
        "names: 3": "names no classes",
        "names: [cat, cat]": "which another one has",
        "names: [cat, [1]]": "no usable number or name",
        "names: {a: cat}": "no usable number or name",
        "names: [": "cannot be read as YAML",
        "names: &a [*a, *a]": "no usable number or name",
    }.items():
        root = yolo_set(tmp_path / "b", {"x": BOX}, names)
        assert problem in problems(instance_reader(str(root / "train"))), names
    (root / "data.yaml").write_text("names: [cat]")
    (root / "labels/train/y.txt").write_text(BOX)
    (root / "labels/train/x.txt").write_bytes(b"\xff")
    text = problems(instance_reader(str(root / "train")))
    assert "y.txt: has no image of the same name" in text
    assert "x.txt: is no text in UTF-8" in text


def test_no_data_yaml_leads_out_of_its_folder(tmp_path: Path) -> None:
    yolo_set(tmp_path / "secret", {"x": BOX})
    (tmp_path / "set").mkdir()
    for listed in ("../secret/images/train", str(tmp_path / "secret/images/train")):
        (tmp_path / "set/data.yaml").write_text(json.dumps({"part": listed, "names": ["cat", "dog"]}))
        reader = instance_reader("set/part", root=tmp_path)
        assert len(reader) == 0
        assert "leads out of its folder" in problems(reader)
    root = yolo_set(tmp_path / "links", {"x": BOX})
    os.symlink(tmp_path / "secret/labels/train/x.txt", root / "labels/train/z.txt")
    os.symlink(tmp_path / "secret/images/train/x.png", root / "images/train/z.png")
    reader = instance_reader("links/train", root=tmp_path)
    assert len(reader) == 1
    assert problems(reader).count("links out of the dataset") == 2


# --- real ones


@needs_shared
@pytest.mark.parametrize("name", ["coco_cc_instance", "nuclei_instance"])
def test_real_objects_are_those_of_pycocotools(name: str) -> None:
    from pycocotools.coco import COCO

    file = SHARED / "data" / name / "annotations/instances_val.json"
    reader, coco = instance_reader(str(file)), COCO(str(file))
    for index in range(0, len(reader), 3):
        sample, rows = reader.read(index), coco.imgToAnns[reader.image_id(index)]
        assert isinstance(sample.masks, Objects)
        assert [reader.file_ids[label] for label in sample.class_ids] == [row["category_id"] for row in rows]
        assert sample.masks.areas.tolist() == [row["area"] for row in rows]
        assert sample.masks.crowd.tolist() == [bool(row["iscrowd"]) for row in rows]
        for mask, box, row in zip(masks_of(sample), sample.masks.boxes, rows, strict=True):
            np.testing.assert_array_equal(mask, coco.annToMask(row))
            np.testing.assert_allclose(box[2:] - box[:2], row["bbox"][2:], atol=1e-3)


def test_a_folder_as_roboflow_exports_it(tmp_path: Path) -> None:
    """Pictures beside `_annotations.coco.json`, named by their folder; the label maps of its objects likewise."""
    folder = tmp_path / "parts" / "train"
    save(folder / "a.png", np.zeros((20, 30, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
        "categories": [{"id": 1, "name": "bolt"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 4, 10, 8], "area": 80, "iscrowd": 0,
                         "segmentation": [[5, 4, 15, 4, 15, 12, 5, 12]]}],
    }  # fmt: skip
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    reader = instance_reader("parts/train", root=tmp_path)
    assert not reader.faults
    assert list(reader.datasets) == ["train"]
    assert reader.sample_id(0) == "train/a"
    assert reader.class_names == ["bolt"]
    semantic = semantic_reader("parts/train", root=tmp_path)
    assert not semantic.faults
    assert semantic.class_names == ["background", "bolt"]

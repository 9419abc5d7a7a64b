"""Clips of every layout arrive as they are meant, decode what they are asked for, and say everything that is wrong."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as oracle

from errors import UserError
from readers import ClipReader, DataError, check, drop, split, video_reader, video_table
from readers.clip_folders import natural
from readers.films import FilmFrames, silence_opencv
from samples import Sample
from tests.conftest import SHARED, needs_shared
from tests.helpers import ROOT, draw_clip_set
from tests.sets import save
from tests.test_readers_coco import mutated

SIZE = (10, 20)


def frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.full((*size, 3), 10 * number, np.uint8)


def ids(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A label map with a column of two pixels for each value."""
    labels = np.zeros(size, np.uint8)
    for place, value in enumerate(values):
        labels[2:4, 3 * place] = value
    return labels


def clip(root: Path, name: str, masks: Sequence[np.ndarray | None], *, inner: str = "") -> Path:
    """A clip of as many frames as there are masks, in the layout of DAVIS."""
    for number, mask in enumerate(masks):
        save(root / "JPEGImages" / inner / name / f"{number:05d}.png", frame(number))
        if mask is not None:
            picture = Image.fromarray(mask)
            picture.putpalette(bytes(range(0, 256)) + bytes(512))
            save(root / "Annotations" / inner / name / f"{number:05d}.png", picture)
    (root / "Annotations" / inner / name).mkdir(parents=True, exist_ok=True)
    return root


def read_all(reader: ClipReader) -> list[Sample]:
    assert problems(reader) == []
    return [reader.read(index) for index in range(len(reader))]


def problems(reader: ClipReader) -> list[str]:
    return [str(fault) for fault in check(reader, progress=False, workers=1)]


def shown(sample: Sample) -> list[list[int] | None]:
    """The ids of the objects that each frame shows."""
    masklets = sample.masks
    known = enumerate(masklets.annotated)
    return [[masklets.object_ids[place] for place in masklets.visible(n)] if there else None for n, there in known]


# --- DAVIS, MOSE, SA-V's test sets


def test_palette_masks_are_decoded_when_asked_for(tmp_path: Path) -> None:
    clip(tmp_path / "set", "a", [ids(7, 3), None, ids(0, 3, 12, 255), ids()])
    (sample,) = read_all(video_reader("set", root=tmp_path))
    masklets = sample.masks
    assert (sample.sample_id, sample.dataset) == ("set/a", "set")
    assert sample.path == str(tmp_path / "set/JPEGImages/a")
    assert masklets.object_ids == (3, 7, 12)
    assert shown(sample) == [[3, 7], None, [3, 12], []]  # 255 is void
    np.testing.assert_array_equal(masklets.masks(0, [1, 0, 2]), [ids(7, 3) == 7, ids(7, 3) == 3, ids() > 0])
    assert masklets.masks(0, [0]).dtype == bool
    assert [each[0, 0, 0] for each in sample.frames] == [0, 10, 20, 30]
    assert len(pickle.dumps(sample)) < 2000


def test_what_is_seen_is_found_without_a_check_and_handed_on(tmp_path: Path) -> None:
    spec = str(clip(tmp_path / "set", "a", [ids(1), ids(2)]))
    checked = video_reader(spec)
    read_all(checked)
    other = video_reader(spec)
    assert shown(other.read(0)) == [[1], [2]]
    third = video_reader(spec)
    third.adopt(pickle.loads(pickle.dumps(checked.findings())))
    assert shown(third.read(0)) == [[1], [2]]


def test_white_alone_is_one_object(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / "JPEGImages/a" / f"{number}.jpg", frame(number))
        save(tmp_path / "Annotations/a" / f"{number}.png", ids(255 * number))
    (sample,) = read_all(video_reader(str(tmp_path)))
    assert sample.masks.object_ids == (1,)
    assert shown(sample) == [[], [1]]
    assert sample.masks.masks(1, [0]).sum() == 2


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        save(tmp_path / "JPEGImages/a" / f"f{number}.png", frame(number))
    save(tmp_path / "Annotations/a/f1.png", ids(1))
    (sample,) = read_all(video_reader(str(tmp_path)))
    assert [each[0, 0, 0] for each in sample.frames] == [10, 20, 100]
    assert sample.masks.annotated == (True, False, False)


def test_lists_of_clips_and_levels_of_sizes(tmp_path: Path) -> None:
    for inner in ("Full-Resolution", "480p"):
        for name in ("a", "b", "c"):
            clip(tmp_path / "davis", name, [ids(1)], inner=inner)
    lists = tmp_path / "davis/ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\na\n\na\n")
    (lists / "old.txt").write_text("/JPEGImages/480p/b/00000.jpg /Annotations/480p/b/00000.png\n" * 2)
    reader = video_reader("davis/ImageSets/2017/train.txt:2+davis/ImageSets/2017/old.txt", root=tmp_path)
    assert [sample.sample_id for sample in read_all(reader)] == ["davis/train/a", "davis/train/c", "davis/old/b"]
    assert "480p" in reader.read(0).path
    assert [reader.weight_of(name) for name in reader.datasets] == [2, 1]
    assert video_table(split(reader, part="val", fold="0/2")).splitlines()[1].split() == [
        "davis/train",
        "1",
        "1",
        "1",
        "1",
    ]
    (lists / "bad.txt").write_text("a\nd\n../../other\n.\n")
    assert [line.rpartition(": ")[2][:30] for line in problems(video_reader(str(lists / "bad.txt")))] == [
        "names the clip '../../other', ", "names the clip '.', which is n", "names the clip d, which is not",
    ]  # fmt: skip


def test_a_mask_for_each_object(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / "JPEGImages_24fps/v" / f"{number:05d}.png", frame(number))
    whole = np.full(SIZE, 255, np.uint8)
    save(tmp_path / "Annotations_6fps/v/000/00000.png", whole)
    save(tmp_path / "Annotations_6fps/v/000/00004.png", ids())
    save(tmp_path / "Annotations_6fps/v/010/00004.png", ids(1))
    (sample,) = read_all(video_reader(str(tmp_path)))
    assert sample.masks.object_ids == (0, 10)
    assert shown(sample) == [[0], None, None, None, [10]]
    assert sample.masks.masks(4, [1, 0]).sum((1, 2)).tolist() == [2, 0]
    assert sample.masks.masks(0, [0, 1]).sum((1, 2)).tolist() == [200, 0]
    save(tmp_path / "Annotations_6fps/v/x/00003.png", whole)
    save(tmp_path / "Annotations_6fps/v/010/00000.png", ids(1, size=(10, 21)))
    assert {line.rpartition("/v/")[2] for line in problems(video_reader(str(tmp_path)))} == {
        "x: is no number of an object",
        "010/00000.png: is 21x10, the first frame of its clip 20x10 (upright)",
    }


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    root = clip(tmp_path / "set", "good", [ids(1)])
    clip(root, "empty", [ids(), None])
    clip(root, "sizes", [ids(1), ids(1, size=(10, 21)), ids(1)])
    save(root / "JPEGImages/sizes/00002.png", frame(1, (11, 20)))
    clip(root, "stray", [ids(1)])
    save(root / "Annotations/stray/00007.png", ids(1))
    clip(root, "twice", [ids(1)])
    save(root / "JPEGImages/twice/00000.jpg", frame(1))
    clip(root, "kinds", [ids(1), ids(1), ids(1)])
    save(root / "Annotations/kinds/00000.png", np.full(SIZE, 300, np.uint16))
    save(root / "Annotations/kinds/00001.png", np.dstack([ids(200), ids(), ids(100)]))
    (root / "Annotations/kinds/00002.png").write_bytes(b"\x89PNG")
    clip(root, "frames", [ids(1), ids(1)])
    (root / "JPEGImages/frames/00000.png").write_bytes(b"none")
    (root / "JPEGImages/none").mkdir()
    (root / "Annotations/none").mkdir()
    save(root / "JPEGImages/alone/0.png", frame(1))
    clip(root, "links", [ids(1), ids(1)])
    (root / "JPEGImages/links/00001.png").unlink()
    (root / "JPEGImages/links/00001.png").symlink_to(save(tmp_path / "elsewhere.png", frame(1)))
    reader = video_reader(str(root))
    found = [line.removeprefix(f"{root}/") for line in problems(reader)]
    expected = [
        "JPEGImages/alone: has no masks: there is no folder",
        "JPEGImages/links/00001.png: links out of the dataset",
        "Annotations/links/00001.png: has no frame of the same name",
        "JPEGImages/none: holds no frames",
        "Annotations/stray/00007.png: has no frame of the same name",
        "JPEGImages/twice/00000.jpg: shares its stem with 00000.png",
        "JPEGImages/empty: shows no object in any annotated frame",
        "JPEGImages/frames/00000.png: cannot be read as an image",
        "Annotations/kinds/00000.png: has uint16 values up to 300; object ids are whole numbers from 0 to 254",
        "Annotations/kinds/00001.png: is a coloured picture; the pixels of a mask hold object ids: save it as grey or",
        "Annotations/kinds/00002.png: cannot be read as an image",
        "JPEGImages/sizes/00002.png: is 20x11, the first frame of its clip 20x10 (upright)",
        "Annotations/sizes/00001.png: is 21x10, the first frame of its clip 20x10 (upright)",
    ]
    assert len(found) == len(expected)
    assert all(any(line.startswith(start) for line in found) for start in expected), found
    kept, _ = drop(reader, check(reader, progress=False))
    assert [kept.sample_id(index) for index in range(len(kept))] == ["set/good", "set/links", "set/stray"]
    with pytest.raises(DataError, match="shows no object"):
        video_reader(str(root)).read(0)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    assert "is no data set of clips; that is a folder with JPEGImages" in problems(video_reader("x", root=tmp_path))[0]
    clip(tmp_path / "mose/train", "a", [ids(1)])
    assert "has parts of its own; name one of them, as" in problems(video_reader(str(tmp_path / "mose")))[0]
    (tmp_path / "new/JPEGImages").mkdir(parents=True)
    assert "has no folder Annotations" in problems(video_reader(str(tmp_path / "new")))[0]
    (tmp_path / "new/Annotations").mkdir()
    assert "holds no clips" in problems(video_reader(str(tmp_path / "new")))[0]
    with pytest.raises(UserError, match=r"data\.images"):
        video_reader("x", root=tmp_path, images="nowhere")


# --- SA-V


def code(mask: np.ndarray) -> dict[str, Any]:
    rle = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def film(path: Path, count: int, size: tuple[int, int] = (64, 192), code: str = "mp4v") -> Path:
    """A video in which a white bar grows by two pixels from frame to frame."""
    silence_opencv()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 24, size[::-1])
    for number in range(count):
        picture = np.zeros((*size, 3), np.uint8)
        picture[:, : 2 * number + 2] = 255
        writer.write(picture)
    writer.release()
    return path


def bar(picture: np.ndarray) -> int:
    return round((picture[0, :, 0] > 127).sum() / 2) - 1


def masklets(folder: Path, rows: list[list[np.ndarray | None]], **more: Any) -> Path:
    content = {
        "video_id": "sav_1", "video_environment": ["Indoor"], "video_frame_count": 9.0,
        "masklet": [[None if mask is None else code(mask) for mask in row] for row in rows],
        "masklet_id": [4, 2], "masklet_frame_count": [3, 3], **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sav_1_manual.json").write_text(json.dumps(content))
    return folder / "sav_1_manual.json"


ROWS: list[list[np.ndarray | None]] = [[ids(1) > 0, None], [ids(0, 1) > 0, ids(1) > 0], [ids() > 0, ids(1) > 0]]


def test_masklets_of_sav_beside_pictures(tmp_path: Path) -> None:
    path = masklets(tmp_path, ROWS)
    (tmp_path / "sav_1_auto.json").write_text("{}")  # what people drew comes first
    for number in range(9):
        save(tmp_path / "sav_1" / f"{number:05d}.jpg", frame(number))
    for spec in (tmp_path, path):
        (sample,) = read_all(video_reader(str(spec)))
        assert sample.sample_id == f"{spec.name.removesuffix('.json')}/sav_1"
        assert sample.masks.object_ids == (2, 4)
        assert shown(sample) == [[4], None, None, None, [2, 4], None, None, None, [2]]
        loaded = pickle.loads(pickle.dumps(sample)).masks
        np.testing.assert_array_equal(loaded.masks(4, [1, 0]), [ROWS[1][0], ROWS[1][1]])
        assert not loaded.masks(0, [0]).any()
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match="has changed"):
        loaded.masks(4, [0])


def test_masklets_of_sav_beside_a_video(tmp_path: Path) -> None:
    path = masklets(tmp_path / "json", [[np.ones((64, 192))], [np.ones((64, 192))]], masklet_id=[0])
    film(tmp_path / "films/sav_1.mp4", 6)
    (sample,) = read_all(video_reader(str(path), images=tmp_path / "films"))
    assert sample.masks.annotated == (True, False, False, False, True, False)
    assert [bar(each) for each in sample.frames] == [0, 1, 2, 3, 4, 5]
    (line,) = problems(video_reader(str(path)))
    assert f"{path}: has no frames: looked for sav_1/ and sav_1.mp4 in" in line


def test_faults_of_masklets(tmp_path: Path) -> None:
    for number in range(8):
        save(tmp_path / "sav_1" / f"{number:05d}.jpg", frame(number))
    wrong: dict[str, Any] = {"masklet": [[{"size": [1, 1], "counts": "01"}, 3], 5, []], "masklet_id": [1, 2**63]}
    path = masklets(tmp_path, [], **wrong)
    found = problems(video_reader(str(path)))
    assert [line.removeprefix(f"{path}: ") for line in found] == [
        "masklet[0][0] has a run-length code of size [1, 1], its picture has [10, 20]",
        "masklet[0][1] is no run-length code: 3",
        "masklet[1] is no list",
        "has a masklet_id that is no whole number, or that two masklets have",
        "has masks of 3 frames, every fourth, but there are 8 in all",
    ]


# --- videos


def test_frames_of_a_video_in_any_order(tmp_path: Path) -> None:
    frames = FilmFrames(str(film(tmp_path / "a.mp4", 40)))
    assert len(frames) == 40
    for number in (0, 1, 5, 39, 38, 37, 2, -1, 20):
        assert bar(frames[number]) == number % 40
    assert bar(pickle.loads(pickle.dumps(frames))[17]) == 17
    with pytest.raises(IndexError):
        frames[40]


def test_a_jump_that_misses_its_frame_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = FilmFrames(str(film(tmp_path / "a.mp4", 80)))
    monkeypatch.setattr(FilmFrames, "NEAR", 4)
    right = FilmFrames._jump

    def wrong(self: FilmFrames, number: int) -> None:
        right(self, max(0, number - 3))
        self._next = number

    monkeypatch.setattr(FilmFrames, "_jump", wrong)
    assert [bar(frames[number]) for number in (30, 10, 47)] == [30, 10, 47]


@pytest.mark.parametrize("name", ["9" * 5000, "x" * 5000, "..", "../x", "/etc", "a\0b", "clip0/../clip1"])
def test_no_text_names_what_is_no_folder(name: str, tmp_path: Path) -> None:
    draw_clip_set(tmp_path, 1)
    (tmp_path / "chosen.txt").write_text(f"clip0\n{name}\n")
    reader = video_reader(str(tmp_path / "chosen.txt"))
    assert len(reader) == 1
    assert [fault.problem.endswith("which is no name of a folder") for fault in reader.faults] == [True]


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["a10b", "9" * 5000, "10", "a2", "7", "007", "a10", "2"]
    assert sorted(names, key=natural) == ["2", "007", "7", "10", "9" * 5000, "a2", "a10", "a10b"]


def test_videos_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    whole = film(tmp_path / "whole.avi", 80, code="MJPG")
    (tmp_path / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    cases = {"text.mp4": "cannot be read as a video", "none.mp4": "does not exist", "cut.avi": "is damaged or cut off"}
    for name, problem in cases.items():
        with pytest.raises(DataError, match=problem):
            FilmFrames(str(tmp_path / name))


# --- COCO json and still images


def linked(folder: Path, images: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Path:
    for image in images:
        name = image["file_name"]
        save(folder / "images/train" / name, frame(int(Path(name).stem[-1])))
    rows = [{"id": number, "category_id": 1, **row} for number, row in enumerate(rows)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
    path = folder / "annotations/instances_train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


IMAGES = [
    {"id": 1, "file_name": "v/a1.png", "video_id": 9, "frame_id": 2},
    {"id": 2, "file_name": "v/a2.png", "video_id": 9, "frame_id": 0},
    {"id": 3, "file_name": "v/a3.png", "video_id": 9, "frame_id": 1},
    {"id": 4, "file_name": "w/b4.png", "video_id": "x/y"},
    {"id": 5, "file_name": "w/b5.png", "video_id": "x/y"},
]
LINKED = [
    {"image_id": 1, "track_id": 8, "segmentation": code(ids(1) > 0)},
    {"image_id": 1, "track_id": 3, "segmentation": code(ids(0, 1) > 0)},
    {"image_id": 2, "track_id": 8, "segmentation": code(ids(0, 0, 1) > 0)},
    {"image_id": 1, "segmentation": code(ids(1) > 0), "iscrowd": 1},
    {"image_id": 4, "instance_id": "car10", "segmentation": [[1, 1, 6, 1, 6, 6]]},
    {"image_id": 5, "instance_id": "car9", "segmentation": code(ids(1) > 0)},
]


def test_coco_images_with_a_video_are_clips(tmp_path: Path) -> None:
    first, second = read_all(video_reader(str(linked(tmp_path, IMAGES, LINKED))))
    assert (first.sample_id, Path(first.path).name) == ("instances_train/9", "a2.png")
    assert [each[0, 0, 0] for each in first.frames] == [20, 30, 10]
    assert first.masks.object_ids == (3, 8)
    assert shown(first) == [[8], [], [3, 8]]
    np.testing.assert_array_equal(first.masks.masks(2, [1, 0]), [ids(1) > 0, ids(0, 1) > 0])
    assert not first.masks.masks(0, [0]).any()
    assert second.sample_id == "instances_train/x/y"
    assert second.masks.object_ids == (1, 2)  # car9, car10
    assert shown(second) == [[2], [1]]
    pickle.loads(pickle.dumps(first))


def test_faults_of_linked_annotations(tmp_path: Path) -> None:
    images = [*IMAGES, {"id": 6, "file_name": "c6.png"}, {"id": 7, "file_name": "c7.png", "video_id": "../z"}]
    images += [{"id": 10 + n, "file_name": f"d{n}.png", "video_id": 5, "frame_id": 1} for n in range(2)]
    rows = [*LINKED, LINKED[0], {**LINKED[1], "track_id": 2**63}, {**LINKED[0], "image_id": 2, "track_id": [1]}]
    path = linked(tmp_path, images, [*rows, {"image_id": 5, "track_id": 1}])
    found = "\n".join(problems(video_reader(str(path))))
    for each in (
        f"a1.png: annotation 6 in {path} is the second of object 8 in this image",
        f"a1.png: annotation 7 in {path} has no track_id",
        f"a2.png: annotation 8 in {path} has no track_id",
        f"b5.png: annotation 9 in {path} has no segmentation",
        "c6.png: has no video_id in",
        "has two frames of one number in the video 5",
        "has the video_id '../z', which is no name",
    ):
        assert each in found
    assert found.count("\n") == 6


def test_still_images_are_clips_of_one_frame(tmp_path: Path) -> None:
    save(tmp_path / "set/im/sub/a.png", frame(1))
    save(tmp_path / "set/gt/sub/a.png", np.where(ids(1) > 0, 128, 127).astype(np.uint8))
    (binary,) = read_all(video_reader("set", root=tmp_path))
    assert (binary.sample_id, binary.path) == ("set/sub/a", str(tmp_path / "set/im/sub/a.png"))
    assert binary.masks.masks(0, [0]).sum() == 2
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    rows = [{"image_id": number % 2, "segmentation": code(ids(1) > 0), "iscrowd": number % 2} for number in range(4)]
    rows.append({"image_id": 0, "segmentation": code(ids() > 0)})
    (coco,) = read_all(video_reader(str(linked(tmp_path / "coco", images, rows))))
    assert (coco.sample_id, coco.masks.object_ids) == ("instances_train/0", (1, 2))
    assert coco.masks.masks(0, [1]).sum() == 2
    for name, text in {"a": "0 0.1 0.1 0.5 0.1 0.5 0.5\n", "b": ""}.items():
        save(tmp_path / "yolo/images" / f"{name}.png", frame(1))
        (tmp_path / "yolo/labels").mkdir(exist_ok=True)
        (tmp_path / "yolo/labels" / f"{name}.txt").write_text(text)
    (tmp_path / "yolo/classes.txt").write_text("thing\n")
    (yolo,) = read_all(video_reader(str(tmp_path / "yolo"), class_names=[]))
    assert (yolo.sample_id, shown(yolo)) == ("yolo/a", [[1]])


# --- anything at all


def fuzz(folder: str, first: int, last: int) -> None:
    """Read that many mutations of two good files; in a process of its own, since a fault in C would end it."""
    files = [linked(Path(folder), IMAGES, LINKED), masklets(Path(folder), ROWS)]
    for number in range(9):
        save(Path(folder) / "sav_1" / f"{number:05d}.png", frame(number))
    good = [json.loads(file.read_text()) for file in files]
    faulty = 0
    for seed in range(first, last):
        for file, content in zip(files, good, strict=True):
            file.write_text(json.dumps(mutated(content, random.Random(seed))))
            reader = video_reader(str(file))
            faults = check(reader, progress=False, workers=1)
            faulty += bool(faults)
            assert all("\n" not in str(fault) and str(fault).encode() for fault in faults)
            broken = {fault.path for fault in faults}
            for index in range(len(reader)):
                if not broken & set(reader.files(index)):
                    found = reader.read(index).masks
                    assert list(found.object_ids) == sorted(set(found.object_ids))
                    for number in map(int, np.flatnonzero(found.annotated)):
                        masks = found.masks(number, range(len(found.object_ids)))
                        assert np.flatnonzero(masks.any((1, 2))).tolist() == found.visible(number)
    print(faulty)


def test_no_mutation_of_a_file_crashes(tmp_path: Path) -> None:
    program = f"from tests.test_readers_video import fuzz; fuzz({str(tmp_path)!r}, 0, 60)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 40 < int(done.stdout) < 115


@needs_shared
def test_real_clips() -> None:
    reader = video_reader("davis_video/ImageSets/train.txt+davis_video/ImageSets/val.txt", root=SHARED / "data")
    assert problems(reader) == []
    assert [line.split()[1:] for line in video_table(reader).splitlines()[1:]] == [
        ["6", "74", "74", "6"], ["2", "24", "24", "2"],
    ]  # fmt: skip
    sample = reader.read(0)
    np.testing.assert_array_equal(
        sample.masks.masks(3, [0])[0],
        np.asarray(Image.open(SHARED / "data/davis_video/Annotations/bear/00006.png")) == 1,
    )

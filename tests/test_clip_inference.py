"""Prompted objects through clips, from the command line to the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import automatic
import checkpoint
import inference
import video
from annotate import Annotator
from automatic import grid_points
from clip_files import PictureClip, VideoClip, in_time
from clip_inference import Follower, last_correction
from dataset import normalize
from errors import run_command
from metrics.video import label_map
from models import create_model
from models.sam2.tracker import Tracker
from prompting import Prompt
from readers import DataError, check, instance_reader, semantic_reader
from readers.binary import BinaryFolders
from readers.images import read_image
from streams import resized
from tests.test_automatic import Squares
from tests.test_video import film, write_film
from tests.tiny import files_below, photo, save
from utils import choose_precision
from video import Backwards, VideoReader
from writers import LabelFolder, write_palette

Command = Callable[..., int]
CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return create_model("sam2", variant="tiny").eval()


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    meta = {"family": "sam2", "settings": {"variant": "tiny"}, "task": "video", "size": [SIDE, SIDE],
            "class_names": [], "experiment_name": "tiny"}  # fmt: skip
    checkpoint.save(folder / "best.pth", {"format": 1, "meta": meta, "model": model.state_dict(), "ema": None})
    return folder


@pytest.fixture
def infer(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> Command:
    """The command in this process, on the CPU; returns its exit code."""

    def call(*arguments: object, output: str = "out") -> int:
        always = ["--checkpoint", str(run), "--output", str(tmp_path / output), "--device", "cpu", "--num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["inference.py", *always, *map(str, arguments)])
        try:
            run_command(inference.command)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def follower(model: Any) -> Follower:
    return Follower(model, size=(SIDE, SIDE), device=CPU, precision=choose_precision("no", CPU))


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def square(left: int, top: int, size: tuple[int, int] = (48, 80)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + 16, left : left + 16] = True
    return mask


def prompts_file(folder: Path, content: Any) -> Path:
    (folder / "prompts.json").write_text(json.dumps(content))
    return folder / "prompts.json"


# ---------------------------------------------------------------- backwards


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mp4v"), ("avi", "MJPG"), ("mkv", "mp4v"), ("webm", "VP90")])
@pytest.mark.parametrize("can_seek", [True, False])
def test_a_video_backwards_has_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, codec: str, can_seek: bool
) -> None:
    path = write_film(tmp_path / f"a.{suffix}", film(40), codec)
    monkeypatch.setattr(video, "CHUNK_FRAMES", 7)
    if not can_seek:
        monkeypatch.setattr(VideoReader, "seek", lambda self, number: self)
    forwards = list(VideoReader(path))
    for stop in (40, 23, 1, 0):
        backwards = list(Backwards(path, stop))
        assert len(backwards) == stop
        assert all((one == other).all() for one, other in zip(backwards, forwards[:stop][::-1], strict=True))


def test_a_video_with_fewer_frames_cannot_be_read_backwards(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4", film(5))
    with pytest.raises(DataError, match=r"a\.mp4"):
        list(Backwards(path, 6))


def test_few_frames_wait_to_be_read_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_film(tmp_path / "a.mp4", film(40))
    chunks: list[int] = []
    decode = Backwards._frames

    def counted(self: Backwards, start: int, stop: int) -> list[np.ndarray]:
        chunks.append(stop - start)
        return decode(self, start, stop)

    monkeypatch.setattr(Backwards, "_frames", counted)
    monkeypatch.setattr(video, "CHUNK_BYTES", 3 * film(1)[0].nbytes)
    assert len(list(Backwards(path, 40))) == 40
    assert max(chunks) == 3


# ---------------------------------------------------------------- clips


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["10.png", "9.png", "f2_1.png", "f10_1.png", "100.png"]
    assert sorted(names, key=in_time) == ["9.png", "10.png", "100.png", "f2_1.png", "f10_1.png"]
    frames = film(3)
    files = [str(save(tmp_path / f"{number}.png", frame)) for number, frame in enumerate(frames)]
    clip = PictureClip("a", str(tmp_path), files)
    assert (clip.size, clip.count, clip.frame_name(1)) == ((48, 80), 3, "1")
    assert all((a == b).all() for a, b in zip(clip.frames(), frames, strict=True))
    assert all((a == b).all() for a, b in zip(clip.backwards(2), frames[1::-1], strict=True))
    save(tmp_path / "2.png", photo(0, 40, 80))
    with pytest.raises(DataError, match=r"2\.png: is 80x40, but the clip begins with 80x48"):
        list(clip.frames())


# ---------------------------------------------------------------- following


def test_objects_are_followed_as_the_tracker_does_forwards_and_back(model: Any, tmp_path: Path) -> None:
    clip = VideoClip("a", str(write_film(tmp_path / "a.mp4", film(5))))
    mask = square(20, 10)
    prompts = [Prompt(2, 4, mask=mask), Prompt(2, 9, box=[40, 8, 60, 30], points=[[50, 20]], labels=[1])]
    found = list(follower(model).follow(clip, prompts))
    assert [each.number for each in found] == [2, 3, 4, 1, 0]

    inputs = [normalize(resized(frame, (SIDE, SIDE))[None])[0] for frame in VideoReader(clip.path)]
    tracker = Tracker(model, clip.size, 5)
    tracker.add_mask(2, inputs[2], 4, mask)
    tracker.add_points(2, inputs[2], 9, [[50, 20]], [1], [40, 8, 60, 30])
    numbered = list(enumerate(inputs))
    expected = [*tracker.propagate(numbered[2:]), *tracker.propagate(numbered[1::-1], reverse=True)]
    for one, (number, ids, logits) in zip(found, expected, strict=True):
        assert one.number == number
        assert set(one.scores) == set(ids) == {4, 9}
        labels = np.array([0, 4, 9], np.uint8)[label_map(logits[:, 0], clip.size)]
        assert (one.labels == labels).all()
    assert (found[0].labels == 4)[mask].mean() > 0.9
    assert any((each.labels > 0).any() for each in found[1:])


def test_a_later_point_corrects_what_was_followed_and_counts_everywhere(model: Any, tmp_path: Path) -> None:
    clip = VideoClip("a", str(write_film(tmp_path / "a.mp4", film(4))))
    first = Prompt(0, 1, mask=square(20, 10))
    click = Prompt(2, 1, points=[[60, 40]], labels=[0])
    assert last_correction({0: [first], 2: [click]}) == 2
    assert last_correction({0: [first], 2: [Prompt(2, 2, points=[[1, 1]], labels=[1])]}) == -1
    assert last_correction({0: [first], 2: [Prompt(2, 1, mask=square(1, 1))]}) == -1
    found = {each.number: each for each in follower(model).follow(clip, [first, click])}

    inputs = [normalize(resized(frame, (SIDE, SIDE))[None])[0] for frame in VideoReader(clip.path)]
    tracker = Tracker(model, clip.size, 4)
    tracker.add_mask(0, inputs[0], 1, square(20, 10))
    list(tracker.propagate(enumerate(inputs)))
    tracker.add_points(2, inputs[2], 1, [[60, 40]], [0])
    for number, _, logits in tracker.propagate(enumerate(inputs)):
        assert (found[number].labels == label_map(logits[:, 0], clip.size)).all(), number
    without = {each.number: each.labels for each in follower(model).follow(clip, [first])}
    assert (without[0] == found[0].labels).all()
    assert (without[2] != found[2].labels).any()


def test_a_clip_that_ends_before_its_prompt_is_a_fault(model: Any, tmp_path: Path) -> None:
    clip = VideoClip("a", str(write_film(tmp_path / "a.mp4", film(3))))
    with pytest.raises(DataError, match=r"a\.mp4: ends before frame 7"):
        list(follower(model).follow(clip, [Prompt(7, 1, box=[1, 2, 30, 40])]))


def test_frames_are_decoded_a_few_ahead(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0

    class Long(PictureClip):
        def __init__(self) -> None:
            self.name, self.path, self.size, self.count = "a", "a", (8, 8), 0

        def frames(self) -> Iterator[np.ndarray]:
            nonlocal decoded
            decoded = 0
            while True:
                decoded += 1
                yield np.zeros((8, 8, 3), np.uint8)

    def propagate(self: Tracker, frames: Any, reverse: bool = False) -> Any:
        return [(number, [1], torch.ones(1, 1, 8, 8)) for number, _ in frames]

    seen = []
    monkeypatch.setattr(Tracker, "propagate", propagate)
    monkeypatch.setattr(Tracker, "scores", lambda self, number: torch.zeros(1))
    for found in follower(model).follow(Long(), [Prompt(0, 1, box=[1, 2, 3, 4])]):
        assert decoded <= found.number + 8
        seen.append(found.number)
        if found.number == 30:
            break
    assert seen == list(range(31))


# ---------------------------------------------------------------- files


def test_a_video_becomes_masks_overlays_and_results(infer: Command, tmp_path: Path) -> None:
    path = write_film(tmp_path / "in/clip.mp4", film(4))
    drawn = np.zeros((48, 80), np.uint8)
    drawn[square(20, 10)], drawn[square(50, 20)] = 1, 3
    write_palette(tmp_path / "first.png", drawn)
    content = {
        "clip.mp4": [{"frame": 1, "mask": "first.png"}, {"object": 3, "frame": 3, "mask": "first.png", "class": "cat"}]
    }
    arguments = ("--input", path, "--prompts", prompts_file(tmp_path, content), "--side_by_side")
    assert infer(*arguments) == 0
    masks = {f"masks/clip/{number:05d}.png" for number in range(4)}
    assert files_below(tmp_path / "out") == {*masks, "overlays/clip.mp4", "side_by_side/clip.mp4", "results_segm.json"}
    picture = Image.open(tmp_path / "out/masks/clip/00001.png")
    assert picture.mode == "P"
    labels = np.array(picture)
    assert labels.shape == (48, 80)
    assert set(np.unique(labels)) <= {0, 1, 3}
    assert (labels == drawn).mean() > 0.9
    overlay, beside = (VideoReader(tmp_path / f"out/{kind}/clip.mp4") for kind in ("overlays", "side_by_side"))
    assert (overlay.count, overlay.rate, beside.count) == (4, 12.5, 4)
    assert next(iter(beside)).shape == (48, 240, 3)

    records = json.loads((tmp_path / "out/results_segm.json").read_text())
    assert {record["image_id"] for record in records} <= {f"clip/{number:05d}" for number in range(4)}
    assert {record["object_id"]: record["category_id"] for record in records} == {1: 1, 3: 2}
    for record in records:
        mask = coco_mask.decode(record["segmentation"])
        assert (mask == (read(tmp_path / f"out/masks/{record['image_id']}.png") == record["object_id"])).all()
        assert 0 <= record["score"] <= 1

    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")}
    save(tmp_path / "out/masks/clip/00009.png", drawn)  # of an earlier, longer video
    assert infer(*arguments) == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")} == before


def test_folders_are_clips_and_pictures_are_stills(infer: Command, tmp_path: Path) -> None:
    for number, frame in enumerate(film(2)):
        save(tmp_path / f"clips/bear/{number + 9}.png", frame)
        save(tmp_path / f"clips/camel/{number}.jpg", frame)
    save(tmp_path / "photo.jpg", photo(1, 30, 40))
    assert infer("--input", tmp_path / "clips", tmp_path / "photo.jpg", "--point", "20,10", "2:5,5") == 0
    assert files_below(tmp_path / "out") == {
        "masks/bear/9.png", "masks/bear/10.png", "masks/camel/0.png", "masks/camel/1.png", "masks/photo.png",
        "overlays/bear.mp4", "overlays/camel.mp4", "overlays/photo.jpg", "results_segm.json",
    }  # fmt: skip
    assert read(tmp_path / "out/masks/photo.png").shape == (30, 40)
    assert infer("--input", tmp_path / "clips/bear", "--box", "5,5,40,40", "--no-overlay", output="one") == 0
    assert files_below(tmp_path / "one") == {"masks/bear/9.png", "masks/bear/10.png", "results_segm.json"}


def test_what_cannot_be_read_leaves_nothing_and_the_others_go_on(
    infer: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        path = write_film(tmp_path / f"in/{name}.mkv", film(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "in/c.mp4").write_bytes(b"no video")
    for number, frame in enumerate(film(3)):
        save(tmp_path / f"in/d/{number}.png", frame if number else frame[:40])
    arguments = ("--point", "20,10", "--annotate", "binary", "--annotate_every", 5)
    assert infer("--input", tmp_path / "in", *arguments) == 2
    said = capsys.readouterr().err
    assert "3 of the inputs have no result" in said
    for words in ("b.mkv: is damaged or cut off", "c.mp4: cannot be read as a video", "1.png: is 80x48, but the clip"):
        assert words in said
    made = files_below(tmp_path / "out")
    assert {name for name in made if "/b" in name or "/d" in name} == set()
    assert {"overlays/a.mp4", "annotations/gt/a/00015.png"} <= made
    records = json.loads((tmp_path / "out/results_segm.json").read_text())
    assert {record["image_id"].split("/")[0] for record in records} == {"a"}
    assert "annotations/gt/a/00001.png" not in made


def test_without_any_clip_nothing_is_written(infer: Command, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert infer("--input", tmp_path / "a.mp4", "--point", "1,2", "--annotate", "instance") == 2
    assert files_below(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "clip.mp4"], ["clip.mp4 needs prompts"]),
        (["--input", "clip.mp4", "--point", "99,3", "2:3,99", "--frame", "4"], ["99,3 lies", "3,99 lies", "frame 4"]),
        (["--input", "clip.mp4", "--prompts", "none.json"], ["none.json", "cannot be read"]),
        (["--input", "clip.mp4", "a.png", "--point", "9,45"], ["a.png: --point and --box of object 1: the point 9,45"]),
        (["--input", "a.png", "--point", "1,2", "--tile"], ["--tta and --tile are not for"]),
        (["--input", "a.png", "--point", "1,2", "--cutout"], ["--cutout needs masks that are alpha"]),
        (["--input", "a.png", "--annotate", "binary"], ["--annotate needs them"]),
        (["--input", "clip.mp4", "frames/clip.png", "--point", "1,2"], ["would write the same outputs"]),
        (["--input", "frames", "--point", "1,2", "--output", "frames"], ["would write into the input"]),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence_before_anything_is_written(
    infer: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_film(tmp_path / "clip.mp4", film(3))
    save(tmp_path / "a.png", photo(0, 40, 40))
    save(tmp_path / "frames/clip.png", photo(0, 40, 40))
    before = files_below(tmp_path)
    assert infer(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    for word in words:
        assert word in said
    assert files_below(tmp_path) == before


def test_label_folders_are_whole_or_not_there(tmp_path: Path) -> None:
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").write_text("mine")
    save(tmp_path / "a/9.png", labels)
    with suppress(KeyError), LabelFolder(tmp_path / "a") as folder:
        folder.put("1", labels)
        raise KeyError
    assert files_below(tmp_path) == {"a/notes.txt", "a/9.png"}
    with LabelFolder(tmp_path / "a") as folder:
        for name in ("2", "1"):
            folder.put(name, labels)
            assert (folder.get(name) == labels).all()
        assert files_below(tmp_path / "a") == {"notes.txt", "9.png"}
    assert files_below(tmp_path) == {"a/notes.txt", "a/1.png", "a/2.png"}
    assert (read(tmp_path / "a/2.png") == labels).all()


# ---------------------------------------------------------------- without prompts


def test_points_of_a_grid_are_asked_each_by_itself(model: Any) -> None:
    with torch.no_grad():
        features = model.encode(torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
        points = grid_points(2, (SIDE, SIDE))
        logits, ious = automatic.ask(model, features, points)
        assert (logits.shape, ious.shape) == ((4, 3, 16, 16), (4, 3))
        for number in range(4):
            alone, quality = automatic.ask(model, features, points[number : number + 1])
            torch.testing.assert_close(alone[0], logits[number], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(quality[0], ious[number], rtol=1e-4, atol=1e-4)


def test_pictures_without_prompts_become_objects(
    infer: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "ask", lambda model, features, points: Squares().masks_at(points))
    save(tmp_path / "in/sub/7.png", photo(0, 50, 70))
    assert infer("--input", tmp_path / "in", "--points_per_side", 9, "--crops") == 0
    made = files_below(tmp_path / "out")
    assert {"masks/sub/7.png", "overlays/sub/7.jpg", "colors/sub/7.png", "results_segm.json"} <= made
    assert "crops/sub/7/001_object.png" in made
    assert np.unique(read(tmp_path / "out/masks/sub/7.png")).tolist() == [0, 1, 2, 3]
    records = json.loads((tmp_path / "out/results_segm.json").read_text())
    assert [record["category_id"] for record in records] == [1, 1, 1]


# ---------------------------------------------------------------- training data of other families


@pytest.mark.parametrize("task", ["binary", "semantic", "instance"])
def test_annotations_are_read_again_without_a_fault(infer: Command, tmp_path: Path, task: str) -> None:
    for number, frame in enumerate(film(3)):
        save(tmp_path / f"in/bear/{number}.png", frame)
    write_film(tmp_path / "film.mp4", film(3))
    save(tmp_path / "12.jpg", photo(1, 48, 80))
    drawn = np.zeros((48, 80), np.uint8)
    drawn[square(20, 10)], drawn[square(50, 20)] = 1, 3
    write_palette(tmp_path / "first.png", drawn)
    content = [{"object": 1, "points": [[5, 5]], "class": "dog"}, {"object": 3, "frame": 0, "mask": "first.png"}]
    inputs = [tmp_path / "in", tmp_path / "film.mp4", tmp_path / "12.jpg"]
    assert infer("--input", *inputs, "--prompts", prompts_file(tmp_path, content), "--annotate", task) == 0
    folder = tmp_path / "out/annotations"
    reader: Any = {
        "binary": lambda: BinaryFolders("annotations", root=folder.parent),
        "semantic": lambda: semantic_reader("annotations", root=folder.parent),
        "instance": lambda: instance_reader("annotations/annotations.json", root=folder.parent),
    }[task]()
    assert check(reader) == []
    assert len(reader) == 7
    names = {"binary": [], "semantic": ["background", "dog", "object"], "instance": ["dog", "object"]}
    assert list(reader.class_names) == names[task]
    for index in range(len(reader)):
        sample = reader.read(index)
        stem = Path(sample.path).relative_to(folder / ("im" if task == "binary" else "images")).with_suffix("")
        labels = read(tmp_path / f"out/masks/{stem}.png")
        if stem.as_posix().startswith("bear"):
            assert (sample.frames[0] == read_image(tmp_path / f"in/{stem}.png")).all()
        if task == "binary":
            assert (sample.masks == np.where(labels > 0, 255, 0)).all()
        elif task == "semantic":
            assert (sample.masks == np.array([0, 1, 0, 2])[labels]).all()
        else:
            there = [number for number in (1, 3) if (labels == number).any()]
            assert sample.class_ids == [{1: 0, 3: 1}[number] for number in there]
            for number, code in zip(there, sample.masks.codes, strict=True):
                assert (coco_mask.decode(code) == (labels == number)).all()


@pytest.mark.parametrize("task", ["binary", "semantic", "instance"])
def test_a_clip_that_fails_leaves_nothing_in_the_annotations(tmp_path: Path, task: Any) -> None:
    clips = []
    for name in ("a", "a/b", "c"):
        files = [str(save(tmp_path / f"in/{name}/{number}.png", frame)) for number, frame in enumerate(film(2))]
        clips.append(PictureClip(name, str(tmp_path / "in" / name), files))
    labels = square(20, 10).astype(np.uint8)
    with Annotator(tmp_path / "set", task, ["x"]) as annotator:
        for clip in clips:
            with suppress(KeyError), annotator.of(clip, {1: 1}) as annotate:
                annotate(0, labels, labels)
                annotate(1, labels, labels)
                if clip.name == "a":
                    raise KeyError
        assert not (tmp_path / "set").exists()
    made = {name for name in files_below(tmp_path / "set") if "/" in name}
    assert {name.partition("/")[2].rpartition("/")[0] for name in made} == {"a/b", "c"}
    if task == "instance":
        content = json.loads((tmp_path / "set/annotations.json").read_text())
        assert [row["file_name"].rpartition("/")[0] for row in content["images"]] == ["images/a/b"] * 2 + [
            "images/c"
        ] * 2
        assert {row["image_id"] for row in content["annotations"]} == {row["id"] for row in content["images"]}
    with suppress(KeyError), Annotator(tmp_path / "other", task, ["x"]):
        raise KeyError
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_annotations_go_into_a_new_folder(infer: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.png", photo(1, 30, 40))
    arguments = ("--input", tmp_path / "a.png", "--point", "20,10", "--annotate", "binary")
    assert infer(*arguments) == 0
    assert infer(*arguments) == 2
    assert "annotations exists already" in capsys.readouterr().err

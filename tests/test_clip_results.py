"""Finished masks of clips: those of any program are scored, what is wrong is listed, and our own are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clip_results import FinishedClips, SavedMasks
from colors import palette
from errors import UserError
from metrics import VideoMetric
from readers import check, video_reader
from samples import SampleInfo
from tests.helpers import run_script
from writers import write_palette

SIZE = (24, 40)
FRAMES = [f"{number:05d}" for number in range(5)]


def squares(shift: int) -> np.ndarray:
    """(5, H, W) label maps of the objects 2 and 7, which move to the right; 7 is there from frame 1 on."""
    labels = np.zeros((5, *SIZE), np.uint8)
    for t, frame in enumerate(labels):
        frame[2:10, 3 + 2 * t + shift : 13 + 2 * t + shift] = 2
        frame[13:20, 10 + t : 18 + t] = 7 * (t > 0)
    return labels


def write_labels(folder: Path, labels: np.ndarray) -> None:
    for name, frame in zip(FRAMES, labels, strict=True):
        write_palette(folder / f"{name}.png", frame)


def write_masks(folder: Path, labels: np.ndarray, ids: tuple[int, ...] = (2, 7)) -> None:
    for number, name in zip(np.unique(labels)[1:], ids, strict=True):
        for frame, mask in zip(FRAMES, labels == number, strict=True):
            (folder / f"{name:03d}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name:03d}" / f"{frame}.png")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """The clips a and b in the layout of DAVIS."""
    for clip in ("a", "b"):
        (tmp_path / "set/JPEGImages" / clip).mkdir(parents=True)
        for name in FRAMES:
            Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(tmp_path / f"set/JPEGImages/{clip}/{name}.jpg")
        write_labels(tmp_path / "set/Annotations" / clip, squares(0))
    return tmp_path / "set"


def score(folder: Path, truth: Path, **options: Any) -> VideoMetric:
    clips = FinishedClips(folder, video_reader(str(truth)), **options)
    assert check(clips, progress=False) == []
    metric = VideoMetric()
    for clip in map(clips.read, range(len(clips))):
        metric.update_labels(
            clip.frames.__getitem__, clip.masks, dataset=clip.dataset, sample_id=clip.sample_id, path=clip.path
        )
    metric.reduce()
    return metric


def test_label_maps_and_masks_score_alike(truth: Path, tmp_path: Path) -> None:
    for shift, clip in enumerate(("a", "b")):
        write_labels(tmp_path / "maps/masks" / clip, squares(shift))
        write_masks(tmp_path / "single" / clip, squares(shift))
    maps, single = score(tmp_path / "maps", truth), score(tmp_path / "single", truth)
    assert maps.per_class() == single.per_class()
    assert [(row["name"], row["j"]) for row in maps.per_class()] == [
        ("set/a/2", 1), ("set/a/7", 1), ("set/b/2", pytest.approx(9 / 11)), ("set/b/7", 1),
    ]  # fmt: skip
    assert [row.path for row in maps.rows] == [str(tmp_path / "maps/masks" / clip) for clip in ("a", "b")]


def test_the_one_object_of_a_clip_may_be_white(truth: Path, tmp_path: Path) -> None:
    for clip in ("a", "b"):
        write_labels(truth / "Annotations" / clip, np.where(squares(0) == 2, 1, 0).astype(np.uint8))
        write_labels(tmp_path / "out" / clip, np.where(squares(0) == 2, 255, 0).astype(np.uint8))
    assert score(tmp_path / "out", truth).compute()["j_and_f"] == 1


def test_only_scored_frames_must_be_there_and_sizes_may_be_mended(truth: Path, tmp_path: Path) -> None:
    for clip in ("a", "b"):
        write_labels(tmp_path / "out" / clip, squares(0).repeat(2, 1).repeat(2, 2))
        for name in (FRAMES[0], FRAMES[-1]):
            (tmp_path / "out" / clip / f"{name}.png").unlink()
    assert score(tmp_path / "out", truth, resize=True).compute()["j"] == 1
    write_labels(tmp_path / "out/c", squares(0))
    assert FinishedClips(tmp_path / "out", video_reader(str(truth))).extra == [str(tmp_path / "out/c")]


def test_everything_wrong_is_listed(truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_labels(out / "a", squares(0))
    (out / "a/00001.png").write_bytes(b"no picture")
    write_palette(out / "a/00002.png", np.full(SIZE, 9, np.uint8))
    write_palette(out / "a/00003.png", np.zeros((5, 6), np.uint8))
    write_masks(out / "b", squares(0))
    (out / "b/007/00002.png").unlink()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(out / "b/002/00003.png")
    clips = FinishedClips(out, video_reader(str(truth)))
    faults = check(clips, progress=False)
    assert [(fault.path, fault.problem.split(" (")[0]) for fault in faults] == [
        (f"{out}/a/00001.png", "cannot be read as an image"),
        (f"{out}/a/00002.png", "holds what its clip does not have: 9; the objects there are 2, 7"),
        (f"{out}/a/00003.png", "is 6x5, its clip is 40x24; --resize_predictions brings it to that size"),
        (f"{out}/b", "lacks 1 of 6 scored masks: 007/00002.png"),
        (f"{out}/b/002/00003.png", "is 6x5, its clip is 40x24; --resize_predictions brings it to that size"),
    ]
    for index, clip in enumerate("ab"):
        files = clips.files(index)
        assert all(fault.path in files for fault in faults if f"/{clip}" in fault.path)
    nothing = check(FinishedClips(tmp_path / "nowhere", video_reader(str(truth))), progress=False)
    assert "holds no folders of masks" in nothing[0].problem
    assert ["lacks 3 of 3" in fault.problem for fault in nothing[1:]] == [True, True]
    (truth / "Annotations/a/00000.png").write_bytes(b"no picture")
    assert str(truth / "Annotations/a/00000.png") in {fault.path for fault in check(clips, progress=False)}


def save(folder: Path, truth: Path, labels: np.ndarray) -> None:
    """As a model that found the labels would."""
    reader = video_reader(str(truth))
    saved = SavedMasks(folder, reader)
    for index in range(len(reader)):
        clip = reader.read(index)
        logits = np.where(labels == np.unique(labels)[1:].reshape(-1, 1, 1, 1), 4.0, -4.0)
        batch = SimpleNamespace(
            targets=SimpleNamespace(originals=[clip.masks]), samples=[SampleInfo(clip.sample_id, "", "set", SIZE)]
        )
        saved({"logits": [torch.from_numpy(logits)]}, batch)  # type: ignore[arg-type]


def test_what_is_written_is_what_was_found(truth: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", truth, squares(1))
    assert sorted(path.name for path in (tmp_path / "out/b").iterdir()) == [f"{name}.png" for name in FRAMES]
    picture = Image.open(tmp_path / "out/b/00003.png")
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.array(picture.getpalette()).reshape(-1, 3), palette())
    np.testing.assert_array_equal(np.array(picture), squares(1)[3])
    assert score(tmp_path / "out", truth).compute()["j"] == pytest.approx((1 + 9 / 11) / 2)


def test_objects_that_label_maps_cannot_hold_are_masks_of_their_own(truth: Path, tmp_path: Path) -> None:
    for clip in ("a", "b"):
        for file in (truth / "Annotations" / clip).iterdir():
            file.unlink()
        write_masks(truth / "Annotations" / clip, squares(0), (0, 300))
    save(tmp_path / "out", truth, squares(0))
    assert sorted(path.name for path in (tmp_path / "out/a").iterdir()) == ["000", "300"]
    assert score(tmp_path / "out", truth).compute()["j_and_f"] == 1
    write_labels(tmp_path / "maps/a", squares(0))
    faults = check(FinishedClips(tmp_path / "maps", video_reader(str(truth))), progress=False)
    assert "label maps cannot hold the object 0" in str(faults[0])


def test_clips_of_one_name_cannot_lie_side_by_side(truth: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(truth, target_is_directory=True)
    with pytest.raises(UserError, match="several data sets have a clip a"):
        SavedMasks(tmp_path / "out", video_reader(f"{truth}+{tmp_path}/other"))


def test_the_command(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for clip in ("a", "b"):
        write_labels(tmp_path / "good" / clip, squares(0))
        write_labels(tmp_path / "poor" / clip, squares(3))
    given = ["--ground_truth", str(truth), "--device", "cpu"]
    folders = [str(tmp_path / name) for name in ("poor", "good")]
    code, said, err = run_script(
        monkeypatch, "evaluate", "--predictions", *folders, *given, "--metrics", "J", "F_decay"
    )
    assert code == 0, err
    assert [line.split()[1:] for line in said.splitlines()[3:]] == [
        ["poor", "2", "0.7692", "0.0000*"], ["good", "2", "1.0000*", "0.0000*"],
    ]  # fmt: skip
    code, said, err = run_script(monkeypatch, "evaluate", "--compare", *folders, *given)
    assert code == 0, err
    assert "B better" in said
    (tmp_path / "good/a/00002.png").unlink()
    code, _, err = run_script(monkeypatch, "evaluate", "--predictions", folders[1], *given)
    assert code == 2
    assert "good/a: lacks 1 of 3 scored frames: 00002.png" in err
    code, _, err = run_script(monkeypatch, "evaluate", "--checkpoint", "x", "y", "--output_masks", "out")
    assert code == 2
    assert "--output_masks takes the masks of one checkpoint" in err

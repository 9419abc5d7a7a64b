"""Clips from the command line to the files: training, scores, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import checkpoint
from models.sam2 import image_encoder
from samples import Sample, SampleInfo
from tasks import Scored, get_task
from tasks.video import Followed, draw_labels, video_color
from tests.helpers import SAM2, draw_clip_set, flags_for, records, run_script, tiny_sam2

FAST = [
    "--batch_size", "2", "--lr", "1e-3", "--optimizer.layer_decay", "1", "--optimizer.backbone_lr_scale", "1",
    "--optimizer.weight_decay", "0", "--train.max_grad_norm", "1", "--data.augment", "[]", "--logging.log_frequency",
    "2", "--model.drop_path", "0", "--model.dropout", "0", "--scheduler.warmup_steps", "5",
    "--model.point_prompts", "0", "--model.conditioning_frames", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_encoder.TRUNKS, "tiny", tiny_sam2())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, one of two objects, to be learnt by heart."""
    folder = tmp_path_factory.mktemp("data")
    draw_clip_set(folder / "train", 2)
    (folder / "val").symlink_to(folder / "train", target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_encoder.TRUNKS, "tiny", tiny_sam2())
        runs = tmp_path_factory.mktemp("runs")
        flags = flags_for(data, runs, "clips", *FAST, "--epochs", "20", "--eval_each_epoch", "10", model=SAM2)
        code, out, err = run_script(patch, "train", *flags)
        assert code == 0, err
        assert "val/clip1/2" in out  # each object in the table
        return runs / "clips"


def test_a_run_learns_and_every_term_falls(run: Path) -> None:
    rows = records(run)
    lines = [row for row in rows if row["kind"] == "train"]
    for term in ("focal", "dice", "iou"):
        first, last = (np.mean([row[f"train/loss/{term}"] for row in part]) for part in (lines[:3], lines[-3:]))
        assert last < 0.8 * first, term
    best = max((row for row in rows if row["kind"] == "val"), key=lambda row: row["val/j_and_f"])
    assert best["val/j"] > 0.25
    assert "middle" in (run / "report.html").read_text()
    assert checkpoint.load(run / "best.pth")["meta"]["task"] == "video"


def test_scores_of_a_checkpoint_are_those_of_its_validation(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "scores.csv"
    given = ["--checkpoint", str(run), "--data.test", str(data / "val"), "--num_workers", "0"]
    code, _, err = run_script(monkeypatch, "evaluate", *given, "--output", str(table))
    assert code == 0, err
    best = max(row["val/j_and_f"] for row in records(run) if row["kind"] == "val")
    assert float(scores_in(table)["j_and_f"]) == pytest.approx(best, abs=1e-9)


def scores_in(table: Path) -> dict[str, str]:
    names, values = (line.split(",") for line in table.read_text().splitlines())
    return dict(zip(names, values, strict=True))


def test_written_masks_score_what_the_checkpoint_does(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = tmp_path / "masks"
    given = ["--checkpoint", str(run), "--data.test", str(data / "val"), "--num_workers", "0"]
    code, _, err = run_script(
        monkeypatch, "evaluate", *given, "--output_masks", str(masks), "--output", str(tmp_path / "a.csv")
    )
    assert code == 0, err
    assert sorted(path.name for path in masks.glob("*/*")) == sorted(
        2 * ["00000.png", "00001.png", "00002.png", "00003.png"]
    )
    truth = ["--ground_truth", str(data / "val"), "--output", str(tmp_path / "b.csv")]
    code, _, err = run_script(monkeypatch, "evaluate", "--predictions", str(masks), *truth)
    assert code == 0, err
    first, second = scores_in(tmp_path / "a.csv"), scores_in(tmp_path / "b.csv")
    assert {name: first[name] for name in ("j", "f", "j_and_f")} == {
        name: second[name] for name in ("j", "f", "j_and_f")
    }

    (masks / "clip0" / "00002.png").unlink()
    cv2.imwrite(str(masks / "clip1" / "00001.png"), np.full((64, 80), 9, np.uint8))
    code, _, err = run_script(monkeypatch, "evaluate", "--predictions", str(masks), *truth)
    assert code == 2
    assert "00002" in err
    assert "holds what its clip does not have: 9" in err


def test_what_clips_cannot_have_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, words in (
        (["--evaluation.tta"], "evaluation.tta"),
        (["--data.load_all"], "data.load_all"),
        (["--train.cache_features", "1"], "data.augment"),
        (["--train.cache_features", "1", "--data.augment", "[]"], "model.trainable"),
        (["--data.resize", "pad"], "data.resize"),
        (["--data.mix", "{mosaic: 1}"], "data.mix"),
    ):
        command = flags_for(data, tmp_path, "refused", *flags, model=SAM2)
        code, _, err = run_script(monkeypatch, "train", *command)
        assert code == 2
        assert words in err


class Disc:
    """One object, known in the first and the last of five frames."""

    object_ids = (1,)
    annotated = (True, False, False, False, True)

    def visible(self, frame: int) -> list[int]:
        return [0]

    def masks(self, frame: int, objects: Any) -> np.ndarray:
        mask = np.zeros((60, 80), np.uint8)
        cv2.circle(mask, (20 + 8 * frame, 30), 12, 1, -1)
        return mask[None].astype(bool)


def test_results_and_panels_show_the_prompt_and_what_became_of_it() -> None:
    task = get_task("video")
    logits = torch.full((2, 5, 15, 20), -9.0)
    logits[0, :, 5:10, 5:10] = 4
    logits[1, :, 7:12, 8:14] = 6
    predictions = {"logits": [logits], "scores": [torch.ones(2, 5)], "prompted": [[0, 2]]}
    (found,) = task.results(predictions, [SampleInfo("a", "", "", (30, 40))])
    assert found.frames == [0, 2, 4]
    assert found.labels[0].shape == (30, 40)
    assert found.labels[1][18, 18] == 2  # the larger logit has the pixel
    image = np.full((60, 80, 3), 90, np.uint8)
    sample = Sample([image] * 5, Disc())
    result = Followed([0, 2, 4], [np.zeros((30, 40), np.uint8)] * 3)
    panels = task.panels(Scored(sample, image[:30, :40], result, [], {}))
    assert list(panels) == ["given", "middle", "last"]
    assert {panel.shape for panel in panels.values()} == {(30, 40, 3)}
    given, middle, last = panels.values()
    assert (given != 90).any()
    assert (middle == 90).all()  # nothing was found, and nothing is known
    assert (last == 255).all(-1).any()  # the truth's outline
    assert not (last == 255).all()


def test_pictures_and_colours() -> None:
    labels = np.zeros((30, 40), np.uint8)
    labels[5:15, 5:15], labels[10:20, 20:30] = 1, 2
    drawn = draw_labels(np.full((30, 40, 3), 90, np.uint8), labels)
    assert (drawn[0, 0] == 90).all()
    assert len({tuple(drawn[10, 10]), tuple(drawn[15, 25]), tuple(drawn[0, 0])}) == 3
    assert get_task("video").colorize(labels).shape == (30, 40, 3)

    class Limits:
        red_below_iou, cyan_above_iou = 0.5, 0.8

    scores = [(0.4, 1.0), (0.7, 1.0), (0.9, 1.0), (0.9, 0.5)]
    colors = [video_color({"mask_iou": iou, "object_accuracy": right}, Limits) for iou, right in scores]
    assert colors == ["red", "blue", "cyan", "blue"]

"""A class for each pixel from the command line to the files: training, resuming, scores, pictures, finished masks."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import checkpoint
from colors import palette
from errors import UserError
from samples import Sample
from tasks import Scored, get_task
from tasks.semantic import draw_semantic, semantic_panels
from tests.helpers import (
    SEGFORMER,
    SMALL,
    assert_same_run,
    draw_label_set,
    draw_set,
    flags_for,
    in_process,
    records,
    run_script,
)
from tracking import Callback, StepRecord

FEW = [
    "--batch_size",
    "4",
    "--logging.log_frequency",
    "1",
    "--loss.weights",
    "{ce: 1, dice: 1}",
    "--data.augment",
    "[]",
]
CLASSES = ["ground", "disc", "bar"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_label_set(folder / "train", 8)
    draw_label_set(folder / "val", 3, seed=1)
    return folder


def flags(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    return flags_for(data, runs, name, *FEW, "--data.augment", "[]", *more, model=SEGFORMER)


def test_a_run_learns_is_scored_and_predicts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--optimizer.backbone_lr_scale", "1", "--loss.class_weights", "inverse_sqrt", "--eval_each_epoch", "10"]
    scores = in_process(*flags(data, tmp_path, "run", "--epochs", "30", "--lr", "1e-3", *more))
    assert scores["miou"] > 0.6  # the best constant has 0.27
    run = tmp_path / "run"
    kinds = [row["kind"] for row in records(run)]
    assert kinds.count("val") == 3
    assert json.loads((run / "run.json").read_text())["primary"] == "miou"
    told = (run / "train.log").read_text()
    for name in CLASSES:
        assert f"{name} " in told  # the table of classes with their shares
    page = (run / "report.html").read_text()
    assert "mean_accuracy" in page
    assert "By class, at epoch 30" in page
    assert 'alt="confusion matrix"' in page
    assert "green is right, red is wrong" in page
    assert page.count("data:image/jpeg;base64,") >= 3 * 2 * 4
    assert checkpoint.load(run / "best.pth")["meta"]["settings"]["num_classes"] == 3

    code, _, err = run_script(
        monkeypatch, "evaluate", "--checkpoint", str(run), "--data.test", str(data / "val"), "--device", "cpu",
        "--num_workers", "0", "--output", str(tmp_path / "scores.csv"),
    )  # fmt: skip
    assert code == 0, err
    with open(tmp_path / "scores.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    best = max(each["val/miou"] for each in records(run) if each["kind"] == "val")
    assert float(row["miou"]) == pytest.approx(best, abs=1e-6)

    for more in ([], ["--tta", "--tta_scales", "1"], ["--tile"]):
        output = tmp_path / f"out{len(more)}"
        code, _, err = run_script(
            monkeypatch, "inference", "--checkpoint", str(run), "--input", str(data / "val/images"),
            "--output", str(output), "--device", "cpu", "--num_workers", "0", *more,
        )  # fmt: skip
        assert code == 0, err
        hits = []
        for number in range(3):
            labels = np.array(Image.open(output / "masks" / f"{number:02d}.png"))
            truth = np.array(Image.open(data / "val/masks" / f"{number:02d}.png"))
            assert labels.shape == truth.shape
            assert labels.max() <= 2
            hits.append((labels == truth)[truth != 255].mean())
            assert (np.array(Image.open(output / "colors" / f"{number:02d}.png")) == palette()[labels]).all()
            assert Image.open(output / "overlays" / f"{number:02d}.jpg").size == (96, 80)
        if not more:
            assert np.mean(hits) == pytest.approx(float(row["accuracy"]), abs=0.02)
        assert np.mean(hits) > 0.7, more


def test_a_resumed_run_is_the_unbroken_one(data: Path, tmp_path: Path) -> None:
    mixed = ["--data.mix", "{classmix: 0.5, cutmix: 0.3}", "--train.ema_decay", "0.9", "--eval_each_epoch", "1"]
    in_process(*flags(data, tmp_path, "unbroken", *mixed, "--epochs", "3"))

    class Stop(Callback):
        def on_step(self, record: StepRecord) -> None:
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    in_process(*flags(data, tmp_path, "resumed", *mixed, "--epochs", "3"), callbacks=[Stop()])
    assert checkpoint.load(tmp_path / "resumed" / "last.pth")["state"]["step"] < 6
    in_process(*flags(data, tmp_path, "resumed", *mixed, "--epochs", "3", "--resume"))
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")


def test_the_other_task_of_the_family(tmp_path: Path) -> None:
    draw_set(tmp_path / "train", 4)
    draw_set(tmp_path / "val", 2, seed=1)
    scores = in_process(*flags_for(tmp_path, tmp_path, "b", "--task", "binary", "--batch_size", "4", "--epochs", "2",
                                   "--logging.log_frequency", "1", model=SEGFORMER))  # fmt: skip
    assert 0 < scores["jaccard"] < 1
    assert checkpoint.load(tmp_path / "b" / "last.pth")["meta"]["settings"]["num_classes"] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.background_synthesis", "0.5"], "background_synthesis"),
        (["--data.mix", "{cutmix: 0.5}", "--batch_size", "1"], "batch_size of 2"),
        (["--data.mix", "{cutmixx: 0.5}"], "did you mean cutmix"),
        (["--model.num_classes", "2"], "the data has 3 classes, but model.num_classes is 2"),
        (["--loss.weights", "{bce: 1}"], "unknown term 'bce'"),
        (["--loss.iou_smooth", "1"], "unknown key loss.iou_smooth"),
        (["--task", "semantik"], "did you mean semantic"),
    ],
)
def test_mistakes_end_in_a_sentence(data: Path, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        in_process(*flags(data, tmp_path, "x", "--epochs", "1", *more))


def test_a_family_says_which_tasks_it_does(data: Path, tmp_path: Path) -> None:
    birefnet = ["--model.family", "birefnet", "--task", "semantic", *SMALL]
    with pytest.raises(UserError, match="birefnet does not do the task semantic"):
        in_process(*flags_for(data, tmp_path, "x", "--epochs", "1", model=birefnet))


# ---------------------------------------------------------------- pictures


def test_a_legend_names_what_is_there_and_fits() -> None:
    labels = np.zeros((120, 160), np.uint8)
    labels[:, 80:] = 2
    image = np.full((120, 160, 3), 128, np.uint8)
    drawn = draw_semantic(image, labels, CLASSES)
    assert drawn.shape == image.shape
    corner = drawn[-20:, -20:].reshape(-1, 3).mean(0)
    assert np.abs(corner - (0.45 * 128 + 0.55 * palette()[2])).max() < 2
    assert (drawn != draw_semantic(image, labels, [])).any()
    tiny = draw_semantic(image[:8, :8], labels[:8, :8], CLASSES)  # no room for a legend
    assert tiny.shape == (8, 8, 3)


def test_panels_tell_right_wrong_and_ignored_apart() -> None:
    truth = np.array([[0, 1, 255]], np.uint8).repeat(10, 0).repeat(10, 1)
    labels = np.zeros_like(truth)
    image = np.full((10, 30, 3), 100, np.uint8)
    panels = semantic_panels(Scored(Sample([image], truth), image, labels, ["a", "b"], {}))
    assert list(panels) == ["image", "truth", "prediction", "error"]
    right, wrong, ignored = (panels["error"][5, x].astype(int) for x in (5, 15, 25))
    assert right[1] > right[0]
    assert wrong[0] > 1.5 * wrong[1]
    assert ignored.max() < 30
    assert (panels["truth"] == palette()[truth]).all()
    assert get_task("semantic").cut_out is None

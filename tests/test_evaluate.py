"""evaluate.py from the command line to the table, against scores computed here from the files alone."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import evaluate
from config import BiRefNetSettings, Config
from errors import run_command
from tests.tiny import SETTINGS, SIDE, expected_probabilities, photo, save, tiny_model, write_run

Command = Callable[..., tuple[int, str]]
Table = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [tiny_model(0), tiny_model(1)]


@pytest.fixture(scope="module")
def runs(models: list[Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that were trained on data of their own, with settings that do not bound a test."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(model=BiRefNetSettings(**SETTINGS))
    config.data.train = "somewhere/train"
    config.data.num_workers = config.train.test_limit = 0
    config.train.test_limit = 1
    config.evaluation.batch_size = 3
    config.device = "cuda:7"
    return [write_run(folder / name, model, config=config) for name, model in zip("AB", models, strict=True)]


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Test sets X (two samples) and Y (one) in one folder."""
    for number, name in enumerate(("X/{}/one", "X/{}/two", "Y/{}/three")):
        height, width = 40 + 10 * number, 70
        save(tmp_path / f"{name.format('im')}.png", photo(number, height, width))
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        save(tmp_path / f"{name.format('gt')}.png", np.tile(np.roll(ramp, 9 * number), (height, 1)))
    return tmp_path


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command in this process: (exit code, the table as CSV, or what it said instead)."""
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(tmp_path / "absent.yml"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str]:
        words = [str(word) for word in arguments]
        flags = ["--device", "cpu", "--num_workers", "0", "--output", "scores.csv", "scores.md", "scores.tex"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, *words])
        try:
            run_command(evaluate.command)
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        return 0, (tmp_path / "scores.csv").read_text()

    return call


def parse(written: str) -> Table:
    """{(name, test set): {column: cell}} of a table written as CSV."""
    table: Table = {}
    for cells in csv.DictReader(io.StringIO(written)):
        table[cells.pop("name"), cells.pop("test_set")] = cells
    return table


def jaccard_and_mae(model: Any, folder: Path, name: str, size: int = SIDE, tta: bool = False) -> tuple[float, float]:
    image = np.array(Image.open(folder / "im" / f"{name}.png"))
    alpha = np.array(Image.open(folder / "gt" / f"{name}.png")) / 255
    found = expected_probabilities(model, image, (size, size)).astype(float)
    if tta:
        mirror = expected_probabilities(model, image[:, ::-1].copy(), (size, size))[:, ::-1]
        found = (found + mirror) / 2
    product = (found * alpha).sum()
    return product / (found.sum() + alpha.sum() - product), np.abs(found - alpha).mean()


def test_table_of_two_checkpoints_on_two_test_sets(
    score: Command, runs: list[Path], models: list[Any], sets: Path
) -> None:
    code, said = score("--checkpoint", *runs, "--data.test", "X+Y")
    assert code == 0
    for suffix, mark in (("md", "**"), ("tex", r"\textbf")):
        assert mark in (sets / f"scores.{suffix}").read_text()  # the best of each column
    table = parse(said)
    assert [key[1] for key in table] == ["X", "X", "Y", "Y", "all", "all"]
    for run, model in zip(runs, models, strict=True):
        x1, x2 = (jaccard_and_mae(model, sets / "X", name) for name in ("one", "two"))
        y = jaccard_and_mae(model, sets / "Y", "three")
        for name, rows in (("X", [x1, x2]), ("Y", [y]), ("all", [x1, x2, y])):
            cells = table[run.name, name]
            assert cells["samples"] == str(len(rows))
            assert float(cells["jaccard"]) == pytest.approx(np.mean([row[0] for row in rows]), abs=6e-5)
            assert float(cells["mae"]) == pytest.approx(np.mean([row[1] for row in rows]), abs=6e-5)
    assert table[runs[0].name, "all"] != table[runs[1].name, "all"]


def test_flags_change_what_the_run_says(score: Command, runs: list[Path], models: list[Any], sets: Path) -> None:
    run = runs[0]
    plain = parse(score("--checkpoint", run, "--data.test", "X")[1])
    single = parse(score("--checkpoint", run, "--data.test", "X", "--batch_size", 1)[1])
    for name in ("jaccard", "mae", "s_measure"):  # to what the order of a sum in a larger batch may change
        assert float(single[run.name, "X"][name]) == pytest.approx(float(plain[run.name, "X"][name]), abs=1e-4)
    flipped = ["--tta", "--evaluation.tta_scales", 1]
    code, said = score("--checkpoint", run, "--data.test", "X", "--size", 160, 160, *flipped, "--test_limit", 1)
    assert code == 0
    cells = parse(said)[run.name, "X"]
    assert cells["samples"] == "1"
    expected, *others = (
        jaccard_and_mae(models[0], sets / "X", "one", size=size, tta=tta)[0]
        for size, tta in ((160, True), (160, False), (64, True), (64, False))
    )
    assert float(cells["jaccard"]) == pytest.approx(expected, abs=2e-4)  # mirroring and resizing hardly commute
    assert min(abs(expected - other) for other in others) > 1e-3


def test_official_weights_score_as_the_run_that_holds_them(
    score: Command, runs: list[Path], models: list[Any], sets: Path
) -> None:
    torch.save({"state_dict": models[0].official_state_dict()}, sets / "official.pth")
    code, said = score("--checkpoint", runs[0], "official.pth", "--data.test", "X", "--size", 64)
    assert code == 0, said
    table = parse(said)
    assert table["official.pth", "X"] == table[runs[0].name, "X"]
    code, said = score("--checkpoint", "official.pth")
    assert code == 2
    assert "official.pth" in said
    assert "--data.test" in said


def test_a_run_on_drawn_data_is_scored_on_drawn_data(score: Command, models: list[Any], tmp_path: Path) -> None:
    config = Config(model=BiRefNetSettings(**SETTINGS))
    assert config.is_demo
    run = write_run(tmp_path / "drawn", models[0], config=config)
    drawn = tmp_path / "data" / "demo_binary"  # as an earlier training left it; drawing all of it again takes seconds
    for part in ("im", "gt"):
        for name in "abc":
            save(drawn / "val" / part / f"{name}.png", np.full((30, 40), 90, np.uint8))
    (drawn / demo.MARKER).write_text(f"version {demo.VERSION}, seed 0\n")
    code, said = score("--checkpoint", run, "--test_limit", 2)
    assert code == 0, said
    assert parse(said)[run.name, "val"]["samples"] == "2"


def test_faulty_samples_are_listed_or_left_out(score: Command, runs: list[Path], sets: Path) -> None:
    save(sets / "X/gt/two.png", np.zeros((5, 5), np.uint8))
    save(sets / "X/im/alone.png", photo(7, 20, 20))
    code, said = score("--checkpoint", runs[0], "--data.test", "X")
    assert code == 2
    assert "2 faults" in said
    assert "gt/two.png" in said
    assert "im/alone.png" in said
    code, said = score("--checkpoint", *runs, "--data.test", "X", "--data.on_error", "skip")
    assert code == 0
    assert [cells["samples"] for cells in parse(said).values()] == ["1", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.test", "X"], ["--checkpoint"]),
        (["--checkpoint", "nothing", "--data.test", "X"], ["no checkpoint nothing"]),
        (["--checkpoint", "X", "--data.test", "X"], ["no best.pth or last.pth", "X"]),
        (["--checkpoint", "X/im/one.png", "--data.test", "X"], ["X/im/one.png"]),
        (["--checkpoint", "RUN"], ["RUN", "--data.test"]),
        (["--checkpoint", "RUN", "--data.test", "missing"], ["missing", "is no folder"]),
        (["--checkpoint", "RUN", "--data.tset", "X"], ["unknown key data.tset", "did you mean data.test"]),
        (["--checkpoint", "RUN", "--data.test", "X", "--size", "100"], ["data.size", "multiples of 32"]),
        (["--checkpoint", "RUN", "--data.test", "X", "--device", "cuda:99"], ["cuda:99"]),
        (["--checkpoint", "RUN", "--data.test", "X", "--mixed_precision", "fp8"], ["fp8"]),
    ],
)
def test_mistakes_end_in_a_sentence(
    score: Command, runs: list[Path], sets: Path, arguments: list[str], words: list[str]
) -> None:
    fill = {"RUN": str(runs[0])}
    code, said = score(*(fill.get(word, word) for word in arguments))
    assert code == 2
    assert said.startswith("error: ")
    assert "Traceback" not in said
    for word in words:
        assert fill.get(word, word) in said


# ---------------------------------------------------------------- finished masks, the best epoch, comparisons


@pytest.fixture
def finished(sets: Path) -> Path:
    """Masks of X that other programs wrote: `good` is the truth with a little noise, `poor` is its mirror image."""
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        truth = np.array(Image.open(sets / "X/gt" / f"{name}.png"))
        noisy = np.clip(truth + generator.integers(-9, 10, truth.shape), 0, 255).astype(np.uint8)
        save(sets / "good" / f"{name}.png", noisy)
        save(sets / "poor" / f"{name}.png", truth[:, ::-1].copy())
    return sets


def test_finished_masks_get_the_scores_of_pysodmetrics(score: Command, finished: Path) -> None:
    sod = pytest.importorskip("py_sod_metrics")
    code, said = score("--predictions", "good", "poor", "--ground_truth", "X")
    assert code == 0, said
    table = parse(said)
    assert [key[0] for key in table] == ["good", "poor"]
    for name in ("good", "poor"):
        structure, error = sod.Smeasure(), sod.MAE()
        for sample in ("one", "two"):
            pair = [np.array(Image.open(path)) for path in (finished / name / f"{sample}.png",
                                                            finished / "X/gt" / f"{sample}.png")]  # fmt: skip
            structure.step(*pair)
            error.step(*pair)
        cells = next(cells for key, cells in table.items() if key[0] == name)
        assert float(cells["s_measure"]) == pytest.approx(structure.get_results()["sm"], abs=1e-6)
        assert float(cells["normalized_mae"]) == pytest.approx(error.get_results()["mae"], abs=1e-6)


def test_what_is_wrong_with_finished_masks_is_listed_at_once(score: Command, finished: Path) -> None:
    (finished / "good/one.png").unlink()
    save(finished / "good/two.png", np.zeros((5, 5), np.uint8))
    code, said = score("--predictions", "good", "--ground_truth", "X/gt")
    assert code == 2
    assert "one" in said
    assert "two.png" in said


def test_a_comparison_says_which_is_better_and_by_how_much(score: Command, finished: Path) -> None:
    code, said = score("--compare", "poor", "good", "--ground_truth", "X", "--metrics", "Sm", "MAE")
    assert code == 0, said
    rows = {row["metric"]: row for row in csv.DictReader(io.StringIO(said))}
    assert set(rows) >= {"s_measure", "normalized_mae"}
    for row in rows.values():
        assert "B" in row["verdict"]
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert float(row["difference"]) == pytest.approx(float(row["b"]) - float(row["a"]), abs=1e-9)


def test_the_best_epoch_is_found(score: Command, models: list[Any], sets: Path) -> None:
    run = write_run(sets / "runs" / "R", models[0])
    for epoch, model in enumerate(models, 1):
        write_run(sets / "runs" / f"at{epoch}", model)
        (sets / "runs" / f"at{epoch}" / "best.pth").rename(run / f"R_epoch_{epoch}.pth")
    code, said = score("--checkpoint", run, "--best_by", "MAE", "--data.test", "X")
    assert code == 0, said
    table = parse(said)
    assert len(table) == 2
    best = min(table, key=lambda key: float(table[key]["normalized_mae"]))[0]
    assert f"best by MAE: {run / best}" in (sets / "scores.md").read_text().replace("\\", "")

"""Several seeds and all folds: which runs they mean, what they reach together, and how a series goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import pytest

import config
import series
from errors import UserError
from tests.helpers import TINY, TOY, Zygote, add_toy_family, draw_set, flags_for, in_process, python, records, zygote_in

FEW = ["--batch_size", "4", "--logging.log_frequency", "1", "--epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    add_toy_family()
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 8)
    draw_set(folder / "val", 3, seed=1)
    return folder


def named(*flags: str) -> list[tuple[str, int, str]]:
    loaded = config.load(["--data.train", "somewhere", "--experiment_name", "x", *flags])
    return [(run.experiment_name, run.seed, run.data.fold) for run in series.members(loaded)]


def test_which_runs_a_configuration_means() -> None:
    assert named() == []
    assert named("--data.fold", "1/3") == []
    assert named("--seeds", "1,2") == [("x_seed1", 1, ""), ("x_seed2", 2, "")]
    assert named("--seeds", "4", "9")[1] == ("x_seed9", 9, "")
    assert named("--data.fold", "all") == [(f"x_fold{k}", 7, f"{k}/5") for k in range(5)]
    assert named("--data.fold", "all/2", "--seeds", "1,2") == [
        (f"x_seed{seed}_fold{k}", seed, f"{k}/2") for seed in (1, 2) for k in range(2)
    ]
    with pytest.raises(UserError, match="--experiment_name"):
        series.members(config.load(["--data.train", "somewhere", "--seeds", "1,2"]))
    with pytest.raises(UserError, match=r"all/1.*K/N"):
        named("--data.fold", "all/1")


def test_seeds_are_runs_of_their_own_with_a_common_summary(data: Path, tmp_path: Path) -> None:
    flags = flags_for(data, tmp_path, "s", *FEW, model=TOY)
    means = in_process(*flags, "--seeds", "3,5")
    found = []
    for seed in (3, 5):
        (row,) = [row for row in records(tmp_path / f"s_seed{seed}") if row["kind"] == "val"]
        found.append(row["val/jaccard"])
        assert f"seed: {seed}\n" in (tmp_path / f"s_seed{seed}" / "config.yml").read_text()
    assert found[0] != found[1]
    assert means["jaccard"] == pytest.approx(mean(found))
    with open(tmp_path / "s_series.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["mean"]["val/jaccard"]) == pytest.approx(mean(found))
    assert float(rows["standard deviation"]["val/jaccard"]) == pytest.approx(stdev(found))
    assert float(rows["s_seed5"]["val/jaccard"]) == pytest.approx(found[1])
    assert "standard deviation" in (tmp_path / "s_series.md").read_text()
    with pytest.raises(UserError, match="--resume"):
        in_process(*flags, "--seeds", "3,5")

    three = in_process(*flags, "--seeds", "3,5,8", "--resume")  # two are finished, the third begins
    assert len([row for row in records(tmp_path / "s_seed3") if row["kind"] == "val"]) == 1
    (last,) = [row for row in records(tmp_path / "s_seed8") if row["kind"] == "val"]
    assert three["jaccard"] == pytest.approx(mean([*found, last["val/jaccard"]]))


def test_every_fold_validates_once(data: Path, tmp_path: Path) -> None:
    flags = flags_for(data, tmp_path, "f", *FEW, model=TOY)
    place = flags.index("--data.val")
    in_process(*flags[:place], *flags[place + 2 :], "--data.fold", "all/2")
    parts = [json.loads((tmp_path / f"f_fold{k}" / "run.json").read_text())["data"] for k in range(2)]
    assert [[each["samples"] for each in part] for part in parts] == [[4, 4], [4, 4]]
    assert (tmp_path / "f_series.csv").exists()


def test_a_run_without_a_validation_yet_stands_in_the_table(tmp_path: Path) -> None:
    table, means = series.summary([tmp_path / "a", tmp_path / "b"])
    assert means == {}
    assert [row[0].value for row in table.rows] == ["a", "b", "mean", "standard deviation"]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("zygote")) as made:
        yield made


def test_two_ranks_train_a_series(data: Path, tmp_path: Path, zygote: Zygote) -> None:
    flags = flags_for(data, tmp_path, "d", *FEW, "--seeds", "3,5", model=TOY)
    job = zygote.run(flags, world=2)
    assert job.text().count("best validations of 2 runs") == 1
    assert (tmp_path / "d_series.csv").exists()


def test_torchrun_trains_a_series(data: Path, tmp_path: Path) -> None:
    flags = flags_for(data, tmp_path, "t", *FEW, "--seeds", "3,5", "--max_steps", "1", model=TINY)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = python(*launch, *flags, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "t_series.csv").exists()

"""The paired bootstrap: against resampling written out, on known differences, and what its tables say."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compare import compare, improvements
from errors import UserError
from metrics import BinaryMetric, Row
from tests.helpers import Zygote, zygote_in
from tests.tiny import photo, save, tiny_model, write_run

METRIC = BinaryMetric(["max_f", "mba", "normalized_mae"])


def rows_of(scores: np.ndarray, name: str = "jaccard") -> list[Row]:
    return [Row("d", f"d/{i:03d}", f"im/{i}.png", {name: float(score)}) for i, score in enumerate(scores)]


def test_the_interval_is_that_of_resampling_written_out() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.uniform(0.4, 0.8, 40), generator.uniform(0.45, 0.85, 40)
    (found,) = compare(METRIC, rows_of(a), rows_of(b), ["jaccard"], resamples=4000)
    picks = np.random.default_rng(2).integers(0, 40, (4000, 40))
    low, high = np.quantile((b - a)[picks].mean(1), [0.025, 0.975])
    assert found.value == pytest.approx((b - a).mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=4e-3), pytest.approx(high, abs=4e-3))
    assert found.a_wins + found.b_wins == pytest.approx(1)
    assert found.b_wins == pytest.approx((b > a).mean())


def test_curves_are_averaged_before_their_maximum_in_every_resample() -> None:
    generator = np.random.default_rng(3)
    curves = generator.uniform(0, 1, (2, 12, 256))
    name, take = METRIC.curves["max_f"]
    a, b = (
        [Row("d", f"{i:02d}", "", {"max_f": float(curve.max())}, {name: curve}) for i, curve in enumerate(side)]
        for side in curves
    )
    (found,) = compare(METRIC, a, b, ["max_f"], resamples=2000)
    assert found.value == pytest.approx(curves[1].mean(0).max() - curves[0].mean(0).max())
    picks = np.random.default_rng(4).integers(0, 12, (2000, 12))
    drawn = [take(curves[1][pick].mean(0)) - take(curves[0][pick].mean(0)) for pick in picks]
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.02)


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        a = generator.normal(0.5, 0.1, 60)
        b = a + generator.normal(0.02, 0.05, 60)
        (found,) = compare(METRIC, rows_of(a), rows_of(b), ["jaccard"], resamples=400)
        hits += found.low <= 0.02 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("name", "change", "verdict"),
    [
        ("jaccard", 0.1, "B better"), ("jaccard", -0.1, "A better"), ("jaccard", 0.0, "no clear difference"),
        ("normalized_mae", 0.1, "A better"), ("normalized_mae", -0.1, "B better"),
    ],
)  # fmt: skip
def test_the_verdict_minds_the_direction(name: str, change: float, verdict: str) -> None:
    noise = np.random.default_rng(6).normal(0, 0.02, (2, 30))
    a, b = rows_of(0.5 + noise[0], name), rows_of(0.5 + change + noise[1], name)
    (found,) = compare(METRIC, a, b, [name], resamples=1000)
    assert found.verdict == verdict


def test_samples_without_a_score_are_left_out_of_each_side() -> None:
    a = rows_of(np.array([0.5, np.nan, 0.7, 0.6]), "mba")
    b = rows_of(np.array([0.6, np.nan, 0.8, 0.7]), "mba")
    (found,) = compare(METRIC, a, b, ["mba"], resamples=500)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert improvements(a, b, "mba", True)[0] == pytest.approx(0.1)


def test_other_samples_are_an_error_that_names_one() -> None:
    a = rows_of(np.array([0.1, 0.2, 0.3]))
    with pytest.raises(UserError, match="has 3 of them, B has 2"):
        compare(METRIC, a, a[:2], ["jaccard"])
    with pytest.raises(UserError, match="A has d/000, B has d/001"):
        compare(METRIC, a, a[1:], ["jaccard"])


# ---------------------------------------------------------------- the command, on one rank and on two


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("zygote")) as running:
        yield running


def test_two_ranks_compare_as_one(zygote: Zygote, tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / "X/im" / f"{number}.png", photo(number, 40, 60))
        save(tmp_path / "X/gt" / f"{number}.png", photo(number + 9, 40, 60)[..., :1].repeat(3, 2))
    runs = [str(write_run(tmp_path / f"run{seed}", tiny_model(seed))) for seed in (0, 1)]
    written = []
    for world in (1, 2):
        output = tmp_path / f"scores{world}.csv"
        flags = ["--compare", *runs, "--data.test", str(tmp_path / "X"), "--device", "cpu", "--num_workers", "0",
                 "--metrics", "Sm", "maxFm", "HCE", "mBA", "--output", str(output)]  # fmt: skip
        job = zygote.run(flags, world=world, script="evaluate")
        assert job.text().count("paired percentile bootstrap") == 1
        with open(output, newline="") as file:
            written.append(list(csv.DictReader(file)))
    assert written[0] == written[1]
    assert [row["metric"] for row in written[0]] == ["s_measure", "max_f", "hce", "mba"]

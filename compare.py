"""Whether one model is better than another on the same samples, or only luckier: a paired bootstrap.

Samples are drawn with replacement, the same for both, and every metric of both is computed anew, as many times as it
says: the middle 95 % of its differences are the interval (percentile bootstrap; Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13). A resample is how often it takes each sample, a row of a multinomial draw, so that
one matrix product computes the means of many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from config import differences, from_dict
from errors import UserError
from metrics import Row, StreamingMetric
from results import Result, short_labels
from tables import Cell, Column, Table, decimals, number

COVERAGE = 0.95
CHUNK = 1 << 23  # weights held at a time, 64 MB of them


@dataclass(frozen=True)
class Difference:
    """B against A by one metric: their scores, the interval of B − A, and on which shares of the samples each wins."""

    metric: str
    higher_is_better: bool
    a: float
    b: float
    low: float
    high: float
    a_wins: float
    b_wins: float

    @property
    def value(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """`A better` or `B better` where the interval leaves out 0, else `no clear difference`."""
        if math.isnan(self.value):
            return "not comparable"
        if not (self.low > 0 or self.high < 0):
            return "no clear difference"
        return "B better" if (self.value > 0) == self.higher_is_better else "A better"


def compare(
    metric: StreamingMetric, a: Sequence[Row], b: Sequence[Row], names: Sequence[str], *, resamples: int | None = None
) -> list[Difference]:
    """B's rows against A's, of the same samples in the same order, by the named scores of `metric`.

    With as many resamples as the metric has by default.

    Raises `UserError` where the samples are not the same, of which the first is named.
    """
    for ours, theirs in zip(a, b, strict=False):
        if (ours.dataset, ours.sample_id) != (theirs.dataset, theirs.sample_id):
            raise UserError(f"A and B are not of the same samples: A has {ours.sample_id}, B has {theirs.sample_id}")
    if len(a) != len(b):
        raise UserError(f"A and B are not of the same samples: A has {len(a)} of them, B has {len(b)}")
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for weights in _draws(len(a), resamples or metric.resamples):
        scores_a, scores_b = (metric.resampled(names, rows, weights) for rows in (a, b))
        for name in names:
            drawn[name].append(scores_b[name] - scores_a[name])
    return [_difference(metric, name, a, b, np.concatenate(drawn[name])) for name in names]


def _draws(samples: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each resample takes each sample, (chunk, samples) float64 at a time; the seed is fixed."""
    generator = np.random.default_rng(0)
    shares = np.full(samples, 1 / samples)
    chunk = max(1, CHUNK // samples)
    for start in range(0, resamples, chunk):
        yield generator.multinomial(samples, shares, size=min(chunk, resamples - start)).astype(np.float64)


def _difference(
    metric: StreamingMetric, name: str, a: Sequence[Row], b: Sequence[Row], drawn: np.ndarray
) -> Difference:
    higher = metric.higher_is_better[name]
    tails = (1 - COVERAGE) / 2
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [tails, 1 - tails]) if len(known) else (math.nan, math.nan)
    changes = np.array(improvements(a, b, name, higher))
    score_a, score_b = metric.mean(name, list(a)), metric.mean(name, list(b))
    return Difference(name, higher, score_a, score_b, float(low), float(high),
                      a_wins=float((changes < 0).mean()), b_wins=float((changes > 0).mean()))  # fmt: skip


def improvements(a: Sequence[Row], b: Sequence[Row], name: str, higher_is_better: bool) -> list[float]:
    """By how much B is better than A on each sample."""
    sign = 1 if higher_is_better else -1
    return [sign * (theirs.scores[name] - ours.scores[name]) for ours, theirs in zip(a, b, strict=True)]


# ---------------------------------------------------------------- tables


def comparison_tables(a: Result, b: Result, names: Sequence[str]) -> list[Table]:
    """Every score of both with the interval of its difference; the samples that changed most by the first score; and
    where both are checkpoints of runs, the settings that differ."""
    tables = [_difference_table(a, b, names), _changed_most(a, b, names[0])]
    if a.config and b.config:
        tables.append(_setting_table(a.config, b.config))
    return tables


def _difference_table(a: Result, b: Result, names: Sequence[str]) -> Table:
    percent = f"{COVERAGE:.0%}"
    columns = [Column("test_set", "test set"), Column("metric"), Column("a", "A"), Column("b", "B"),
               Column("difference", "B - A"), Column("low", f"{percent} from"), Column("high", "to"),
               Column("a_wins", "A wins"), Column("b_wins", "B wins"), Column("verdict")]  # fmt: skip
    label_a, label_b = short_labels([a.path, b.path])
    table = Table(f"A: {label_a}, B: {label_b}", columns, keys=2)
    theirs = b.by_test_set()
    for group, rows in a.by_test_set().items():
        for each in compare(a.metric, rows, theirs.get(group, []), names):
            digits = decimals([each.a, each.b])
            changes = [Cell(value, number(value, digits, sign=True)) for value in (each.value, each.low, each.high)]
            shares = [Cell(share, f"{share:.0%}") for share in (each.a_wins, each.b_wins)]
            scores = [Cell(value, number(value, digits)) for value in (each.a, each.b)]
            verdict = Cell(each.verdict, is_best=each.verdict in ("A better", "B better"))
            about = [Cell(group), Cell(each.metric, a.metric.headings.get(each.metric, each.metric))]
            table.rows.append([*about, *scores, *changes, *shares, verdict])
    table.notes.append(
        f"{len(a.metric.rows)} samples; {percent} of {a.metric.resamples} resamples of them have a difference in the "
        "interval (paired percentile bootstrap). A or B is better where it leaves out 0; wins are shares of samples."
    )
    return table


def _changed_most(a: Result, b: Result, name: str, count: int = 5) -> Table:
    """The samples on which B gained and lost most."""
    heading = a.metric.headings.get(name, name)
    columns = [Column("sample"), Column("change"), Column("a", "A"), Column("b", "B"), Column("difference", "B - A")]
    table = Table(f"Samples that changed most by {heading}", columns)
    gains = improvements(a.metric.rows, b.metric.rows, name, a.metric.higher_is_better[name])
    order = sorted((index for index, gain in enumerate(gains) if gain == gain), key=lambda index: gains[index])
    digits = decimals([row.scores[name] for result in (a, b) for row in result.metric.rows])
    chosen = [*((index, "better") for index in order[::-1][:count] if gains[index] > 0),
              *((index, "worse") for index in order[:count] if gains[index] < 0)]  # fmt: skip
    for index, change in chosen:
        row = a.metric.rows[index]
        values = row.scores[name], b.metric.rows[index].scores[name]
        cells = [Cell(value, number(value, digits)) for value in values]
        difference = Cell(values[1] - values[0], number(values[1] - values[0], digits, sign=True))
        table.rows.append([Cell(row.sample_id), Cell(change), *cells, difference])
    return table


def _setting_table(a: dict, b: dict) -> Table:
    """The settings in which two runs differ, but for their names and places."""
    table = Table("Settings that differ", [Column("setting"), Column("a", "A"), Column("b", "B")])
    one, other = (from_dict(config, "the run's own configuration") for config in (a, b))
    for key, before, after in differences(one, other):
        if key not in ("experiment_name", "output_dir"):
            table.rows.append([Cell(key), Cell(str(before)), Cell(str(after))])
    if not table.rows:
        table.notes.append("none")
    return table

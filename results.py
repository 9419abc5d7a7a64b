"""What evaluate.py found out: the scored samples of checkpoints or of folders of masks, and the tables of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from metrics import Row, StreamingMetric
from tables import Cell, Column, Table, decimals, number
from utils import is_better


@dataclass
class Result:
    """One checkpoint, or one folder of masks: its samples with their scores, and what is to be said of them."""

    path: str
    metric: StreamingMetric  # reduced: its rows are those of all ranks
    config: dict[str, Any] | None = None  # of the run that a checkpoint comes from
    notes: list[str] = field(default_factory=list)

    def by_test_set(self) -> dict[str, list[Row]]:
        """The rows of each test set, and under `all` those of all where there are several."""
        names = sorted({row.dataset for row in self.metric.rows})
        found = {name: [row for row in self.metric.rows if row.dataset == name] for name in names}
        return found if len(found) == 1 else {**found, "all": self.metric.rows}

    def score(self, name: str) -> float:
        """One score over all samples."""
        return self.metric.mean(name, self.metric.rows)


def short_labels(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = range(1, max(map(len, parts)) + 1)
    choices = (["/".join(each[-length:]) for each in parts] for length in lengths)
    return next((labels for labels in choices if len(set(labels)) == len(labels)), list(paths))


def best_of(results: Sequence[Result], name: str) -> Result:
    """The first of those with the best score over all samples."""
    higher = results[0].metric.higher_is_better[name]
    return reduce(lambda a, b: b if is_better(b.score(name), a.score(name), higher) else a, results)


def score_columns(metric: StreamingMetric, names: Sequence[str]) -> list[Column]:
    """Columns of scores under the headings of the field."""
    return [Column(name, metric.headings.get(name, name), "higher" if metric.higher_is_better[name] else "lower")
            for name in names]  # fmt: skip


def score_table(results: Sequence[Result], names: Sequence[str], best: Result | None = None) -> Table:
    """A row per test set and result, a column per score; the best of each test set are marked, and `best` is named."""
    metric = results[0].metric
    keys = [Column("test_set", "test set"), Column("name")]
    table = Table("Scores", [*keys, Column("samples"), *score_columns(metric, names)], keys=2)
    labels = short_labels([result.path for result in results])
    groups = [result.by_test_set() for result in results]
    means = {(group, position): {name: metric.mean(name, rows) for name in names}
             for position, found in enumerate(groups) for group, rows in found.items()}  # fmt: skip
    digits = {name: decimals([values[name] for values in means.values()]) for name in names}
    last = list(groups[0])[-1]
    for group in dict.fromkeys(group for found in groups for group in found):
        there = [position for position, found in enumerate(groups) if group in found]
        for position in there:
            is_best = results[position] is best and group == last
            cells = [Cell(group), Cell(labels[position], is_best=is_best), Cell(len(groups[position][group]))]
            table.rows.append(cells)
        for name in names:
            texts = _marked(
                [means[group, position][name] for position in there], metric.higher_is_better[name], digits[name]
            )
            for row, cell in zip(table.rows[-len(there) :], texts, strict=True):
                row.append(cell)
    table.notes = list(
        dict.fromkeys(note for result in results for note in [*_undefined(result, names), *result.notes])
    )
    return table


def _marked(values: Sequence[float], higher_is_better: bool, digits: int) -> list[Cell]:
    """A test set's cells of one score; those that are shown like the best of several are marked."""
    best = reduce(lambda a, b: b if is_better(b, a, higher_is_better) else a, values)
    shown = [number(value, digits) for value in values]
    return [Cell(value, text, is_best=len(values) > 1 and text == number(best, digits))
            for value, text in zip(values, shown, strict=True)]  # fmt: skip


def _undefined(result: Result, names: Sequence[str]) -> list[str]:
    """A sentence for each score that some samples of a test set do not have."""
    sentences = []
    for group, rows in result.by_test_set().items():
        for name in (name for name in names if name in result.metric.maybe_undefined):
            lacking = sum(row.scores[name] != row.scores[name] for row in rows)
            if lacking:
                heading = result.metric.headings.get(name, name)
                sentences.append(f"{heading} of {group}: {lacking} of {len(rows)} samples have none and are left out")
    return sentences


def sample_table(results: Sequence[Result], names: Sequence[str]) -> Table:
    """A row per result and sample with all its scores."""
    keys = [Column("name"), Column("test_set"), Column("sample"), Column("path")]
    table = Table("Samples", [*keys, *score_columns(results[0].metric, names)], keys=4)
    for label, result in zip(short_labels([result.path for result in results]), results, strict=True):
        for row in result.metric.rows:
            about = [Cell(label), Cell(row.dataset), Cell(row.sample_id), Cell(row.path)]
            table.rows.append([*about, *(Cell(row.scores[name]) for name in names)])
    return table

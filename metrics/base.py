"""What the metrics of all tasks share: a row per sample on the host, gathered from all ranks, averaged at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch.distributed as dist

from errors import UserError, nearest


@dataclass(frozen=True)
class Row:
    """One scored sample. `curves` are those of its scores that are averaged over samples before a maximum is taken."""

    dataset: str
    sample_id: str
    path: str
    scores: dict[str, float]
    curves: dict[str, np.ndarray] = field(default_factory=dict)


class StreamingMetric:
    """Rows as they come, `reduce` once all have come, then the figures.

    Each sample is scored by itself and rows are sorted before they are averaged, so the figures depend neither on the
    batch size nor on the number of ranks nor on the order, to the last bit.
    """

    primary: str  # the score that says which model and which sample is better
    higher_is_better: dict[str, bool]  # of the scores that are averaged, in the order in which they are shown
    maybe_undefined: frozenset[str] = frozenset()  # scores that some samples do not have; such are NaN in their rows
    # Of scores that are taken from a curve of the rows: its name, and how.
    curves: Mapping[str, tuple[str, Callable[[np.ndarray], float]]] = MappingProxyType({})
    headings: Mapping[str, str] = MappingProxyType({})  # of scores that tables of the field call otherwise
    resamples = 10_000  # of the samples, that tell how far a score is due to chance

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @classmethod
    def resolve(cls, names: Sequence[str]) -> list[str]:
        """The scores that names, or their headings in tables, mean in any case; `UserError` for an unknown one."""
        known = {spelling.lower(): name for name, heading in cls.headings.items() for spelling in (name, heading)}
        for name in names:
            if name.lower() not in known:
                raise UserError(f"unknown metric {name!r}{nearest(name, known)}; metrics: {', '.join(cls.headings)}")
        return list(dict.fromkeys(known[name.lower()] for name in names))

    def reduce(self) -> None:
        """Bring the rows of all ranks to every rank, each sample once, by dataset and sample id."""
        rows = self.rows
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, rows)
            rows = [row for rank_rows in gathered for row in rank_rows]
        unique = {(row.dataset, row.sample_id): row for row in rows}
        self.rows = [unique[key] for key in sorted(unique)]

    def compute(self) -> dict[str, float]:
        """Mean of each score over the samples, in float64, after `reduce`. Raises ValueError if there are none."""
        return self.means(self.rows)

    def per_dataset(self) -> dict[str, dict[str, float]]:
        """`compute` for each dataset by itself."""
        datasets = sorted({row.dataset for row in self.rows})
        return {name: self.means([row for row in self.rows if row.dataset == name]) for name in datasets}

    def means(self, rows: list[Row]) -> dict[str, float]:
        """`compute` for some rows. Samples without a score are left out of its mean, which is NaN where none has it."""
        return {name: self.mean(name, rows) for name in self.higher_is_better}

    def mean(self, name: str, rows: list[Row]) -> float:
        """Mean of one score over some rows; a curve is averaged before its maximum or mean is taken."""
        if name in self.curves:
            curve, take = self.curves[name]
            return float(take(np.mean([row.curves[curve] for row in rows], axis=0)))
        values = [row.scores[name] for row in rows]
        if name in self.maybe_undefined:
            values = [value for value in values if not math.isnan(value)] or [math.nan]
        return fmean(values)

    def resampled(self, names: Sequence[str], rows: Sequence[Row], weights: np.ndarray) -> dict[str, np.ndarray]:
        """(R,) what `mean` is of each name if each row stands there `weights` (R, rows) times, float64 integers.

        The weights of each of the R resamples sum to the number of rows.
        """
        return {name: self._resampled(name, rows, weights) for name in names}

    def _resampled(self, name: str, rows: Sequence[Row], weights: np.ndarray) -> np.ndarray:
        if name in self.curves:
            curve, take = self.curves[name]
            return np.apply_along_axis(take, 1, weights @ np.stack([row.curves[curve] for row in rows]) / len(rows))
        scores = np.array([row.scores[name] for row in rows])
        if name not in self.maybe_undefined:
            return weights @ scores / len(rows)
        there = ~np.isnan(scores)
        with np.errstate(invalid="ignore"):  # a resample may hold none that has the score
            return weights @ np.where(there, scores, 0) / (weights @ there)

    def undefined(self) -> dict[str, int]:
        """How many samples have no such score, of the scores that some lack."""
        counts = {name: sum(math.isnan(row.scores[name]) for row in self.rows) for name in sorted(self.maybe_undefined)}
        return {name: count for name, count in counts.items() if count}

    def per_class(self) -> list[dict[str, Any]]:
        """`name` and scores of each class over all rows, where the task has classes."""
        return []

    def figures(self) -> dict[str, np.ndarray]:
        """Pictures of all rows together, (H, W, 3) uint8 RGB by title."""
        return {}

    def worst(self, count: int, name: str = "") -> list[Row]:
        """The samples with the worst `name`, by default the primary score, the worst first; NaN is worse than all."""
        name = name or self.primary
        sign = 1 if self.higher_is_better[name] else -1

        def goodness(row: Row) -> float:
            value = row.scores[name]
            return -math.inf if math.isnan(value) else sign * value

        return sorted(self.rows, key=goodness)[:count]

    def best(self, count: int, name: str = "") -> list[Row]:
        """The samples with the best `name`, by default the primary score, the best first."""
        return self.worst(len(self.rows), name)[::-1][:count]

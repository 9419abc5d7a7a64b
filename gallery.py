"""The samples of a validation that a person should look at: the best and the worst, each as a few small pictures.

While a validation runs only what was found is kept, small and of the candidates alone; images and truth are read again
at the end, for those that stayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from readers import Reader
from samples import Batch, Sample, SampleInfo, Size
from utils import World

SIDE = 384  # pixels of a picture's longer side


@dataclass
class Picture:
    """One validated sample: `panels` are (h, w, 3) uint8 RGB by name, all of one size, at most `SIDE` pixels a side."""

    dataset: str
    sample_id: str
    path: str
    score: float
    panels: dict[str, np.ndarray]


@dataclass
class Candidate:
    """A sample that is among the best or worst so far, with what was found in it at the picture's size."""

    dataset: str
    sample_id: str
    path: str
    score: float
    result: Any


Results = Callable[[dict[str, Any], list[SampleInfo]], Iterator[Any]]
Panels = Callable[[Sample, np.ndarray, Any], dict[str, np.ndarray]]  # (sample, its small picture, result)


class Gallery:
    """The `count` best and worst samples by the metric's primary score.

    `results(predictions, samples)` is the task's, see tasks/base.py.
    """

    def __init__(self, results: Results, metric: Any, count: int = 10) -> None:
        self.results, self.primary, self.count = results, metric.primary, count
        self.sign = 1 if metric.higher_is_better[metric.primary] else -1
        self.best: list[Candidate] = []
        self.worst: list[Candidate] = []

    def update(self, rows: Sequence[Any], predictions: Mapping[str, Any], batch: Batch) -> None:
        """Look at the scored `rows` of one batch, in its order."""
        for index, (row, sample) in enumerate(zip(rows, batch.samples, strict=True)):
            candidate = Candidate(row.dataset, row.sample_id, row.path, row.scores[self.primary], None)
            if not (self._belongs(candidate, self.best, 1) or self._belongs(candidate, self.worst, -1)):
                continue
            one = {name: value[index : index + 1] for name, value in predictions.items()}
            candidate.result = next(self.results(one, [replace(sample, size=picture_size(sample.size))]))
            self.best = self._sorted([*self.best, candidate], 1)
            self.worst = self._sorted([*self.worst, candidate], -1)

    def collect(self, world: World, reader: Reader, panels: Panels) -> tuple[list[Picture], list[Picture]]:
        """(best, worst) over all ranks, the best and the worst first; nothing but on rank 0."""
        gathered = world.gather((self.best, self.worst))
        if not world.is_main_process:
            return [], []
        places = {reader.sample_id(index): index for index in range(len(reader))}

        def draw(candidates: list[Candidate], sign: int) -> list[Picture]:
            return [_draw(each, reader, places[each.sample_id], panels) for each in self._sorted(candidates, sign)]

        return (draw([each for best, _ in gathered for each in best], 1),
                draw([each for _, worst in gathered for each in worst], -1))  # fmt: skip

    def _belongs(self, candidate: Candidate, kept: list[Candidate], sign: int) -> bool:
        return len(kept) < self.count or self._key(candidate, sign) < self._key(kept[-1], sign)

    def _sorted(self, candidates: list[Candidate], sign: int) -> list[Candidate]:
        return sorted(candidates, key=lambda each: self._key(each, sign))[: self.count]

    def _key(self, candidate: Candidate, sign: int) -> tuple[float, str]:
        """What is not a number is worse than everything; equal scores are ordered by name."""
        score = -math.inf if math.isnan(candidate.score) else self.sign * candidate.score
        return -sign * score, candidate.sample_id


def picture_size(size: Size) -> Size:
    """(height, width) of the picture of an image of `size`."""
    factor = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _draw(candidate: Candidate, reader: Reader, index: int, panels: Panels) -> Picture:
    sample = reader.read(index)
    height, width = picture_size((sample.frames[0].shape[0], sample.frames[0].shape[1]))
    image = cv2.resize(sample.frames[0], (width, height), interpolation=cv2.INTER_AREA)
    drawn = panels(sample, image, candidate.result)
    return Picture(candidate.dataset, candidate.sample_id, candidate.path, candidate.score, drawn)

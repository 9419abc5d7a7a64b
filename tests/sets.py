"""Small data sets on disk, and a reader without any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from readers import Reader
from samples import Sample


def save(path: Path, picture: Image.Image | np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def pairs(folder: Path, count: int, *, size: tuple[int, int] = (12, 16), seed: int = 0) -> Path:
    """A dataset of `count` random pairs."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        save(folder / "im" / f"{i:03d}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        save(folder / "gt" / f"{i:03d}.png", rng.integers(0, 256, size, dtype=np.uint8))
    return folder


class Numbers(Reader):
    """A reader without files: datasets "a" and "b" of the given counts and weights."""

    def __init__(self, a: int, b: int = 0, weights: tuple[float, float] = (1.0, 1.0)):
        self.a, self.b, self.weights = a, b, weights

    def __len__(self) -> int:
        return self.a + self.b

    def read(self, index: int) -> Sample:
        raise AssertionError("a sampler decodes nothing")

    def sample_id(self, index: int) -> str:
        return f"{self.dataset_of(index)}/{index}"

    def dataset_of(self, index: int) -> str:
        return "a" if index < self.a else "b"

    def files(self, index: int) -> list[str]:
        return []

    def weight_of(self, dataset: str) -> float:
        return self.weights["ab".index(dataset)]

"""What is found in `classification`: the most probable classes of a picture, drawn and listed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from colors import palette
from samples import SampleInfo, Size


@dataclass(frozen=True)
class Guesses:
    """The most probable classes of a picture, the surest first."""

    labels: list[int]
    scores: list[float]  # probabilities
    size: Size  # of the picture


def guesses(
    predictions: dict[str, Tensor], samples: Sequence[SampleInfo], *, threshold: float = 0.0, top_k: int = 5
) -> Iterator[Guesses]:
    """The `top_k` classes of each sample with probabilities of at least `threshold`, from logits (B, C)."""
    probabilities = predictions["logits"].float().softmax(1)
    scores, labels = probabilities.topk(min(top_k, probabilities.shape[1]))
    for each, found, sample in zip(scores.tolist(), labels.tolist(), samples, strict=True):
        kept = sum(score >= threshold for score in each)
        yield Guesses(found[:kept], each[:kept], sample.size)


def bars(found: Guesses) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a bar for each class, as long as it is probable."""
    height, width = found.size
    picture = np.zeros((height, width, 3), np.uint8)
    rows = np.array_split(np.arange(height), max(1, len(found.labels)))
    for label, score, row in zip(found.labels, found.scores, rows, strict=False):
        picture[row[: -(len(row) // 4) or None], : round(score * width)] = palette()[(label + 1) % 255]
    return picture


def caption(image: np.ndarray, found: Guesses, class_names: Sequence[str]) -> np.ndarray:
    """The image with its most probable class and the probability above its lower edge."""
    pairs = list(zip(found.labels, found.scores, strict=True))[:1]
    words = " ".join(f"{class_names[label] if class_names else label} {score:.2f}" for label, score in pairs)
    return write(image, words, (255, 255, 255))


def write(image: np.ndarray, words: str, color: tuple[int, int, int]) -> np.ndarray:
    """A line of text on a darkened strip at the lower edge."""
    picture, height = image.copy(), max(12, image.shape[0] // 10)
    picture[-height:] //= 3
    text = words.encode("ascii", "replace").decode()
    place = (height // 4, picture.shape[0] - height // 3)
    return cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, height / 36, color, 1, cv2.LINE_AA)


def panels(scored: Any) -> dict[str, np.ndarray]:
    """The image of a `tasks.Scored` with its true class, and with what it was taken for."""
    truth = scored.sample.class_ids[0]
    color = (120, 230, 140) if scored.result.labels[:1] == [truth] else (255, 120, 120)
    (guess,) = scored.result.labels[:1]
    words = f"{scored.class_names[guess]} {scored.result.scores[0]:.2f}"
    return {
        "truth": write(scored.image, scored.class_names[truth], (255, 255, 255)),
        "prediction": write(scored.image, words, color),
    }


def records(found: Guesses, image_id: int | str, file_ids: Sequence[int | str]) -> dict[str, list[dict[str, Any]]]:
    """The classes of a picture, called as their folders are."""
    pairs = zip(found.labels, found.scores, strict=True)
    return {"classes": [{"image_id": image_id, "category_id": file_ids[label] if file_ids else label, "score": score}
                        for label, score in pairs]}  # fmt: skip

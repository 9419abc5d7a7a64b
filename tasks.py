"""The tasks, a row each: how samples are read, become targets and batches, are scored and are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from dataset import binary_target, collate_binary
from demo import write_demo
from errors import UserError, nearest
from foreground import cut_out
from loss import resize
from metrics import BinaryMetric
from readers import BinaryFolders, Reader
from samples import Sample, Size
from transforms import OFFICIAL_BINARY


@dataclass(frozen=True)
class Task:
    """Everything that the programs ask a task for."""

    name: str
    reader: Callable[..., Reader]  # (spec, root=, class_names=) -> Reader
    make_target: Callable[[Sample, Sample | None], Any]
    collate_targets: Callable[[list[Any]], Any]
    metric: Callable[..., Any]  # (names of what is measured beside its own) -> metric
    augment: list[dict[str, Any]]  # the official recipe
    console: list[tuple[str, str]]  # (short name in the console line, metric)
    color: Callable[[dict[str, float], Any], str]  # (batch scores, logging settings) -> colour of the line
    masks: Callable[[dict[str, Tensor], list[Size]], Iterator[np.ndarray]]  # (predictions, original sizes) -> to save
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (image, mask) -> picture
    cut_out: Callable[[np.ndarray, np.ndarray], np.ndarray] | None  # (image, mask) -> RGBA, where masks are alpha
    panels: Callable[[np.ndarray, Any, Any], dict[str, np.ndarray]]  # (image, a sample's masks, mask) -> pictures
    write_demo: Callable[[Path], Path]  # draws the demo data into a folder with train/ and val/
    test_metrics: tuple[str, ...] = ()  # what evaluate.py measures beside the task's own where nothing is chosen

    def demo_root(self) -> str:
        """The folder of the demo data, drawn where it is not there yet."""
        return str(self.write_demo(Path("data") / f"demo_{self.name}"))


def binary_color(scores: dict[str, float], limits: Any) -> str:
    """Red for a poor Jaccard index, green for a good BCE accuracy, cyan when Dice is good as well, else blue."""
    if scores["jaccard"] < limits.red_below_jaccard:
        return "red"
    if scores["bce_accuracy"] > limits.green_above_bce_accuracy:
        return "cyan" if scores["dice"] > limits.cyan_above_dice else "green"
    return "blue"


def binary_masks(predictions: dict[str, Tensor], sizes: list[Size]) -> Iterator[np.ndarray]:
    """(H, W) uint8 alpha of each sample at its original size, from logits (B, 1, h, w).

    The official arithmetic: probabilities, not logits, are resized, and v · 255 is cut off rather than rounded.
    """
    for probabilities, size in zip(predictions["logits"].float().sigmoid().split(1), sizes, strict=True):
        yield resize(probabilities, size)[0, 0].mul(255).byte().cpu().numpy()


def draw_binary(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The object as it is on a darkened, desaturated ground: (H, W, 3) and (H, W) uint8 -> (H, W, 3) uint8."""
    weight = alpha.astype(np.float32) / 255
    tints = np.arange(256)[:, None] * 0.35 + np.array([12.0, 20.0, 60.0])  # of a grey level
    ground = tints.astype(np.uint8)[cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)]
    return cv2.blendLinear(image, ground, weight, 1 - weight)


FOUND, MISSED = (np.array(color, np.float32) for color in ((255, 150, 30), (70, 140, 255)))


def binary_panels(image: np.ndarray, truth: np.ndarray, alpha: np.ndarray) -> dict[str, np.ndarray]:
    """A validated sample to look at: image (h, w, 3), truth of any size and alpha (h, w), all uint8.

    In the error picture what was missed is blue, what was found where nothing is orange, both also to colour-blind
    eyes; the image lies dark behind them.
    """
    truth = cv2.resize(truth, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
    difference = (alpha.astype(np.float32) - truth)[..., None] / 255
    ground = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] * np.float32(0.3)
    color = np.where(difference > 0, FOUND, MISSED)
    error = ground + np.abs(difference) * (color - ground)
    grey = {"truth": truth, "prediction": alpha}
    return {
        "image": image,
        **{name: np.repeat(mask[..., None], 3, axis=2) for name, mask in grey.items()},
        "error": error.astype(np.uint8),
    }


TASKS = {
    "binary": Task(
        name="binary",
        reader=BinaryFolders,
        make_target=binary_target,
        collate_targets=collate_binary,
        metric=BinaryMetric,
        augment=OFFICIAL_BINARY,
        console=[("BC", "bce_accuracy"), ("DI", "dice"), ("JI", "jaccard"), ("SI", "ssim")],
        color=binary_color,
        masks=binary_masks,
        draw=draw_binary,
        cut_out=cut_out,
        panels=binary_panels,
        write_demo=write_demo,
        test_metrics=("standard",),
    ),
}


def get_task(name: str) -> Task:
    """The row of a task; an unknown name is a `UserError`."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name]

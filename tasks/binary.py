"""`binary`: one soft mask for each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from dataset import binary_target, collate_binary
from demo import write_demo
from foreground import cut_out
from loss import resize
from metrics import BinaryMetric
from readers import BinaryFolders
from samples import SampleInfo
from tasks.base import Scored, Task
from transforms import OFFICIAL_BINARY


def binary_color(scores: dict[str, float], limits: Any) -> str:
    """Red for a poor Jaccard index, green for a good BCE accuracy, cyan when Dice is good as well, else blue."""
    if scores["jaccard"] < limits.red_below_jaccard:
        return "red"
    if scores["bce_accuracy"] > limits.green_above_bce_accuracy:
        return "cyan" if scores["dice"] > limits.cyan_above_dice else "green"
    return "blue"


def binary_results(predictions: dict[str, Tensor], samples: Sequence[SampleInfo]) -> Iterator[np.ndarray]:
    """(H, W) uint8 alpha of each sample at its own size, from logits (B, 1, h, w).

    The official arithmetic: probabilities, not logits, are resized, and v · 255 is cut off rather than rounded.
    """
    for probabilities, sample in zip(predictions["logits"].float().sigmoid().split(1), samples, strict=True):
        yield resize(probabilities, sample.size)[0, 0].mul(255).byte().cpu().numpy()


def draw_binary(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The object as it is on a darkened, desaturated ground: (H, W, 3) and (H, W) uint8 -> (H, W, 3) uint8."""
    weight = alpha.astype(np.float32) / 255
    tints = np.arange(256)[:, None] * 0.35 + np.array([12.0, 20.0, 60.0])  # of a grey level
    ground = tints.astype(np.uint8)[cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)]
    return cv2.blendLinear(image, ground, weight, 1 - weight)


FOUND, MISSED = (np.array(color, np.float32) for color in ((255, 150, 30), (70, 140, 255)))


def binary_panels(scored: Scored) -> dict[str, np.ndarray]:
    """Image, truth, prediction and error.

    In the error picture what was missed is blue, what was found where nothing is orange, both also to colour-blind
    eyes; the image lies dark behind them.
    """
    image, alpha = scored.image, scored.result
    truth = cv2.resize(scored.sample.masks, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
    difference = (alpha.astype(np.float32) - truth)[..., None] / 255
    ground = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] * np.float32(0.3)
    color = np.where(difference > 0, FOUND, MISSED)
    error = ground + np.abs(difference) * (color - ground)
    return {
        "image": image,
        "truth": colorize_alpha(truth),
        "prediction": colorize_alpha(alpha),
        "error": error.astype(np.uint8),
    }


def colorize_alpha(alpha: np.ndarray) -> np.ndarray:
    """(H, W) to grey (H, W, 3)."""
    return np.repeat(alpha[..., None], 3, axis=2)


BINARY = Task(
    name="binary",
    layout="a folder with im/ and gt/",
    reader=lambda spec, root=None, class_names=None, images="": BinaryFolders(spec, root=root, class_names=class_names),
    data_table=lambda reader: "",
    make_target=binary_target,
    collate_targets=collate_binary,
    num_classes=lambda reader: 1,
    loss_settings=lambda settings, reader, model: dict(settings),
    metric=lambda names, class_names, options: BinaryMetric(names),
    batch_scores=BinaryMetric.batch_scores,
    augment=OFFICIAL_BINARY,
    mixes=(),
    console=[("BC", "bce_accuracy"), ("DI", "dice"), ("JI", "jaccard"), ("SI", "ssim")],
    color=binary_color,
    results=binary_results,
    colorize=colorize_alpha,
    has_colors=False,
    draw=lambda image, alpha, class_names: draw_binary(image, alpha),
    cut_out=cut_out,
    panels=binary_panels,
    panel_notes={"error": "blue is what was missed, orange what was found where nothing is"},
    write_demo=write_demo,
    test_metrics=("standard",),
)

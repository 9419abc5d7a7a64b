"""`semantic`: a class for each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from colors import palette
from dataset import collate_semantic, semantic_target
from demo import write_semantic_demo
from maps import argmax_at
from metrics import SemanticMetric
from readers import Reader, class_table, pixel_counts, semantic_reader, show_classes
from samples import IGNORED, SampleInfo
from semantic_loss import class_weights
from tasks.base import Scored, Task
from transforms import OFFICIAL_SEMANTIC

WRONG, RIGHT = np.array([230, 60, 60], np.float32), np.array([70, 170, 110], np.float32)
LEGEND_ROWS = 24  # classes that a legend has room for, the most frequent ones


def semantic_loss_settings(settings: Mapping[str, Any], reader: Reader, model: Mapping[str, Any]) -> dict[str, Any]:
    """The criterion's arguments: how many classes there are, and their weights from how common they are."""
    how = settings["class_weights"]
    weights = None if how == "none" else class_weights(pixel_counts(reader)[:-1].tolist(), how)
    return {**settings, "num_classes": len(reader.class_names), "class_weights": weights}


def semantic_color(scores: dict[str, float], limits: Any) -> str:
    """Red for a poor mIoU of the batch, green for a good pixel accuracy, cyan when mIoU is good as well, else blue."""
    if scores["miou"] < limits.red_below_miou:
        return "red"
    if scores["accuracy"] > limits.green_above_accuracy:
        return "cyan" if scores["miou"] > limits.cyan_above_miou else "green"
    return "blue"


def semantic_results(predictions: dict[str, Tensor], samples: Sequence[SampleInfo]) -> Iterator[np.ndarray]:
    """(H, W) uint8 class ids of each sample at its own size, from logits (B, C, h, w)."""
    for logits, sample in zip(predictions["logits"].split(1), samples, strict=True):
        yield argmax_at(logits, sample.size)[0].cpu().numpy()


def colorize(labels: np.ndarray) -> np.ndarray:
    """(H, W) class ids to the colours of PASCAL VOC, (H, W, 3) uint8 RGB."""
    return palette()[labels]


def draw_semantic(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The classes' colours over the image, with a legend of those that are there, the most common first."""
    picture = cv2.addWeighted(image, 0.45, colorize(labels), 0.55, 0)
    ids, counts = np.unique(labels, return_counts=True)
    shown = [(int(i), count / labels.size) for i, count in zip(ids, counts, strict=True) if i < len(class_names)]
    shown = sorted(shown, key=lambda each: -each[1])[:LEGEND_ROWS]
    scale = max(0.4, min(image.shape[:2]) / 1000)
    row, pad = round(30 * scale), round(8 * scale)
    texts = [f"{class_names[i]} {share:.0%}".encode("ascii", "replace").decode() for i, share in shown]
    widths = [cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale * 0.8, 1)[0][0] for text in texts]
    rows = max(0, min(len(texts), (image.shape[0] - 2 * pad) // row))
    if not rows:
        return picture
    height, width = rows * row + pad, min(image.shape[1], max(widths[:rows]) + 2 * row + pad)
    picture[:height, :width] = picture[:height, :width] // 4
    for position, ((i, _), text) in enumerate(zip(shown[:rows], texts, strict=False)):
        top = pad + position * row
        color = tuple(int(channel) for channel in palette()[i])
        cv2.rectangle(picture, (pad, top), (pad + row - pad, top + row - pad), color, -1)
        cv2.rectangle(picture, (pad, top), (pad + row - pad, top + row - pad), (220, 220, 220), 1)
        place = (2 * pad + row - pad, top + row - pad - max(1, pad // 3))
        cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale * 0.8, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def semantic_panels(scored: Scored) -> dict[str, np.ndarray]:
    """Image, truth, prediction and error, in which right pixels are green, wrong ones red, ignored ones dark."""
    image, labels = scored.image, scored.result
    truth = cv2.resize(scored.sample.masks, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)
    ground = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    error = np.where((truth == labels)[..., None], 0.5 * ground + 0.35 * RIGHT, 0.25 * ground + 0.75 * WRONG)
    error[truth == IGNORED] = 0.2 * ground[truth == IGNORED]
    return {
        "image": image,
        "truth": colorize(truth),
        "prediction": colorize(labels),
        "error": error.astype(np.uint8),
    }


SEMANTIC = Task(
    name="semantic",
    layout="a folder with images/, masks/ and classes.txt, or a COCO .json",
    reader=semantic_reader,
    data_table=lambda reader: show_classes(class_table(reader)),
    make_target=semantic_target,
    collate_targets=collate_semantic,
    num_classes=lambda reader: len(reader.class_names),
    loss_settings=semantic_loss_settings,
    metric=lambda names, class_names, options: SemanticMetric(names, class_names=class_names),
    batch_scores=SemanticMetric.batch_scores,
    augment=OFFICIAL_SEMANTIC,
    mixes=("cutmix", "classmix", "mixup"),
    console=[("PA", "accuracy"), ("MA", "mean_accuracy"), ("MI", "miou"), ("DI", "dice")],
    color=semantic_color,
    results=semantic_results,
    colorize=colorize,
    has_colors=True,
    draw=draw_semantic,
    cut_out=None,
    panels=semantic_panels,
    panel_notes={"error": "green is right, red is wrong, dark is ignored"},
    write_demo=write_semantic_demo,
)

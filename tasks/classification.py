"""`classification`: one class for each picture."""

from __future__ import annotations

from typing import Any

from class_guesses import bars, caption, guesses, panels, records
from classification import class_target, collate_classes
from demo import write_classification_demo
from metrics.classification import ClassificationMetric
from readers.class_folders import ClassFolders, share_table
from tasks.base import ObjectOutputs, Task

AUGMENT: list[dict[str, Any]] = [
    {"name": "RandomResizedCrop", "p": 1.0, "scale": [0.35, 1.0]},
    {"name": "HorizontalFlip", "p": 0.5},
]

CLASSIFICATION = Task(
    name="classification",
    layout="a folder with a folder of images for each class",
    reader=lambda spec, root=None, class_names=None, images="": ClassFolders(spec, root=root, class_names=class_names),
    data_table=share_table,
    make_target=class_target,
    collate_targets=collate_classes,
    num_classes=lambda reader: len(reader.class_names),
    loss_settings=lambda settings, *data: dict(settings),
    metric=lambda names, class_names, options: ClassificationMetric(names, class_names=class_names),
    batch_scores=ClassificationMetric.batch_scores,
    augment=AUGMENT,
    mixes=("cutmix", "mixup"),
    console=[("T1", "top1"), ("T5", "top5")],
    color=lambda scores, limits: "green" if scores["top1"] > limits.green_above_accuracy else "blue",
    results=guesses,
    colorize=bars,
    has_colors=False,
    draw=caption,
    cut_out=None,
    panels=panels,
    panel_notes={"prediction": "green is right, red is wrong"},
    write_demo=write_classification_demo,
    mask=None,
    objects=ObjectOutputs(
        options=lambda meta, threshold, top_k: {"threshold": threshold or 0.0, "top_k": min(top_k, 5)},
        crops=lambda image, found, class_names: iter(()),
        records=records,
    ),
)

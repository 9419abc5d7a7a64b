"""`instance`: a list of objects, each with a class, a box and a mask."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dataset import collate_instance, instance_target
from demo import write_instance_demo
from instance_pictures import draw_objects, draw_outcome, id_map, object_colors
from instances import Detections, as_json, detections
from metrics import InstanceMetric
from readers import instance_reader, instance_table
from samples import SampleInfo
from tasks.base import ObjectOutputs, Scored, Task
from transforms import OFFICIAL_INSTANCE

DEFAULT_THRESHOLD = 0.5  # of scores, where no validation found a better one


def instance_color(scores: dict[str, float], limits: Any) -> str:
    """Red while objects are not covered, green once their classes are right, cyan when they are covered well, too."""
    overlap = scores.get("mask_iou", scores["box_iou"])
    if overlap < limits.red_below_iou:
        return "red"
    if scores["class_accuracy"] > limits.green_above_class_accuracy:
        return "cyan" if overlap > limits.cyan_above_iou else "green"
    return "blue"


def instance_results(
    predictions: dict[str, Tensor],
    samples: Sequence[SampleInfo],
    *,
    threshold: float = 0.0,
    top_k: int = 100,
    num_classes: int | None = None,
) -> Iterator[Detections]:
    """The `top_k` objects of each sample with scores of at least `threshold`, the surest first."""
    return detections(predictions, samples, threshold=threshold, top_k=top_k, num_classes=num_classes)


def result_options(meta: Mapping[str, Any], threshold: float | None, top_k: int) -> dict[str, Any]:
    """The arguments of `instance_results` for a checkpoint: by default its own best-F1 threshold."""
    chosen = best_threshold(meta.get("validation", {})) if threshold is None else threshold
    return {"threshold": chosen, "top_k": top_k, "num_classes": len(meta.get("class_names") or ()) or None}


def best_threshold(metrics: Mapping[str, float]) -> float:
    """The score at which F1 was best in a validation, or a half."""
    threshold = metrics.get("f1_threshold", math.nan)
    return DEFAULT_THRESHOLD if math.isnan(threshold) else threshold


def name_of(label: int, class_names: Sequence[str]) -> str:
    """The class's name, its number where official weights have no names."""
    return class_names[label] if label < len(class_names) and class_names[label] else str(label)


def draw_instance(image: np.ndarray, found: Detections, class_names: Sequence[str]) -> np.ndarray:
    """Masks, outlines and boxes over the image, each with its class and score."""
    pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    captions = [f"{name_of(label, class_names)} {score:.2f}" for label, score in pairs]
    return draw_objects(image, found.boxes, found.codes, captions)


def colorize_objects(found: Detections) -> np.ndarray:
    """A colour for each object, (H, W, 3) uint8 RGB, on black."""
    colors = np.concatenate([np.zeros((1, 3), np.uint8), object_colors(len(found.labels))])
    return colors[instance_mask(found)]


def instance_mask(found: Detections) -> np.ndarray:
    """(H, W), at a pixel 1 + the number of the object there, the surest on top; uint8 where that is enough."""
    return id_map(found.boxes, found.codes, found.size)


def crops(image: np.ndarray, found: Detections, class_names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each object in its box, (h, w, 4) uint8 RGBA where it has a mask, by `<number>_<class>`, the surest first."""
    for number, (label, box) in enumerate(zip(found.labels.tolist(), found.boxes, strict=True)):
        (left, top), (right, bottom) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
        if right <= left or bottom <= top:
            continue
        crop = image[top:bottom, left:right]
        if found.codes is not None:
            crop = np.dstack([crop, 255 * found.mask(number)[top:bottom, left:right]])
        yield f"{number + 1:03d}_{re.sub(r'[^-A-Za-z0-9_]+', '-', name_of(label, class_names))}", crop


def coco_results(
    found: Detections, image_id: int | str, file_ids: Sequence[int | str]
) -> dict[str, list[dict[str, Any]]]:
    """COCO results by the kind of evaluation that they are for, `bbox` and `segm`.

    Two lists, since pycocotools takes the size of an object from its box where a result has one.
    """
    results: dict[str, list[dict[str, Any]]] = {"bbox": []} if found.codes is None else {"bbox": [], "segm": []}
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        about = {"image_id": image_id, "category_id": file_ids[label] if file_ids else label}
        left, top, right, bottom = found.boxes[i].astype(float).tolist()
        box = [round(value, 3) for value in (left, top, right - left, bottom - top)]
        results["bbox"].append({**about, "bbox": box, "score": score})
        if found.codes is not None:
            results["segm"].append({**about, "segmentation": as_json(found.codes[i]), "score": score})
    return results


def instance_panels(scored: Scored) -> dict[str, np.ndarray]:
    """Image, truth, the prediction above the threshold of the best F1, and which objects were found."""
    truth, names = scored.sample.masks, scored.class_names
    labels = scored.sample.class_ids
    height, width = scored.image.shape[:2]
    scale = np.array([width, height, width, height]) / np.array(scored.sample.frames[0].shape[1::-1] * 2)
    boxes = truth.boxes * scale
    captions = [name_of(label, names) + (" (crowd)" if crowd else "")
                for label, crowd in zip(labels, truth.crowd, strict=True)]  # fmt: skip
    found = scored.result.above(best_threshold(scored.metrics))
    return {
        "image": scored.image,
        "truth": draw_objects(scored.image, boxes, truth.codes, captions),
        "prediction": draw_instance(scored.image, found, names),
        "outcome": draw_outcome(scored.image, boxes, truth, labels, found),
    }


INSTANCE = Task(
    name="instance",
    layout="a COCO .json, or a YOLO folder with images/ and labels/",
    reader=instance_reader,
    data_table=instance_table,
    make_target=instance_target,
    collate_targets=collate_instance,
    num_classes=lambda reader: len(reader.class_names),
    loss_settings=lambda settings, reader, model: {**settings, "groups": model["groups"]},
    metric=lambda names, class_names, options: InstanceMetric(
        names, class_names=class_names, masks=options.has_masks, max_detections=options.max_detections
    ),
    batch_scores=InstanceMetric.batch_scores,
    augment=OFFICIAL_INSTANCE,
    mixes=("mosaic", "copy_paste"),
    console=[("BI", "box_iou"), ("MI", "mask_iou"), ("CA", "class_accuracy")],
    color=instance_color,
    results=instance_results,
    colorize=colorize_objects,
    has_colors=True,
    draw=draw_instance,
    cut_out=None,
    panels=instance_panels,
    panel_notes={"outcome": "green is found, blue is missed, orange is found where nothing is; crowds are grey"},
    write_demo=write_instance_demo,
    demo_specs=("annotations/instances_train.json", "annotations/instances_val.json"),
    mask=instance_mask,
    objects=ObjectOutputs(options=result_options, crops=crops, records=coco_results),
)

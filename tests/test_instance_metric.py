"""The instance metric: against pycocotools on drawn pictures, whatever the order, batch size or number of ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from metrics import InstanceMetric
from metrics.average_precision import Regions
from metrics.instance import COCO as NAMES

SIZE = (120, 150)
CLASSES = ["a", "b", "c", "absent"]


def draw(seed: int, pictures: int = 12, most: int = 9, found: int = 40) -> list[dict[str, Any]]:
    """Pictures with objects, crowds and detections near them; some are empty, scores are often equal."""
    generator = np.random.default_rng(seed)
    drawn = []
    for number in range(pictures):
        objects = [_ellipse(generator) for _ in range(0 if number % 5 == 4 else generator.integers(1, most))]
        labels = generator.integers(0, 3, len(objects))
        crowd = generator.random(len(objects)) < 0.2
        shapes, kinds = [], []
        for _ in range(0 if number % 7 == 6 else found):
            near = objects and generator.random() < 0.7
            place = generator.integers(len(objects)) if near else -1
            shapes.append(_ellipse(generator, objects[place]) if near else _ellipse(generator))
            kinds.append(labels[place] if near and generator.random() < 0.9 else generator.integers(0, 4))
        scores = generator.integers(1, 20, len(shapes)) / 20
        there = {"objects": [_code(each) for each in objects], "labels": labels, "crowd": crowd}
        drawn.append(
            {**there, "found": [_code(each) for each in shapes], "kinds": np.array(kinds, int), "scores": scores}
        )
    return drawn


def _ellipse(generator: np.random.Generator, near: np.ndarray | None = None) -> np.ndarray:
    if near is not None:
        return near * generator.normal(1, 0.06, 4)
    return np.array([*generator.uniform(10, 110, 2), *generator.choice([5, 12, 25, 60], 2)]) + 1


def _code(ellipse: np.ndarray) -> dict[str, Any]:
    y, x, height, width = ellipse
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 <= 1
    mask[min(int(y), SIZE[0] - 1), min(int(x), SIZE[1] - 1)] = True
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def boxes_of(codes: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray(coco_mask.toBbox(codes)).reshape(-1, 4)


def official(pictures: list[dict[str, Any]], kind: str, limits: tuple[int, ...] = (1, 10, 100)) -> COCOeval:
    """pycocotools' own evaluation."""
    truth: dict[str, Any] = {"images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(pictures))],
             "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)], "annotations": []}  # fmt: skip
    results = []
    for number, picture in enumerate(pictures):
        for code, label, crowd in zip(picture["objects"], picture["labels"], picture["crowd"], strict=True):
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": int(label),
                 "iscrowd": int(crowd), "segmentation": code, "bbox": boxes_of([code])[0].tolist(),
                 "area": float(coco_mask.area(code))}
            )  # fmt: skip
        for code, label, score in zip(picture["found"], picture["kinds"], picture["scores"], strict=True):
            shape = {"segmentation": code} if kind == "mask" else {"bbox": boxes_of([code])[0].tolist()}
            results.append({"image_id": number, "category_id": int(label), "score": float(score), **shape})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), {"mask": "segm", "box": "bbox"}[kind])
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def add(metric: InstanceMetric, pictures: list[dict[str, Any]], numbers: list[int]) -> None:
    for number in numbers:
        picture = pictures[number]
        found, there = picture["found"], picture["objects"]
        metric.update_regions(
            Regions(picture["kinds"], boxes_of(found), found),
            picture["scores"],
            Regions(picture["labels"], boxes_of(there), there, np.asarray(coco_mask.area(there), float).reshape(-1)),
            picture["crowd"],
            dataset="d",
            sample_id=f"{number:03d}",
            path=f"{number}.png",
        )


@pytest.mark.parametrize(("seed", "found"), [(0, 40), (1, 40), (2, 3), (3, 130)])
def test_the_twelve_numbers_are_those_of_pycocotools(seed: int, found: int) -> None:
    pictures = draw(seed, found=found)
    metric = InstanceMetric(class_names=CLASSES)
    add(metric, pictures, list(range(len(pictures))))
    metric.reduce()
    scores = metric.compute()
    for kind in ("mask", "box"):
        expected = official(pictures, kind)
        values = [value if value > -1 else np.nan for value in expected.stats]
        np.testing.assert_array_equal([scores[f"{kind}_{name}"] for name in NAMES], values)

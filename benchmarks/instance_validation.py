"""How many times faster detections with masks are scored than by resizing every mask and asking pycocotools.

    python benchmarks/instance_validation.py --images 16 --size 480 640

One thread, the same predictions for both, in one run: a model's maps of 300 queries, and objects of which it finds
most. The usual way is what the published RF-DETR package does: every mask of the best 300 detections resized to the
picture, encoded by pycocotools, then COCOeval over all of them, for boxes and for masks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from instances import areas_of, detections
from metrics import InstanceMetric
from samples import Batch, InstanceTarget, Objects, SampleInfo

CLASSES, QUERIES, TOP_K, CHUNK = 80, 300, 300, 32


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    size = (options.size[0], options.size[1])
    batches = [draw(seed, size, options.map, options.classes) for seed in range(options.images)]
    print(
        f"{options.images} pictures of {size[0]} × {size[1]} pixels, maps of {options.map}², {options.classes} classes"
    )
    ours, theirs, parts = [], [], []
    for _ in range(options.repeats):
        seconds, scores = timed(lambda: score(batches, options.classes))
        ours.append(seconds)
        parts.append(timed(lambda: [list(detections(each.predictions, each.batch.samples)) for each in batches])[0])
        seconds, expected = timed(lambda: score_as_usual(batches, options.classes))
        theirs.append(seconds)
        for kind in ("mask", "box"):
            assert abs(scores[f"{kind}_ap"] - expected[kind]) < 1e-3, (kind, scores, expected)
    for name, each in (("this program", ours), ("  of it all 300 masks", parts), ("resize, encode, COCOeval", theirs)):
        print(f"{name:<26}{statistics.median(each) / options.images * 1e3:9.1f} ms a picture")
    print(f"ratio {statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):.1f}, "
          f"mask AP {scores['mask_ap']:.4f}, box AP {scores['box_ap']:.4f}")  # fmt: skip


def timed(work: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# ---------------------------------------------------------------- both ways


class Case:
    """A batch of one picture, and what a model says of it."""

    def __init__(self, predictions: dict[str, Tensor], batch: Batch):
        self.predictions, self.batch = predictions, batch


def score(cases: list[Case], classes: int) -> dict[str, float]:
    metric = InstanceMetric(class_names=[str(label) for label in range(classes)])
    for case in cases:
        metric.update(case.predictions, case.batch)
    metric.reduce()
    return metric.compute()


def score_as_usual(cases: list[Case], classes: int) -> dict[str, float]:
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(classes)]}
    boxes, masks = [], []
    for number, case in enumerate(cases):
        size = case.batch.samples[0].size
        truth["images"].append({"id": number, "height": size[0], "width": size[1]})
        objects, labels = case.batch.targets.originals[0], case.batch.targets.original_labels[0]
        for code, box, area, label in zip(objects.codes, objects.boxes, objects.areas, labels, strict=True):
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": label, "iscrowd": 0,
                 "area": area, "bbox": to_xywh(box), "segmentation": code}
            )  # fmt: skip
        scores, order = case.predictions["logits"][0].sigmoid().flatten().sort(descending=True, stable=True)
        queries = order[:TOP_K] // case.predictions["logits"].shape[-1]
        centers, sides = case.predictions["boxes"][0][queries].split(2, -1)
        scale = torch.tensor([size[1], size[0]] * 2)
        corners = (torch.cat([centers - sides / 2, centers + sides / 2], -1) * scale).clamp(min=0).minimum(scale)
        resized = torch.cat([F.interpolate(maps[None], size, mode="bilinear")[0] > 0
                             for maps in case.predictions["masks"][0][queries].split(CHUNK)])  # fmt: skip
        codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in resized.numpy().view(np.uint8)]
        for i, code in enumerate(codes):
            label = int(order[i]) % case.predictions["logits"].shape[-1]
            about = {"image_id": number, "category_id": label, "score": float(scores[i])}
            boxes.append({**about, "bbox": to_xywh(corners[i])})
            masks.append({**about, "segmentation": code})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        return {"mask": evaluate(coco, masks, "segm"), "box": evaluate(coco, boxes, "bbox")}


def evaluate(coco: COCO, results: list[dict[str, Any]], kind: str) -> float:
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def to_xywh(box: Any) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right - left, bottom - top]


# ---------------------------------------------------------------- what is scored


def draw(seed: int, size: tuple[int, int], side: int, classes: int) -> Case:
    """A picture with some ten ellipses, and queries near them or anywhere."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(3, 18, (), generator=generator))
    there = torch.cat(
        [torch.rand(count, 2, generator=generator), 0.05 + 0.3 * torch.rand(count, 2, generator=generator)], 1
    )
    labels = torch.randint(0, classes, (count,), generator=generator)
    like = torch.arange(QUERIES) % count
    boxes = there[like] * (1 + 0.04 * torch.randn(QUERIES, 4, generator=generator))
    logits = torch.randn(1, QUERIES, classes + 1, generator=generator) - 5
    logits[0, torch.arange(count), labels] += 6
    masks = signed(boxes, (side, side)) * 8 + torch.randn(1, QUERIES, side, side, generator=generator) * 0.2
    codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in (signed(there, size)[0] > 0).numpy().view(np.uint8)]
    corners = torch.cat([there[:, :2] - there[:, 2:] / 2, there[:, :2] + there[:, 2:] / 2], 1) * torch.tensor(
        size[::-1] * 2
    )
    objects = Objects(codes, corners.numpy(), np.zeros(count, bool), areas_of(codes))
    target = InstanceTarget(
        [count], labels, there, torch.zeros(1, 1, 1, 1), torch.zeros(count), [objects], [labels.tolist()]
    )
    sample = SampleInfo(sample_id=f"{seed:04d}", path="", dataset="drawn", size=size)
    return Case({"logits": logits, "boxes": boxes[None], "masks": masks}, Batch(torch.zeros(1), target, [sample]))


def signed(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, N, *size): positive in the ellipses that boxes (N, 4) hold."""
    y, x = ((torch.arange(length) + 0.5) / length for length in size)
    center, half = boxes[:, :2], boxes[:, 2:].clamp(min=0.01) / 2
    across = ((x - center[:, :1]) / half[:, :1]) ** 2
    down = ((y - center[:, 1:]) / half[:, 1:]) ** 2
    return (1 - across[:, None] - down[:, :, None])[None].clamp(min=-1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="pictures, each with 300 queries")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], help="height and width of a picture")
    parser.add_argument("--map", type=int, default=78, help="side of the model's maps; 78 is RF-DETR-Seg nano's")
    parser.add_argument("--classes", type=int, default=80, help="80 as in COCO")
    parser.add_argument("--repeats", type=int, default=3, help="paired runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""How many times faster detections with masks are scored than by resizing every mask and asking an evaluator.

    python benchmarks/instance_validation.py --images 16 --size 480 640

One thread, the same predictions for both, in one run: a model's maps of 300 queries, and objects of which it finds
most. The usual way is what the published RF-DETR package does: every mask of the best 300 detections resized to the
picture and encoded by pycocotools, then COCO's evaluation of all of them, for boxes and for masks: pycocotools' own,
and that of faster-coco-eval, which the package uses, where it is installed (pip install faster-coco-eval).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import sys
import time
from functools import partial
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

try:
    import faster_coco_eval
except ImportError:
    faster_coco_eval = None

CLASSES, QUERIES, TOP_K, CHUNK = 80, 300, 300, 32


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    size = (options.size[0], options.size[1])
    batches = [draw(seed, size, options.map, options.classes) for seed in range(options.images)]
    print(
        f"{options.images} pictures of {size[0]} × {size[1]} pixels, maps of {options.map}², {options.classes} classes"
    )
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        scores = timed(seconds, "this program", lambda: score(batches, options.classes))
        timed(seconds, "  of it 300 masks", lambda: [list(detections(each.predictions, each.batch.samples))
                                                     for each in batches])  # fmt: skip
        results = timed(seconds, "resize and encode 300 masks", lambda: results_as_usual(batches, options.classes))
        for name, (coco, evaluation) in evaluators().items():
            expected = timed(seconds, f"  and {name}", partial(evaluate, coco, evaluation, *results))
            for kind, value in expected.items():
                assert abs(scores[f"{kind}_ap"] - value) < 1e-3, (name, kind, scores, expected)
    ours = statistics.median(seconds["this program"])
    for name, each in seconds.items():
        usual = statistics.median(each)
        print(f"{name:<28}{usual / options.images * 1e3:9.1f} ms a picture", end="")
        if name.startswith("  and"):
            usual += statistics.median(seconds["resize and encode 300 masks"])
            print(f", together {usual / ours:.1f} times this program", end="")
        print()
    print(f"mask AP {scores['mask_ap']:.4f}, box AP {scores['box_ap']:.4f}")


def timed(seconds: dict[str, list[float]], name: str, work: Any) -> Any:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return result


def evaluators() -> dict[str, tuple[Any, Any]]:
    """(COCO, COCOeval) by the name of the package, of those that are installed."""
    found = {"pycocotools": (COCO, COCOeval)}
    if faster_coco_eval is not None:
        found["faster-coco-eval"] = (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    return found


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


def results_as_usual(cases: list[Case], classes: int) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """(truth as a COCO json has it, results of boxes, results of masks)."""
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
    return truth, boxes, masks


def evaluate(coco: Any, evaluation: Any, truth: dict[str, Any], boxes: list[Any], masks: list[Any]) -> dict[str, float]:
    """AP by kind."""
    found = {}
    for kind, name, results in (("box", "bbox", boxes), ("mask", "segm", masks)):
        annotations = coco()
        annotations.dataset = copy.deepcopy(truth)
        annotations.createIndex()
        run = evaluation(annotations, annotations.loadRes(copy.deepcopy(results)), name)
        run.evaluate()
        run.accumulate()
        run.summarize()
        found[kind] = float(run.stats[0])
    return found


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
    parser.add_argument("--repeats", type=int, default=3, help="runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()

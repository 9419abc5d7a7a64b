"""The instance metric: against pycocotools on drawn pictures, whatever the order, batch size or number of ranks."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from compare import compare
from errors import UserError
from instances import areas_of
from metrics import InstanceMetric
from metrics.average_precision import Regions
from metrics.instance import COCO as NAMES
from samples import InstanceTarget, Objects, SampleInfo

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


def to_corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)


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
            Regions(picture["labels"], boxes_of(there), there, areas_of(there)),
            picture["crowd"],
            dataset="d",
            sample_id=f"{number:03d}",
            path=f"{number}.png",
        )


def metric_of(pictures: list[dict[str, Any]], **settings: Any) -> InstanceMetric:
    metric = InstanceMetric(class_names=CLASSES, **settings)
    add(metric, pictures, list(range(len(pictures))))
    metric.reduce()
    return metric


def check(scores: dict[str, float], kind: str, expected: COCOeval) -> None:
    values = [value if value > -1 else math.nan for value in expected.stats]
    np.testing.assert_array_equal([scores[f"{kind}_{name}"] for name in NAMES], values)


# ---------------------------------------------------------------- against pycocotools


@pytest.mark.parametrize(("seed", "found"), [(0, 40), (1, 40), (2, 3), (3, 330)])
def test_the_twelve_numbers_are_those_of_pycocotools(seed: int, found: int) -> None:
    pictures = draw(seed, found=found)
    scores = metric_of(pictures).compute()
    for kind in ("mask", "box"):
        check(scores, kind, official(pictures, kind))


def test_the_numbers_of_each_class_are_those_of_pycocotools() -> None:
    pictures = draw(4)
    rows = metric_of(pictures).per_class()
    assert [row["name"] for row in rows] == CLASSES
    for kind in ("mask", "box"):
        precision = official(pictures, kind).eval["precision"][..., 0, -1]
        expected = [p[p > -1].mean() if (p > -1).any() else math.nan for p in precision.transpose(2, 0, 1)]
        np.testing.assert_array_equal([row[f"{kind}_ap"] for row in rows], expected)
    labels, crowd = (np.concatenate([each[name] for each in pictures]) for name in ("labels", "crowd"))
    assert [row["objects"] for row in rows] == [int(((labels == i) & ~crowd).sum()) for i in range(4)]
    assert math.isnan(rows[3]["recall"])


def test_more_detections_count_where_more_are_asked_for() -> None:
    pictures = draw(5, pictures=4, found=500)
    scores = metric_of(pictures, max_detections=150).compute()
    expected = official(pictures, "box", (1, 10, 150))
    assert scores["box_ar100"] == expected.stats[8]
    precision = expected.eval["precision"][..., 0, -1]  # whose mean pycocotools does not print
    assert scores["box_ap"] == precision[precision > -1].mean()
    assert InstanceMetric(class_names=CLASSES, max_detections=150).headings["box_ar100"] == "box AR150"


def test_pictures_without_anything() -> None:
    empty = {"objects": [], "labels": np.zeros(0, int), "crowd": np.zeros(0, bool), "found": [],
             "kinds": np.zeros(0, int), "scores": np.zeros(0)}  # fmt: skip
    metric = metric_of([empty, empty])
    scores = metric.compute()
    assert all(math.isnan(value) for value in scores.values())
    assert metric.figures() == {}
    assert [row.scores["mask_ap"] for row in metric.rows] == [1, 1]
    nothing_found = metric_of([{**draw(0)[0], "found": [], "kinds": np.zeros(0, int), "scores": np.zeros(0)}])
    assert nothing_found.compute()["mask_ap"] == nothing_found.compute()["f1"] == 0
    assert math.isnan(nothing_found.compute()["f1_threshold"])
    assert len(nothing_found.figures()) == 3


# ---------------------------------------------------------------- samples and thresholds


def squares(*corners: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks of 20 × 20 pixels by their upper left corners."""
    masks = np.zeros((*SIZE, len(corners)), np.uint8, order="F")
    for place, (y, x) in enumerate(corners):
        masks[y : y + 20, x : x + 20, place] = 1
    return coco_mask.encode(masks) if corners else []


def picture(
    there: list[Any], labels: list[int], found: list[Any], kinds: list[int], scores: list[float]
) -> dict[str, Any]:
    return {"objects": squares(*there), "labels": np.array(labels, int), "crowd": np.zeros(len(there), bool),
            "found": squares(*found), "kinds": np.array(kinds, int), "scores": np.array(scores)}  # fmt: skip


def test_the_operating_point_by_hand() -> None:
    first = picture([(0, 0), (50, 50)], [0, 1], [(0, 0), (50, 50), (90, 90)], [0, 1, 0], [0.9, 0.6, 0.5])
    second = picture([(0, 0)], [0], [(0, 0), (60, 0)], [1, 0], [0.7, 0.2])
    scores = metric_of([first, second]).compute()
    # From .6 on: two right ones, one of the wrong class, three objects.
    assert scores["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["f1_threshold"] == 0.6
    assert scores["precision"] == scores["recall"] == pytest.approx(2 / 3)


def test_a_sample_alone_minds_classes_that_are_not_there() -> None:
    right = picture([(0, 0)], [0], [(0, 0)], [0], [0.5])
    false_alarm = picture([(0, 0)], [0], [(0, 0), (60, 60)], [0, 2], [0.5, 0.9])
    nothing_there = picture([], [], [(60, 60), (0, 0)], [2, 1], [0.9, 0.3])
    rows = metric_of([right, false_alarm, nothing_there]).rows
    assert [row.scores["mask_ap"] for row in rows] == pytest.approx([1, 0.5, 0.1])
    assert math.isnan(rows[2].scores["box_ap"])
    assert math.isnan(rows[0].scores["mask_ap_large"])
    assert rows[0].scores["mask_ap_small"] == pytest.approx(1)
    assert (rows[0].scores["f1"], rows[0].scores["f1_threshold"]) == (1, 0.5)


def test_names_headings_and_boxes_alone() -> None:
    assert InstanceMetric.resolve(["mask AP50", "box_ar100", "F1"]) == ["mask_ap50", "box_ar100", "f1"]
    with pytest.raises(UserError, match=r"'mask_pa' \(did you mean mask_ap\?\)"):
        InstanceMetric(["mask_pa"], class_names=CLASSES)
    with pytest.raises(UserError, match="'mask_ap' needs masks"):
        InstanceMetric(["mask_ap"], class_names=CLASSES, masks=False)
    pictures = draw(6)
    metric = metric_of(pictures, masks=False)
    assert metric.primary == "box_ap"
    check(metric.compute(), "box", official(pictures, "box"))
    assert not any(name.startswith("mask") for name in metric.higher_is_better)


def test_figures_are_pictures() -> None:
    figures = metric_of(draw(7)).figures()
    assert len(figures) == 3
    assert all(each.ndim == 3 and each.dtype == np.uint8 for each in figures.values())


# ---------------------------------------------------------------- resampling


def test_resampled_scores_are_those_of_the_repeated_pictures() -> None:
    generator = np.random.default_rng(0)
    # Of equal scores the copies of a picture would stand in another order.
    pictures = [{**each, "scores": generator.random(len(each["scores"]))} for each in draw(8)]
    metric = metric_of(pictures)
    weights = generator.multinomial(len(pictures), np.full(len(pictures), 1 / len(pictures)), 5)
    names = list(metric.higher_is_better)
    drawn = metric.resampled(names, metric.rows, weights.astype(float))
    for place, times in enumerate(weights):
        repeated = [row for row, count in zip(metric.rows, times, strict=True) for _ in range(count)]
        expected = metric.means(repeated)
        assert {name: drawn[name][place] for name in names} == pytest.approx(expected, nan_ok=True)


def test_two_models_are_compared() -> None:
    pictures = draw(9, pictures=20)
    worse = [{**each, "scores": np.random.default_rng(1).random(len(each["scores"]))} for each in pictures]
    better = [{**each, "found": each["objects"], "kinds": each["labels"], "scores": np.ones(len(each["labels"]))}
              for each in pictures]  # fmt: skip
    a, b = metric_of(worse), metric_of(better)
    (found,) = compare(a, a.rows, b.rows, ["mask_ap"], resamples=50)
    assert found.verdict == "B better"
    assert found.low < found.value == b.compute()["mask_ap"] - a.compute()["mask_ap"] < found.high


# ---------------------------------------------------------------- from a model


def batch_of(pictures: list[dict[str, Any]], names: list[str]) -> SimpleNamespace:
    originals = [
        Objects(each["objects"], to_corners(boxes_of(each["objects"])), each["crowd"], areas_of(each["objects"]))
        for each in pictures
    ]
    samples = [SampleInfo(name, f"{name}.png", "d", SIZE) for name in names]
    target = SimpleNamespace(originals=originals, original_labels=[each["labels"].tolist() for each in pictures])
    return SimpleNamespace(targets=target, samples=samples)


def score_some(indices: list[int], batch_size: int) -> InstanceMetric:
    pictures = draw(10, pictures=7)
    generator = torch.Generator().manual_seed(0)
    predictions = {"logits": torch.randn(7, 30, 5, generator=generator),
                   "boxes": torch.rand(7, 30, 4, generator=generator) * 0.8,
                   "masks": torch.randn(7, 30, 9, 12, generator=generator) - 1}  # fmt: skip
    metric = InstanceMetric(class_names=CLASSES)
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        batch = batch_of([pictures[i] for i in chosen], [f"s{i}" for i in chosen])
        metric.update({name: value[chosen] for name, value in predictions.items()}, batch)
    return metric


def test_ranks_batches_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = score_some([3, 0, 6, 1, 2, 5, 4], batch_size=3)
    alone.reduce()
    # As a distributed sampler pads: the second rank scores sample 0 a second time.
    ranks = [score_some([0, 2, 4, 6], batch_size=2), score_some([1, 3, 5, 0], batch_size=2)]

    def gather(gathered: list[Any], rows: list[Any]) -> None:
        gathered[:] = [pickle.loads(pickle.dumps(rank.rows)) for rank in ranks]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    ranks[1].reduce()
    assert [row.sample_id for row in ranks[1].rows] == [f"s{i}" for i in range(7)]
    assert [str(row.scores) for row in ranks[1].rows] == [str(row.scores) for row in alone.rows]
    # As text, in which NaN equals NaN.
    assert str(ranks[1].compute()) == str(alone.compute())
    assert str(ranks[1].per_class()) == str(alone.per_class())


def test_what_diverged_scores_nothing() -> None:
    pictures = draw(11, pictures=1)
    metric = InstanceMetric(class_names=CLASSES)
    nan = math.nan
    predictions = {"logits": torch.full((1, 4, 5), nan), "boxes": torch.full((1, 4, 4), nan),
                   "masks": torch.full((1, 4, 6, 6), nan)}  # fmt: skip
    metric.update(predictions, batch_of(pictures, ["s"]))
    assert metric.compute()["mask_ap"] == 0


# ---------------------------------------------------------------- while training


def training_case() -> tuple[dict[str, torch.Tensor], SimpleNamespace]:
    """Two pictures: two objects, overlapping layers, and none. The second query of each is the right one."""
    maps = torch.zeros(2, 2, 16, 16, dtype=torch.int16)
    maps[0, 0, :8, :8], maps[0, 1, 4:12, 4:12] = 1, 2
    target = InstanceTarget(
        counts=[2, 0],
        labels=torch.tensor([1, 0]),
        boxes=torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]),
        maps=maps,
        layer_of=torch.tensor([0, 1]),
    )
    boxes = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 0.25]])
    logits = torch.full((1, 2, 3, 3), -5.0)
    logits[..., 1, 1] = logits[..., 2, 1] = 5  # the second object is taken for the first's class
    features = torch.stack([(maps[:, 0, ::4, ::4] == 1) * 2.0 - 1, (maps[:, 1, ::4, ::4] == 2) * 2.0 - 1], 1)
    queries = torch.tensor([[0.0, 0], [1, 0], [0, 1]]).expand(1, 2, 3, 2)
    outputs = {"boxes": boxes.expand(1, 2, 3, 4), "logits": logits, "mask_queries": queries,
               "mask_features": features[None], "mask_bias": torch.zeros(1)}  # fmt: skip
    return outputs, SimpleNamespace(targets=target)


def test_batch_scores_by_hand() -> None:
    outputs, batch = training_case()
    live = InstanceMetric.batch_scores(outputs, batch)
    assert {name: value.item() for name, value in live.items()} == {
        "box_iou": 0.75,
        "class_accuracy": 0.5,
        "mask_iou": 1,
    }
    boxes_alone = {name: outputs[name] for name in ("boxes", "logits")}
    assert list(InstanceMetric.batch_scores(boxes_alone, batch)) == ["box_iou", "class_accuracy"]


def test_batch_scores_without_objects_are_0() -> None:
    outputs, batch = training_case()
    none = InstanceTarget([0, 0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), batch.targets.maps,
                          torch.zeros(0, dtype=torch.int64))  # fmt: skip
    live = InstanceMetric.batch_scores(outputs, SimpleNamespace(targets=none))
    assert [value.item() for value in live.values()] == [0, 0, 0]

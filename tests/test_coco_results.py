"""COCO results of other programs: what is wrong with them is said before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coco_results import CocoResults
from metrics import InstanceMetric
from readers import DataError

TRUTH: dict[str, Any] = {
    "images": [{"id": 7, "height": 20, "width": 30, "file_name": "a.png"}, {"id": 10, "height": 20, "width": 30}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
    "annotations": [
        {"image_id": 7, "category_id": 3, "bbox": [2, 2, 10, 8], "segmentation": [[2, 2, 12, 2, 12, 10, 2, 10]],
         "area": 80, "iscrowd": 0},
        {"image_id": 7, "category_id": 1, "bbox": [15, 5, 10, 10], "segmentation": [[15, 5, 25, 5, 25, 15, 15, 15]]},
    ],
}  # fmt: skip
BOX = {"image_id": 7, "category_id": 3, "bbox": [2, 2, 10, 8], "score": 0.9}
MASK = {"image_id": 7, "category_id": 3, "segmentation": [[2, 2, 12, 2, 12, 10, 2, 10]], "score": 0.9}


def read(folder: Path, results: Any, truth: Any = TRUTH) -> CocoResults:
    for name, content in (("results.json", results), ("instances_val.json", truth)):
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return CocoResults(folder / "results.json", folder / "instances_val.json")


def score(results: CocoResults) -> InstanceMetric:
    metric = InstanceMetric(class_names=results.class_names, masks=results.has_masks)
    results.score(metric, range(len(results)))
    metric.reduce()
    return metric


def test_boxes_alone_and_masks_alone(tmp_path: Path) -> None:
    boxes = read(tmp_path, [BOX, {**BOX, "category_id": 1, "image_id": 10}])
    assert (boxes.faults, boxes.has_masks, boxes.class_names) == ([], False, ["dog", "cat"])
    metric = score(boxes)
    assert metric.compute()["box_ap"] == pytest.approx(0.5)
    assert [(row.sample_id, row.path) for row in metric.rows] == [("000000000007", "a.png"), ("000000000010", "10")]
    masks = score(read(tmp_path, [MASK])).compute()
    assert masks["mask_ap"] == masks["box_ap"] == pytest.approx(0.5)
    assert score(read(tmp_path, [])).compute()["box_ap"] == 0


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (5, "result 0 is no object"),
        ({**BOX, "image_id": 8}, "is of image 8, which"),
        ({**BOX, "image_id": [1]}, "is of image"),
        ({**BOX, "category_id": 2}, "has the category 2, which"),
        ({**BOX, "score": "high"}, "has the score 'high', which is no number"),
        ({**BOX, "score": float("nan")}, "has the score nan"),
        ({**BOX, "bbox": [1, 2, 3]}, "which is no left, top, width and height"),
        ({**BOX, "bbox": [1, 2, -3, 4]}, "which is no left, top, width and height"),
        ({**BOX, "bbox": None}, "has no bbox"),
        ({**MASK, "segmentation": [[1, 2]]}, "has a polygon of 2 numbers"),
        ({**MASK, "segmentation": {"size": [9, 9], "counts": [81]}}, "has a run-length code of size"),
        ({**MASK, "segmentation": {"size": [20, 30], "counts": "~~~"}}, "run-length code"),
    ],
)
def test_faults_of_results(tmp_path: Path, row: Any, problem: str) -> None:
    results = read(tmp_path, [row, BOX if "segmentation" not in (row if isinstance(row, dict) else {}) else MASK])
    (fault,) = results.faults
    assert fault.path.endswith("results.json")
    assert problem in fault.problem


def test_a_result_without_a_mask_among_masks(tmp_path: Path) -> None:
    (fault,) = read(tmp_path, [MASK, BOX]).faults
    assert fault.problem == "result 1 has no segmentation"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"images": [{"id": 7, "height": 0, "width": 30}]}, "needs a height and a width, not 0 and 30"),
        ({"images": [*TRUTH["images"], {"id": 7}]}, "image 2 needs an id of its own"),
        ({"categories": [*TRUTH["categories"], {"id": 3, "name": "cow"}]}, "category 2 needs an id of its own"),
        ({"annotations": None}, "has no list of annotations"),
        ({"annotations": [{**TRUTH["annotations"][0], "area": "big"}]}, "has the area 'big', which is no number"),
    ],
)
def test_faults_of_the_truth(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    faults = read(tmp_path, [], {**TRUTH, **change}).faults
    assert problem in faults[0].problem
    assert faults[0].path.endswith("instances_val.json")


@pytest.mark.parametrize(
    ("results", "truth", "problem"),
    [("{}", TRUTH, "is no list of COCO results"), ("[", TRUTH, "cannot be read as json"),
     ([], [1], "is no COCO json")],
)  # fmt: skip
def test_files_of_another_kind(tmp_path: Path, results: Any, truth: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read(tmp_path, results, truth)

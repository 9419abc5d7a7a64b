"""The scores against those of PySODMetrics, BiRefNet, the Boundary IoU API, mmsegmentation and pycocotools."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from coco_results import CocoResults
from metrics import BinaryMetric, InstanceMetric, SemanticMetric
from metrics.instance import COCO
from metrics.scores import CURVES, SCORES, field_scores
from tests.conftest import SHARED, needs_shared

pytestmark = needs_shared

FOLDER = SHARED / "golden" / "metrics"
KINDS = {"adp": "adaptive", "max": "max", "mean": "mean", "binary": "binary"}
FAMILIES = {"Emeasure": "e", "Fmeasure": "f", "fmeasure": "f", "f1": "dice"}
PYSODMETRICS = {
    "Smeasure": "s_measure",
    "wFmeasure": "weighted_f",
    "MAE": "normalized_mae",
    "HCE": "hce",
    "MSIoU_adp_float64": "adaptive_msiou",
    "MSIoU_binary_float64": "binary_msiou",
}
BIREFNET = {
    "Smeasure": "s_measure_birefnet",
    "wFmeasure": "weighted_f",
    "MAE": "normalized_mae",
    "MSE": "normalized_mse",
    "HCE": "hce_birefnet",
    "MBA": "mba_birefnet",
    "BIoU_max": "max_biou_birefnet",
    "BIoU_mean": "mean_biou_birefnet",
}
NOT_COUNTED = {"s_measure", "s_measure_birefnet", "weighted_f", "normalized_mae", "normalized_mse"}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / "expected_binary.json").read_text())


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "inputs_binary.npz"))


def name_of(key: str, evaluator: str) -> str:
    names = PYSODMETRICS if evaluator == "pysodmetrics" else BIREFNET
    family, _, kind = key.partition("_")
    return names.get(key) or f"{KINDS[kind]}_{FAMILIES.get(family, family)}"


def check(figures: dict[str, float], golden: dict[str, dict[str, float | None]], case: str) -> int:
    """Every figure of both evaluators; null is NaN. Returns how many there were."""
    count = 0
    for evaluator in ("pysodmetrics", "birefnet"):
        for key, value in golden[evaluator].items():
            if key in ("MSIoU_adp", "MSIoU_binary"):  # in float16; the float64 ones are beside them
                continue
            name = name_of(key, evaluator)
            tolerance = 1e-6 if name in NOT_COUNTED else 1e-9
            goal = math.nan if value is None else value
            assert figures[name] == pytest.approx(goal, rel=0, abs=tolerance, nan_ok=True), (case, evaluator, key)
            count += 1
    return count


def cases() -> list[str]:
    if not FOLDER.is_dir():
        return []
    return [name for name in json.loads((FOLDER / "expected_binary.json").read_text()) if not name.startswith("_")]


@pytest.mark.parametrize("case", cases())
def test_every_figure_and_curve_of_a_case(case: str, expected: dict[str, Any], masks: dict[str, np.ndarray]) -> None:
    scores, curves = field_scores(masks[f"{case}/pred"], masks[f"{case}/gt"], SCORES)
    assert check(scores, expected[case], case) > 40
    api = expected[case]["boundary_iou_api"]["BoundaryIoU"]
    assert scores["boundary_iou"] == pytest.approx(math.nan if api is None else api, rel=0, abs=1e-9, nan_ok=True)
    golden_curves = np.load(FOLDER / "curves_binary.npz")
    for key, curve in {"em": "e", "fm": "f", "precision": "precision", "recall": "recall", "biou": "biou_birefnet",
                       "birefnet_em": "e", "birefnet_fm": "f"}.items():  # fmt: skip
        if f"{case}/{key}" in golden_curves:
            np.testing.assert_allclose(curves[curve], golden_curves[f"{case}/{key}"], rtol=0, atol=1e-9)
    assert set(curves) == set(CURVES)


def test_curves_are_averaged_over_images_before_the_maximum(
    expected: dict[str, Any], masks: dict[str, np.ndarray]
) -> None:
    metric = BinaryMetric(["all"])
    for case in expected["_dataset"]["cases"]:
        metric.update_masks(masks[f"{case}/pred"], masks[f"{case}/gt"], dataset="golden", sample_id=case, path=case)
    metric.reduce()
    assert check(metric.compute(), expected["_dataset"], "_dataset") > 40
    assert metric.per_dataset()["golden"] == metric.compute()


# ---------------------------------------------------------------- semantic


@pytest.mark.parametrize("case", ["c2", "c21", "c81"])
def test_semantic_figures_are_those_of_mmseg(case: str) -> None:
    golden = json.loads((FOLDER / "expected_semantic.json").read_text())[case]
    inputs = np.load(FOLDER / "inputs_semantic.npz")
    metric = SemanticMetric(class_names=[str(label) for label in range(golden["num_classes"])])
    count = sum(name.startswith(f"{case}/pred") for name in inputs.files)
    for index in range(count):
        about = {"dataset": "d", "sample_id": str(index), "path": ""}
        metric.update_masks(inputs[f"{case}/pred{index}"], inputs[f"{case}/gt{index}"], **about)
    metric.reduce()
    assert (metric.confusion() == inputs[f"{case}/confusion"]).all()
    scores, classes = metric.compute(), metric.per_class()
    for name, wanted in {"miou": "mIoU", "mean_accuracy": "mAcc", "accuracy": "aAcc"}.items():
        assert scores[name] == pytest.approx(golden[wanted], rel=1e-9), name
    assert scores["dice"] == pytest.approx(golden["mmseg_1.2.2"]["Dice"], rel=1e-6)
    for name in ("iou", "acc"):
        per_class = [math.nan if value is None else value for value in golden[f"per_class_{name}"]]
        found = [each["accuracy" if name == "acc" else name] for each in classes]
        assert found == pytest.approx(per_class, rel=1e-9, nan_ok=True)


# ---------------------------------------------------------------- instance


def test_instance_figures_are_those_of_pycocotools() -> None:
    golden = json.loads((FOLDER / "expected_instance.json").read_text())
    results = CocoResults(FOLDER / "instance_predictions.json", FOLDER / "instance_gt.json")
    assert not results.faults
    assert len(results) == golden["images"]
    metric = InstanceMetric(class_names=results.class_names, masks=results.has_masks)
    results.score(metric, reversed(range(len(results))))
    metric.reduce()
    scores, classes = metric.compute(), metric.per_class()
    for kind, evaluation in {"mask": "segm", "box": "bbox"}.items():
        for name, heading in COCO.items():
            assert scores[f"{kind}_{name}"] == golden[evaluation][heading], (kind, name)
        for row, expected in zip(classes, golden[evaluation]["per_category"].values(), strict=True):
            for name, heading in {"ap": "AP", "ap50": "AP50"}.items():
                wanted = math.nan if expected[heading] is None else expected[heading]
                assert row[f"{kind}_{name}"] == pytest.approx(wanted, rel=1e-12, nan_ok=True), (kind, row["name"])

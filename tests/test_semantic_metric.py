"""The semantic metric: figures by hand, what is ignored or absent, original sizes, the same on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from compare import compare
from errors import UserError
from metrics import SemanticMetric
from samples import SemanticTarget

NAMES = ["sky", "tree", "road", "car"]


def logits_of(labels: Tensor, classes: int = len(NAMES)) -> Tensor:
    """(B, C, H, W) logits whose arg-max is `labels`."""
    return 9 * F.one_hot(labels.long(), classes).movedim(-1, 1).float()


def batch_of(
    labels: Tensor,
    originals: list[Tensor] | None = None,
    ids: list[str] | None = None,
    datasets: list[str] | None = None,
) -> SimpleNamespace:
    ids = ids or [f"s{i}" for i in range(len(labels))]
    datasets = datasets or ["d"] * len(labels)
    samples = [SimpleNamespace(sample_id=i, path=f"im/{i}.png", dataset=d) for i, d in zip(ids, datasets, strict=True)]
    return SimpleNamespace(targets=SemanticTarget(labels, originals or []), samples=samples)


def metric_of(prediction: Tensor, truth: Tensor, **batch: Any) -> SemanticMetric:
    metric = SemanticMetric(class_names=NAMES)
    metric.update({"logits": logits_of(prediction)}, batch_of(truth, **batch))
    metric.reduce()
    return metric


def as_bytes(rows: list[list[list[int]]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)


# Two samples. Class 2 is predicted but nowhere in the truth, class 3 is nowhere.
TRUTH = as_bytes([[[0, 0, 0, 255], [1, 1, 255, 255]], [[0, 0, 0, 0], [1, 0, 0, 0]]])
PREDICTION = as_bytes([[[0, 0, 1, 0], [1, 2, 3, 3]], [[0, 0, 0, 0], [0, 0, 0, 0]]])


def test_figures_by_hand() -> None:
    metric = metric_of(PREDICTION, TRUTH)
    assert metric.confusion().tolist() == [[9, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou, accuracy, dice = [9 / 11, 1 / 4, 0.0], [9 / 10, 1 / 3], [18 / 20, 2 / 5, 0.0]
    expected = {"miou": sum(iou) / 3, "accuracy": 10 / 13, "mean_accuracy": sum(accuracy) / 2, "dice": sum(dice) / 3}
    assert metric.compute() == pytest.approx(expected, rel=1e-15)
    table = metric.per_class()
    assert [row["name"] for row in table] == NAMES
    assert [row["iou"] for row in table] == pytest.approx([*iou, math.nan], nan_ok=True)
    assert [row["accuracy"] for row in table] == pytest.approx([*accuracy, math.nan, math.nan], nan_ok=True)
    assert [row["dice"] for row in table] == pytest.approx([*dice, math.nan], nan_ok=True)
    assert [row["share"] for row in table] == pytest.approx([10 / 13, 3 / 13, 0, 0])


def test_rows_hold_the_scores_of_their_own_sample() -> None:
    metric = metric_of(PREDICTION, TRUTH)
    first, second = (row.scores for row in metric.rows)
    assert first["miou"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert second["miou"] == pytest.approx((7 / 8 + 0) / 2)
    assert second["accuracy"] == pytest.approx(7 / 8)
    assert [row.sample_id for row in metric.worst(1)] == ["s0"]


def test_datasets_have_their_own_confusion() -> None:
    metric = metric_of(PREDICTION, TRUTH, datasets=["a", "b"])
    found = metric.per_dataset()
    for row in metric.rows:
        assert found[row.dataset] == row.scores


def test_a_sample_without_labels_has_no_score_and_takes_no_part() -> None:
    truth = TRUTH.clone()
    truth[0] = 255
    metric = metric_of(PREDICTION, truth)
    assert all(math.isnan(value) for value in metric.rows[0].scores.values())
    assert metric.compute() == pytest.approx(metric.rows[1].scores)
    assert metric.undefined() == dict.fromkeys(metric.higher_is_better, 1)
    assert [row.sample_id for row in metric.worst(1)] == ["s0"]


def test_originals_are_scored_at_their_own_sizes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9, 12)
    originals = [torch.randint(0, 4, size).byte() for size in ((31, 50), (7, 5))]
    originals[0][:5] = 255
    metric = SemanticMetric(class_names=NAMES)
    metric.update({"logits": logits}, batch_of(torch.zeros(2, 36, 48).byte(), originals))
    expected = np.zeros((4, 4), np.int64)
    for image, truth in zip(logits, originals, strict=True):
        prediction = F.interpolate(image[None], truth.shape, mode="bilinear").argmax(1)[0]
        for cell in zip(truth[truth < 4].tolist(), prediction[truth < 4].tolist(), strict=True):
            expected[cell] += 1
    assert metric.confusion().tolist() == expected.tolist()


def test_finished_masks_score_as_predictions_do() -> None:
    metric = SemanticMetric(class_names=NAMES)
    for index in range(2):
        about = {"dataset": "d", "sample_id": f"s{index}", "path": f"im/s{index}.png"}
        metric.update_masks(PREDICTION[index].numpy(), TRUTH[index].numpy(), **about)
    expected = metric_of(PREDICTION, TRUTH)
    assert metric.compute() == expected.compute()
    assert (metric.confusion() == expected.confusion()).all()
    about = {"dataset": "d", "sample_id": "s", "path": "out/s.png"}
    with pytest.raises(UserError, match=r"out/s\.png: the predicted mask holds the label 9, but the 4 classes"):
        metric.update_masks(np.full((2, 2), 9, np.uint8), np.zeros((2, 2), np.uint8), **about)
    with pytest.raises(ValueError, match="shape"):
        metric.update_masks(np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.uint8), **about)


def test_batch_scores_are_those_of_the_batch_as_one() -> None:
    logits = logits_of(PREDICTION).requires_grad_()
    live = SemanticMetric.batch_scores({"logits": logits}, batch_of(TRUTH))
    assert not any(value.requires_grad or value.dim() for value in live.values())
    assert {name: value.item() for name, value in live.items()} == pytest.approx(metric_of(PREDICTION, TRUTH).compute())
    larger = TRUTH.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert SemanticMetric.batch_scores({"logits": logits}, batch_of(larger)) == live
    ignored = SemanticMetric.batch_scores({"logits": logits}, batch_of(torch.full_like(TRUTH, 255)))
    assert all(value.item() == 0 for value in ignored.values())


def test_names_and_abbreviations_of_the_field() -> None:
    assert SemanticMetric.resolve(["mIoU", "aAcc", "mean_accuracy", "MDICE", "miou"]) == [
        "miou", "accuracy", "mean_accuracy", "dice",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"'miuo' \(did you mean miou\?\)"):
        SemanticMetric(["miuo"], class_names=NAMES)


def test_two_models_are_compared_by_resampled_confusion() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (24, 8, 8), generator=generator).byte()
    noise = torch.randint(0, 4, truth.shape, generator=generator).byte()
    wrong = torch.rand(truth.shape, generator=generator)
    good, poor = (metric_of(torch.where(wrong < rate, noise, truth), truth) for rate in (0.1, 0.4))
    (difference,) = compare(good, poor.rows, good.rows, ["miou"], resamples=200)
    assert difference.verdict == "B better"
    assert difference.value == pytest.approx(good.compute()["miou"] - poor.compute()["miou"])
    assert difference.low < difference.value < difference.high


def test_a_sample_is_kept_in_a_few_kilobytes() -> None:
    labels = (torch.arange(64 * 64) % 12).view(1, 64, 64).byte()
    metric = SemanticMetric(class_names=[str(i) for i in range(150)])
    metric.update({"logits": logits_of(labels.roll(1, 2), 150)}, batch_of(labels))
    assert sum(curve.nbytes for curve in metric.rows[0].curves.values()) < 6000


def score_some(indices: list[int], batch_size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, 6, 6, generator=generator)
    truth = torch.randint(0, 5, (7, 24, 24), generator=generator).byte()
    truth[truth == 4] = 255
    metric = SemanticMetric(class_names=NAMES)
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        metric.update({"logits": logits[chosen]}, batch_of(truth[chosen], ids=[f"s{i}" for i in chosen]))
    metric.reduce()
    return {
        "scores": metric.compute(),
        "classes": metric.per_class(),
        "confusion": metric.confusion().tolist(),
        "ids": [row.sample_id for row in metric.rows],
    }


def score_on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    # As a distributed sampler pads: rank 1 scores sample 0 a second time.
    indices = [i % 7 for i in range(rank, 8, world_size)]
    torch.save(score_some(indices, batch_size=2), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    alone = score_some(list(range(7)), batch_size=3)
    assert alone["ids"] == [f"s{i}" for i in range(7)]
    mp.start_processes(score_on_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == alone

"""The streaming metric: formulas by hand, empties, original sizes, and the same figures on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from metrics import BinaryMetric

NAMES = {"jaccard", "dice", "iou", "bce_accuracy", "ssim", "mae"}


def batch_of(
    masks: Tensor,
    originals: list[Tensor] | None = None,
    ids: list[str] | None = None,
    datasets: list[str] | None = None,
) -> SimpleNamespace:
    ids = ids or [f"s{i}" for i in range(len(masks))]
    datasets = datasets or ["d"] * len(masks)
    samples = [SimpleNamespace(sample_id=i, path=f"im/{i}.png", dataset=d) for i, d in zip(ids, datasets, strict=True)]
    return SimpleNamespace(targets=SimpleNamespace(masks=masks, originals=originals or []), samples=samples)


def scores_of(probabilities: Tensor, masks: Tensor) -> dict[str, float]:
    metric = BinaryMetric()
    metric.update({"logits": torch.logit(probabilities)}, batch_of(masks))
    return metric.compute()


def test_scores_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.2], [0.6, 0.1]]).view(1, 1, 2, 2)
    alpha = torch.tensor([[1.0, 0.0], [0.4, 0.0]]).view(1, 1, 2, 2)
    scores = scores_of(probabilities, alpha)
    intersection, total = 0.9 + 0.24, 1.8 + 1.4
    entropy = -(math.log(0.9) + math.log(0.8) + 0.4 * math.log(0.6) + 0.6 * math.log(0.4) + math.log(0.9)) / 4
    expected = {
        "jaccard": intersection / (total - intersection),
        "dice": 2 * intersection / total,
        "iou": 1 / 2,
        "bce_accuracy": 1 - entropy / 16,
        "mae": (0.1 + 0.2 + 0.2 + 0.1) / 4,
    }
    assert set(scores) == NAMES == set(BinaryMetric().higher_is_better)
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-6), name


def test_perfect_wrong_and_empty() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:20, 8:20] = 1
    perfect = scores_of(mask, mask)
    assert perfect.pop("mae") == 0
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1.0), abs=1e-5)
    wrong = scores_of(1 - mask, mask)
    assert wrong["jaccard"] == wrong["dice"] == wrong["iou"] == 0
    assert wrong["bce_accuracy"] == pytest.approx(1 - math.log(1e7) / 16, abs=2e-2)
    assert wrong["mae"] == 1
    assert wrong["ssim"] < 0
    empty = torch.zeros_like(mask)
    nothing = scores_of(empty, empty)
    assert nothing["jaccard"] == nothing["dice"] == nothing["iou"] == 1
    assert scores_of(mask, empty)["jaccard"] == 0


def test_not_a_number_is_shown_and_sorts_as_the_worst() -> None:
    logits = torch.zeros(2, 1, 16, 16)
    logits[1] = math.nan
    metric = BinaryMetric()
    metric.update({"logits": logits}, batch_of(torch.ones(2, 1, 16, 16)))
    assert math.isnan(metric.compute()["jaccard"])
    assert [row.sample_id for row in metric.worst(2)] == ["s1", "s0"]
    assert [row.sample_id for row in metric.best(1)] == ["s0"]


def test_originals_are_scored_at_their_own_sizes() -> None:
    # A ramp is resized exactly by bilinear interpolation with aligned corners.
    ramp = torch.linspace(0.1, 0.9, 16).expand(2, 1, 16, 16)
    originals = [
        (torch.linspace(0.1, 0.9, width) * 255).round().to(torch.uint8).expand(height, width)
        for height, width in ((40, 55), (9, 7))
    ]
    metric = BinaryMetric()
    metric.update({"logits": torch.logit(ramp)}, batch_of(torch.zeros(2, 1, 16, 16), originals))
    assert [row.scores["mae"] < 0.5 / 255 + 1e-6 for row in metric.rows] == [True, True]


def test_batch_scores_are_the_means_of_the_rows() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 1, 24, 24), torch.rand(3, 1, 24, 24)
    metric = BinaryMetric()
    metric.update({"logits": logits}, batch_of(masks))
    live = BinaryMetric.batch_scores({"logits": logits.requires_grad_()}, batch_of(masks))
    assert not any(value.requires_grad for value in live.values())
    assert {name: value.item() for name, value in live.items()} == pytest.approx(metric.compute(), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = BinaryMetric.batch_scores({"logits": logits}, batch_of(masks))
    assert all(torch.equal(under_autocast[name], live[name]) for name in NAMES)


def test_rows_ranking_and_datasets() -> None:
    masks = torch.ones(4, 1, 16, 16)
    probabilities = torch.tensor([0.3, 0.9, 0.1, 0.6]).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    metric = BinaryMetric()
    metric.update({"logits": torch.logit(probabilities)}, batch_of(masks, datasets=["b", "a", "a", "b"]))
    assert [row.sample_id for row in metric.worst(2)] == ["s2", "s0"]
    assert [row.sample_id for row in metric.best(2)] == ["s1", "s3"]
    assert metric.rows[0].path == "im/s0.png"
    per_dataset = metric.per_dataset()
    assert per_dataset["a"]["jaccard"] == pytest.approx(0.5, abs=1e-6)
    assert per_dataset["b"]["jaccard"] == pytest.approx(0.45, abs=1e-6)
    assert metric.higher_is_better[metric.primary]
    assert not metric.higher_is_better["mae"]
    assert [row.sample_id for row in metric.worst(2, "mae")] == ["s2", "s0"]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BinaryMetric().compute()


def seven_samples() -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 1, 24, 24, generator=generator)
    return logits, torch.rand(7, 1, 24, 24, generator=generator), [f"s{i}" for i in range(7)]


def score_some(indices: list[int], batch_size: int) -> dict[str, Any]:
    logits, masks, ids = seven_samples()
    metric = BinaryMetric()
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        metric.update({"logits": logits[chosen]}, batch_of(masks[chosen], ids=[ids[i] for i in chosen]))
    metric.reduce()
    return {"scores": metric.compute(), "ids": [row.sample_id for row in metric.rows]}


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
    mp.spawn(score_on_rank, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == alone

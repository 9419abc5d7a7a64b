"""The streaming metric: formulas by hand, empties, original sizes, names, the same figures on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from errors import UserError
from metrics import BinaryMetric, Row
from metrics.pair import Pair
from metrics.saliency import s_measure, s_measure_birefnet, weighted_f
from metrics.scores import GROUPS, SCORES, field_scores
from metrics.skeleton import skeleton
from samples import SampleInfo
from tasks.binary import binary_results

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
    metric = BinaryMetric(["standard", "conn"])
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
    mp.start_processes(score_on_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == alone
    assert score_some([4, 2, 6, 0, 5, 1, 3], batch_size=7) == alone


# ---------------------------------------------------------------- scores of the field


def odd_masks(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, truth) of odd sizes: blobs and lines, shifted, blurred, noisy, cut and inverted."""
    generator = np.random.default_rng(seed)
    pairs = []
    for index in range(count):
        height, width = (int(side) for side in generator.integers(5, 90, 2))
        field = cv2.resize(generator.random((6, 6), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        truth = ((field > generator.uniform(0.2, 0.8)) * 255).astype(np.uint8)
        if index % 3 == 0:
            ends = generator.integers(0, 90, (6, 1, 2), dtype=np.int32)
            cv2.polylines(truth, [ends], False, int(generator.integers(100, 256)), int(generator.integers(1, 6)))
        prediction = cv2.GaussianBlur(
            np.roll(truth, generator.integers(-3, 4, 2), (0, 1)), (0, 0), 0.1 + 2 * field[0, 0] ** 2
        )
        if index % 4 == 1:
            prediction = np.clip(0.5 * prediction + generator.normal(60, 30, truth.shape), 0, 255).astype(np.uint8)
        if index % 5 == 2:
            prediction[: height // 2] = 0
        if index % 7 == 3:
            prediction = 255 - prediction
        pairs.append((prediction, truth))
    return pairs


def test_the_field_is_scored_on_the_mask_that_inference_writes() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(2, 1, 12, 16)
    originals = [(torch.rand(33, 41) * 255).byte(), (torch.rand(20, 17) * 255).byte()]
    metric = BinaryMetric(["all"])
    metric.update({"logits": logits}, batch_of(torch.zeros(2, 1, 12, 16), originals))
    assert [set(row.scores) >= NAMES for row in metric.rows] == [True, True]  # at once
    metric.reduce()
    written = binary_results({"logits": logits}, [SampleInfo("", "", "", size) for size in ((33, 41), (20, 17))])
    for row, mask, alpha in zip(metric.rows, written, originals, strict=True):
        scores, curves = field_scores(mask, alpha.numpy(), SCORES)
        # Whether one thread or many, and in which order they end, changes no bit.
        np.testing.assert_equal({name: row.scores[name] for name in SCORES}, scores)
        np.testing.assert_equal(row.curves, curves)


def test_finished_masks_have_the_scores_of_a_model_that_would_give_them() -> None:
    finished, model = BinaryMetric(["standard"]), BinaryMetric(["standard"])
    for index, (prediction, truth) in enumerate(odd_masks(6)):
        finished.update_masks(prediction, truth, dataset="d", sample_id=f"s{index}", path=f"im/s{index}.png")
        # A touch above the grey level, so that cutting off v · 255 gives it back.
        logits = torch.logit((torch.from_numpy(prediction).double() + 1e-3).clamp(max=255) / 255)[None, None]
        target = torch.from_numpy(truth)
        batch = batch_of(target[None, None].float() / 255, [target], ids=[f"s{index}"])
        model.update({"logits": logits.float()}, batch)
    finished.reduce()
    model.reduce()
    expected, scores = model.compute(), finished.compute()
    assert expected.pop("bce_accuracy") > scores.pop("bce_accuracy")  # which that touch keeps from its limit of 1e-7
    assert scores == pytest.approx(expected, abs=1e-5)
    assert finished.rows[0].path == "im/s0.png"
    with pytest.raises(ValueError, match="shape"):
        finished.update_masks(np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.uint8), dataset="", sample_id="", path="")


def test_names_groups_and_abbreviations() -> None:
    usual = ["Sm", "wFm", "maxFm", "Fmax", "meanFm", "adpFm", "maxEm", "meanEm", "Em", "adpEm"]
    usual += ["MAE", "MSE", "hce", "BIoU", "mBA"]
    assert BinaryMetric.resolve(usual) == BinaryMetric.resolve(["standard"]) == GROUPS["standard"]
    assert BinaryMetric.resolve(["SAD", "f1_max", "IoU-adp", "HCE_BiRefNet", "jaccard"]) == [
        "sad", "max_dice", "adaptive_iou", "hce_birefnet", "jaccard"]  # fmt: skip
    assert BinaryMetric.resolve(["Matting", "sad"]) == GROUPS["matting"]
    assert BinaryMetric.resolve(list(SCORES)) == BinaryMetric.resolve(["all"]) == list(SCORES)
    metric = BinaryMetric(["maxF", "jaccard", "HCE"])
    assert list(metric.higher_is_better) == ["jaccard", "dice", "iou", "bce_accuracy", "ssim", "mae", "max_f", "hce"]
    assert (metric.higher_is_better["max_f"], metric.higher_is_better["hce"]) == (True, False)
    with pytest.raises(UserError, match=r"unknown metric 's_mesure' \(did you mean s_measure\?\)"):
        BinaryMetric(["s_mesure"])


def test_a_sample_without_a_score_is_left_out_and_counted() -> None:
    metric = BinaryMetric(["mba", "boundary_iou", "max_f"])
    square = np.zeros((40, 40), np.uint8)
    square[10:30, 10:30] = 255
    empty = np.zeros_like(square)
    for index, (prediction, truth) in enumerate([(square, square), (square, empty), (empty, empty)]):
        metric.update_masks(prediction, truth, dataset="d", sample_id=str(index), path="")
    metric.reduce()
    assert metric.undefined() == {"mba": 2, "boundary_iou": 1}
    means = metric.compute()
    assert (means["mba"], means["boundary_iou"]) == (1, 0.5)
    assert math.isnan(metric.means(metric.rows[1:])["mba"])
    assert [row.sample_id for row in metric.worst(2, "mba")] == ["1", "2"]
    assert [row.sample_id for row in metric.best(1, "max_f")] == ["0"]


def test_curves_of_samples_are_averaged_before_the_maximum() -> None:
    metric = BinaryMetric(["max_f"])
    metric.rows = [Row("d", str(i), "", dict.fromkeys(metric.higher_is_better, 1.0), {"f": curve})
                   for i, curve in enumerate((np.array([0.0, 1.0]), np.array([0.5, 0.0])))]  # fmt: skip
    assert metric.compute()["max_f"] == 0.5


def test_a_map_that_is_not_a_number_has_no_field_scores() -> None:
    metric = BinaryMetric(["standard"])
    metric.update({"logits": torch.full((1, 1, 8, 8), math.nan)}, batch_of(torch.ones(1, 1, 8, 8)))
    metric.reduce()
    means = metric.compute()
    assert all(math.isnan(means[name]) for name in ["jaccard", *GROUPS["standard"]])


def test_the_skeleton_is_that_of_scikit_image() -> None:
    morphology = pytest.importorskip("skimage.morphology")
    generator = np.random.default_rng(0)
    for height, width, density in ((1, 1, 1), (3, 200, 0.9), (64, 64, 0.5), (70, 129, 0.8), (65, 63, 0.97)):
        noise = (generator.random((height, width)) < density).astype(np.uint8)
        assert np.array_equal(skeleton(noise, where=noise), morphology.skeletonize(noise > 0))
    for _, truth in odd_masks(40, seed=1):
        mask = (truth > 128).astype(np.uint8)
        where = mask & (generator.random(mask.shape) < 0.1)
        full = morphology.skeletonize(mask > 0)
        assert np.array_equal(skeleton(mask, where=mask), full)
        assert np.array_equal(skeleton(mask, where=where), full & (where > 0))


def test_odd_masks_score_as_in_pysodmetrics() -> None:
    reference = pytest.importorskip("py_sod_metrics")
    for prediction, truth in odd_masks(60, seed=2):
        scores, _ = field_scores(prediction, truth, SCORES)
        for name, evaluator, read in (
            ("s_measure", "Smeasure", lambda r: r["sm"]),
            ("weighted_f", "WeightedFmeasure", lambda r: r["wfm"]),
            ("adaptive_f", "Fmeasure", lambda r: r["fm"]["adp"]),
            ("max_e", "Emeasure", lambda r: r["em"]["curve"].max()),
            ("adaptive_e", "Emeasure", lambda r: r["em"]["adp"]),
            ("normalized_mae", "MAE", lambda r: r["mae"]),
            ("hce", "HumanCorrectionEffortMeasure", lambda r: r["hce"]),
        ):
            judge = getattr(reference, evaluator)()
            judge.step(prediction, truth)
            assert scores[name] == pytest.approx(read(judge.get_results()), abs=1e-7, nan_ok=True), name


def test_the_two_s_measures_differ_where_a_quadrant_is_empty() -> None:
    truth = np.zeros((20, 30), np.uint8)
    truth[5:9, -1] = 255
    pair = Pair(truth, truth)
    assert math.isnan(s_measure(pair))
    assert s_measure_birefnet(pair) == 0


def test_weighted_f_by_hand() -> None:
    # One foreground pixel, missed: the kernel spreads its error of 1 over itself and the 48 pixels that take it over.
    truth = np.zeros((15, 15), np.uint8)
    truth[7, 7] = 255
    assert weighted_f(Pair(np.zeros_like(truth), truth)) == pytest.approx(0, abs=1e-12)
    assert weighted_f(Pair(truth, truth)) == pytest.approx(1, abs=1e-12)
    one_off = truth.copy()
    one_off[7, 9] = 255
    false = 2 - 0.5 ** (2 / 5)
    assert weighted_f(Pair(one_off, truth)) == pytest.approx(2 / (1 + false) / (1 + 1 / (1 + false)), abs=1e-7)


def test_matting_scores_by_hand() -> None:
    alpha = np.full((50, 60), 255, np.uint8)
    alpha[:, 30:] = 51
    prediction = alpha.copy()
    prediction[:, 30:] = 102
    scores, _ = field_scores(prediction, alpha, GROUPS["matting"])
    assert scores["sad"] == pytest.approx(1500 * 0.2 / 1000)
    assert scores["mad"] == pytest.approx(0.1)
    assert scores["matting_mse"] == pytest.approx(0.02)
    assert scores["grad"] == pytest.approx(0, abs=1e-9)  # both are stretched to [0, 1]
    assert scores["conn"] == pytest.approx(1500 * 0.2 / 1000)  # connected to 0.2; above it by 0 and by 0.2
    # A step of height 1: Σ over rows of the squared length of one slice of the Gaussian derivative.
    flat, _ = field_scores(np.full_like(alpha, 7), alpha, ["grad"])
    x = np.arange(-4, 5)
    smooth = np.exp(-(x**2) / (2 * 1.4**2))
    slope = x * smooth
    slope /= np.sqrt((slope**2).sum() * (smooth**2).sum())
    steps = np.cumsum(slope) * smooth.sum()
    assert flat["grad"] == pytest.approx(50 * (steps**2).sum() / 1000, rel=1e-6)

"""J and F of followed objects: the official figures, which objects and frames count, any number of ranks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from compare import compare
from errors import UserError
from metrics import VideoMetric
from metrics.video import label_map, region_and_contour, score_clip, scored_frames
from samples import VideoTarget
from tests.conftest import SHARED, needs_shared

GOLDEN = SHARED / "golden"


class Labels:
    """Masklets from label maps (T, H, W), of the objects 1 to n."""

    def __init__(self, labels: np.ndarray, count: int = 0, annotated: Sequence[bool] | None = None):
        self.labels = labels
        self.object_ids: Sequence[int] = list(range(1, (count or int(labels.max())) + 1))
        self.annotated: Sequence[bool] = [True] * len(labels) if annotated is None else list(annotated)

    def visible(self, frame: int) -> list[int]:
        assert self.annotated[frame]
        return [i for i, number in enumerate(self.object_ids) if (self.labels[frame] == number).any()]

    def masks(self, frame: int, objects: Sequence[int]) -> np.ndarray:
        assert self.annotated[frame]
        return self.labels[frame] == np.array([self.object_ids[i] for i in objects], np.uint8).reshape(-1, 1, 1)


def score(metric: VideoMetric, found: np.ndarray, truth: Labels, name: str = "clip", dataset: str = "d") -> None:
    metric.update_labels(found.__getitem__, truth, dataset=dataset, sample_id=name, path=f"clips/{name}")


def scored(found: np.ndarray, truth: Labels, names: Sequence[str] = (), **options: Any) -> VideoMetric:
    metric = VideoMetric(names, **options)
    score(metric, found, truth)
    metric.reduce()
    return metric


# ---------------------------------------------------------------- the official evaluators


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = GOLDEN / "metrics"
    return json.loads((folder / "expected_video.json").read_text()), dict(np.load(folder / "inputs_video.npz"))


def clips_of(arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, Labels]]:
    names = sorted({key.split("/")[0] for key in arrays})
    return {name: (arrays[f"{name}/pred"], Labels(arrays[f"{name}/gt"])) for name in names}


@needs_shared
@pytest.mark.parametrize("skip_ends", [True, False])
def test_the_evaluation_of_sa_v(golden: Any, skip_ends: bool) -> None:
    expected, arrays = golden
    metric = VideoMetric(skip_ends=skip_ends)
    for name, (found, truth) in clips_of(arrays).items():
        score(metric, found, truth, name)
    metric.reduce()
    for layout in ("davis", "sav"):
        official = expected[f"{layout}_{'skip' if skip_ends else 'all'}_frames"]
        figures = metric.compute()
        assert [figures[name] * 100 for name in ("j_and_f", "j", "f")] == pytest.approx(
            [official[name] for name in ("J&F", "J", "F")], abs=1e-9
        )
        objects = {row["name"]: row for row in metric.per_class()}
        for clip, values in official["per_object"].items():
            for number, value in values["J"].items():
                assert objects[f"{clip}/{int(number)}"]["j"] * 100 == pytest.approx(value, abs=1e-9)
                assert objects[f"{clip}/{int(number)}"]["f"] * 100 == pytest.approx(values["F"][number], abs=1e-9)


@needs_shared
def test_single_frames(golden: Any) -> None:
    expected, arrays = golden
    for key, official in expected["per_frame_binary"].items():
        clip, number = key.split("/")
        pairs = [
            region_and_contour(found == int(number), there == int(number))
            for found, there in zip(arrays[f"{clip}/pred"], arrays[f"{clip}/gt"], strict=True)
        ]
        expected_pairs = zip(official["J"], official["F"], strict=True)
        np.testing.assert_allclose(pairs, list(expected_pairs), rtol=0, atol=1e-12)


@needs_shared
def test_the_evaluation_of_davis(golden: Any) -> None:
    expected, arrays = golden
    names = ["j", "f", "j_recall", "j_decay", "f_recall", "f_decay"]
    official_names = ["J_mean", "F_mean", "J_recall", "J_decay", "F_recall", "F_decay"]
    metric = VideoMetric(names, convention="davis")
    clips = clips_of(arrays)
    for name, (found, truth) in clips.items():
        score(metric, found, truth, name)
    metric.reduce()
    objects = {row["name"]: row for row in metric.per_class()}
    counted = []
    for key, official in expected["davis2017_official"]["per_object"].items():
        clip, _, number = key.rpartition("_")
        values = [objects[f"{clip}/{number}"][name] for name in names]
        if official["in_first_frame"]:
            counted.append([official[name] for name in official_names])
            np.testing.assert_allclose(values, counted[-1], rtol=0, atol=1e-12)
        else:
            assert all(map(math.isnan, values))
    figures = metric.compute()
    np.testing.assert_allclose([figures[name] for name in names], np.mean(counted, 0), rtol=0, atol=1e-12)


@needs_shared
def test_the_figures_of_sam2() -> None:
    sys.path.insert(0, str(GOLDEN))
    import golden as formulas

    for case in json.loads((GOLDEN / "sam2" / "expected_jf.json").read_text()):
        size = case["height"], case["width"]
        there, found = np.zeros((2, case["num_frames"], *size), np.uint8)
        for t in range(case["num_frames"]):
            for number in range(1, case["num_objects"] + 1):
                name = f"{case['case']}/gt/{number}/{t}"
                mask = partial(formulas.make_mask, name, (1, 1, *size))
                if [number, t] not in case["absent_gt_[obj,frame]"]:
                    there[t][mask(0.6)[0, 0].numpy() > 0] = number
                if [number, t] not in case["absent_pred_[obj,frame]"]:
                    found[t][np.roll(mask(0.45)[0, 0].numpy() > 0, 2 * number, axis=1)] = number
        metric = scored(found, Labels(there, case["num_objects"]))
        figures = {name: value * 100 for name, value in metric.compute().items()}
        expected = {"j_and_f": case["J&F"], "j": case["J"], "f": case["F"]}
        assert figures == pytest.approx(expected, abs=1e-6)


def official_contour(mask: np.ndarray) -> np.ndarray:
    """What differs from the neighbours to the right, below and between; the image goes on beyond its last row."""
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != wide[:-1, 1:]) | (mask != wide[1:, :-1]) | (mask != wide[1:, 1:])


def written_out(found: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    """J and F as they are defined, on the whole picture."""
    union = (found | there).sum()
    region = (found & there).sum() / union if union else 1.0
    radius = int(np.ceil(0.008 * np.linalg.norm(found.shape)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (y**2 + x**2 <= radius**2).astype(np.uint8)
    contours = [official_contour(mask) for mask in (found, there)]
    if not all(each.any() for each in contours):
        return region, float(not any(each.any() for each in contours))
    wide = [cv2.dilate(each.astype(np.uint8), disk) > 0 for each in contours]
    precision = (contours[0] & wide[1]).sum() / contours[0].sum()
    recall = (contours[1] & wide[0]).sum() / contours[1].sum()
    return region, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_masks_of_any_shape_at_any_edge() -> None:
    generator = np.random.default_rng(0)
    for number in range(150):
        size = tuple(generator.integers(1, 400 if number % 10 == 0 else 60, 2))
        coarse = generator.random((2, *generator.integers(2, 9, 2)), np.float32)
        fields = [cv2.resize(each, size[::-1], interpolation=cv2.INTER_CUBIC) for each in coarse]
        fields[1] += generator.choice([0, 0.1, 1]) * (fields[0] - fields[1])
        noise = generator.random((2, *size)) < generator.choice([0, 0.3])
        found, there = (field > limit for field, limit in zip(fields, generator.choice([0, 0.5, 2], 2), strict=True))
        found ^= noise[0]
        assert region_and_contour(found, there) == pytest.approx(written_out(found, there), abs=1e-12)
    full = np.ones((20, 30), bool)
    assert region_and_contour(full, full) == (1.0, 1.0)
    assert region_and_contour(~full, ~full) == (1.0, 1.0)
    assert region_and_contour(full, ~full) == (0.0, 1.0)  # the whole picture has no contour either


# ---------------------------------------------------------------- which frames and objects count


def squares(*columns: Sequence[int | None], size: tuple[int, int] = (30, 60)) -> np.ndarray:
    """Label maps of frames: object i + 1 is a square at the given column of row 3 + 10·i, or not there."""
    labels = np.zeros((len(columns), *size), np.uint8)
    for frame, places in zip(labels, columns, strict=True):
        for number, left in enumerate(places):
            if left is not None:
                frame[3 + 10 * number : 9 + 10 * number, left : left + 6] = number + 1
    return labels


def test_the_ends_are_left_out_as_far_as_frames_remain() -> None:
    assert [scored_frames([True] * n) for n in (1, 2, 3, 5)] == [[0], [1], [1], [1, 2, 3]]
    assert scored_frames([False, True, False, True, True, True]) == [3, 4]
    assert scored_frames([True] * 3, skip_ends=False) == [0, 1, 2]
    assert scored_frames([False]) == []


def test_an_object_counts_from_where_it_is_there_or_found() -> None:
    there = squares([5, None], [5, None], [5, None], [5, 20], [5, 20], [5, 20])
    # The second object is found one frame early, the first one is lost in one frame.
    found = squares([5, None], [5, None], [None, 20], [5, 20], [5, 20], [5, 20])
    sav = scored(found, Labels(there)).rows[0].curves
    np.testing.assert_array_equal(sav["j"], [3 / 4, 2 / 3])
    davis = scored(found, Labels(there), convention="davis").rows[0].curves
    np.testing.assert_array_equal(davis["j"], [3 / 4, np.nan])


def test_an_object_that_is_nowhere_to_be_scored_has_no_score() -> None:
    there = squares([5, 20], [5, None], [5, None], [5, None])
    for found in (there, squares([5, 20], [5, 20], [5, 20], [5, 20])):
        metric = scored(found, Labels(there))
        np.testing.assert_array_equal(metric.rows[0].curves["j"], [1, np.nan])
        assert metric.compute() == {"j_and_f": 1.0, "j": 1.0, "f": 1.0}
    davis = scored(there, Labels(there), convention="davis")
    np.testing.assert_array_equal(davis.rows[0].curves["j"], [1, 1])
    nothing = scored(there, Labels(np.zeros_like(there), 2))
    assert all(map(math.isnan, nothing.compute().values()))
    assert nothing.undefined() == {"f": 1, "j": 1, "j_and_f": 1}
    unknown = scored(there, Labels(there, annotated=[False] * 4), convention="davis")
    assert all(map(math.isnan, unknown.rows[0].scores.values()))


def test_only_annotated_frames_are_asked_for() -> None:
    there = squares(*[[5]] * 7)
    asked = []

    def labels_of(frame: int) -> np.ndarray:
        asked.append(frame)
        return there[frame]

    score_clip(labels_of, Labels(there, annotated=[t % 2 == 0 for t in range(7)]))
    assert asked == [2, 4]


def test_objects_weigh_the_same_whatever_clip_they_are_in() -> None:
    metric = VideoMetric()
    score(metric, squares(*[[5, 20]] * 3), Labels(squares(*[[5, 20]] * 3)), "two", "a")
    score(metric, squares(*[[5]] * 3), Labels(squares(*[[20]] * 3)), "one", "b")
    metric.reduce()
    assert metric.compute()["j"] == pytest.approx(2 / 3)
    assert {name: each["j"] for name, each in metric.per_dataset().items()} == {"a": 1, "b": 0}
    assert [(row["name"], row["j"]) for row in metric.per_class()] == [("two/1", 1), ("two/2", 1), ("one/1", 0)]
    assert [row.sample_id for row in metric.worst(1)] == ["one"]


def test_names() -> None:
    assert VideoMetric.resolve(["J&F", "j", "F decay", "f_decay"]) == ["j_and_f", "j", "f_decay"]
    metric = VideoMetric(["J decay", "F recall"])
    assert metric.higher_is_better == {"j_and_f": True, "j": True, "f": True, "j_decay": False, "f_recall": True}
    with pytest.raises(UserError, match=r"'j_recal' \(did you mean j_recall\?\)"):
        VideoMetric(["j_recal"])
    with pytest.raises(ValueError, match="convention 'mose'"):
        VideoMetric(convention="mose")


# ---------------------------------------------------------------- predictions


def logits_of(labels: np.ndarray, count: int) -> Tensor:
    """(n, T, H, W) mask logits of the labels."""
    return torch.from_numpy(np.where(labels == np.arange(1, count + 1).reshape(-1, 1, 1, 1), 6, -6)).float()


def batch_of(truths: Sequence[Labels], ids: Sequence[str], size: tuple[int, int]) -> Any:
    samples = [SimpleNamespace(sample_id=i, path=f"clips/{i}", dataset="d", size=size) for i in ids]
    return SimpleNamespace(targets=VideoTarget(torch.zeros(0, 0, 0, 0), torch.zeros(0), list(truths)), samples=samples)


def test_labels_are_those_of_the_largest_positive_logit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 9) - 0.5
    logits[1] = -1024
    large = F.interpolate(logits[None], (31, 40), mode="bilinear")[0]
    expected = torch.cat([torch.zeros(1, 31, 40), large]).argmax(0)
    np.testing.assert_array_equal(label_map(logits, (31, 40)), expected)
    assert label_map(torch.full((300, 2, 2), -1.0), (4, 4)).dtype == np.uint16


def test_predictions_are_scored_at_the_size_of_the_clip() -> None:
    there = squares(*[[5, 20]] * 5)
    truth = Labels(there.repeat(2, 1).repeat(2, 2))
    logits = logits_of(np.roll(there, 2, 2), 2)
    metric = VideoMetric()
    metric.update({"logits": [logits, logits]}, batch_of([truth, truth], ["a", "b"], (60, 120)))
    large = [label_map(logits[:, t], (60, 120)) for t in range(5)]
    expected = scored(np.stack(large), truth)
    assert [row.scores for row in metric.rows] == [expected.rows[0].scores] * 2
    assert 0.4 < metric.compute()["j"] < 0.6


def test_batch_scores_of_a_training_step() -> None:
    truth = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
    truth[0, :, :8] = True  # the second object is not there
    right, wrong = torch.full((2, 1, 4, 4), -1.0), torch.full((2, 1, 4, 4), -1.0)
    right[:, :, :2], wrong[:, :, 1:3] = 1.0, 1.0
    outputs = {
        "frames": [0, 1, 1],
        "candidates": [torch.cat([wrong, right], 1), wrong, right.requires_grad_()],
        "ious": [torch.tensor([[0.1, 0.9], [0.1, 0.9]]), torch.zeros(2, 1), torch.zeros(2, 1)],
        "scores": [torch.tensor([[3.0], [-3.0]]), torch.tensor([[3.0], [3.0]]), torch.tensor([[-3.0], [-3.0]])],
    }
    batch = SimpleNamespace(targets=VideoTarget(truth, torch.zeros(2)))
    live = VideoMetric.batch_scores(outputs, batch)
    assert not any(value.requires_grad or value.dim() for value in live.values())
    assert live["mask_iou"].item() == pytest.approx((1 + 1 / 3 + 1) / 3)
    assert live["object_accuracy"].item() == pytest.approx(4 / 6)
    batch.targets.masks = torch.zeros_like(truth)
    assert VideoMetric.batch_scores(outputs, batch)["mask_iou"] == 0


# ---------------------------------------------------------------- many clips


def drawn_clip(seed: int, spread: int) -> tuple[np.ndarray, Labels]:
    generator = np.random.default_rng(seed)
    columns = generator.integers(5, 40, (5, int(generator.integers(1, 4))))
    moved = columns + generator.integers(-spread, spread + 1, columns.shape)
    return squares(*moved.tolist()), Labels(squares(*columns.tolist()))


def test_two_models_are_compared_by_resampled_clips() -> None:
    good, poor = (VideoMetric() for _ in range(2))
    for metric, spread in ((good, 1), (poor, 4)):
        for seed in range(12):
            score(metric, *drawn_clip(seed, spread), f"{seed:02d}")
        metric.reduce()
    (difference,) = compare(good, poor.rows, good.rows, ["j_and_f"], resamples=200)
    assert difference.verdict == "B better"
    assert difference.value == pytest.approx(good.compute()["j_and_f"] - poor.compute()["j_and_f"])
    assert difference.low < difference.value < difference.high
    weights = np.zeros((1, 12))
    weights[0, :2] = 5, 7
    (resampled,) = good.resampled(["j"], good.rows, weights)["j"]
    assert resampled == pytest.approx(good.mean("j", good.rows[:1] * 5 + good.rows[1:2] * 7))


def score_some(indices: Sequence[int], batch_size: int) -> dict[str, Any]:
    metric = VideoMetric(["j_decay"])
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        found, truths = zip(*(drawn_clip(index, 4) for index in chosen), strict=True)
        logits = [logits_of(labels, len(truth.object_ids)) for labels, truth in zip(found, truths, strict=True)]
        metric.update({"logits": logits}, batch_of(truths, [f"s{index}" for index in chosen], (30, 60)))
    metric.reduce()
    ids = [row.sample_id for row in metric.rows]
    return {"scores": metric.compute(), "objects": metric.per_class(), "ids": ids}


def score_on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    # As a distributed sampler pads: rank 1 scores clip 0 a second time.
    torch.save(score_some([i % 5 for i in range(rank, 6, world_size)], batch_size=2), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    alone = score_some(range(5), batch_size=3)
    assert alone["ids"] == [f"s{i}" for i in range(5)]
    mp.start_processes(score_on_rank, args=(2, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == alone

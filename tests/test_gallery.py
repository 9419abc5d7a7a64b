"""Which samples a validation shows, on one rank and on several, and what their pictures hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from gallery import SIDE, Gallery, picture_size
from metrics import Row
from readers import BinaryFolders
from samples import Batch, SampleInfo
from tasks.base import Scored
from tasks.binary import binary_panels, binary_results
from tests.helpers import draw_set
from utils import World


class Score:
    """As much of a metric as the gallery asks for."""

    def __init__(self, higher_is_better: bool = True) -> None:
        self.primary, self.higher_is_better = "score", {"score": higher_is_better}


def look_at(gallery: Gallery, reader: BinaryFolders, indices: list[int], scores: list[float]) -> None:
    """One batch of samples with given scores; each predicted mask is as bright as its index."""
    samples, rows = [], []
    for index, score in zip(indices, scores, strict=True):
        sample = reader.read(index)
        height, width = sample.frames[0].shape[:2]
        samples.append(SampleInfo(sample.sample_id, sample.path, sample.dataset, (height, width)))
        rows.append(Row(sample.dataset, sample.sample_id, sample.path, {"score": score}))
    logits = torch.tensor(indices).float().add(1).div(20).logit().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    gallery.update(rows, {"logits": logits}, Batch(torch.zeros(len(indices), 3, 8, 8), None, samples))


def panels(sample: Any, image: np.ndarray, result: Any) -> dict[str, np.ndarray]:
    return binary_panels(Scored(sample, image, result, [], {}))


SCORES = [0.5, 0.1, 0.9, math.nan, 0.3, 0.9, 0.7]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> BinaryFolders:
    return BinaryFolders(str(draw_set(tmp_path_factory.mktemp("data") / "val", len(SCORES))))


def names(pictures: list[Any]) -> list[str]:
    return [picture.sample_id.rpartition("/")[2] for picture in pictures]


def test_the_best_and_the_worst_are_kept_in_order(reader: BinaryFolders) -> None:
    gallery = Gallery(binary_results, Score(), count=3)
    for start in (0, 3, 6):
        indices = list(range(start, min(start + 3, 7)))
        look_at(gallery, reader, indices, [SCORES[i] for i in indices])
    best, worst = gallery.collect(World.alone(), reader, panels)
    assert names(best) == ["02", "05", "06"]  # equal scores by name
    assert names(worst) == ["03", "01", "04"]  # what is not a number is worse than all
    lower_is_better = Gallery(binary_results, Score(False), count=2)
    look_at(lower_is_better, reader, [0, 1, 2], SCORES[:3])
    best, worst = lower_is_better.collect(World.alone(), reader, panels)
    assert (names(best), names(worst)) == (["01", "00"], ["02", "00"])


def test_pictures_are_image_truth_prediction_and_error(reader: BinaryFolders) -> None:
    gallery = Gallery(binary_results, Score())
    look_at(gallery, reader, [4], [0.5])
    (picture,), _ = gallery.collect(World.alone(), reader, panels)
    sample = reader.read(4)
    assert list(picture.panels) == ["image", "truth", "prediction", "error"]
    assert {panel.shape for panel in picture.panels.values()} == {sample.frames[0].shape}
    assert {panel.dtype for panel in picture.panels.values()} == {np.dtype(np.uint8)}
    assert np.array_equal(picture.panels["image"], sample.frames[0])
    assert np.array_equal(picture.panels["truth"][..., 0], sample.masks)
    assert (picture.panels["prediction"] == int(0.25 * 255)).all()
    missed, found = sample.masks == 255, sample.masks == 0
    red, blue = picture.panels["error"][..., 0].astype(int), picture.panels["error"][..., 2].astype(int)
    assert (blue - red)[missed].mean() > 80
    assert (red - blue)[found].mean() > 30


def test_a_picture_is_never_larger_than_its_place() -> None:
    assert picture_size((100, 50)) == (100, 50)
    assert picture_size((3000, 2000)) == (SIDE, 256)
    assert picture_size((3, 30000)) == (1, SIDE)


def test_a_large_image_is_shown_small(tmp_path: Path) -> None:
    for kind, pixels in (("im", np.zeros((600, 900, 3), np.uint8)), ("gt", np.full((600, 900), 255, np.uint8))):
        (tmp_path / "val" / kind).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "val" / kind / "a.png")
    reader = BinaryFolders(str(tmp_path / "val"))
    gallery = Gallery(binary_results, Score())
    look_at(gallery, reader, [0], [0.5])
    (picture,), _ = gallery.collect(World.alone(), reader, panels)
    assert {panel.shape for panel in picture.panels.values()} == {(256, SIDE, 3)}


def collect_on_rank(rank: int, folder: str, root: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    reader = BinaryFolders(root)
    gallery = Gallery(binary_results, Score(), count=3)
    mine = list(range(rank, 7, 2))
    look_at(gallery, reader, mine, [SCORES[i] for i in mine])
    best, worst = gallery.collect(World(rank, rank, 2, torch.device("cpu")), reader, panels)
    torch.save([names(best), names(worst)], f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_show_what_one_shows(tmp_path: Path, reader: BinaryFolders) -> None:
    root = str(Path(reader.read(0).path).parent.parent)
    mp.start_processes(collect_on_rank, args=(str(tmp_path), root), nprocs=2, start_method="fork")
    assert torch.load(tmp_path / "rank0.pt") == [["02", "05", "06"], ["03", "01", "04"]]
    assert torch.load(tmp_path / "rank1.pt") == [[], []]

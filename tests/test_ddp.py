"""Several ranks: the same metrics, the same gradients, one decision about a bad step, and an end that all share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
from loss import BinaryCriterion
from models.base import Model
from models.sam2.model import PARTS
from samples import Batch, BinaryTarget, SampleInfo
from tests.helpers import (
    RFDETR,
    SAM2,
    SEGFORMER,
    TOY,
    Zygote,
    difference,
    draw_clip_set,
    draw_label_set,
    draw_object_set,
    draw_set,
    flags_for,
    records,
    zygote_in,
)
from tests.toy import Toy

STEADY = [
    *TOY, "--model.dropout", "0", "--model.drop_path", "0", "--train.freeze_bn", "--optimizer.name", "sgd",
    "--optimizer.momentum", "0", "--logging.log_frequency", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 12)
    draw_set(folder / "val", 5, seed=1)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    draw_clip_set(folder / "train", 4)
    draw_clip_set(folder / "val", 1, frames=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.mark.parametrize("family", ["toy", "segformer", "rfdetr", "sam2"])
def test_an_odd_number_of_samples_scores_the_same_on_one_two_and_three_ranks(
    family: str, data: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """At rate zero all worlds keep the same weights; five samples in batches of two leave ranks without any."""
    found = []
    model = STEADY
    if family == "segformer":
        data, model = tmp_path, [*SEGFORMER, "--model.drop_path", "0", "--model.dropout", "0"]
        draw_label_set(data / "train", 6)
        draw_label_set(data / "val", 5, seed=1)
    if family == "rfdetr":
        data, model = tmp_path, RFDETR
        draw_object_set(data / "train", 6)
        draw_object_set(data / "val", 5, seed=1)
    if family == "sam2":
        data, model = tmp_path, SAM2
        draw_clip_set(data / "train", 6)
        draw_clip_set(data / "val", 5, frames=3, seed=1)
    for world in (1, 2, 3):
        flags = ["--lr", "0", "--max_steps", "2", "--batch_size", "1", "--evaluation.batch_size", "2"]
        if family == "segformer":  # its batch norm has statistics of the step's own batch
            flags += ["--train.freeze_bn"]
        zygote.run(flags_for(data, tmp_path, f"w{world}", *flags, model=model), world)
        rows = [row for row in records(tmp_path / f"w{world}") if row["kind"] == "val"]
        found.append([{key: value for key, value in row.items() if key != "epoch"} for row in rows])
    assert len(found[0]) == 1
    assert found[0] == found[1] == found[2]


def test_ranks_and_micro_steps_add_up_to_the_one_big_batch(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Four samples a step, however they are dealt out: the same loss, norm and weights but for rounding."""
    deals = {"big": (1, 4, 1), "accumulated": (1, 1, 4), "ranks": (2, 2, 1), "both": (2, 1, 2)}
    weights, logged = {}, {}
    for name, (world, batch_size, accumulated) in deals.items():
        flags = [
            "--lr",
            "1e-4",
            "--epochs",
            "1",
            "--batch_size",
            str(batch_size),
            "--grad_accum_steps",
            str(accumulated),
        ]
        zygote.run(flags_for(data, tmp_path, name, *flags, model=STEADY), world)
        weights[name] = checkpoint.load(tmp_path / name / "last.pth")["model"]
        logged[name] = [row for row in records(tmp_path / name) if row["kind"] == "train"]
    start = Toy(dropout=0, drop_path=0).state_dict()
    for name in ("accumulated", "ranks", "both"):
        for key, value in weights["big"].items():
            assert torch.allclose(value.float(), weights[name][key].float(), atol=2e-6, rtol=1e-4), (name, key)
        for one, other in zip(logged["big"], logged[name], strict=True):
            for key in (
                "train/loss",
                "train/loss/bce",
                "train/loss/iou",
                "train/loss/ssim",
                "grad_norm",
                "train/jaccard",
            ):
                assert other[key] == pytest.approx(one[key], rel=2e-4), (name, key)
            assert other["step"] == one["step"]
    assert list(start) == list(weights["big"])


def batch_of(images: torch.Tensor, masks: torch.Tensor) -> Batch:
    samples = [SampleInfo(str(i), "", "", (64, 64)) for i in range(len(images))]
    return Batch(images, BinaryTarget(masks, torch.full((len(images),), -1)), samples)


def gradients(model: Model, criterion: Any, batches: list[Batch]) -> tuple[dict[str, torch.Tensor], float]:
    """Accumulated gradients and loss of one step over micro-batches, as the loop makes them."""
    model.zero_grad()
    counts = [criterion.counts(batch) for batch in batches]
    totals = {name: torch.stack([each[name] for each in counts]).sum() for name in counts[0]}
    total = 0.0
    for batch in batches:
        loss = torch.stack(list(criterion(model(batch), batch, totals).values())).sum()
        loss.backward()
        total += loss.item()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, total


def test_accumulation_is_the_large_batch_in_float64_also_with_unequal_counts() -> None:
    torch.manual_seed(0)
    model = Toy(width=8, dropout=0, drop_path=0).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.randn(7, 3, 64, 64, dtype=torch.float64)
    masks = torch.rand(7, 1, 64, 64, dtype=torch.float64)
    additive = ("bce", "iou", "ssim", "mae", "mse", "iou_patch", "contour", "structure", "reg")
    criterion = BinaryCriterion(weights=dict.fromkeys(additive, 1.0))
    whole, loss = gradients(model, criterion, [batch_of(images, masks)])
    for sizes in ([1] * 7, [4, 3], [5, 1, 1]):
        parts = [batch_of(i, m) for i, m in zip(images.split(sizes), masks.split(sizes), strict=True)]
        summed, total = gradients(model, criterion, parts)
        assert total == pytest.approx(loss, rel=1e-12)
        for name, value in whole.items():
            assert torch.allclose(summed[name], value, rtol=1e-9, atol=1e-12), name


SPOILED = """
import os, torch, loss
real, calls = loss.BinaryCriterion.forward, [0]
def spoiled(self, *arguments):
    losses = real(self, *arguments)
    calls[0] += 1
    if calls[0] == 3 and os.environ.get("RANK", "0") == "1":
        losses["bce"] = losses["bce"] * float("nan")
    return losses
loss.BinaryCriterion.forward = spoiled
"""


def test_a_nan_on_one_rank_is_skipped_by_all(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    tell = (
        "\nimport utils, hashlib\nrestore = utils.StopSignal.restore\n"
        "def left(signal):\n"
        "    import gc\n"
        "    from tests.toy import Toy\n"
        "    model = next(m for m in gc.get_objects() if isinstance(m, Toy) and m.training)\n"
        "    bits = b''.join(v.numpy().tobytes() for v in model.state_dict().values())\n"
        "    print('WEIGHTS', hashlib.sha256(bits).hexdigest(), flush=True)\n"
        "    restore(signal)\n"
        "utils.StopSignal.restore = left\n"
    )  # fmt: skip
    flags = ["--max_steps", "6", "--batch_size", "1", "--epochs", "1", "--eval_each_epoch", "0",
             "--logging.log_frequency", "1", "--train.ema_decay", "0.5"]  # fmt: skip
    job = zygote.run(flags_for(data, tmp_path, "run", *flags, model=TOY), 2, before=SPOILED + tell)
    hashes = {line.split()[1] for line in job.text().splitlines() if line.startswith("WEIGHTS")}
    assert job.text().count("WEIGHTS") == 2
    assert len(hashes) == 1, "the ranks hold different weights"
    assert "step 3: loss or gradient is not finite; the step was skipped" in job.text()
    content = checkpoint.load(tmp_path / "run" / "last.pth")
    assert (content["state"]["skipped"], content["state"]["step"]) == (1, 6)
    assert [file.name for file in (tmp_path / "run").glob("bad_step_*")] == ["bad_step_3_rank_1.pth"]
    for part in ("model", "ema"):
        assert all(torch.isfinite(value).all() for value in content[part].values() if value.is_floating_point())


# In each step the user of one rank gives points and corrects them, that of the other the true masks.
OTHER_PROMPTS = """
import hashlib, os, train, utils
from models.sam2.model import PARTS, Sam2
from models.sam2.prompts import Plan, RandomUser
models, steps = [], [int(os.environ["RANK"])]
def plan(self, num_frames):
    steps[0] += 1
    return Plan(True, [0, 1], [0, 1]) if steps[0] % 2 else Plan(False, [0], [])
def tell(moment):
    for part in PARTS:
        bits = b"".join(value.numpy().tobytes() for value in models[0].get_submodule(part).state_dict().values())
        with open(f"{os.environ['TOLD']}_{os.environ['RANK']}", "a") as file:
            print(moment, part, hashlib.sha256(bits).hexdigest(), file=file)
RandomUser.plan = plan
forward, restore = Sam2.forward, utils.StopSignal.restore
def first(self, batch):
    if self.training and not models:
        models.append(self)
        tell("before")
    return forward(self, batch)
def left(signal):
    tell("after")
    restore(signal)
Sam2.forward, utils.StopSignal.restore = first, left
"""


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_sam2_trains_alone_with_other_prompts_on_each_rank(
    part: str, clips: Path, zygote: Zygote, tmp_path: Path
) -> None:
    flags = ["--max_steps", "2", "--batch_size", "1", "--eval_each_epoch", "0", "--model.trainable", f"[{part}]",
             "--scheduler.warmup_steps", "0", "--logging.log_frequency", "1"]  # fmt: skip
    command = flags_for(clips, tmp_path, "run", *flags, model=SAM2)
    job = zygote.run(command, 2, before=OTHER_PROMPTS, TOLD=str(tmp_path / "rank"))
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2]
    assert "skipped" not in job.text()
    told, theirs = ((tmp_path / f"rank_{rank}").read_text().splitlines() for rank in range(2))
    assert told == theirs, "the ranks hold different weights"
    before, after = ({line.split()[1]: line.split()[2] for line in told if line.startswith(moment)}
                     for moment in ("before", "after"))  # fmt: skip
    assert [name for name in PARTS if before[name] != after[name]] == [part]


def test_a_rank_that_raises_ends_the_job(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    fails = SPOILED.replace('losses["bce"] = losses["bce"] * float("nan")', 'raise ArithmeticError("rank one fails")')
    began = time.monotonic()
    job = zygote.start(flags_for(data, tmp_path, "run", "--batch_size", "1", model=TOY), 2, before=fails)
    codes = job.wait(60)
    assert 0 not in codes
    assert time.monotonic() - began < 20
    assert "ArithmeticError: rank one fails" in job.text()
    assert "error: rank 1 failed first: ArithmeticError: rank one fails" in job.text()  # so says the other


def test_sync_bn_says_that_it_needs_cuda(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it works here")
    job = zygote.start(flags_for(data, tmp_path, "run", "--train.sync_bn", model=TOY), 2)
    assert job.wait() == [2, 2]
    assert "error: train.sync_bn needs CUDA devices" in job.text()


def test_another_number_of_ranks_goes_on_and_says_so(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    flags = ["--batch_size", "1", "--test_limit", "2"]
    zygote.run(flags_for(data, tmp_path, "run", *flags, "--epochs", "1", model=TOY), 2)
    first = checkpoint.load(tmp_path / "run" / "last.pth")
    job = zygote.run(flags_for(data, tmp_path, "run", *flags, "--epochs", "2", "--resume", model=TOY), 3)
    assert "the run had 2 processes and now has 3" in job.text()
    last = checkpoint.load(tmp_path / "run" / "last.pth")
    assert last["state"]["step"] > first["state"]["step"]
    assert difference(first["model"], last["model"])
    assert os.environ.get("WORLD_SIZE") is None

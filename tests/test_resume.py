"""A killed run goes on bit by bit as the unbroken one: weights, optimizer, average, random state and records."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import checkpoint
from tests.helpers import (
    CLASSIFIER,
    RFDETR,
    ROOT,
    SAM2,
    SEGFORMER,
    TINY,
    TOY,
    Zygote,
    add_toy_family,
    assert_same_run,
    draw_class_set,
    draw_clip_set,
    draw_label_set,
    draw_object_set,
    draw_set,
    flags_for,
    in_process,
    record_count,
    records,
    wait_for,
    zygote_in,
)
from tracking import Callback, StepRecord, ValidationRecord
from utils import EMA

# Everything that could make a resumed run differ: accumulation, an average, stochastic depth, dropout, augmentation
# with random sizes, clipping, a warm-up, a validation set that no number of ranks divides.
RECIPE = [
    "--batch_size", "1", "--grad_accum_steps", "2", "--train.ema_decay", "0.9", "--model.drop_path", "0.3",
    "--data.background_synthesis", "0.5", "--data.dynamic_size",
    "[[64, 96], [64, 64]]", "--grad_clip", "50", "--scheduler.warmup_steps", "3", "--logging.log_frequency", "1",
    "--checkpoint.save_last", "2",
]  # fmt: skip
SEMANTIC = [
    "--batch_size", "2", "--train.ema_decay", "0.9", "--model.drop_path", "0.3",
    "--data.mix", "{classmix: 0.4, mixup: 0.4}",
    "--data.dynamic_size", "[[64, 96], [64, 64]]", "--loss.weights", "{ce: 1, dice: 1, lovasz: 1}",
    "--loss.class_weights", "inverse_sqrt", "--logging.log_frequency", "1", "--checkpoint.save_last", "2",
]  # fmt: skip
INSTANCE = [
    "--batch_size", "1", "--grad_accum_steps", "2", "--train.ema_decay", "0.9", "--model.drop_path", "0.3",
    "--model.dropout", "0.1", "--data.mix", "{mosaic: 0.3, copy_paste: 0.3}", "--data.dynamic_size", "[[84, 108]]",
    "--logging.log_frequency", "1", "--checkpoint.save_last", "2",
]  # fmt: skip
CLIPS = [
    "--batch_size", "1", "--train.ema_decay", "0.9", "--model.drop_path", "0.3", "--data.clip.stride", "[1, 2]",
    "--logging.log_frequency", "1", "--checkpoint.save_last", "2",
]  # fmt: skip
CLASSES = [
    "--batch_size", "2", "--train.ema_decay", "0.9", "--model.drop_path", "0.1",
    "--model.dropout", "0.2", "--data.mix", "{cutmix: 0.4, mixup: 0.3}", "--logging.log_frequency", "1",
    "--checkpoint.save_last", "2",
]  # fmt: skip
FAMILIES = {  # where its data are, its model and recipe
    "toy": ("", TOY, RECIPE),
    "birefnet": ("", [*TINY, "--model.squeeze_block", "ASPP_x1"], RECIPE),
    "segformer": ("labels", SEGFORMER, SEMANTIC),
    "rfdetr": ("objects", RFDETR, INSTANCE),
    "sam2": ("clips", SAM2, CLIPS),
    "classifier": ("classes", CLASSIFIER, CLASSES),
}
EPOCHS = {  # by the number of ranks: 12 samples, and 6 clips, are few for them
    "toy": {1: 3, 2: 5, 3: 5}, "birefnet": {3: 3}, "segformer": {3: 4}, "rfdetr": {3: 4}, "sam2": {2: 2, 3: 4},
    "classifier": {3: 4},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def toy() -> None:
    add_toy_family()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 12)
    draw_set(folder / "val", 5, seed=1)
    draw_label_set(folder / "labels" / "train", 12)
    draw_label_set(folder / "labels" / "val", 5, seed=1)
    draw_object_set(folder / "objects" / "train", 12)
    draw_object_set(folder / "objects" / "val", 5, seed=1)
    draw_clip_set(folder / "clips" / "train", 6)
    draw_clip_set(folder / "clips" / "val", 1, frames=2, seed=1)
    draw_class_set(folder / "classes" / "train", 4)
    draw_class_set(folder / "classes" / "val", 2, seed=1)
    return folder


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.mark.parametrize(
    ("family", "world", "kills"),
    [
        ("toy", 1, 3),
        ("toy", 2, 3),
        ("toy", 3, 3),
        ("birefnet", 3, 1),
        ("segformer", 3, 1),
        ("rfdetr", 3, 1),
        ("sam2", 2, 1),
    ],
)
def test_a_run_killed_at_random_moments_ends_bitwise_like_the_unbroken_one(
    family: str, world: int, kills: int, data: Path, zygote: Zygote, tmp_path: Path
) -> None:
    chance = random.Random(20 + world)
    folder, model, recipe = FAMILIES[family]
    data, recipe = data / folder, [*recipe, "--epochs", str(EPOCHS[family][world])]
    zygote.run(flags_for(data, tmp_path / "unbroken", "run", *recipe, model=model), world)
    unbroken, broken = tmp_path / "unbroken" / "run", tmp_path / "broken" / "run"
    killed_at = sorted(chance.sample(range(4, record_count(unbroken) - 2), kills))
    command = flags_for(data, tmp_path / "broken", "run", *recipe, "--checkpoint.every_steps", "2", model=model)
    for attempt, count in enumerate(killed_at):
        workers = ["--num_workers", str(2 * (attempt % 2))]
        job = zygote.start([*command, *workers, *(["--resume"] if attempt else [])], world)
        assert wait_for(lambda count=count: record_count(broken) >= count), job.text()
        time.sleep(chance.uniform(0, 0.05))
        victim = chance.randrange(world)
        job.kill([victim])
        codes = job.wait(60)  # the ranks that are left notice it and end, too
        assert codes[victim] == -signal.SIGKILL
        assert 0 not in codes
    job = zygote.run([*command, "--resume", "--num_workers", "2"], world)
    assert "resumed from" in job.text()
    assert_same_run(unbroken, broken)
    assert not list(broken.glob("*" + checkpoint.TEMPORARY))


KILLS = {
    "between two micro-steps": ("loss.BinaryCriterion", "forward", 4),
    "in validation": ("metrics.BinaryMetric", "reduce", 1),
    "between saving and naming the best": ("checkpoint.RunFolder", "mark_best", 1),
    "between naming the best and the epoch's file": ("checkpoint.RunFolder", "keep_epoch", 1),
    "while the records are cut back": ("tracking.Records", "_write_csv", 1),
}


def kill_in(owner: str, method: str, call: int) -> str:
    """Code that makes the process kill itself when a method is called for the so-many-th time."""
    module = owner.partition(".")[0]
    return (
        f"import os, signal, {module}\nreal, calls = {owner}.{method}, [0]\n"
        "def dies(*arguments, **more):\n    calls[0] += 1\n"
        f"    if calls[0] == {call}: os.kill(os.getpid(), signal.SIGKILL)\n    return real(*arguments, **more)\n"
        f"{owner}.{method} = dies\n"
    )


def test_kills_at_the_worst_moments_change_nothing(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    recipe = [*RECIPE, "--epochs", "3", "--data.max_samples", "6"]
    zygote.run(flags_for(data, tmp_path / "unbroken", "run", *recipe, model=TOY))
    command = flags_for(
        data, tmp_path / "broken", "run", *recipe, "--checkpoint.every_steps", "2", "--resume", "auto", model=TOY
    )
    for moment, (owner, method, call) in KILLS.items():
        job = zygote.start(command, before=kill_in(owner, method, call))
        assert job.wait() == [-signal.SIGKILL], moment + job.text()
    zygote.run(command)
    assert_same_run(tmp_path / "unbroken" / "run", tmp_path / "broken" / "run")


def test_a_real_command_killed_and_a_real_torchrun_stopped(data: Path, tmp_path: Path) -> None:
    """No zygote here: `python train.py` and `torchrun train.py`, as a user types them."""
    recipe = ["--batch_size", "1", "--grad_accum_steps", "2", "--epochs", "4", "--logging.log_frequency", "1"]
    command = flags_for(data, tmp_path, "run", *recipe, "--checkpoint.every_steps", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / "log.txt", "ab") as log:
            return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log)

    process = start(*torchrun, "train.py", *command)
    assert wait_for(lambda: record_count(tmp_path / "run") >= 4), (tmp_path / "log.txt").read_text()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert (tmp_path / "run" / "status.txt").read_text() == "stopped by SIGTERM\n"
    stopped = checkpoint.load(tmp_path / "run" / "last.pth")["state"]["step"]
    assert 3 <= stopped < 12

    process = start("train.py", *command, "--resume")
    assert wait_for(lambda: record_count(tmp_path / "run") >= stopped + 3), (tmp_path / "log.txt").read_text()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert "the run had 2 processes and now has 1" in (tmp_path / "run" / "train.log").read_text()
    assert checkpoint.load(tmp_path / "run" / "last.pth")["state"]["step"] > stopped


class StopAt(Callback):
    """SIGTERM to this process once a step's line has been printed; the loop sees it two steps later."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.step - 2:
            os.kill(os.getpid(), signal.SIGTERM)


BOUNDARIES = [
    "--batch_size", "2", "--epochs", "2", "--steps_per_validation", "3", "--scheduler.name", "plateau",
    "--scheduler.patience", "0", "--logging.log_frequency", "1", "--test_limit", "3", "--checkpoint.save_last", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def bounded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of twelve steps, validated every three."""
    runs = tmp_path_factory.mktemp("bounded")
    in_process(*flags_for(data, runs, "run", *BOUNDARIES, model=TOY))
    return runs / "run"


@pytest.mark.parametrize("step", [3, 6, 12])
def test_a_signal_just_before_a_validation_or_an_end_loses_neither(
    step: int, data: Path, bounded: Path, tmp_path: Path
) -> None:
    """Step 3 is due a validation, step 6 ends the epoch, step 12 the run."""
    before = signal.getsignal(signal.SIGTERM)
    in_process(*flags_for(data, tmp_path, "run", *BOUNDARIES, model=TOY), callbacks=[StopAt(step)])
    assert (tmp_path / "run" / "status.txt").read_text() == "stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.load(tmp_path / "run" / "last.pth")["state"]["step"] == step
    in_process(*flags_for(data, tmp_path, "run", *BOUNDARIES, "--resume", model=TOY))
    assert_same_run(bounded, tmp_path / "run")


def test_early_stopping_is_remembered(data: Path, tmp_path: Path) -> None:
    """At rate zero nothing improves, so patience decides; a finished run that is resumed stays as it is."""
    flags = [
        "--batch_size", "4", "--epochs", "9", "--lr", "0", "--early_stopping", "--patience", "2", "--train.freeze_bn",
        "--test_limit", "2",
    ]  # fmt: skip
    in_process(*flags_for(data, tmp_path, "run", *flags, model=TOY))
    run = tmp_path / "run"
    assert (run / "status.txt").read_text() == "stopped early\n"
    assert [row["epoch"] for row in records(run) if row["kind"] == "val"] == [1, 2, 3]
    assert checkpoint.load(run / "last.pth")["state"]["epoch"] == 3
    content = (run / "last.pth").read_bytes()
    in_process(*flags_for(data, tmp_path, "run", *flags, "--resume", model=TOY))
    assert (run / "last.pth").read_bytes() == content
    in_process(*flags_for(data, tmp_path, "run", *flags, "--resume", "--patience", "3", model=TOY))
    assert checkpoint.load(run / "last.pth")["state"]["epoch"] == 4


def test_what_may_change_on_resume_does_and_the_rest_is_named(data: Path, tmp_path: Path) -> None:
    from errors import UserError

    flags = ["--batch_size", "4", "--test_limit", "2", "--epochs", "1"]
    in_process(*flags_for(data, tmp_path, "run", *flags, model=TOY))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.0001 -> 0\.01") as raised:
        in_process(*flags_for(data, tmp_path, "run", *flags, "--resume", "--lr", "1e-2", model=TOY))
    assert "\n" not in str(raised.value)
    often = ["--logging.log_frequency", "1"]
    in_process(*flags_for(data, tmp_path, "run", *flags, "--resume", "--epochs", "2", *often, model=TOY))
    assert checkpoint.load(run / "last.pth")["state"]["step"] == 6
    assert [row["step"] for row in records(run)] == [3, 4, 5, 6, 6]


def test_resume_auto_starts_where_nothing_is_and_a_path_starts_from_that_file(data: Path, tmp_path: Path) -> None:
    flags = ["--batch_size", "4", "--test_limit", "2", "--logging.log_frequency", "1"]
    in_process(*flags_for(data, tmp_path, "one", *flags, "--epochs", "1", "--resume", "auto", model=TOY))
    one = tmp_path / "one"
    continued = [*flags, "--epochs", "2", "--resume", str(one / "last.pth")]
    in_process(*flags_for(data, tmp_path, "two", *continued, model=TOY))
    two = tmp_path / "two"
    assert [row["step"] for row in records(two)] == [4, 5, 6, 6]
    state = checkpoint.load(two / "last.pth")["state"]
    assert state["step"] == 6
    assert state["records"] == 4
    assert [row["step"] for row in records(one)] == [1, 2, 3, 3]  # untouched
    in_process(*flags_for(data, tmp_path, "one", *flags, "--epochs", "2", "--resume", "auto", model=TOY))
    for part in ("model", "optimizer"):
        from tests.helpers import difference

        assert not difference(checkpoint.load(one / "last.pth")[part], checkpoint.load(two / "last.pth")[part], part)


class Watch(Callback):
    """What a run told a user's own callback."""

    def __init__(self) -> None:
        self.validations: list[ValidationRecord] = []
        self.steps: list[StepRecord] = []
        self.statuses: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def on_run_end(self, status: str) -> None:
        self.statuses.append(status)


def test_a_damaged_last_checkpoint_costs_one_save(data: Path, tmp_path: Path) -> None:
    flags = ["--batch_size", "4", "--test_limit", "2", "--logging.log_frequency", "1", "--checkpoint.save_last", "0"]
    in_process(*flags_for(data, tmp_path / "unbroken", "run", *flags, "--epochs", "3", model=TOY))
    in_process(*flags_for(data, tmp_path / "broken", "run", *flags, "--epochs", "2", model=TOY))
    run = tmp_path / "broken" / "run"
    best = (run / "best.pth").read_bytes()
    content = bytearray((run / "last.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "last.pth").unlink()  # best.pth may be the same file
    (run / "last.pth").write_bytes(content)
    watch = Watch()
    in_process(
        *flags_for(data, tmp_path / "broken", "run", *flags, "--epochs", "3", "--resume", model=TOY), callbacks=[watch]
    )
    log = (run / "train.log").read_text()
    assert "last.pth is damaged" in log
    assert "using previous.pth instead" in log
    assert [record.step for record in watch.steps] == [4, 5, 6, 7, 8, 9]
    assert watch.statuses == ["finished"]
    assert best
    # The end of the second epoch was the run's end then, and is not now; nothing else may differ.
    one, other = (checkpoint.load(tmp_path / name / "run" / "last.pth") for name in ("unbroken", "broken"))
    assert one["state"]["step"] == other["state"]["step"] == 9


def test_the_average_is_its_formula(data: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    average = EMA(model, 0.75)
    start = [p.detach().clone() for p in model.parameters()]
    good, bad = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model[1].running_mean.fill_(5)
    average.update(model, good)
    for mine, before in zip(average.module.parameters(), start, strict=True):
        assert torch.allclose(mine, 0.75 * before + 0.25 * (before + 1), atol=1e-15)
    assert average.module[1].running_mean.tolist() == [1.25, 1.25]  # statistics are averaged like weights
    held = [p.clone() for p in average.module.parameters()]
    average.update(model, bad)
    assert all(torch.equal(a, b) for a, b in zip(average.module.parameters(), held, strict=True))

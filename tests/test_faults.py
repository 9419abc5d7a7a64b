"""The fault matrix: what a machine, a person or a file can do to a run, done to it.

A test is named after its row in docs/reliability.md; rows that are not here have their test beside what they are of,
and that page says where.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bad_steps
import checkpoint
import doctor
import loss
import run
from checkpoint import RunFolder, RunLock
from classification import ClassTarget
from config import load
from errors import STOPPED, TryAgain, UserError
from readers import DataError, read_alpha, read_image
from readers.images import read_labels
from samples import Batch, BinaryTarget, InstanceTarget, SampleInfo, SemanticTarget, VideoTarget
from tasks import TASKS
from tests.helpers import (
    ROOT,
    TOY,
    Zygote,
    add_toy_family,
    assert_same_run,
    difference,
    draw_set,
    flags_for,
    in_process,
    record_count,
    records,
    run_script,
    wait_for,
    zygote_in,
)
from tests.test_ddp import STEADY
from utils import World

SHORT = ["--batch_size", "2", "--epochs", "2", "--logging.log_frequency", "1", "--model.width", "8"]
OFTEN = ["--checkpoint.every_steps", "1"]


@pytest.fixture(autouse=True, scope="module")
def toy() -> None:
    add_toy_family()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 8)
    draw_set(folder / "val", 3, seed=1)
    return folder


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps with a validation after each four, of one process."""
    runs = tmp_path_factory.mktemp("unbroken")
    in_process(*flags_for(data, runs, "run", *SHORT, model=TOY))
    return runs / "run"


IN_ITS_OWN_MOUNTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_REC, MS_PRIVATE, MS_RDONLY, MS_REMOUNT, MS_BIND = 0x20000, 0x4000, 0x40000, 1, 32, 4096
def checked(result):
    if result: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def mount(source, target, kind, flags, data=None):
    checked(libc.mount(*(text and text.encode() for text in (source, target, kind)), flags, data and data.encode()))
checked(libc.unshare(CLONE_NEWNS))
mount("none", "/", None, MS_REC | MS_PRIVATE)
"""
needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0
    if Path("/usr/bin/unshare").exists() else True,
    reason="mounting needs Linux and the right to",
)  # fmt: skip


# ---------------------------------------------------------------- 12 to 14: the folder of a run


@needs_mounts
def test_row_12_disk_full(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    """A disk with room for one checkpoint: the second save fails, and so does every line of the log after it."""
    folder = tmp_path / "small"
    folder.mkdir()
    kept = tmp_path / "kept.pth"
    small = (
        f"{IN_ITS_OWN_MOUNTS}\nmount('tmpfs', {str(folder)!r}, 'tmpfs', 0, 'size=600k')\n"
        "import errors, shutil\nreal = errors.run_command\n"
        "def last_look(main):\n    try: real(main)\n"
        f"    finally: shutil.copy({str(folder / 'run' / 'last.pth')!r}, {str(kept)!r})\n"
        "errors.run_command = last_look\n"
    )
    job = zygote.start(flags_for(data, folder, "run", *SHORT, *OFTEN, model=TOY), before=small)
    assert job.wait() == [2], job.text()
    assert re.search(r"error: (cannot save the checkpoint .*intact|the disk is full)", job.text())
    assert "Traceback" not in job.text()
    assert checkpoint.load(kept)["state"]["step"] >= 1


@needs_mounts
def test_row_13_read_only_folder(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Also one that holds a run: what cannot be written is known before the data is read."""
    in_process(*flags_for(data, tmp_path, "run", *SHORT, "--max_steps", "1", model=TOY))
    path = str(tmp_path)
    lock_up = (f"{IN_ITS_OWN_MOUNTS}\nmount({path!r}, {path!r}, None, MS_BIND)\n"
               f"mount({path!r}, {path!r}, None, MS_BIND | MS_REMOUNT | MS_RDONLY)\n")  # fmt: skip
    for name, more in (("run", ["--resume"]), ("run", ["--overwrite"]), ("new", [])):
        job = zygote.start(flags_for(data, tmp_path, name, *SHORT, *more, model=TOY), before=lock_up)
        assert job.wait() == [2]
        assert f"error: cannot write into the run folder {tmp_path / name}: Read-only file system" in job.text()


def test_row_14_two_runs_in_one_folder(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    in_process(*flags_for(data, tmp_path, "run", *SHORT, "--max_steps", "1", model=TOY))
    before = (tmp_path / "run" / "last.pth").read_bytes()
    lock = RunLock(tmp_path / "run")
    for more in (["--resume"], ["--overwrite"]):
        job = zygote.start(flags_for(data, tmp_path, "run", *SHORT, *more, model=TOY))
        assert job.wait() == [2]
        assert "error: another process is training in" in job.text()
    lock.release()
    assert (tmp_path / "run" / "last.pth").read_bytes() == before
    assert not RunFolder(tmp_path / "run").overwriting.exists()


# ---------------------------------------------------------------- 19: a rank that hangs


@pytest.mark.parametrize("guilty", [1, 0])
def test_row_19_a_rank_hangs(guilty: int, data: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Stopped where it stands: the other ends within the time limit, and says which one it was."""
    limit = 6
    flags = ["--batch_size", "1", "--epochs", "500", "--eval_each_epoch", "0", "--distributed.timeout_minutes",
             str(limit / 60), "--model.width", "8", "--logging.log_frequency", "1"]  # fmt: skip
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY), 2)
    assert wait_for(lambda: record_count(tmp_path / "run") >= 3), job.text()
    job.kill([guilty], signal.SIGSTOP)
    began = time.monotonic()
    ended = wait_for(lambda: zygote.ask({"poll": job.pids})["codes"][1 - guilty] is not None, limit + 35)
    took = time.monotonic() - began
    job.kill([guilty])
    assert job.wait()[1 - guilty] == 2, job.text()
    assert ended
    assert took < limit + 35
    assert f"error: rank {guilty}" in job.text()
    assert "no longer answers" in job.text()


# ---------------------------------------------------------------- 22 to 25: signals


def test_row_23_sigterm_to_one_rank(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    flags = [*SHORT, "--epochs", "30", "--eval_each_epoch", "0", "--batch_size", "1"]
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY), 2)
    assert wait_for(lambda: record_count(tmp_path / "run") >= 3), job.text()
    job.kill([1], signal.SIGTERM)
    assert job.wait() == [STOPPED, STOPPED], job.text()
    assert (tmp_path / "run" / "status.txt").read_text() == "stopped by a signal to another rank\n"
    assert checkpoint.load(tmp_path / "run" / "last.pth")["state"]["step"] >= 3


SIGNAL_IN = """
import os, signal, {module}
real, calls = {owner}, [0]
def signalled(*arguments, **more):
    calls[0] += 1
    if calls[0] == {call}: os.kill(os.getpid(), signal.{name})
    return real(*arguments, **more)
{owner} = signalled
"""


@pytest.mark.parametrize(
    ("name", "owner", "call", "step"),
    [
        ("SIGTERM", "metrics.BinaryMetric.update", 1, 4),
        ("SIGTERM", "checkpoint._HashingWriter.write", 2, 6),
        ("SIGUSR1", "loss.BinaryCriterion.forward", 2, 3),
    ],
    ids=["in evaluation", "in a save", "SIGUSR1"],
)
def test_row_24_signals_in_evaluation_and_save(
    name: str, owner: str, call: int, step: int, data: Path, unbroken: Path, zygote: Zygote, tmp_path: Path
) -> None:
    """Validation breaks off and is done again; a save goes on to its end. Both runs end as the unbroken one."""
    command = flags_for(data, tmp_path, "run", *SHORT, model=TOY)
    before = SIGNAL_IN.format(module=owner.partition(".")[0], owner=owner, call=call, name=name)
    job = zygote.start(command, before=before)
    assert job.wait() == [STOPPED], job.text()
    assert (tmp_path / "run" / "status.txt").read_text() == f"stopped by {name}\n"
    content = checkpoint.load(tmp_path / "run" / "last.pth")
    assert content["state"]["step"] == step
    if "metrics" in owner:
        assert content["state"]["validated_step"] == -1
        assert not [row for row in records(tmp_path / "run") if row["kind"] == "val"]
    zygote.run([*command, "--resume"])
    assert_same_run(unbroken, tmp_path / "run")


def test_row_24_a_signal_to_one_rank_in_evaluation(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    """The other goes on to the end of its share, and both drop what they have."""
    told = SIGNAL_IN.format(module="metrics", owner="metrics.BinaryMetric.update", call=1, name="SIGTERM")
    told = told.replace("if calls[0] == 1", "if calls[0] == 1 and os.environ['RANK'] == '1'")
    flags = [*SHORT, "--batch_size", "1", "--epochs", "1"]
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY), 2, before=told)
    assert job.wait() == [STOPPED, STOPPED], job.text()
    state = checkpoint.load(tmp_path / "run" / "last.pth")["state"]
    assert (state["step"], state["validated_step"], state["validation"]) == (4, -1, {})


INJECTED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import loss
from tests.helpers import add_toy_family
add_toy_family()
{fault}
sys.argv[0] = "train.py"
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""
SHORT_OF_MEMORY = """
import torch
real, calls = loss.BinaryCriterion.forward, [0]
def forward(self, outputs, batch, counts):
    calls[0] += 1
    if os.environ["RANK"] == "1" and len(batch.samples) > 1 and calls[0] > 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(self, outputs, batch, counts)
loss.BinaryCriterion.forward = forward
"""


def test_row_25_and_33_torchrun_starts_again_after_memory_ran_out_and_dies_of_a_signal(
    data: Path, tmp_path: Path
) -> None:
    """Rank 1 has no memory for two samples from step 4 on. SIGUSR1 then kills torchrun itself: nobody may be left."""
    script = tmp_path / "injected.py"
    script.write_text(INJECTED.format(root=str(ROOT), fault=SHORT_OF_MEMORY))
    flags = [*SHORT, *OFTEN, "--epochs", "4000", "--eval_each_epoch", "0", "--overwrite"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    with open(tmp_path / "log.txt", "ab") as log:
        command = [sys.executable, *torchrun, str(script), *flags_for(data, tmp_path, "run", *flags, model=TOY)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    folder = tmp_path / "run"
    assert wait_for(lambda: record_count(folder) >= 6, 300), (tmp_path / "log.txt").read_text()
    said = (tmp_path / "log.txt").read_text()
    assert "memory ran out in step 4 on rank 1" in said
    assert "its micro-batches of 2 are taken in 2 pieces" in said
    ranks = [int(pid) for pid in children_of(process.pid)]
    assert len(ranks) == 2
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == -signal.SIGUSR1
    assert wait_for(lambda: not any(is_alive(pid) for pid in ranks), 60), "ranks outlived their launcher"
    assert (folder / "status.txt").read_text() == "stopped by the end of torchrun\n"
    state = checkpoint.load(folder / "last.pth")["state"]
    assert state["pieces"] == 2
    assert state["step"] >= 6
    rows = records(folder)
    assert [row["step"] for row in rows[:6]] == [1, 2, 3, 4, 5, 6]  # the restart went on, in spite of --overwrite
    assert "resumed from last.pth" in (folder / "train.log").read_text()


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("moment", ["after the old run was replaced", "before"])
def test_a_restart_by_the_launcher_goes_on(
    moment: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = flags_for(data, tmp_path, "run", *SHORT, "--max_steps", "2", model=TOY)
    in_process(*command)
    folder = RunFolder(tmp_path / "run")
    if moment == "before":
        folder.overwriting.touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    in_process(*command, "--overwrite", "--max_steps", "3")
    resumed = [row["step"] for row in records(folder.path) if row["kind"] == "train"]
    assert resumed == [1, 2, 3]
    assert ("resumed from" in (folder.path / "train.log").read_text()) == (moment != "before")
    assert not folder.overwriting.exists()


def test_a_restart_finds_the_name_that_the_first_start_made_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--data.train", str(data / "train"), "--output_dir", str(tmp_path), *TOY]
    first, again = load(flags), load(flags)
    run.name_the_run(first, World.alone())
    (tmp_path / first.experiment_name).mkdir()
    monkeypatch.setattr(time, "strftime", lambda pattern: "20990101-000000")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run.name_the_run(again, World.alone())
    assert again.experiment_name == first.experiment_name


# ---------------------------------------------------------------- 28: a bad step is kept


def spoil_sample_03(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of its loss is not finite, though the loss is."""
    real = loss.BinaryCriterion.forward

    def forward(self: Any, outputs: Any, batch: Any, counts: Any) -> Any:
        losses = real(self, outputs, batch, counts)
        if any(sample.sample_id.endswith("03") for sample in batch.samples):
            losses["bce"] = losses["bce"] + (outputs["logits"].sum() * 0).sqrt()
        return losses

    monkeypatch.setattr(loss.BinaryCriterion, "forward", forward)


def test_row_28_a_bad_batch_is_kept_and_replayed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stochastic depth and dropout included, the step's loss is reproduced to the bit from the file alone."""
    spoil_sample_03(monkeypatch)
    flags = [*SHORT, "--grad_accum_steps", "2", "--epochs", "4", "--eval_each_epoch", "0"]
    in_process(*flags_for(data, tmp_path, "run", *flags, model=TOY))
    files = sorted((tmp_path / "run").glob("bad_step_*.pth"))
    assert len(files) == bad_steps.KEPT
    assert (tmp_path / "run" / "train.log").read_text().count("look into it with python train.py --replay") == 4
    for file in files:
        replayed = bad_steps.replay(file, "cpu")
        assert {name: replayed.then[name] for name in replayed.values} == replayed.values
        assert all(torch.isfinite(torch.tensor(list(replayed.values.values()))))
        assert len(replayed.gradients) == replayed.parameters - 2  # all but those of the coarse head
        assert len(replayed.samples) == 4
        assert any(sample.endswith("03") for sample in replayed.samples)
    code, out, _ = run_script(monkeypatch, "train", "--replay", str(files[0]), "--device", "cpu")
    assert code == 0
    assert "gradients that are not finite: " in out
    code, _, err = run_script(monkeypatch, "train", "--replay", str(tmp_path / "run" / "last.pth"))
    assert (code, "holds no bad step" in err) == (2, True)


def test_row_28_fp16_finds_its_scale_by_bad_steps_and_keeps_only_what_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_sample_03(monkeypatch)
    flags = [*SHORT, "--data.max_samples", "2", "--data.train", str(data / "train"), "--mixed_precision", "fp16",
             "--train.max_bad_steps", "3", "--batch_size", "8"]  # fmt: skip
    with pytest.raises(UserError, match="3 steps in a row had no finite gradient"):
        in_process(*flags_for(data, tmp_path, "run", *flags, "--data.max_samples", "8", "--epochs", "9", model=TOY))
    assert [file.name for file in (tmp_path / "run").glob("bad_step_*.pth")] == ["bad_step_3.pth"]


def batches() -> list[Batch]:
    """One of each task."""
    count, generator = 5, torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    samples = [SampleInfo(str(i), f"{i}.png", "set", (8, 9)) for i in range(count)]
    labels = torch.randint(0, 9, (count, 8, 8), generator=generator).to(torch.uint8)
    counts = [2, 0, 1, 3, 1]
    return [
        Batch(images, BinaryTarget(torch.rand(count, 1, 8, 8), torch.arange(count)), samples),
        Batch(images, SemanticTarget(labels, blended=labels.flip(0), share=0.3), samples),
        Batch(images, InstanceTarget(counts, torch.arange(7), torch.rand(7, 4), torch.ones(count, 1, 8, 8, dtype=
              torch.int16), torch.zeros(7, dtype=torch.int64)), samples),
        Batch(images, ClassTarget(torch.arange(count), torch.ones(count), torch.rand(count)), samples),
        Batch(images[:, None], VideoTarget(torch.rand(7, 1, 8, 8) > 0.5, torch.arange(count).repeat_interleave(
              torch.tensor(counts))), [replace(sample, frames=[3]) for sample in samples]),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", range(len(TASKS)))
def test_batches_of_every_task_are_kept_whole_and_taken_apart(kind: int, tmp_path: Path) -> None:
    batch = batches()[kind]
    checkpoint.save(tmp_path / "a.pth", bad_steps.plain(batch))
    again = bad_steps.batch_of(checkpoint.load(tmp_path / "a.pth"), type(batch.targets))
    assert again.samples == batch.samples
    assert not difference(vars(batch.targets), vars(again.targets))
    for pieces, sizes in ((1, [5]), (2, [2, 3]), (4, [1, 1, 1, 2]), (9, [1] * 5)):
        parts = batch.split(pieces)
        assert [len(part.samples) for part in parts] == [len(part.images) for part in parts] == sizes
        assert {type(batch.targets) for batch in batches()} == {bad_steps.targets_of(task) for task in TASKS}
        for name, value in vars(batch.targets).items():
            if name == "clips":
                found = torch.cat([torch.bincount(part.targets.clips, minlength=len(part.samples)) for part in parts])
                assert found.tolist() == [2, 0, 1, 3, 1]
            elif isinstance(value, torch.Tensor):
                assert torch.equal(torch.cat([getattr(part.targets, name) for part in parts]), value), name
            elif name == "counts":
                assert [count for part in parts for count in part.targets.counts] == value


# ---------------------------------------------------------------- 32 and 33: parameters and memory


UNUSED = """
import functools, torch, tests.toy
real = tests.toy.Toy.__init__
@functools.wraps(real)
def init(self, *arguments, **more):
    real(self, *arguments, **more)
    self.forgotten = torch.nn.Linear(2, 3)
tests.toy.Toy.__init__ = init
"""


@pytest.mark.parametrize(("world", "code"), [(1, 0), (2, 2)])
def test_row_32_an_unused_parameter(world: int, code: int, data: Path, zygote: Zygote, tmp_path: Path) -> None:
    flags = [*SHORT, "--max_steps", "2", "--eval_each_epoch", "0"]
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY), world, before=UNUSED)
    assert job.wait() == [code] * world, job.text()
    assert "no gradient reaches 2 parameters (forgotten.weight, forgotten.bias): leave them out" in job.text()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_row_33_out_of_memory(where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four samples at once are too many from the second step on, then two: the same update comes from single ones."""
    flags = ["--batch_size", "4", "--max_steps", "3", "--eval_each_epoch", "0", "--lr", "1e-3", "--model.width", "8"]
    in_process(*flags_for(data, tmp_path, "whole", *flags, model=STEADY))
    real, calls = loss.BinaryCriterion.forward, [0]

    def fail(gradient: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self: Any, outputs: Any, batch: Any, counts: Any) -> Any:
        calls[0] += 1
        if calls[0] > 1 and len(batch.samples) > 1:
            if where == "forward":
                fail(None)
            outputs["logits"].register_hook(fail)
        return real(self, outputs, batch, counts)

    monkeypatch.setattr(loss.BinaryCriterion, "forward", forward)
    in_process(*flags_for(data, tmp_path, "pieces", *flags, model=STEADY))
    whole, pieces = (checkpoint.load(tmp_path / name / "last.pth") for name in ("whole", "pieces"))
    assert (whole["state"]["pieces"], pieces["state"]["pieces"]) == (1, 4)
    for name, value in whole["model"].items():
        assert torch.allclose(value.float(), pieces["model"][name].float(), atol=1e-6, rtol=1e-4), name
    for one, other in zip(records(tmp_path / "whole"), records(tmp_path / "pieces"), strict=True):
        for key in ("train/loss", "train/jaccard", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key
    log = (tmp_path / "pieces" / "train.log").read_text()
    assert "memory ran out in step 2: micro-batches of 4 are taken in 2 pieces" in log
    assert "memory ran out in step 2: micro-batches of 4 are taken in 4 pieces" in log


def test_row_33_a_single_sample_that_is_too_large_ends_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*arguments: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(loss.BinaryCriterion, "forward", forward)
    with pytest.raises(UserError, match=r"memory ran out in step 1 with a single sample: lower data\.size"):
        in_process(*flags_for(data, tmp_path, "run", *SHORT, model=TOY))
    assert TryAgain.exit_code == STOPPED


# ---------------------------------------------------------------- 42: data workers


def test_row_42_a_worker_is_killed(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    flags = [*SHORT, "--epochs", "500", "--eval_each_epoch", "0", "--num_workers", "1"]
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY))
    assert wait_for(lambda: record_count(tmp_path / "run") >= 2), job.text()
    os.kill(int(children_of(job.pids[0])[-1]), signal.SIGKILL)
    assert job.wait(30) == [2]
    assert "error: a data-loading process was killed, most often because memory ran out" in job.text()
    assert "Traceback" not in job.text()


@needs_mounts
def test_row_42_shared_memory_is_too_small(data: Path, zygote: Zygote, tmp_path: Path) -> None:
    small = f"{IN_ITS_OWN_MOUNTS}\nmount('tmpfs', '/dev/shm', 'tmpfs', 0, 'size=64k')\n"
    flags = [*SHORT, "--num_workers", "1"]
    job = zygote.start(flags_for(data, tmp_path, "run", *flags, model=TOY), before=small)
    assert job.wait(30) == [2], job.text()
    assert "error: the data-loading processes ran out of shared memory (/dev/shm): enlarge it" in job.text()
    assert "Traceback" not in job.text()


# ---------------------------------------------------------------- 16, 40, 43: files that mean harm


def test_row_40_decompression_bombs_take_no_memory(tmp_path: Path) -> None:
    """40 000 x 40 000 pixels, announced by a few bytes: 4.8 GB if anything decoded them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(10_000))), chunk(b"IEND", b""))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_image, read_alpha, read_labels):
        with pytest.raises(DataError, match=r"bomb\.png.*400 megapixels"):
            read(tmp_path / "bomb.png")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MiB"


@pytest.mark.parametrize(
    "text", ["[" * 2000, "seed: " + "9" * 5000, "seed: 2026-13-77", 'output_dir: "a\\0b"', "data: &d {size: *d}"]
)
def test_row_43_a_configuration_that_means_harm_ends_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yml"):
        load(["--config", str(tmp_path / "c.yml")])
    (tmp_path / "run.json").write_text("[" * 100_000)
    assert checkpoint.read_json(tmp_path / "run.json") == {}


@pytest.mark.parametrize(
    "content",
    [
        {"meta": {}, "model": {}},
        {"meta": 3, "model": {}},
        {"meta": {"family": "toy", "settings": {}}, "model": 3},
        {"meta": {"family": "toy", "settings": {"width": "wide"}}, "model": {}},
        {1: 2},
    ],
)
def test_row_16_a_checkpoint_of_other_parts_ends_in_a_sentence(content: Any, tmp_path: Path) -> None:
    """Also with a digest that is right: whoever writes a file can compute one."""
    torch.save(content, tmp_path / "theirs.pth")
    checkpoint.save(tmp_path / "ours.pth", content)
    for name in ("theirs.pth", "ours.pth"):
        with pytest.raises(UserError, match=name):
            checkpoint.load_model(tmp_path / name)


# ---------------------------------------------------------------- the installation


class Wheel:
    """An installed distribution, as `importlib.metadata` describes one."""

    def __init__(self, name: str, folder: str) -> None:
        self.metadata, self.files = {"Name": name}, [Path(folder) / "__init__.py", Path(folder) / "more.py"]

    def read_text(self, name: str) -> None:
        return None


def test_doctor_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {"torch": "2.14.1+cu130 CUDA 13.0 devices MPS False", "torchvision": "0.29.1+cpu"}
    monkeypatch.setattr(doctor, "imported", lambda code: (printed.get(code.split()[1].strip(";"), "1.0"), ""))
    wheels = [Wheel("opencv-python", "cv2"), Wheel("opencv-python-headless", "cv2"), Wheel("AlbumentationsX",
              "albumentations")]  # fmt: skip
    monkeypatch.setattr(doctor, "distributions", lambda: wheels)
    lines: list[str] = []
    assert doctor.command(lines.append) == 1
    faults = lines[-1].strip().splitlines()
    assert faults[0] == "3 faults:", lines
    assert "builds cu130 and cpu: install both from one index" in faults[1]
    assert faults[2].startswith("cv2: pip uninstall opencv-python opencv-python-headless, then pip install")
    assert faults[3].startswith("albumentations: pip uninstall albumentationsx")
    for word in ("python: 3", "numpy: ", "disk: ", "temporary files: "):
        assert any(line.startswith(word) for line in lines), word
    monkeypatch.setattr(doctor, "built_for", lambda: "2.9.0")
    assert "was built for torch 2.9.0" in doctor.pairing("2.14.1", "0.24.0")[1]
    assert "2.10 or newer is needed" in doctor.pairing("2.9.1", "0.24.1")[1]


def test_doctor_survives_what_does_not_import() -> None:
    how, wrong = doctor.imported("raise ImportError('operator torchvision::nms does not exist')")
    assert (how, wrong) == ("fails", "ImportError: operator torchvision::nms does not exist")
    assert doctor.pairing("fails", "fails")[1] == ""
    assert doctor.owners("no_such_package", "wheel") == ("from no installed package", "pip install wheel")


# ---------------------------------------------------------------- the page that lists them


def test_every_row_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 46))
    for row in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            folder = ROOT / "tests" / ("long" if file.startswith("long_") else "")
            assert f"def {name}(" in (folder / file).read_text(), f"{file}::{name}"

"""Checkpoints of a real run, killed and damaged as often as the fault matrix says."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, RunFolder, load, load_weights
from tests.helpers import TOY, add_toy_family, draw_set, flags_for, in_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, whose checkpoints hold a model, an average and an optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    draw_set(folder / "train", 4)
    draw_set(folder / "val", 2, seed=1)
    add_toy_family()
    flags = ["--batch_size", "2", "--epochs", "1", "--checkpoint.every_steps", "1", "--train.ema_decay", "0.9",
             "--model.width", "16"]  # fmt: skip
    in_process(*flags_for(folder, folder, "run", *flags, model=TOY))
    return folder / "run"


def test_row_02_a_hundred_kills_while_saving(trained: Path, tmp_path: Path) -> None:
    """A process that does nothing but save is killed at random, with what it left as the next one's beginning."""
    content = load(trained / "last.pth")
    content["more"] = torch.randn(500_000)  # 2 MB, so that writing takes its time
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    chance, step, unreadable, progress = random.Random(2), 0, 0, 0

    def save_for_ever(step: int) -> None:
        while True:
            step += 1
            folder.save({**content, "state": {"step": step}})
            folder.mark_best()
            folder.keep_epoch(step, save_last=2, save_step=1)

    began = time.monotonic()
    folder.save({**content, "state": {"step": 0}})
    took = time.monotonic() - began
    for _ in range(100):
        if (pid := os.fork()) == 0:
            save_for_ever(step)
        time.sleep(chance.uniform(0, 6 * took))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        _, found, damaged = folder.newest() or pytest.fail("nothing can be loaded")
        unreadable += len(damaged)
        assert found["state"]["step"] >= step
        progress += found["state"]["step"] > step
        step = found["state"]["step"]
        folder.sweep()
        assert not list(folder.path.glob(f"*{checkpoint.TEMPORARY}"))
    assert unreadable == 0
    assert progress > 20, "the kills came too early to mean anything"
    print(f"100 kills, {unreadable} unreadable, {step} saves")


def test_row_10_three_hundred_flipped_bits(trained: Path, tmp_path: Path) -> None:
    """Any bit of the newest checkpoint: it is noticed, said, and the one before is used."""
    intact, folder = (trained / "last.pth").read_bytes(), RunFolder(tmp_path)
    folder.previous.write_bytes((trained / "previous.pth").read_bytes())
    before = load(folder.previous)["state"]["step"]
    chance, noticed = random.Random(10), 0
    for _ in range(300):
        damaged = bytearray(intact)
        damaged[chance.randrange(len(intact))] ^= 1 << chance.randrange(8)
        folder.last.write_bytes(damaged)
        file, content, sentences = folder.newest() or pytest.fail("nothing found")
        noticed += file == folder.previous and content["state"]["step"] == before and "last.pth" in sentences[0]
    assert noticed == 300


def test_row_11_sixty_truncations(trained: Path, tmp_path: Path) -> None:
    intact, folder = (trained / "last.pth").read_bytes(), RunFolder(tmp_path)
    folder.previous.write_bytes((trained / "previous.pth").read_bytes())
    chance, noticed = random.Random(11), 0
    for length in [0, 1, 40, len(intact) - 1, *(chance.randrange(len(intact)) for _ in range(56))]:
        folder.last.write_bytes(intact[:length])
        with pytest.raises(CheckpointError):
            load_weights(folder.last)
        file, _, sentences = folder.newest() or pytest.fail("nothing found")
        noticed += file == folder.previous and "last.pth" in sentences[0]
    assert noticed == 60

"""A checkpoint is written whole or not at all, is proven intact before it is used, and never runs code."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError, RunFolder, RunLock, load, load_model, load_weights, save
from errors import UserError
from tests.helpers import ROOT, difference


def payload(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "model": {"w": torch.randn(40, 40, generator=generator)},
        "state": {"step": number},
        "ema": None,
        "format": 1,
        "meta": {},
    }


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    content = {
        "tensors": {"half": torch.randn(3, 4).half(), "whole": torch.arange(5), "view": torch.randn(4, 4)[:, 1]},
        "plain": [1, 2.5, float("inf"), None, True, "text", (1, 2)],
        "python": random.getstate(),
    }
    save(tmp_path / "a.pth", content)
    assert not difference(content, load(tmp_path / "a.pth"))
    assert not difference(content, torch.load(tmp_path / "a.pth", weights_only=True))  # other programs read it, too
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", payload(1))
    intact = (tmp_path / "a.pth").read_bytes()
    chance = random.Random(3)
    places = [0, len(intact) - 1, *(chance.randrange(len(intact)) for _ in range(30))]
    for place in places:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "b.pth").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"b\.pth"):
            load(tmp_path / "b.pth")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", payload(1))
    intact = (tmp_path / "a.pth").read_bytes()
    chance = random.Random(4)
    for length in [0, 1, 39, 40, len(intact) - 1, *(chance.randrange(len(intact)) for _ in range(20))]:
        (tmp_path / "b.pth").write_bytes(intact[:length])
        for read in (load, load_weights):
            with pytest.raises(CheckpointError, match=r"b\.pth"):
                read(tmp_path / "b.pth")


def test_the_newest_intact_one_is_used_and_the_damaged_are_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert folder.newest() is None
    for step in (1, 2, 3):
        folder.save(payload(step))
        folder.keep_epoch(step, save_last=3, save_step=1)
    file, content, damaged = folder.newest() or pytest.fail("nothing found")
    assert (file, content["state"]["step"], damaged) == (folder.last, 3, [])
    for broken, step, used in ((folder.last, 2, "previous.pth"), (folder.previous, 1, "run_epoch_1.pth")):
        copy = broken.read_bytes()
        broken.unlink()
        broken.write_bytes(copy[:-100])
        for epoch_file in folder.path.glob("run_epoch_[23].pth"):
            epoch_file.unlink()
        file, content, damaged = folder.newest() or pytest.fail("nothing found")
        assert (file.name, content["state"]["step"]) == (used, step)
        assert broken.name in damaged[-1]
    (folder.path / "run_epoch_1.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="no intact checkpoint is left") as raised:
        folder.newest()
    assert all(name in str(raised.value) for name in ("last.pth", "previous.pth", "run_epoch_1.pth"))


# ---------------------------------------------------------------- kills and full disks


def in_a_fork(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Dying:
    """`os` as the checkpoint module sees it, dying before or after the so-many-th call that changes the disk."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after = at, after

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("replace", "fsync", "link", "unlink"):
            return real

        def call(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.after:
                os._exit(9)
            result = real(*arguments, **more)
            if self.left == 0:
                os._exit(9)
            return result

        return call


def test_a_kill_between_any_two_steps_of_a_save_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    kills = 0
    for after in (False, True):
        for point in range(1, 40):
            shutil.rmtree(folder.path, ignore_errors=True)
            folder.path.mkdir()
            for step in (1, 2):
                folder.save(payload(step))
                folder.mark_best()
                folder.keep_epoch(step, save_last=2, save_step=1)

            def act(point: int = point, after: bool = after) -> None:
                checkpoint.os = Dying(point, after)  # type: ignore[assignment]
                folder.save(payload(3))
                folder.mark_best()
                folder.keep_epoch(3, save_last=2, save_step=1)

            code = in_a_fork(act)
            assert code in (0, 9)
            found = folder.newest() or pytest.fail("nothing found")
            assert found[1]["state"]["step"] in ((3,) if code == 0 else (2, 3))
            assert not found[2], "no file of its own name was ever half-written"
            assert load(folder.best)["state"]["step"] in (2, 3)
            folder.sweep()
            assert not list(folder.path.glob(f"*{checkpoint.TEMPORARY}"))
            assert not (folder.path / "next.pth").exists()
            if code == 0:
                break
            kills += 1
    assert kills >= 16


def test_a_kill_while_bytes_are_written_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.save(payload(1))

    for call in range(1, 20, 3):

        def act(call: int = call) -> None:
            real, calls = checkpoint._HashingWriter.write, [0]

            def write(self: Any, data: Any) -> int:
                calls[0] += 1
                if calls[0] == call:
                    self.file.write(bytes(data)[: len(data) // 2])
                    self.file.flush()
                    os._exit(9)
                return real(self, data)

            checkpoint._HashingWriter.write = write  # type: ignore[method-assign]
            folder.save(payload(2))

        if in_a_fork(act) == 0:
            assert call > 5
            break
        assert (folder.newest() or pytest.fail("nothing"))[1]["state"]["step"] == 1
        assert folder.sweep() == 1


def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.save(payload(1))

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            folder.save(payload(2))
        except UserError as error:
            (tmp_path / "said").write_text(str(error))

    assert in_a_fork(act) == 0
    said = (tmp_path / "said").read_text()
    assert "cannot save the checkpoint" in said
    assert "intact" in said
    assert load(folder.last)["state"]["step"] == 1
    assert sorted(file.name for file in folder.path.iterdir()) == ["last.pth"]


def test_stale_temporaries_are_swept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(payload(1))
    for name in ("last.pth.partial", "config.yml.partial", "next.pth"):
        (tmp_path / name).write_bytes(b"half")
    assert folder.sweep() == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pth"]
    assert folder.sweep() == 0


# ---------------------------------------------------------------- names and retention


@pytest.mark.parametrize(
    ("save_last", "save_step", "kept"), [(1, 1, [6]), (3, 1, [4, 5, 6]), (4, 2, [4, 6]), (0, 1, [])]
)
def test_epoch_files_are_kept_as_asked(save_last: int, save_step: int, kept: list[int], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my.run+1")
    folder.path.mkdir()
    (folder.path / "other_epoch_1.pth").write_bytes(b"")  # not this run's
    for epoch in range(1, 7):
        folder.save(payload(epoch))
        folder.keep_epoch(epoch, save_last=save_last, save_step=save_step)
    assert [epoch for epoch, _ in folder.epochs()] == kept
    for epoch, file in folder.epochs():
        assert file.name == f"my.run+1_epoch_{epoch}.pth"
        assert load(file)["state"]["step"] == epoch
    assert (folder.path / "other_epoch_1.pth").exists()


def test_aliases_work_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = RunFolder(tmp_path)
    folder.save(payload(1))
    folder.mark_best()
    folder.save(payload(2))
    assert [load(file)["state"]["step"] for file in (folder.best, folder.previous, folder.last)] == [1, 1, 2]


def test_a_second_run_on_the_folder_refuses(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    code = "import sys; from pathlib import Path; from checkpoint import RunLock; RunLock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "another process is training in" in second.stderr

    def take() -> None:
        RunLock(tmp_path)

    assert in_a_fork(take) == 3
    lock.release()
    assert in_a_fork(take) == 0


def test_a_lock_dies_with_its_process_and_not_with_the_children_it_leaves(tmp_path: Path) -> None:
    """Data workers are forks: they outlive a killed run for seconds, and must not hold its folder."""
    child = tmp_path / "child"

    def act() -> None:
        held = RunLock(tmp_path)
        if (pid := os.fork()) == 0:
            import time

            time.sleep(30)
            os._exit(0)
        child.write_text(str(pid))
        assert held
        os._exit(9)

    assert in_a_fork(act) == 9
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(int(child.read_text()), 9)


# ---------------------------------------------------------------- files of others


class Gadget:
    """Runs a shell command when it is unpickled."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    import builtins
    import runpy
    import timeit

    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    (tmp_path / "evil.py").write_text(code)
    gadgets = {
        "system": (os.system, (f"touch {canary}",)),
        "exec": (builtins.exec, (code,)),
        "eval": (builtins.eval, (code,)),
        "popen": (subprocess.Popen, (["touch", str(canary)],)),
        "run": (subprocess.check_output, (["touch", str(canary)],)),
        "runpy": (runpy.run_path, (str(tmp_path / "evil.py"),)),
        "touch": (Path.touch, (canary,)),
        "open": (builtins.open, (str(canary), "w")),
        "spawn": (os.spawnlp, (os.P_WAIT, "touch", "touch", str(canary))),
        "timeit": (timeit.timeit, (code, "pass", timeit.default_timer, 1)),
    }
    for name, call in gadgets.items():
        content = {"model": {"w": torch.zeros(2)}, "state": Gadget(call)}
        for kind, write in (
            ("zip", lambda path, content=content: torch.save(content, path)),
            ("legacy", lambda path, content=content: torch.save(content, path, _use_new_zipfile_serialization=False)),
            ("pickle", lambda path, content=content: path.write_bytes(pickle.dumps(content))),
            ("ours", lambda path, content=content: save(path, content)),
        ):
            path = tmp_path / f"{name}_{kind}.pth"
            write(path)
            for read in (load, load_weights, load_model):
                with pytest.raises(UserError):
                    read(path)
            assert not canary.exists(), f"{name} in {kind} was run"


def test_options_beside_weights_are_read(tmp_path: Path) -> None:
    """RF-DETR's published files hold the command line that they were trained with."""
    options = {"lr": 1e-4, "class_names": ["disc"], "output_dir": Path("/somewhere/out")}
    for kind in (argparse.Namespace, SimpleNamespace):
        torch.save({"model": {"w": torch.ones(2)}, "args": kind(**options)}, tmp_path / "weights.pth")
        content = load_weights(tmp_path / "weights.pth")
        assert content["model"]["w"].tolist() == [1, 1]
        assert {name: str(value) for name, value in vars(content["args"]).items()} == {
            name: str(value) for name, value in options.items()
        }


def test_load_model_takes_a_run_folder_or_a_file_and_prefers_the_average(tmp_path: Path) -> None:
    from models import create_model

    settings = {"backbone": "pvt_v2_b0", "decoder_attention": "none", "multi_scale_input": "none"}
    model = create_model("birefnet", **settings)
    trained, average = model.state_dict(), {k: v + 1 for k, v in model.state_dict().items()}
    meta = {"family": "birefnet", "settings": settings, "task": "binary", "size": [64, 64]}
    save(tmp_path / "last.pth", {"meta": meta, "model": trained, "ema": average})
    save(tmp_path / "best.pth", {"meta": meta, "model": trained, "ema": None})
    for path, expected in ((tmp_path, trained), (tmp_path / "last.pth", average)):
        loaded, said = load_model(path)
        assert not difference(dict(loaded.state_dict()), dict(expected))
        assert said == meta
        assert not loaded.training
    for missing in (tmp_path / "absent", tmp_path / "absent.pth"):
        with pytest.raises(CheckpointError, match="absent"):
            load_model(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no best\.pth or last\.pth"):
        load_model(tmp_path / "empty")


def test_a_foreign_checkpoint_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    for name, content in (
        ("list.pth", [1, 2]),
        ("numbers.pth", {"a": 1}),
        ("other.pth", {"conv.weight": torch.ones(3)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError) as raised:
            load_model(tmp_path / name)
        assert "\n" not in str(raised.value)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        load_weights(tmp_path / "bad.safetensors")


def test_files_are_as_readable_as_the_user_lets_them_be(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", payload(1))
    (tmp_path / "b").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.pth", "b")]
    assert modes[0] == modes[1]

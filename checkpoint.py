"""What a checkpoint holds, saved whole or not at all, loaded only when proven intact.

A checkpoint is a torch zip file of plain dicts, lists, numbers, text and tensors, followed by a trailer: eight bytes
of mark and the sha256 of everything before. The digest lies inside the file because a second file could not be
renamed in the same instant; torch ignores bytes after the zip. Nothing is ever unpickled beyond `weights_only=True`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import torch

from errors import UserError

MARK = b"MASKWR01"
TRAILER = len(MARK) + hashlib.sha256().digest_size
TEMPORARY = ".partial"
# What other programs leave beside their weights and does nothing when it is built: options and paths.
INERT: list[Any] = [argparse.Namespace, SimpleNamespace]
INERT += [
    (PurePosixPath, f"{room}.{kind}Path") for room in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")
]
RUN_FILES = ("config.yml", "run.json", "train.log", "metrics.jsonl", "metrics.csv", "events.jsonl", "validation.json",
             "report.html", "status.txt")  # fmt: skip
RUN_FOLDERS = ("pictures", "tensorboard", "comet", "wandb")


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or not there."""


# ---------------------------------------------------------------- one file


class _HashingWriter:
    """A file object that hashes what passes through it; torch.save writes a zip front to back."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` to `path` atomically: temporary sibling, fsync, rename, fsync of the folder.

    Raises `UserError` when the disk is full or the folder cannot be written; the old file is then untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            writer = _HashingWriter(file)
            torch.save(payload, writer)  # type: ignore[arg-type]
            file.write(MARK + writer.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save the checkpoint {path}: {error.strerror}; the last one saved is intact") from None


def load(path: Path) -> dict[str, Any]:
    """The payload of a checkpoint of this program, on the CPU; raises `CheckpointError` when it is not intact."""
    try:
        with open(path, "rb") as file:
            verify(path, file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is no readable checkpoint: {type(error).__name__}") from None


def verify(path: Path, file: Any) -> None:
    """Raise `CheckpointError` unless the trailer matches the content."""
    length = os.fstat(file.fileno()).st_size - TRAILER
    digest = hashlib.sha256()
    left = max(0, length)
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    trailer = file.read(TRAILER)
    if length <= 0 or not trailer.startswith(MARK):
        raise CheckpointError(f"{path} is cut short or was not written by this program")
    if trailer[len(MARK) :] != digest.digest():
        raise CheckpointError(f"{path} is damaged: its content does not match the digest saved with it")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(path.name + TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, or {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------- the checkpoints of a run


class RunFolder:
    """The checkpoints of one run: `last.pth`, the one before it, `best.pth` and the epochs kept."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.last, self.previous, self.best = path / "last.pth", path / "previous.pth", path / "best.pth"
        self.overwriting = path / ".overwriting"  # there as long as the run that is to be replaced is, too

    def save(self, payload: dict[str, Any]) -> None:
        """Save as `last.pth`; what was last stays as `previous.pth`, so one flipped bit costs one save."""
        fresh = self.path / "next.pth"
        save(fresh, payload)
        if self.last.exists():
            _alias(self.last, self.previous)
        os.replace(fresh, self.last)
        _sync_folder(self.path)

    def adopt(self, file: Path) -> None:
        """Let `last.pth` be the checkpoint that a run resumed from, in place of a damaged one."""
        if file != self.last:
            _alias(file, self.last)

    def mark_best(self) -> None:
        """Let `best.pth` be what `last.pth` is now."""
        _alias(self.last, self.best)

    def keep_epoch(self, epoch: int, *, save_last: int, save_step: int) -> None:
        """Keep `last.pth` as this epoch's file; drop files older than the last `save_last` epochs."""
        if save_last and epoch % save_step == 0:
            _alias(self.last, self.path / f"{self.name}_epoch_{epoch}.pth")
        for old, file in self.epochs():
            if old <= epoch - save_last:
                file.unlink()

    def epochs(self) -> list[tuple[int, Path]]:
        """(epoch, file) of the epoch files, oldest first."""
        pattern = re.compile(re.escape(self.name) + r"_epoch_(\d+)\.pth")
        found = [(int(m[1]), file) for file in self.path.iterdir() if (m := pattern.fullmatch(file.name))]
        return sorted(found)

    def note_pieces(self, rank: int, pieces: int) -> None:
        """Let all ranks take their micro-batches in so many pieces when the run is started again."""
        write_text(self.path / f"pieces_{rank}.txt", f"{pieces}\n")

    def noted_pieces(self) -> int:
        """The most pieces that any rank noted down."""
        return max((int(file.read_text()) for file in self.path.glob("pieces_*.txt")), default=1)

    def sweep(self) -> int:
        """Remove temporaries that a kill left behind; returns how many."""
        stale = [*self.path.glob(f"*{TEMPORARY}"), self.path / "next.pth"]
        present = [file for file in stale if file.exists()]
        for file in present:
            file.unlink()
        return len(present)

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "config.yml").exists() or any(self.path.glob("*.pth"))

    def is_occupied(self) -> bool:
        """Whether the folder holds anything but a lock."""
        return self.path.is_dir() and any(item.name != ".lock" for item in self.path.iterdir())

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that lies in its folder."""
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink() and item.name in RUN_FOLDERS:
                shutil.rmtree(item)
            elif item.suffix == ".pth" or item.name in RUN_FILES or re.fullmatch(r"pieces_\d+\.txt", item.name):
                item.unlink()
        self.overwriting.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from, intact or not."""
        return any(True for _ in self._candidates())

    def newest(self) -> tuple[Path, dict[str, Any], list[str]] | None:
        """(file, payload, sentences about damaged ones) of the newest intact checkpoint, or None without any."""
        damaged: list[str] = []
        for file in self._candidates():
            try:
                return file, load(file), damaged
            except CheckpointError as error:
                damaged.append(str(error))
        if damaged:
            raise CheckpointError("no intact checkpoint is left: " + "; ".join(damaged))
        return None

    def _candidates(self) -> Iterator[Path]:
        ordered = [self.last, self.previous, *(file for _, file in reversed(self.epochs())), self.best]
        yield from (file for file in ordered if file.exists())


def _alias(source: Path, target: Path) -> None:
    """Let `target` be the file `source` is now, atomically; a hard link where the file system has them."""
    temporary = target.with_name(target.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # renaming does nothing where both names are one file already


class RunLock:
    """One process at a time may write into a run folder; the system lets go when the process dies."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / ".lock", "w")  # noqa: SIM115 — held until the run ends
        except OSError as error:
            raise UserError(f"cannot write into the run folder {folder}: {error.strerror}; set output_dir") from None
        try:
            # Not flock: a data worker, being a fork, would hold that on for seconds after its parent was killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {folder}; wait for it, or choose another name") from None

    def release(self) -> None:
        self._file.close()


# ---------------------------------------------------------------- weights of any origin


def load_weights(path: Path) -> dict[str, Any]:
    """The content of a weights file of any program: `.safetensors`, or a torch file of tensors in plain containers.

    Raises `CheckpointError` for what is missing, damaged, or would need to run code to be read.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise CheckpointError(f"{path} is no readable safetensors file: {error}") from None
    try:
        with open(path, "rb") as file:
            file.seek(-min(TRAILER, os.fstat(file.fileno()).st_size), os.SEEK_END)
            is_ours = file.read(len(MARK)) == MARK
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals(INERT):
            content = load(path) if is_ours else torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read as plain weights (nothing in it was run): {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of weights by name")
    if not is_ours and "format" in content and "meta" in content:
        raise CheckpointError(f"{path} is damaged: the digest at its end is gone")
    return content


def find_checkpoint(path: Path) -> Path:
    """A checkpoint file, or the best (else the last) one of a run folder."""
    if path.is_dir():
        for name in ("best.pth", "last.pth", "previous.pth"):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"no best.pth or last.pth in the folder {path}")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    return path


def load_model(path: Path) -> tuple[Any, dict[str, Any]]:
    """(model in evaluation mode on the CPU, its `meta`) from a run folder or a checkpoint of this program.

    The averaged weights are used where the run kept some. An official weights file is accepted too: family and
    settings are then inferred from its keys. Raises `CheckpointError`.
    """
    from models import FAMILIES, create_model, infer_family

    file = find_checkpoint(path)
    content = load_weights(file)
    if "meta" in content and "model" in content:
        meta = content["meta"]
        try:
            model = create_model(meta["family"], **meta["settings"])
            model.load_state_dict(content.get("ema") or content["model"])
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{file} does not fit its own settings: {reason}") from None
    else:
        family, settings = infer_family(content)
        model = create_model(family, **settings)
        report = model.load_official(content)
        if report.missing or report.reshaped:
            raise CheckpointError(f"{file} does not fit {family}: {report.summary()}")
        task = next(iter(FAMILIES[family].criteria))
        meta = {"family": family, "settings": settings, "task": task, "size": model.default_size,
                "class_names": model.official_class_names, "experiment_name": file.stem}  # fmt: skip
    return model.eval(), meta


# ---------------------------------------------------------------- the state of a run


@dataclass
class RunState:
    """All that a resume needs beside weights, optimizer, schedule and scaler: plain values only.

    `step` counts optimizer steps tried, `skipped` those that a non-finite gradient undid; `micro_step` is the
    position in the epoch. The randomness of every rank is a pure function of (seed, step, micro-step, rank) and of
    (seed, epoch, sample), so there is nothing of it to keep.
    """

    step: int = 0
    epoch: int = 0
    micro_step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    warned_norm: bool = False
    meter: dict[str, Any] = field(default_factory=dict)
    composition: dict[str, int] = field(default_factory=dict)
    pieces: int = 1  # that each micro-batch is taken in, since memory ran out
    records: int = 0
    validated_step: int = -1
    best: float | None = None
    best_step: int = -1
    waited: int = 0
    base: dict[str, float] = field(default_factory=dict)  # metrics of the trained model that the run started from
    validation: dict[str, float] = field(default_factory=dict)  # metrics of the last validation

    @property
    def applied(self) -> int:
        """Optimizer steps that moved the weights: the position in the schedule."""
        return self.step - self.skipped

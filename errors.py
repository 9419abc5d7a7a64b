"""Errors that a user can cause, and how a command ends on them.

A room of its own because the configuration, the readers and the checkpoints all raise it, and the
configuration must not import torch.
"""

from __future__ import annotations

import difflib
import errno
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


STOPPED = 75  # exit code of a run that a signal ended: EX_TEMPFAIL, "the same command goes on later"


class UserError(Exception):
    """Something the user can mend: the message says what, where and how, in one plain sentence."""

    exit_code = 2


class TryAgain(UserError):
    """The same command with `--resume` can go on from here, and a launcher that restarts does so by itself."""

    exit_code = STOPPED


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the closest known word, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f" (did you mean {close[0]}?)" if close else ""


HIDDEN: set[str] = set()


def hide(secrets: Iterable[str]) -> None:
    """Never print these, whatever quotes them: a command's last words go through `redacted`."""
    HIDDEN.update(secrets)


def redacted(text: str) -> str:
    """`text` without any secret, the longest first, as one may hold another."""
    for secret in sorted(HIDDEN, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SHARED_MEMORY = 78  # exit code of a data worker that could not hand over a batch
FULL_SHARED_MEMORY = ("is killed by signal: Bus error", "unable to allocate shared memory",
                      f"unexpectedly with exit code {NO_SHARED_MEMORY}")  # fmt: skip


def explained(error: Exception) -> Exception:
    """What the system did to a run, as a `UserError`; any other error as it is."""
    text = f"{error} {error.__cause__ or ''}"
    workers_died = "DataLoader worker (pid" in text  # as torch says
    if any(words in text for words in FULL_SHARED_MEMORY) or (is_full_disk(error) and shared_memory_is_full()):
        return UserError("the data-loading processes ran out of shared memory (/dev/shm): enlarge it (docker run "
                         "--shm-size), or lower data.num_workers; --num_workers 0 needs none")  # fmt: skip
    if is_full_disk(error):
        name = getattr(error, "filename", None) or "a file"
        return UserError(f"the disk is full: {name} cannot be written; what was saved is intact")
    if "DataLoader timed out" in text:
        return UserError("a data-loading process was stuck for distributed.timeout_minutes; is the data on a network?")
    if workers_died:
        return UserError("a data-loading process was killed, most often because memory ran out: lower "
                         "data.num_workers or train.batch_size, and go on with --resume")  # fmt: skip
    if is_out_of_memory(error):
        return UserError(f"out of memory: lower the batch size or data.size ({text.splitlines()[0][:200]})")
    return error


def is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in FULL_DISK


def shared_memory_is_full() -> bool:
    """Whether the room that processes share, where there is one, has less than a MiB left."""
    try:
        return shutil.disk_usage("/dev/shm").free < 2**20
    except OSError:
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; torch has no one type for it."""
    known = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in known))


def run_command(main: Callable[[], T]) -> T:
    """Run a command's `main`; a `UserError` ends in its sentence and exit code, `--debug` keeps the traceback.

    A bug keeps its traceback, too, with exit code 1; no secret stands in any of them.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        known = explained(error)
        if isinstance(known, UserError) and "--debug" not in sys.argv:
            print(redacted(f"error: {known}"), file=sys.stderr)
            sys.exit(known.exit_code)
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)

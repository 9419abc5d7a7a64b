"""Errors that a user can cause, and how a command ends on them.

A room of its own because the configuration, the readers and the checkpoints all raise it, and the
configuration must not import torch.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: the message says what, where and how, in one plain sentence."""


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


def run_command(main: Callable[[], T]) -> T:
    """Run a command's `main`; a `UserError` ends in its sentence and exit code 2, `--debug` keeps the traceback.

    A bug keeps its traceback, too, with exit code 1; no secret stands in any of them.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, UserError) and "--debug" not in sys.argv:
            print(redacted(f"error: {error}"), file=sys.stderr)
            sys.exit(2)
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)

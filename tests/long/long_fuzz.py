"""Ten thousand mutations of a COCO json: each ends in faults or in samples, never in a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slow
PART = 1000


def fuzz(tests: str, first: int, folder: Path) -> None:
    """The fuzz of a test file, in a process of its own: none of so many files may end it."""
    program = f"from tests.{tests} import fuzz; fuzz({str(folder)!r}, {first}, {first + PART})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > PART


@pytest.mark.parametrize("first", range(0, 10_000, PART))
def test_row_38_malformed_coco(first: int, tmp_path: Path) -> None:
    fuzz("test_readers_coco", first, tmp_path)


@pytest.mark.parametrize("first", range(0, 10_000, PART))
def test_malformed_clips(first: int, tmp_path: Path) -> None:
    """The same with SA-V's json, and with one of COCO whose objects are linked."""
    fuzz("test_readers_video", first, tmp_path)

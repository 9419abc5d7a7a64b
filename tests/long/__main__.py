"""The fault matrix in full, and the tests that are marked slow, minutes to an hour: `python -m tests.long [-k WORD]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    files = sorted(str(file) for file in Path(__file__).parent.glob("long_*.py"))
    tests = str(Path(__file__).parent.parent)
    sys.exit(pytest.main([tests, *files, "-m", "slow", "-v", "--durations=0", *sys.argv[1:]]))

"""The fault matrix in full, and the tests that are marked slow, for hours: `python -m tests.long [-k WORD]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    tests, files = str(Path(__file__).parent.parent), "python_files=test_*.py long_*.py"
    sys.exit(pytest.main([tests, "-o", files, "-m", "slow", "-v", "--durations=0", *sys.argv[1:]]))

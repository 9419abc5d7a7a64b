"""The fault matrix in full, minutes to an hour: `python -m tests.long [-k WORD]`. No part of the ordinary suite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    files = sorted(str(file) for file in Path(__file__).parent.glob("long_*.py"))
    sys.exit(pytest.main([*files, "-v", "--durations=0", *sys.argv[1:]]))

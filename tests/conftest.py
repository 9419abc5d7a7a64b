"""What all tests share: the repository root on the path, and the small data beside the checkout where there is any."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums have one order, and the tests run side by side

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data and goldens beside the checkout are absent")
needs_cuda = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_secret_outlives_its_test() -> Iterator[None]:
    """A process has one configuration; here many follow each other, with words for keys that others may print."""
    yield
    import errors

    errors.HIDDEN.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

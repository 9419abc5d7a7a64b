"""Every family on three ranks, one of which is killed again and again: the end is bitwise that of an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import test_resume
from tests.helpers import Zygote

pytestmark = pytest.mark.slow
data, toy, zygote = test_resume.data, test_resume.toy, test_resume.zygote  # fixtures


@pytest.mark.parametrize(
    ("family", "kills"), [("toy", 5), ("birefnet", 3), ("segformer", 3), ("rfdetr", 3), ("sam2", 3), ("classifier", 3)]
)
def test_rows_1_4_and_9_three_ranks(family: str, kills: int, data: Path, zygote: Zygote, tmp_path: Path) -> None:
    test_resume.test_a_run_killed_at_random_moments_ends_bitwise_like_the_unbroken_one(
        family, 3, kills, data, zygote, tmp_path
    )

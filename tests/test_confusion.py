"""The picture of a confusion matrix: shares of rows as blue, whatever the number of classes."""

from __future__ import annotations

import numpy as np
import pytest

from confusion import BLUE, PAPER, draw_confusion


@pytest.mark.parametrize("classes", [2, 21, 81, 255])
def test_the_matrix_lies_at_the_lower_right_and_its_colours_are_shares(classes: int) -> None:
    counts = np.eye(classes, dtype=np.int64) * 7
    counts[1] = 0  # a class that is not there
    picture = draw_confusion(counts, [f"class {i}" for i in range(classes)])
    cell = max(4, min(72, 640 // classes))
    matrix = picture[-8 - cell * classes : -8, -8 - cell * classes : -8]
    corners = matrix[cell - 2 :: cell, cell - 2 :: cell].astype(int)  # free of numbers and lines
    assert corners.shape == (classes, classes, 3)
    expected = np.where((counts > 0)[..., None], BLUE, PAPER)
    assert np.abs(corners - expected).max() <= 1


def test_names_of_any_length_and_script_fit() -> None:
    picture = draw_confusion(np.ones((3, 3), np.int64), ["a" * 300, "日本", ""])
    assert picture.shape[0] == picture.shape[1] < 700

"""Arg-max in bands against the arg-max of the whole resized map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maps import argmax_at, bands


@pytest.mark.parametrize("size", [(64, 96), (61, 50), (17, 23), (5, 9), (1, 1)])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_bands_are_the_whole_map(size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 21, 16, 23, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("maps.BAND_VALUES", 2 * 21 * size[1] * rows)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    pieces = list(bands(logits, size))
    assert [piece.shape[2] for piece in pieces[:-1]] == [rows] * (len(pieces) - 1)
    assert torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)
    classes = argmax_at(logits, size)
    assert classes.dtype == torch.uint8
    assert torch.equal(classes.long(), whole.argmax(1))


def test_many_classes_and_half_precision() -> None:
    logits = torch.zeros(1, 300, 4, 4, dtype=torch.bfloat16)
    logits[:, 299, :, 2:] = 1
    classes = argmax_at(logits, (8, 8))
    assert classes.dtype == torch.int64
    assert (classes[0, :, 4:] == 299).all()

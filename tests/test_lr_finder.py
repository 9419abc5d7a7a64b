"""The learning-rate sweep: the rates it sets, when it ends, what it suggests, and that the picture shows it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import lr_finder


def test_rates_rise_by_equal_factors_and_groups_keep_their_ratio() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 1e-3}, {"params": [model.bias], "lr": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    sweep = lr_finder.RisingRate(optimizer, steps=8)
    rates = []
    for step in range(8):
        sweep.set(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == pytest.approx([1e-7, 1e-8])
    assert rates[-1] == pytest.approx([1.0, 0.1])
    assert [high / low for (low, _), (high, _) in itertools.pairwise(rates)] == pytest.approx([10] * 7)


def test_smoothing_has_no_pull_to_zero() -> None:
    assert lr_finder.smooth([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert lr_finder.smooth([4.0, 6.0], decay=0.5) == pytest.approx([4.0, (0.5 * 2 + 3) / 0.75])


def a_sweep(noise: float) -> tuple[list[float], list[float]]:
    """A loss that falls fastest at 1e-3, is flat below 1e-5 and explodes above 1e-1."""
    rates = list(np.logspace(-7, 0, 100))
    generator = np.random.default_rng(0)
    losses = [10 - 8 / (1 + math.exp(-3 * (math.log10(rate) + 3))) + noise * generator.normal() for rate in rates]
    return rates, [loss + (0 if rate < 0.1 else 500 * (rate - 0.1)) for rate, loss in zip(rates, losses, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_suggestion_is_where_the_loss_falls_fastest(noise: float) -> None:
    rates, losses = a_sweep(noise)
    suggestion = lr_finder.suggest(rates, losses)
    assert suggestion is not None
    assert abs(math.log10(suggestion) + 3) < 0.35


def test_a_loss_that_never_falls_gives_no_suggestion() -> None:
    assert lr_finder.suggest(list(np.logspace(-7, 0, 50)), list(range(50))) is None
    assert lr_finder.suggest([1e-7, 1e-6], [math.nan, math.nan]) is None


def test_the_sweep_ends_when_the_loss_explodes() -> None:
    assert not lr_finder.has_exploded([1.0] * 20)
    assert lr_finder.has_exploded([1.0] * 20 + [1e3] * 2)
    assert lr_finder.has_exploded([1.0, math.nan])


def test_the_picture_marks_the_suggestion() -> None:
    rates, losses = a_sweep(0.5)
    with_mark, without = (lr_finder.draw(rates, [*losses[:-1], math.inf], mark) for mark in (1e-3, None))
    assert with_mark.shape == (lr_finder.HEIGHT, lr_finder.WIDTH, 3)
    columns = np.flatnonzero((with_mark != without).any((0, 2)))
    place = lr_finder.MARGIN + 4 / 7 * (lr_finder.WIDTH - 1.5 * lr_finder.MARGIN)  # four of seven decades
    assert abs(int(columns[0]) - place) <= 2  # the line is antialiased

"""Meters, flags that come late, precision, devices and seeds."""

from __future__ import annotations

import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn

import utils
from errors import UserError
from tests.helpers import difference
from utils import DelayedFlags, Meter, StopSignal, World


def test_a_meter_averages_what_is_finite() -> None:
    meter = Meter()
    assert meter.read() == ({}, {}, {})
    for loss, score in ((2.0, 0.5), (math.nan, 0.25), (4.0, math.inf), (6.0, 0.75)):
        meter.add(["loss", "score"], torch.tensor([loss, score]))
    means, last, sums = meter.read()
    assert means == {"loss": 4.0, "score": 0.5}
    assert last == {"loss": 6.0, "score": 0.75}
    assert sums == {"loss": 12.0, "score": 1.5}


def test_a_restored_meter_is_the_same_meter_and_goes_on_as_it() -> None:
    generator = torch.Generator().manual_seed(0)
    meter = Meter()
    for _ in range(7):
        meter.add(["a", "b"], torch.randn(2, generator=generator) * 1e3)
    meter.add(["a", "b"], torch.tensor([1.0, math.nan]))
    again = Meter.restore(meter.state())
    assert not difference(list(again.read()), list(meter.read()))
    for _ in range(5):
        values = torch.randn(2, generator=generator)
        meter.add(["a", "b"], values)
        again.add(["a", "b"], values)
    assert not difference(again.state(), meter.state())
    assert Meter.restore(Meter().state()).read() == ({}, {}, {})


def test_flags_are_taken_once_and_are_those_of_their_time() -> None:
    flags = DelayedFlags()
    assert flags.take() is None
    value = torch.tensor([1.0, 0.0, 2.5])
    flags.put(value)
    value.zero_()  # the step after
    assert flags.take() == [1.0, 0.0, 2.5]
    assert flags.take() is None


def test_the_gradient_norm_is_that_of_all_gradients_together() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.full((2, 2), 2.0)
    assert utils.gradient_norm(weights).item() == 5.0
    weights[1].grad[0, 0] = math.inf
    assert utils.gradient_norm(weights).item() == math.inf


def test_seeds_depend_on_the_numbers_alone() -> None:
    def draw() -> tuple[list[float], float, float]:
        return torch.rand(2).tolist(), random.random(), float(np.random.rand())

    utils.seed_everything(7, 1, 2, 0)
    first = draw()
    draw()
    utils.seed_everything(7, 1, 2, 0)
    assert draw() == first
    others = []
    for numbers in ((7, 1, 2, 1), (7, 1, 3, 0), (7, 2, 1, 0), (8, 1, 2, 0)):
        utils.seed_everything(*numbers)
        others.append(draw())
    values = [value for drawn in [first, *others] for value in (drawn[0][0], drawn[1], drawn[2])]
    assert len(set(values)) == 15


def test_precision_and_device_are_chosen_or_refused() -> None:
    cpu = torch.device("cpu")
    assert utils.choose_precision("auto", cpu).dtype is None
    half = utils.choose_precision("fp16", cpu)
    assert (half.dtype, half.needs_scaler) == (torch.float16, True)
    brain = utils.choose_precision("bf16", cpu)
    assert (brain.dtype, brain.needs_scaler) == (torch.bfloat16, False)
    with brain.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype is torch.bfloat16
    with utils.choose_precision("no", cpu).autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype is torch.float32
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        utils.choose_precision("fp8", cpu)
    with pytest.raises(UserError, match="--device cpu"):
        utils.pick_device("cuda:99")


def test_norm_statistics_are_those_that_a_forward_pass_writes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    model[3].eval()
    before = [b.clone() for b in model.buffers()]
    kept = [buffer.clone() for buffer in utils.norm_statistics(model)]
    model(torch.randn(2, 3, 5, 5))
    for buffer, value in zip(utils.norm_statistics(model), kept, strict=True):
        buffer.copy_(value)
    assert len(kept) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_one_process_is_its_own_world() -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    tensor = torch.ones(2)
    assert world.sum_(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert world.agree({"a": 1}) == {"a": 1}
    assert world.is_main_process
    world.barrier()


def test_a_stop_signal_is_noted_and_given_back() -> None:
    heard: list[int] = []
    mine = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        stop = StopSignal()
        assert not stop
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
        assert stop.name == "SIGUSR1"
        stop.restore()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, mine)

"""Where a step's time goes: the shares against sleeps of known length, and the hints."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from timing import StepClock, exposed_exchange, hint_about

CPU = torch.device("cpu")


def run_steps(clock: StepClock, wait: float, work: float, between: float, model: Any = None) -> dict[str, float]:
    def loader() -> Any:
        for number in range(4):
            time.sleep(wait)
            yield number

    for _ in clock.batches(loader()):
        with clock.step():
            time.sleep(work)
        time.sleep(between)
    return clock.read(model)


def test_shares_are_those_of_the_time_and_add_up() -> None:
    shares = run_steps(StepClock(CPU), wait=0.02, work=0.05, between=0.01)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["communication"] == 0
    assert shares["device"] > shares["data"] > shares["host"] > 0


def test_what_ddp_measured_is_taken_from_the_device() -> None:
    seconds = {"avg_backward_comm_time": 30_000_000, "avg_backward_compute_comm_overlap_time": 10_000_000}
    model: Any = SimpleNamespace(_get_ddp_logging_data=lambda: seconds)
    assert exposed_exchange(model) == pytest.approx(0.02)
    shares = run_steps(StepClock(CPU), wait=0, work=0.04, between=0, model=model)
    assert shares["communication"] == pytest.approx(4 * 0.02 / (4 * 0.04), rel=0.3)
    assert sum(shares.values()) == pytest.approx(1)
    seconds["avg_backward_comm_time"] = 10**12  # a sample from the warm-up cannot exceed the time there was
    assert 0 < run_steps(StepClock(CPU), 0, 0.01, 0, model)["communication"] <= 1


def test_a_reading_begins_anew_and_a_restart_forgets() -> None:
    clock = StepClock(CPU)
    with clock.step():
        time.sleep(0.05)
    time.sleep(0.05)
    clock.restart()
    with clock.step():
        time.sleep(0.02)
    shares = clock.read(None)  # type: ignore[arg-type]
    assert shares["device"] > 0.9
    assert clock.read(None) == {}  # type: ignore[arg-type]


def test_hints_name_what_is_wasteful_and_how_to_mend_it() -> None:
    balanced = {"data": 0.05, "host": 0.05, "device": 0.9, "communication": 0.0}
    assert hint_about(balanced, CPU) is None
    assert hint_about({}, CPU) is None
    name, text = hint_about({**balanced, "data": 0.6}, CPU) or ("", "")
    assert name == "data"
    assert "60 %" in text
    assert "data.num_workers" in text
    assert hint_about({**balanced, "host": 0.6}, CPU) is None  # there the host is the device
    assert (hint_about({**balanced, "host": 0.6}, torch.device("cuda")) or ("",))[0] == "host"
    assert "grad_accum_steps" in (hint_about({**balanced, "communication": 0.4}, CPU) or ("", ""))[1]

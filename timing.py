"""Where the time of training goes: shares of the wall time between two printed lines, and a hint when one is wasteful.

Nothing here makes the host or the device wait: what is on a GPU is timed by events on its stream, which are read when a
line is printed and the host waits anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")

# A share of the wall time from which on there is something to gain, and what to do about it.
HINTS = {
    "data": (0.25, "waiting for data: raise data.num_workers, set data.load_all, or store the images smaller"),
    "host": (0.25, "the host, between the device's work: train.compile, a larger batch or a higher "
                   "logging.log_frequency give the device more to do at once"),
    "communication": (0.30, "exchanging gradients: a larger train.batch_size or more train.grad_accum_steps exchange "
                            "them less often"),
}  # fmt: skip


class StepClock:
    """Shares of the wall time: `data`, `host`, `device` and `communication`, which add up to 1.

    `device`: forward, backward and update. On a CPU that is the time inside the step, as host and device are one.
    `communication`: the part of the gradient exchange that no computation hides, as DDP measures it on the steps that
    it samples. `data`: waiting for batches while the device had nothing to do. `host`: what is left.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begin anew, forgetting what passed: a validation is not a step."""
        self.began = time.perf_counter()
        self.waited = self.worked = 0.0
        self.steps = 0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches, its time counted as `data`."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step."""
        self.steps += 1
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.worked += time.perf_counter() - began

    def read(self, model: nn.Module) -> dict[str, float]:
        """The shares since the last reading; the device must have finished the last step. {} without a step."""
        wall = time.perf_counter() - self.began
        at_work = self.worked + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        exchanged = min(exposed_exchange(model) * self.steps, at_work)
        waited = min(self.waited, max(0.0, wall - at_work))  # a GPU may work on while the host waits for data
        steps = self.steps
        self.restart()
        if not steps:
            return {}
        shares = {"data": waited, "host": max(0.0, wall - at_work - waited), "device": at_work - exchanged,
                  "communication": exchanged}  # fmt: skip
        return {name: seconds / wall for name, seconds in shares.items()}


def exposed_exchange(model: nn.Module) -> float:
    """Seconds a step that DDP's backward waits for gradients from other ranks with nothing left to compute."""
    measure: Any = getattr(model, "_get_ddp_logging_data", None)
    data = measure() if measure else {}
    return max(0, data.get("avg_backward_comm_time", 0) - data.get("avg_backward_compute_comm_overlap_time", 0)) / 1e9


def hint_about(times: dict[str, float], device: torch.device) -> tuple[str, str] | None:
    """(the wasteful part, a sentence about it), or None. The host's own share means nothing where it is the device."""
    for name, (limit, advice) in HINTS.items():
        if times.get(name, 0) > limit and not (name == "host" and device.type == "cpu"):
            return name, f"{100 * times[name]:.0f} % of the time goes into {advice}"
    return None

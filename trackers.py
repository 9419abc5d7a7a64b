"""The trackers, TensorBoard, Comet ML and Weights & Biases: one callback that tells each of them, in its own process.

What stands there is tracker_process.py. A tracker can be slow, dead or broken without the run noticing.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gallery import Picture
from settings import TrackingSettings
from tracker_process import TRACKERS
from tracking import Callback, Event, Log, RunInfo, StepRecord, ValidationRecord

PROGRAM = Path(__file__).with_name("tracker_process.py")
PATIENCE, PATIENCE_WITH_WEIGHTS = 30.0, 600.0  # seconds for all trackers together, at the end of a run


class Trackers(Callback):
    """Tells the trackers that the settings switch on what happens in a run."""

    def __init__(self, settings: TrackingSettings, log: Log, patience: float | None = None) -> None:
        self.settings, self.log, self.patience = settings, log, patience
        self.trackers: list[Background] = []
        self.run_dir = Path()

    def on_run_start(self, run: RunInfo) -> None:
        self.run_dir = run.run_dir.resolve()
        told = {
            "name": run.name, "run_id": run.run_id, "run_dir": str(self.run_dir), "step": run.step,
            "resumed": run.resumed, "config": run.config,
        }  # fmt: skip
        self.trackers = [Background(key, settings, told, self.log) for key, settings in enabled(self.settings).items()]

    def on_step(self, record: StepRecord) -> None:
        values = {f"train/{name}": value for name, value in record.last.items()}
        values |= {f"time/{name}": share for name, share in record.times.items()}
        values |= {"lr": record.lr, "grad_norm": record.grad_norm, "steps_per_second": record.steps_per_second}
        self._tell("scalars", "train", record.step, values)

    def on_validation(self, record: ValidationRecord) -> None:
        kind = "base" if record.is_base else "val"
        values = {f"val/{name}": value for name, value in record.metrics.items()}
        if not record.is_base:
            values |= {f"val/{name}_vs_base": record.metrics[name] - value for name, value in record.base.items()}
        self._tell("scalars", kind, record.step, values)
        scores = [score for row in record.rows if math.isfinite(score := row["scores"][record.primary])]
        if scores:
            self._tell("histogram", kind, record.step, {f"val/{record.primary} of each sample": scores})
        if pictures := [*named("best", record.best), *named("worst", record.worst), *figures(record)]:
            self._tell("pictures", kind, record.step, pictures)

    def on_event(self, event: Event) -> None:
        self._tell("text", "event", event.step, f"{event.kind}: {event.text}")

    def on_run_end(self, status: str) -> None:
        weights = self.run_dir / "best.pth"
        uploads = self.settings.log_best_weights and status in ("finished", "stopped early") and weights.exists()
        for tracker in self.trackers:
            tracker.end(status, str(weights) if uploads else "")
        patience = self.patience or (PATIENCE_WITH_WEIGHTS if uploads else PATIENCE)
        deadline = time.monotonic() + patience
        for tracker in self.trackers:
            tracker.wait(deadline)

    def _tell(self, *message: Any) -> None:
        for tracker in self.trackers:
            tracker.tell(message)


def enabled(settings: TrackingSettings) -> dict[str, dict[str, Any]]:
    """The own settings of each tracker that is switched on, by its key in TRACKERS."""
    found: dict[str, dict[str, Any]] = {"tensorboard": {}} if settings.tensorboard else {}
    for key, own in (("comet", settings.comet), ("wandb", settings.wandb)):
        if own.enable:
            found[key] = asdict(own)
    return found


def named(which: str, pictures: list[Picture]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name that stays the same over validations, caption, the panels side by side) of each."""
    for rank, picture in enumerate(pictures, 1):
        caption = f"{picture.dataset}/{picture.sample_id} {picture.score:.4f}"
        yield f"{which}/{rank:02d}", caption, np.concatenate(list(picture.panels.values()), axis=1)


def figures(record: ValidationRecord) -> Iterator[tuple[str, str, np.ndarray]]:
    """The same of the pictures of all samples together."""
    for title, picture in record.figures.items():
        yield f"figures/{title.replace(' ', '_')}", title, picture


class Background:
    """A tracker in a process of its own, fed by a thread. Telling it something never waits.

    What the process has not taken yet is bounded: of a thousand messages the oldest are dropped, and of pictures those
    before the last four validations. Start and end are never dropped.
    """

    def __init__(self, key: str, settings: dict[str, Any], run: dict[str, Any], log: Log) -> None:
        self.name, self.log = TRACKERS[key].name, log
        self.waiting: dict[bool, deque[Any]] = {False: deque(maxlen=1000), True: deque(maxlen=4)}
        self.last: tuple[str, str] | None = None
        self.dropped = 0
        self.is_left = False
        self.changed = threading.Condition()
        # Started here and not by the thread: data workers that fork in between would keep its pipes open. In a session
        # of its own: Ctrl-C and a launcher's signals are the run's, which then tells it to end.
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._work, args=((key, settings, run),), daemon=True)
        self.thread.start()

    def tell(self, message: tuple[Any, ...]) -> None:
        """Pass on (method, kind, step, content)."""
        with self.changed:
            waiting = self.waiting[message[0] == "pictures"]
            self.dropped += len(waiting) == waiting.maxlen
            waiting.append(message)
            self.changed.notify()

    def end(self, status: str, weights: str) -> None:
        """Pass on that this was all."""
        with self.changed:
            self.last = (status, weights)
            self.changed.notify()

    def wait(self, deadline: float) -> None:
        """Let it finish until `deadline` of `time.monotonic`, then end its process."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self.is_left = True
            self.log.say(f"tracker {self.name} did not finish in time and was left: the last of its data is missing")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.thread.join(5)
        elif self.dropped:
            self.log.say(f"tracker {self.name} was too slow: it missed {self.dropped} records")

    def _work(self, start: tuple[Any, ...]) -> None:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # broken: it has ended, and says why
            for message in self._messages(start):
                pickle.dump(message, pipe)
                pipe.flush()
        reason = self.process.stdout.read().decode(errors="replace")
        code = self.process.wait()
        if code and not self.is_left:
            reason = " ".join(reason.split()) or f"its process ended with code {code}"
            self.log.say(f"tracker {self.name} is lost: {reason}; the run goes on without it")

    def _messages(self, start: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        yield start
        while True:
            with self.changed:
                self.changed.wait_for(lambda: any(self.waiting.values()) or self.last)
                found = next((waiting.popleft() for waiting in self.waiting.values() if waiting), None)
            if not found:
                assert self.last
                yield self.last
                return
            yield found


def build_trackers(settings: TrackingSettings, log: Log) -> list[Callback]:
    """The trackers that the `tracking` settings switch on."""
    return [Trackers(settings, log)] if enabled(settings) else []

"""The trackers: TensorBoard, Comet ML and Weights & Biases, each behind `Background`.

There it runs on a thread of its own and can be slow, dead or broken without the run noticing.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from tracking import Callback, Event, Log, RunInfo, StepRecord, ValidationRecord


class Background(Callback):
    """Runs another callback on its own thread: it may be slow (a full queue drops records) or fail (it is left)."""

    def __init__(self, make: Callable[[], Callback], name: str, log: Log, patience_seconds: float = 20) -> None:
        self.make, self.name, self.log, self.patience = make, name, log, patience_seconds
        self.queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(maxsize=1000)
        self.thread = threading.Thread(target=self._work, daemon=True, name=name)
        self.thread.start()

    def _work(self) -> None:
        try:
            callback = self.make()
            while (job := self.queue.get()) is not None:
                getattr(callback, job[0])(job[1])
        except Exception as error:
            self.log.say(f"tracker {self.name} is lost ({type(error).__name__}: {error}); the run goes on without it")

    def _put(self, method: str, argument: Any) -> None:
        if self.thread.is_alive() and not self.queue.full():
            self.queue.put((method, argument))

    def on_run_start(self, run: RunInfo) -> None:
        self._put("on_run_start", run)

    def on_step(self, record: StepRecord) -> None:
        self._put("on_step", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._put("on_validation", record)

    def on_event(self, event: Event) -> None:
        self._put("on_event", event)

    def on_run_end(self, status: str) -> None:
        self._put("on_run_end", status)
        if self.thread.is_alive() and not self.queue.full():
            self.queue.put(None)
        self.thread.join(self.patience)


class Scalars(Callback):
    """What the three trackers share: named numbers at a step."""

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        raise TypeError("a tracker says how it logs")

    def on_step(self, record: StepRecord) -> None:
        values = {f"train/{name}": value for name, value in record.last.items()}
        extra = {"lr": record.lr, "grad_norm": record.grad_norm, "steps_per_second": record.steps_per_second}
        self.log_scalars({**values, **extra}, record.step)

    def on_validation(self, record: ValidationRecord) -> None:
        self.log_scalars({f"val/{name}": value for name, value in record.metrics.items()}, record.step)


class TensorBoard(Scalars):
    """Event files under `<run>/tensorboard`."""

    def on_run_start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was written after the checkpoint that a resumed run starts from is taken back.
        self.writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=run.step + 1 if run.resumed else None)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_run_end(self, status: str) -> None:
        self.writer.close()


class Comet(Scalars):
    """Comet ML, online or as an offline archive in the run folder."""

    def __init__(self, *, api_key: str, workspace: str, project_name: str, offline: bool) -> None:
        self.api_key, self.workspace, self.project_name, self.offline = api_key, workspace, project_name, offline

    def on_run_start(self, run: RunInfo) -> None:
        import comet_ml

        # The project's code, its environment and what it prints are the user's own business.
        settings: dict[str, Any] = {"log_code": False, "log_env_details": False, "auto_output_logging": False}
        settings |= {"workspace": self.workspace or None, "project_name": self.project_name or None}
        self.experiment: Any
        if self.offline:
            self.experiment = comet_ml.OfflineExperiment(offline_directory=str(run.run_dir / "comet"), **settings)
        else:
            key = self.api_key or os.environ.get("COMET_API_KEY")
            self.experiment = comet_ml.Experiment(api_key=key, **settings)
        self.experiment.set_name(run.name)
        self.experiment.log_parameters(run.config)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self.experiment.log_metrics(values, step=step)

    def on_run_end(self, status: str) -> None:
        self.experiment.end()


class Wandb(Scalars):
    """Weights & Biases, online or offline."""

    def __init__(self, *, api_key: str, entity: str, project: str, offline: bool) -> None:
        self.api_key, self.entity, self.project, self.offline = api_key, entity, project, offline

    def on_run_start(self, run: RunInfo) -> None:
        import wandb

        if self.api_key and not self.offline:
            wandb.login(key=self.api_key)
        mode: Any = "offline" if self.offline else "online"
        self.run = wandb.init(
            entity=self.entity or None, project=self.project or None, name=run.name, id=_wandb_id(run.name),
            dir=str(run.run_dir), config=run.config, mode=mode, resume="allow",
        )  # fmt: skip

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def on_run_end(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


def _wandb_id(name: str) -> str:
    return re.sub(r"[^\w-]", "-", name)[:120]


def build_trackers(tracking: Any, log: Log) -> list[Callback]:
    """The trackers that the `tracking` settings switch on, each on a thread of its own."""
    made: list[Callback] = []
    if tracking.tensorboard:
        made.append(Background(TensorBoard, "TensorBoard", log))
    for settings, tracker, name in ((tracking.comet, Comet, "Comet ML"), (tracking.wandb, Wandb, "Weights & Biases")):
        arguments = asdict(settings)
        if arguments.pop("enable"):
            made.append(Background(partial(tracker, **arguments), name, log))
    return made

"""What the outside hears of a run: the console, train.log, metrics.jsonl and .csv, TensorBoard, Comet ML, W&B.

Each is a `Callback`; so are a user's own (`train.main(config, callbacks=[...])`). They run on rank 0 alone. A remote
tracker runs behind `Background`, where it can be slow, dead or broken without the run noticing.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from colorama import Fore, Style
from tqdm import tqdm

from checkpoint import write_text

COLORS = {"red": Fore.RED, "green": Fore.GREEN, "cyan": Fore.CYAN, "blue": Fore.BLUE}
TIMINGS = ("time", "steps_per_second", "eta_seconds")


@dataclass
class RunInfo:
    """What a callback is told at the start."""

    name: str
    run_dir: Path
    config: dict[str, Any]
    resumed: bool
    records: int
    step: int = 0
    task: Any = None


@dataclass
class StepRecord:
    """One printed line: epoch means and the last step's values by name, and where the run stands."""

    epoch: int
    step: int
    step_in_epoch: int
    steps_per_epoch: int
    means: dict[str, float]
    last: dict[str, float]
    lr: float
    momentum: float
    grad_norm: float
    composition: dict[str, int]
    total_composition: dict[str, int]
    steps_per_second: float
    eta_seconds: float
    skipped: int = 0


@dataclass
class ValidationRecord:
    """One validation: metric means, per data set and per sample."""

    epoch: int
    step: int
    metrics: dict[str, float]
    per_dataset: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    is_best: bool = False


class Callback:
    """The protocol; override what is of interest."""

    def on_run_start(self, run: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """At every printed line, not at every step."""

    def on_validation(self, record: ValidationRecord) -> None:
        """After every validation."""

    def on_run_end(self, status: str) -> None:
        """At the end, however it comes: finished, stopped …, or failed."""


# ---------------------------------------------------------------- the log


class Log:
    """Says a line on the console (above tqdm's bars) and writes it, uncoloured, to a file. Secrets are cut out.

    What is said before `open` waits for it: nothing is written into a run folder until the run is sure to start.
    """

    def __init__(self, secrets: list[str], color: str = "auto", quiet: bool = False) -> None:
        self.secrets, self.quiet = sorted(secrets, key=len, reverse=True), quiet
        self.file: TextIO | None = None
        self.waiting: list[str] = []
        is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.colored = color == "always" or (color == "auto" and is_terminal)

    def say(self, text: str, color: str = "") -> None:
        """One line; `color` is a key of COLORS."""
        text = self.redact(text)
        if not self.quiet:
            shown = f"{COLORS[color]}{text}{Style.RESET_ALL}" if self.colored and color else text
            tqdm.write(shown, file=sys.stdout)
            sys.stdout.flush()
        line = time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n"
        if self.file:
            self.file.write(line)
        else:
            self.waiting.append(line)

    def open(self, path: Path) -> None:
        """Append to a file from here on."""
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 — held until the run ends
        self.file.writelines(self.waiting)

    def redact(self, text: str) -> str:
        """`text` without any secret."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def close(self) -> None:
        if self.file:
            self.file.close()


class Console(Callback):
    """The line of a training step, and the validation's."""

    def __init__(self, log: Log, color_of: Callable[[dict[str, float]], str]) -> None:
        self.log, self.color_of = log, color_of
        self.labels: list[tuple[str, str]] = []

    def on_run_start(self, run: RunInfo) -> None:
        self.labels = run.task.console

    def on_step(self, record: StepRecord) -> None:
        self.log.say(step_line(record, self.labels), self.color_of(record.last))

    def on_validation(self, record: ValidationRecord) -> None:
        values = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        self.log.say(f"validation after epoch {record.epoch}, step {record.step}: {values}"
                     + (" (best so far)" if record.is_best else ""))  # fmt: skip


def step_line(record: StepRecord, labels: list[tuple[str, str]]) -> str:
    """The console line; `labels` are (short name, metric), each shown as epoch mean and batch value."""
    parts = [f"E{record.epoch} - {record.step_in_epoch}/{record.steps_per_epoch}"]
    fields = []
    for label, name in [("L", "loss"), *labels]:
        if name in record.last:
            fields += [f"{label}: {record.means[name]:.3f}", f"{label}B: {record.last[name]:.3f}"]
    fields += [f"LR: {record.lr:.2e}", f"M: {record.momentum:.2f}", f"GN: {_number(record.grad_norm)}"]
    fields += [f"BC: {_counts(record.composition)}", f"TBC: {_counts(record.total_composition)}"]
    speed = record.steps_per_second
    fields += [f"It/s: {speed:.{1 if speed >= 1 else 2}f}", f"ETA: {timedelta(seconds=round(record.eta_seconds))}"]
    return " - ".join([*parts, ", ".join(fields)])


def _counts(composition: dict[str, int]) -> str:
    return "\\".join(str(count) for count in composition.values())


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else str(value)


# ---------------------------------------------------------------- files


class Records(Callback):
    """`metrics.jsonl`, a line each, and `metrics.csv`, the same as a table."""

    def __init__(self, run_dir: Path) -> None:
        self.jsonl, self.csv = run_dir / "metrics.jsonl", run_dir / "metrics.csv"

    def on_run_start(self, run: RunInfo) -> None:
        """Cut the records back to those the checkpoint knows, so that none stands twice after a crash."""
        lines = self.jsonl.read_text(encoding="utf-8").splitlines() if run.resumed and self.jsonl.exists() else []
        kept = lines[: run.records]
        write_text(self.jsonl, "".join(line + "\n" for line in kept))

    def on_step(self, record: StepRecord) -> None:
        values = {f"train/{name}": value for name, value in record.last.items()}
        self._append({
            "kind": "train", "epoch": record.epoch, "step": record.step, "lr": record.lr,
            "grad_norm": record.grad_norm, "skipped": record.skipped, **values,
            "steps_per_second": record.steps_per_second,
        })  # fmt: skip

    def on_validation(self, record: ValidationRecord) -> None:
        values = {f"val/{name}": value for name, value in record.metrics.items()}
        self._append({"kind": "val", "epoch": record.epoch, "step": record.step, **values})
        self._write_csv()

    def on_run_end(self, status: str) -> None:
        self._write_csv()

    def _append(self, row: dict[str, Any]) -> None:
        plain = {key: _finite(value) for key, value in row.items()}
        with open(self.jsonl, "a", encoding="utf-8") as file:
            file.write(json.dumps({**plain, "time": round(time.time(), 3)}) + "\n")

    def _write_csv(self) -> None:
        rows = read_records(self.jsonl)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.csv, table.getvalue())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- trackers


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

"""What the outside hears of a run: the protocol, the console and train.log, and the records in the run folder.

Whoever listens is a `Callback`: the console and the records here, the report (report.py), the trackers (trackers.py)
and a user's own (`train.main(config, callbacks=[...])`). They run on rank 0 alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from colorama import Fore, Style
from tqdm import tqdm

from checkpoint import write_text
from gallery import Picture
from tables import Cell, Column, Table, number, to_console

COLORS = {"red": Fore.RED, "green": Fore.GREEN, "cyan": Fore.CYAN, "blue": Fore.BLUE}
CLASS_ROWS = 30  # of the console's table
TIMES = ("data", "host", "device", "communication")
TIMINGS = ("time", "steps_per_second", *(f"time_{name}" for name in TIMES))


@dataclass
class RunInfo:
    """What a callback is told at the start. `run_id` stays the same when a run is resumed, and no other run has it."""

    name: str
    run_dir: Path
    config: dict[str, Any]  # without secrets
    resumed: bool
    records: int  # lines of metrics.jsonl that the checkpoint knows of
    step: int = 0
    task: Any = None
    run_id: str = ""  # 32 hexadecimal digits


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
    times: dict[str, float] = field(default_factory=dict)  # shares of the wall time, see utils.StepClock


@dataclass
class ValidationRecord:
    """One validation: metric means, per data set and per sample, and the samples to look at.

    `base` holds the metrics of the model that training started from, where it was a trained one; `is_base` marks the
    validation that measured them.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    per_dataset: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    is_best: bool = False
    primary: str = ""  # the metric that samples are ranked by
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    is_base: bool = False
    best: list[Picture] = field(default_factory=list)
    worst: list[Picture] = field(default_factory=list)
    panel_notes: dict[str, str] = field(default_factory=dict)  # what the colours of a picture's panels mean
    per_class: list[dict[str, Any]] = field(default_factory=list)  # `name` and scores, where the task has classes
    figures: dict[str, Any] = field(default_factory=dict)  # (H, W, 3) uint8 RGB by title


@dataclass
class Event:
    """What happens to a run beside its steps. `kind`: start, resume, skipped, warning, hint or end."""

    kind: str
    text: str
    step: int
    time: float = field(default_factory=time.time)  # seconds since 1970


class Callback:
    """The protocol; override what is of interest."""

    def on_run_start(self, run: RunInfo) -> None:
        """Before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """At every printed line, not at every step."""

    def on_validation(self, record: ValidationRecord) -> None:
        """After every validation."""

    def on_event(self, event: Event) -> None:
        """When something happens beside the steps: a resume, a skipped step, a hint."""

    def on_run_end(self, status: str) -> None:
        """At the end, however it comes: finished, stopped …, or failed."""


class Dispensable(Callback):
    """A callback that the run can do without: when it fails, that is said once, and it hears no more."""

    def __init__(self, callback: Callback, log: Log) -> None:
        self.callback, self.log = callback, log

    def _tell(self, method: str, argument: Any) -> None:
        try:
            getattr(self.callback, method)(argument)
        except Exception as error:
            name, self.callback = type(self.callback).__name__, Callback()
            self.log.say(f"{name} is lost ({type(error).__name__}: {error}); the run goes on without it")

    def on_run_start(self, run: RunInfo) -> None:
        self._tell("on_run_start", run)

    def on_step(self, record: StepRecord) -> None:
        self._tell("on_step", record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._tell("on_validation", record)

    def on_event(self, event: Event) -> None:
        self._tell("on_event", event)

    def on_run_end(self, status: str) -> None:
        self._tell("on_run_end", status)


# ---------------------------------------------------------------- the log


class Log:
    """Says a line on the console (above tqdm's bars) and writes it, uncoloured, to a file. Secrets are cut out.

    What is said before `open` waits for it: nothing is written into a run folder until the run is sure to start.
    """

    def __init__(self, secrets: list[str], color: str = "auto", quiet: bool = False) -> None:
        self.secrets, self.quiet = sorted(secrets, key=len, reverse=True), quiet
        self.file: TextIO | None = None
        self.waiting: list[str] = []
        self.is_terminal = sys.stdout.isatty()
        wants_color = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.colored = color == "always" or (color == "auto" and wants_color)

    def say(self, text: str | list[str], color: str = "") -> None:
        """One line; `color` is a key of COLORS. A list is the fields of a line that a narrow terminal breaks."""
        fields = [self.redact(each) for each in ([text] if isinstance(text, str) else text)]
        if not self.quiet:
            shown = fold(fields, shutil.get_terminal_size().columns) if self.is_terminal else ", ".join(fields)
            self._show(f"{COLORS[color]}{shown}{Style.RESET_ALL}" if self.colored and color else shown)
        self._write(", ".join(fields))

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

    def _show(self, line: str) -> None:
        """Print; when the terminal or the reader of a pipe has gone away, training goes on without them."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            self.quiet = True
            # What Python still holds for the lost output would fail once more at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._write(f"the console is lost ({error.strerror}); from here on this file alone is written")

    def _write(self, line: str) -> None:
        line = time.strftime("%Y-%m-%d %H:%M:%S ") + line + "\n"
        if self.file:
            self.file.write(line)
        else:
            self.waiting.append(line)


def fold(fields: list[str], width: int) -> str:
    """Fields joined by commas, in lines of less than `width` characters; a field is never broken."""
    lines = [fields[0]]
    for each in fields[1:]:
        if len(lines[-1]) + len(each) + len(", ,") < width:
            lines[-1] += f", {each}"
        else:
            lines[-1] += ","
            lines.append(f"  {each}")
    return "\n".join(lines)


class Console(Callback):
    """The line of a training step with its legend, and the validation's."""

    def __init__(self, log: Log, color_of: Callable[[dict[str, float]], str]) -> None:
        self.log, self.color_of = log, color_of
        self.labels: list[tuple[str, str]] = []

    def on_run_start(self, run: RunInfo) -> None:
        self.labels = run.task.console
        for line in legend(self.labels):
            self.log.say(line)

    def on_step(self, record: StepRecord) -> None:
        self.log.say(step_fields(record, self.labels), self.color_of(record.last))

    def on_validation(self, record: ValidationRecord) -> None:
        what = "the base model" if record.is_base else f"validation after epoch {record.epoch}, step {record.step}"
        base = {} if record.is_base else record.base
        fields = [
            f"{name} {value:.4f}" + (f" ({value - base[name]:+.4f})" if name in base else "")
            for name, value in record.metrics.items()
        ]
        fields[-1] += " (best so far)" if record.is_best else ""
        self.log.say([f"{what}: {fields[0]}", *fields[1:]])
        if record.primary in base:
            self.log.say(compared(record))
        if record.per_class:
            self.log.say(to_console(class_table(record.per_class), width=120))


def legend(labels: list[tuple[str, str]]) -> list[list[str]]:
    """The fields of two lines that explain the console line."""
    metrics = [f"{label} {name.replace('_', ' ')}" for label, name in [("L", "loss"), *labels]]
    second = "the second BC" if "BC" in dict(labels) else "BC"
    return [
        ["E epoch - step", *metrics, "each the mean of the epoch so far", "with B that of the last step"],
        ["LR learning rate", "M momentum", "GN gradient norm before clipping",
         f"{second} samples of each data set in the last step", "TBC in the run", "It/s steps a second",
         f"T percent of the time for {_counts({name: name for name in TIMES})}"],
    ]  # fmt: skip


def step_fields(record: StepRecord, labels: list[tuple[str, str]]) -> list[str]:
    """The console line; `labels` are (short name, metric), each shown as epoch mean and batch value."""
    fields = []
    for label, name in [("L", "loss"), *labels]:
        if name in record.last:
            fields += [f"{label}: {record.means[name]:.3f}", f"{label}B: {record.last[name]:.3f}"]
    fields += [f"LR: {record.lr:.2e}", f"M: {record.momentum:.2f}", f"GN: {_number(record.grad_norm)}"]
    fields += [f"BC: {_counts(record.composition)}", f"TBC: {_counts(record.total_composition)}"]
    speed = record.steps_per_second
    fields += [f"It/s: {speed:.{1 if speed >= 1 else 2}f}", f"ETA: {timedelta(seconds=round(record.eta_seconds))}"]
    if record.times:
        fields.append(f"T: {_counts({name: round(100 * record.times[name]) for name in TIMES})}")
    return [f"E{record.epoch} - {record.step_in_epoch}/{record.steps_per_epoch} - {fields[0]}", *fields[1:]]


def class_table(classes: list[dict[str, Any]]) -> Table:
    """The scores of each class; of many those of the weakest that have any, which are the ones to look into."""
    names = [name for name in classes[0] if name != "name"]
    shown = classes
    if len(classes) > CLASS_ROWS:
        scored = [row for row in classes if not math.isnan(row[names[0]])]
        shown = sorted(scored, key=lambda row: row[names[0]])[:CLASS_ROWS]
    title = "classes" if shown is classes else f"the weakest {len(shown)} of {len(classes)} classes (all: report.html)"
    table = Table(title, [Column("class"), *map(Column, names)])
    for row in shown:
        texts = [number(value, 3) if isinstance(value := row[name], float) else str(value) for name in names]
        values = zip((row[name] for name in names), texts, strict=True)
        table.rows.append([Cell(str(row["name"])), *(Cell(value, text) for value, text in values)])
    return table


def compared(record: ValidationRecord) -> str:
    """How the primary metric compares with the base model's, as a sentence."""
    name = record.primary
    gain = record.metrics[name] - record.base[name]
    if not record.higher_is_better[name]:
        gain = -gain
    if f"{abs(gain):.4f}" == "0.0000":
        return f"as good as the base model ({name})"
    return f"{'better' if gain > 0 else 'worse'} than the base model by {abs(gain):.4f} ({name})"


def _counts(composition: Mapping[str, object]) -> str:
    return "\\".join(map(str, composition.values()))


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else str(value)


# ---------------------------------------------------------------- files


class Records(Callback):
    """`metrics.jsonl`, a line each, `metrics.csv`, the same as a table, and `events.jsonl`.

    A line's `kind` is train, val, or base (the validation of the model that training started from).
    """

    def __init__(self, run_dir: Path) -> None:
        self.jsonl, self.csv, self.events = (
            run_dir / name for name in ("metrics.jsonl", "metrics.csv", "events.jsonl")
        )

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
            **{f"time_{name}": round(share, 4) for name, share in record.times.items()},
        })  # fmt: skip

    def on_validation(self, record: ValidationRecord) -> None:
        values = {f"val/{name}": value for name, value in record.metrics.items()}
        kind = "base" if record.is_base else "val"
        self._append({"kind": kind, "epoch": record.epoch, "step": record.step, **values})
        self._write_csv()

    def on_event(self, event: Event) -> None:
        with open(self.events, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")

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

"""What the outside hears of a run: the line, its colour, the files, and trackers that hang or break."""

from __future__ import annotations

import csv
import io
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tracking
from settings import LoggingSettings
from tasks import binary_color, get_task
from tracking import Background, Callback, Console, Log, Records, RunInfo, StepRecord, ValidationRecord, step_line


def log_to(path: Path, secrets: list[str], color: str = "auto") -> Log:
    log = Log(secrets, color)
    log.open(path)
    return log


def record(step: int = 100, **changes: Any) -> StepRecord:
    means = {"loss": 0.234, "bce_accuracy": 0.998, "dice": 0.98, "jaccard": 0.96, "ssim": 0.9, "mae": 0.1}
    last = {"loss": 0.198, "bce_accuracy": 0.999, "dice": 0.981, "jaccard": 0.961, "ssim": 0.901, "mae": 0.2}
    values: dict[str, Any] = {
        "epoch": 50, "step": step, "step_in_epoch": 100, "steps_per_epoch": 200, "means": means, "last": last,
        "lr": 1e-4, "momentum": 0.9, "grad_norm": 4.21, "composition": {"a": 2, "b": 0, "c": 1},
        "total_composition": {"a": 200, "b": 0, "c": 100}, "steps_per_second": 3.21, "eta_seconds": 31.2,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def info(run_dir: Path, resumed: bool = False, records: int = 0) -> RunInfo:
    return RunInfo("run", run_dir, {}, resumed, records, 0, get_task("binary"))


def test_the_line_is_the_one_of_the_legend() -> None:
    assert step_line(record(), get_task("binary").console) == (
        "E50 - 100/200 - L: 0.234, LB: 0.198, BC: 0.998, BCB: 0.999, DI: 0.980, DIB: 0.981, JI: 0.960, JIB: 0.961, "
        "SI: 0.900, SIB: 0.901, LR: 1.00e-04, M: 0.90, GN: 4.2, BC: 2\\0\\1, TBC: 200\\0\\100, It/s: 3.2, ETA: 0:00:31"
    )
    slow = step_line(record(steps_per_second=0.034, grad_norm=math.nan, eta_seconds=100_000), [])
    assert "GN: nan" in slow  # not 0, which would look fine
    assert "It/s: 0.03" in slow
    assert slow.endswith("ETA: 1 day, 3:46:40")


@pytest.mark.parametrize(
    ("jaccard", "bce_accuracy", "dice", "color"),
    [
        (0.94, 0.9999, 0.99, "red"), (0.96, 0.998, 0.99, "blue"), (0.96, 0.9995, 0.98, "green"),
        (0.96, 0.9995, 0.99, "cyan"), (0.95, 0.999, 0.985, "blue"),
    ],
)  # fmt: skip
def test_the_colour_tells_the_quality(jaccard: float, bce_accuracy: float, dice: float, color: str) -> None:
    assert binary_color({"jaccard": jaccard, "bce_accuracy": bce_accuracy, "dice": dice}, LoggingSettings()) == color
    assert (
        binary_color({"jaccard": 0.5, "bce_accuracy": 0, "dice": 0}, LoggingSettings(red_below_jaccard=0.4)) == "blue"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("color", "terminal", "no_color", "colored"),
    [
        ("auto", True, False, True), ("auto", False, False, False), ("auto", True, True, False),
        ("always", False, False, True), ("never", True, False, False),
    ],
)  # fmt: skip
def test_colours_are_for_terminals_and_never_in_the_file(
    color: str, terminal: bool, no_color: bool, colored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    log = log_to(tmp_path / "train.log", [], color)
    console = Console(log, lambda scores: binary_color(scores, LoggingSettings()))
    console.on_run_start(info(tmp_path))
    console.on_step(record())
    console.on_validation(ValidationRecord(3, 40, {"jaccard": 0.51234, "mae": 0.1}, is_best=True))
    log.close()
    assert ("\x1b[34mE50" in out.getvalue()) == colored
    assert ("\x1b" in out.getvalue()) == colored
    written = (tmp_path / "train.log").read_text()
    assert "\x1b" not in written
    assert "validation after epoch 3, step 40: jaccard 0.5123, mae 0.1000 (best so far)" in written


def test_secrets_reach_neither_console_nor_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_to(tmp_path / "train.log", ["canary", "canary-long"])
    log.say("key canary-long and canary; https://canary@host")
    log.close()
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text()):
        assert "key *** and ***; https://***@host" in text
        assert "canary" not in text


def test_records_are_lines_and_a_table_and_are_cut_back(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.on_run_start(info(tmp_path))
    for step in (1, 2, 3):
        records.on_step(record(step, grad_norm=math.inf if step == 2 else 1.5))
    records.on_validation(ValidationRecord(1, 3, {"jaccard": 0.5, "mae": math.nan}))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "train", "val"]
    assert rows[0]["train/loss"] == 0.198
    assert rows[1]["grad_norm"] is None  # JSON has no infinity
    assert (rows[3]["val/jaccard"], rows[3]["val/mae"]) == (0.5, None)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["1", "2", "3", "3"]
    assert (table[3]["val/jaccard"], table[3]["train/loss"], table[0]["train/loss"]) == ("0.5", "", "0.198")

    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4}\n{"kind": "tr')  # what a kill leaves
    assert [row["step"] for row in tracking.read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3, 4]
    again = Records(tmp_path)
    again.on_run_start(info(tmp_path, resumed=True, records=2))
    again.on_step(record(3))
    assert [row["step"] for row in tracking.read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    fresh = Records(tmp_path)
    fresh.on_run_start(info(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------- trackers


class Hanging(Callback):
    """A tracker whose network never answers."""

    started = threading.Event()
    released = threading.Event()

    def on_run_start(self, run: RunInfo) -> None:
        self.started.set()
        self.released.wait(60)


class Broken(Callback):
    def on_step(self, record: StepRecord) -> None:
        raise ConnectionError("no route for canary")


def test_a_tracker_that_hangs_costs_its_patience_at_the_end_and_nothing_before(tmp_path: Path) -> None:
    log = log_to(tmp_path / "log", [])
    tracker = Background(Hanging, "Slow", log, patience_seconds=0.2)
    began = time.monotonic()
    tracker.on_run_start(info(tmp_path))
    assert Hanging.started.wait(10)
    for step in range(3000):  # more than its queue holds
        tracker.on_step(record(step))
    tracker.on_run_end("finished")
    assert time.monotonic() - began < 8
    Hanging.released.set()


def test_a_tracker_that_breaks_is_left_and_named(tmp_path: Path) -> None:
    log = log_to(tmp_path / "log", ["canary"])
    tracker = Background(Broken, "Broken", log)
    tracker.on_run_start(info(tmp_path))
    for step in range(20):
        tracker.on_step(record(step))
        time.sleep(0.005)
    tracker.on_validation(ValidationRecord(1, 1, {"a": 1.0}))
    tracker.on_run_end("finished")
    said = (tmp_path / "log").read_text()
    assert "tracker Broken is lost (ConnectionError: no route for ***); the run goes on without it" in said
    assert said.count("is lost") == 1


def test_a_tracker_that_cannot_even_start_is_left(tmp_path: Path) -> None:
    def make() -> Callback:
        raise ModuleNotFoundError("No module named 'wandb'")

    log = log_to(tmp_path / "log", [])
    tracker = Background(make, "W&B", log)
    tracker.on_run_start(info(tmp_path))
    tracker.on_run_end("finished")
    assert "tracker W&B is lost" in (tmp_path / "log").read_text()


def test_all_that_was_sent_arrives_in_order(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listener(Callback):
        def on_step(self, record: StepRecord) -> None:
            heard.append(record.step)

        def on_run_end(self, status: str) -> None:
            heard.append(status)

    tracker = Background(Listener, "Good", Log([]))
    for step in range(200):
        tracker.on_step(record(step))
    tracker.on_run_end("finished")
    assert heard == [*range(200), "finished"]


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tracking.TensorBoard()
    tracker.on_run_start(info(tmp_path))
    tracker.on_step(record(7))
    tracker.on_validation(ValidationRecord(1, 9, {"jaccard": 0.75}))
    tracker.on_run_end("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: (event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert found["val/jaccard"] == (9, 0.75)
    assert found["train/loss"] == (7, pytest.approx(0.198))
    assert found["grad_norm"] == (7, pytest.approx(4.21))


def test_trackers_are_built_as_asked(tmp_path: Path) -> None:
    from settings import TrackingSettings

    settings = TrackingSettings()
    assert tracking.build_trackers(settings, Log([])) == []
    settings.tensorboard = settings.wandb.enable = settings.comet.enable = True
    made = tracking.build_trackers(settings, Log([]))
    assert [tracker.name for tracker in made if isinstance(tracker, Background)] == [
        "TensorBoard", "Comet ML", "Weights & Biases",
    ]  # fmt: skip

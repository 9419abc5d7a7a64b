"""What the outside hears of a run: the line on every kind of terminal, its colour, and the records."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tracking
from settings import LoggingSettings
from tables import to_console
from tasks import get_task
from tasks.binary import binary_color
from tracking import (
    Console,
    Event,
    Log,
    Records,
    RunInfo,
    StepRecord,
    ValidationRecord,
    class_table,
    compared,
    fold,
    legend,
    step_fields,
)

ROOT = Path(__file__).resolve().parent.parent


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
    labels = get_task("binary").console
    assert ", ".join(step_fields(record(), labels)) == (
        "E50 - 100/200 - L: 0.234, LB: 0.198, BC: 0.998, BCB: 0.999, DI: 0.980, DIB: 0.981, JI: 0.960, JIB: 0.961, "
        "SI: 0.900, SIB: 0.901, LR: 1.00e-04, M: 0.90, GN: 4.2, BC: 2\\0\\1, TBC: 200\\0\\100, It/s: 3.2, ETA: 0:00:31"
    )
    slow = step_fields(record(steps_per_second=0.034, grad_norm=math.nan, eta_seconds=100_000), [])
    assert "GN: nan" in slow  # not 0, which would look fine
    assert "It/s: 0.03" in slow
    assert slow[-1] == "ETA: 1 day, 3:46:40"
    times = {"data": 0.021, "host": 0.009, "device": 0.97, "communication": 0.0}
    assert step_fields(record(times=times), labels)[-1] == "T: 2\\1\\97\\0"


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


def test_the_legend_explains_every_field() -> None:
    lines = [", ".join(fields) for fields in legend(get_task("binary").console)]
    assert lines == [
        "E epoch - step, L loss, BC bce accuracy, DI dice, JI jaccard, SI ssim, "
        "each the mean of the epoch so far, with B that of the last step",
        "LR learning rate, M momentum, GN gradient norm before clipping, the second BC samples of each data set in the "
        "last step, TBC in the run, It/s steps a second, T percent of the time for data\\host\\device\\communication",
    ]
    assert ", BC samples of each data set" in ", ".join(legend([("TOP1", "top1")])[1])  # one field, not the second


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_narrow_terminal_breaks_lines_between_fields(width: int) -> None:
    fields = step_fields(record(eta_seconds=100_000), get_task("binary").console)
    lines = fold(fields, width).split("\n")
    assert all(len(line) < width for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == ", ".join(fields)
    assert fold(["a" * 50, "b"], 20) == "a" * 50 + ",\n  b"  # a field is not broken


@pytest.mark.parametrize(
    ("higher", "now", "sentence"),
    [
        (True, 0.8123, "better than the base model by 0.0123 (score)"),
        (True, 0.7, "worse than the base model by 0.1000 (score)"),
        (False, 0.7, "better than the base model by 0.1000 (score)"),
        (False, 0.8, "as good as the base model (score)"),
    ],
)
def test_a_validation_is_compared_with_the_base_model(
    higher: bool, now: float, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"score": 0.8, "mae": 0.2}
    result = ValidationRecord(
        2, 40, {"score": now, "mae": 0.15}, primary="score", higher_is_better={"score": higher}, base=base
    )
    assert compared(result) == sentence
    console = Console(Log([]), lambda scores: "")
    console.on_validation(result)
    console.on_event(Event("hint", "the run itself has said it", 40))
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"validation after epoch 2, step 40: score {now:.4f} ({now - 0.8:+.4f}), mae 0.1500 (-0.0500)",
        sentence,
    ]
    console.on_validation(ValidationRecord(0, 0, base, primary="score", base=base, is_base=True))
    assert capsys.readouterr().out == "the base model: score 0.8000, mae 0.2000\n"


TALK = """
import sys
from pathlib import Path
from tracking import Console, Log
from tests.test_tracking import info, record
log = Log([], sys.argv[2])
log.open(Path(sys.argv[1]))
console = Console(log, lambda scores: "blue")
console.on_run_start(info(Path(sys.argv[1]).parent))
for step in range(2000):
    console.on_step(record(step))
"""


def talk(log: Path, **how: Any) -> subprocess.Popen[bytes]:
    """A process that says a legend and two thousand lines."""
    return subprocess.Popen([sys.executable, "-c", TALK, str(log), "auto"], cwd=ROOT, **how)


def test_a_closed_pipe_ends_the_console_and_not_the_run(tmp_path: Path) -> None:
    process = talk(tmp_path / "train.log", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline().startswith(b"E epoch")
    process.stdout.close()
    assert process.wait(60) == 0, process.stderr.read()
    assert process.stderr.read() == b""
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert sum(" E50 - " in line for line in lines) == 2000
    assert sum("the console is lost (Broken pipe)" in line for line in lines) == 1


def test_a_file_gets_whole_lines_without_colour_or_carriage_returns(tmp_path: Path) -> None:
    with open(tmp_path / "out.txt", "wb") as out:
        process = talk(tmp_path / "train.log", stdout=out, env={**os.environ, "COLUMNS": "60"})
    assert process.wait(60) == 0
    content = (tmp_path / "out.txt").read_bytes()
    assert b"\r" not in content
    assert b"\x1b" not in content
    assert content.count(b"\n") == 2002
    assert content.decode() == "".join(f"{line[20:]}\n" for line in (tmp_path / "train.log").read_text().splitlines())


@pytest.mark.parametrize(
    ("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_folded_lines(environment: dict[str, str], colored: bool, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = talk(tmp_path / "train.log", stdout=end, env={**plain, "TERM": "xterm", "COLUMNS": "60", **environment})
    os.close(end)
    shown = b""
    while chunk := read(terminal):
        shown += chunk
    assert process.wait(60) == 0
    assert (b"\x1b[34mE50" in shown) == colored
    assert (b"\x1b" in shown) == colored
    text = shown.decode().replace("\x1b[34m", "").replace("\x1b[0m", "").replace("\r\n", "\n")
    step = text[text.index("E50") :].split("\n")
    assert step[:2] == [
        "E50 - 100/200 - L: 0.234, LB: 0.198, BC: 0.998, BCB: 0.999,",
        "  DI: 0.980, DIB: 0.981, JI: 0.960, JIB: 0.961, SI: 0.900,",
    ]  # fmt: skip
    assert max(map(len, text.split("\n"))) < 60
    assert ", ".join(step_fields(record(0), get_task("binary").console)) in (tmp_path / "train.log").read_text()


def read(terminal: int) -> bytes:
    """What a terminal shows next; nothing when its last process has gone."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_of_many_classes_the_weakest_are_shown() -> None:
    rows = [{"name": f"class {i}", "iou": math.nan if i == 3 else i / 50, "objects": i} for i in range(40)]
    few, many = (to_console(class_table(rows[:count]), width=120).splitlines() for count in (4, 40))
    assert [line.split() for line in few[2:]] == [
        ["class", "iou", "objects"],
        *[["class", str(i), "-" if i == 3 else f"{i / 50:.3f}", str(i)] for i in range(4)],
    ]
    assert "weakest 30 of 40" in many[0]
    assert [line.split()[1] for line in many[3:]] == [str(i) for i in range(31) if i != 3]

"""The page of a run: its numbers, what no name can break, what a kill leaves behind, and its size."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import charts
import report
from gallery import Picture
from report import Report, write_report, write_validation
from tests.conftest import ROOT
from tests.helpers import TOY, add_toy_family, draw_set, flags_for, in_process, run_script
from tracking import Event, Records, RunInfo, StepRecord, ValidationRecord, read_records

VOID = {"meta", "img", "br", "input", "link"}
EVIL = "<script>alert(1)</script></style>'\"&-->"


# ---------------------------------------------------------------- a page, read as a browser would


class Page(HTMLParser):
    """Checks while it reads that every tag is closed in order, and keeps what is there."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []  # (innermost tag, text)
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), f"an attribute of {tag} stands twice"
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag, line {self.getpos()[0]}"

    def handle_data(self, text: str) -> None:
        if text.strip():
            self.words.append((self.open[-1] if self.open else "", text))

    @property
    def text(self) -> str:
        """All that is shown, a blank between pieces."""
        return " ".join(" ".join(text.split()) for tag, text in self.words if tag not in ("script", "style", "title"))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def shown(self, tag: str) -> list[str]:
        return [text for name, text in self.words if name == tag]


def page_of(run: Path) -> Page:
    """The report of a run, written anew and checked for what holds of every page."""
    page = Page(write_report(run))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert re.fullmatch("[a-z][a-z0-9-]*", name), f"{tag} has {name}"
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "action", "data", "srcset"):
                assert (value or "").startswith("data:image/jpeg;base64,"), f"{tag} refers to {value}"
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert Counter(tag for tag, _ in page.tags)["script"] == Counter(tag for tag, _ in page.tags)["style"] == 1
    return page


# ---------------------------------------------------------------- a run, told by the program's own callbacks


def about(**changes: Any) -> dict[str, Any]:
    values = {
        "id": "0" * 32, "name": "run", "created": time.time() - 300, "command": "train.py --lr 1e-4", "family": "toy",
        "task": "binary", "metric": "jaccard", "primary": "jaccard", "total_steps": 400, "steps_per_epoch": 100,
        "epochs": 4, "higher_is_better": {"jaccard": True, "mae": False}, "parameters": 2_000_000,
        "trainable_parameters": 1_500_000, "demo": False, "environment": {"python": "3.11.7", "torch": "2.14.1"},
        "data": [{"part": "training", "dataset": "photos", "samples": 48, "weight": 0.5}],
        "changed": [["optimizer.lr", 1e-4, 3e-4], ["data.train", "", "photos"]],
    }  # fmt: skip
    return {**values, **changes}


def step(number: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "epoch": 1 + number // 100, "step": number, "step_in_epoch": number % 100, "steps_per_epoch": 100, "means": {},
        "last": {"loss": 100 / number, "loss/bce": 60 / number, "loss/iou": 40 / number, "jaccard": 0.5},
        "lr": 1e-4, "momentum": 0.9, "grad_norm": 4.0, "composition": {}, "total_composition": {},
        "steps_per_second": 2.0, "eta_seconds": 1.0, "times": {"data": 0.125, "host": 0.25, "device": 0.625},
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def pictures(count: int, seed: int = 0, name: str = "val/im{}") -> list[Picture]:
    generator = np.random.default_rng(seed)
    return [
        Picture("val", name.format(index), f"/photos/{name.format(index)}.jpg", 0.9 - index / 100,
                {panel: generator.integers(0, 255, (24, 36, 3), np.uint8) for panel in ("image", "truth", "error")})
        for index in range(count)
    ]  # fmt: skip


def validation(number: int, jaccard: float, **changes: Any) -> ValidationRecord:
    rows = [{"dataset": "val", "sample_id": f"val/im{index}", "path": "", "scores": {"jaccard": score}}
            for index, score in enumerate((0.25, 0.75, math.nan))]  # fmt: skip
    values: dict[str, Any] = {
        "epoch": number // 100, "step": number, "metrics": {"jaccard": jaccard, "mae": 1 - jaccard}, "rows": rows,
        "per_dataset": {"A": {"jaccard": 0.11, "mae": 0.22}, "B": {"jaccard": 0.33, "mae": 0.44}}, "primary": "jaccard",
        "best": pictures(2), "worst": pictures(2, seed=1),
    }  # fmt: skip
    return ValidationRecord(**{**values, **changes})


def tell(run: Path, records: list[Any], status: str = "", **changes: Any) -> Path:
    """Let the program's own callbacks write a run folder, as train.py would."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text(json.dumps(about(**changes)))
    (run / "config.yml").write_text("experiment_name: run\noptimizer:\n  lr: 0.0003\n")
    listeners = [Records(run), Report(run)]
    for listener in listeners:
        listener.on_run_start(RunInfo("run", run, {}, False, 0))
    methods = {StepRecord: "on_step", ValidationRecord: "on_validation", Event: "on_event"}
    for record in records:
        for listener in listeners:
            getattr(listener, methods[type(record)])(record)
    if status:
        (run / "status.txt").write_text(status + "\n")
        for listener in listeners:
            listener.on_run_end(status)
    return run


BASE = validation(0, 0.4, is_base=True)
STORY = [
    Event("start", "toy is trained", 0), BASE, step(50), step(100), validation(100, 0.7123),
    Event("skipped", "step 150: the gradient was not finite", 150), step(200, grad_norm=math.inf, skipped=1),
    validation(200, 0.6012),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tell(tmp_path / "run", STORY)


# ---------------------------------------------------------------- what the page says


def test_the_numbers_are_those_of_the_records(run: Path) -> None:
    page = page_of(run)
    shown = page.text
    assert page.shown("h1") == ["run"]
    assert "best jaccard 0.7123 epoch 1, step 100" in shown
    assert "last jaccard 0.6012 epoch 2, step 200" in shown
    assert "base model's jaccard 0.4000 the best is better than the base model by 0.3123" in shown
    assert "step 200 of 400, epoch 3 of 4" in shown
    assert "2.00 steps/s" in shown
    assert "1 min 40 s to go" in shown
    assert "skipped steps 1" in shown
    assert "2.0 M parameters, 1.5 M trained" in shown
    assert page.all("progress") == [{"max": "400", "value": "200", "aria-label": "progress"}]
    assert "mae 0.3988 0.2877 100 0.6000 -0.2012 better" in shown
    assert "jaccard 0.6012 0.7123 100 0.4000 +0.2012 better" in shown
    assert "A 0.1100 0.2200 B 0.3300 0.4400" in shown
    assert "3 samples at epoch 2, step 200: mean 0.5000, median 0.5000, 0.2500 to 0.7500; 1 without a score" in shown
    assert "optimizer.lr 0.0001 0.0003" in shown
    assert 'data.train "" photos' in shown
    assert "training photos 48 0.5" in shown
    assert "skipped step 150: the gradient was not finite" in shown
    assert "torch 2.14.1" in shown
    assert "train.py --lr 1e-4" in shown
    assert "lr: 0.0003" in shown
    assert "drew itself" not in shown
    assert "drew itself" in page_of(tell(run, STORY, demo=True)).text


def test_the_curves_hold_what_the_pointer_shows(run: Path) -> None:
    figures = {svg["aria-label"]: json.loads(svg["data-chart"] or "") for svg in page_of(run).all("svg")
               if "data-chart" in svg}  # fmt: skip
    assert list(figures) == ["Loss", "Loss terms, weighted", "jaccard", "mae", "Learning rate",
                             "Gradient norm, before clipping", "Where the time goes", "Steps per second"]  # fmt: skip
    assert figures["Loss"] == {"to": 200, "curves": [[[50, 100, 200], [2, 1, 0.5]]]}
    assert figures["Loss terms, weighted"]["curves"][1] == [[50, 100, 200], [0.8, 0.4, 0.2]]
    assert figures["jaccard"]["curves"] == [[[50, 100, 200], [0.5] * 3], [[100, 200], [0.7123, 0.6012]]]
    assert figures["Gradient norm, before clipping"]["curves"] == [[[50, 100, 200], [4, 4, None]]]
    assert [values[0] for _, values in figures["Where the time goes"]["curves"]] == [0.125, 0.25, 0.625]


@pytest.mark.parametrize(
    ("metric", "base", "words"),
    [
        ("jaccard", 0.8, "worse than the base model by 0.1000"), ("jaccard", 0.7, "equal to the base model"),
        ("jaccard", 0.6, "better than the base model by 0.1000"), ("mae", 0.8, "better than the base model by 0.1000"),
        ("mae", 0.5, "worse than the base model by 0.2000"),
    ],
)  # fmt: skip
def test_better_and_worse_are_the_readers(metric: str, base: float, words: str, tmp_path: Path) -> None:
    story = [validation(0, 0, is_base=True, metrics={metric: base}), validation(100, 0, metrics={metric: 0.7})]
    assert f"the best is {words}" in page_of(tell(tmp_path / "run", story, metric=metric)).text


def test_a_page_that_nobody_updates_does_not_claim_that_the_run_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> str:
        page = page_of(run)
        assert ("refresh" in page.source.split("<style>")[0]) == ("running" in page.shown("b"))
        return page.shown("b")[0]

    assert state() == "running"
    (run / "status.txt").write_text("stopped by SIGTERM\n")
    assert state() == "stopped by SIGTERM"
    (run / "status.txt").unlink()
    later = time.time() + 3600
    monkeypatch.setattr("report.time.time", lambda: later)
    assert state().startswith("last heard at 20")


def test_the_time_spent_leaves_pauses_out(tmp_path: Path) -> None:
    run = tell(tmp_path / "run", [])
    times = {"start": 1000, "end": 1600, "resume": 90_000}
    lines = [json.dumps(vars(Event(kind, "", 0, at))) for kind, at in times.items()]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "train/loss": 1.0, "time": 90300}\n')
    assert "time 15 min 00 s" in page_of(run).text


# ---------------------------------------------------------------- names that would break it


def test_no_name_gets_out_of_its_place(tmp_path: Path) -> None:
    story = [
        Event(EVIL, EVIL, 1),
        step(10, last={"loss": 1.0, f"loss/{EVIL}": 1.0, EVIL: 0.5}),
        validation(20, 0.5, metrics={"jaccard": 0.5, EVIL: 0.5}, per_dataset={EVIL: {EVIL: 1.0}, "B": {}},
                   best=pictures(1, name=EVIL), worst=pictures(1, name=EVIL)),
    ]  # fmt: skip
    run = tell(tmp_path / "run", story, "failed", name=EVIL, family=EVIL, command=EVIL, environment={EVIL: EVIL},
               changed=[[EVIL, EVIL, {EVIL: [EVIL]}]],
               data=[{"part": EVIL, "dataset": EVIL, "samples": 1, "weight": 1}])  # fmt: skip
    (run / "config.yml").write_text(f"data:\n  train: {EVIL}\n")
    (run / "status.txt").write_text(EVIL)
    page = page_of(run)  # which says that there is one script and one style
    assert page.shown("h1") == [EVIL]
    assert page.text.count(EVIL) > 15
    assert [sample["data-title"] for sample in page.all("button") if "data-title" in sample] == [
        f"{EVIL}: jaccard 0.9000"
    ] * 2


def test_nothing_but_the_pages_own_script_and_style_may_run(run: Path) -> None:
    page = page_of(run)
    (policy,) = (meta["content"] or "" for meta in page.all("meta") if "http-equiv" in meta
                 and meta["http-equiv"] == "Content-Security-Policy")  # fmt: skip
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not any("style" in attributes for _, attributes in page.tags)  # the policy would forbid it


def test_only_pictures_are_read(run: Path) -> None:
    (run.parent / "secret.jpg").write_text("canary")
    index = json.loads((run / "validation.json").read_text())
    index["best"][0]["panels"] = {"image": "../secret.jpg", "truth": "/etc/hostname"}
    (run / "validation.json").write_text(json.dumps(index))
    page = page_of(run)
    assert base64.b64encode(b"canary").decode() not in page.source
    assert "image is missing" in page.text


# ---------------------------------------------------------------- what a kill leaves


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "run.json", "validation.json", "config.yml", "all"])
def test_a_page_is_made_of_whatever_is_there(name: str, share: float, run: Path) -> None:
    for file in [run / name] if name != "all" else [file for file in run.iterdir() if file.is_file()]:
        cut(file, share)
    page_of(run)


@pytest.mark.parametrize("kept", ["config.yml", "metrics.jsonl", "events.jsonl", "run.json", "validation.json", ""])
def test_a_page_is_made_of_any_one_file(kept: str, run: Path) -> None:
    for file in run.iterdir():
        if file.is_file() and file.name != kept:
            file.unlink()
    page = page_of(run)
    assert ("Nothing has been recorded yet." in page.text) == (kept != "metrics.jsonl")


def test_without_direction_nothing_is_called_best(run: Path) -> None:
    (run / "run.json").unlink()
    shown = page_of(run).text
    assert "last jaccard 0.6012" in shown
    assert "best jaccard" not in shown


def test_lines_after_a_torn_one_are_read(run: Path) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write('{"kind": "ski' + json.dumps(vars(Event("resume", "lost in the torn line", 1))) + "\n")
        file.write(json.dumps(vars(Event("hint", "raise data.num_workers", 200))) + "\n")
    shown = page_of(run).text
    assert "raise data.num_workers" in shown
    assert "lost in" not in shown


def test_what_a_resume_took_back_is_not_progress(tmp_path: Path) -> None:
    story = [Event("skipped", "", 390), step(200), Event("resume", "", 200)]
    page = page_of(tell(tmp_path / "run", story))
    assert "step 200 of 400" in page.text
    assert not [path for path in page.all("path") if path.get("class") == "skipped"]
    assert [path for path in page.all("path") if path.get("class") == "resumed"]


def test_a_validation_and_its_pictures_change_together(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write is the last one before a kill, the index names pictures that are there."""

    class Killed(BaseException):
        pass

    replace, states = os.replace, set()
    for last in range(20):
        write_validation(run, validation(100, 0.7))
        left = iter(range(last))

        def replace_or_die(source: Path, target: Path, left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_or_die)
        second = validation(200, 0.8, best=pictures(2, seed=7), worst=pictures(2, seed=8))
        with contextlib.suppress(Killed):
            write_validation(run, second)
        monkeypatch.setattr(os, "replace", replace)
        index = json.loads((run / "validation.json").read_text())
        states.add(index["step"])
        named = [name for sample in (*index["best"], *index["worst"]) for name in sample["panels"].values()]
        assert len(named) == 12
        assert all((run / name).is_file() for name in named)
        assert len(page_of(run).all("img")) == 12
    assert states == {100, 200}
    assert {f"pictures/{file.name}" for file in (run / "pictures").iterdir()} == set(named)  # the old ones are gone


def test_a_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(run).read_bytes()

    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    (run / "status.txt").write_text("finished\n")
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


# ---------------------------------------------------------------- when it is written


def test_the_base_models_pictures_are_shown_until_the_first_validation(tmp_path: Path) -> None:
    run = tell(tmp_path / "run", [BASE])
    first = page_of(run)
    assert "3 samples of the base model" in first.text
    assert len(first.all("img")) == 12
    tell(run, [BASE, validation(100, 0.7, best=pictures(1, seed=5), worst=[])])
    page = page_of(run)
    assert "of the base model" not in page.text
    assert len(page.all("img")) == 3


def test_pages_are_as_far_apart_as_their_cost_asks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, cost, written = 1000.0, 0.1, []

    def write(run_dir: Path) -> None:
        nonlocal now
        now += cost
        written.append(round(now))

    monkeypatch.setattr("report.time.monotonic", lambda: now)
    monkeypatch.setattr(report, "write_report", write)
    listener = Report(run)
    listener.on_run_start(RunInfo("run", run, {}, False, 0))
    for _ in range(100):
        now += 1
        listener.on_step(step(1))
        listener.on_event(Event("hint", "", 1))
    assert len(written) == 4  # at the start, then every half minute
    listener.on_validation(validation(1, 0.5))
    listener.on_run_end("finished")
    assert len(written) == 6
    written.clear()
    cost = 4.0
    for _ in range(2000):
        now += 1
        listener.on_step(step(1))
    assert len(written) in (4, 5)


# ---------------------------------------------------------------- size


def test_a_long_run_has_a_small_page_that_keeps_its_extremes(tmp_path: Path) -> None:
    run = tell(tmp_path / "run", [])
    line = '{"kind": "train", "epoch": 1, "step": %d, "lr": 1e-4, "grad_norm": %.4f, "train/loss": %.4f, "time": %d}'
    noise = np.random.default_rng(0).uniform(1, 2, 200_000)
    noise[123_456] = 1e6
    with open(run / "metrics.jsonl", "w") as file:
        file.writelines(line % (10 * i, value, value, i) + "\n" for i, value in enumerate(noise))
    with open(run / "events.jsonl", "w") as file:
        file.writelines(json.dumps(vars(Event("skipped", "not finite", 20 * i))) + "\n" for i in range(50_000))
    page = page_of(run)
    assert len(page.source) < 400_000
    assert "49,960 came before" in page.text
    curve = charts.thin("loss", "s0", np.arange(200_000), noise)
    assert len(curve.steps) == charts.POINTS
    assert curve.highs.max() == 1e6
    assert curve.lows.min() == noise.min()


def test_gaps_stay_gaps() -> None:
    values = np.array([1.0, 2.0, math.nan, math.inf, 3.0, 4.0])
    curve = charts.thin("loss", "s0", np.arange(6.0), values)
    drawn = charts.line_chart("Loss", [curve], charts.Marks(5))
    (line,) = re.findall(r'class="line s0" d="([^"]*)"', drawn)
    assert line.count("M") == 2
    assert "nan" not in drawn
    assert "inf" not in drawn


@pytest.mark.parametrize(
    "values",
    [
        [math.nan],
        [0.0],
        [5.0, 5.0],
        [-1.0, 1.0],
        [1e-9, 1e9],
        [0.0, 1e9],
        [-3e-7, 0.0],
        [12001.0, 12003.0],
        [0.98765, 0.98767],
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_any_values_have_a_scale(values: list[float], log: bool) -> None:
    scale = charts.value_scale(np.array(values), log)
    assert 1 <= len(scale.ticks) <= 8
    for value in [*scale.ticks, *(value for value in values if math.isfinite(value))]:
        assert charts.TOP - 1e-6 <= scale(value) <= charts.BOTTOM + 1e-6
    assert len({charts.number_short(tick) for tick in scale.ticks}) == len(scale.ticks)


# ---------------------------------------------------------------- the command, and a real run


def test_the_command_writes_pages_and_says_what_is_no_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").unlink()
    code, out, _ = run_script(monkeypatch, "report", str(run))
    assert (code, out) == (0, f"wrote {run / 'report.html'}\n")
    assert (run / "report.html").is_file()
    for words, sentence in (
        ([str(tmp_path)], "holds no run"), ([str(tmp_path / "absent")], "holds no run"),
        ([], "no run folder is named"), (["--out", str(run)], "unknown flag --out"),
    ):  # fmt: skip
        code, _, error = run_script(monkeypatch, "report", *words)
        assert code == 2
        assert sentence in error
    assert not (tmp_path / "report.html").exists()


def test_help_comes_before_anything_heavy() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['report.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'cv2'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "report.py RUN [RUN ...]" in shown.stdout
    assert "--debug" in shown.stdout


def test_a_real_run_leaves_a_report(tmp_path: Path) -> None:
    add_toy_family()
    draw_set(tmp_path / "train", 6)
    draw_set(tmp_path / "val", 3, seed=1)
    flags = ["--epochs", "2", "--logging.log_frequency", "1"]
    in_process(*flags_for(tmp_path, tmp_path / "runs", "first", *flags, model=TOY))
    run = tmp_path / "runs/first"
    assert ">finished<" in (run / "report.html").read_text()
    rows = read_records(run / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "val"][-1]
    page = page_of(run)
    assert f"last jaccard {last['val/jaccard']:.4f} epoch 2, step {last['step']}" in page.text
    assert len(page.all("img")) == 24  # three samples, best and worst, four panels
    assert "train.epochs 100 2" in page.text

    weights = ["--model.pretrained", str(run / "best.pth")]
    in_process(*flags_for(tmp_path, tmp_path / "runs", "second", *flags, *weights, model=TOY))
    shown = page_of(tmp_path / "runs/second").text
    assert re.search(r"base model's jaccard 0\.\d{4} the best is (better|worse) than the base model by 0\.\d{4}", shown)


def test_classes_without_a_score_are_named_and_have_no_row() -> None:
    rows = [{"name": name, "ap": score, "objects": count} for name, score, count in
            (("cat", 0.5, 3), ("dog", None, 0), ("<b>", 0.25, 1))]  # fmt: skip
    page = report.class_table(SimpleNamespace(validation={"per_class": rows, "epoch": 1, "step": 2}))  # type: ignore[arg-type]
    assert page.index("&lt;b&gt;") < page.index("cat")
    assert ">3<" in page
    assert "1 without a score: dog" in page
    assert page.count("<tr") == 3

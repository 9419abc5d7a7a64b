"""A run as one HTML page, for whoever looks at it: `python report.py runs/my_run` writes `runs/my_run/report.html`.

While a run goes on, `Report` keeps the page up to date. The page is made of the files of the run folder alone, so it
can be written again at any time, also of a run that was killed; it loads nothing and runs no script but its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from config import answer_at_once
from errors import UserError, run_command

ACTIONS = {"debug": "show the traceback of a user error", "help": "this page"}


@dataclass
class NoSettings:
    """This command has none: its `--help` lists nothing but `ACTIONS`."""


if __name__ == "__main__":
    answer_at_once("report.py RUN [RUN ...]", ACTIONS, NoSettings)

import base64
import hashlib
import json
import math
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import cv2
import numpy as np

from charts import POINTS, Curve, Marks, histogram, line_chart, share_chart, thin
from checkpoint import read_json, write_bytes, write_text
from gallery import Picture
from tracking import TIMES, Callback, Event, RunInfo, StepRecord, ValidationRecord

TEMPLATE = Path(__file__).with_name("report_template.html")
PAUSE = 30  # seconds between two pages of a run that goes on
QUIET = 600  # seconds without a record, after which nobody can say that a run goes on
EVENTS = 40  # shown, the last ones
JPEG_QUALITY = 88
ABSENT = 20  # classes that are named though they have no score

Row = dict[str, Any]


# ---------------------------------------------------------------- while the run goes on


class Report(Callback):
    """Writes `report.html`, and for it `pictures/` and `validation.json` of the last validation, into a run folder.

    The page is written after every validation and at the end. In between every `PAUSE` seconds, but so that it never
    takes more than a hundredth of the time, however long the records have grown.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.due = run_dir, 0.0

    def on_run_start(self, run: RunInfo) -> None:
        self._write()

    def on_step(self, record: StepRecord) -> None:
        self._write_when_due()

    def on_event(self, event: Event) -> None:
        self._write_when_due()

    def on_validation(self, record: ValidationRecord) -> None:
        write_validation(self.run_dir, record)
        self._write()

    def on_run_end(self, status: str) -> None:
        self._write()

    def _write_when_due(self) -> None:
        if time.monotonic() >= self.due:
            self._write()

    def _write(self) -> None:
        began = time.monotonic()
        write_report(self.run_dir)
        ended = time.monotonic()
        self.due = ended + max(PAUSE, 100 * (ended - began))


def write_validation(run_dir: Path, record: ValidationRecord) -> None:
    """Put `validation.json` and its pictures in the place of the last ones.

    Pictures are named by their content and old ones go last, so a kill at any moment leaves a `validation.json` whose
    pictures are all there.
    """
    pictures = run_dir / "pictures"
    pictures.mkdir(exist_ok=True)
    best, worst = ([_write_pictures(pictures, each) for each in ranked] for ranked in (record.best, record.worst))
    figures = {title: _write_picture(pictures, pixels, ".png") for title, pixels in record.figures.items()}
    content = {
        "epoch": record.epoch,
        "step": record.step,
        "is_base": record.is_base,
        "primary": record.primary,
        "metrics": record.metrics,
        "per_dataset": record.per_dataset,
        "base": record.base,
        "samples": [
            {"dataset": row["dataset"], "sample_id": row["sample_id"], "score": row["scores"][record.primary]}
            for row in record.rows
        ],
        "best": best,
        "worst": worst,
        "panel_notes": record.panel_notes,
        "per_class": record.per_class,
        "figures": figures,
    }
    write_text(run_dir / "validation.json", json.dumps(_plain(content), allow_nan=False) + "\n")
    used = {*figures.values(), *(name for sample in (*best, *worst) for name in sample["panels"].values())}
    for file in pictures.iterdir():
        if f"pictures/{file.name}" not in used:
            file.unlink()


def _write_pictures(folder: Path, picture: Picture) -> Row:
    return {
        "dataset": picture.dataset,
        "sample_id": picture.sample_id,
        "path": picture.path,
        "score": picture.score,
        "panels": {name: _write_picture(folder, pixels, ".jpg") for name, pixels in picture.panels.items()},
    }


def _write_picture(folder: Path, pixels: np.ndarray, suffix: str) -> str:
    """Write (H, W, 3) uint8 RGB under the digest of its content; returns its path in the run folder."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    _, encoded = cv2.imencode(suffix, pixels[..., ::-1], options)
    file = folder / f"{hashlib.sha256(encoded.tobytes()).hexdigest()[:20]}{suffix}"
    write_bytes(file, encoded.tobytes())
    return f"pictures/{file.name}"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: null in place of what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- what the files say


@dataclass
class RunFiles:
    """What stands in a run folder; of what is missing or unreadable, nothing."""

    run_dir: Path
    about: Row  # run.json
    config: str  # config.yml
    status: str  # status.txt
    train: dict[str, np.ndarray]  # metrics.jsonl, kind train: a float64 column by name, NaN where a line lacks it
    validations: list[Row]  # kind val
    base: Row  # kind base
    events: list[Row]  # events.jsonl
    validation: Row  # validation.json
    written: float  # now, in seconds since 1970

    def last(self, key: str) -> float:
        """`step` or `time` of the newest record; 0 without any.

        Of the events the last alone: those before a resume may be of steps that it took back.
        """
        rows = (self.base, *self.validations[-1:], *self.events[-1:])
        return max([0.0, *self.train.get(key, np.zeros(0))[-1:], *(row.get(key) or 0.0 for row in rows)])

    @property
    def heard(self) -> float:
        """When the run last gave a sign, in seconds since 1970; 0 where it never did."""
        return max(self.last("time"), self.about.get("created") or 0.0)

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return int(self.last("step"))

    @property
    def is_running(self) -> bool:
        return not self.status and self.written - self.heard < QUIET

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.about.get("metric") or self.validation.get("primary") or next(iter(self.metrics), "")

    @property
    def metrics(self) -> list[str]:
        """The metrics of the validations."""
        rows = [self.base, *self.validations]
        return list(dict.fromkeys(key[4:] for row in rows for key in row if key.startswith("val/")))

    def higher_is_better(self, metric: str) -> bool | None:
        """None where nothing says so, as in the folder of an older program."""
        return self.about.get("higher_is_better", {}).get(metric)

    def best(self, metric: str) -> Row | None:
        """The validation with the best value, the first of equals; None where nothing says what is better."""
        rows = [row for row in self.validations if row.get(f"val/{metric}") is not None]
        higher = self.higher_is_better(metric)
        if not rows or higher is None:
            return None
        return (max if higher else min)(rows, key=lambda row: row[f"val/{metric}"])

    @property
    def elapsed(self) -> float:
        """Seconds of work: without the pauses between an end and the resume after it."""
        rows = [self.base, *self.validations, *self.events]
        moments = np.sort([*self.train.get("time", []), *(row["time"] for row in rows if row.get("time"))])
        begins = [event["time"] for event in self.events if event.get("kind") in ("start", "resume")]
        return float(np.diff(moments)[~np.isin(moments[1:], begins)].sum())

    def steps_of(self, kind: str) -> list[int]:
        """The steps at which events of a kind happened."""
        return [event["step"] for event in self.events if event.get("kind") == kind and event["step"] <= self.step]


def read_run(run_dir: Path) -> RunFiles:
    """All that a report is made of. A killed run may have left any file out, and its last lines cut short."""
    columns: dict[str, array] = {}
    lines = 0
    validations, base = [], {}
    for row in read_lines(run_dir / "metrics.jsonl"):
        if row.get("kind") == "train":  # hundreds of thousands: kept as numbers, not as rows
            for name, value in row.items():
                column = columns.setdefault(name, array("d"))
                column.extend([math.nan] * (lines - len(column)))
                column.append(value if isinstance(value, (int, float)) else math.nan)
            lines += 1
        elif row.get("kind") == "val":
            validations.append(row)
        elif row.get("kind") == "base":
            base = row
    for column in columns.values():
        column.extend([math.nan] * (lines - len(column)))
    return RunFiles(
        run_dir=run_dir,
        about=read_json(run_dir / "run.json"),
        config=read_text(run_dir / "config.yml"),
        status=read_text(run_dir / "status.txt").strip(),
        train={name: np.array(column) for name, column in columns.items()},
        validations=validations,
        base=base,
        events=list(read_lines(run_dir / "events.jsonl")),
        validation=read_json(run_dir / "validation.json"),
        written=time.time(),
    )


def read_text(path: Path) -> str:
    """The content, or nothing where there is no file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path) -> Iterator[Row]:
    """The object of each line, one by one. A line that a kill cut short is passed over, as the next may be whole."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(content, dict):
                yield content


# ---------------------------------------------------------------- the page


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder from the files that are there; returns its path."""
    run = read_run(run_dir)
    template = TEMPLATE.read_text(encoding="utf-8")
    page = Template(template).substitute(
        policy=policy(template),
        title=escape(f"{title_of(run)} · {state_of(run)[1]}"),
        refresh='<noscript><meta http-equiv="refresh" content="60"></noscript>' if run.is_running else "",
        content="\n".join(section(run) for section in SECTIONS),
        footer=f"Written {moment(run.written)} by Maskwright from the files of the run folder.",
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def policy(template: str) -> str:
    """A Content-Security-Policy: no network, pictures from within the page, and no style or script but the template's.

    The two are named by their digest, so that markup that found a way in could run nothing.
    """
    digests = []
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]  # type: ignore[index]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests.append(f"{tag}-src 'sha256-{digest}'")
    return f"default-src 'none'; img-src data:; {'; '.join(digests)}; base-uri 'none'; form-action 'none'"


def title_of(run: RunFiles) -> str:
    return str(run.about.get("name") or run.run_dir.resolve().name)


def state_of(run: RunFiles) -> tuple[str, str]:
    """(class of the style sheet, words). Of a run that was killed it is known only when it last spoke."""
    if run.status:
        return run.status if run.status in ("finished", "failed") else "", run.status
    if run.is_running:
        return "running", "running"
    return "", f"last heard at {moment(run.heard)}" if run.heard else "nothing recorded yet"


def header(run: RunFiles) -> str:
    words, about = [], run.about
    if "family" in about:
        words.append(f"{about['family']} · {about['task']}")
    if about.get("parameters"):
        words.append(
            f"{about['parameters'] / 1e6:.1f} M parameters, {about['trainable_parameters'] / 1e6:.1f} M trained"
        )
    if about.get("created"):
        words.append(f"started {moment(about['created'])}")
    kind, state = state_of(run)
    heard = f"<span>last record {moment(run.heard)}</span>" if run.heard and (kind or run.status) else ""
    demo = (
        "<p>This run learned from demo data that the program drew itself: it shows that everything works, and says "
        "nothing about real pictures.</p>"
    )
    return (
        f'<h1>{escape(title_of(run))}</h1><p class="about">{escape(" · ".join(words))}</p>'
        f'<p class="state {kind}" data-heard="{run.heard:.0f}" data-quiet="{QUIET}"><b>{escape(state)}</b>{heard}</p>'
        f"{demo if about.get('demo') else ''}"
    )


def headline(run: RunFiles) -> str:
    """The figures that one looks for first."""
    figures = [*scores(run), progress(run), *pace(run)]
    entries = (
        f'<div><dt>{escape(name)}</dt><dd class="value">{value}</dd><dd class="note">{note}</dd></div>'
        for name, value, note in figures
        if value
    )
    return f'<dl class="figures">{"".join(entries)}</dl>'


def scores(run: RunFiles) -> list[tuple[str, str, str]]:
    """(name, value, note) of the best validation, the last and the base model's."""
    metric, key = run.metric, f"val/{run.metric}"
    best, base = run.best(metric), run.base.get(key)
    figures = []
    if best:
        figures.append((f"best {metric}", decimal(best[key]), place(best)))
    if run.validations:
        figures.append((f"last {metric}", decimal(run.validations[-1].get(key)), place(run.validations[-1])))
    if base is not None:
        figures.append((f"base model's {metric}", decimal(base), against_base(run, best[key] - base) if best else ""))
    return figures


def against_base(run: RunFiles, difference: float) -> str:
    """What the best validation's difference from the base model is for the reader: good or bad."""
    word = verdict(difference, run.higher_is_better(run.metric))
    if word == "equal":
        return "the best is equal to the base model"
    words = f"the best is {word} than the base model by {abs(difference):.4f}"
    return f'<span class="warn">{words}</span>' if word == "worse" else words


def verdict(difference: float, higher_is_better: bool | None) -> str:
    """What a difference is for the reader."""
    if not difference or higher_is_better is None:
        return "" if difference else "equal"
    return "better" if (difference > 0) == higher_is_better else "worse"


def progress(run: RunFiles) -> tuple[str, str, str]:
    total, per_epoch = run.about.get("total_steps"), run.about.get("steps_per_epoch")
    if not total:
        return "step", f"{run.step:,}", ""
    words = f"of {total:,}"
    if per_epoch:
        words += f", epoch {min(run.step // per_epoch + 1, run.about['epochs']):,} of {run.about['epochs']:,}"
    bar = f'<progress max="{total}" value="{run.step}" aria-label="progress"></progress>'
    return "step", f"{run.step:,}", bar + words


def pace(run: RunFiles) -> list[tuple[str, str, str]]:
    """How long it has taken, will take, and how fast it is: the median of the last lines."""
    speeds = [speed for speed in run.train.get("steps_per_second", [])[-20:] if speed > 0]
    speed = median(speeds) if speeds else 0.0
    left = (run.about.get("total_steps", 0) - run.step) / speed if speed else 0.0
    remaining = f"{duration(left)} to go" if run.is_running and left > 0 else ""
    skipped = int(run.train["skipped"][-1]) if "skipped" in run.train else 0
    pace = f"{speed:.2f} steps/s" if speed >= 1 else f"{1 / speed:.1f} s/step" if speed else ""
    return [("time", duration(run.elapsed) if run.elapsed else "", remaining), ("speed", pace, ""),
            ("skipped steps", str(skipped or ""), "loss or gradient was not finite")]  # fmt: skip


def curves(run: RunFiles) -> str:
    """A chart for each thing that was recorded over the steps."""
    marks = Marks(run.step, run.steps_of("resume"), run.steps_of("skipped"))
    losses = [name for name in run.train if name.startswith("train/loss")]
    figures = [
        train_chart(run, marks, "Loss", {"train/loss": "loss"}, log=True),
        train_chart(run, marks, "Loss terms, weighted", {name: name[11:] for name in losses if name[11:]}, log=True),
        *(metric_chart(run, marks, metric) for metric in metrics_of(run)),
        train_chart(run, marks, "Learning rate", {"lr": "learning rate"}),
        train_chart(run, marks, "Gradient norm, before clipping", {"grad_norm": "norm"}, log=True),
        time_chart(run, marks),
        train_chart(run, marks, "Steps per second", {"steps_per_second": "steps/s"}),
    ]
    if not any(figures):
        return heading("Curves") + '<p class="note">Nothing has been recorded yet.</p>'
    legend = [f'<i class="key {kind}"></i>{words}' for kind, words, there in
              (("resumed", "resumed", marks.resumed), ("skipped", "skipped step", marks.skipped)) if there]  # fmt: skip
    if len(run.train.get("step", [])) > POINTS:
        legend.append("each point is the mean of several lines, the band spans their least and greatest")
    note = f'<p class="note">{" &ensp; ".join(legend)}</p>' if legend else ""
    return f'{heading("Curves")}{note}<div class="charts">{"".join(figures)}</div>'


def metrics_of(run: RunFiles) -> list[str]:
    """All metrics, of validation and training, the run's own first."""
    trained = [name[6:] for name in run.train if name.startswith("train/") and not name.startswith("train/loss")]
    known = dict.fromkeys([*run.metrics, *trained])
    return sorted(known, key=lambda name: name != run.metric)


def train_chart(run: RunFiles, marks: Marks, title: str, names: dict[str, str], log: bool = False) -> str:
    """Columns of the training lines under the names they are shown by."""
    drawn = train_curves(run, names)
    return line_chart(title, drawn, marks, log=log) if drawn else ""


def train_curves(run: RunFiles, names: dict[str, str]) -> list[Curve]:
    there = {column: name for column, name in names.items() if column in run.train}
    return [thin(name, f"s{index % 8}", run.train["step"], run.train[column])
            for index, (column, name) in enumerate(there.items())]  # fmt: skip


def metric_chart(run: RunFiles, marks: Marks, metric: str) -> str:
    """Training and validation, with the base model's value; on the run's metric also its best."""
    key, drawn = f"val/{metric}", []
    if f"train/{metric}" in run.train:
        drawn.append(thin("training", "train", run.train["step"], run.train[f"train/{metric}"]))
    rows = [row for row in run.validations if key in row]
    if rows:
        values = np.array([row[key] for row in rows], dtype=float)
        drawn.append(thin("validation", "val", np.array([row["step"] for row in rows], dtype=float), values))
    best = run.best(metric) if metric == run.metric else None
    marked = (best["step"], best[key]) if best else None
    return line_chart(metric, drawn, marks, level=run.base.get(key), best=marked) if drawn else ""


def time_chart(run: RunFiles, marks: Marks) -> str:
    """Which part of the wall time the loop waited for data, worked on the host, and so on."""
    there = {f"time_{name}": name for name in TIMES if np.nansum(run.train.get(f"time_{name}", 0)) > 0}
    return share_chart("Where the time goes", train_curves(run, there), marks) if there else ""


def last_validation(run: RunFiles) -> str:
    """The last validation: how its samples are spread, what each data set reached, and every metric."""
    parts = "".join((distribution(run), metric_table(run), dataset_table(run), class_table(run), figures(run)))
    return f'{heading("Validation")}<div class="beside">{parts}</div>' if parts else ""


def distribution(run: RunFiles) -> str:
    samples = run.validation.get("samples", [])
    values = np.array([sample["score"] for sample in samples], dtype=float)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ""
    where = "of the base model" if run.validation.get("is_base") else f"at {place(run.validation)}"
    words = (
        f"{len(samples):,} samples {where}: mean {finite.mean():.4f}, median {np.median(finite):.4f}, "
        f"{finite.min():.4f} to {finite.max():.4f}"
    )
    if len(finite) < len(values):
        words += f"; {len(values) - len(finite):,} without a score"
    return histogram(f"Samples by {run.validation['primary']}", words, finite)


def metric_table(run: RunFiles) -> str:
    """Every metric of the last validation beside the best of the run and the base model's."""
    if not run.validations:
        return ""
    last, rows = run.validations[-1], []
    for metric in run.metrics:
        key, best = f"val/{metric}", run.best(metric)
        cells = [metric, decimal(last.get(key))]
        cells += [decimal(best[key]), f"{best['step']:,}"] if best else ["–", ""]
        cells += [decimal(run.base.get(key)), compared(run, metric, last)] if run.base else []
        rows.append(cells)
    columns = ["metric", "last", "best", "at step"] + (["base model", "last − base model"] if run.base else [])
    return f"<div><h3>All metrics, last at {place(last)}</h3>{table(columns, rows, numbers=(1, 2, 3, 4))}</div>"


def compared(run: RunFiles, metric: str, row: Row) -> str:
    now, base = row.get(f"val/{metric}"), run.base.get(f"val/{metric}")
    if now is None or base is None:
        return "–"
    return f"{now - base:+.4f} {verdict(now - base, run.higher_is_better(metric))}"


def dataset_table(run: RunFiles) -> str:
    per_dataset = run.validation.get("per_dataset", {})
    if len(per_dataset) < 2:
        return ""  # it would say what the table above says
    metrics = list(dict.fromkeys(metric for scores in per_dataset.values() for metric in scores))
    rows = [[name, *(decimal(scores.get(metric)) for metric in metrics)] for name, scores in per_dataset.items()]
    shown = table(["data set", *metrics], rows, numbers=range(1, len(metrics) + 1))
    return f"<div><h3>By data set, at {place(run.validation)}</h3>{shown}</div>"


def class_table(run: RunFiles) -> str:
    """The scores of each class, the worst first: those are the ones to look into."""
    classes = run.validation.get("per_class", [])
    if not classes:
        return ""
    names = [name for name in classes[0] if name != "name"]
    ranked = sorted((row for row in classes if row[names[0]] is not None), key=lambda row: row[names[0]])
    rows = [[str(row["name"]), *(number_text(row[name]) for name in names)] for row in ranked]
    shown = table(["class", *names], rows, numbers=range(1, len(names) + 1))
    absent = [str(row["name"]) for row in classes if row[names[0]] is None]
    listed = ", ".join(absent[:ABSENT]) + (" …" if len(absent) > ABSENT else "")
    note = f'<p class="note">{len(absent)} without a score: {escape(listed)}</p>' if absent else ""
    return f"<div><h3>By class, at {place(run.validation)}</h3>{shown}{note}</div>"


def number_text(value: float | int | None) -> str:
    """A count as it is, a score with its decimals."""
    return str(value) if isinstance(value, int) else decimal(value)


def figures(run: RunFiles) -> str:
    """Pictures of all samples together."""
    drawn = run.validation.get("figures", {})
    parts = []
    for title, file in drawn.items():
        shown = f'<div class="scroll">{picture(run, title, file)}</div>'
        parts.append(f"<div><h3>{escape(title[:1].upper() + title[1:])}</h3>{shown}</div>")
    return "".join(parts)


def samples(run: RunFiles) -> str:
    """The best and the worst of the last validation; a click enlarges one."""
    ranked = {which: run.validation[which] for which in ("best", "worst") if run.validation.get(which)}
    if not ranked:
        return ""
    drawn = {panel for rank in ranked.values() for sample in rank for panel in sample["panels"]}
    notes = [f'<p class="note">{name}: {words}</p>' for name, words in panel_notes(run).items() if name in drawn]
    lists = [sample_list(run, which) for which in ranked]
    return f'{heading("Samples")}{"".join(notes)}<div class="samples">{"".join(lists)}</div>'


def sample_list(run: RunFiles, which: str) -> str:
    ranked = run.validation[which]
    names = "".join(f"<span>{escape(name)}</span>" for name in ranked[0]["panels"])
    items = "".join(sample_item(run, rank, sample) for rank, sample in enumerate(ranked, 1))
    title = f"<h3>The {which} by {escape(run.validation['primary'])}</h3>"
    return f'<div>{title}<div class="names" aria-hidden="true">{names}</div><ol>{items}</ol></div>'


def sample_item(run: RunFiles, rank: int, sample: Row) -> str:
    name, score = escape(sample["sample_id"]), decimal(sample["score"])
    pictures = "".join(picture(run, panel, file, name) for panel, file in sample["panels"].items())
    title = f"{name}: {escape(run.validation['primary'])} {score}"
    return (
        f'<li><button type="button" class="sample" data-title="{title}" data-path="{escape(sample["path"])}">'
        f'<span class="panels">{pictures}</span>'
        f'<span class="caption"><span class="any">{rank}. {name}</span><b>{score}</b></span></button></li>'
    )


def picture(run: RunFiles, panel: str, file: str, sample: str = "") -> str:
    """One panel as a data URI. Only what lies in `pictures/` is read, whatever the index says."""
    path = run.run_dir / "pictures" / Path(file).name
    if not path.is_file():
        return f'<span class="absent">{escape(panel)} is missing</span>'
    data = base64.b64encode(path.read_bytes()).decode()
    caption = escape(": ".join(word for word in (panel, panel_notes(run).get(panel)) if word))
    kind = "png" if path.suffix == ".png" else "jpeg"
    words = f"{escape(panel)} of {sample}" if sample else escape(panel)
    return f'<img src="data:image/{kind};base64,{data}" alt="{words}" data-panel="{caption}">'


def panel_notes(run: RunFiles) -> dict[str, str]:
    """What the colours of a panel mean."""
    return {str(name): str(words) for name, words in run.validation.get("panel_notes", {}).items()}


def happened(run: RunFiles) -> str:
    """Starts, resumes, skipped steps, warnings, hints and the end."""
    if not run.events:
        return ""
    shown = run.events[-EVENTS:]
    rows = [
        [moment(event["time"], "%m-%d %H:%M:%S"), f"{event['step']:,}", event["kind"], event["text"]] for event in shown
    ]
    left_out = len(run.events) - len(shown)
    note = f'<p class="note">The last {len(shown)}; {left_out:,} came before.</p>' if left_out else ""
    return heading("Events") + note + table(["time", "step", "kind", "what"], rows, numbers=(0, 1))


def settings(run: RunFiles) -> str:
    """What differs from the defaults, and the whole configuration, folded."""
    changed = [[key, value_of(default), value_of(value)] for key, default, value in run.about.get("changed", [])]
    parts = [table(["changed setting", "default", "here"], changed)] if changed else []
    if run.config:
        folded = f'<pre tabindex="0">{escape(run.config)}</pre>'
        parts.append(f"<details><summary>The whole configuration</summary>{folded}</details>")
    return heading("Settings") + "".join(parts) if parts else ""


def data(run: RunFiles) -> str:
    rows = [[str(row[key]) for key in ("part", "dataset", "samples", "weight")] for row in run.about.get("data", [])]
    return heading("Data") + table(["part", "data set", "samples", "weight"], rows, numbers=(2, 3)) if rows else ""


def environment(run: RunFiles) -> str:
    """What it ran on, and the command to run it again."""
    rows = [[name, str(value)] for name, value in run.about.get("environment", {}).items()]
    command = run.about.get("command", "")
    parts = [table(["what", "version"], rows)] if rows else []
    parts += [f'<h3>Command</h3><pre class="wrap">{escape(command)}</pre>'] if command else []
    return heading("Environment") + "".join(parts) if parts else ""


# In reading order. What a task shows beside these is a function here.
SECTIONS = (header, headline, curves, last_validation, samples, happened, settings, data, environment)


# ---------------------------------------------------------------- words and tables


def heading(title: str) -> str:
    return f"<h2>{escape(title)}</h2>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Text as a table that scrolls by itself where it is too wide; the columns `numbers` are set to the right."""

    def line(cells: Sequence[str], tag: str, end: str) -> str:
        kinds = (' class="number"' if index in numbers else "" for index in range(len(cells)))
        marked = (f"<{tag}{kind}>{escape(cell)}</{end}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    head = line(columns, 'th scope="col"', "th")
    body = "".join(line(row, "td", "td") for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def decimal(value: float | None) -> str:
    """As the console says a metric."""
    return "–" if value is None else f"{value:.4f}"


def place(row: Row) -> str:
    return f"epoch {row['epoch']:,}, step {row['step']:,}"


def value_of(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def moment(seconds: float, form: str = "%Y-%m-%d %H:%M:%S %Z") -> str:
    """A time of day where the run ran."""
    return time.strftime(form, time.localtime(seconds))


def duration(seconds: float) -> str:
    """Two units: 2 d 3 h, 1 h 05 min, 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# ---------------------------------------------------------------- the command


def command() -> None:
    """Write the report of every run folder named."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    unknown = [word for word in words if word.startswith("-")]
    if unknown or not words:
        reason = f"unknown flag {unknown[0]}" if unknown else "no run folder is named"
        raise UserError(f"{reason}: write python report.py runs/my_run")
    for word in words:
        run_dir = Path(word)
        if not any((run_dir / name).is_file() for name in ("config.yml", "run.json", "metrics.jsonl")):
            raise UserError(f"{run_dir} holds no run: name a folder that train.py wrote, such as runs/my_run")
        try:
            print(f"wrote {write_report(run_dir)}")
        except OSError as error:
            raise UserError(f"cannot write the report of {run_dir}: {error.strerror}") from None


if __name__ == "__main__":
    run_command(command)

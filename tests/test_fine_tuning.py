"""Fine-tuning: the model that a run starts from is scored first, and everything after is told against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import checkpoint
import train
from tests.helpers import TOY, add_toy_family, difference, draw_set, flags_for, in_process, records
from tracking import Callback, Event, ValidationRecord

FEW = ["--batch_size", "4", "--logging.log_frequency", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    add_toy_family()
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 8)
    draw_set(folder / "val", 12, seed=1)
    return folder


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, to fine-tune from."""
    runs = tmp_path_factory.mktemp("start")
    in_process(*flags_for(data, runs, "start", *FEW, "--epochs", "1", model=TOY))
    return runs / "start"


class Listener(Callback):
    def __init__(self) -> None:
        self.validations: list[ValidationRecord] = []
        self.events: list[Event] = []

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def on_event(self, event: Event) -> None:
        self.events.append(event)


def test_the_base_model_is_scored_first_and_kept(data: Path, start: Path, tmp_path: Path) -> None:
    heard = Listener()
    tuning = [*FEW, "--model.pretrained", str(start / "last.pth")]
    in_process(*flags_for(data, tmp_path, "tuned", *tuning, "--epochs", "2", model=TOY), callbacks=[heard])
    of_start = [row for row in records(start) if row["kind"] == "val"][-1]
    base, first, second = heard.validations
    assert base.is_base
    assert base.base == {}
    assert base.step == base.epoch == 0
    assert {f"val/{name}": value for name, value in base.metrics.items()} == pytest.approx(
        {name: value for name, value in of_start.items() if name.startswith("val/")}
    )
    assert first.base == second.base == base.metrics
    assert first.is_best  # the base's own score is no checkpoint of this run
    kinds = [row["kind"] for row in records(tmp_path / "tuned")]
    assert kinds == ["base", "train", "train", "val", "train", "train", "val"]
    assert checkpoint.load(tmp_path / "tuned" / "last.pth")["state"]["base"] == base.metrics

    again = Listener()
    flags = flags_for(data, tmp_path, "tuned", *tuning, "--epochs", "3", "--resume", model=TOY)
    in_process(*flags, callbacks=[again])
    assert [record.is_base for record in again.validations] == [False]
    assert again.validations[0].base == base.metrics


def test_a_run_from_random_weights_has_no_base(data: Path, tmp_path: Path) -> None:
    heard = Listener()
    in_process(*flags_for(data, tmp_path, "plain", *FEW, "--epochs", "1", model=TOY), callbacks=[heard])
    assert [(record.is_base, record.base) for record in heard.validations] == [(False, {})]


def test_pictures_come_with_every_validation(data: Path, tmp_path: Path) -> None:
    heard = Listener()
    in_process(*flags_for(data, tmp_path, "run", *FEW, "--epochs", "1", model=TOY), callbacks=[heard])
    (record,) = heard.validations
    by_score = sorted(record.rows, key=lambda row: -row["scores"]["jaccard"])
    assert record.primary == "jaccard"
    assert [each.sample_id for each in record.best] == [row["sample_id"] for row in by_score[:10]]
    assert [each.sample_id for each in record.worst] == [row["sample_id"] for row in by_score[::-1][:10]]
    assert record.best[0].score == by_score[0]["scores"]["jaccard"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 2 * 10 * 4
    assert by_score[0]["sample_id"].rpartition("/")[2] in page


def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_weights(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = [*FEW, "--model.pretrained", str(start / "last.pth"), "--epochs", "1"]
    in_process(*flags_for(data, tmp_path, "unbroken", *tuning, model=TOY))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            in_process(*flags_for(data, tmp_path, "killed", *tuning, model=TOY))
    assert not list((tmp_path / "killed").glob("*.pth"))
    in_process(*flags_for(data, tmp_path, "killed", *tuning, "--resume", model=TOY))
    one, other = (checkpoint.load(tmp_path / name / "last.pth") for name in ("unbroken", "killed"))
    assert not difference(one["model"], other["model"])
    assert records(tmp_path / "unbroken") == records(tmp_path / "killed")


def test_the_run_folder_says_what_the_run_is_and_what_happened(data: Path, tmp_path: Path) -> None:
    flags = [*FEW, "--lr", "3e-4"]
    heard = Listener()
    in_process(*flags_for(data, tmp_path, "run", *flags, "--epochs", "1", model=TOY), callbacks=[heard])
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (told["name"], told["family"], told["task"]) == ("run", "toy", "binary")
    assert (told["metric"], told["primary"], told["total_steps"], told["epochs"]) == ("jaccard", "jaccard", 2, 1)
    assert ["optimizer.lr", 1e-4, 3e-4] in told["changed"]
    assert [(each["part"], each["samples"]) for each in told["data"]] == [("training", 8), ("validation", 12)]
    assert told["parameters"] == told["trainable_parameters"] > 0
    assert "torch" in told["environment"]
    in_process(*flags_for(data, tmp_path, "run", *flags, "--epochs", "2", "--resume", model=TOY))
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (again["id"], again["created"]) == (told["id"], told["created"])
    assert again["total_steps"] == 4
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    course = [(event["kind"], event["step"]) for event in events if event["kind"] not in ("warning", "hint")]
    assert course == [("start", 0), ("end", 2), ("resume", 2), ("end", 4)]
    assert [event.kind for event in heard.events if event.kind != "warning"] == ["start", "end"]
    in_process(*flags_for(data, tmp_path, "run", *flags, "--epochs", "1", "--overwrite", model=TOY))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["id"] != told["id"]
    assert "resume" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_report_that_fails_is_left(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import report

    def fail(*_: object) -> None:
        raise RuntimeError("no page today")

    monkeypatch.setattr(report, "write_report", fail)
    in_process(*flags_for(data, tmp_path, "run", *FEW, "--epochs", "1", model=TOY))
    said = (tmp_path / "run" / "train.log").read_text()
    assert said.count("Report is lost (RuntimeError: no page today); the run goes on without it") == 1
    assert (tmp_path / "run" / "best.pth").exists()

"""The trackers: what their files hold, runs that are killed and resumed, and networks that are dead."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gallery import Picture
from settings import TrackingSettings
from tests.helpers import draw_set, flags_for, in_process, python, wait_for
from tests.test_tracking import record
from trackers import Trackers, build_trackers
from tracking import Event, Log, RunInfo, ValidationRecord

RUN_ID = "0123456789abcdef" * 2
ALL = ["tensorboard", "comet", "wandb"]
OFFLINE = [
    "--tensorboard", "--comet_ml_enable", "--comet_ml_offline", "--wandb", "--tracking.wandb.offline",
    "--tracking.log_best_weights",
]  # fmt: skip


def settings(*names: str, offline: bool = True) -> TrackingSettings:
    """These trackers alone."""
    result = TrackingSettings(tensorboard="tensorboard" in names)
    for name, own in (("comet", result.comet), ("wandb", result.wandb)):
        own.enable, own.offline = name in names, offline
    return result


def started(run_dir: Path, *names: str, step: int | None = None, **how: Any) -> Trackers:
    """Trackers that have been told of a start; with `step`, of one resumed there."""
    run_dir.mkdir(exist_ok=True)
    tracker = Trackers(settings(*names, **how), Log([]))
    config = {"optimizer": {"lr": 1e-3}, "seed": 7}
    tracker.on_run_start(RunInfo("bright", run_dir, config, step is not None, 0, step or 0, None, RUN_ID))
    return tracker


def tell(tracker: Trackers, steps: range) -> None:
    """A line of every step, and a validation with pictures after the last of each three."""
    for step in steps:
        tracker.on_step(record(step, last={"loss": 1 / step}, times={"data": 0.25, "device": 0.75}))
        if step % 3 == 0:
            panels = {name: np.full((8, 10, 3), 60 * i, np.uint8) for i, name in enumerate("abcd")}
            picture = Picture("cats", "im7", "/x/im7.png", 0.875, panels)
            rows = [{"scores": {"jaccard": score}} for score in (0.25, 0.5, 0.75, 0.875, float("nan"))]
            tracker.on_validation(ValidationRecord(
                1, step, {"jaccard": step / 10}, rows=rows, primary="jaccard", base={"jaccard": 0.25}, best=[picture],
                worst=[picture],
            ))  # fmt: skip


# ---------------------------------------------------------------- what their files hold


def tensorboard_of(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    return events


def comet_of(run_dir: Path) -> list[tuple[dict[str, Any], list[dict[str, Any]], set[str]]]:
    """(experiment.json, messages, names of all files) of each archive, oldest first."""
    found = []
    for path in sorted((run_dir / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime):
        with zipfile.ZipFile(path) as archive:
            lines = archive.read("messages.json").decode().splitlines()
            messages = [{"type": (line := json.loads(text))["type"], **line["payload"]} for text in lines]
            found.append((json.loads(archive.read("experiment.json")), messages, set(archive.namelist())))
    return found


def comet_metrics(messages: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric."""
    result: dict[str, list[tuple[int, float]]] = {}
    for message in messages:
        if message["type"] == "metric_msg":
            metric = message["metric"]
            result.setdefault(metric["metricName"], []).append((metric["step"], metric["metricValue"]))
    return result


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found = wandb_internal_pb2.Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


def wandb_of(run_dir: Path) -> list[tuple[Path, Any, list[dict[str, Any]], dict[str, Any]]]:
    """(folder, the run's own record, history rows, summary) of each start, oldest first."""
    found = []
    for path in sorted((run_dir / "wandb").glob("*/*.wandb")):
        run: Any = None
        history: list[dict[str, Any]] = []
        summary: dict[str, Any] = {}
        for line in wandb_records(path):
            if line.HasField("run"):
                run = line.run
            row = {"/".join(item.nested_key): json.loads(item.value_json) for item in line.history.item}
            history += [row] if row else []
            summary |= {item.key: json.loads(item.value_json) for item in line.summary.update if item.key}
        found.append((path.parent, run, history, summary))
    return found


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose three trackers were told everything, with the weights at the end."""
    pytest.importorskip("wandb")
    run_dir = tmp_path_factory.mktemp("told") / "bright"
    tracker = started(run_dir, *ALL)
    tracker.settings.log_best_weights = True
    (run_dir / "best.pth").write_bytes(b"weights")
    tell(tracker, range(1, 4))
    tracker.on_event(Event("hint", "a hint worth reading", 3))
    tracker.on_run_end("finished")
    return run_dir


def test_tensorboard_holds_scalars_pictures_histogram_and_text(told: Path) -> None:
    events = tensorboard_of(told)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    values = {tag: (events.Scalars(tag)[-1].step, events.Scalars(tag)[-1].value) for tag in events.Tags()["scalars"]}
    assert values["val/jaccard"] == (3, pytest.approx(0.3))
    assert values["val/jaccard_vs_base"] == (3, pytest.approx(0.05))
    assert values["time/device"] == (3, 0.75)
    assert (values["lr"][1], values["grad_norm"][1]) == (pytest.approx(1e-4), pytest.approx(4.21))
    picture = events.Images("best/01")[0]
    assert (picture.step, picture.width, picture.height) == (3, 40, 8)  # four panels side by side
    assert set(events.Tags()["images"]) == {"best/01", "worst/01"}
    histogram = events.Histograms("val/jaccard of each sample")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (4, 0.25, 0.875)  # what is no number is left out
    texts = {tag.split("/")[0]: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
             for tag in events.Tags()["tensors"]}  # fmt: skip
    assert "| optimizer.lr | 0.001 |" in texts["configuration"]
    assert "best/01: cats/im7 0.8750" in texts["pictures"]
    assert texts["events"] == "hint: a hint worth reading"
    assert texts["status"] == "finished"


def test_comet_archive_holds_everything_and_nothing_of_the_machine(told: Path) -> None:
    [(experiment, messages, files)] = comet_of(told)
    assert experiment["offline_id"] == RUN_ID
    assert experiment["resume_strategy"] == "get_or_create"  # the archives of a resumed run go to one experiment
    assert not experiment["customer_error_reported"]
    metrics = comet_metrics(messages)
    assert metrics["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert metrics["val/jaccard"] == [(3, pytest.approx(0.3))]
    assert metrics["val/jaccard_vs_base"] == [(3, pytest.approx(0.05))]
    assert metrics["time/data"][-1] == (3, 0.25)
    parameters = {m["param"]["paramName"]: m["param"]["paramValue"] for m in messages if m["type"] == "parameter_msg"}
    assert (parameters["optimizer.lr"], parameters["seed"]) == (1e-3, 7)
    other = {m["key"]: m["value"] for m in messages if m["type"] == "log_other"}
    assert (other["Name"], other["status"]) == ("bright", "finished")
    uploads = [m for m in messages if m["type"] == "file_upload"]
    named = {(p := m["additional_params"]).get("figName") or p["fileName"]: m["upload_type"] for m in uploads}
    assert named["best/01: cats/im7 0.8750"] == named["worst/01: cats/im7 0.8750"] == "visualization"
    assert named["val/jaccard of each sample"] == "histogram3d"
    assert named["best.pth"] == "model-element"
    assert {m["file_path"] for m in uploads} < files
    kinds = {m["type"] for m in messages}
    assert kinds == {"metric_msg", "parameter_msg", "log_other", "file_upload"}  # no code, git, host, output
    assert {m["upload_type"] for m in uploads} == {"visualization", "histogram3d", "text-sample", "model-element"}


def test_wandb_files_hold_everything_and_nothing_of_the_machine(told: Path) -> None:
    [(folder, run, history, summary)] = wandb_of(told)
    assert (run.run_id, run.display_name) == (RUN_ID, "bright")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (config["optimizer"], config["seed"]) == ({"lr": 1e-3}, 7)
    assert [run.host, run.git.commit, run.git.remote_url] == ["", "", ""]
    assert points(history, "train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert points(history, "val/jaccard_vs_base") == [(3, pytest.approx(0.05))]
    assert points(history, "best/01/caption") == [(3, "cats/im7 0.8750")]
    counts: Any = points(history, "val/jaccard of each sample/values")[0][1]
    assert sum(counts) == 4
    assert points(history, "events") == [(3, "hint: a hint worth reading")]
    assert summary["status"] == "finished"
    files = {str(path.relative_to(folder / "files")) for path in (folder / "files").rglob("*") if path.is_file()}
    assert {Path(name).parts[0] for name in files} == {"best.pth", "media"}  # no requirements, metadata, output
    assert sum(name.endswith(".png") for name in files) == 2
    axes = {line.metric.glob_name: line.metric.step_metric for line in wandb_records(next(folder.glob("*.wandb")))}
    assert axes["*"] == "step"


def test_only_what_is_switched_on_is_built() -> None:
    assert build_trackers(TrackingSettings(), Log([])) == []
    assert len(build_trackers(settings("comet"), Log([]))) == 1


# ---------------------------------------------------------------- killed and resumed


def killed(run_dir: Path, which: str) -> None:
    """A run that is killed after six steps: with its trackers' processes (`all`) or alone (`run`)."""
    pid = os.fork()
    if pid == 0:
        tracker = started(run_dir, *ALL)
        tell(tracker, range(1, 7))
        heard = all(wait_for(lambda file=run_dir / name / "told.json": file.exists() and "pictures val\": 6" in
                             file.read_text()) for name in ("comet", "wandb"))  # fmt: skip
        time.sleep(2)  # for what the libraries write at their leisure
        if which == "all":
            for each in tracker.trackers:
                os.killpg(each.process.pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL if heard else signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("which", ["run", "all"])
def test_a_resumed_run_continues_under_its_id_and_no_point_stands_twice(which: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_dir = tmp_path / "bright"
    killed(run_dir, which)
    tracker = started(run_dir, *ALL, step=4)  # the checkpoint was older than what the trackers had heard
    tell(tracker, range(5, 10))
    tracker.on_run_end("finished")

    losses = [(step, pytest.approx(1 / step)) for step in range(1, 10)]
    events = tensorboard_of(run_dir)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == losses
    assert [e.step for e in events.Images("best/01")] == [3, 6, 9]

    archives = comet_of(run_dir)
    assert {experiment["offline_id"] for experiment, _, _ in archives} == {RUN_ID}
    assert len(archives) == 2
    messages = [message for _, part, _ in archives for message in part]
    assert comet_metrics(messages)["train/loss"] == losses
    pictures = [m["additional_params"]["step"] for m in messages if m.get("upload_type") == "visualization"]
    assert pictures == [3, 3, 6, 6, 9, 9]
    assert [path.name for path in (run_dir / "comet").iterdir() if path.is_dir()] == []  # nothing waits for an archive

    parts = wandb_of(run_dir)
    assert {run.run_id for _, run, _, _ in parts} == {RUN_ID}
    assert points([row for _, _, history, _ in parts for row in history], "train/loss") == losses


def test_a_run_with_data_workers_ends_and_an_overwritten_one_is_another_experiment(tmp_path: Path) -> None:
    """The trackers' processes start shortly before the workers fork."""
    pytest.importorskip("wandb")
    for name, count in (("train", 4), ("val", 2)):
        draw_set(tmp_path / name, count)
    flags = [*flags_for(tmp_path, tmp_path, "bright", "--epochs", "1", "--log_frequency", "1"), *OFFLINE]
    run_dir, ids = tmp_path / "bright", []
    for again in (False, True):
        if again:
            in_process(*flags, "--overwrite")
        else:
            done = python("train.py", *flags, "--num_workers", "2")
            assert (done.returncode, done.stderr) == (0, "")  # no chatter
            assert "tracker" not in done.stdout
        identity = json.loads((run_dir / "run.json").read_text())["id"]
        [(experiment, messages, _)] = comet_of(run_dir)
        [(_, run, _, summary)] = wandb_of(run_dir)
        assert experiment["offline_id"] == run.run_id == identity
        assert summary["status"] == "finished"
        assert "model-element" in {message.get("upload_type") for message in messages}
        assert tensorboard_of(run_dir).Scalars("val/jaccard")
        ids.append(identity)
    assert ids[0] != ids[1]


# ---------------------------------------------------------------- networks that are dead


class Silent:
    """A server on loopback that takes connections and never answers."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.kept: list[Any] = []
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.kept.append(self.server.accept())

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread.is_alive():
            self.close()


SOON = 40  # seconds, for machines that are busy; who waits for a dead network waits for minutes


def online(run_dir: Path, name: str, until: Callable[[str], bool] = lambda said: True) -> str:
    """What a log says of a run with one online tracker and a patience of three seconds, which ends when `until`, of
    what it said so far, holds."""
    log = Log([])
    log.open(run_dir / "train.log")
    began = time.monotonic()
    tracker = Trackers(settings(name, offline=False), log, patience=3)
    tracker.on_run_start(RunInfo("bright", run_dir, {}, False, 0, 0, None, RUN_ID))
    tell(tracker, range(1, 3001))  # more than it keeps
    told = time.monotonic() - began
    assert wait_for(lambda: until((run_dir / "train.log").read_text()), SOON)
    waited = time.monotonic() - began
    tracker.on_run_end("finished")
    ended = time.monotonic() - began
    assert told < SOON
    assert ended - waited < SOON
    assert wait_for(lambda: not living(tracker.trackers[0].process.pid), SOON)
    assert not tracker.trackers[0].thread.is_alive()
    return (run_dir / "train.log").read_text()


def living(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = subprocess.run(["ps", "-eo", "pgid,stat,args"], text=True, capture_output=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in found.splitlines()[1:]]
    return [args for pgid, state, args in rows if int(pgid) == group and not state.startswith("Z")]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody's account: a home without keys."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("COMET_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["comet", "wandb"])
@pytest.mark.parametrize("network", ["silent", "closed"])
def test_a_dead_network_costs_the_patience_at_the_end_and_nothing_else(
    name: str, network: str, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name.replace("comet", "comet_ml"))
    with Silent() as server:
        if network == "closed":
            server.close()
        environment.setenv("COMET_API_KEY", "k" * 25)
        environment.setenv("WANDB_API_KEY", "k" * 40)
        environment.setenv("COMET_URL_OVERRIDE", f"{server.address}/clientlib/")
        environment.setenv("WANDB_BASE_URL", server.address)
        said = online(tmp_path, name, lambda _: network == "closed" or bool(server.kept))  # it did try
    assert "did not finish in time and was left" in said


@pytest.mark.parametrize(("name", "variable"), [("comet", "COMET_API_KEY"), ("wandb", "WANDB_API_KEY")])
@pytest.mark.usefixtures("environment")
def test_a_missing_key_is_said_and_not_asked_for(name: str, variable: str, tmp_path: Path) -> None:
    pytest.importorskip(name.replace("comet", "comet_ml"))
    sentence = f"is lost: it has no key: put one into {variable} or config_vars.yml"
    assert sentence in online(tmp_path, name, lambda said: sentence in said)


def test_a_tracker_that_dies_is_named_once_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = started(tmp_path / "bright", "tensorboard", "comet")
    lost = tracker.trackers[1]
    os.killpg(lost.process.pid, signal.SIGKILL)
    lost.process.wait()
    tell(tracker, range(1, 4))
    assert wait_for(lambda: not lost.thread.is_alive())
    tracker.on_run_end("finished")
    said = capsys.readouterr().out
    assert said == "tracker Comet ML is lost: its process ended with code -9; the run goes on without it\n"
    assert len(tensorboard_of(tmp_path / "bright").Scalars("train/loss")) == 3


def test_a_slow_tracker_misses_the_oldest_records_and_keeps_the_newest_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = started(tmp_path / "bright", "tensorboard")
    slow = tracker.trackers[0]
    os.kill(slow.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    tell(tracker, range(1, 6001))
    assert time.monotonic() - began < SOON
    os.kill(slow.process.pid, signal.SIGCONT)
    tracker.on_run_end("finished")
    assert "tracker TensorBoard was too slow: it missed" in capsys.readouterr().out
    events = tensorboard_of(tmp_path / "bright")
    assert events.Scalars("train/loss")[-1].step == 6000
    assert events.Images("best/01")[-1].step == 6000
    assert "status/text_summary" in events.Tags()["tensors"]

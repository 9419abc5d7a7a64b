"""The program of a tracker's own process: trackers.py starts it and tells it through a pipe what happens.

The trackers' libraries patch torch, replace `sys.excepthook`, capture output, start threads before data workers fork,
and hold the end of the interpreter until their network answers. Here they do it to nobody, and can be ended.
Nothing of this project is imported, and torch by TensorBoard alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORPHAN_SECONDS = 60  # to bring things to an end in, when the run is no more
EMPTY_ZIP = 22  # bytes


class Tracker:
    """What a tracker is told. `start` comes first and holds name, run_id, run_dir, step, resumed and config."""

    name: str
    folder: str  # within the run's
    takes_back = False  # whether a resumed run takes back what it had said after the checkpoint

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def start(self, run: dict[str, Any]) -> None:
        raise NotImplementedError

    def scalars(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def histogram(self, step: int, values: dict[str, list[float]]) -> None:
        raise NotImplementedError

    def pictures(self, step: int, pictures: list[tuple[str, str, Any]]) -> None:
        """(name, caption, (h, w, 3) uint8 RGB) of each."""
        raise NotImplementedError

    def text(self, step: int, text: str) -> None:
        raise NotImplementedError

    def end(self, status: str, weights: str) -> None:
        """`weights` is the path of the file to upload, or empty."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files."""

    name, folder, takes_back = "TensorBoard", "tensorboard", True

    def start(self, run: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run["step"] + 1 if run["resumed"] else None
        self.writer = SummaryWriter(os.path.join(run["run_dir"], self.folder), purge_step=purge_step, flush_secs=10)
        if not run["resumed"]:
            rows = "".join(f"| {key} | {value} |\n" for key, value in flat(run["config"]).items())
            self.writer.add_text("configuration", f"| key | value |\n| --- | --- |\n{rows}", run["step"])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histogram(self, step: int, values: dict[str, list[float]]) -> None:
        import numpy as np

        for name, scores in values.items():
            self.writer.add_histogram(name, np.array(scores), step)

    def pictures(self, step: int, pictures: list[tuple[str, str, Any]]) -> None:
        for name, _, image in pictures:
            self.writer.add_image(name, image, step, dataformats="HWC")
        # Its pictures have no captions.
        self.writer.add_text("pictures", "\n".join(f"- {name}: {caption}" for name, caption, _ in pictures), step)

    def text(self, step: int, text: str) -> None:
        self.writer.add_text("events", text, step)

    def end(self, status: str, weights: str) -> None:
        self.writer.add_text("status", status)
        self.writer.close()


class Comet(Tracker):
    """Comet ML, online or as archives for `comet upload`; a resumed run continues its experiment."""

    name, folder = "Comet ML", "comet"

    def start(self, run: dict[str, Any]) -> None:
        folder = os.path.join(run["run_dir"], self.folder)
        # Data wait for their archive here, so that not even the loss of the machine loses them.
        tempfile.tempdir = folder
        os.environ |= {
            "COMET_OFFLINE_DIRECTORY": folder, "COMET_DISABLE_AUTO_LOGGING": "1", "COMET_DISABLE_ANNOUNCEMENT": "true",
            "COMET_ERROR_TRACKING_ENABLE": "false", "COMET_INTERNAL_REPORTING": "false",
        }  # fmt: skip
        import comet_ml

        offline, self.problems = self.settings["offline"], LastError()
        logging.getLogger("comet_ml").addHandler(self.problems)
        key = comet_ml.get_api_key(self.settings["api_key"] or None, comet_ml.get_config())
        if not (key or offline):
            raise Lost("it has no key: put one into COMET_API_KEY or config_vars.yml (comet_ml_api_key), "
                       "or write offline archives with --tracking.comet.offline")  # fmt: skip
        if offline:
            self._archive_leftovers(Path(folder), run["run_id"])
        nothing: dict[str, Any] = dict.fromkeys((
            "log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details",
            "log_env_gpu", "log_env_host", "log_env_cpu", "log_env_network", "log_env_disk",
            "auto_output_logging", "auto_param_logging", "auto_metric_logging", "auto_log_co2",
        ), False)  # fmt: skip
        self.experiment = comet_ml.start(
            api_key=None if offline else key,
            workspace=self.settings["workspace"] or None,
            project_name=self.settings["project_name"] or None,
            experiment_key=run["run_id"],
            mode="get_or_create",
            online=not offline,
            experiment_config=comet_ml.ExperimentConfig(
                name=run["name"], offline_directory=folder, display_summary_level=0, **nothing
            ),
        )
        if not self.experiment.alive:  # it logs its errors and goes on
            raise Lost(self.problems.text or "it could not start its experiment")
        if not run["resumed"]:
            self.experiment.log_parameters(flat(run["config"]))

    def _archive_leftovers(self, folder: Path, run_id: str) -> None:
        """Make archives of the data whose process was killed before it could."""
        from comet_ml.offline_utils import create_experiment_archive, write_experiment_meta_file

        for archive in folder.glob("*.zip"):
            if archive.stat().st_size == EMPTY_ZIP:
                archive.unlink()
        for data in [path.parent for path in folder.glob("*/messages.json")]:
            place: Any = {name: self.settings[name] or None for name in ("workspace", "project_name")}
            write_experiment_meta_file(
                tempdir=str(data), experiment_key=run_id, **place, resume_strategy="get_or_create", tags=[],
                start_time=int(data.stat().st_ctime * 1000), stop_time=int(data.stat().st_mtime * 1000),
                user_provided_experiment_key=True, comet_start_sourced=True,
            )  # fmt: skip
            create_experiment_archive(
                str(folder), f"{run_id}-{data.name}.zip", str(data), logging.getLogger("comet_ml")
            )
            remove_folder(data)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.experiment.log_metrics(values, step=step)

    def histogram(self, step: int, values: dict[str, list[float]]) -> None:
        for name, scores in values.items():
            self.experiment.log_histogram_3d(scores, name=name, step=step)

    def pictures(self, step: int, pictures: list[tuple[str, str, Any]]) -> None:
        from PIL import Image

        for name, caption, image in pictures:  # of an array it makes a picture only where matplotlib is installed
            self.experiment.log_image(Image.fromarray(image), name=f"{name}: {caption}", step=step)

    def text(self, step: int, text: str) -> None:
        self.experiment.log_text(text, step=step)

    def end(self, status: str, weights: str) -> None:
        self.experiment.log_other("status", status)
        if weights:
            self.experiment.log_model("best", weights)
        self.experiment.end()
        if self.problems.text:
            raise Lost(self.problems.text)


class Wandb(Tracker):
    """Weights & Biases, online or as files for `wandb sync`; a resumed run continues its run there."""

    name, folder = "Weights & Biases", "wandb"

    def start(self, run: dict[str, Any]) -> None:
        if self.settings["api_key"]:  # wandb.login would write it into a file
            os.environ["WANDB_API_KEY"] = self.settings["api_key"]
        try:
            import wandb
        except ModuleNotFoundError:
            raise Lost("it is not installed: pip install wandb") from None
        self.wandb = wandb
        mode: Any = "offline" if self.settings["offline"] else "online"
        try:
            self.run = wandb.init(
                entity=self.settings["entity"] or None, project=self.settings["project"] or None, name=run["name"],
                id=run["run_id"], dir=run["run_dir"], config=run["config"], mode=mode, resume="allow",
                settings=wandb.Settings(
                    console="off", disable_code=True, disable_git=True, save_code=False, disable_job_creation=True,
                    x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
                    x_transaction_log_flush_interval=1, silent=True, program="", host="", symlink=False,
                ),
            )  # fmt: skip
        except wandb.errors.UsageError as error:
            if "api key" not in str(error).lower():
                raise
            raise Lost("it has no key: put one into WANDB_API_KEY or config_vars.yml (wandb_api_key), "
                       "or write offline files with --tracking.wandb.offline") from None  # fmt: skip
        # Its own step only grows, and drops what comes later with a smaller one; pictures may come later.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({**values, "step": step})

    def histogram(self, step: int, values: dict[str, list[float]]) -> None:
        self.scalars(step, {name: self.wandb.Histogram(scores) for name, scores in values.items()})

    def pictures(self, step: int, pictures: list[tuple[str, str, Any]]) -> None:
        self.scalars(step, {name: self.wandb.Image(image, caption=caption) for name, caption, image in pictures})

    def text(self, step: int, text: str) -> None:
        self.scalars(step, {"events": text})

    def end(self, status: str, weights: str) -> None:
        self.run.summary["status"] = status
        if weights:
            self.run.save(weights, base_path=os.path.dirname(weights), policy="now", glob=False)
        self.run.finish(exit_code=0 if status in ("finished", "stopped early") else 1)


TRACKERS = {"tensorboard": TensorBoard, "comet": Comet, "wandb": Wandb}


# ---------------------------------------------------------------- what they need


class Lost(Exception):
    """A tracker cannot go on; the message says why, as the end of a sentence."""


class LastError(logging.Handler):
    """Keeps the last error that a library logged instead of raising it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())


class Told:
    """The last step of each kind that a tracker was told of, kept in its folder.

    A resumed run goes through the steps after its checkpoint once more and comes to the same numbers; a service that
    takes nothing back would show them twice.
    """

    def __init__(self, file: Path, resumed: bool) -> None:
        self.file = file
        self.steps: dict[str, int] = json.loads(file.read_text()) if resumed and file.exists() else {}
        self.before = dict(self.steps)

    def is_new(self, kind: str, step: int) -> bool:
        """Whether this was not told before; from now on it was."""
        if step <= self.before.get(kind, -1):
            return False
        self.steps[kind] = step
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.steps))
        temporary.replace(self.file)
        return True


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def remove_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


# ---------------------------------------------------------------- the process


def main() -> None:
    """Read pickled messages from stdin until the end; say why on stdout when the tracker is lost."""
    jobs, answer = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    silence()
    try:
        serve(messages(jobs))
    except Exception as error:
        answer.write(str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}")
        answer.flush()
        os._exit(1)  # not through the library's hooks, which may wait for a network


def silence() -> None:
    """The libraries neither read from the terminal nor write to it."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)


def messages(jobs: Any) -> Iterator[Any]:
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            yield pickle.load(jobs)


def serve(received: Iterator[Any]) -> None:
    """Messages: (key of TRACKERS, settings, run), then any of (method, kind, step, content), then (status, weights)."""
    key, settings, run = next(received)
    tracker = TRACKERS[key](**settings)
    folder = Path(run["run_dir"], tracker.folder)
    folder.mkdir(exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 — held for life
    fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a killed run may still be bringing things to an end
    told = None if tracker.takes_back else Told(folder / "told.json", run["resumed"])
    tracker.start(run)
    for message in received:
        if len(message) == 2:
            return tracker.end(*message)
        method, kind, step, content = message
        if told is None or method == "text" or told.is_new(f"{method} {kind}", step):
            getattr(tracker, method)(step, content)
    signal.alarm(ORPHAN_SECONDS)  # the run was killed; what it said until then is worth keeping
    tracker.end("killed", "")


if __name__ == "__main__":
    del sys.path[0]  # this folder's modules are none of the libraries' business
    main()

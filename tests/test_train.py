"""Tiny runs of the real commands: every option of the loop does what it says, and a bad step leaves no trace."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import checkpoint
import loss
from errors import UserError
from tests.helpers import (
    SMALL,
    TINY,
    TOY,
    add_toy_family,
    difference,
    draw_set,
    flags_for,
    in_process,
    records,
    run_script,
)
from tracking import Callback, StepRecord, ValidationRecord

STEP = ["--logging.log_frequency", "1", "--checkpoint.save_last", "0", "--test_limit", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    add_toy_family()
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 10)
    draw_set(folder / "val", 5, seed=1)
    return folder


class Watch(Callback):
    """Keeps what a run tells its callbacks."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self.statuses: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def on_run_end(self, status: str) -> None:
        self.statuses.append(status)


def go(data: Path, runs: Path, name: str, *flags: str, model: list[str] = TOY, callbacks: Any = None) -> dict[str, Any]:
    """The last checkpoint of a tiny run, whose file is then removed."""
    shutil.rmtree(runs / name, ignore_errors=True)
    in_process(*flags_for(data, runs, name, *STEP, *flags, model=model), callbacks=callbacks)
    return checkpoint.load(runs / name / "last.pth")


# ---------------------------------------------------------------- a whole run


def test_a_run_learns_writes_its_folder_and_evaluates_to_its_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    flags = ["--epochs", "4", "--batch_size", "2", "--lr", "1e-3", "--logging.log_frequency", "1"]
    scores = in_process(*flags_for(data, tmp_path, "run", *flags), callbacks=[watch])
    run = tmp_path / "run"
    names = {file.name for file in run.iterdir()}
    assert {
        "config.yml",
        "train.log",
        "metrics.jsonl",
        "metrics.csv",
        "best.pth",
        "last.pth",
        "run_epoch_4.pth",
    } <= names
    assert watch.statuses == ["finished"]
    losses = [record.last["loss"] for record in watch.steps]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [record.step_in_epoch for record in watch.steps] == [1, 2, 3, 4, 5] * 4
    assert [record.total_composition["train"] for record in watch.steps] == list(range(2, 42, 2))
    assert [record.is_best for record in watch.validations].count(True) >= 1
    jaccards = [record.metrics["jaccard"] for record in watch.validations]
    assert scores["jaccard"] == jaccards[-1]
    assert len(watch.validations[0].rows) == 5
    best = checkpoint.load(run / "best.pth")
    assert best["state"]["best"] == max(jaccards)
    assert best["state"]["step"] == 5 * (1 + jaccards.index(max(jaccards)))
    meta = best["meta"]
    assert (meta["family"], meta["task"], meta["size"], meta["experiment_name"]) == (
        "birefnet",
        "binary",
        [64, 64],
        "run",
    )
    assert yaml.safe_load((run / "config.yml").read_text())["train"]["epochs"] == 4
    code, out, err = run_script(
        monkeypatch, "evaluate", "--checkpoint", str(run), "--data.test", str(data / "val"), "--device", "cpu",
        "--num_workers", "0",
    )  # fmt: skip
    assert code == 0, err
    assert f"{max(jaccards):.4f}" in out


def test_the_default_model_trains(data: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "1", "--batch_size", "1", "--eval_each_epoch", "0"]
    watch = Watch()
    last = go(data, tmp_path, "run", *flags, model=SMALL, callbacks=[watch])
    assert last["meta"]["settings"]["backbone"] == "swin_v1_t"
    assert set(watch.steps[0].last) >= {"loss", "loss/bce", "loss/iou", "loss/ssim", "loss/gradient", "jaccard", "ssim"}
    assert torch.isfinite(torch.tensor(watch.steps[0].last["loss"]))


# ---------------------------------------------------------------- options of the loop


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three steps of the tiny BiRefNet without any option."""
    return go(data, tmp_path_factory.mktemp("plain"), "plain", *PLAIN, model=TINY)


PLAIN = ["--max_steps", "3", "--batch_size", "2", "--eval_each_epoch", "0", "--lr", "1e-5"]


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--deterministic"], 0.0),
        (["--load_all"], 0.0),
        (["--load_all", "--num_workers", "2"], 0.0),
        (["--data.val="], None),
        (["--train.channels_last"], 1e-3),
        (["--train.activation_checkpointing"], 1e-5),
    ],
)
def test_what_must_not_change_the_weights_does_not(
    flags: list[str], tolerance: float | None, plain: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    last = go(data, tmp_path, "run", *PLAIN, *flags, model=TINY)
    torch.use_deterministic_algorithms(False)
    if tolerance is None:  # another split is another run
        assert difference(plain["model"], last["model"])
    elif tolerance == 0:
        assert not difference(plain["model"], last["model"])
    else:
        for key, value in plain["model"].items():
            assert torch.allclose(value.float(), last["model"][key].float(), atol=tolerance), key


MODELS = {
    "fp16": ["--mixed_precision", "fp16"],
    "bf16": ["--mixed_precision", "bf16"],
    "refinement": ["--model.refine", "unet"],
    "ranger": ["--optimizer.name", "ranger"],
    "muon": ["--optimizer.name", "muon"],
    "sizes and backgrounds": ["--data.dynamic_size", "[[64,96],[64,96]]", "--data.background_synthesis", "0.5"],
    "all settings": ["--model.multi_scale_input", "cat", "--model.decoder_attention", "ASPPDeformable"],
    "clipping, warm-up, average": ["--grad_clip", "1", "--scheduler.warmup_steps", "2", "--train.ema_decay", "0.9"],
}


@pytest.mark.parametrize("name", MODELS)
def test_what_changes_the_run_runs(name: str, plain: dict[str, Any], data: Path, tmp_path: Path) -> None:
    watch = Watch()
    last = go(data, tmp_path, "run", *PLAIN, *MODELS[name], model=TINY, callbacks=[watch])
    assert last["state"]["step"] == 3
    assert all(torch.isfinite(value).all() for value in last["model"].values() if value.is_floating_point())
    assert difference(plain["model"], last["model"])
    assert len(watch.steps) == 3
    if name == "fp16":
        assert last["scaler"]["scale"] == 65536 / 2 ** last["state"]["skipped"]


def test_when_it_validates_and_when_it_ends(data: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[list[str], list[int], int]] = {
        "by epochs": (["--epochs", "3", "--batch_size", "5"], [2, 4, 6], 6),
        "every second epoch": (["--epochs", "5", "--batch_size", "5", "--eval_each_epoch", "2"], [4, 8, 10], 10),
        "never": (["--epochs", "1", "--batch_size", "5", "--eval_each_epoch", "0"], [], 2),
        "by steps": (["--epochs", "2", "--batch_size", "2", "--steps_per_validation", "4"], [4, 8, 10], 10),
        "max_steps": (["--max_steps", "7", "--batch_size", "2"], [5, 7], 7),
    }
    for name, (flags, validated, steps) in cases.items():
        watch = Watch()
        last = go(data, tmp_path, "run", *flags, callbacks=[watch])
        assert [record.step for record in watch.validations] == validated, name
        assert last["state"]["step"] == steps, name
        assert all(len(record.rows) == 2 for record in watch.validations)  # --test_limit


def test_resume_start_with_eval_scores_before_the_first_step(data: Path, tmp_path: Path) -> None:
    go(data, tmp_path, "run", "--epochs", "1", "--batch_size", "5")
    flags = flags_for(data, tmp_path, "run", *STEP, "--epochs", "1", "--batch_size", "5", "--resume", model=TOY)
    scores = in_process(*flags, "--resume_start_with_eval")
    said = (tmp_path / "run" / "train.log").read_text()
    assert f"validation before the first step: jaccard {scores['jaccard']:.4f}" in said
    assert len([row for row in records(tmp_path / "run") if row["kind"] == "val"]) == 1


def test_the_best_is_chosen_by_any_metric_that_is_measured(data: Path, tmp_path: Path) -> None:
    go(data, tmp_path, "run", "--epochs", "2", "--batch_size", "5", "--evaluation.metrics", "Sm", "HCE",
       "--checkpoint.monitor", "val/hce", "--lr", "1e-3")  # fmt: skip
    rows = [row for row in records(tmp_path / "run") if row["kind"] == "val"]
    assert all({"val/s_measure", "val/hce", "val/jaccard"} <= set(row) for row in rows)
    assert checkpoint.load(tmp_path / "run" / "best.pth")["state"]["best"] == min(row["val/hce"] for row in rows)
    with pytest.raises(UserError, match=r"checkpoint.monitor.*evaluation.metrics"):
        go(data, tmp_path, "other", "--checkpoint.monitor", "val/s_measure")


def test_what_is_frozen_stays(data: Path, tmp_path: Path) -> None:
    start = go(data, tmp_path, "start", "--max_steps", "1", "--batch_size", "2", "--lr", "0", "--train.freeze_bn")
    frozen = go(data, tmp_path, "frozen", *PLAIN, "--optimizer.freeze", "stem", "blocks.0", "--lr", "1e-3")
    for key, value in start["model"].items():
        is_frozen = key.startswith(("stem", "blocks.0"))
        assert (not difference(value, frozen["model"][key])) == is_frozen, key
    norms = go(data, tmp_path, "norms", *PLAIN, "--train.freeze_bn", "--lr", "1e-3")
    for key, value in norms["model"].items():
        is_statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert (not difference(start["model"][key], value)) == is_statistic, key


def test_rates_by_layer(data: Path, tmp_path: Path) -> None:
    flags = ["--optimizer.layer_decay", "0.5", "--optimizer.backbone_lr_scale", "0.1", "--scheduler.name", "constant"]
    groups = go(data, tmp_path, "run", *PLAIN, *flags, "--lr", "1e-3", model=TINY)["optimizer"]["param_groups"]
    rates = sorted({group["lr"] for group in groups})
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[-2] <= 1e-4 + 1e-12
    assert len(rates) > 4
    assert rates[0] < 1e-3 * 0.1 * 0.5**3
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


def test_linear_drop_path_and_the_last_epochs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toy import Toy

    rates: list[float] = []
    monkeypatch.setattr(Toy, "set_drop_path", lambda self, rate: rates.append(rate))
    watch = Watch()
    flags = ["--epochs", "4", "--batch_size", "5", "--train.drop_path_schedule", "linear", "--model.drop_path", "0.3",
             "--loss.last_epochs", "2", "--loss.last_epochs_factors", "{bce: 0, ssim: 0.5}",
             "--eval_each_epoch", "0"]  # fmt: skip
    go(data, tmp_path, "run", *flags, callbacks=[watch])
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert ["loss/bce" in record.last for record in watch.steps] == [True] * 4 + [False] * 4
    assert watch.steps[-1].last["loss/ssim"] < 0.7 * watch.steps[0].last["loss/ssim"]


def test_folds_splits_and_limits(data: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []
    for fold in range(3):
        watch = Watch()
        flags = [
            "--data.val=",
            "--data.fold",
            f"{fold}/3",
            "--max_steps",
            "1",
            "--batch_size",
            "1",
            "--test_limit",
            "0",
        ]
        go(data, tmp_path, "run", *flags, callbacks=[watch])
        seen.append({row["sample_id"] for row in watch.validations[0].rows})
    assert sorted(map(len, seen)) == [3, 3, 4]
    assert len(set.union(*seen)) == 10
    last = go(data, tmp_path, "run", "--max_samples", "4", "--epochs", "1", "--batch_size", "2")
    assert last["state"]["composition"] == {"train": 4}


def test_faulty_samples_may_be_left_out(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "set")
    (tmp_path / "set" / "im" / "03.png").write_bytes(b"junk")
    (tmp_path / "set" / "gt" / "04.png").unlink()
    flags = ["--data.train", str(tmp_path / "set"), "--data.on_error", "skip", "--epochs", "1", "--batch_size", "4"]
    last = go(data, tmp_path, "run", *flags)
    assert last["state"]["step"] == 2
    assert "left out 2 faulty samples" in (tmp_path / "run" / "train.log").read_text()


def test_overwrite_begins_anew(data: Path, tmp_path: Path) -> None:
    go(data, tmp_path, "run", "--epochs", "2", "--batch_size", "5", "--save_last", "3")
    (tmp_path / "run" / "tensorboard").mkdir()
    command = flags_for(data, tmp_path, "run", *STEP, "--epochs", "1", "--batch_size", "5", model=TOY)
    with pytest.raises(UserError, match="exists already"):
        in_process(*command)
    assert (tmp_path / "run" / "run_epoch_2.pth").exists()
    in_process(*command, "--overwrite")
    assert checkpoint.load(tmp_path / "run" / "last.pth")["state"]["epoch"] == 1
    assert not (tmp_path / "run" / "run_epoch_2.pth").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


# ---------------------------------------------------------------- steps that must leave no trace


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Make the criterion's answer to the so-many-th micro-batches not finite."""
    real, calls = loss.BinaryCriterion.forward, [0]

    def forward(self: Any, *arguments: Any) -> Any:
        losses = real(self, *arguments)
        calls[0] += 1
        if calls[0] in steps:
            losses["bce"] = losses["bce"] * value
        return losses

    monkeypatch.setattr(loss.BinaryCriterion, "forward", forward)


NO_TRACE = ["--batch_size", "2", "--train.ema_decay", "0.5", "--scheduler.warmup_steps", "3", "--eval_each_epoch", "0"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "ranger"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_steps_leave_weights_average_statistics_and_schedule_alone(
    optimizer: str, value: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the first steps of all are the bad ones: nothing has moved then."""
    flags = [*NO_TRACE, "--optimizer.name", optimizer, "--lr", "1e-5"]
    start = go(data, tmp_path, "start", *flags, "--max_steps", "1", "--lr", "0", "--train.freeze_bn")
    spoil(monkeypatch, {1, 2, 3}, value)
    watch = Watch()
    last = go(data, tmp_path, "bad", *flags, "--max_steps", "3", callbacks=[watch])
    assert not difference(start["model"], last["model"])
    assert not difference(start["ema"], last["ema"])
    assert last["state"]["skipped"] == 3
    assert last["state"]["bad_in_a_row"] == 3
    for values in last["optimizer"]["state"].values():
        assert all(not value.any() for value in values.values() if isinstance(value, torch.Tensor))
    assert len({record.lr for record in watch.steps}) == 1, "the schedule moved"
    spoil(monkeypatch, {2})
    last = go(data, tmp_path, "run", *flags, "--max_steps", "4")
    assert (last["state"]["skipped"], last["state"]["bad_in_a_row"]) == (1, 0)
    assert difference(start["model"], last["model"])
    assert all(torch.isfinite(value).all() for value in last["model"].values() if value.is_floating_point())


def test_one_bad_micro_step_spoils_its_step_alone(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {3})
    watch = Watch()
    flags = ["--batch_size", "1", "--grad_accum_steps", "2", "--max_steps", "4", "--eval_each_epoch", "0"]
    last = go(data, tmp_path, "run", *flags, callbacks=[watch])
    assert last["state"]["skipped"] == 1
    assert [torch.isfinite(torch.tensor(record.last["loss"])).item() for record in watch.steps] == [
        True, False, True, True,
    ]  # fmt: skip
    assert torch.isfinite(torch.tensor(watch.steps[-1].means["loss"]))
    rows = records(tmp_path / "run")
    assert [row["train/loss"] is None for row in rows] == [False, True, False, False]


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_too_many_bad_steps_end_the_run_with_weights_as_they_were(
    precision: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, set(range(3, 500)))
    flags = ["--batch_size", "2", "--max_steps", "100", "--checkpoint.every_steps", "2", "--eval_each_epoch", "0",
             "--train.max_bad_steps", "6" if precision == "no" else "100", "--mixed_precision", precision]  # fmt: skip
    with pytest.raises(UserError, match="had no finite gradient, so training was ended"):
        go(data, tmp_path, "run", *flags, "--model.width", "8")
    last = checkpoint.load(tmp_path / "run" / "last.pth")
    assert all(torch.isfinite(value).all() for value in last["model"].values() if value.is_floating_point())
    assert (tmp_path / "run" / "status.txt").read_text() == "failed\n"
    if precision == "fp16":  # 65536 is halved each time; the run ends before it is below one
        assert 1 <= last["scaler"]["scale"] < 65536
        assert last["state"]["skipped"] <= 17
    else:
        assert last["state"]["step"] <= 8


def test_a_large_norm_is_warned_of_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, set(range(2, 5)), 1e6)
    go(data, tmp_path, "run", "--max_steps", "5", "--batch_size", "2", "--eval_each_epoch", "0", "--lr", "1e-9")
    assert (tmp_path / "run" / "train.log").read_text().count("the gradient norm is") == 1


# ---------------------------------------------------------------- trackers and secrets


def test_a_tracker_that_raises_changes_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bad(Callback):
        def on_step(self, record: StepRecord) -> None:
            if record.step == 1:
                raise ConnectionError("gone")

    flags = ["--epochs", "1", "--batch_size", "2"]
    unwatched = go(data, tmp_path, "unwatched", *flags)
    monkeypatch.setattr("run.build_trackers", lambda tracking, log: [Bad()])
    watched = go(data, tmp_path, "watched", *flags)
    for part in ("model", "optimizer", "state", "rng"):
        assert not difference(unwatched[part], watched[part], part)
    assert records(tmp_path / "unwatched") == records(tmp_path / "watched")
    assert "Bad is lost (ConnectionError: gone)" in (tmp_path / "watched" / "train.log").read_text()


def test_a_key_stands_nowhere(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary = "canary-key-4711"
    flags = ["--epochs", "1", "--batch_size", "5", "--use_tensorboard", "--comet_ml_api_key", canary,
             "--tracking.wandb.api_key", canary]  # fmt: skip
    in_process(*flags_for(data, tmp_path, "run", *flags, model=TOY))
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any("tfevents" in file.name for file in files)
    for file in files:
        assert canary.encode() not in file.read_bytes(), file.name
    said = capsys.readouterr()
    assert canary not in said.out + said.err


# ---------------------------------------------------------------- the other commands


def test_print_create_and_check(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ["--data.train", str(data / "train"), "--data.val", str(data / "val")]
    code, out, _ = run_script(monkeypatch, "train", "--print_config", "--lr", "6e-5", *sets)
    assert code == 0
    assert yaml.safe_load(out)["optimizer"]["lr"] == 6e-5
    file = tmp_path / "mine.yml"
    code, out, _ = run_script(monkeypatch, "train", "--create-config", str(file), "--epochs", "9", *sets)
    assert code == 0
    assert str(file) in out
    code, out, _ = run_script(monkeypatch, "train", "--print-config", "--config", str(file))
    assert yaml.safe_load(out)["train"]["epochs"] == 9
    code, _, err = run_script(monkeypatch, "train", "--create_config", str(file))
    assert code == 2
    assert "exists already" in err
    code, out, _ = run_script(monkeypatch, "train", "--check_data", *SMALL, *sets)
    assert code == 0
    assert "10 samples" in out
    assert "5 samples" in out


def test_dry_run_and_preview(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    flags = flags_for(data, tmp_path, "run", "--batch_size", "2")
    code, out, err = run_script(monkeypatch, "train", "--dry_run", *flags)
    assert code == 0, err
    for said in ("loss/bce", "peak memory", "10 samples", "backbone: pvt_v2_b0", "G multiply-additions"):
        assert said in out
    parts = {line.split()[0]: int(line.split()[2].replace(",", "")) for line in out.splitlines() if " train" in line
             and "parameters," in line and line.startswith("  ")}  # fmt: skip
    assert set(parts) == {"backbone", "squeeze", "decoder", "all"}
    assert parts.pop("all") == sum(parts.values())
    assert not (tmp_path / "run").exists()
    code, out, err = run_script(monkeypatch, "train", "--preview", *flags)
    assert code == 0, err
    with Image.open(tmp_path / "run_preview.png") as sheet:
        assert sheet.width >= 128
        assert len(set(sheet.convert("L").resize((32, 32)).tobytes())) > 10
    code, out, _ = run_script(monkeypatch, "train", "--version")
    assert torch.__version__ in out


def test_find_lr_draws_and_suggests(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lr_finder.STEPS", 40)
    flags = flags_for(data, tmp_path, "run", "--batch_size", "2", "--tracking.tensorboard", model=TOY)
    code, out, err = run_script(monkeypatch, "train", "--find_lr", *flags)
    assert code == 0, err
    assert "try --optimizer.lr" in out
    assert (tmp_path / "run_lr.png").stat().st_size > 5000
    assert not (tmp_path / "run").exists()


def test_profile_writes_a_trace_and_the_operators(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_for(data, tmp_path, "run", "--batch_size", "2", model=TOY)
    code, out, err = run_script(monkeypatch, "train", "--profile", *flags)
    assert code == 0, err
    assert "of the time: data" in out
    with gzip.open(tmp_path / "run_trace.json.gz", "rt") as trace:
        assert any("conv" in event.get("name", "") for event in json.load(trace)["traceEvents"])
    assert "aten::" in (tmp_path / "run_operators.txt").read_text()


@pytest.mark.slow
def test_compile_gives_the_same_numbers(data: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    flags = ["--max_steps", "2", "--batch_size", "2", "--eval_each_epoch", "0", "--lr", "1e-5", "--model.dropout", "0",
             "--model.drop_path", "0", "--model.width", "16"]  # fmt: skip
    eager = go(data, tmp_path, "eager", *flags)
    compiled = go(data, tmp_path, "compiled", *flags, "--compile")
    assert list(eager["model"]) == list(compiled["model"])
    for key, value in eager["model"].items():
        assert torch.allclose(value.float(), compiled["model"][key].float(), atol=1e-4), key


def test_devices_starts_torchrun(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    flags = flags_for(data, tmp_path, "run", "--devices", "2")
    code, _, _ = run_script(monkeypatch, "train", *flags)
    assert code == 0
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    launcher = ["-m", "torch.distributed.run", "--standalone", signals, "--nproc_per_node=2"]
    assert started == [[sys.executable, *launcher, "train.py", *flags]]
    assert not (tmp_path / "run").exists()

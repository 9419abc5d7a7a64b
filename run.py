"""What a run is made of, and how one begins: the folder, the parts, and the place where a resumed run stopped.

Apart from train.py so that the loop can be read without the building.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
import warnings
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from build import (
    build_criterion,
    build_loaders,
    build_metric,
    build_model,
    build_optimizer_for,
    build_readers,
    check_classes,
    data_table,
    load_pretrained,
    settle_classes,
)
from checkpoint import CheckpointError, RunFolder, RunState, load_weights, read_json, write_text
from config import Config, as_dict, changed, differences, from_dict, read_yaml, to_yaml
from errors import UserError
from optim import Schedule
from report import Report
from samples import Batch
from tasks import Task
from timing import StepClock
from trackers import build_trackers
from tracking import Callback, Console, Dispensable, Event, Log, Records, RunInfo
from utils import (
    EMA,
    DelayedFlags,
    Meter,
    Precision,
    StopSignal,
    World,
    choose_precision,
    drop_path_rate,
    environment,
    restarts,
    seed_everything,
)


@dataclass
class TakenStep:
    """What a step was made of on this rank, kept until it is known to have been good."""

    batches: list[Batch]
    counts: dict[str, Tensor]
    names: list[str]
    values: Tensor  # (K,) the rank's own share of loss and scores
    totals: Tensor | None = None  # (K,) of all ranks

    @property
    def is_anothers(self) -> bool:
        """Whether a loss was not finite on another rank alone."""
        place = self.names.index("loss")
        return bool(self.values[place].isfinite()) and self.totals is not None and not self.totals[place].isfinite()


@dataclass
class Run:
    """Everything that a run is made of."""

    config: Config
    world: World
    task: Task
    folder: RunFolder
    log: Log
    callbacks: list[Callback]
    train_loader: Any
    val_loader: Any
    dataset_names: list[str]
    raw_model: Any  # what is saved
    model: nn.Module  # the same, compiled and wrapped for DDP
    criterion: Any
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: EMA | None
    precision: Precision
    state: RunState
    meter: Meter
    flags: DelayedFlags
    stop: StopSignal
    total_steps: int
    best_metric: str
    drop_path: float  # of the deepest block
    clock: StepClock
    is_fine_tuned: bool = False  # whether training starts from a trained model, to be measured first
    stopping: bool = False
    last_step: TakenStep | None = None
    looked_for_unused: bool = False  # parameters
    hint: str = ""  # what the last printed line found wasteful
    hinted: set[str] = field(default_factory=set)
    early_events: list[Event] = field(default_factory=list)  # of the time before anyone listens
    bar: Any = None  # of the epochs
    last_save: float = field(default_factory=time.monotonic)
    last_line: tuple[float, int] = (0.0, 0)

    def note(self, kind: str, text: str) -> None:
        """Say what happened and tell the callbacks; see `tracking.Event` for the kinds."""
        self.log.say(text)
        event = Event(kind, self.log.redact(text), self.state.step)
        for callback in self.callbacks:
            callback.on_event(event)
        if not self.callbacks:
            self.early_events.append(event)

    def metric(self) -> Any:
        """A fresh metric of the task."""
        return build_metric(self.config, self.task, self.class_names)

    @property
    def class_names(self) -> list[str]:
        return list(self.train_loader.dataset.reader.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_loader.batch_sampler.steps_per_epoch

    @property
    def epochs(self) -> int:
        """How many epochs the run has, the last of which may be cut short by `max_steps`."""
        return -(-self.total_steps // self.steps_per_epoch)


# ---------------------------------------------------------------- the run folder


def name_the_run(config: Config, world: World) -> None:
    """Without a name a run is called `<family>_<dataset>_<time>`."""
    if not config.experiment_name:
        dataset = "demo" if config.is_demo else Path((config.data.train or config.data.root).split("+")[0]).name
        prefix = f"{config.model.family}_{re.sub(r'[^-+.=@A-Za-z0-9_]', '-', dataset)}_"
        earlier = sorted(Path(config.output_dir).glob(prefix + "[0-9]*-[0-9]*")) if restarts() != "0" else []
        name = earlier[-1].name if earlier else prefix + time.strftime("%Y%m%d-%H%M%S")
        config.experiment_name = str(world.agree(name))


def go_on_after_restart(config: Config, folder: RunFolder, world: World) -> None:
    """torchrun repeats the words of the first start, which may say `--overwrite`; what is meant is to go on.

    But for what had failed before the old run was replaced: the folder then still holds that, and a mark.
    """
    if restarts() == "0" or not world.agree(folder.exists()) or world.agree(folder.overwriting.exists()):
        return
    if config.resume in ("", "true") or world.agree(folder.has_checkpoint()):
        config.resume = "auto"
    else:  # a start from another run's file
        config.overwrite = True


def is_resumed(config: Config, folder: RunFolder, world: World) -> bool:
    """Whether the run goes on with what is in its folder; raises `UserError` where a run of this name is in the way."""
    go_on_after_restart(config, folder, world)
    there = bool(world.agree(folder.exists()))
    is_own = bool(config.resume) and Path(config.resume).resolve().parent == folder.path.resolve()
    resumed = there and (config.resume in ("true", "auto") or is_own)
    if there and not (resumed or config.overwrite):
        raise UserError(
            f"the run {folder.path} exists already: continue it with --resume, replace it with --overwrite, "
            "or choose another --experiment_name"
        )
    if config.resume == "true" and not there:
        raise UserError(f"there is no run to resume in {folder.path}; --resume auto starts one where there is none")
    if world.agree(not there and folder.is_occupied()):
        raise UserError(f"the folder {folder.path} holds files that are no run: choose another --experiment_name")
    if resumed:
        check_same_settings(config, folder.path / "config.yml")
    return resumed


def check_same_settings(config: Config, snapshot: Path) -> None:
    """A resumed run may be longer or log otherwise; what would make it another run is an error that names it."""
    if not snapshot.exists():
        return
    before = from_dict(read_yaml(snapshot), str(snapshot))
    changed = [f"{key}: {old} -> {new}" for key, old, new in differences(before, config, frozen_only=True)]
    if changed:
        raise UserError(
            "the run cannot be resumed with other settings (" + "; ".join(changed) + "); "
            "drop them, or start a new run from its weights with --model.pretrained"
        )


# ---------------------------------------------------------------- the parts


def build_run(
    config: Config, world: World, task: Task, folder: RunFolder, log: Log, resumed: bool, callbacks: list[Callback]
) -> Run:
    """Build everything and, when resuming, put it where the run stopped."""
    seed_everything(config.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("high")
    readers = build_readers(config, task, world, log)
    check_classes(config, readers[0].class_names)
    settle_classes(config, task, readers[0])
    starts_anew = world.agree(not (resumed and folder.has_checkpoint()))
    raw_model = build_model(config, world, log, pretrained=starts_anew)
    train_loader, val_loader = build_loaders(config, task, world, readers, raw_model.stride)
    steps_per_epoch = train_loader.batch_sampler.steps_per_epoch
    total_steps = config.train.max_steps or config.train.epochs * steps_per_epoch
    optimizer = build_optimizer_for(config, raw_model)
    precision = choose_precision(config.train.mixed_precision, world.device)
    run = Run(
        config=config,
        world=world,
        task=task,
        folder=folder,
        log=log,
        callbacks=[],
        train_loader=train_loader,
        val_loader=val_loader,
        dataset_names=list(readers[0].datasets),
        raw_model=raw_model,
        model=raw_model,
        criterion=build_criterion(config, task, readers[0]).to(world.device),
        optimizer=optimizer,
        schedule=Schedule(
            optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch, **asdict(config.scheduler)
        ),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision.needs_scaler),
        ema=EMA(raw_model, config.train.ema_decay) if config.train.ema_decay else None,
        precision=precision,
        state=RunState(),
        meter=Meter(),
        flags=DelayedFlags(),
        stop=StopSignal(),
        total_steps=total_steps,
        best_metric=best_metric(config, task),
        drop_path=drop_path_rate(raw_model),
        clock=StepClock(world.device),
        is_fine_tuned=starts_anew and config.model.pretrained not in ("none", "backbone"),
    )
    restore(run, resumed)
    run.model = wrap_model(run)
    if world.is_main_process:
        # Only now, when all else stands: a misspelt path must not cost the run that is overwritten.
        if not resumed:
            folder.clear()
        folder.sweep()
        (folder.path / "status.txt").unlink(missing_ok=True)  # a resumed run has not ended
        log.open(folder.path / "train.log")
        write_text(folder.path / "config.yml", to_yaml(config))
        description = describe(run, {"training": readers[0], "validation": readers[1]})
        write_text(folder.path / "run.json", json.dumps(description, indent=1))
        begin_telling(run, resumed, description["id"], callbacks)
        run.log.say(data_table({"training": readers[0], "validation": readers[1]}))
        if table := task.data_table(readers[0]):
            run.log.say(table)
    return run


def begin_telling(run: Run, resumed: bool, run_id: str, callbacks: list[Callback]) -> None:
    """From here on the console, the records, the report, the trackers and the user's own callbacks hear of the run."""
    config, log, folder, state = run.config, run.log, run.folder, run.state
    run.callbacks = [Console(log, lambda scores: run.task.color(scores, config.logging)), Records(folder.path),
                     *(Dispensable(each, log) for each in (Report(folder.path), *build_trackers(config.tracking, log))),
                     *callbacks]  # fmt: skip
    info = RunInfo(folder.name, folder.path, as_dict(config), resumed, state.records, state.step, run.task, run_id)
    for callback in run.callbacks:
        callback.on_run_start(info)
    for event in run.early_events:
        for callback in run.callbacks:
            callback.on_event(event)
    if resumed:
        log.say(what_runs(run))  # its event was the resume
    else:
        run.note("start", what_runs(run))


def what_runs(run: Run) -> str:
    """The first line of the log."""
    config, world = run.config, run.world
    trainable = sum(p.numel() for p in run.raw_model.parameters() if p.requires_grad)
    effective_batch_size = config.train.batch_size * config.train.grad_accum_steps * world.size
    return (
        f"{run.folder.name}: {config.model.family}, {trainable / 1e6:.1f}M parameters to train on {world.device} "
        f"with {world.size} process{'es' if world.size > 1 else ''}, {run.precision.name} mixed precision; "
        f"{run.total_steps} steps of {effective_batch_size} samples"
    )


def describe(run: Run, readers: dict[str, Any]) -> dict[str, Any]:
    """What run.json holds: all that a report says of a run beside its records. A resumed run keeps id and age."""
    config, metric = run.config, run.metric()
    before = read_json(run.folder.path / "run.json")
    parameters = [(p.numel(), p.requires_grad) for p in run.raw_model.parameters()]
    return {
        "id": before.get("id") or uuid.uuid4().hex,
        "name": run.folder.name,
        "created": before.get("created") or time.time(),
        "command": run.log.redact(" ".join(sys.argv)),
        "family": config.model.family,
        "task": config.task,
        "metric": run.best_metric,
        "primary": metric.primary,
        "higher_is_better": metric.higher_is_better,
        "total_steps": run.total_steps,
        "steps_per_epoch": run.steps_per_epoch,
        "epochs": run.epochs,
        "parameters": sum(count for count, _ in parameters),
        "trainable_parameters": sum(count for count, trains in parameters if trains),
        "data": [{"part": part, "dataset": name, "samples": summary.count, "weight": summary.weight}
                 for part, reader in readers.items() if reader for name, summary in reader.datasets.items()],
        "changed": changed(config),
        "environment": environment(run.world),
        "demo": config.is_demo,
    }  # fmt: skip


def wrap_model(run: Run) -> nn.Module:
    """Compile first, DDP after; the raw model stays beside it."""
    if run.config.train.compile:
        for part in run.raw_model.compile_parts().values():
            part.compile()
    if run.world.size == 1:
        return run.raw_model
    # DDP rebuilds its buckets after the first iteration, and with three ranks and more another bucket is another
    # order of summation: only without the rebuilding does a resumed run sum as the unbroken one did.
    exact = finds_unused(run)
    devices = [run.world.device.index] if run.world.device.type == "cuda" else None
    known = signature(DistributedDataParallel).parameters  # newer versions of torch renamed the switch
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    own_buffers: dict[str, Any] = {switch: False}
    # Of depthwise kernels with channels last, which differ in the stride of an axis of one element alone.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(run.raw_model, device_ids=devices, find_unused_parameters=exact, **own_buffers)


def finds_unused(run: Run) -> bool:
    """Whether DDP looks for parameters without a gradient in every step."""
    return run.raw_model.skips_parameters or (run.config.distributed.exact_resume and run.world.size > 2)


def best_metric(config: Config, task: Task) -> str:
    """The metric that chooses best.pth; one that is not measured is a `UserError`."""
    metric = build_metric(config, task, [])
    name = config.checkpoint.monitor.removeprefix("val/") or metric.primary
    if name not in metric.higher_is_better:
        known = ", ".join(f"val/{key}" for key in metric.higher_is_better)
        raise UserError(
            f"checkpoint.monitor is {config.checkpoint.monitor!r}, but must be one of {known}, "
            "or be added to evaluation.metrics"
        )
    return name


# ---------------------------------------------------------------- resuming


def restore(run: Run, resumed: bool) -> None:
    """Put a resumed run where it stopped; a path in `resume` starts from that file."""
    find_place(run, resumed)
    if resumed:
        run.state.pieces = max(run.state.pieces, run.folder.noted_pieces())


def find_place(run: Run, resumed: bool) -> None:
    """The newest intact checkpoint, or the file named, or the beginning."""
    wanted = run.config.resume
    if resumed and wanted in ("true", "auto"):
        found = run.folder.newest()
        if found is None:
            run.note("start", "the run was ended before its first checkpoint; it starts again")
            return
        file, content, damaged = found
        for sentence in damaged:
            run.note("warning", f"{sentence}; using {file.name} instead")
    elif wanted and wanted not in ("true", "auto"):
        file = Path(wanted)
        content = load_weights(file)
        if "state" not in content:
            run.log.say(f"{file} holds weights only, so training starts from them at step 0")
            load_pretrained(run.raw_model, wanted, run.world, run.log)
            run.is_fine_tuned = True
            if run.ema:
                run.ema.module.load_state_dict(run.raw_model.state_dict())
            return
    else:
        return
    load_state(run, content, file)
    if not resumed:
        run.state.records = 0  # those of the other run stay there
    elif run.world.is_main_process:
        run.folder.adopt(file)
        publish(run)


def load_state(run: Run, content: dict[str, Any], file: Path) -> None:
    """Weights, optimizer, schedule, scaler, averages and position from a checkpoint."""
    try:
        run.raw_model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        if run.ema:
            run.ema.module.load_state_dict(content["ema"] or content["model"])
        if run.scaler.is_enabled() and content["scaler"]:
            run.scaler.load_state_dict(content["scaler"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file} does not fit this run's model and optimizer: {reason}") from None
    run.schedule.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["rng"])
    run.state = RunState(**content["state"])
    run.meter = Meter.restore(run.state.meter)
    if content["world_size"] != run.world.size:
        rescale_position(run, content["micro_steps_per_epoch"])
    position = f"epoch {run.state.epoch + 1}, step {run.state.step}"
    run.note("resume", f"resumed from {file.name} at {position}")
    if content["world_size"] != run.world.size:
        run.note("warning", f"the run had {content['world_size']} processes and now has {run.world.size}: "
                            "it goes on, but not bit by bit as it would have")  # fmt: skip


def rescale_position(run: Run, micro_steps_before: int) -> None:
    """With another number of processes an epoch has another number of steps: keep the place in the data."""
    state, accumulation = run.state, run.config.train.grad_accum_steps
    done = state.micro_step / micro_steps_before
    state.micro_step = round(done * run.steps_per_epoch) * accumulation
    if not run.config.train.max_steps:
        skipped = state.skipped / max(1, state.step)
        state.step = state.epoch * run.steps_per_epoch + state.micro_step // accumulation
        state.skipped = round(skipped * state.step)


def publish(run: Run) -> None:
    """Give the checkpoint just saved its other names. Also after a resume: a kill may have come in between."""
    state, config = run.state, run.config.checkpoint
    if state.best_step == state.step:
        run.folder.mark_best()
    if state.micro_step == 0 and state.epoch:
        run.folder.keep_epoch(state.epoch, save_last=config.save_last, save_step=config.save_step)

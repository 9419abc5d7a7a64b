"""What a run is made of, and how one begins: the folder, the parts, and the place where a resumed run stopped.

Apart from train.py so that the loop can be read without the building.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from build import (
    build_criterion,
    build_loaders,
    build_model,
    build_optimizer_for,
    build_readers,
    check_classes,
    data_table,
    load_pretrained,
)
from checkpoint import CheckpointError, RunFolder, RunState, load_weights, write_text
from config import Config, as_dict, differences, from_dict, to_yaml
from errors import UserError
from optim import Schedule
from tasks import Task
from tracking import Callback, Console, Log, Records, RunInfo, build_trackers
from utils import (
    EMA,
    DelayedFlags,
    Meter,
    Precision,
    StopSignal,
    World,
    choose_precision,
    drop_path_rate,
    seed_everything,
)


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
    stopping: bool = False
    bar: Any = None  # of the epochs
    last_save: float = field(default_factory=time.monotonic)
    last_line: tuple[float, int] = (0.0, 0)

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
        name = f"{config.model.family}_{re.sub(r'[^-+.=@A-Za-z0-9_]', '-', dataset)}_{time.strftime('%Y%m%d-%H%M%S')}"
        config.experiment_name = str(world.agree(name))


def is_resumed(config: Config, folder: RunFolder, world: World) -> bool:
    """Whether the run goes on with what is in its folder; raises `UserError` where a run of this name is in the way."""
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
    before = from_dict(yaml.safe_load(snapshot.read_text(encoding="utf-8")), str(snapshot))
    changed = differences(before, config, frozen_only=True)
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
    raw_model = build_model(config, world, log, pretrained=not resumed)
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
        criterion=build_criterion(config),
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
    )
    restore(run, resumed)
    run.model = wrap_model(run)
    if world.is_main_process:
        # Only now, when all else stands: a misspelt path must not cost the run that is overwritten.
        if not resumed:
            folder.clear()
        folder.sweep()
        log.open(folder.path / "train.log")
        write_text(folder.path / "config.yml", to_yaml(config))
        run.callbacks = [Console(log, lambda scores: task.color(scores, config.logging)), Records(folder.path),
                         *build_trackers(config.tracking, log), *callbacks]  # fmt: skip
        info = RunInfo(folder.name, folder.path, as_dict(config), resumed, run.state.records, run.state.step, task)
        for callback in run.callbacks:
            callback.on_run_start(info)
        say_what_runs(run, {"training": readers[0], "validation": readers[1]})
    return run


def say_what_runs(run: Run, readers: dict[str, Any]) -> None:
    """The first lines of the log."""
    config, world = run.config, run.world
    trainable = sum(p.numel() for p in run.raw_model.parameters() if p.requires_grad)
    effective_batch_size = config.train.batch_size * config.train.grad_accum_steps * world.size
    run.log.say(
        f"{run.folder.name}: {config.model.family}, {trainable / 1e6:.1f}M parameters to train on {world.device} "
        f"with {world.size} process{'es' if world.size > 1 else ''}, {run.precision.name} mixed precision; "
        f"{run.total_steps} steps of {effective_batch_size} samples"
    )
    run.log.say(data_table(readers))


def wrap_model(run: Run) -> nn.Module:
    """Compile first, DDP after; the raw model stays beside it."""
    if run.config.train.compile:
        for part in run.raw_model.compile_parts().values():
            part.compile()
    if run.world.size == 1:
        return run.raw_model
    # DDP rebuilds its buckets after the first iteration, and with three ranks and more another bucket is another
    # order of summation: only without the rebuilding does a resumed run sum as the unbroken one did.
    exact = run.config.distributed.exact_resume and run.world.size > 2
    devices = [run.world.device.index] if run.world.device.type == "cuda" else None
    known = signature(DistributedDataParallel).parameters  # newer versions of torch renamed the switch
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    own_buffers: dict[str, Any] = {switch: False}
    return DistributedDataParallel(run.raw_model, device_ids=devices, find_unused_parameters=exact, **own_buffers)


def best_metric(config: Config, task: Task) -> str:
    """The metric that chooses best.pth; an unknown name is a `UserError`."""
    metric = task.metric()
    name = config.checkpoint.monitor.removeprefix("val/") or metric.primary
    if name not in metric.higher_is_better:
        known = ", ".join(f"val/{key}" for key in metric.higher_is_better)
        raise UserError(f"checkpoint.monitor is {config.checkpoint.monitor!r}, but must be one of {known}")
    return name


# ---------------------------------------------------------------- resuming


def restore(run: Run, resumed: bool) -> None:
    """Put a resumed run where it stopped; a path in `resume` starts from that file."""
    wanted = run.config.resume
    if resumed and wanted in ("true", "auto"):
        found = run.folder.newest()
        if found is None:
            run.log.say("the run was ended before its first checkpoint; it starts again")
            return
        file, content, damaged = found
        for sentence in damaged:
            run.log.say(f"{sentence}; using {file.name} instead")
    elif wanted and wanted not in ("true", "auto"):
        file = Path(wanted)
        content = load_weights(file)
        if "state" not in content:
            run.log.say(f"{file} holds weights only, so training starts from them at step 0")
            load_pretrained(run.raw_model, wanted, run.world, run.log)
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
    run.log.say(f"resumed from {file.name} at {position}")
    if content["world_size"] != run.world.size:
        run.log.say(f"the run had {content['world_size']} processes and now has {run.world.size}: "
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

"""Train a model on your own data.

    python train.py --experiment_name demo                                  # draws its own data, needs nothing
    python train.py --config birefnet_dis5k --data.root data/DIS5K --experiment_name my_run
    torchrun --nproc_per_node=4 train.py --experiment_name my_run           # one or many machines
    python train.py --experiment_name my_run --resume                       # goes on where it was killed

Reads in the order in which a run happens: data, run folder, model, loop, step, validation, save. It knows nothing
about any one model or task; the contract it relies on stands in models/base.py, tasks.py and loss.py.
"""

from __future__ import annotations

import os
import sys

from config import answer_at_once
from errors import UserError, run_command

ACTIONS = {
    "print_config": "print the resolved configuration and stop",
    "create_config [FILE]": "write it to FILE (config.yml) with every key documented, and stop",
    "check_data": "decode all data, list every fault, and stop",
    "preview": "write a contact sheet of augmented samples, and stop",
    "dry_run": "build everything, run one step, print what it takes, and stop",
    "version": "print the versions of what this runs on, and stop",
    "debug": "show the traceback of a user error",
    "help": "this page",
}

if __name__ == "__main__":
    answer_at_once("train.py [--experiment_name NAME] [--config FILE ...] [settings]", ACTIONS)

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from build import (
    build_criterion,
    build_loaders,
    build_model,
    build_optimizer_for,
    build_readers,
    data_table,
    load_pretrained,
    model_settings,
)
from checkpoint import CheckpointError, RunFolder, RunLock, RunState, load_weights, write_text
from commands import check_data, create_config, dry_run, preview, version
from config import Config, as_dict, differences, from_dict, secret_values, take_values, to_yaml
from config import load as load_config
from dataset import Batch, composition
from evaluate import evaluate
from optim import Schedule, guarded_step
from tasks import Task, get_task
from tracking import Callback, Console, Log, Records, RunInfo, StepRecord, ValidationRecord, build_trackers
from utils import (
    EMA,
    DelayedFlags,
    Meter,
    Precision,
    StopSignal,
    World,
    choose_precision,
    drop_path_rate,
    gradient_norm,
    join_world,
    leave_world,
    norm_statistics,
    seed_everything,
    sync_buffers,
)

NORM_TO_WARN_OF = 100.0


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
    last_save: float = field(default_factory=time.monotonic)
    last_line: tuple[float, int] = (0.0, 0)

    @property
    def steps_per_epoch(self) -> int:
        return self.train_loader.batch_sampler.steps_per_epoch


# ---------------------------------------------------------------- the run, in order


def main(config: Config, callbacks: list[Callback] | None = None) -> dict[str, float]:
    """Train as `config` says and return the last validation's metrics. `callbacks` hear of the run on rank 0."""
    world = join_world(config.device, config.distributed.timeout_minutes)
    task = get_task(config.task)
    name_the_run(config, world)
    folder = RunFolder(Path(config.output_dir) / config.experiment_name)
    lock = RunLock(folder.path) if world.is_main_process else None
    try:
        resumed = open_run_folder(config, folder, world)
    except BaseException:
        if lock:
            lock.release()
        leave_world()
        raise
    log = Log(folder.path / "train.log" if world.is_main_process else None, secret_values(config),
              config.logging.color, quiet=not world.is_main_process)  # fmt: skip
    status, run = "failed", None
    try:
        run = build_run(config, world, task, folder, log, resumed, callbacks or [])
        status, metrics = train(run)
        return metrics
    except BaseException as error:
        log.say(f"the run ended with {type(error).__name__}: {error}")
        raise
    finally:
        if world.is_main_process:
            write_text(folder.path / "status.txt", status + "\n")
        log.close()
        if lock:
            lock.release()
        leave_world()
        if run:
            run.stop.restore()


def train(run: Run) -> tuple[str, dict[str, float]]:
    """The loop: (how it ended, the last validation's metrics)."""
    config, state = run.config, run.state
    metrics: dict[str, float] = {}
    if config.train.resume_start_with_eval and (state.step or config.resume or config.model.pretrained != "none"):
        metrics = validate(run, record=False)
    if state.step and not is_epoch_over(run) and is_validation_due(run):  # a signal came between step and validation
        metrics = validate(run)
        save(run)
    status = "stopped early" if is_out_of_patience(run) else "finished"
    run.last_line = (time.monotonic(), state.step)
    epochs = math.ceil(run.total_steps / run.steps_per_epoch)
    bar = tqdm(total=epochs, initial=state.epoch, desc="epochs", disable=not show_progress(run))
    while (state.step < run.total_steps or is_epoch_over(run)) and status == "finished":
        begin_epoch(run)
        for micro_batches in epoch_steps(run):
            train_step(run, micro_batches)
            if state.step % config.logging.log_frequency == 0:
                report_step(run)
            if run.stopping or is_epoch_over(run) or state.step >= run.total_steps:
                break
            if is_validation_due(run):
                metrics = validate(run)
                save(run)
                if is_out_of_patience(run):
                    break
            elif is_time_to_save(run):
                save(run)
        if run.stopping:
            status = f"stopped by {run.stop.name or 'a signal to another rank'}"
            save(run)
            break
        if is_validation_due(run):
            metrics = validate(run)
        if is_out_of_patience(run):
            status = "stopped early"
        if is_epoch_over(run):
            end_epoch(run)
            bar.update()
        else:
            save(run)
    bar.close()
    for callback in run.callbacks:
        callback.on_run_end(status)
    hint = "; continue with --resume" if run.stopping else ""
    run.log.say(f"{status} after {state.step} steps; the run is in {run.folder.path}{hint}")
    return status, metrics


# ---------------------------------------------------------------- the run folder


def name_the_run(config: Config, world: World) -> None:
    """Without a name a run is called `<family>_<dataset>_<time>`."""
    if not config.experiment_name:
        dataset = "demo" if config.is_demo else Path((config.data.train or config.data.root).split("+")[0]).name
        name = f"{config.model.family}_{dataset}_{time.strftime('%Y%m%d-%H%M%S')}"
        config.experiment_name = str(world.agree(name))


def open_run_folder(config: Config, folder: RunFolder, world: World) -> bool:
    """Whether the run is resumed; raises `UserError` where a run of this name is in the way."""
    there = bool(world.agree(folder.exists()))
    if there and not (config.resume or config.overwrite):
        raise UserError(
            f"the run {folder.path} exists already: continue it with --resume, replace it with --overwrite, "
            "or choose another --experiment_name"
        )
    if config.resume == "true" and not there:
        raise UserError(f"there is no run to resume in {folder.path}; --resume auto starts one where there is none")
    resumed = there and bool(config.resume)
    if world.is_main_process:
        if there and not resumed:
            clear_run(folder.path)
        folder.sweep()
        if resumed:
            check_same_settings(config, folder.path / "config.yml")
    world.barrier()
    return resumed


def clear_run(path: Path) -> None:
    """Empty a run folder, but for the lock that is held."""
    for item in path.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != ".lock":
            item.unlink()


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


# ---------------------------------------------------------------- model and optimizer


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
    readers = build_readers(config, task, log)
    raw_model = build_model(config, readers[0], world, log)
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
        write_text(folder.path / "config.yml", to_yaml(config))
        run.callbacks = [Console(log, lambda scores: task.color(scores, config.logging)), Records(folder.path),
                         *build_trackers(config.tracking, log), *callbacks]  # fmt: skip
        info = RunInfo(folder.name, folder.path, as_dict(config), resumed, run.state.records, task)
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


# ---------------------------------------------------------------- one epoch, one step


def begin_epoch(run: Run) -> None:
    """Modes, loss weights and drop path are functions of the epoch alone, so a resume finds them again."""
    config, epoch = run.config, run.state.epoch
    train_mode(run)
    in_last = bool(config.loss.last_epochs) and epoch >= config.train.epochs - config.loss.last_epochs
    run.criterion.set_phase(config.loss.last_epochs_factors if in_last else {})
    if config.train.drop_path_schedule == "linear":
        run.raw_model.set_drop_path(run.drop_path * min(1.0, epoch / max(1, config.train.epochs - 1)))
    run.train_loader.batch_sampler.set_epoch(epoch)
    run.train_loader.batch_sampler.set_start(run.state.micro_step)


def train_mode(run: Run) -> None:
    """Training mode, but for batch norm where its statistics are to stay."""
    run.model.train()
    if run.config.train.freeze_bn:
        for module in run.raw_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def epoch_steps(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, on the device."""
    micro_batches: list[Batch] = []
    for batch in run.train_loader:
        batch = batch.to(run.world.device)
        if run.config.train.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        micro_batches.append(batch)
        if len(micro_batches) == run.config.train.grad_accum_steps:
            yield micro_batches
            micro_batches = []


def train_step(run: Run, micro_batches: list[Batch]) -> None:
    """One optimizer step. Nothing here waits for the device.

    Loss terms are divided by the counts of the whole step, so those of micro-batches and ranks simply add up. A step
    whose loss or gradient is not finite is undone on the device, on all ranks alike.
    """
    state, world = run.state, run.world
    kept = [buffer.clone() for buffer in norm_statistics(run.raw_model)]
    counts = total_counts(run, micro_batches)
    sums: list[Tensor] = []
    for micro_step, batch in enumerate(micro_batches):
        seed_everything(run.config.seed, state.step, micro_step, world.rank)
        is_last = micro_step == len(micro_batches) - 1
        with nullcontext() if is_last or world.size == 1 else run.model.no_sync():  # type: ignore[operator]
            with run.precision.autocast():
                outputs = run.model(batch)
            losses = run.criterion(outputs, batch, counts)
            loss = torch.stack(list(losses.values())).sum()
            run.scaler.scale(loss * world.size).backward()  # DDP takes the mean over ranks; ours is a sum
        scores = run.task.metric().batch_scores(outputs, batch)
        names, values = step_values(run, losses, loss, scores, batch)
        sums.append(values)
    values = world.sum_(torch.stack(sums).sum(0))
    run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    if run.config.train.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.train.max_grad_norm, norm)
    bad = (~torch.isfinite(norm + values[names.index("loss")])).float()
    settle(run)
    run.schedule.set(state.applied)
    guarded_step(run.optimizer, bad)
    if run.scaler.is_enabled():
        run.scaler.update()
    for buffer, before in zip(norm_statistics(run.raw_model), kept, strict=True):
        buffer.copy_(torch.where(bad > 0, before, buffer))
    sync_buffers(run.raw_model, world)
    if run.ema:
        run.ema.update(run.raw_model, 1 - bad)
    run.optimizer.zero_grad(set_to_none=True)
    run.meter.add([*names, "grad_norm"], torch.cat([values, norm.reshape(1).to(values)]))
    run.flags.put(torch.stack([bad, values[names.index("stop")], norm.to(bad)]))
    state.step += 1
    state.micro_step += len(micro_batches)


def total_counts(run: Run, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """What the loss terms average over, summed over the step's micro-batches and ranks in one reduction."""
    counts = [run.criterion.counts(batch) for batch in micro_batches]
    names = list(counts[0])
    totals = run.world.sum_(torch.stack([torch.stack([each[name] for name in names]) for each in counts]).sum(0))
    return dict(zip(names, totals.unbind(), strict=True))


def step_values(
    run: Run, losses: dict[str, Tensor], loss: Tensor, scores: dict[str, Tensor], batch: Batch
) -> tuple[list[str], Tensor]:
    """(names, values) of one micro-step that add up to the step's over micro-steps and ranks."""
    share = 1 / (run.config.train.grad_accum_steps * run.world.size)
    samples = [f"samples/{name}" for name in run.dataset_names]
    names = ["loss", *(f"loss/{term}" for term in losses), *scores, *samples, "stop"]
    measured = torch.stack([loss, *losses.values(), *(score * share for score in scores.values())]).detach().float()
    host = [*composition(batch.samples, run.dataset_names), bool(run.stop)]
    counted = torch.tensor(host, dtype=torch.float32)
    if measured.is_cuda:
        counted = counted.pin_memory()
    return names, torch.cat([measured, counted.to(measured.device, non_blocking=True)])


def settle(run: Run) -> None:
    """Take note of what the last step was on the device; asked within the next step, it has long been done.

    Raises `UserError` when the run can only get worse.
    """
    flags = run.flags.take()
    if flags is None:
        return
    bad, stop, norm = flags
    state = run.state
    run.stopping = run.stopping or stop > 0
    if bad:
        state.skipped += 1
        state.bad_in_a_row += 1
        run.log.say(f"step {state.step}: loss or gradient is not finite; the step was skipped")
        scale = run.scaler.get_scale() if run.scaler.is_enabled() else math.inf
        if state.bad_in_a_row >= run.config.train.max_bad_steps or scale < 1:
            raise UserError(
                f"{state.bad_in_a_row} steps in a row had no finite gradient, so training was ended; weights are as "
                "they were before. Lower optimizer.lr, set train.max_grad_norm, or use bf16 instead of fp16"
            )
    else:
        state.bad_in_a_row = 0
        if norm > NORM_TO_WARN_OF and not state.warned_norm:
            state.warned_norm = True
            run.log.say(
                f"the gradient norm is {norm:.0f}: usual causes are a learning rate that is too high, no warm-up, "
                "masks in another range than 0..1, or very small batches; train.max_grad_norm clips it"
            )


def report_step(run: Run) -> None:
    """The printed line: the one place where the host waits for the device."""
    if not run.callbacks:
        return
    state = run.state
    means, last, sums = run.meter.read()
    now, (then, step_then) = time.monotonic(), run.last_line
    speed = (state.step - step_then) / max(now - then, 1e-9)
    run.last_line = (now, state.step)
    group = run.optimizer.param_groups[0]
    counted = {name: round(last.pop(f"samples/{name}")) for name in run.dataset_names}
    total = {name: state.composition.get(name, 0) + round(sums[f"samples/{name}"])
             for name in run.dataset_names}  # fmt: skip
    last.pop("stop")
    record = StepRecord(
        epoch=state.epoch + 1,
        step=state.step,
        step_in_epoch=state.micro_step // run.config.train.grad_accum_steps,
        steps_per_epoch=run.steps_per_epoch,
        means=means,
        last=last,
        lr=max(g["lr"] for g in run.optimizer.param_groups),
        momentum=group["betas"][0] if "betas" in group else group.get("momentum", 0.0),
        grad_norm=last.pop("grad_norm"),
        composition=counted,
        total_composition=total,
        steps_per_second=speed,
        eta_seconds=(run.total_steps - state.step) / max(speed, 1e-9),
        skipped=state.skipped,
    )
    for callback in run.callbacks:
        callback.on_step(record)
    state.records += 1


# ---------------------------------------------------------------- validation, saving, resuming


def validate(run: Run, record: bool = True) -> dict[str, float]:
    """Score the model (its average, where there is one), note the best, and tell the callbacks."""
    state = run.state
    if run.val_loader is None:
        return {}
    model = run.ema.module if run.ema else run.raw_model
    metric = evaluate(
        model,
        run.val_loader,
        run.task.metric(),
        world=run.world,
        precision=run.precision,
        tta=run.config.evaluation.tta,
        progress=show_progress(run),
    )
    train_mode(run)
    values = metric.compute()
    if not record:
        run.log.say("validation before the first step: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        return values
    value, higher = values[run.best_metric], metric.higher_is_better[run.best_metric]
    is_best = state.best is None or (value > state.best if higher else value < state.best)
    if is_best:
        state.best, state.best_step, state.waited = value, state.step, 0
    else:
        state.waited += 1
    state.validated_step = state.step
    run.schedule.on_validation(value, higher)
    rows = [asdict(row) for row in metric.rows]
    result = ValidationRecord(state.epoch + 1, state.step, values, metric.per_dataset(), rows, is_best)
    for callback in run.callbacks:
        callback.on_validation(result)
    state.records += 1
    return values


def is_validation_due(run: Run) -> bool:
    """Every `steps_per_validation` steps, else at the end of every `eval_each_epoch`-th epoch; always at the end."""
    state, train = run.state, run.config.train
    if run.val_loader is None or not (train.eval_each_epoch or train.steps_per_validation):
        return False
    if state.validated_step == state.step:
        return False
    if state.step >= run.total_steps:
        return True
    if train.steps_per_validation:
        return state.step % train.steps_per_validation == 0
    epochs = (state.epoch + 1) / train.eval_each_epoch
    return is_epoch_over(run) and math.floor(epochs) > math.floor(state.epoch / train.eval_each_epoch)


def is_epoch_over(run: Run) -> bool:
    return run.state.micro_step >= len(run.train_loader.batch_sampler)


def is_out_of_patience(run: Run) -> bool:
    return run.config.train.early_stopping and run.state.waited >= run.config.train.patience


def is_time_to_save(run: Run) -> bool:
    """Rank 0 alone saves, so its clock alone decides."""
    config = run.config.checkpoint
    by_steps = config.every_steps and run.state.step % config.every_steps == 0
    by_time = config.every_minutes and time.monotonic() - run.last_save > 60 * config.every_minutes
    return bool(by_steps or by_time)


def end_epoch(run: Run) -> None:
    """Turn the page, save, and keep the epoch's own file."""
    state = run.state
    sums = run.meter.read()[2]
    for name in run.dataset_names:
        state.composition[name] = state.composition.get(name, 0) + round(sums.get(f"samples/{name}", 0))
    run.meter = Meter()
    state.epoch, state.micro_step = state.epoch + 1, 0
    save(run)


def save(run: Run) -> None:
    """Save everything as last.pth, and as best.pth when this step is the best."""
    settle(run)
    run.last_save = time.monotonic()
    if not run.world.is_main_process:
        return
    state = run.state
    state.meter = run.meter.state()
    run.folder.save({
        "format": 1,
        "meta": model_meta(run),
        "model": run.raw_model.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "state": asdict(state),
        "rng": torch.get_rng_state(),
        "world_size": run.world.size,
    })  # fmt: skip
    publish(run)


def publish(run: Run) -> None:
    """Give the checkpoint just saved its other names. Also after a resume: a kill may have come in between."""
    state, config = run.state, run.config.checkpoint
    if state.best_step == state.step:
        run.folder.mark_best()
    if state.micro_step == 0 and state.epoch:
        run.folder.keep_epoch(state.epoch, save_last=config.save_last, save_step=config.save_step)


def model_meta(run: Run) -> dict[str, Any]:
    """What a checkpoint says of itself, so that nothing else is needed to use it."""
    config = run.config
    return {
        "family": config.model.family,
        "settings": model_settings(config),
        "task": config.task,
        "size": list(config.data.size),
        "normalize": config.data.normalize,
        "class_names": list(run.train_loader.dataset.reader.class_names),
        "experiment_name": config.experiment_name,
        "config": as_dict(config),
    }


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
            load_pretrained(run.raw_model, wanted, run.log)
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
        if run.ema and content["ema"]:
            run.ema.module.load_state_dict(content["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file} does not fit this run's model and optimizer: {reason}") from None
    run.schedule.load_state_dict(content["scheduler"])
    run.scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["rng"])
    run.state = RunState(**content["state"])
    run.meter = Meter.restore(run.state.meter)
    position = f"epoch {run.state.epoch + 1}, step {run.state.step}"
    run.log.say(f"resumed from {file.name} at {position}")
    if content["world_size"] != run.world.size:
        run.log.say(f"the run had {content['world_size']} processes and now has {run.world.size}: "
                    "it goes on, but not bit by bit as it would have")  # fmt: skip


def show_progress(run: Run) -> bool:
    return run.config.logging.progress and run.world.is_main_process and sys.stderr.isatty()


# ---------------------------------------------------------------- the other commands


def launch(devices: int) -> None:
    """`--devices N`: become torchrun with the same command."""
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    os.execv(sys.executable, [*arguments, *sys.argv])


def command() -> None:
    """Read the command line and do what it says."""
    actions = ("print_config", "check_data", "preview", "dry_run", "version", "debug")
    names = {flag: flag[2:].replace("-", "_") for flag in sys.argv[1:] if flag.startswith("--")}
    named = set(names.values()) & set(actions)
    flags = [flag for flag in sys.argv[1:] if names.get(flag) not in actions]
    creates = any(name.partition("=")[0] == "create_config" for name in names.values())
    targets, flags = take_values(flags, "create_config")
    if "version" in named:
        return version()
    config = load_config(flags)
    if "print_config" in named:
        return print(to_yaml(config), end="")
    if creates:
        return create_config(config, Path(targets[0] if targets else "config.yml"))
    for word, act in (("check_data", check_data), ("preview", preview), ("dry_run", dry_run)):
        if word in named:
            return act(config)
    if config.distributed.devices > 1 and "WORLD_SIZE" not in os.environ:
        launch(config.distributed.devices)
    main(config)


if __name__ == "__main__":
    run_command(command)

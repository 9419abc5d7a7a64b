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

import doctor
from config import answer_at_once
from errors import STOPPED, TryAgain, UserError, is_out_of_memory, run_command

ACTIONS = {
    "print_config": "print the resolved configuration and stop",
    "create_config [FILE]": "write it to FILE (config.yml) with every key documented, and stop",
    "from_ancestor FILE [PRESET]": "write a preset that continues another program's settings or checkpoint, and stop",
    "check_data": "decode all data, list every fault, and stop",
    "preview": "write a contact sheet of augmented samples, and stop",
    "dry_run": "build everything, run one step, print what it takes, and stop",
    "find_lr": "try rising learning rates, draw the loss over them, suggest one, and stop",
    "profile": "record some steps, write a trace and the operators that take longest, and stop",
    "replay FILE": "take a step again that had no finite loss or gradient (bad_step_N.pth), and stop",
    "doctor": "print the versions and what is wrong with this installation, to paste into a report, and stop",
    "version": "print the versions of what this runs on, and stop",
    "debug": "show the traceback of a user error",
    "help": "this page",
}

if __name__ == "__main__":
    answer_at_once("train.py [--experiment_name NAME] [--config FILE ...] [settings]", ACTIONS)
    if "--doctor" in sys.argv:  # before anything is imported that may be what is broken
        sys.exit(doctor.command())

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import bad_steps
import from_ancestor
import series
from build import loss_settings, model_settings
from checkpoint import RunFolder, RunLock, write_text
from commands import check_data, create_config, dry_run, find_lr, preview, profile, version
from config import Config, as_dict, secret_values, take_values, to_yaml
from config import load as load_config
from dataset import composition
from evaluate import Interrupted, evaluate
from gallery import Gallery
from optim import guarded_step
from run import Run, TakenStep, build_run, finds_unused, is_resumed, name_the_run, publish
from samples import Batch, Sample
from settings import TrackingSettings
from tasks import Scored, get_task
from timing import hint_about
from tracking import Callback, Log, StepRecord, ValidationRecord
from utils import (
    Meter,
    RollCall,
    World,
    freeze_norm_statistics,
    gradient_norm,
    is_better,
    join_world,
    leave_world,
    may_restart,
    norm_statistics,
    seed_everything,
    sync_buffers,
    tensors_in,
)

NORM_TO_WARN_OF = 100.0


# ---------------------------------------------------------------- the run, in order


def main(config: Config, callbacks: list[Callback] | None = None) -> dict[str, float]:
    """Train as `config` says and return the last validation's metrics. `callbacks` hear of the run on rank 0.

    With `seeds` or `data.fold: all` one run follows the other; what comes back are the means of their best validations,
    on rank 0, or nothing when a signal ended the series.
    """
    return train_all(config, callbacks or [])[1]


def train_all(config: Config, callbacks: list[Callback]) -> tuple[str, dict[str, float]]:
    """The run, or the series of runs: (how it ended, the metrics that `main` returns)."""
    world = join_world(config.device, config.distributed.timeout_minutes)
    try:
        runs = series.members(config)
        if not runs:
            return train_one(config, world, callbacks)
        for member in runs:
            status, _ = train_one(member, world, callbacks)
            if status not in ("finished", "stopped early"):
                return status, {}
        log = Log(secret_values(config), config.logging.color)
        return "finished", series.conclude(config, runs, log) if world.is_main_process else {}
    finally:
        leave_world()


def train_one(config: Config, world: World, callbacks: list[Callback]) -> tuple[str, dict[str, float]]:
    """One run: (how it ended, the last validation's metrics)."""
    task = get_task(config.task)
    name_the_run(config, world)
    folder = RunFolder(Path(config.output_dir) / config.experiment_name)
    log = Log(secret_values(config), config.logging.color, quiet=not world.is_main_process)
    roll_call = RollCall(world)
    with ExitStack() as at_the_end:
        resumed = is_resumed(config, folder, world)
        if world.is_main_process:
            at_the_end.callback(RunLock(folder.path).release)
            if folder.exists() and not resumed and may_restart():
                folder.overwriting.touch()
        at_the_end.callback(log.close)
        run = build_run(config, world, task, folder, log, resumed, callbacks)
        at_the_end.callback(run.stop.restore)
        status = "failed"
        try:
            status, metrics = train(run)
            return status, metrics
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            blame = roll_call.end(error, log.redact(reason))
            run.note("end", f"the run ended: {blame}" if blame else f"the run ended with {reason}")
            if blame:
                raise UserError(blame) from error
            raise
        finally:
            try:
                if world.is_main_process:
                    write_text(folder.path / "status.txt", status + "\n")
            finally:  # also on a full disk: trackers have processes to end
                for callback in run.callbacks:
                    callback.on_run_end(status)


def train(run: Run) -> tuple[str, dict[str, float]]:
    """The loop: (how it ended, the last validation's metrics)."""
    config, state = run.config, run.state
    metrics: dict[str, float] = {}
    if run.is_fine_tuned and not state.step:
        metrics = measure_base(run)
    elif config.train.resume_start_with_eval and (state.step or config.resume or config.model.pretrained != "none"):
        metrics = score_before_the_first_step(run)
    if state.step and not is_epoch_over(run) and is_validation_due(run):  # a signal came between step and validation
        metrics = validate(run)
        save(run)
    status = how_it_was_stopped(run) if run.stopping else "stopped early" if is_out_of_patience(run) else "finished"
    run.clock.restart()
    run.last_line = (time.monotonic(), state.step)
    run.bar = tqdm(total=run.epochs, initial=state.epoch, desc="epochs", disable=not show_progress(run))
    while (state.step < run.total_steps or is_epoch_over(run)) and status == "finished":
        begin_epoch(run)
        for micro_batches in epoch_steps(run):
            with run.clock.step():
                train_step(run, micro_batches)
            if state.step % config.logging.log_frequency == 0:
                report_step(run)
            if run.stopping or is_epoch_over(run) or state.step >= run.total_steps:
                break
            if is_validation_due(run):
                metrics = validate(run)
                if run.stopping or is_out_of_patience(run):
                    break
                save(run)
            elif is_time_to_save(run):
                save(run)
        if not run.stopping and is_validation_due(run):
            metrics = validate(run)
        if run.stopping:
            status = how_it_was_stopped(run)
            save(run)
            break
        if is_out_of_patience(run):
            status = "stopped early"
        if is_epoch_over(run):
            end_epoch(run)
            run.bar.update()
        else:
            save(run)
    run.bar.close()
    hint = "; continue with --resume" if run.stopping else ""
    run.note("end", f"{status} after {state.step} steps; the run is in {run.folder.path}{hint}")
    return status, metrics


def how_it_was_stopped(run: Run) -> str:
    return f"stopped by {run.stop.name or 'a signal to another rank'}"


# ---------------------------------------------------------------- one epoch, one step


def begin_epoch(run: Run) -> None:
    """Modes, loss weights and drop path are functions of the epoch alone, so a resume finds them again."""
    config, epoch = run.config, run.state.epoch
    train_mode(run)
    run.criterion.set_phase(phase_factors(run))
    if config.train.drop_path_schedule == "linear":
        run.raw_model.set_drop_path(run.drop_path * min(1.0, epoch / max(1, run.epochs - 1)))
    run.train_loader.batch_sampler.set_epoch(epoch)
    run.train_loader.batch_sampler.set_start(run.state.micro_step)


def phase_factors(run: Run) -> dict[str, float]:
    """The factors of the loss terms in this epoch."""
    loss = run.config.loss
    in_last = bool(loss.last_epochs) and run.state.epoch >= run.epochs - loss.last_epochs
    return loss.last_epochs_factors if in_last else {}


def train_mode(run: Run) -> None:
    """Training mode, but for batch norm where its statistics are to stay."""
    run.model.train()
    if run.config.train.freeze_bn:
        freeze_norm_statistics(run.raw_model)


def epoch_steps(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of each optimizer step, on the device."""
    micro_batches: list[Batch] = []
    for batch in run.clock.batches(run.train_loader):
        batch = batch.to(run.world.device)
        if run.config.train.channels_last:
            batch = batch.channels_last()
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
    taken = gradients_that_fit(run, micro_batches, counts, kept)
    name_unused(run)
    names, values = taken.names, world.sum_(taken.values.clone())
    taken.totals = values
    run.scaler.unscale_(run.optimizer)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    if run.config.train.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.train.max_grad_norm, norm)
    bad = (~torch.isfinite(norm + values[names.index("loss")])).float()
    settle(run)
    run.last_step = taken
    run.schedule.set(state.applied)
    guarded_step(run.optimizer, bad)
    if run.scaler.is_enabled():
        run.scaler.update()
    restore_statistics(run, kept, bad)
    sync_buffers(run.raw_model, world)
    if run.ema:
        run.ema.update(run.raw_model, 1 - bad)
    run.optimizer.zero_grad(set_to_none=True)
    run.meter.add([*names, "grad_norm"], torch.cat([values, norm.reshape(1).to(values)]))
    run.flags.put(torch.stack([bad, values[names.index("stop")], norm.to(bad)]))
    state.step += 1
    state.micro_step += len(micro_batches)


def gradients_that_fit(
    run: Run, micro_batches: list[Batch], counts: dict[str, Tensor], kept: list[Tensor]
) -> TakenStep:
    """The gradients of a step, from pieces of its micro-batches where memory does not suffice for a whole one."""
    while True:
        pieces = [piece for batch in micro_batches for piece in batch.split(run.state.pieces)]
        try:
            return TakenStep(pieces, counts, *add_gradients(run, pieces, counts))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            halve_pieces(run, error)
        # Only here is the graph let go that the exception held.
        run.optimizer.zero_grad(set_to_none=True)
        restore_statistics(run, kept, torch.ones((), device=run.world.device))
        if run.world.device.type == "cuda":
            torch.cuda.empty_cache()


def halve_pieces(run: Run, error: BaseException) -> None:
    """Memory ran out: take micro-batches in twice as many pieces from now on; the effective batch stays.

    One of several ranks cannot repeat a step alone, and the others wait for it: it notes the pieces down for all and
    ends the run, which goes on with them when it is started again. Raises `UserError` for pieces of one sample.
    """
    batch_size, pieces = run.config.train.batch_size, 2 * run.state.pieces
    where = f"memory ran out in step {run.state.step + 1}"
    if run.state.pieces >= batch_size:
        raise UserError(
            f"{where} with a single sample: lower data.size, or set train.activation_checkpointing"
        ) from error
    if run.world.size > 1:
        run.folder.note_pieces(run.world.rank, pieces)
        raise TryAgain(
            f"{where} on rank {run.world.rank}: start the run again with --resume (torchrun --max_restarts does), and "
            f"its micro-batches of {batch_size} are taken in {pieces} pieces"
        ) from error
    run.state.pieces = pieces
    run.note("warning", f"{where}: micro-batches of {batch_size} are taken in {pieces} pieces from now on; the "
                        "effective batch stays")  # fmt: skip


def name_unused(run: Run) -> None:
    """Once: name the parameters that no gradient reaches. DDP would fail on them a step later, and give numbers."""
    if run.looked_for_unused or run.raw_model.skips_parameters:
        return
    run.looked_for_unused = True
    unused = [name for name, p in run.raw_model.named_parameters() if p.requires_grad and p.grad is None]
    if not unused:
        return
    named = ", ".join(unused[:5]) + (" …" if len(unused) > 5 else "")
    said = f"no gradient reaches {len(unused)} parameters ({named}): leave them out with --optimizer.freeze"
    if run.world.size > 1 and not finds_unused(run):
        raise UserError(said)
    run.note("hint", said)


def restore_statistics(run: Run, kept: list[Tensor], bad: Tensor) -> None:
    """Where `bad` (0-dim) is set, take back what a forward pass did to batch-norm statistics."""
    for buffer, before in zip(norm_statistics(run.raw_model), kept, strict=True):
        buffer.copy_(torch.where(bad > 0, before, buffer))


def add_gradients(run: Run, micro_batches: list[Batch], counts: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Forward and backward of every micro-batch: (names, values) of loss and scores, summed over them."""
    state, world = run.state, run.world
    sums: list[Tensor] = []
    for micro_step, batch in enumerate(micro_batches):
        seed_everything(run.config.seed, state.step, micro_step, world.rank)
        is_last = micro_step == len(micro_batches) - 1
        with nullcontext() if is_last or world.size == 1 else run.model.no_sync():  # type: ignore[operator]
            with run.precision.autocast():
                outputs = run.model(batch)
            losses = run.criterion(outputs, batch, counts)
            loss = torch.stack(list(losses.values())).sum()
            whole = loss * world.size  # DDP takes the mean over ranks; ours is a sum
            if world.size > 1:  # and waits for the gradient of every head, also of one that no term trains
                whole = whole + sum(0.0 * tensor.sum() for tensor in tensors_in(outputs))
            run.scaler.scale(whole).backward()
        scores = run.task.batch_scores(outputs, batch)
        names, values = step_values(run, losses, loss, scores, batch)
        sums.append(values)
    return names, torch.stack(sums).sum(0)


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
    train = run.config.train
    share = len(batch.samples) / (train.batch_size * train.grad_accum_steps * run.world.size)
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
        run.note("skipped", f"step {state.step}: loss or gradient is not finite; the step was skipped")
        scale = run.scaler.get_scale() if run.scaler.is_enabled() else math.inf
        is_over = state.bad_in_a_row >= run.config.train.max_bad_steps or scale < 1
        if is_over or not (run.scaler.is_enabled() or state.bad_in_a_row > 1):  # fp16 finds its scale by such steps
            keep_bad_step(run)
        if is_over:
            raise UserError(
                f"{state.bad_in_a_row} steps in a row had no finite gradient, so training was ended; weights are as "
                "they were before. Lower optimizer.lr, set train.max_grad_norm, or use bf16 instead of fp16"
            )
    else:
        state.bad_in_a_row = 0
        if norm > NORM_TO_WARN_OF and not state.warned_norm:
            state.warned_norm = True
            run.note(
                "warning",
                f"the gradient norm is {norm:.0f}: usual causes are a learning rate that is too high, no warm-up, "
                "masks in another range than 0..1, or very small batches; train.max_grad_norm clips it",
            )


def keep_bad_step(run: Run) -> None:
    """Write down what the bad step was made of, for `--replay`."""
    if run.last_step is None or run.last_step.is_anothers:
        return
    try:
        path = bad_steps.dump(run, model_meta(run), criterion_settings(run), phase_factors(run))
    except UserError as error:
        run.note("warning", f"the bad step could not be kept: {error}")
        return
    run.note("skipped", f"the step is kept in {path}: look into it with python train.py --replay {path}")


def criterion_settings(run: Run) -> dict[str, Any]:
    return loss_settings(run.config, run.task, run.train_loader.dataset.reader)


def report_step(run: Run) -> None:
    """The printed line: the one place where the host waits for the device."""
    if not run.callbacks:
        return
    state = run.state
    means, last, sums = run.meter.read()
    now, (then, step_then) = time.monotonic(), run.last_line
    speed = (state.step - step_then) / max(now - then, 1e-9)
    run.last_line = (now, state.step)
    times = run.clock.read(run.model)
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
        times=times,
    )
    shown = {name: f"{means[name]:.3f}" for name in ("loss", run.best_metric) if name in means}
    run.bar.set_postfix(shown, refresh=False)
    for callback in run.callbacks:
        callback.on_step(record)
    state.records += 1
    say_what_wastes(run, times)


def say_what_wastes(run: Run, times: dict[str, float]) -> None:
    """A hint, once, about what took too much of the time of two printed lines in a row."""
    hint = hint_about(times, run.world.device)
    name = hint[0] if hint else ""
    if hint and name == run.hint and name not in run.hinted:
        run.hinted.add(name)
        run.note("hint", hint[1])
    run.hint = name


# ---------------------------------------------------------------- validation, saving, resuming


def validate(run: Run) -> dict[str, float]:
    """Score the model (its average, where there is one), note the best, and tell the callbacks."""
    state = run.state
    scored = score(run)
    if scored is None:
        return {}
    metric, gallery = scored
    values = metric.compute()
    value, higher = values[run.best_metric], metric.higher_is_better[run.best_metric]
    is_best = is_better(value, state.best, higher)
    if is_best:
        state.best, state.best_step, state.waited = value, state.step, 0
    else:
        state.waited += 1
    state.validated_step, state.validation = state.step, values
    run.schedule.on_validation(value, higher)
    tell_validation(run, metric, values, gallery, is_best=is_best)
    return values


def measure_base(run: Run) -> dict[str, float]:
    """Before fine-tuning: the score of the model that it starts from, which every later one is compared with."""
    scored = score(run)
    if scored is None:
        return {}
    metric, gallery = scored
    run.state.base = metric.compute()
    tell_validation(run, metric, run.state.base, gallery, is_base=True)
    return run.state.base


def score_before_the_first_step(run: Run) -> dict[str, float]:
    """What `train.resume_start_with_eval` asks for: a validation that is only printed."""
    scored = score(run)
    if scored is None:
        return {}
    values = scored[0].compute()
    run.log.say("validation before the first step: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    return values


def score(run: Run) -> tuple[Any, Gallery] | None:
    """(metric of all validation samples, the masks worth looking at).

    None without validation data, and when a signal came in between: the save cannot wait, and a resume scores again.
    """
    if run.val_loader is None:
        return None
    metric = run.metric()
    gallery = Gallery(run.task.results, metric)
    try:
        evaluate(
            run.ema.module if run.ema else run.raw_model,
            run.val_loader,
            metric,
            world=run.world,
            precision=run.precision,
            tta=run.config.evaluation.scales,
            progress=show_progress(run),
            gallery=gallery,
            stops=lambda: bool(run.stop),
        )
    except Interrupted:
        run.stopping = True
        return None
    train_mode(run)
    return metric, gallery


def tell_validation(run: Run, metric: Any, values: dict[str, float], gallery: Gallery, **flags: bool) -> None:
    """Tell the callbacks of a validation, with the samples to look at."""
    state = run.state
    reader = run.val_loader.dataset.reader

    def panels(sample: Sample, image: Any, result: Any) -> dict[str, Any]:
        return run.task.panels(Scored(sample, image, result, run.class_names, values))

    best, worst = gallery.collect(run.world, reader, panels)
    record = ValidationRecord(
        epoch=state.epoch + (state.step > 0),
        step=state.step,
        metrics=values,
        per_dataset=metric.per_dataset(),
        rows=[vars(row) for row in metric.rows],
        primary=metric.primary,
        higher_is_better=metric.higher_is_better,
        base={} if flags.get("is_base") else state.base,
        best=best,
        worst=worst,
        panel_notes=run.task.panel_notes,
        per_class=metric.per_class(),
        figures=metric.figures() if run.callbacks else {},
        **flags,
    )
    for callback in run.callbacks:
        callback.on_validation(record)
    state.records += 1
    run.clock.restart()
    run.last_line = (time.monotonic(), state.step)  # the next line's speed is that of training alone


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
    return is_epoch_over(run) and (state.epoch + 1) % train.eval_each_epoch == 0


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
        "micro_steps_per_epoch": len(run.train_loader.batch_sampler),
    })  # fmt: skip
    publish(run)


def model_meta(run: Run) -> dict[str, Any]:
    """What a checkpoint says of itself, so that nothing else is needed to use it."""
    config = run.config
    return {
        "family": config.model.family,
        "settings": model_settings(config),
        "task": config.task,
        "size": list(config.data.size),
        "normalize": config.data.normalize,
        "resize": config.data.resize,
        "class_names": run.class_names,
        "file_ids": list(run.train_loader.dataset.reader.file_ids),
        "validation": run.state.validation,
        "experiment_name": config.experiment_name,
        "config": as_dict(config),
    }


def show_progress(run: Run) -> bool:
    return run.config.logging.progress and run.world.is_main_process and sys.stderr.isatty()


# ---------------------------------------------------------------- the other commands


@contextmanager
def rehearsal(config: Config) -> Iterator[tuple[Run, Callable[[], None]]]:
    """(a run, what takes its next step) for commands that only try some; the run folder goes with it."""
    world = join_world(config.device, config.distributed.timeout_minutes)
    log = Log(secret_values(config), config.logging.color, quiet=not world.is_main_process)
    with ExitStack() as at_the_end:
        at_the_end.callback(leave_world)
        folder = RunFolder(Path(at_the_end.enter_context(tempfile.TemporaryDirectory())))
        at_the_end.callback(log.close)
        untracked = replace(config, tracking=TrackingSettings())
        run = build_run(untracked, world, get_task(config.task), folder, log, resumed=False, callbacks=[])
        at_the_end.callback(run.stop.restore)
        steps = endless_steps(run)

        def take_step() -> None:
            micro_batches = next(steps)
            with run.clock.step():
                train_step(run, micro_batches)

        yield run, take_step


def endless_steps(run: Run) -> Iterator[list[Batch]]:
    """The steps of one epoch after the other."""
    while True:
        begin_epoch(run)
        yield from epoch_steps(run)
        run.state.epoch, run.state.micro_step = run.state.epoch + 1, 0


def launch(devices: int) -> None:
    """`--devices N`: become torchrun with the same command."""
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # by itself it would die of SIGUSR1
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", signals, f"--nproc_per_node={devices}"]
    os.execv(sys.executable, [*arguments, *sys.argv])


def command() -> None:
    """Read the command line and do what it says."""
    actions = ("print_config", "check_data", "preview", "dry_run", "find_lr", "profile", "version", "debug")
    names = {flag: flag[2:].replace("-", "_") for flag in sys.argv[1:] if flag.startswith("--")}
    named = set(names.values()) & set(actions)
    flags = [flag for flag in sys.argv[1:] if names.get(flag) not in actions]
    creates = any(name.partition("=")[0] == "create_config" for name in names.values())
    targets, flags = take_values(flags, "create_config")
    if "version" in named:
        return version()
    replayed, flags = take_values(flags, "replay")
    if "replay" in {name.partition("=")[0] for name in names.values()}:
        return bad_steps.replay_command(flags, replayed)
    ancestors, flags = take_values(flags, "from_ancestor")
    if "from_ancestor" in {name.partition("=")[0] for name in names.values()}:
        return from_ancestor.command(ancestors, flags)
    config = load_config(flags)
    if "print_config" in named:
        return print(to_yaml(config), end="")
    if creates:
        return create_config(config, Path(targets[0] if targets else "config.yml"))
    one_run = (series.members(config) or [config])[0]
    for word, act in (("check_data", check_data), ("preview", preview)):
        if word in named:
            return act(one_run)
    for word, trial in (("dry_run", dry_run), ("find_lr", find_lr), ("profile", profile)):
        if word in named:
            with rehearsal(one_run) as (run, take_step):
                return trial(run, take_step)
    if config.distributed.devices > 1 and "WORLD_SIZE" not in os.environ:
        launch(config.distributed.devices)
    for secret in secret_values(config):  # trackers note the command line
        sys.argv = [word.replace(secret, "***") for word in sys.argv]
    status, _ = train_all(config, [])
    if status.startswith("stopped by"):
        sys.exit(STOPPED)


if __name__ == "__main__":
    run_command(command)

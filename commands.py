"""What train.py does beside training: check and preview the data, write a configuration, try a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lr_finder
from build import build_readers, data_table, train_dataset
from checkpoint import write_text
from config import Config, secret_values, to_yaml
from errors import UserError
from run import Run
from samples import Batch, SampleKey
from tasks import get_task
from tracking import Log
from transforms import preview_sheet
from utils import World, environment, peak_memory

PROFILED_STEPS = 5


def check_data(config: Config) -> None:
    """`--check_data`: list every fault, or say what there is."""
    log = Log(secret_values(config))
    training, validation = build_readers(config, get_task(config.task), World.alone(), log)
    tables = [data_table({"training": training, "validation": validation}), get_task(config.task).data_table(training)]
    log.say("\n".join(["the data is in order:", *filter(None, tables)]))


def preview(config: Config) -> None:
    """`--preview`: augmented samples beside their masks, as one picture."""
    log, task = Log(secret_values(config)), get_task(config.task)
    training, _ = build_readers(config, task, World.alone(), log)
    dataset = train_dataset(training, task, config)
    size = (config.data.size[1], config.data.size[0])
    # Four looks at each of the first samples, as four epochs would see them.
    keys = [SampleKey(epoch, index, 0, size) for index in range(min(6, len(training))) for epoch in range(4)]
    write_picture(output_path(config, "preview.png"), preview_sheet([dataset.prepared(key) for key in keys]), log)


def version() -> None:
    """`--version`: what this runs on, to paste into a report."""
    print("\n".join(f"{name}: {value}" for name, value in environment().items()))


def create_config(config: Config, path: Path) -> None:
    """`--create_config`: a documented file to edit."""
    if path.exists():
        raise UserError(f"{path} exists already; name another file with --create_config FILE")
    write_text(path, to_yaml(config, documented=True))
    print(f"wrote {path}; use it with --config {path}")


def output_path(config: Config, name: str) -> Path:
    """Where a command puts what it writes: beside the run folder, under the run's name."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (f"{config.experiment_name}_{name}" if config.experiment_name else name)


def write_picture(path: Path, picture: Any, log: Log) -> None:
    """Save (H, W, 3) uint8 RGB and say so."""
    from PIL import Image

    Image.fromarray(picture).save(path)
    log.say(f"wrote {path}")


# ---------------------------------------------------------------- commands that try some steps


TakeStep = Callable[[], None]


def dry_run(run: Run, take_step: TakeStep) -> None:
    """`--dry_run`: the configuration, what the model is made of, and what one step takes."""
    run.log.say(to_yaml(run.config))
    run.log.say(model_summary(run))
    began = time.perf_counter()
    take_step()
    means, _, _ = run.meter.read()  # waits for the device
    took = time.perf_counter() - began
    run.log.say(", ".join(f"{name} {value:.4f}" for name, value in means.items()))
    train = run.config.train
    shape = f"{train.grad_accum_steps} x {train.batch_size} samples of {'x'.join(map(str, run.config.data.size))}"
    run.log.say(f"one step of {shape}: {took:.2f} s, {peak_memory(run.world)}")


def model_summary(run: Run) -> str:
    """A line for each part of the model with its parameters, and the operations of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    def line(name: str, module: nn.Module) -> str:
        counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
        total, trains = sum(count for count, _ in counts), sum(count for count, does in counts if does)
        return f"  {name:<24} {type(module).__name__:<24} {total:>13,} parameters, {trains:>13,} train"

    model, (width, height) = run.raw_model, run.config.data.size
    mode = model.training
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:  # which also marks views of parameters as needing no gradient
        model.eval().predict(Batch.from_images(torch.zeros(1, 3, height, width, device=run.world.device)))
    model.train(mode)
    lines = [line(name, part) for name, part in model.named_children()]
    flops = (
        f"{counter.get_total_flops() / 2e9:.1f} G multiply-additions in a forward pass of 1 x 3 x {height} x {width}"
    )
    return "\n".join(["the model:", *lines, line("all", model), f"  {flops}"])


def find_lr(run: Run, take_step: TakeStep) -> None:
    """`--find_lr`: the loss over rising learning rates as a picture, and the rate at which it falls fastest."""
    sweep = lr_finder.RisingRate(run.optimizer)
    run.schedule = sweep  # type: ignore[assignment]
    losses: list[float] = []
    for _ in range(sweep.steps):
        take_step()
        losses.append(run.meter.read()[1]["loss"])
        if lr_finder.has_exploded(losses):
            break
    if not run.world.is_main_process:
        return
    rates = [sweep.rate(step) for step in range(len(losses))]
    suggestion = lr_finder.suggest(rates, losses)
    write_picture(output_path(run.config, "lr.png"), lr_finder.draw(rates, losses, suggestion), run.log)
    if suggestion is None:
        run.log.say("the loss does not fall at any rate: look at the data with --preview")
    else:
        run.log.say(
            f"the loss falls fastest at a rate of {suggestion:.1e}: try --optimizer.lr {suggestion:.1e} with a "
            f"warm-up (set now: {run.config.optimizer.lr:.1e}), and less where weights are fine-tuned"
        )


def profile(run: Run, take_step: TakeStep) -> None:
    """`--profile`: a trace of some steps for chrome://tracing or Perfetto, and the operators that take longest."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if run.world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    take_step()  # what happens once only
    take_step()
    run.clock.restart()
    with torch.profiler.profile(activities=activities, profile_memory=True) as recording:
        for _ in range(PROFILED_STEPS):
            take_step()
        run.meter.read()  # waits for the device
        shares = run.clock.read(run.model)
    if not run.world.is_main_process:
        return
    trace = output_path(run.config, "trace.json.gz")
    recording.export_chrome_trace(str(trace))
    order = "self_cuda_time_total" if run.world.device.type == "cuda" else "self_cpu_time_total"
    table = recording.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    operators = output_path(run.config, "operators.txt")
    write_text(operators, table)
    run.log.say(table)
    run.log.say("of the time: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    run.log.say(f"wrote {trace} (open it at https://ui.perfetto.dev) and {operators}")

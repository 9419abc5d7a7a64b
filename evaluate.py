"""Score checkpoints on test sets: `python evaluate.py --checkpoint runs/my_run --data.test path/to/test`.

`evaluate()` is what train.py validates with, too.
"""

from __future__ import annotations

import copy
import os
import sys

from config import answer_at_once
from errors import UserError, run_command

ACTIONS = {
    "checkpoint A B": "run folders, checkpoints or official weights files to score",
    "debug": "show the traceback of a user error",
    "help": "this page",
}

if __name__ == "__main__":
    answer_at_once("evaluate.py --checkpoint RUN [RUN ...] [--data.test SETS] [settings]", ACTIONS)

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from build import build_eval_loader, check_size
from checkpoint import load_model
from config import Config, take_values
from config import load as load_config
from gallery import Gallery
from predict import predict
from readers import Fault, Reader, check, drop, fail_on, limit
from samples import Batch
from tasks import Task, get_task
from utils import Precision, World, choose_precision, join_world, leave_world


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    metric: Any,
    *,
    world: World,
    precision: Precision,
    tta: Sequence[float] = (),
    progress: bool = True,
    gallery: Gallery | None = None,
) -> Any:
    """Score `model` on a loader whose sampler deals whole batches to the ranks; every sample counts once.

    The metric's rows are those of all ranks afterwards; a `gallery` keeps the masks worth looking at. `tta` are the
    scales that predictions are averaged over. The model is left in evaluation mode.
    """
    model.eval()
    bar = tqdm(loader, desc="validation", leave=False, disable=not progress or not world.is_main_process)
    total = 0.0
    for batch in bar:
        batch = batch.to(world.device)
        with precision.autocast():
            predictions = predict(model, batch, tta)
        metric.update(predictions, batch)
        rows = metric.rows[-len(batch.samples) :]
        if gallery:
            gallery.update(rows, predictions, batch)
        total += sum(row.scores[metric.primary] for row in rows)
        bar.set_postfix({metric.primary: f"{total / len(metric.rows):.3f}"}, refresh=False)
    metric.reduce()
    return metric


# ---------------------------------------------------------------- one checkpoint


@dataclass
class Score:
    """What one checkpoint reached on one test set."""

    checkpoint: str
    test_set: str
    samples: int
    values: dict[str, float]


def score_checkpoint(path: Path, flags: list[str], world: World, faults: FaultsOf | None = None) -> list[Score]:
    """A score for each test set, and one over all samples where there are several.

    The settings are the run's own, changed by `flags`; official weights have none, so theirs are those of the flags
    (with presets and config_vars.yml). Data that `faults` knows is not checked again.
    """
    model, meta = load_model(path)
    config = settings_for(meta, path, flags)
    progress = config.logging.progress and sys.stderr.isatty()
    task = get_task(meta["task"])
    check_size(config, model.stride)
    reader = read_test_sets(config, meta, task, {} if faults is None else faults, progress)
    loader = build_eval_loader(reader, task, config, world)
    metric = evaluate(
        model.to(world.device),
        loader,
        task.metric(),
        world=world,
        precision=choose_precision(config.train.mixed_precision, world.device),
        tta=config.evaluation.scales,
        progress=progress,
    )
    counts = Counter(row.dataset for row in metric.rows)
    scores = [Score(str(path), name, counts[name], values) for name, values in metric.per_dataset().items()]
    return scores if len(scores) == 1 else [*scores, Score(str(path), "all", counts.total(), metric.compute())]


def settings_for(meta: dict[str, Any], path: Path, flags: list[str]) -> Config:
    """The settings to score a checkpoint with. What bounded the run's own validation does not bound a test."""
    is_run = "config" in meta
    if is_run:
        saved = copy.deepcopy(meta["config"])
        saved["train"]["batch_size"] = saved["evaluation"]["batch_size"] or saved["train"]["batch_size"]
        saved["evaluation"]["batch_size"] = saved["train"]["test_limit"] = 0
        config = load_config(flags, saved=saved)
    else:
        config = load_config(flags)
    if not (config.data.test or config.data.val or (is_run and config.is_demo)):
        raise UserError(
            f"nothing to score {path} on: name a test set with --data.test path/to/set (a folder with im/ and gt/)"
        )
    return config


FaultsOf = dict[tuple[str, str], list[Fault]]  # by (root, test sets)


def read_test_sets(config: Config, meta: dict[str, Any], task: Task, faults: FaultsOf, progress: bool) -> Reader:
    """The samples to score on, every one decoded once to be sure of it: `data.test`, else what the run validated on."""
    root, spec = config.data.root, config.data.test or config.data.val
    if config.is_demo:
        root, spec = task.demo_root(), "val"
    reader = task.reader(spec, root=root or None, class_names=meta.get("class_names"))
    if (root, spec) not in faults:
        faults[root, spec] = check(reader, workers=os.cpu_count() or 1, progress=progress)
    if config.data.on_error == "skip":
        reader, _ = drop(reader, faults[root, spec])
    else:
        fail_on(faults[root, spec])
    return limit(reader, config.train.test_limit or None)


# ---------------------------------------------------------------- the command


def table(scores: list[Score]) -> str:
    """Aligned columns: a row per checkpoint and test set, a column per metric."""
    metrics = list(dict.fromkeys(name for score in scores for name in score.values))
    rows = [["checkpoint", "test set", "samples", *metrics]]
    for score in scores:
        values = [f"{score.values[name]:.4f}" if name in score.values else "-" for name in metrics]
        rows.append([score.checkpoint, score.test_set, str(score.samples), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
               for row in rows]  # fmt: skip
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def command() -> None:
    """Score every checkpoint and print one table."""
    paths, flags = take_values([word for word in sys.argv[1:] if word != "--debug"], "checkpoint")
    if not paths:
        raise UserError("name at least one checkpoint: --checkpoint runs/my_run")
    config = load_config(flags)
    world = join_world(config.device, config.distributed.timeout_minutes)
    faults: FaultsOf = {}
    try:
        scores = [score for path in paths for score in score_checkpoint(Path(path), flags, world, faults)]
        if world.is_main_process:
            print(table(scores))
    finally:
        leave_world()


if __name__ == "__main__":
    run_command(command)

"""Score checkpoints on test sets: `python evaluate.py --checkpoint runs/my_run --data.test path/to/test`.

`evaluate()` is what train.py validates with, too.
"""

from __future__ import annotations

import sys

from config import answer_at_once
from errors import UserError, run_command

ACTIONS = {"checkpoint A B": "run folders or checkpoint files to score", "help": "this page"}

if __name__ == "__main__":
    answer_at_once("evaluate.py --checkpoint RUN [RUN ...] [--data.test SETS] [settings]", ACTIONS)

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from build import build_eval_loader
from checkpoint import load_model
from config import Config, apply_flags, from_dict, take_values
from dataset import Batch, check, fail_on
from tasks import get_task
from utils import Precision, World, choose_precision, join_world, leave_world


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    metric: Any,
    *,
    world: World,
    precision: Precision,
    tta: bool = False,
    progress: bool = True,
) -> Any:
    """Score `model` on a loader whose sampler deals whole batches to the ranks; every sample counts once.

    The metric's rows are those of all ranks afterwards. The model is left in evaluation mode.
    """
    model.eval()
    for batch in tqdm(loader, desc="validation", leave=False, disable=not progress or not world.is_main_process):
        batch = batch.to(world.device)
        with precision.autocast():
            predictions = predict(model, batch, tta)
        metric.update(predictions, batch)
    metric.reduce()
    return metric


def predict(model: Any, batch: Batch, tta: bool = False) -> dict[str, torch.Tensor]:
    """`model.predict`, with `tta` averaged in probability with that of the mirrored image."""
    predictions = model.predict(batch)
    if not tta:
        return predictions
    mirrored = model.predict(Batch(batch.images.flip(-1), None, batch.samples))["logits"].flip(-1)
    mean = (predictions["logits"].float().sigmoid() + mirrored.float().sigmoid()) / 2
    return {**predictions, "logits": torch.logit(mean, eps=1e-7)}


def score_checkpoint(path: Path, flags: list[str], world: World) -> dict[str, dict[str, float]]:
    """{test set: {metric: mean}} of one checkpoint; the settings are the run's own, changed by `flags`."""
    model, meta = load_model(path)
    config = apply_flags(from_dict(meta.get("config", {}), str(path)), flags)
    task = get_task(meta["task"])
    spec = config.data.test or config.data.val
    if not spec:
        raise UserError("nothing to score on: name a test set with --data.test path/to/set (a folder with im/ and gt/)")
    reader = task.reader(spec, root=config.data.root or None, class_names=meta.get("class_names"))
    workers = max(0, config.data.num_workers)
    fail_on(check(reader, workers=2, progress=config.logging.progress))
    loader = build_eval_loader(
        reader,
        task,
        batch_size=config.evaluation.batch_size or config.train.batch_size,
        size=meta.get("size") or config.data.size,
        world=world,
        workers=workers,
    )
    metric = evaluate(
        model.to(world.device),
        loader,
        task.metric(),
        world=world,
        precision=choose_precision(config.train.mixed_precision, world.device),
        tta=config.evaluation.tta,
        progress=config.logging.progress,
    )
    per_dataset = metric.per_dataset()
    return per_dataset if len(per_dataset) == 1 else {**per_dataset, "all": metric.compute()}


def command() -> None:
    """One line per checkpoint and test set."""
    paths, flags = take_values(sys.argv[1:], "checkpoint")
    if not paths:
        raise UserError("name at least one checkpoint: --checkpoint runs/my_run")
    world = join_world(apply_flags(Config(), flags).device)
    for path in paths:
        for name, scores in score_checkpoint(Path(path), flags, world).items():
            if world.is_main_process:
                values = "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
                print(f"{path}  {name}  {values}")
    leave_world()


if __name__ == "__main__":
    run_command(command)

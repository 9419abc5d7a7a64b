"""Score checkpoints on test sets, or finished masks, and compare two of either.

    python evaluate.py --checkpoint runs/A runs/B --data.test X+Y --output scores.csv scores.tex
    python evaluate.py --checkpoint runs/A --best_by Sm --data.test X        # which epoch is best
    python evaluate.py --predictions out/masks --ground_truth X              # masks of any program
    python evaluate.py --predictions results.json --ground_truth val.json    # COCO results of any program
    python evaluate.py --predictions out/masks --ground_truth DAVIS          # label maps of clips of any program
    python evaluate.py --compare runs/A runs/B --data.test X                 # is B better, or luckier?

`evaluate()` is what train.py validates with, too.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys

from config import answer_at_once, split_options
from errors import UserError, run_command
from settings import Config, EvaluateSettings

ACTIONS = {"debug": "show the traceback of a user error", "help": "this page"}

if __name__ == "__main__":
    usage = "evaluate.py --checkpoint RUN [RUN ...] [--data.test SETS] [options] [settings]"
    answer_at_once(usage, ACTIONS, EvaluateSettings, Config)

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from build import build_eval_loader, build_metric, check_size, find_faults
from checkpoint import RunFolder, load_model
from clip_results import FinishedClips, SavedMasks
from coco_results import CocoResults
from compare import comparison_tables
from config import load as load_config
from gallery import Gallery
from metrics import InstanceMetric
from predict import predict
from readers import Fault, FinishedMasks, Reader, drop, fail_on, limit
from readers.clip_folders import frames_folder
from results import Result, best_of, sample_table, score_table
from samples import Batch
from tables import Table, check_output, to_console, write_tables
from tasks import Task, get_task
from utils import Precision, World, choose_precision, join_world, leave_world
from writers import JsonList


class Interrupted(Exception):
    """An evaluation that was asked to stop before its end."""


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
    listen: Callable[[dict[str, Any], Batch], None] | None = None,
    stops: Callable[[], bool] | None = None,
) -> Any:
    """Score `model` on a loader whose sampler deals whole batches to the ranks; every sample counts once.

    The metric's rows are those of all ranks afterwards; a `gallery` keeps the results worth looking at, and `listen`
    hears of all of this rank. `tta` are the scales that predictions are averaged over. The model is left in evaluation
    mode. Raises `Interrupted` on all ranks when `stops`, asked after every batch, said so on one of them.
    """
    model.eval()
    bar = tqdm(loader, desc="validation", leave=False, disable=not progress or not world.is_main_process)
    total, stopped = 0.0, False
    for batch in bar:
        batch = batch.to(world.device)
        with precision.autocast():
            predictions = predict(model, batch, tta)
        metric.update(predictions, batch)
        rows = metric.rows[-len(batch.samples) :]
        if gallery:
            gallery.update(rows, predictions, batch)
        if listen:
            listen(predictions, batch)
        total += sum(row.scores[metric.primary] for row in rows)
        bar.set_postfix({metric.primary: f"{total / len(metric.rows):.3f}"}, refresh=False)
        if stops and stops():
            stopped = True
            break
    if stops and any(world.gather(stopped)):
        bar.close()
        raise Interrupted
    metric.reduce()
    return metric


# ---------------------------------------------------------------- one checkpoint


def score_checkpoint(
    path: Path, flags: list[str], options: EvaluateSettings, world: World, faults: FaultsOf | None = None
) -> Result:
    """Score a checkpoint by what is chosen, else by what its task is tested with.

    The settings are the run's own, changed by `flags`; official weights have none, so theirs are those of the flags
    (with presets and config_vars.yml). Data that `faults` knows is not checked again.
    """
    model, meta = load_model(path)
    config = settings_for(meta, path, flags)
    progress = config.logging.progress and sys.stderr.isatty()
    task = get_task(meta["task"])
    check_size(config, model.stride)
    reader = read_test_sets(config, meta, task, world, {} if faults is None else faults)
    objects = FoundObjects(task, reader, config.evaluation.max_detections) if options.output_results else None
    masks = saved_masks(task, reader, options.output_masks) if options.output_masks else None
    metric = evaluate(
        model.to(world.device),
        build_eval_loader(reader, task, config, world),
        build_metric(config, task, reader.class_names, metric_names(task, config, options)),
        world=world,
        precision=choose_precision(config.train.mixed_precision, world.device),
        tta=config.evaluation.scales,
        progress=progress,
        listen=objects or masks,
    )
    if objects:
        objects.write(options.output_results, world)
    return Result(str(path), metric, meta.get("config"))


class FoundObjects:
    """What was found in the samples of a test set, as COCO results with the ids that its own files have."""

    def __init__(self, task: Task, reader: Reader, top_k: int):
        """Raises `UserError` for a task that finds no objects."""
        if not task.objects:
            raise UserError(f"--output_results lists objects, and the task {task.name} finds none; leave it out")
        self.results, self.records = partial(task.results, top_k=top_k), task.objects.records
        self.file_ids = reader.file_ids
        self.image_ids = {reader.sample_id(index): reader.image_id(index) for index in range(len(reader))}
        self.lists: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, predictions: dict[str, Any], batch: Batch) -> None:
        classes = len(self.file_ids)
        for found, sample in zip(
            self.results(predictions, batch.samples, num_classes=classes), batch.samples, strict=True
        ):
            for kind, records in self.records(found, self.image_ids[sample.sample_id], self.file_ids).items():
                self.lists.setdefault(kind, []).extend(records)

    def write(self, prefix: str, world: World) -> None:
        """`<prefix>_bbox.json` and, with masks, `<prefix>_segm.json`, from all ranks."""
        gathered = world.gather(self.lists)
        for kind in self.lists if world.is_main_process else ():
            with JsonList(Path(f"{prefix}_{kind}.json")) as file:
                for lists in gathered:
                    file.extend(lists.get(kind, []))


def saved_masks(task: Task, reader: Reader, folder: str) -> SavedMasks:
    """Raises `UserError` for a task that has no clips."""
    if not task.has_clips:
        raise UserError(f"--output_masks writes masks of clips; for the task {task.name}, inference.py writes masks")
    return SavedMasks(folder, reader)


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
            f"nothing to score {path} on: name a test set with --data.test path/to/set ({get_task(config.task).layout})"
        )
    return config


FaultsOf = dict[tuple[str, str], list[Fault]]  # by (root, test sets)


def read_test_sets(config: Config, meta: dict[str, Any], task: Task, world: World, faults: FaultsOf) -> Reader:
    """The samples to score on, every one decoded once to be sure of it: `data.test`, else what the run validated on."""
    root, spec = config.data.root, config.data.test or config.data.val
    if config.is_demo:
        root, spec = task.demo_root(), task.demo_specs[1]
    reader = task.reader(spec, root=root or None, class_names=meta.get("class_names"), images=config.data.images)
    if (root, spec) not in faults:
        faults[root, spec] = find_faults([reader], world, config.logging.progress and sys.stderr.isatty())[0]
    reader = without_faults(reader, faults[root, spec], config)
    return limit(reader, config.train.test_limit or None)


def without_faults(reader: Reader, faults: list[Fault], config: Config) -> Reader:
    """The reader without its faulty samples where the settings say so, else a `UserError` that lists them all."""
    if config.data.on_error == "skip":
        return drop(reader, faults)[0]
    fail_on(faults)
    return reader


# ---------------------------------------------------------------- finished masks


def score_masks(path: str, options: EvaluateSettings, config: Config, world: World) -> Result:
    """Score the masks below a folder against those of `--ground_truth`; each rank takes its share of them."""
    masks = FinishedMasks(path, options.ground_truth, resize=options.resize_predictions)
    progress = config.logging.progress and sys.stderr.isatty()
    reader = without_faults(masks, find_faults([masks], world, progress)[0], config)
    task = get_task(config.task)
    metric = build_metric(config, task, [], metric_names(task, config, options))
    indices = range(world.rank, len(reader), world.size)
    for index in tqdm(indices, desc=path, unit="mask", leave=False, disable=not (progress and world.is_main_process)):
        sample = reader.read(index)
        metric.update_masks(
            sample.frames[0], sample.masks, dataset=sample.dataset, sample_id=sample.sample_id, path=sample.path
        )
    metric.reduce()
    return Result(path, metric, notes=unscored(path, masks.extra, "masks"))


def score_clips(path: str, options: EvaluateSettings, config: Config, world: World) -> Result:
    """Score label maps of clips against those of `--ground_truth`; each rank takes its share of the clips."""
    task = get_task("video")
    clips = FinishedClips(path, task.reader(options.ground_truth), resize=options.resize_predictions)
    progress = config.logging.progress and sys.stderr.isatty()
    reader = without_faults(clips, find_faults([clips], world, progress)[0], config)
    metric = build_metric(config, task, [], metric_names(task, config, options))
    indices = range(world.rank, len(reader), world.size)
    for index in tqdm(indices, desc=path, unit="clip", leave=False, disable=not (progress and world.is_main_process)):
        clip = reader.read(index)
        metric.update_labels(
            clip.frames.__getitem__, clip.masks, dataset=clip.dataset, sample_id=clip.sample_id, path=clip.path
        )
    metric.reduce()
    return Result(path, metric, notes=unscored(path, clips.extra, "clips"))


def has_clips(ground_truth: Path) -> bool:
    """Whether that is a data set of clips, or the list of some of them."""
    return ground_truth.suffix == ".txt" or frames_folder(ground_truth) is not None


def unscored(path: str, extra: Sequence[str], what: str) -> list[str]:
    """A sentence on what has no ground truth, if there is any."""
    if not extra:
        return []
    return [f"{path}: {len(extra)} {what} have no ground truth and are not scored ({Path(extra[0]).name} ...)"]


def score_results(path: str, options: EvaluateSettings, config: Config, world: World) -> Result:
    """Score COCO results against the annotations of `--ground_truth`; each rank takes its share of the images."""
    results = CocoResults(Path(path), Path(options.ground_truth))
    fail_on(results.faults, "mend them")
    metric = InstanceMetric(
        metric_names(get_task("instance"), config, options),
        class_names=results.class_names,
        masks=results.has_masks,
        max_detections=config.evaluation.max_detections,
    )
    results.score(metric, range(world.rank, len(results), world.size))
    metric.reduce()
    return Result(path, metric)


# ---------------------------------------------------------------- the command


def check_options(options: EvaluateSettings) -> None:
    """Raise `UserError` for options that make no sense together, and for files that cannot be written."""
    if not (options.checkpoint or options.predictions or options.compare):
        raise UserError("name at least one checkpoint, --checkpoint runs/my_run, or folders of masks, --predictions")
    if sum(map(bool, (options.checkpoint, options.predictions, options.compare))) > 1:
        raise UserError("--checkpoint, --predictions and --compare each say what is scored: name one of them")
    if options.predictions and not options.ground_truth:
        raise UserError(
            "--predictions are scored against --ground_truth: name a folder of masks or a data set with gt/"
        )
    if options.checkpoint and options.ground_truth:
        raise UserError("--ground_truth belongs to --predictions; name the test sets of checkpoints with --data.test")
    if options.compare and len(options.compare) != 2:
        raise UserError(f"--compare takes two checkpoints or two folders of masks, not {len(options.compare)}")
    if options.output_masks and (len(options.checkpoint) != 1 or options.best_by):
        raise UserError("--output_masks takes the masks of one checkpoint")
    if options.compare and options.best_by:
        raise UserError("--best_by chooses among the rows of a table: leave it out of --compare")
    for path in options.output:
        check_output(path)
    if options.output_samples:
        check_output(options.output_samples, (".csv",))


def metric_names(task: Task, config: Config, options: EvaluateSettings) -> list[str]:
    """What to measure beside the task's own scores: what is chosen, else those of its field."""
    return [*(config.evaluation.metrics or task.test_metrics), *([options.best_by] if options.best_by else [])]


def shown_scores(metric: Any, config: Config) -> list[str]:
    """The columns of the table: what is chosen, else everything that is measured."""
    chosen = config.evaluation.metrics
    return metric.resolve(chosen) if chosen else list(metric.higher_is_better)


def epoch_files(path: str) -> list[str]:
    """The epoch files of a run folder; anything else stands for itself."""
    if not Path(path).is_dir():
        return [path]
    files = [str(Path(path) / file.name) for _, file in RunFolder(Path(path).resolve()).epochs()]
    if not files:
        raise UserError(f"{path} holds no epoch files to choose from; train with --checkpoint.save_last N to keep them")
    return files


def score_all(options: EvaluateSettings, flags: list[str], world: World) -> list[Result]:
    """A result for each checkpoint or folder of masks."""
    if options.ground_truth:
        config = load_config(flags)
        paths = options.predictions or options.compare
        is_video = config.task == "video" or has_clips(Path(options.ground_truth))
        score = score_clips if is_video else score_masks
        return [(score_results if path.endswith(".json") else score)(path, options, config, world) for path in paths]
    paths = options.checkpoint or options.compare
    if options.best_by:
        paths = [file for path in paths for file in epoch_files(path)]
    faults: FaultsOf = {}
    return [score_checkpoint(Path(path), flags, options, world, faults) for path in paths]


def tables_of(results: list[Result], options: EvaluateSettings, shown: Sequence[str]) -> list[Table]:
    """What is printed and written: the scores, or the comparison."""
    if options.compare:
        a, b = results
        return comparison_tables(a, b, shown)
    if not options.best_by:
        return [score_table(results, shown)]
    name = results[0].metric.resolve([options.best_by])[0]
    best = best_of(results, name)
    table = score_table(results, shown, best)
    table.notes.append(f"best by {options.best_by}: {best.path} ({best.score(name):.4f})")
    return [table]


def command() -> None:
    """Score everything, print the table and write what is asked for."""
    options, flags = split_options(EvaluateSettings, [word for word in sys.argv[1:] if word != "--debug"])
    check_options(options)
    config = load_config(flags)
    device = "cpu" if options.ground_truth else config.device
    world = join_world(device, config.distributed.timeout_minutes)
    try:
        results = score_all(options, flags, world)
    finally:
        leave_world()
    if not world.is_main_process:
        return
    shown = shown_scores(results[0].metric, config)
    tables = tables_of(results, options, shown)
    is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns
    print("\n\n".join(to_console(table, width=width, bold=is_colored) for table in tables))
    for path in options.output:
        write_tables(path, tables)
    if options.output_samples:
        write_tables(options.output_samples, [sample_table(results, shown)])


if __name__ == "__main__":
    run_command(command)

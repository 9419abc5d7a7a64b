"""Several runs of one configuration, over seeds or folds, and the mean and standard deviation of what they reach."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from checkpoint import read_json
from config import Config
from errors import UserError
from tables import Cell, Column, Table, decimals, number, to_console, write_tables
from tracking import Log, read_records
from utils import is_better

DEFAULT_FOLDS = 5


def members(config: Config) -> list[Config]:
    """A configuration for each of `seeds` and each fold of `data.fold: all`, under names of their own.

    Empty where a configuration means one run. A member that was finished or begun goes on when the series is resumed.
    """
    seeds = config.seeds or [config.seed]
    whole, _, count = config.data.fold.partition("/")
    folds = [f"{k}/{count or DEFAULT_FOLDS}" for k in range(int(count or DEFAULT_FOLDS))] if whole == "all" else []
    if not (config.seeds or folds):
        return []
    if not config.experiment_name:
        raise UserError("several runs need a name to share: give --experiment_name")
    return [_member(config, seed, fold) for seed in seeds for fold in folds or [""]]


def _member(config: Config, seed: int, fold: str) -> Config:
    member = copy.deepcopy(config)
    member.seeds, member.seed = [], seed
    if config.seeds:
        member.experiment_name += f"_seed{seed}"
    if fold:
        member.data.fold = fold
        member.experiment_name += f"_fold{fold.partition('/')[0]}"
    if config.resume == "true":
        member.resume = "auto"  # those that the series had not come to yet begin now
    return member


def conclude(config: Config, runs: list[Config], log: Log) -> dict[str, float]:
    """Say and write what the runs reached: (mean of each metric over their best validations)."""
    table, means = summary([Path(run.output_dir) / run.experiment_name for run in runs])
    log.say(to_console(table, width=shutil.get_terminal_size((120, 24)).columns))
    for suffix in ("csv", "md"):
        path = Path(config.output_dir) / f"{config.experiment_name}_series.{suffix}"
        write_tables(str(path), [table])
        log.say(f"wrote {path}")
    return means


def summary(folders: list[Path]) -> tuple[Table, dict[str, float]]:
    """(a row for each run's best validation, then their mean and sample standard deviation; the means)."""
    best = {folder.name: best_validation(folder) for folder in folders}
    rows = [row for row in best.values() if row]
    names = [name for name in rows[0] if name.startswith("val/")] if rows else []
    columns = {name: [float(row[name]) if row.get(name) is not None else math.nan for row in rows] for name in names}
    table = Table(f"best validations of {len(rows)} runs", [Column("run"), Column("epoch"), *map(Column, names)])
    digits = {name: decimals(values) for name, values in columns.items()}
    for folder, row in best.items():
        epoch = Cell(row["epoch"]) if row else Cell("-")
        values = [float(row[name]) if row and row.get(name) is not None else math.nan for name in names]
        shown = [Cell(value, number(value, digits[name])) for name, value in zip(names, values, strict=True)]
        table.rows.append([Cell(folder), epoch, *shown])
    means = {name: fmean(values) for name, values in columns.items()}
    deviations = {name: stdev(values) if len(values) > 1 else math.nan for name, values in columns.items()}
    for title, found in (("mean", means), ("standard deviation", deviations)):
        shown = [Cell(found[name], number(found[name], digits[name])) for name in names]
        table.rows.append([Cell(title), Cell("-"), *shown])
    return table, {name.removeprefix("val/"): value for name, value in means.items()}


def best_validation(folder: Path) -> dict[str, Any]:
    """The record of the validation that chose a run's best.pth; {} where there is none yet."""
    told = read_json(folder / "run.json")
    path = folder / "metrics.jsonl"
    name = f"val/{told.get('metric')}"
    best: dict[str, Any] = {}
    for row in read_records(path) if path.exists() else []:
        if row["kind"] == "val" and row.get(name) is not None:
            better = told["higher_is_better"][told["metric"]]
            if is_better(row[name], best.get(name), better):
                best = row
    return best

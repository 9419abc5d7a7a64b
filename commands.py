"""What train.py does beside training: check the data, preview it, write a configuration."""

from __future__ import annotations

from pathlib import Path

from build import build_augment, build_readers, data_table
from checkpoint import write_text
from config import Config, secret_values, to_yaml
from dataset import Dataset
from errors import UserError
from samples import SampleKey
from tasks import get_task
from tracking import Log
from transforms import preview_sheet
from utils import World, environment


def check_data(config: Config) -> None:
    """`--check_data`: list every fault, or say what there is."""
    log = Log(secret_values(config))
    training, validation = build_readers(config, get_task(config.task), World.alone(), log)
    log.say("the data is in order:\n" + data_table({"training": training, "validation": validation}))


def preview(config: Config) -> None:
    """`--preview`: augmented samples beside their masks, as one picture."""
    from PIL import Image

    log, task = Log(secret_values(config)), get_task(config.task)
    training, _ = build_readers(config, task, World.alone(), log)
    dataset = Dataset(training, make_target=task.make_target, augment=build_augment(config, task), seed=config.seed)
    size = (config.data.size[1], config.data.size[0])
    # Four looks at each of the first samples, as four epochs would see them.
    keys = [SampleKey(epoch, index, 0, size) for index in range(min(6, len(training))) for epoch in range(4)]
    path = Path(config.output_dir) / f"{config.experiment_name or 'preview'}_preview.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(preview_sheet([dataset.prepared(key) for key in keys])).save(path)
    log.say(f"wrote {path}")


def version() -> None:
    """`--version`: what this runs on, to paste into a report."""
    print("\n".join(f"{name}: {value}" for name, value in environment().items()))


def create_config(config: Config, path: Path) -> None:
    """`--create_config`: a documented file to edit."""
    if path.exists():
        raise UserError(f"{path} exists already; name another file with --create_config FILE")
    write_text(path, to_yaml(config, documented=True))
    print(f"wrote {path}; use it with --config {path}")

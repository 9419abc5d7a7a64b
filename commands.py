"""What train.py does beside training: check the data, preview it, try one step, write a configuration."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from build import build_augment, build_criterion, build_loaders, build_model, build_readers, data_table
from checkpoint import write_text
from config import Config, secret_values, to_yaml
from dataset import Dataset
from errors import UserError
from samples import SampleKey
from tasks import get_task
from tracking import Log
from transforms import preview_sheet
from utils import choose_precision, join_world


def check_data(config: Config) -> None:
    """`--check_data`: list every fault, or say what there is."""
    log = Log(secret_values(config))
    training, validation = build_readers(config, get_task(config.task), log)
    log.say("the data is in order:\n" + data_table({"training": training, "validation": validation}))


def preview(config: Config) -> None:
    """`--preview`: augmented samples beside their masks, as one picture."""
    from PIL import Image

    log, task = Log(secret_values(config)), get_task(config.task)
    training, _ = build_readers(config, task, log)
    dataset = Dataset(training, make_target=task.make_target, augment=build_augment(config, task), seed=config.seed)
    size = (config.data.size[1], config.data.size[0])
    # Four looks at each of the first samples, as four epochs would see them.
    keys = [SampleKey(epoch, index, 0, size) for index in range(min(6, len(training))) for epoch in range(4)]
    path = Path(config.output_dir) / f"{config.experiment_name or 'preview'}_preview.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(preview_sheet([dataset.prepared(key) for key in keys])).save(path)
    log.say(f"wrote {path}")


def dry_run(config: Config) -> None:
    """`--dry_run`: build everything and run one forward and backward pass, without a run folder."""
    import resource

    world, task = join_world(config.device), get_task(config.task)
    log = Log(secret_values(config))
    log.say(to_yaml(config))
    readers = build_readers(config, task, log)
    model = build_model(config, readers[0], world, log)
    loader, _ = build_loaders(config, task, world, readers, model.stride)
    criterion = build_criterion(config)
    batch = next(iter(loader)).to(world.device)
    started = time.monotonic()
    with choose_precision(config.train.mixed_precision, world.device).autocast():
        outputs = model.train()(batch)
    losses = criterion(outputs, batch, criterion.counts(batch))
    torch.stack(list(losses.values())).sum().backward()
    is_cuda = world.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.say(data_table({"training": readers[0], "validation": readers[1]}))
    log.say("losses: " + ", ".join(f"{name} {value.item():.4f}" for name, value in losses.items()))
    log.say(f"parameters: {sum(p.numel() for p in model.parameters()):,}, of which {trainable:,} train")
    log.say(f"peak memory: {peak / 2**30:.2f} GiB of the {'device' if is_cuda else 'process'}; "
            f"one pass of {tuple(batch.images.shape)}: {time.monotonic() - started:.2f} s")  # fmt: skip


def version() -> None:
    """`--version`: what this runs on, to paste into a report."""
    import timm
    import torchvision

    print(f"python {platform.python_version()} on {platform.platform()}")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}")
    print(
        f"CUDA devices: {torch.cuda.device_count()}, MPS: {torch.backends.mps.is_available()}, cores: {os.cpu_count()}"
    )


def create_config(config: Config, path: Path) -> None:
    """`--create_config`: a documented file to edit."""
    if path.exists():
        raise UserError(f"{path} exists already; name another file with --create_config FILE")
    write_text(path, to_yaml(config, documented=True))
    print(f"wrote {path}; use it with --config {path}")

"""From the configuration to parts: readers, loaders, model, criterion, optimizer.

Apart from train.py because `--check_data`, `--preview` and `--dry_run` build the same parts. Beside the entry scripts,
this is the only place that sees the `Config`: what it builds takes keyword arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoint import load_weights
from clips import AugmentClip, ClipDataset, DrawClip
from combining import COMBINATIONS, Combine
from config import Config
from dataset import Dataset, EvalSampler, TrainSampler, build_loader
from downloads import fetch
from errors import UserError
from mixing import Mix
from models import LoadReport, create_criterion, create_model
from optim import build_optimizer
from readers import Cached, Fault, Reader, check, drop, fail_on, limit, split
from tasks import MetricOptions, Task
from tracking import Log
from transforms import Augment
from utils import World, loading_workers

# ---------------------------------------------------------------- data


def build_readers(config: Config, task: Task, world: World, log: Log) -> tuple[Reader, Reader | None]:
    """(training, validation) readers, every sample decoded once to be sure of it, or a `UserError` with all faults."""
    data = config.data
    root, train_spec, val_spec = data.root or None, data.train, data.val
    if config.is_demo:
        root, (train_spec, val_spec) = task.demo_root(), task.demo_specs
        log.say("training on the demo data that this program draws itself; name your own with --data.train")
    if not train_spec:
        raise UserError(f"no training data: name it with --data.train path/to/set ({task.layout})")
    readers = [task.reader(train_spec, root=root, images=data.images)]
    if val_spec:
        names = readers[0].class_names
        readers.append(task.reader(val_spec, root=root, class_names=names, images=data.images))
    faults = find_faults(readers, world, config.logging.progress and sys.stderr.isatty())
    if data.on_error == "fail":
        fail_on([fault for found in faults for fault in found])
    else:
        for position, (reader, found) in enumerate(zip(readers, faults, strict=True)):
            readers[position], dropped = drop(reader, found)
            if dropped:
                log.say(f"left out {dropped} faulty samples, as data.on_error: skip says: {found[0]} …")
    training = readers[0]
    validation = readers[1] if val_spec else None
    if data.fold:
        training, validation = (
            split(readers[0], fold=data.fold, seed=config.seed, part=part) for part in ("train", "val")
        )
    elif not val_spec and data.val_fraction > 0:
        training, validation = (
            split(readers[0], fraction=data.val_fraction, seed=config.seed, part=part) for part in ("train", "val")
        )
    if config.train.test_limit and validation is not None:
        validation = limit(validation, config.train.test_limit)
    return limit(training, data.max_samples or None), validation


def find_faults(readers: list[Reader], world: World, progress: bool) -> list[list[Fault]]:
    """What is wrong with each reader's samples; rank 0 looks for all, and all know what it learned."""
    found = None
    if world.is_main_process:
        faults = [check(reader, workers=os.cpu_count() or 1, progress=progress) for reader in readers]
        found = faults, [reader.findings() for reader in readers]
    faults, findings = world.agree(found)
    for reader, learned in zip(readers, findings, strict=True):
        reader.adopt(learned)
    return faults


def data_table(readers: dict[str, Reader | None]) -> str:
    """Which data sets a run reads, with sample counts and weights."""
    lines = []
    for part, reader in readers.items():
        for name, summary in (reader.datasets if reader is not None else {}).items():
            lines.append(f"  {part:<11} {name:<40} {summary.count:>7} samples, weight {summary.weight:g}")
    return "\n".join(lines)


def build_loaders(config: Config, task: Task, world: World, readers: tuple[Reader, Reader | None], stride: int) -> Any:
    """(training loader, validation loader or None)."""
    training, validation = readers
    check_size(config, stride)
    data, size = config.data, (config.data.size[1], config.data.size[0])
    if data.load_all and task.has_clips:
        raise UserError("data.load_all: clips are decoded as they are drawn, so it is not for the task video; leave it")
    if data.load_all:
        augment, combine = build_augment(config, task), build_combine(config, task)
        path = world.agree(f"{os.environ.get('TMPDIR', '/tmp')}/maskwright-{os.getpid()}")
        training = Cached(
            training,
            path=str(path),
            size=None if data.dynamic_size or augment.takes_originals or combine else size,
            pad=pads(config, task),
            write=world.local_rank == 0,
            barrier=world.barrier,
            progress=config.logging.progress and sys.stderr.isatty(),
        )
    ranges = data.dynamic_size
    sampler = TrainSampler(
        training,
        batch_size=config.train.batch_size,
        grad_accum_steps=config.train.grad_accum_steps,
        size=size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        dynamic_size=[(low, high) for low, high in ranges[::-1]] if ranges else None,
        dynamic_size_batch=data.dynamic_size_batch,
        stride=stride,
    )
    train_loader = build_loader(
        train_dataset(training, task, config),
        sampler,
        collate_targets=task.collate_targets,
        statistics=data.normalize,
        mix=build_mix(config, task),
        workers=loading_workers(data.num_workers, world.size),
        persistent=True,
        pin=world.device.type == "cuda",
        timeout=60 * config.distributed.timeout_minutes,
    )
    return train_loader, None if validation is None else build_eval_loader(validation, task, config, world)


def train_dataset(reader: Reader, task: Task, config: Config) -> Dataset:
    """The samples of a reader as the settings vary them."""
    return dataset_of(task)(
        reader,
        make_target=task.make_target,
        augment=build_augment(config, task),
        combine=build_combine(config, task),
        seed=config.seed,
        pad=pads(config, task),
    )


def dataset_of(task: Task) -> type[Dataset]:
    return ClipDataset if task.has_clips else Dataset


def check_size(config: Config, stride: int) -> None:
    """The model takes sides that are multiples of its stride; raises `UserError` for others."""
    if any(side % stride for side in config.data.size):
        raise UserError(
            f"data.size is {config.data.size}, but {config.model.family} needs sides that are multiples of {stride}"
        )


def build_eval_loader(reader: Reader, task: Task, config: Config, world: World) -> Any:
    """A loader of a reader's samples at the model's size, with the originals to score against."""
    if task.has_clips and config.evaluation.tta:
        raise UserError("evaluation.tta: what is followed through clips is not averaged over scales; leave it out")
    sampler = EvalSampler(
        len(reader),
        batch_size=config.evaluation.batch_size or config.train.batch_size,
        size=(config.data.size[1], config.data.size[0]),
        rank=world.rank,
        world_size=world.size,
    )
    return build_loader(
        dataset_of(task)(reader, make_target=task.make_target, pad=pads(config, task)),
        sampler,
        collate_targets=task.collate_targets,
        statistics=config.data.normalize,
        workers=loading_workers(config.data.num_workers, world.size),
        pin=world.device.type == "cuda",
        timeout=60 * config.distributed.timeout_minutes,
    )


def build_augment(config: Config, task: Task) -> Augment | AugmentClip:
    """The transforms of the configuration, else the task's official recipe."""
    transforms = list(task.augment if config.data.augment is None else config.data.augment)
    if config.data.background_synthesis:
        if task.cut_out is None:
            raise UserError(f"data.background_synthesis needs masks that are alpha, which those of {task.name} are not")
        transforms.insert(0, {"name": "BackgroundSynthesis", "p": config.data.background_synthesis})
    augment = Augment(transforms, pad=pads(config, task))
    return AugmentClip(augment) if task.has_clips else augment


def pads(config: Config, task: Task) -> bool:
    """Whether pictures keep their aspect ratio; raises `UserError` where results could not be brought back."""
    if config.data.resize == "pad" and not task.objects:
        raise UserError(f"data.resize: pad is for tasks with objects; the pictures of {task.name} are stretched")
    return config.data.resize == "pad"


def build_mix(config: Config, task: Task) -> Mix | None:
    """How the samples of a training batch are mixed, where they are; raises `UserError` where they cannot be."""
    ways = mixing_ways(config, task)
    if not any(ways.values()) or task.mixes == COMBINATIONS:
        return None
    if config.train.batch_size < 2:
        raise UserError("data.mix needs a train.batch_size of 2 or more, since the samples of a batch are mixed")
    return Mix(ways, seed=config.seed)


def build_combine(config: Config, task: Task) -> Combine | DrawClip | None:
    """How training samples are drawn from clips, or combined with others of the data; raises as `build_mix`."""
    if task.has_clips:
        return DrawClip(seed=config.seed, **asdict(config.data.clip))
    ways = mixing_ways(config, task)
    return Combine(ways, seed=config.seed) if any(ways.values()) and task.mixes == COMBINATIONS else None


def mixing_ways(config: Config, task: Task) -> dict[str, float]:
    """data.mix, where the task has such ways."""
    if any(config.data.mix.values()) and not task.mixes:
        raise UserError(f"data.mix: the samples of the task {task.name} are not mixed; leave it out")
    return config.data.mix


# ---------------------------------------------------------------- model, criterion, optimizer


def build_metric(config: Config, task: Task, class_names: Sequence[str], names: Sequence[str] = ()) -> Any:
    """A fresh metric of the task, with the scores that are asked for beside its own."""
    options = MetricOptions(
        getattr(config.model, "masks", True), config.evaluation.max_detections, config.evaluation.convention
    )
    return task.metric(names or config.evaluation.metrics, class_names, options)


def settle_classes(config: Config, task: Task, reader: Reader) -> None:
    """Where the model has as many classes as the data, say how many in the configuration, which the run keeps."""
    model: Any = config.model
    if not hasattr(model, "num_classes"):
        return
    there = task.num_classes(reader)
    model.num_classes = model.num_classes or there
    if model.num_classes < there:
        raise UserError(f"the data has {there} classes, but model.num_classes is {model.num_classes}: leave it at 0")


def build_model(config: Config, world: World, log: Log, pretrained: bool = True) -> Any:
    """The model on its device, from random, published or given weights; a resumed run needs no `pretrained` ones."""
    model: Any = create_model(config.model.family, **model_settings(config))
    if pretrained and config.model.pretrained != "none":
        load_pretrained(model, config.model.pretrained, world, log)
    if config.optimizer.freeze:
        model.freeze(config.optimizer.freeze)
    if config.train.activation_checkpointing:
        model.set_activation_checkpointing(True)
    if config.train.cache_features:
        cache_features(config, model)
    if config.train.sync_bn and world.size > 1:
        if world.device.type != "cuda":
            raise UserError("train.sync_bn needs CUDA devices: torch has no synchronised batch norm for others")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(world.device)


def cache_features(config: Config, model: Any) -> None:
    """Let the model keep features of training frames; raises `UserError` where they would not come again."""
    if not hasattr(model, "keep_features"):
        raise UserError(f"train.cache_features: models of the family {config.model.family} keep none; leave it out")
    if config.data.augment != []:
        raise UserError(
            "train.cache_features: augmentation makes another picture of a frame each time, so none comes again; set "
            "data.augment: [], or leave cache_features out"
        )
    model.keep_features(config.train.cache_features)


def check_classes(config: Config, class_names: Sequence[str]) -> None:
    """An auxiliary head needs a loss and room for the classes that the file names hold; raises `UserError`."""
    classes = getattr(config.model, "auxiliary_classes", 0)
    if classes and not config.loss.weights.get("class"):
        raise UserError("model.auxiliary_classes needs a loss to train its head: set loss.weights.class (officially 5)")
    if classes and len(class_names) > classes:
        raise UserError(
            f"the training data names {len(class_names)} classes, but model.auxiliary_classes is {classes}: raise it"
        )


def load_pretrained(model: Any, pretrained: str, world: World, log: Log) -> None:
    """Start from `backbone` or `official` weights, a file, or a repository; says what was loaded and what was not."""
    address = model.published_weights().get(pretrained, pretrained)
    if address in ("backbone", "official"):
        raise UserError(f"no {address} weights are published for these settings: name a file as model.pretrained")
    file = Path(address)
    if address.startswith(("hf-hub:", "https://")):
        if world.local_rank == 0:  # one download for the machine
            file = fetch(address)
        world.barrier()
        file = fetch(address)
    content = load_weights(file)
    report = model.load_encoder(content) if pretrained == "backbone" else load_any(model, content)
    log.say(f"weights from {address}: {report.summary()}")
    if not report.loaded:
        raise UserError(f"nothing in {address} fits this model: {report.summary()}")


def load_any(model: Any, content: dict[str, Any]) -> Any:
    """Weights of a run of this program (its averages, where it kept some) or in the official layout -> report."""
    if "meta" not in content:
        return model.load_official(content)
    report = LoadReport()
    own, theirs = model.state_dict(), content.get("ema") or content["model"]
    for name, tensor in theirs.items():
        if name not in own:
            report.unexpected.append(name)
        elif own[name].shape != tensor.shape:
            report.reshaped[name] = (tuple(tensor.shape), tuple(own[name].shape))
        else:
            report.loaded.append(name)
    report.missing = [name for name in own if name not in theirs]
    model.load_state_dict({name: theirs[name] for name in report.loaded}, strict=False)
    return report


def model_settings(config: Config) -> dict[str, Any]:
    """The model's own keyword arguments."""
    return {key: value for key, value in asdict(config.model).items() if key not in ("family", "pretrained")}


def build_criterion(config: Config, task: Task, reader: Reader) -> Any:
    """The criterion of the family and task."""
    return create_criterion(config.model.family, config.task, **loss_settings(config, task, reader))


def loss_settings(config: Config, task: Task, reader: Reader) -> dict[str, Any]:
    """The criterion's keyword arguments; what the loss section says about time is the loop's business."""
    settings = {key: value for key, value in asdict(config.loss).items() if not key.startswith("last_epochs")}
    return task.loss_settings(settings, reader, model_settings(config))


def build_optimizer_for(config: Config, model: Any) -> torch.optim.Optimizer:
    """The optimizer over the model's parameter groups."""
    settings = config.optimizer
    groups = model.parameter_groups(
        settings.lr, settings.weight_decay, settings.backbone_lr_scale, settings.layer_decay, settings.decay_norms
    )
    return build_optimizer(
        groups,
        name=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        momentum=settings.momentum,
    )

"""BiRefNet's `config.py`, the `train.sh` beside it, and the `config_vars.yml` of its fork."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ancestors.preset import Preset, Source, Table, beside
from config import ALIASES, Kind, read_yaml


def or_none(value: Any) -> Any:
    return value or "none"


def ranges(value: Any) -> Any:
    """((min width, max width), (min height, max height)), or the fork's list of sides of squares."""
    if value and all(isinstance(side, int) for side in value):
        return [[min(value), max(value)]]
    return value


BIREFNET: Table = {
    "bb": "model.backbone",
    "mul_scl_ipt": ("model.multi_scale_input", or_none),
    "cxt_num": "model.context",
    "squeeze_block": "model.squeeze_block",
    "dec_blk": "model.decoder_block",
    "dec_att": ("model.decoder_attention", or_none),
    "dec_channels_inter": ("model.decoder_channels", {"fixed": "fixed", "adap": "adaptive"}.__getitem__),
    "dec_ipt": "model.decoder_input",
    "dec_ipt_split": "model.decoder_input_split",
    "ms_supervision": "model.multi_scale_supervision",
    "out_ref": "model.gradient_supervision",
    "refine": ("model.refine", {"": "none", "RefUNet": "unet"}.__getitem__),
    "freeze_bb": "model.freeze_backbone",
    "size": "data.size",
    "dynamic_size": ("data.dynamic_size", ranges),
    "dynamic_size_batch": "data.dynamic_size_batch",
    "background_color_synthesis": ("data.background_synthesis", float),
    "training_set": "data.train",
    "testsets": ("data.val", lambda names: names.replace(",", "+")),
    "optimizer": ("optimizer.name", str.lower),
    "batch_size_valid": "evaluation.batch_size",
    "rand_seed": "seed",
    "ckpt_dir": "output_dir",
    "epochs_end": "train.epochs",
}
BIREFNET_TERMS = {"bce": "bce", "iou": "iou", "iou_patch": "iou_patch", "mae": "mae", "mse": "mse", "reg": "reg",
                  "ssim": "ssim", "cnt": "contour", "structure": "structure"}  # fmt: skip
DIS5K_CLASSES = 219
# What follows from other settings, or is so here in any case.
BIREFNET_KNOWN = (
    r"^(self|sys_home_dir|data_root_dir|task|lat_blk|cxt|device|model|scale|ender|progressive_ref|refine_iteration)$",
    r"^(lateral_channels|weights|lambdas_|verbose_eval|only_S_MAE|precisionHigh|SDPA_enabled|epoch_st)",
)


def from_birefnet(values: Mapping[str, Any], source: Path) -> Preset:
    """Of the settings that `config.py` makes, those in `config_vars.yml` and the epochs in `train.sh` beside it."""
    preset = Preset(Kind("birefnet", "binary"))
    own = source if not values else source.with_name("config_vars.yml")
    there = Source({**values, **(read_yaml(own) if own.is_file() else {})})
    there.carry(preset, BIREFNET)
    secrets = {name for name in there.values if name in ALIASES and "key" in name}
    there.carry(
        preset, {name: ALIASES[name] for name in there.values if name in ALIASES.keys() - secrets - BIREFNET.keys()}
    )
    for name in secrets:
        there.take(name)
        preset.leave(name, "***", "keys stay in config_vars.yml, which this program reads too")
    task = str(there.take("task", ""))
    if values:
        birefnet_data(there, preset, task)
        birefnet_loss(there, preset, task)
        birefnet_schedule(there, preset, task, source.with_name("train.sh"))
        preset.put("optimizer.decay_norms", True, "as its one group of parameters")
    birefnet_start(there, preset, bool(values), source)
    if set(there.listed("preproc_methods", str)) - {"flip", "enhance", "rotate", "pepper"}:
        preset.leave("preproc_methods", there.take("preproc_methods"), "data.augment is the place for it")
    there.leave_rest(preset, *BIREFNET_KNOWN)
    return preset


def birefnet_data(there: Source, preset: Preset, task: str) -> None:
    """Data sets lie in the folder of their task."""
    root = there.take("data_root_dir")
    if root:
        preset.put("data.root", f"{root}/{task}", "data_root_dir / task")
    if there.take("auxiliary_classification"):
        preset.put("model.auxiliary_classes", DIS5K_CLASSES, "auxiliary_classification")


def birefnet_loss(there: Source, preset: Preset, task: str) -> None:
    """Terms with a weight, and what the last epochs make of them."""
    batch = preset.get("train.batch_size") or 1
    terms = {name: there.number(f"lambdas_pix_last.{name}") for name in (*BIREFNET_TERMS, "triplet")}
    if not any(terms.values()):
        return
    for name, weight in terms.items():
        if weight and name in BIREFNET_TERMS:
            scaled, note = (
                (weight * batch, f"iou {weight:g} on a sum over the batch") if name == "iou" else (weight, name)
            )
            preset.put(f"loss.weights.{BIREFNET_TERMS[name]}", scaled, note)
        elif weight:
            preset.leave(f"lambdas_pix_last.{name}", weight)
    if preset.get("model.gradient_supervision"):
        preset.put("loss.weights.gradient", 1.0, "out_ref")
    if preset.get("model.auxiliary_classes"):
        preset.put("loss.weights.class", there.number("lambdas_cls.ce", 5.0), "lambdas_cls.ce")
    last = -there.number("finetune_last_epochs")
    if last > 0:
        preset.put("loss.last_epochs", last, "finetune_last_epochs")
        factors = {"mse": 0.9, "ssim": 0.9} if task == "Matting" else {"bce": 0.0, "iou": 0.5, "mae": 0.9}
        for name, factor in factors.items():
            if terms[name]:
                preset.put(f"loss.last_epochs_factors.{name}", factor, "as train.py does")


def birefnet_schedule(there: Source, preset: Preset, task: str, script: Path) -> None:
    """Epochs stand in the shell script; the rate is constant but for milestones that hardly anybody sets."""
    try:
        lines = script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        lines = ""
    found = re.search(rf"'{re.escape(task)}'\)\s*epochs=(\d+)\s*&&\s*val_last=(\d+)\s*&&\s*step=(\d+)", lines)
    names = {"epochs": "train.epochs", "val_last": "checkpoint.save_last", "step": "checkpoint.save_step"}
    for number, (name, key) in enumerate(names.items(), 1):
        if found and key not in preset.values:
            preset.put(key, int(found[number]), f"{name} of train.sh")
            preset.left_out = [line for line in preset.left_out if not line.startswith(f"{key.rpartition('.')[2]}: ")]
    epochs = preset.get("train.epochs")
    if epochs is None:
        preset.leave("epochs", "an option of its train.py", "set train.epochs")
    decays = there.listed("lr_decay_epochs", (int, float))
    milestones = [each if each > 0 else (epochs or math.inf) + each + 1 for each in decays]
    milestones = [each for each in milestones if each < (epochs or 1e5)]
    preset.put("scheduler.name", "multistep" if milestones else "constant", "lr_decay_epochs")
    if milestones:
        preset.put("scheduler.epochs", milestones, "lr_decay_epochs")
        preset.put("scheduler.gamma", there.number("lr_decay_rate", 0.5), "lr_decay_rate")
    there.take("lr_decay_rate")


def birefnet_start(there: Source, preset: Preset, is_whole: bool, source: Path) -> None:
    """The weights to start from: those of a run that goes on, else the encoder's published ones."""
    weights = str(preset.get("model.pretrained") or "none")
    if weights != "none":
        preset.put("model.pretrained", beside(weights, source) or weights, "resume_weights_path")
    elif is_whole:
        preset.put("model.pretrained", "backbone", "the encoder's published weights")
    else:
        preset.values.pop("model.pretrained", None)

"""RF-DETR's checkpoints, which hold the options that they were trained with."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ancestors.preset import Preset, Source, Table
from ancestors.python_values import UNKNOWN
from checkpoint import load_weights
from config import MOST_VALUES, Kind, count_values
from errors import UserError
from models import infer_settings
from models.rfdetr.variants import find_variant

RFDETR: Table = {
    "resolution": ("data.size", lambda size: [size[1], size[0]] if isinstance(size, (list, tuple)) else size),
    "lr": "optimizer.lr",
    "lr_vit_layer_decay": "optimizer.layer_decay",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler": "scheduler.name",
    "lr_drop": ("scheduler.epochs", lambda epoch: [epoch]),
    "lr_min_factor": "scheduler.min_factor",
    "batch_size": "train.batch_size",
    "grad_accum_steps": "train.grad_accum_steps",
    "epochs": "train.epochs",
    "clip_max_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.activation_checkpointing",
    "sync_bn": "train.sync_bn",
    "early_stopping": "train.early_stopping",
    "early_stopping_patience": "train.patience",
    "drop_path": "model.drop_path",
    "dropout": "model.dropout",
    "seed": "seed",
    "num_workers": "data.num_workers",
    "cls_loss_coef": "loss.weights.class",
    "bbox_loss_coef": "loss.weights.box",
    "giou_loss_coef": "loss.weights.giou",
    "mask_ce_loss_coef": "loss.weights.mask",
    "mask_dice_loss_coef": "loss.weights.dice",
    "set_cost_class": "loss.matching.class",
    "set_cost_bbox": "loss.matching.box",
    "set_cost_giou": "loss.matching.giou",
    "focal_alpha": "loss.focal_alpha",
    "mask_point_sample_ratio": "loss.point_ratio",
    "freeze_encoder": ("optimizer.freeze", lambda freezes: ["backbone"] if freezes else []),
    "tensorboard": "tracking.tensorboard",
    "wandb": "tracking.wandb.enable",
    "project": ("tracking.wandb.project", lambda name: name or ""),
    "steps_per_validation": "train.steps_per_validation",
    "test_limit": "train.test_limit",
}
RFDETR_WITH_MASKS = ("mask_ce_loss_coef", "mask_dice_loss_coef", "mask_point_sample_ratio")
# What the size of the model says, what is so here in any case, and what belongs to one start of a program.
RFDETR_KNOWN = (
    r"^(encoder|vit_encoder_num_layers|window|position|positional|out_feature|layer_norm|rms_norm|dec_|decoder_|dim_feed)",
    r"^(hidden_dim|sa_nheads|ca_nheads|num_|two_stage|projector|lite_|bbox_reparam|patch_size|segmentation_head|mask_down)",
    r"^(group|class_names|ia_bce_loss|aux_loss|two_|pretrain|resume|start_epoch|output_dir|device|world_size|dist|rank|gpu)",
    r"^(dataset_file|amp|use_ema|ema_tau|print_freq|checkpoint_interval|square_resize|drop_mode|drop_schedule|shape)",
    r"^(do_benchmark|dont_save|run|fp16_eval|infer_dir|opset|simplify|verbose|tensorrt|subcommand|cutoff|eval|license|model_)",
)  # fmt: skip


def from_rfdetr(source: Path) -> Preset:
    """Of the options that a checkpoint of RF-DETR holds, and of the shapes of its weights."""
    content = load_weights(source)
    settings = infer_settings("rfdetr", content)
    there = Source(options_of(content, source))
    preset = Preset(Kind("rfdetr", "instance"))
    for name, value in settings.items():
        preset.put(f"model.{name}", value, "its weights")
    preset.put("model.pretrained", str(source.resolve()), "this checkpoint")
    table = {name: key for name, key in RFDETR.items() if settings["masks"] or name not in RFDETR_WITH_MASKS}
    there.carry(preset, table)
    rfdetr_rates(there, preset)
    rfdetr_sizes(there, preset, settings)
    rfdetr_data(there, preset)
    if there.values:
        decay = there.number("ema_decay") if there.take("use_ema", True) else 0.0
        preset.put("train.ema_decay", decay, "use_ema, ema_decay")
    else:
        preset.leave("args", None, "the file holds weights alone")
    there.leave_rest(preset, *RFDETR_KNOWN)
    return preset


def options_of(content: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The options in a checkpoint, as plain values; none where it holds weights alone."""
    args = content.get("args")
    options = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if count_values(options, MOST_VALUES) > MOST_VALUES:
        raise UserError(f"{source} is no checkpoint of RF-DETR: its args hold more than {MOST_VALUES} values")
    return plain(options)


def plain(value: Any) -> Any:
    """UNKNOWN for what is no value of settings, as tensors are."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (int, float, str, Path)) else UNKNOWN


def rfdetr_rates(there: Source, preset: Preset) -> None:
    """The encoder's rate is a share of the rate here; that of the decoder has a factor of 0.7 in any case."""
    rate, factor = there.number("lr"), there.number("lr_component_decay", 1.0)
    if rate and there.number("lr_encoder"):
        share = there.number("lr_encoder") / rate * factor**2
        preset.put("optimizer.backbone_lr_scale", share, "lr_encoder / lr · lr_component_decay²")
    if rate and factor != 0.7:
        preset.leave("lr_component_decay", factor, "the decoder's factor is 0.7 here")
    if there.take("ia_bce_loss") is False:
        preset.leave("ia_bce_loss", False, "the class loss counts IoU in any case")
    if there.number("warmup_epochs"):
        preset.leave("warmup_epochs", there.take("warmup_epochs"), "scheduler.warmup_steps counts steps")
    if preset.get("scheduler.name") == "cosine":
        preset.values.pop("scheduler.epochs", None)


def rfdetr_sizes(there: Source, preset: Preset, settings: Mapping[str, Any]) -> None:
    """Several sizes about the one that is named, in steps that the encoder's windows need."""
    size = preset.get("data.size")
    if not there.take("multi_scale") or not size or len(set(size)) > 1:
        return
    row = find_variant(settings["variant"], settings["masks"])
    unit = row.patch * row.windows
    steps = size[0] // unit
    low, high = (5, 5) if there.take("expanded_scales") else (3, 4)
    sides = [max(2, steps - low) * unit, (steps + high) * unit]
    preset.put("data.dynamic_size", [sides], "multi_scale, expanded_scales")


def rfdetr_data(there: Source, preset: Preset) -> None:
    """The folders `train` and `valid` of a data set, as Roboflow exports them."""
    root = there.take("dataset_dir")
    if root and there.take("dataset_file") in ("roboflow", None):
        preset.put("data.train", f"{root}/train/_annotations.coco.json", "dataset_dir")
        preset.put("data.val", f"{root}/valid/_annotations.coco.json", "dataset_dir")
    elif there.take("coco_path"):
        root = there.take("coco_path")
        preset.put("data.train", f"{root}/annotations/instances_train2017.json", "coco_path")
        preset.put("data.val", f"{root}/annotations/instances_val2017.json", "coco_path")

"""SAM 2's training configurations, in Hydra's style."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ancestors.preset import Preset, Source, Table, beside, leaves
from ancestors.python_values import UNKNOWN
from config import Kind
from errors import UserError

# (width of the trunk, its blocks, where a configuration names them)
SAM2_SIZES = {(96, (1, 2, 7, 2)): "tiny", (96, (1, 2, 11, 2)): "small", (112, (2, 3, 16, 3)): "base_plus",
              (144, (2, 6, 36, 4)): "large"}  # fmt: skip
SAM2: Table = {
    "trainer.model.image_encoder.trunk.drop_path_rate": "model.drop_path",
    "trainer.model.memory_attention.layer.dropout": "model.dropout",
    "trainer.model.image_size": ("data.size", lambda side: [side, side]),
    "prob_to_use_pt_input_for_train": "model.point_prompts",
    "prob_to_use_box_input_for_train": "model.box_prompts",
    "prob_to_sample_from_gt_for_train": "model.true_clicks",
    "num_init_cond_frames_for_train": "model.conditioning_frames",
    "num_frames_to_correct_for_train": "model.corrected_frames",
    "num_correction_pt_per_frame": "model.correction_clicks",
    "use_act_ckpt_iterative_pt_sampling": "train.activation_checkpointing",
    "sampler.num_frames": "data.clip.frames",
    "sampler.max_num_objects": "data.clip.objects",
    "sampler.reverse_time_prob": "data.clip.reverse",
    "trainer.data.train.batch_sizes": (
        "train.batch_size",
        lambda sizes: sizes[0] if isinstance(sizes, list) else sizes,
    ),
    "trainer.data.train.num_workers": "data.num_workers",
    "trainer.max_epochs": "train.epochs",
    "trainer.seed_value": "seed",
    "trainer.val_epoch_freq": "train.eval_each_epoch",
    "trainer.optim.gradient_clip.max_norm": "train.max_grad_norm",
    "layer_decay_value": "optimizer.layer_decay",
    "trainer.optim.options.weight_decay.0.scheduler.value": "optimizer.weight_decay",
    "trainer.optim.optimizer._target_": ("optimizer.name", lambda name: name.rpartition(".")[2].lower()),
    "trainer.logging.log_freq": "logging.log_frequency",
    "weight_dict.loss_mask": "loss.weights.focal",
    "weight_dict.loss_dice": "loss.weights.dice",
    "weight_dict.loss_iou": "loss.weights.iou",
    "weight_dict.loss_class": "loss.weights.object",
}
SAM2_FIXED = {
    "trainer.model.num_maskmem": 7, "trainer.model.memory_attention.num_layers": 4,
    "trainer.model.memory_encoder.out_dim": 64, "supervise_all_iou": True, "iou_use_l1_loss": True,
    "focal_gamma_obj_score": 0.0, "rand_init_cond_frames_for_train": True, "rand_frames_to_correct_for_train": True,
    "trainer.model.sigmoid_scale_for_mem_enc": 20.0, "trainer.model.sigmoid_bias_for_mem_enc": -10.0,
}  # fmt: skip
SAM2_KNOWN = (
    r"_target_|_partial_|^(scratch|launcher|submitit|hydra|defaults)\b|^trainer\.(mode|accelerator|distributed|checkpoint|model)\b",
    r"^trainer\.(logging|data\.train\.(shuffle|pin_memory|drop_last|collate_fn|phases_per_epoch))|img_folder|gt_folder",
    r"transforms|^trainer\.optim\.(options|param_group_modifiers|amp|gradient_clip)|\.training$|^trainer\.loss",
    r"multiplier$|^dataset\.file_list_txt",
)  # fmt: skip
ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "times": operator.mul, "divide": operator.truediv, "add": operator.add, "subtract": operator.sub,
}  # fmt: skip
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
MOST_REFERENCES = 50  # in one value


def from_sam2(values: Mapping[str, Any], source: Path) -> Preset:
    """Of a training configuration in Hydra's style."""
    flat = dict(leaves(values))
    there = Source({name: resolved(value, flat) for name, value in flat.items()})
    trunk = "trainer.model.image_encoder.trunk"
    width = int(there.number(f"{trunk}.embed_dim"))
    depths = there.take(f"{trunk}.stages")
    size = next((name for (side, blocks), name in SAM2_SIZES.items()
                 if side == width and (not isinstance(depths, list) or tuple(depths) == blocks)), "")  # fmt: skip
    if not size:
        raise UserError(f"{source} trains no SAM 2: no size has a trunk of width {width} with blocks {depths}")
    preset = Preset(Kind("sam2", "video"))
    preset.put("model.variant", size, f"{trunk}.embed_dim, stages")
    there.carry(preset, SAM2)
    if "data.clip.reverse" not in preset.values:
        preset.put("data.clip.reverse", 0.0, "the sampler's default")
    sam2_start(there, preset, source)
    sam2_data(there, preset)
    sam2_rates(there, preset)
    if there.take("trainer.optim.amp.enabled"):
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(str(there.take("trainer.optim.amp.amp_dtype")), "auto")
        preset.put("train.mixed_precision", precision, "trainer.optim.amp")
    if there.take("freeze_image_encoder"):
        parts = ["prompt_encoder", "mask_decoder", "memory_attention", "memory_encoder", "object_pointers"]
        preset.put("model.trainable", parts, "freeze_image_encoder")
    for name, expected in SAM2_FIXED.items():
        if there.take(name, expected) != expected:
            preset.leave(name, there.take(name), f"always {expected} here")
    if there.name_of("train_transforms"):
        preset.leave(
            "vos.train_transforms", "a list", "the recipe of the task video stands here; data.augment replaces it"
        )
    there.leave_rest(preset, *SAM2_KNOWN)
    return preset


def resolved(value: Any, flat: Mapping[str, Any]) -> Any:
    """A value with its `${name}` and `${times:a,b}` replaced; UNKNOWN where one leads nowhere."""
    if isinstance(value, list):
        return [resolved(item, flat) for item in value]
    for _ in range(MOST_REFERENCES):
        found = REFERENCE.search(value) if isinstance(value, str) else None
        if not found:
            return value
        meant = referred(found[1], flat)
        if meant is UNKNOWN or isinstance(meant, (list, Mapping)):
            return meant
        value = meant if found[0] == value else value[: found.start()] + str(meant) + value[found.end() :]
    return UNKNOWN


def referred(words: str, flat: Mapping[str, Any]) -> Any:
    """What one `${…}` stands for."""
    function, _, arguments = words.partition(":")
    if not arguments:
        return flat.get(words, UNKNOWN)
    try:
        first, second = (float(word) for word in arguments.split(","))
        return ARITHMETIC[function](first, second)
    except (ValueError, LookupError, ArithmeticError):
        return UNKNOWN


def sam2_start(there: Source, preset: Preset, source: Path) -> None:
    """The file that it starts from, if it is there, else the published weights."""
    named = there.take("checkpoint_path")
    weights = beside(str(named), source) if named else ""
    preset.put("model.pretrained", weights or "official", "checkpoint_path" if weights else f"{named}, not there")


def sam2_data(there: Source, preset: Preset) -> None:
    """`JPEGImages` and `Annotations` of one folder are a data set here."""
    images, masks = (there.take(f"video_dataset.{name}") for name in ("img_folder", "gt_folder"))
    named = isinstance(images, str) and isinstance(masks, str)
    if named and Path(images).name == "JPEGImages" and Path(masks) == Path(images).with_name("Annotations"):
        preset.put("data.train", str(Path(images).parent), "the folder of img_folder and gt_folder")
    elif images:
        preset.leave("img_folder, gt_folder", [images, masks], "data.train needs JPEGImages and Annotations in one")
    if there.take("video_dataset.file_list_txt"):
        preset.leave("file_list_txt", there.take("video_dataset.file_list_txt"), "all clips of the folder are read")
    times = there.number("multiplier", 1.0)
    if times > 1:
        preset.leave("multiplier", times, f"an epoch takes each clip once: train.epochs may be {times:g} times as many")


def sam2_rates(there: Source, preset: Preset) -> None:
    """The first rate is everybody's, another that of the image encoder."""
    prefix = "trainer.optim.options.lr"
    rates: list[tuple[float, float, str]] = []
    for position in range(9):
        name = f"{prefix}.{position}"
        rate = there.number(f"{name}.scheduler.start_value") or there.number(f"{name}.scheduler.value")
        names = str(there.take(f"{name}.param_names", ""))
        if rate and not rates:
            rates.append((rate, there.number(f"{name}.scheduler.end_value", rate), name))
        elif rate and "image_encoder" in names:
            rates.append((rate, 0.0, name))
        elif rate:
            preset.leave(name, rate, f"of {names}")
    if not rates:
        return
    rate, end, name = rates[0]
    preset.put("optimizer.lr", rate, f"{name}.scheduler.start_value")
    preset.put("scheduler.name", "cosine" if end < rate else "constant", f"{name}.scheduler")
    preset.put("scheduler.min_factor", end / rate if end < rate else 0.0, f"{name}.scheduler.end_value")
    if len(rates) > 1:
        preset.put("optimizer.backbone_lr_scale", rates[1][0] / rate, f"{rates[1][2]}, a share of the first")

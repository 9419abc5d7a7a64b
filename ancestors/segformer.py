"""SegFormer's configurations: those of mmsegmentation, NVlabs' layout among them, and Hugging Face's `config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ancestors.preset import UNDERSTOOD, Preset, Source, Table, beside
from ancestors.python_values import read_python
from checkpoint import read_json
from config import Kind
from errors import UserError

MOST_FILES = 30  # that a configuration may be based on
# (width of the first stage, blocks of the stages)
SEGFORMER_SIZES = {
    (32, (2, 2, 2, 2)): "b0", (64, (2, 2, 2, 2)): "b1", (64, (3, 4, 6, 3)): "b2",
    (64, (3, 4, 18, 3)): "b3", (64, (3, 8, 27, 3)): "b4", (64, (3, 6, 40, 3)): "b5",
}  # fmt: skip
# Of both generations of mmsegmentation.
MMSEGMENTATION: Table = {
    "model.decode_head.num_classes": "model.num_classes",
    "model.decode_head.dropout_ratio": "model.dropout",
    "model.backbone.drop_path_rate": "model.drop_path",
    "crop_size": ("data.size", lambda size: [size[1], size[0]] if isinstance(size, (list, tuple)) else size),
    "data.samples_per_gpu": "train.batch_size",
    "train_dataloader.batch_size": "train.batch_size",
    "data.workers_per_gpu": "data.num_workers",
    "train_dataloader.num_workers": "data.num_workers",
    "optimizer.type": ("optimizer.name", str.lower),
    "optimizer.weight_decay": "optimizer.weight_decay",
    "optimizer.betas": "optimizer.betas",
    "optimizer.momentum": "optimizer.momentum",
    "clip_grad.max_norm": "train.max_grad_norm",
    "grad_clip.max_norm": "train.max_grad_norm",
    "accumulative_counts": "train.grad_accum_steps",
    "runner.max_iters": "train.max_steps",
    "train_cfg.max_iters": "train.max_steps",
    "total_iters": "train.max_steps",
    "runner.max_epochs": "train.epochs",
    "evaluation.interval": "train.steps_per_validation",
    "train_cfg.val_interval": "train.steps_per_validation",
    "checkpoint_config.interval": "checkpoint.every_steps",
    "log_config.interval": "logging.log_frequency",
    "lr_config.power": "scheduler.power",
    "lr_config.warmup_iters": "scheduler.warmup_steps",
}
MMSEGMENTATION_LOSSES = {"CrossEntropyLoss": "ce", "DiceLoss": "dice", "FocalLoss": "focal", "LovaszLoss": "lovasz"}
POLICIES = {"poly": "poly", "polylr": "poly", "cosineannealing": "cosine", "cosineannealinglr": "cosine",
            "step": "multistep", "multisteplr": "multistep", "fixed": "constant", "exp": "exponential"}  # fmt: skip
MMSEGMENTATION_KNOWN = (
    r"^(_base_|norm_cfg|find_unused_parameters|img_norm_cfg|dataset_type|crop_size|log_level|cudnn_benchmark|workflow)",
    r"^(train_pipeline|test_pipeline|backend_args|default_scope|env_cfg|visualizer|vis_backends|tta_|img_ratios)",
    r"(pipeline|type|_delete_|_scope_|by_epoch|metric)(\.|$)|^(test|val)_(cfg|dataloader|evaluator)|^(data|dist_params)",
    r"^(log_config|default_hooks|log_processor|train_dataloader|runner|train_cfg|optimizer_config|checkpoint)",
    r"^model\.(backbone|data_preprocessor|auxiliary_head|train_cfg|test_cfg|decode_head)|custom_keys|^lr_config\.warmup",
)  # fmt: skip


def read_based(source: Path, values: Mapping[str, Any], read: list[Path] | None = None) -> dict[str, Any]:
    """The values of a configuration over those of the files in its `_base_`, which are named from its folder."""
    read = [] if read is None else read  # all files so far
    bases = values.get("_base_", [])
    result: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, (list, tuple)) else []:
        path = source.parent / str(base)
        read.append(path)
        if len(read) > MOST_FILES:
            raise UserError(f"{source} is based on more than {MOST_FILES} files, or on itself")
        result = merged(result, read_based(path, read_python(path), read))
    return merged(result, values)


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings join key by key, but where `_delete_` says that the new one stands alone."""
    result = dict(base)
    for key, value in own.items():
        old = result.get(key)
        joins = isinstance(old, Mapping) and isinstance(value, Mapping) and not value.get("_delete_")
        result[key] = merged(old, value) if joins and isinstance(old, Mapping) else value
    return result


def from_mmsegmentation(values: Mapping[str, Any], source: Path) -> Preset:
    """Of a configuration in NVlabs' layout or a later one of mmsegmentation."""
    there = Source(read_based(source, values))
    kind = str(there.take("model.backbone.type", ""))
    if kind != "MixVisionTransformer" and not re.fullmatch(r"mit_b[0-5]", kind):
        raise UserError(f"{source} sets up no BiRefNet and no SegFormer; --from_ancestor understands {UNDERSTOOD}")
    preset = Preset(Kind("segformer", "semantic"))
    width, depths = there.take("model.backbone.embed_dims", 0), there.take("model.backbone.num_layers", ())
    preset.put("model.variant", segformer_size(width, depths) or kind.removeprefix("mit_"), "model.backbone")
    preset.put("model.norm_eps", 1e-6, "as NVlabs' code has it")
    there.carry(preset, MMSEGMENTATION)
    named = there.take("load_from") or there.take("model.pretrained") or there.take("init_cfg.checkpoint") or ""
    weights = beside(str(named), source)
    preset.put(
        "model.pretrained", weights or "backbone", "load_from or pretrained" if weights else f"{named}, not there"
    )
    mmsegmentation_rates(there, preset)
    mmsegmentation_losses(there, preset)
    mixes = there.take("fp16") is not None or any("AmpOptim" in str(value) for value in there.values.values())
    if mixes or there.name_of("fp16.loss_scale"):
        preset.put("train.mixed_precision", "fp16", "fp16")
    root = there.name_of("data_root")
    if root:
        preset.leave(root, there.take(root), "data.train takes a folder with images/ and masks/, or a COCO .json")
    if any(there.take(name) for name in there.values if name.endswith("reduce_zero_label")):
        preset.leave("reduce_zero_label", True, "masks whose 0 is no class: make it 255 and count the others down")
    there.leave_rest(preset, *MMSEGMENTATION_KNOWN)
    return preset


def segformer_size(width: Any, depths: Any) -> str:
    """The size of an encoder, empty for one that is none of them."""
    try:
        return SEGFORMER_SIZES.get((int(width), tuple(depths)), "")
    except (TypeError, ValueError, OverflowError):
        return ""


def mmsegmentation_rates(there: Source, preset: Preset) -> None:
    """The rate is the head's here, and the encoder has a share of it; there it is the other way round."""
    rate, factor = there.number("optimizer.lr", 6e-5), there.number("custom_keys.head.lr_mult", 1.0) or 1.0
    preset.put("optimizer.lr", rate * factor, f"optimizer.lr {rate:g} times custom_keys.head.lr_mult {factor:g}")
    preset.put("optimizer.backbone_lr_scale", 1 / factor, "1 / custom_keys.head.lr_mult")
    for name in [name for name in there.values if name.endswith("decay_mult")]:
        if there.take(name):
            preset.leave(name, there.take(name))
    name = there.name_of("lr_config.policy")
    policies = [(name, there.take(name))] if name else []
    for position in range(9):
        name = f"param_scheduler.{position}"
        kind = str(there.take(f"{name}.type", ""))
        end = there.number(f"{name}.end")
        if kind == "LinearLR":
            preset.put("scheduler.warmup_steps", end, f"{name}.end")
        elif kind:
            policies.append((f"{name}.type", kind))
        if kind == "PolyLR":
            preset.put("scheduler.power", there.number(f"{name}.power", 1.0), f"{name}.power")
    for name, policy in policies:
        if str(policy).lower() in POLICIES:
            preset.put("scheduler.name", POLICIES[str(policy).lower()], name)
        else:
            preset.leave(name, policy)
    if rate and there.number("lr_config.min_lr"):
        preset.put("scheduler.min_factor", there.number("lr_config.min_lr") / rate, "lr_config.min_lr")
    for name in [name for name in there.values if name.startswith(("lr_config.", "param_scheduler."))]:
        there.take(name)


def mmsegmentation_losses(there: Source, preset: Preset) -> None:
    """One loss, or a list of several."""
    for name, kind in list(there.values.items()):
        found = re.fullmatch(r"model\.decode_head\.loss_decode(\.\d+)?\.type", name)
        if not found:
            continue
        prefix = name.removesuffix("type")
        term = MMSEGMENTATION_LOSSES.get(str(kind))
        if term is None:
            preset.leave(name, kind)
            continue
        preset.put(f"loss.weights.{term}", there.number(f"{prefix}loss_weight", 1.0), name)
        if there.take(f"{prefix}class_weight"):
            preset.leave(f"{prefix}class_weight", there.take(f"{prefix}class_weight"), "see loss.class_weights")


HUGGING_FACE: Table = {
    "drop_path_rate": "model.drop_path",
    "classifier_dropout_prob": "model.dropout",
}
HUGGING_FACE_FIXED = {
    "num_encoder_blocks": 4, "sr_ratios": [8, 4, 2, 1], "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2],
    "num_attention_heads": [1, 2, 5, 8], "mlp_ratios": [4, 4, 4, 4], "hidden_act": "gelu", "num_channels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "semantic_loss_ignore_index": 255,
}  # fmt: skip


def from_hugging_face(source: Path) -> Preset:
    """Of the `config.json` beside Hugging Face's weights of a SegFormer."""
    values = read_json(source)
    if values.get("model_type") != "segformer":
        raise UserError(f"{source} is no configuration of a SegFormer; --from_ancestor understands {UNDERSTOOD}")
    there = Source({name: value for name, value in values.items() if name not in ("id2label", "label2id")})
    widths, depths = there.take("hidden_sizes") or [0], there.take("depths") or ()
    size = segformer_size(widths[0] if isinstance(widths, list) else widths, depths)
    if not size:
        raise UserError(f"{source}: hidden_sizes {widths} with depths {depths} are none of the sizes b0 to b5")
    preset = Preset(Kind("segformer", "semantic"))
    preset.put("model.variant", size, "hidden_sizes, depths")
    labels = values.get("id2label")
    preset.put(
        "model.num_classes", len(labels) if isinstance(labels, dict) else there.take("num_labels", 2), "id2label"
    )
    there.carry(preset, HUGGING_FACE)
    weights = next(filter(None, (beside_only(source, name) for name in ("model.safetensors", "pytorch_model.bin"))), "")
    preset.put(
        "model.pretrained", weights or "backbone", "the weights beside it" if weights else "no weights beside it"
    )
    for name, expected in HUGGING_FACE_FIXED.items():
        found = there.take(name, expected)
        if found != expected:
            preset.leave(name, found, f"always {expected} here")
    about = read_json(source.with_name("preprocessor_config.json"))
    side = about.get("size")
    if side:
        sides = [side.get("width"), side.get("height")] if isinstance(side, dict) else side
        preset.put("data.size", sides, "size of preprocessor_config.json")
    if about.get("do_reduce_labels") or about.get("reduce_labels"):
        preset.leave("do_reduce_labels", True, "masks whose 0 is no class: make it 255 and count the others down")
    return preset


def beside_only(source: Path, name: str) -> str:
    return str(source.resolve().with_name(name)) if source.with_name(name).is_file() else ""

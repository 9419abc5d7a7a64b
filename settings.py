"""Every setting of Maskwright: a documented field of a dataclass is a YAML key and a flag.

Apart from config.py, which turns files and flags into these, so that the list of settings can be read as one page.
Imports no torch: `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def setting(default: Any, doc: str, **limits: Any) -> Any:
    """A documented field.

    `limits`: min, max, pattern, path ("file", "file?" where it may be a word, or "spec"), secret, volatile (may change
    when a run resumes), transient (of one start, not of the run: never saved), verbatim (a list of words as the shell
    gave them: commas and stars belong to them).
    """
    metadata = {"doc": doc, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------- the settings

BIREFNET_BACKBONES = Literal[
    "swin_v1_t", "swin_v1_s", "swin_v1_b", "swin_v1_l",
    "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b5",
    "vgg16", "vgg16bn", "resnet50",
    "dino_v3_s", "dino_v3_s_plus", "dino_v3_b", "dino_v3_l", "dino_v3_h_plus", "dino_v3_7b",
]  # fmt: skip


RFDETR_VARIANTS = Literal[
    "nano", "small", "medium", "large", "xlarge", "2xlarge", "preview", "base", "large_deprecated",
]  # fmt: skip


@dataclass
class BiRefNetSettings:
    """BiRefNet (Zheng et al., 2024). The defaults are the official ones but for the smaller backbone."""

    family: Literal["birefnet"] = setting("birefnet", "the model family")
    pretrained: str = setting(
        "none", "none, backbone, official, a weights file, or hf-hub:owner/name to start from", path="file"
    )
    backbone: BIREFNET_BACKBONES = setting("swin_v1_t", "the encoder")
    multi_scale_input: Literal["none", "add", "cat"] = setting("cat", "how a second, half-scale pass joins the encoder")
    context: int = setting(3, "how many finer encoder levels are joined to the deepest one", min=0, max=3)
    squeeze_block: str = setting(
        "BasicDecBlk_x1",
        "block between encoder and decoder: empty, or BasicDecBlk|ResBlk|ASPP|ASPPDeformable with _xN",
        pattern=r"|(BasicDecBlk|ResBlk|ASPP|ASPPDeformable)_x[1-9]\d*",
    )
    decoder_block: Literal["BasicDecBlk", "ResBlk"] = setting("BasicDecBlk", "the decoder's block")
    decoder_attention: Literal["none", "ASPP", "ASPPDeformable"] = setting("ASPPDeformable", "attention in a block")
    decoder_channels: Literal["fixed", "adaptive"] = setting("fixed", "inner width of a block: 64, or a quarter of it")
    decoder_input: bool = setting(True, "the decoder also sees the image at every level")
    decoder_input_split: bool = setting(True, "it sees the image cut into patches rather than shrunk")
    multi_scale_supervision: bool = setting(True, "supervise every decoder level")
    gradient_supervision: bool = setting(True, "gradient (out-ref) attention and its supervision")
    auxiliary_classes: int = setting(0, "classes of the auxiliary classification head; 0: none", min=0)
    refine: Literal["none", "unet"] = setting("none", "refine the coarse mask once more from image and mask")
    drop_path: float | None = setting(None, "stochastic depth of the encoder; null: the backbone's own", min=0, max=1)
    dropout: float = setting(0.5, "dropout after the decoder's attention", min=0, max=1)
    freeze_backbone: bool | None = setting(None, "train the decoder alone; null: only for DINOv3")


@dataclass
class SegFormerSettings:
    """SegFormer (Xie et al., 2021). The defaults are the official ones."""

    family: Literal["segformer"] = setting("segformer", "the model family")
    pretrained: str = setting(
        "none", "none, backbone, official, a weights file, or hf-hub:owner/name to start from", path="file"
    )
    variant: Literal["b0", "b1", "b2", "b3", "b4", "b5"] = setting("b0", "the size")
    num_classes: int = setting(0, "classes; 0: as many as the data has", min=0)
    drop_path: float = setting(0.1, "stochastic depth of the encoder", min=0, max=1)
    dropout: float = setting(0.1, "dropout of channels before the classifier", min=0, max=1)
    norm_eps: float = setting(1e-5, "epsilon of most layer norms: 1e-5 as Hugging Face, 1e-6 as NVlabs", min=0)


RFDETR_SIZES: dict[bool, dict[str, int]] = {
    True: {
        "nano": 312, "small": 384, "medium": 432, "large": 504, "xlarge": 624, "2xlarge": 768, "preview": 432,
    },
    False: {"nano": 384, "small": 512, "medium": 576, "large": 704, "base": 560, "large_deprecated": 560},
}  # fmt: skip


@dataclass
class RFDETRSettings:
    """RF-DETR (Robinson et al., 2025), with masks or without. The defaults are the official ones."""

    family: Literal["rfdetr"] = setting("rfdetr", "the model family")
    pretrained: str = setting(
        "none", "none, backbone, official, a weights file, or hf-hub:owner/name to start from", path="file"
    )
    variant: RFDETR_VARIANTS = setting(
        "nano", "the size: nano to large; with masks also xlarge, 2xlarge, preview; without base, large_deprecated"
    )
    num_classes: int = setting(0, "classes; 0: as many as the data has", min=0)
    masks: bool = setting(True, "a mask for each object; --no-model.masks: boxes alone")
    mask_head: Literal["official", "fpn"] = setting("official", "the mask head; fpn: on a pyramid of encoder maps")
    num_queries: int = setting(0, "objects that an image can have at most; 0: the size's own, 100 to 300", min=0)
    groups: int = setting(13, "groups of queries in training, each matched by itself", min=1)
    position_side: int = setting(0, "side of the encoder's table of positions, in patches; 0: the size's own", min=0)
    drop_path: float = setting(0.0, "stochastic depth of the encoder", min=0, max=1)
    dropout: float = setting(0.0, "dropout in the decoder", min=0, max=1)

    @property
    def input_size(self) -> list[int] | None:
        """What `data.size` is where nobody says it: the size that the official weights were trained at."""
        side = RFDETR_SIZES[self.masks].get(self.variant)
        return [side, side] if side else None


@dataclass
class ClassifierSettings:
    """A classifier: one of timm's networks with a linear head."""

    family: Literal["classifier"] = setting("classifier", "the model family")
    pretrained: str = setting(
        "none", "none, backbone (timm's weights), a weights file, or hf-hub:owner/name to start from", path="file"
    )
    backbone: str = setting("resnet18", "any of timm's networks by name")
    num_classes: int = setting(0, "classes; 0: as many as the data has", min=0)
    drop_path: float = setting(0.0, "stochastic depth, for networks that have it", min=0, max=1)
    dropout: float = setting(0.0, "dropout before the head", min=0, max=1)


@dataclass
class SAM2Settings:
    """SAM 2.1 (Ravi et al., 2024). The defaults are those of the official fine-tuning but for the smaller size."""

    family: Literal["sam2"] = setting("sam2", "the model family")
    pretrained: str = setting(
        "none", "none, backbone, official, a weights file, or hf-hub:owner/name to start from", path="file"
    )
    variant: Literal["tiny", "small", "base_plus", "large"] = setting("tiny", "the size")
    trainable: list[str] = setting(
        [],
        "parts to train, none named: all; of image_encoder, prompt_encoder, mask_decoder, memory_attention, "
        "memory_encoder, object_pointers",
    )
    drop_path: float = setting(0.1, "stochastic depth of the image encoder", min=0, max=1)
    dropout: float = setting(0.1, "dropout in the memory attention", min=0, max=1)
    point_prompts: float = setting(0.5, "share of training clips prompted with points, not with masks", min=0, max=1)
    box_prompts: float = setting(0.5, "share of those prompts that are boxes", min=0, max=1)
    conditioning_frames: int = setting(2, "frames of a training clip that are prompted, at most", min=1)
    corrected_frames: int = setting(2, "frames of a training clip that are corrected, at most", min=1)
    correction_clicks: int = setting(7, "clicks on each of those", min=0)
    true_clicks: float = setting(0.1, "share of those clicks that are anywhere on the object", min=0, max=1)
    evaluation_prompt: Literal["mask", "click", "box"] = setting(
        "mask", "what evaluation gives of each object, in the first frame that shows it"
    )


@dataclass
class ClipSettings:
    """Which frames and objects of a clip training looks at."""

    frames: int = setting(5, "frames of a training clip", min=1)
    stride: list[int] = setting([1, 1], "[least, most] distance of them, drawn for each clip", min=1)
    objects: int = setting(3, "objects of a training clip, at most", min=1)
    reverse: float = setting(0.5, "probability that time runs backwards", min=0, max=1)


@dataclass
class DataSettings:
    """What is read and how it is varied."""

    root: str = setting("", "folder that holds the data sets; empty: names are paths", path="file", volatile=True)
    train: str = setting("", "training sets, joined with +, each with an optional :weight", path="spec")
    val: str = setting("", "validation sets; empty: split off the training sets", path="spec")
    test: str = setting("", "test sets of evaluate.py, joined with +", path="spec", volatile=True)
    size: list[int] = setting([1024, 1024], "model input [width, height]; one number for a square", min=32)
    dynamic_size: list[list[int]] | None = setting(
        None,
        "[[min width, max width], [min height, max height]] to draw training sizes from; [[min, max]]: squares",
        min=32,
    )
    dynamic_size_batch: int = setting(1, "draw a new size every so many batches", min=1)
    images: str = setting("", "folder of the images of COCO .json files; empty: looked for beside them", path="file")
    resize: Literal["stretch", "pad"] = setting(
        "stretch", "how pictures come to the input's size; pad: instance, aspect ratio kept, the rest filled up"
    )
    normalize: Literal["imagenet", "image"] = setting(
        "imagenet", "input statistics: ImageNet's, as pretrained weights expect, or each image's own (microscopy)"
    )
    augment: list[dict] | None = setting(None, "transforms by name and arguments; null: the task's official recipe")
    background_synthesis: float = setting(0.0, "binary: probability of a plain synthetic background", min=0, max=1)
    mix: dict[str, float] = setting(
        {},
        "probabilities; semantic: of cutmix, classmix for a sample, mixup for a batch; instance: of mosaic, copy_paste",
        min=0,
        max=1,
    )
    clip: ClipSettings = field(default_factory=ClipSettings)
    fold: str = setting(
        "", "k-fold split of the training sets: 0/5, fold 0 of 5 validates; all or all/5, a run for each fold",
        pattern=r"|\d+/\d+|all(/\d+)?",
    )  # fmt: skip
    val_fraction: float = setting(0.1, "share that validates where neither val nor fold is given", min=0, max=0.9)
    max_samples: int = setting(0, "use at most so many training samples; 0: all", min=0)
    load_all: bool = setting(False, "decode everything once into memory shared by workers and ranks", volatile=True)
    on_error: Literal["fail", "skip"] = setting("fail", "faulty samples: stop with the list, or train without them")
    num_workers: int = setting(-1, "loading processes per rank; -1: cores / ranks, at most 8", min=-1, volatile=True)


@dataclass
class LossSettings:
    """What the criteria of all tasks have: terms with weights, which may be others in the last epochs."""

    weights: dict[str, float] = setting({}, "weight of each term by name", min=0)
    last_epochs: int = setting(0, "the last so many epochs use last_epochs_factors", min=0)
    last_epochs_factors: dict[str, float] = setting({}, "factor of each term's weight in the last epochs", min=0)


@dataclass
class BinaryLossSettings(LossSettings):
    """The terms of `binary`: bce, iou, iou_patch, mae, mse, ssim, contour, structure, reg, gradient, class."""

    weights: dict[str, float] = setting(
        {"bce": 30.0, "iou": 0.5, "ssim": 10.0, "gradient": 1.0}, "weight of each term by name", min=0
    )
    iou_reduction: Literal["mean", "sum"] = setting("mean", "IoU over a batch; sum: as the official code")
    iou_smooth: float = setting(1.0, "added to both sides of the IoU ratio; 0: as the official code", min=0)
    structure_on: Literal["logits", "probabilities"] = setting(
        "logits", "structure loss input; probabilities: the official second sigmoid"
    )
    patch_iou: Literal["all", "corner"] = setting("all", "patch IoU windows; corner: the official first one alone")


@dataclass
class SemanticLossSettings(LossSettings):
    """The terms of `semantic`: ce, dice, focal, lovasz, ohem."""

    weights: dict[str, float] = setting({"ce": 1.0}, "weight of each term by name", min=0)
    class_weights: Literal["none", "inverse_sqrt", "median", "enet"] = setting(
        "none", "weight of each class in ce, focal and ohem, from how common it is in the training data"
    )
    label_smoothing: float = setting(0.0, "share of the truth that ce spreads over all classes", min=0, max=0.99)
    focal_gamma: float = setting(2.0, "focal: how little easy pixels count", min=0)
    ohem_threshold: float = setting(
        0.7, "ohem: pixels whose class is less probable than this are hard", min=0.01, max=1
    )
    ohem_min_kept: float = setting(0.0625, "ohem: so large a share of the pixels is hard in any case", min=0, max=1)


@dataclass
class VideoLossSettings(LossSettings):
    """The terms of `video`: focal, dice, iou, object."""

    weights: dict[str, float] = setting(
        {"focal": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0}, "weight of each term by name", min=0
    )


@dataclass
class InstanceLossSettings(LossSettings):
    """The terms of `instance`: class, box, giou, mask, dice."""

    weights: dict[str, float] = setting(
        {"class": 1.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}, "weight of each term by name", min=0
    )
    matching: dict[str, float] = setting(
        {"class": 2.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0}, "weight of each cost of a match", min=0
    )
    focal_alpha: float = setting(0.25, "exponent of p in the class target: p^alpha * IoU^(1 - alpha)", min=0, max=1)
    point_ratio: int = setting(16, "pixels of the predicted masks for each point that is looked at", min=1)


@dataclass
class ClassificationLossSettings(LossSettings):
    """The terms of `classification`: ce."""

    weights: dict[str, float] = setting({"ce": 1.0}, "weight of each term by name", min=0)
    label_smoothing: float = setting(0.0, "share of the truth that ce spreads over all classes", min=0, max=0.99)


@dataclass
class OptimizerSettings:
    """How the weights move."""

    name: str = setting("adamw", "adamw, adam, sgd, ranger, muon, or any of timm's names")
    lr: float = setting(1e-4, "peak learning rate", min=0)
    weight_decay: float = setting(1e-2, "weight decay", min=0)
    decay_norms: bool = setting(False, "decay norms and biases too, as the official BiRefNet does")
    betas: list[float] = setting([0.9, 0.999], "betas of Adam-like optimizers", min=0, max=1)
    momentum: float = setting(0.9, "momentum of SGD", min=0, max=1)
    backbone_lr_scale: float = setting(1.0, "learning-rate factor of the backbone", min=0)
    layer_decay: float = setting(1.0, "learning-rate factor per backbone layer away from the output", min=0, max=1)
    freeze: list[str] = setting([], "parameters not to train, by name prefix or pattern")


@dataclass
class SchedulerSettings:
    """How the learning rate moves, step by step."""

    name: Literal["constant", "poly", "cosine", "step", "multistep", "exponential", "plateau"] = setting(
        "cosine", "course of the learning rate after the warm-up"
    )
    warmup_steps: int = setting(0, "linear warm-up, in steps", min=0)
    min_factor: float = setting(0.0, "floor as a factor of the peak", min=0, max=1)
    power: float = setting(0.9, "power of poly", min=0)
    epochs: list[float] = setting([30], "step: period in epochs; multistep: the milestones", min=1)
    gamma: float = setting(0.1, "factor of step, multistep, plateau; per epoch for exponential", min=0, max=1)
    patience: int = setting(3, "plateau: validations without improvement", min=0)


@dataclass
class TrainSettings:
    """The loop."""

    epochs: int = setting(100, "epochs to train", min=1, volatile=True)
    max_steps: int = setting(0, "stop after so many optimizer steps; 0: by epochs", min=0, volatile=True)
    batch_size: int = setting(4, "samples per device and micro-step", min=1)
    grad_accum_steps: int = setting(1, "micro-steps per optimizer step", min=1)
    max_grad_norm: float = setting(0.0, "clip the gradient norm to this; 0: do not clip", min=0)
    mixed_precision: Literal["auto", "no", "fp16", "bf16", "fp8"] = setting(
        "auto", "forward precision; auto: bf16 where the device supports it, else no"
    )
    compile: bool = setting(False, "torch.compile the model's parts")
    channels_last: bool = setting(False, "channels-last memory layout")
    activation_checkpointing: bool = setting(False, "recompute activations in backward to save memory")
    cache_features: float = setting(
        0.0, "video: gigabytes of memory for what a frozen image encoder makes of frames, to be used again; 0: none",
        min=0, volatile=True,
    )  # fmt: skip
    deterministic: bool = setting(False, "deterministic CUDA algorithms: slower, bitwise resume on a GPU")
    sync_bn: bool = setting(False, "batch statistics over all ranks")
    freeze_bn: bool = setting(False, "keep batch-norm statistics as they are")
    ema_decay: float = setting(0.0, "decay of the averaged weights; 0: none", min=0, max=1)
    drop_path_schedule: Literal["constant", "linear"] = setting("constant", "linear: stochastic depth grows from zero")
    eval_each_epoch: int = setting(1, "validate every so many epochs; 0: never", min=0)
    steps_per_validation: int = setting(0, "validate every so many steps instead; 0: by epochs", min=0)
    resume_start_with_eval: bool = setting(
        False, "validate before the first step of a run that resumes or starts from weights", volatile=True
    )
    test_limit: int = setting(0, "validate on at most so many samples; 0: all", min=0)
    early_stopping: bool = setting(False, "stop when the monitored metric no longer improves", volatile=True)
    patience: int = setting(10, "validations without improvement before stopping", min=1, volatile=True)
    max_bad_steps: int = setting(20, "abort after so many non-finite steps in a row", min=1, volatile=True)


@dataclass
class CheckpointSettings:
    """What is kept on disk."""

    save_last: int = setting(1, "keep an epoch file for each of the last so many epochs", min=0, volatile=True)
    save_step: int = setting(1, "of these, every so many epochs", min=1, volatile=True)
    monitor: str = setting("", "metric that chooses best.pth, e.g. val/jaccard; empty: the task's own")
    every_minutes: float = setting(10, "save last.pth this often within an epoch; 0: never", min=0, volatile=True)
    every_steps: int = setting(0, "save last.pth every so many steps; 0: never", min=0, volatile=True)


@dataclass
class EvaluationSettings:
    """Validation and test."""

    metrics: list[str] = setting(
        [], "metrics beside the task's own, by name or group: standard, matting, all (binary)", volatile=True
    )
    batch_size: int = setting(0, "samples per device; 0: the training batch size", min=0)
    tta: bool = setting(False, "test-time augmentation: average over tta_scales and their mirror images")
    tta_scales: list[float] = setting([0.75, 1.0, 1.25], "scales of tta; 1 alone is a flip alone", min=0.1, max=4)
    max_detections: int = setting(100, "instance: objects of an image that are scored, the surest", min=1)
    convention: Literal["sav", "davis"] = setting(
        "sav",
        "video: score objects from their first frame on (sav, as MOSE), or those of the first frame alone (davis)",
    )

    @property
    def scales(self) -> list[float]:
        """The scales to average over; none without `tta`."""
        return self.tta_scales if self.tta else []


@dataclass
class LoggingSettings:
    """What is printed."""

    log_frequency: int = setting(10, "print a line every so many steps", min=1, volatile=True)
    color: Literal["auto", "always", "never"] = setting("auto", "coloured console lines", volatile=True)
    progress: bool = setting(True, "tqdm bars", volatile=True)
    red_below_jaccard: float = setting(0.95, "a line is red when the Jaccard index is below", volatile=True)
    green_above_bce_accuracy: float = setting(0.999, "green when the BCE accuracy is above", volatile=True)
    cyan_above_dice: float = setting(0.985, "cyan when Dice is above this as well", volatile=True)
    red_below_miou: float = setting(0.3, "semantic: red when mIoU is below", volatile=True)
    green_above_accuracy: float = setting(0.9, "semantic: green when the pixel accuracy is above", volatile=True)
    cyan_above_miou: float = setting(0.7, "semantic: cyan when mIoU is above this as well", volatile=True)
    red_below_iou: float = setting(0.5, "instance: red when the IoU of masks (or boxes) is below", volatile=True)
    green_above_class_accuracy: float = setting(0.9, "instance: green when so many classes are right", volatile=True)
    cyan_above_iou: float = setting(0.8, "instance: cyan when the IoU is above this as well", volatile=True)


@dataclass
class CometSettings:
    """Comet ML."""

    enable: bool = setting(False, "send the run to Comet ML", volatile=True)
    offline: bool = setting(False, "write an offline archive into the run folder instead", volatile=True)
    api_key: str = setting("", "account key; better in COMET_API_KEY or config_vars.yml", secret=True, volatile=True)
    workspace: str = setting("", "workspace", volatile=True)
    project_name: str = setting("", "project", volatile=True)


@dataclass
class WandbSettings:
    """Weights & Biases."""

    enable: bool = setting(False, "send the run to Weights & Biases", volatile=True)
    offline: bool = setting(False, "write offline files into the run folder instead", volatile=True)
    api_key: str = setting("", "account key; better in WANDB_API_KEY or config_vars.yml", secret=True, volatile=True)
    entity: str = setting("", "entity", volatile=True)
    project: str = setting("", "project", volatile=True)


@dataclass
class TrackingSettings:
    """Trackers."""

    tensorboard: bool = setting(False, "write TensorBoard files into the run folder", volatile=True)
    log_best_weights: bool = setting(False, "at the end upload best.pth to Comet ML and W&B", volatile=True)
    comet: CometSettings = field(default_factory=CometSettings)
    wandb: WandbSettings = field(default_factory=WandbSettings)


@dataclass
class DistributedSettings:
    """Several processes."""

    devices: int = setting(1, "start the same command on so many devices of this machine", min=1, volatile=True)
    exact_resume: bool = setting(True, "bitwise resume with three ranks and more, for about a percent of speed")
    timeout_minutes: float = setting(30, "a collective that takes longer ends the run", min=0.1, volatile=True)


# A family's row here, one in models/__init__.py and its file are all that a family is. What it changes of the defaults
# stands below it; `task` there is the one that it does where none is named.
FAMILY_SETTINGS: dict[str, type] = {
    "birefnet": BiRefNetSettings,
    "segformer": SegFormerSettings,
    "rfdetr": RFDETRSettings,
    "sam2": SAM2Settings,
    "classifier": ClassifierSettings,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "classifier": {"task": "classification", "data.size": [224, 224], "optimizer.lr": 1e-3, "train.batch_size": 32},
    "birefnet": {"task": "binary"},
    "segformer": {
        "task": "semantic",
        "data.size": [512, 512],
        "optimizer.lr": 6e-4,  # of the head; a tenth of it for the encoder
        "optimizer.backbone_lr_scale": 0.1,
        "scheduler.name": "poly",
        "scheduler.power": 1.0,
    },
    "rfdetr": {
        "task": "instance",
        "optimizer.lr": 1e-4,  # 0.7 of it for the decoder
        "optimizer.weight_decay": 1e-4,
        "optimizer.backbone_lr_scale": 0.735,  # 1.5e-4 for the encoder, times 0.7 squared
        "optimizer.layer_decay": 0.8,
        "scheduler.name": "step",
        "scheduler.epochs": [100],
        "train.max_grad_norm": 0.1,
        "train.ema_decay": 0.993,
    },
    "sam2": {
        "task": "video",
        "optimizer.lr": 5e-6,
        "optimizer.weight_decay": 0.1,
        "optimizer.backbone_lr_scale": 0.6,
        "optimizer.layer_decay": 0.9,
        "scheduler.min_factor": 0.1,
        "train.max_grad_norm": 0.1,
    },
}

# The loss section of each task.
TASK_SETTINGS: dict[str, type[LossSettings]] = {
    "binary": BinaryLossSettings,
    "semantic": SemanticLossSettings,
    "instance": InstanceLossSettings,
    "video": VideoLossSettings,
    "classification": ClassificationLossSettings,
}


@dataclass
class Config:
    """A run. Every field is a YAML key and a flag (`--optimizer.lr 3e-4`)."""

    experiment_name: str = setting("", "name of the run and its folder; empty: family_dataset_time", volatile=True)
    output_dir: str = setting("runs", "folder of all runs", path="file", volatile=True)
    resume: str = setting(
        "", "true: continue the run; auto: only if there is one; or a checkpoint", path="file?", transient=True
    )
    overwrite: bool = setting(False, "replace an existing run of this name", transient=True)
    task: Literal["binary", "semantic", "instance", "video", "classification"] = setting(
        "binary", "what is learnt; the default is the family's own"
    )
    seed: int = setting(7, "seed of everything random", min=0)
    seeds: list[int] = setting([], "train once with each of these and report mean and deviation", min=0, transient=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:\d+)?", volatile=True)
    model: BiRefNetSettings = field(default_factory=BiRefNetSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=BinaryLossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    @property
    def is_demo(self) -> bool:
        """Whether the run draws its own data: any data path turns that off."""
        return not (self.data.root or self.data.train or self.data.val or self.data.test)


# ---------------------------------------------------------------- the options of evaluate.py


@dataclass
class EvaluateSettings:
    """What evaluate.py is asked to do, beside the settings of a run. Every field is a flag."""

    checkpoint: list[str] = setting([], "run folders, checkpoints or official weights files to score", verbatim=True)
    predictions: list[str] = setting(
        [], "finished predictions of any program to score instead: folders of masks, or COCO results (.json)",
        verbatim=True,
    )  # fmt: skip
    ground_truth: str = setting(
        "", "the truth of --predictions: a folder of masks, a data set with gt/, one of clips, or a COCO .json"
    )
    resize_predictions: bool = setting(
        False, "bring masks of another size than the truth to its size (bilinear, label maps by nearest neighbour)"
    )
    compare: list[str] = setting(
        [], "two checkpoints, or with --ground_truth two folders of masks: is the second better?", verbatim=True
    )
    best_by: str = setting("", "metric that chooses the best row; a run folder then stands for all its epoch files")
    output: list[str] = setting([], "files for the table: .csv, .md and .tex", verbatim=True)
    output_samples: str = setting("", "a .csv file for the scores of every sample")
    output_results: str = setting(
        "", "instance: write the objects as COCO results, to this path with _bbox.json and _segm.json added"
    )
    output_masks: str = setting(
        "", "video: a folder for <clip>/<frame>.png, label maps as servers of benchmarks take them"
    )


# ---------------------------------------------------------------- the options of inference.py


@dataclass
class InferenceSettings:
    """What inference.py is asked to do. Every field is a flag."""

    checkpoint: str = setting("", "run folder, checkpoint, or official weights file")
    input: list[str] = setting([], "images, videos, folders with all below them, quoted patterns", verbatim=True)
    output: str = setting("", "folder for masks/<name>.png (8-bit alpha) and what else is asked for")
    size: list[int] = setting(
        [], "model input: width height, or one number; empty: the checkpoint's, else 1024 1024", min=1
    )
    batch_size: int = setting(4, "images or tiles per forward pass", min=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:\d+)?")
    mixed_precision: Literal["auto", "no", "fp16", "bf16", "fp8"] = setting(
        "auto", "forward precision; auto: bf16 where the device supports it, else no"
    )
    tta: bool = setting(False, "test-time augmentation: average over tta_scales and their mirror images")
    tta_scales: list[float] = setting([0.75, 1.0, 1.25], "scales of tta; 1 alone is a flip alone", min=0.1, max=4)
    tile: bool = setting(False, "predict at the picture's own resolution, in tiles of the model's input size")
    overlap: float = setting(0.25, "how much of a tile's side its neighbour shares, at least", min=0, max=0.9)
    cutout: bool = setting(False, "write cutouts/<name>.png: the object in its own colours, transparent around it")
    colors: bool = setting(True, "class masks in colours (PASCAL VOC's) beside the class ids; binary has none")
    overlay: bool = setting(True, "write overlays/<name>.jpg; --no-overlay: none")
    side_by_side: bool = setting(False, "write side_by_side/<name>.jpg: picture, mask, and cut-out or overlay")
    threshold: float | None = setting(
        None, "instance: least score; null: where F1 was best in validation, else 0.5", min=0, max=1
    )
    top_k: int = setting(100, "instance: at most so many objects of a picture", min=1)
    crops: bool = setting(False, "instance: write crops/<name>/<number>_<class>.png, each object in its box")
    num_workers: int = setting(-1, "decoding threads; -1: cores, at most 8", min=-1)
    prompts: str = setting(
        "", "video: .json of the objects to follow; without prompts everything in a picture is found"
    )
    point: list[str] = setting(
        [],
        "video: x,y on an object, x,y,0 beside it, in pixels; 2:x,y for the object 2; may be repeated",
        verbatim=True,
    )
    box: list[str] = setting([], "video: left,top,right,bottom of an object, 2:… for the object 2", verbatim=True)
    frame: int = setting(0, "video: the frame of point and box, counted from 0", min=0)
    points_per_side: int = setting(
        32, "video, without prompts: of the grid of points at which is looked", min=1, max=256
    )
    predicted_iou: float = setting(0.8, "video, without prompts: least quality of a mask by the model", min=0, max=1)
    stability: float = setting(0.95, "video, without prompts: least stability of a mask", min=0, max=1)
    annotate: Literal["none", "binary", "semantic", "instance"] = setting(
        "none", "video: also write the frames and what was found there as training data of this task, in annotations/"
    )
    annotate_every: int = setting(1, "of how many frames of a clip one is annotated", min=1)

    @property
    def scales(self) -> list[float]:
        """The scales to average over; none without `tta`."""
        return self.tta_scales if self.tta else []


# ---------------------------------------------------------------- the options of export.py


@dataclass
class ExportSettings:
    """What export.py is asked to do. Every field is a flag."""

    checkpoint: str = setting("", "run folder, checkpoint, or official weights file")
    format: Literal["onnx", "safetensors", "pth"] = setting(
        "onnx", "onnx: the model's graphs; safetensors, pth: weights in the official layout"
    )
    output: str = setting("", "the file; empty: one named after the run, beside its checkpoints")
    precision: Literal["fp32", "fp16"] = setting("fp32", "of weights, and in onnx of the arithmetic")
    opset: int = setting(0, "version of ONNX's operators; 0: the exporter's own", min=18)
    layout: str = setting("", "of the weights, where the family has several: huggingface or nvlabs (SegFormer)")
    images: list[str] = setting([], "pictures to compare graphs on; empty: drawn ones", verbatim=True)

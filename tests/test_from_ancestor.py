"""Settings of other programs become presets that load, say what they leave out, and are never run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import checkpoint
from ancestors.preset import beside
from ancestors.python_values import UNKNOWN, read_python
from config import Config, get_value
from config import load as load_config
from errors import UserError
from from_ancestor import translate
from models import create_model
from tests.helpers import run_script

BIREFNET = """
import math, os
class Config():
    def __init__(self) -> None:
        self.home = [os.path.expanduser('~'), '/mnt'][1]
        self.data_root_dir = os.path.join(self.home, 'sets')
        self.task = ['DIS5K', 'COD', 'General'][2]
        self.testsets = {'DIS5K': 'DIS-VD', 'General': ','.join(['one', 'two', 'three'][:2])}[self.task]
        everything = '+'.join([name for name in os.listdir('.')])
        self.training_set = {'DIS5K': 'DIS-TR', 'COD': everything, 'General': 'A+B'}[self.task]
        self.size = (1024, 768) if self.task not in ['General-2K'] else (2560, 1440)
        self.dynamic_size = [None, ((512-256, 1024), (256, 768))][1]
        self.background_color_synthesis = False
        self.load_all = False and self.dynamic_size is None
        self.mixed_precision = ['no', 'fp16', 'bf16', 'fp8'][2]
        self.ms_supervision = True
        self.out_ref = self.ms_supervision and True
        self.cxt_num = [0, 3][1]
        self.mul_scl_ipt = ['', 'add', 'cat'][0]
        self.dec_att = ['', 'ASPP', 'ASPPDeformable'][0]
        self.squeeze_block = 'BasicDecBlk_x1'
        self.dec_channels_inter = ['fixed', 'adap'][1]
        self.batch_size = 16
        self.finetune_last_epochs = [0, {'DIS5K': -40, 'General': -20}[self.task]][1]
        self.lr = (1e-4 if 'DIS5K' in self.task else 1e-5) * math.sqrt(self.batch_size / 4)
        self.bb = ['resnet50', 'swin_v1_t', 'pvt_v2_b0'][1]
        self.optimizer = ['Adam', 'AdamW'][1]
        self.lr_decay_epochs = [-30]
        self.lr_decay_rate = 0.5
        if self.task in ['General']:
            self.lambdas_pix_last = {'bce': 30 * 1, 'iou': 0.5 * 1, 'mae': 100 * 1, 'triplet': 3 * 1, 'cnt': 5 * 0}
        else:
            self.lambdas_pix_last = {'bce': 1}
        self.rand_seed = 11
        self.a_thing_of_my_own = 'blue'
        for line in open('train.sh'):
            self.save_last = int(line)
"""
CONFIG_VARS = """
resume_weights_path: weights.pth
log_frequency: 25
max_samples: 500
comet_ml_enable: true
comet_ml_api_key: "a-key-that-nobody-may-see"
"""
TRAIN_SH = """
case "${task}" in
    'DIS5K') epochs=500 && val_last=50 && step=5 ;;
    'General') epochs=200 && val_last=40 && step=4 ;;
esac
"""
SAM2 = """
# @package _global_
scratch: {resolution: 512, batch: 2, frames: 4, base_lr: 5.0e-6, vision_lr: 1.0e-6, epochs: 3, phases: 4}
trainer:
  _target_: training.trainer.Trainer
  max_epochs: ${times:${scratch.epochs},${scratch.phases}}
  seed_value: 5
  model:
    image_size: ${scratch.resolution}
    image_encoder: {trunk: {embed_dim: 96, num_heads: 1, stages: [1, 2, 11, 2], drop_path_rate: 0.2}}
    num_maskmem: 9
    prob_to_use_pt_input_for_train: 0.75
    num_correction_pt_per_frame: 3
  data:
    train:
      batch_sizes: ["${scratch.batch}"]
      datasets:
        - dataset:
            datasets:
              - video_dataset: {img_folder: /sets/MOSE/JPEGImages, gt_folder: /sets/MOSE/Annotations/}
                sampler: {num_frames: "${scratch.frames}", max_num_objects: 5}
                multiplier: 2
  optim:
    amp: {enabled: True, amp_dtype: bfloat16}
    gradient_clip: {max_norm: 0.2}
    options:
      lr:
        - scheduler: {start_value: "${scratch.base_lr}", end_value: "${divide:${scratch.base_lr},10}"}
        - scheduler: {start_value: "${scratch.vision_lr}", end_value: "${divide:${scratch.vision_lr},10}"}
          param_names: ['image_encoder.*']
  loss: {all: {weight_dict: {loss_mask: 10, loss_dice: 2}}}
"""
BASE = """
optimizer = dict(type='SGD', lr=0.01)
runner = dict(type='IterBasedRunner', max_iters=8000)
crop_size = (256, 512)
"""
NVLABS = """
_base_ = ['../base.py']
model = dict(
    backbone=dict(type='mit_b2', style='pytorch'),
    decode_head=dict(num_classes=7, dropout_ratio=0.2, loss_decode=[
        dict(type='CrossEntropyLoss', loss_weight=1.0), dict(type='DiceLoss', loss_weight=3.0)]))
optimizer = dict(_delete_=True, type='AdamW', lr=0.00006, weight_decay=0.05,
                 paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.), 'head': dict(lr_mult=10.)}))
lr_config = dict(policy='poly', warmup='linear', warmup_iters=100, power=1.0, min_lr=6e-7, by_epoch=False)
data = dict(samples_per_gpu=2, train=dict(data_root='data/ade', pipeline=[dict(reduce_zero_label=True)]))
evaluation = dict(interval=500)
"""
LATER = """
crop_size = (512, 512)
model = dict(backbone=dict(type='MixVisionTransformer', embed_dims=64, num_layers=[3, 4, 18, 3]),
             decode_head=dict(num_classes=19, loss_decode=dict(type='CrossEntropyLoss')))
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.95)),
                     paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.))))
param_scheduler = [dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
                   dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
train_dataloader = dict(batch_size=4, num_workers=2)
"""
HUGGING_FACE = {
    "model_type": "segformer", "hidden_sizes": [64, 128, 320, 512], "depths": [2, 2, 2, 2],
    "id2label": {"0": "wall", "1": "floor"}, "drop_path_rate": 0.05, "semantic_loss_ignore_index": 0,
}  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    """A folder of text files, `config__py` for `config.py`; returns the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(text)
    return path


def write_rfdetr(folder: Path) -> Path:
    """A checkpoint as the package leaves it."""
    with torch.device("meta"):
        model = create_model("rfdetr", variant="nano", num_classes=3, groups=2, num_queries=10)
    weights = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in model.official_state_dict().items()}
    args = argparse.Namespace(
        lr=2e-4, lr_encoder=1e-4, lr_component_decay=0.7, resolution=312, multi_scale=True, expanded_scales=False,
        epochs=30, lr_scheduler="cosine", lr_drop=100, use_ema=False, dataset_file="roboflow", dataset_dir="/sets/mine",
        bbox_loss_coef=4, warmup_epochs=1.0, hidden_dim=256, output_dir=Path("out"), do_random_resize_via_padding=True,
    )  # fmt: skip
    torch.save({"model": weights, "args": args}, folder / "checkpoint_best_total.pth")
    return folder / "checkpoint_best_total.pth"


def load_again(monkeypatch: pytest.MonkeyPatch, preset: Path) -> dict[str, Any]:
    """What the command makes of a preset."""
    code, out, err = run_script(monkeypatch, "train", "--config", str(preset), "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


def check(monkeypatch: pytest.MonkeyPatch, source: Path, expected: dict[str, Any], left_out: list[str]) -> Config:
    """Make a preset with the command, load it with the command, and compare."""
    preset = source.parent / "made.yml"
    code, out, err = run_script(monkeypatch, "train", "--from_ancestor", str(source), str(preset))
    assert code == 0, err
    config = load_config([], [str(preset)])
    found = {key: get_value(config, key) for key in expected}
    assert found == {key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                     for key, value in expected.items()}  # fmt: skip
    loaded = load_again(monkeypatch, preset)
    assert (loaded["task"], loaded["model"]["family"]) == (config.task, config.model.family)
    text = preset.read_text()
    for words in left_out:
        assert f"# - {words}" in text
        assert f"  {words}" in out
    return config


def test_birefnet_with_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "birefnet", config_vars__yml=CONFIG_VARS, train__sh=TRAIN_SH, weights__pth="").parent
    source = write(folder, config__py=BIREFNET)
    config = check(
        monkeypatch,
        source,
        {
            "task": "binary", "model.family": "birefnet", "model.backbone": "swin_v1_t", "model.context": 3,
            "model.multi_scale_input": "none", "model.decoder_attention": "none", "model.decoder_channels": "adaptive",
            "model.pretrained": str(folder / "weights.pth"), "data.root": "/mnt/sets/General", "data.train": "A+B",
            "data.val": "one+two", "data.size": [1024, 768], "data.max_samples": 500, "train.batch_size": 16,
            "train.epochs": 200, "train.mixed_precision": "bf16", "optimizer.lr": 2e-5, "optimizer.decay_norms": True,
            "scheduler.name": "multistep", "scheduler.epochs": [171], "scheduler.gamma": 0.5, "loss.last_epochs": 20,
            "checkpoint.save_last": 40, "checkpoint.save_step": 4, "seed": 11, "logging.log_frequency": 25,
        },
        ["lambdas_pix_last.triplet: 3", "a_thing_of_my_own: 'blue'", "comet_ml_api_key: '***'"],
    )  # fmt: skip
    assert config.loss.weights == {"bce": 30, "iou": 8, "mae": 100, "gradient": 1}
    assert config.loss.last_epochs_factors == {"bce": 0, "iou": 0.5, "mae": 0.9}
    assert config.data.dynamic_size == [[256, 1024], [256, 768]]
    assert "nobody-may-see" not in (folder / "made.yml").read_text()


def test_what_only_running_would_tell_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, config__py=BIREFNET.replace("'General'][2]", "'General'][1]"))
    preset = translate(source)
    assert "data.train" not in preset.values
    assert "training_set: what only running the file would tell" in preset.left_out
    assert "save_last: what only running the file would tell" in preset.left_out


def test_the_forks_own_file_alone(tmp_path: Path) -> None:
    preset = translate(write(tmp_path, config_vars__yml=CONFIG_VARS))
    assert preset.values.keys() == {
        "model.pretrained",
        "logging.log_frequency",
        "data.max_samples",
        "tracking.comet.enable",
    }


def test_sam2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = check(
        monkeypatch,
        write(tmp_path, finetune__yaml=SAM2),
        {
            "task": "video", "model.family": "sam2", "model.variant": "small", "model.drop_path": 0.2,
            "model.pretrained": "official", "model.point_prompts": 0.75, "model.correction_clicks": 3,
            "data.size": [512, 512], "data.train": "/sets/MOSE", "data.clip.frames": 4, "data.clip.objects": 5,
            "data.clip.reverse": 0, "train.batch_size": 2, "train.epochs": 12, "train.max_grad_norm": 0.2,
            "train.mixed_precision": "bf16", "optimizer.lr": 5e-6, "optimizer.backbone_lr_scale": 0.2,
            "scheduler.name": "cosine", "scheduler.min_factor": 0.1, "seed": 5,
        },
        ["trainer.model.num_maskmem: 9 (always 7 here)", "multiplier: 2.0"],
    )  # fmt: skip
    assert (config.loss.weights["focal"], config.loss.weights["dice"]) == (10, 2)


def test_segformer_of_nvlabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, base__py=BASE)
    config = check(
        monkeypatch,
        write(tmp_path / "b2", ade__py=NVLABS),
        {
            "task": "semantic", "model.family": "segformer", "model.variant": "b2", "model.num_classes": 7,
            "model.dropout": 0.2, "model.norm_eps": 1e-6, "data.size": [512, 256], "train.max_steps": 8000,
            "train.batch_size": 2, "train.steps_per_validation": 500, "optimizer.name": "adamw", "optimizer.lr": 6e-4,
            "optimizer.backbone_lr_scale": 0.1, "optimizer.weight_decay": 0.05, "scheduler.name": "poly",
            "scheduler.warmup_steps": 100, "scheduler.min_factor": 0.01,
        },
        ["reduce_zero_label: True", "data.train.data_root: 'data/ade'"],
    )  # fmt: skip
    assert config.loss.weights == {"ce": 1, "dice": 3}


def test_segformer_of_a_later_mmsegmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(
        monkeypatch,
        write(tmp_path, city__py=LATER),
        {
            "model.variant": "b3", "model.num_classes": 19, "train.batch_size": 4, "train.max_steps": 160000,
            "train.mixed_precision": "fp16", "optimizer.lr": 6e-4, "optimizer.betas": [0.9, 0.95],
            "scheduler.name": "poly", "scheduler.power": 1, "scheduler.warmup_steps": 1500,
        },
        [],
    )  # fmt: skip


def test_segformer_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"size": {"height": 512, "width": 640}, "do_reduce_labels": True}
    write(tmp_path, preprocessor_config__json=json.dumps(sizes), model__safetensors="")
    check(
        monkeypatch,
        write(tmp_path, config__json=json.dumps(HUGGING_FACE)),
        {
            "model.variant": "b1", "model.num_classes": 2, "model.drop_path": 0.05, "model.norm_eps": 1e-5,
            "model.pretrained": str(tmp_path / "model.safetensors"), "data.size": [640, 512],
        },
        ["semantic_loss_ignore_index: 0 (always 255 here)", "do_reduce_labels: True"],
    )  # fmt: skip


def test_rfdetr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rfdetr(tmp_path)
    config = check(
        monkeypatch,
        source,
        {
            "task": "instance", "model.family": "rfdetr", "model.variant": "nano", "model.masks": True,
            "model.num_classes": 3, "model.groups": 2, "model.num_queries": 10, "model.pretrained": str(source),
            "data.size": [312, 312], "data.train": "/sets/mine/train/_annotations.coco.json", "train.epochs": 30,
            "train.ema_decay": 0, "optimizer.lr": 2e-4, "optimizer.backbone_lr_scale": 0.245,
            "scheduler.name": "cosine",
        },
        ["warmup_epochs: 1.0", "do_random_resize_via_padding: True"],
    )  # fmt: skip
    assert config.data.dynamic_size == [[276, 360]]
    assert config.loss.weights["box"] == 4


# --- Python files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[1, 2, 3][-1]", 3),
        ("{'a': 1}['a'] + 2 ** 3", UNKNOWN),
        ("(1024, 1024) if 'x' in 'xyz' else None", (1024, 1024)),
        ("[4096] * 4", [4096] * 4),
        ("not (1 < 2 <= 2)", False),
        ("'a,b'.split(',')", ["a", "b"]),
        ("dict(a=1, **dict(b=[2]))", {"a": 1, "b": [2]}),
        ("None is None and 'yes'", "yes"),
        ("'x' * 10**9", UNKNOWN),
        ("'x' * 1000000000", UNKNOWN),
        ("1000000000 * 1000000000 * 1000000000", UNKNOWN),
        ("'%1000000000d' % 1", UNKNOWN),
        ("1 / 0", UNKNOWN),
        ("[1][5]", UNKNOWN),
        ("nobody", UNKNOWN),
        ("open('/etc/passwd').read()", UNKNOWN),
        ("().__class__.__bases__", UNKNOWN),
        ("[x for x in (1, 2)]", UNKNOWN),
    ],
)
def test_values_of_expressions(tmp_path: Path, expression: str, value: Any) -> None:
    found = read_python(write(tmp_path, a__py=f"before = 1\nvalue = {expression}"))["value"]
    assert found is UNKNOWN if value is UNKNOWN else found == value


def test_statements_that_are_not_followed_make_names_unknown(tmp_path: Path) -> None:
    text = """
a, b = 1, 2
c = d = [0, 0]
d[1] = a
e = {'x': 1}
for i in range(3):
    e[i] = i
if nobody_knows:
    a = 5
b += 1
"""
    found = read_python(write(tmp_path, a__py=text))
    assert found == {"a": UNKNOWN, "b": 3, "c": [0, 1], "d": [0, 1], "e": UNKNOWN, "i": UNKNOWN}


def test_nothing_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"""
import os
open({str(canary)!r}, 'w')
bb = [os.system('touch {canary}'), 'resnet50'][1]
class Config:
    open({str(canary)!r}, 'w')
    bb = __import__('os').system('touch {canary}') or 'resnet50'
    def __init__(self):
        self.bb = 'resnet50'
        self.lr = eval("open({str(canary)!r}, 'w')")
"""
    preset = translate(write(tmp_path, config__py=text))
    assert preset.values["model.backbone"][0] == "resnet50"
    assert not canary.exists()


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def doubled(line: str) -> str:
    """Forty lines, each of which doubles what the one before had."""
    return "\n".join(line.format(number, number + 1) for number in range(40))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.py", "def f(:", "no Python file, line 1"),
        ("a.py", "x = 1", "sets up no BiRefNet and no SegFormer"),
        ("a.py", "x = " + "-" * 50_000 + "1", "can be read"),
        ("a.py", "x = '\0'", "no Python file"),
        ("a.py", "_base_ = 'a.py'", "or on itself"),
        ("a.py", "_base_ = ['a.py', 'a.py']", "more than 30 files"),
        ("a.py", "_base_ = '/dev/zero'", "nor any file"),
        ("a.py", "_base_ = '\\0'", "can be read"),
        ("a.py", "bb = 'x'\na = {'k': 1}\na['k'] = a", "makes more than 100000 values"),
        ("a.py", "_base_ = 'gone.py'\nmodel = dict(backbone=dict(type='mit_b0'))", "cannot read"),
        ("a.json", "[]", "no configuration of a SegFormer"),
        ("a.json", json.dumps({**HUGGING_FACE, "depths": [1, 1, 1, 1]}), "none of the sizes b0 to b5"),
        ("a.yaml", "trainer: {model: {image_encoder: {trunk: {embed_dim: 7}}}}", "trains no SAM 2"),
        ("a.yaml", "trainer: {model: {image_encoder: {trunk: {embed_dim: .inf}}}}", "trains no SAM 2"),
        ("a.yaml", "trainer: &t {x: *t}", "anchors make more of it"),
        ("a.yaml", "a0: &a0 {k: 1}\n" + doubled("a{1}: &a{1} {{x: *a{0}, y: *a{0}}}"), "anchors make more of it"),
        ("a.yaml", "- 1", "must hold a mapping"),
        ("a.pth", "no weights", "cannot be read as plain weights"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        translate(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--from_ancestor"], "--from_ancestor needs a file"),
        (["--from_ancestor", "gone.py"], "no file gone.py"),
        (["--from_ancestor", "HERE"], "holds no config.py"),
        (["--from_ancestor", "HERE/config_vars.yml", "HERE/old.yml"], "old.yml exists already"),
        (["--from_ancestor", "HERE/config_vars.yml", "--lr", "1"], "--lr: --from_ancestor takes no settings"),
    ],
)
def test_mistakes_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    if "HERE" not in arguments:
        write(tmp_path, config_vars__yml=CONFIG_VARS, old__yml="kept")
    monkeypatch.chdir(tmp_path)
    code, _, err = run_script(monkeypatch, "train", *(word.replace("HERE", str(tmp_path)) for word in arguments))
    assert code == 2
    assert sentence in err
    assert {file.name for file in tmp_path.iterdir()} <= {"config_vars.yml", "old.yml"}


STRANGE = [
    "None",
    "-1",
    "'x'",
    "[]",
    "{}",
    "1e999",
    "'\\u2028a: b'",
    "(1, 'a')",
    "True",
    "[[]]",
    "UNHEARD",
    "b'1'",
    "{1: {}}",
]


def test_values_that_double_themselves_cost_nothing(tmp_path: Path) -> None:
    """Lists hold one list again and again: written out, or compared, they would outlast everybody."""
    twins = "a0 = b0 = [1]\n" + doubled("a{1} = [a{0}, a{0}]\nb{1} = [b{0}, b{0}]")
    read_python(write(tmp_path, a__py=f"{twins}\nx = a40 == b40"))
    for attack in (f"{twins}\nx = str(a12)", "x = str([[[0] * 9999] * 9999] * 9999)"):
        assert read_python(write(tmp_path, a__py=attack))["x"] is UNKNOWN


def test_paths_that_no_file_can_have_are_no_files(tmp_path: Path) -> None:
    for path in ("~nobody_at_all/x", "x" * 5000, "a\0b", "\ud800"):
        assert beside(path, tmp_path / "a.py") == ""


def test_strange_values_are_left_out_or_refused(tmp_path: Path) -> None:
    """Each setting of BiRefNet's in turn: what comes out is YAML, or there is a sentence."""
    names = [line.split("=")[0].strip() for line in BIREFNET.splitlines() if line.strip().startswith("self.")]
    for number, name in enumerate(names):
        strange = STRANGE[number % len(STRANGE)]
        source = write(tmp_path, config__py=f"{BIREFNET}\n        {name} = {strange}\n")
        try:
            preset = translate(source)
        except UserError:
            continue
        loaded = yaml.safe_load(preset.text(source))
        assert loaded["model"]["family"] == "birefnet"


def test_options_of_any_kind_end_in_a_preset_or_a_sentence(tmp_path: Path) -> None:
    content = checkpoint.load_weights(write_rfdetr(tmp_path))
    file = tmp_path / "odd.pth"
    odd = {"lr": torch.ones(2), "dataset_dir": b"x", "multi_scale": [torch.ones(2)], "more": {"epochs": torch.ones(2)}}
    for args in (5, None, "x", [1], torch.ones(3), odd, {1: 2, (1, 2): 3}, argparse.Namespace(lr=1e400)):
        torch.save({**content, "args": args}, file)
        assert translate(file).values["model.num_classes"][0] == 3
    endless: dict[str, Any] = {}
    endless["x"] = endless
    torch.save({**content, "args": endless}, file)
    with pytest.raises(UserError, match="hold more than 100000 values"):
        translate(file)


def test_a_checkpoint_without_options_is_continued_from_its_shapes(tmp_path: Path) -> None:
    content = checkpoint.load_weights(write_rfdetr(tmp_path))
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    preset = translate(tmp_path / "bare.pth")
    assert preset.values["model.num_classes"][0] == 3
    assert "args: None (the file holds weights alone)" in preset.left_out

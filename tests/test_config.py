"""Settings from defaults, presets, the user's own file and flags: who wins, what is refused, what is written down."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import config
from config import Config, as_dict, differences, from_dict, get_value, known_keys, load, to_yaml
from errors import UserError
from tests.helpers import ROOT

KEYS = known_keys("birefnet")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of the user, no launcher's variable, no keys in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(tmp_path / "absent.yml"))
    for name in ("ACCELERATE_MIXED_PRECISION", "COMET_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, content: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_each_layer_wins_over_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = yaml.safe_load((ROOT / "configs" / "birefnet_demo.yml").read_text())
    assert load([]).train.epochs == demo["train"]["epochs"] != Config().train.epochs
    assert load(["--data.train", "x"]).train.epochs == Config().train.epochs  # data paths turn the demo off
    one = write(tmp_path / "one.yml", {"train": {"epochs": 31, "batch_size": 3}, "optimizer": {"lr": 0.3}})
    two = write(tmp_path / "two.yml", {"train": {"batch_size": 5}, "optimizer": {"lr": 0.5}})
    files = ["--config", str(one), str(two)]
    made = load(files)
    assert (made.train.epochs, made.train.batch_size, made.optimizer.lr) == (31, 5, 0.5)
    assert load(["--config", str(two), str(one)]).train.batch_size == 3
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(write(tmp_path / "vars.yml", {"lr": 0.7, "seed": 3})))
    made = load(files)
    assert (made.train.batch_size, made.optimizer.lr, made.seed) == (5, 0.7, 3)
    made = load([*files, "--lr", "0.9", "--optimizer.lr", "0.95"])
    assert (made.train.batch_size, made.optimizer.lr, made.seed) == (5, 0.95, 3)


def test_the_user_file_lies_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKWRIGHT_CONFIG_VARS")
    write(tmp_path / "config_vars.yml", {"seed": 12345})
    assert load([]).seed == 12345


def test_accelerate_says_the_precision_between_presets_and_the_users_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load([]).train.mixed_precision == "auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    preset = write(tmp_path / "p.yml", {"train": {"mixed_precision": "fp16"}})
    assert load(["--config", str(preset)]).train.mixed_precision == "bf16"
    assert load(["--precision", "16-mixed"]).train.mixed_precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp7")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION"):
        load([])


def test_every_key_is_documented_and_is_a_flag() -> None:
    assert len(KEYS) > 80
    for key in KEYS.values():
        assert len(key.metadata["doc"]) > 5, key.path
        value = key.default
        if isinstance(value, (list, dict)):
            text = yaml.safe_dump(value, default_flow_style=True).strip()
        else:
            text = "null" if value is None else str(value)
        if key.path == "model.family":
            continue
        made = load(["--data.train", "x", f"--{key.path}={text}"])
        expected = "x" if key.path == "data.train" and not value else value
        found = get_value(made, key.path)
        if key.metadata.get("path") and value:
            assert Path(found).name == value or found == value
        elif key.path != "data.train":
            assert found == expected, key.path


ALIASES = [
    ("--lr 3e-4", "optimizer.lr", 3e-4),
    ("--optimizer.lr=6e-5", "optimizer.lr", 6e-5),
    ("--epochs 7", "train.epochs", 7),
    ("--max-epochs 7", "train.epochs", 7),
    ("--max_epochs=7", "train.epochs", 7),
    ("--batch_size 2", "train.batch_size", 2),
    ("--batch-size 2", "train.batch_size", 2),
    ("--seed 11", "seed", 11),
    ("--grad_clip 1.5", "train.max_grad_norm", 1.5),
    ("--resume", "resume", "true"),
    ("--resume true", "resume", "true"),
    ("--resume auto", "resume", "auto"),
    ("--no-resume", "resume", ""),
    ("--resume /a/b.pth", "resume", "/a/b.pth"),
    ("--compile", "train.compile", True),
    ("--compile false", "train.compile", False),
    ("--mixed_precision bf16", "train.mixed_precision", "bf16"),
    ("--mixed-precision no", "train.mixed_precision", "no"),
    ("--precision 16-mixed", "train.mixed_precision", "fp16"),
    ("--precision bf16-mixed", "train.mixed_precision", "bf16"),
    ("--precision 32", "train.mixed_precision", "no"),
    ("--device cpu", "device", "cpu"),
    ("--accelerator gpu", "device", "cuda"),
    ("--accelerator cpu", "device", "cpu"),
    ("--devices 2", "distributed.devices", 2),
    ("--image_path /data/x", "data.train", "/data/x"),
    ("--tta", "evaluation.tta", True),
    ("--no-tta", "evaluation.tta", False),
    ("--no-wandb", "tracking.wandb.enable", False),
    ("--use_wandb", "tracking.wandb.enable", True),
    ("--use_tensorboard", "tracking.tensorboard", True),
    ("--use-tensorboard true", "tracking.tensorboard", True),
    ("--early_stopping", "train.early_stopping", True),
    ("--patience 4", "train.patience", 4),
    ("--test_limit 9", "train.test_limit", 9),
    ("--steps_per_validation 50", "train.steps_per_validation", 50),
    ("--steps-per-validation=50", "train.steps_per_validation", 50),
    ("--eval_each_epoch 2", "train.eval_each_epoch", 2),
    ("--resume_start_with_eval", "train.resume_start_with_eval", True),
    ("--resume_weights_path /w.pth", "model.pretrained", "/w.pth"),
    ("--log_frequency 25", "logging.log_frequency", 25),
    ("--max_samples 100", "data.max_samples", 100),
    ("--comet_ml_enable true", "tracking.comet.enable", True),
    ("--comet_ml_api_key k", "tracking.comet.api_key", "k"),
    ("--comet_ml_workspace w", "tracking.comet.workspace", "w"),
    ("--comet_ml_project_name p", "tracking.comet.project_name", "p"),
    ("--save_last 3", "checkpoint.save_last", 3),
    ("--data.size 128 64", "data.size", [128, 64]),
    ("--data.size 96", "data.size", [96, 96]),
    ("--data.size=[96,64]", "data.size", [96, 64]),
    ("--size 64,96", "data.size", [64, 96]),
    ("--model.drop_path null", "model.drop_path", None),
    ("--model.drop_path 0.1", "model.drop_path", 0.1),
    ("--model.freeze_backbone true", "model.freeze_backbone", True),
    ("--loss.weights {bce:\t1e-1}", "loss.weights", {"bce": 0.1}),
    ("--data.dynamic_size [[32,64],[64,96]]", "data.dynamic_size", [[32, 64], [64, 96]]),
    ("--dist True", "distributed.devices", 1),
    ("--use_accelerate", "distributed.devices", 1),
    ("--train.ema_decay 1", "train.ema_decay", 1.0),
]


@pytest.mark.parametrize(("flags", "path", "expected"), ALIASES, ids=[flags for flags, _, _ in ALIASES])
def test_flags_and_their_other_names(flags: str, path: str, expected: Any) -> None:
    words = [word.replace("\t", " ") for word in flags.split(" ")]
    found = get_value(load(["--data.val", "x", *words]), path)
    assert found == expected
    assert type(found) is type(expected) or expected == 2


def test_flat_names_in_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {
        "resume_weights_path": "path_to_a_pth", "resume_start_with_eval": True, "log_frequency": 5,
        "eval_each_epoch": 3, "max_samples": 8, "comet_ml_enable": False, "comet_ml_api_key": "secret-1",
        "comet_ml_workspace": "me", "comet_ml_project_name": "it", "wandb": False, "dist": True,
    }  # fmt: skip
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(write(tmp_path / "v.yml", flat)))
    made = load([])
    assert (made.resume, made.train.resume_start_with_eval, made.logging.log_frequency) == ("", True, 5)
    assert (made.train.eval_each_epoch, made.data.max_samples) == (3, 8)
    assert made.tracking.comet == config.get_value(made, "tracking.comet")
    assert made.tracking.comet.api_key == "secret-1"
    assert made.is_demo


def test_yaml_numbers_lists_and_nulls(tmp_path: Path) -> None:
    text = (
        "optimizer: {lr: 6e-5, betas: [0.9, 95e-2]}\nmodel: {drop_path: null}\ntrain: {mixed_precision: no}\n"
        "data:\n  augment:\n  - {name: HorizontalFlip, p: 5e-1}\n  - {name: A, x: {y: [1E+1, v1e3]}}\n"
        "experiment_name: 12e3\nloss: {weights: {bce: 3e1}}\nscheduler:\n"
    )
    made = load(["--config", str(write(tmp_path / "a.yml", text))])
    assert made.optimizer.lr == 6e-5
    assert made.optimizer.betas == [0.9, 0.95]
    assert made.model.drop_path is None
    assert made.train.mixed_precision == "no"
    assert made.data.augment == [{"name": "HorizontalFlip", "p": 0.5}, {"name": "A", "x": {"y": [10.0, "v1e3"]}}]
    assert made.experiment_name == "12e3"
    assert made.loss.weights == {"bce": 30.0}


WRONG = [
    (["--optimiser.lr", "1"], "unknown key optimiser.lr (from flag --optimiser.lr) (did you mean optimizer.lr?)"),
    (["--epoch", "3"], "(did you mean epochs?)"),
    (["--model.backbone", "swin_v1_x"], "model.backbone (from flag --model.backbone) is 'swin_v1_x'"),
    (["--model.backbone", "resnet5"], "did you mean resnet50?"),
    (["--epochs", "many"], "train.epochs (from flag --epochs) is 'many', but must be a whole number"),
    (["--epochs", "2.5"], "must be a whole number"),
    (["--epochs", "0"], "must be at least 1"),
    (["--lr", "nan"], "must be a number"),
    (["--lr", "-1"], "must be at least 0"),
    (["--model.dropout", "1.5"], "must be at least 0 and at most 1"),
    (["--compile", "perhaps"], "must be true or false"),
    (["--compile=3"], "must be true or false"),
    (["--lr"], "--lr needs a value: a number"),
    (["--lr", "1", "2"], "--lr takes one value, not 2"),
    (["--model", "x"], "is a section of settings"),
    (["lr", "1"], "unexpected argument 'lr'"),
    (["--data.size", "64", "64", "64"], "must be [width, height]"),
    (["--data.fold", "5/5", "--data.train", "x"], "must be K/N"),
    (["--data.fold", "a"], "does not match"),
    (["--optimizer.betas", "0.9"], "must be two numbers"),
    (["--experiment_name", "../x"], "is a folder name"),
    (["--model.family", "birefnit"], "did you mean birefnet?"),
    (["--config", "absent.yml"], "no configuration absent.yml"),
    (["--config", "birefnet_demp"], "did you mean birefnet_demo?"),
    (["--model.squeeze_block", "Foo_x1"], "does not match"),
    (["--device", "tpu"], "does not match"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_is_wrong_is_said_with_key_source_and_way_out(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as raised:
        load(flags)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


FILES = [
    ("optimizer: {lrr: 1}", ["unknown key optimizer.lrr", "did you mean optimizer.lr?"]),
    ("trian: {epochs: 1}", ["unknown key trian", "did you mean train"]),
    ("train: {epochs: x}", ["train.epochs", "'x'", "a whole number"]),
    ("train: 3", ["train", "is a section and must hold a mapping"]),
    ("train:\n  epochs: 1\n  epochs: 2", ["epochs stands twice", "line 3"]),
    ("lr: 1\noptimizer: {lr: 2}", ["sets optimizer.lr, which stands there already"]),
    ("- a\n- b", ["must hold a mapping of settings, not list"]),
    ("a: [1", ["is not valid YAML"]),
    ("? [a]\n: 1", ["is not valid YAML"]),
]


@pytest.mark.parametrize(("text", "said"), FILES, ids=[text for text, _ in FILES])
def test_mistakes_in_files_name_the_file(
    text: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "mine.yml", text)
    with pytest.raises(UserError) as raised:
        load(["--config", str(file)])
    assert all(part in str(raised.value) for part in [*said, str(file)])
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(file))
    with pytest.raises(UserError) as raised:
        load([])
    assert all(part in str(raised.value) for part in [*said, str(file)])


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for tag in (
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/new:subprocess.check_output [[touch, {canary}]]",
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
        "!!python/name:os.system",
        "!!python/module:os",
    ):
        with pytest.raises(UserError, match="not valid YAML"):
            load(["--config", str(write(tmp_path / "evil.yml", f"seed: {tag}"))])
        with pytest.raises(UserError, match=r"loss\.weights"):
            load(["--loss.weights", "{bce: " + tag + "}"])
    assert not canary.exists()


def test_relative_paths_count_from_who_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, here = tmp_path / "place", tmp_path / "here"
    for folder in (place / "sets" / "a", place / "sets" / "b", here / "sets" / "a"):
        folder.mkdir(parents=True)
    (place / "w.pth").write_text("")
    file = write(
        place / "my.yml",
        "data: {train: 'sets/a:0.5+sets/b+named', root: sets}\noutput_dir: out\nresume: w.pth\n"
        "model: {pretrained: weights/x.pth}\n",
    )
    monkeypatch.chdir(here)
    made = load(["--config", str(file)])
    assert made.data.train == f"{place}/sets/a:0.5+{place}/sets/b+named"
    assert made.data.root == f"{place}/sets"
    assert made.output_dir == f"{place}/out"
    assert made.resume == f"{place}/w.pth"
    assert made.model.pretrained == f"{place}/weights/x.pth"
    made = load(["--config", str(file), "--data.train", "sets/a", "--output_dir", "out", "--model.pretrained", "none"])
    assert (made.data.train, made.output_dir) == (f"{here}/sets/a", f"{here}/out")
    assert made.model.pretrained == "none"


def test_what_is_written_down_comes_back_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-of-the-environment")
    flags = ["--comet_ml_api_key", "canary-1", "--tracking.wandb.api_key=canary-2", "--lr", "6e-5", "--data.train", "x",
             "--model.drop_path", "null", "--data.augment", "[{name: HorizontalFlip, p: 0.5}]", "--resume",
             "--output_dir", "/runs"]  # fmt: skip
    made = load(flags)
    assert {"canary-1", "canary-2", "canary-of-the-environment"} == set(config.secret_values(made))
    for text in (to_yaml(made), to_yaml(made, documented=True)):
        assert "canary" not in text
        assert "api_key" not in text
        again = from_dict(yaml.safe_load(text), "snapshot")
        assert as_dict(again) == as_dict(made)
        assert differences(made, again) == []
    documented = to_yaml(made, documented=True)
    assert "overwrite" not in documented  # of one start, not of the run
    for key in (key for key in KEYS.values() if not key.metadata.get("transient")):
        if not key.metadata.get("secret"):
            assert key.metadata["doc"] in documented
    with pytest.raises(UserError) as raised:
        load(["--comet_ml_api_key", "[canary-3", "canary-4"])
    assert "canary" not in str(raised.value)


def test_differences_are_named_and_those_that_may_change_left_out() -> None:
    one, other = Config(), Config()
    other.train.epochs, other.optimizer.lr, other.tracking.comet.api_key = 7, 0.5, "secret"
    assert differences(one, other) == [("optimizer.lr", 0.0001, 0.5), ("train.epochs", 100, 7)]
    assert differences(one, other, frozen_only=True) == [("optimizer.lr", 0.0001, 0.5)]


def test_a_snapshot_of_another_version_is_refused() -> None:
    values = as_dict(Config())
    values["train"]["turbo"] = True
    with pytest.raises(UserError, match=r"unknown key train\.turbo \(from old\.yml\)"):
        from_dict(values, "old.yml")
    with pytest.raises(UserError, match=r"another version.*model\.family is 'x'"):
        from_dict({"model": {"family": "x"}}, "old.yml")


def test_all_presets_load() -> None:
    presets = sorted((ROOT / "configs").glob("*.yml"))
    assert presets
    for preset in presets:
        made = load(["--config", preset.stem, "--data.train", "x"])
        assert dataclasses.is_dataclass(made)


def test_help_needs_no_torch_and_lists_every_key() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('HEAVY', sorted({'torch', 'timm', 'numpy', 'cv2', 'albumentations'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for key in KEYS.values():
        assert f"--{key.path} " in done.stdout
    for action in ("print_config", "create_config", "check_data", "dry_run", "preview", "version", "debug"):
        assert f"--{action}" in done.stdout

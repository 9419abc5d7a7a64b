"""How YAML files and flags become one checked `Config` (settings.py lists what there is to set).

Order of precedence: the defaults < `configs/<family>_demo.yml` when no data is named < a resumed run's own
`config.yml` < `--config FILE ...` < `config_vars.yml` < flags. Each value remembers where it came from, so that a
mistake is reported by key and source.
Imports no torch: `--help` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from errors import UserError, hide, nearest
from settings import FAMILY_DEFAULTS, FAMILY_SETTINGS, TASK_SETTINGS, BiRefNetSettings, Config

__all__ = ["FAMILY_SETTINGS", "BiRefNetSettings", "Config", "load"]

ROOT = Path(__file__).resolve().parent
T = TypeVar("T")


# ---------------------------------------------------------------- other names for the same keys

ALIASES = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "grad_clip": "train.max_grad_norm",
    "max_grad_norm": "train.max_grad_norm",
    "grad_accum_steps": "train.grad_accum_steps",
    "compile": "train.compile",
    "mixed_precision": "train.mixed_precision",
    "precision": "train.mixed_precision",
    "deterministic": "train.deterministic",
    "early_stopping": "train.early_stopping",
    "patience": "train.patience",
    "test_limit": "train.test_limit",
    "steps_per_validation": "train.steps_per_validation",
    "eval_each_epoch": "train.eval_each_epoch",
    "resume_start_with_eval": "train.resume_start_with_eval",
    "resume_weights_path": "model.pretrained",
    "save_last": "checkpoint.save_last",
    "save_step": "checkpoint.save_step",
    "log_frequency": "logging.log_frequency",
    "max_samples": "data.max_samples",
    "trainable_modules": "model.trainable",
    "load_all": "data.load_all",
    "dynamic_size": "data.dynamic_size",
    "image_path": "data.train",
    "num_workers": "data.num_workers",
    "size": "data.size",
    "backbone": "model.backbone",
    "pretrained": "model.pretrained",
    "tta": "evaluation.tta",
    "metrics": "evaluation.metrics",
    "accelerator": "device",
    "devices": "distributed.devices",
    "use_tensorboard": "tracking.tensorboard",
    "tensorboard": "tracking.tensorboard",
    "use_wandb": "tracking.wandb.enable",
    "wandb": "tracking.wandb.enable",
    "comet_ml_enable": "tracking.comet.enable",
    "comet_ml_offline": "tracking.comet.offline",
    "comet_ml_api_key": "tracking.comet.api_key",
    "comet_ml_workspace": "tracking.comet.workspace",
    "comet_ml_project_name": "tracking.comet.project_name",
    "wandb_api_key": "tracking.wandb.api_key",
    "wandb_project": "tracking.wandb.project",
    "wandb_entity": "tracking.wandb.entity",
}
# Launch flags of older programs: the launcher's own variables say all of this, so they are read and set nothing.
LAUNCH_FLAGS = ("dist", "use_accelerate")
# Values that other programs use for the same thing.
VALUE_ALIASES: dict[str, dict[str, str]] = {
    "train.mixed_precision": {
        "16-mixed": "fp16", "16": "fp16", "bf16-mixed": "bf16", "32": "no", "32-true": "no", "false": "no",
    },
    "train.eval_each_epoch": {"true": "1", "false": "0"},
    "data.max_samples": {"none": "0"},
    "device": {"gpu": "cuda"},
    "resume": {"none": "", "false": ""},
    "model.pretrained": {"path_to_a_pth": "none", "": "none"},
}  # fmt: skip


# ---------------------------------------------------------------- checking one value


@dataclass
class Key:
    """One leaf of the configuration: where it stands, what it may hold."""

    path: str
    hint: Any
    metadata: types.MappingProxyType
    default: Any


def keys_of(section: type, prefix: str = "", families: dict[str, type] | None = None) -> Iterator[Key]:
    """Every leaf of a settings dataclass; `model` stands for the settings of the chosen family."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        hint = (families or {}).get(prefix + item.name, hints[item.name])
        if dataclasses.is_dataclass(hint):
            yield from keys_of(typing.cast(type, hint), f"{prefix}{item.name}.", families)
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            yield Key(prefix + item.name, hint, item.metadata, default)


def describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else describe(arg) for arg in get_args(hint))
    if origin is list:
        return f"a list of {describe(get_args(hint)[0])}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    return plain.get(origin or hint, str(hint))


def convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`, accepting what YAML and a shell write for it; raises ValueError when it is something else."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "")):
            return None
        return convert(value, next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        text = {True: "true", False: "no"}.get(value, value) if isinstance(value, bool) else value
        if str(text) in args:
            return str(text)
        raise ValueError
    if origin in (list, dict) or hint is dict:
        if isinstance(value, str):
            value = yaml.safe_load(value if value.strip()[:1] in ("[", "{") else f"[{value}]")
        if origin is list:
            items = value if isinstance(value, list) else [value]
            return [convert(item, args[0]) for item in items]
        if not isinstance(value, dict):
            raise ValueError
        return {str(k): convert(v, args[1]) if args else _untyped(v) for k, v in value.items()}
    if hint is bool:
        if isinstance(value, bool):
            return value
        known = {
            "true": True,
            "yes": True,
            "1": True,
            "on": True,
            "false": False,
            "no": False,
            "0": False,
            "off": False,
        }
        return known[str(value).lower()] if str(value).lower() in known else _refuse()
    if isinstance(value, bool) and hint in (int, float):
        raise ValueError
    if hint is int:
        number = float(value)
        return int(number) if number.is_integer() else _refuse()
    if hint is float:
        number = float(value)
        return number if number == number and abs(number) != float("inf") else _refuse()
    if hint is str:
        if isinstance(value, (dict, list)):
            raise ValueError
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        os.fsencode(text)  # half a surrogate pair is no text: a ValueError
        return _refuse() if "\0" in text else text  # no path may hold one
    raise TypeError(f"no conversion for {hint}")


def _refuse() -> Any:
    raise ValueError


def _untyped(value: Any) -> Any:
    """A value that no type is known of, with the numbers that YAML 1.1 takes for text: 1e-3."""
    if isinstance(value, dict):
        return {key: _untyped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_untyped(item) for item in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value)
    return float(value) if is_number else value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def check_value(key: Key, value: Any, source: str) -> Any:
    """The converted value of one key; a `UserError` names key, source and what is allowed."""
    aliases = VALUE_ALIASES.get(key.path, {})
    value = aliases.get(str(value).lower(), value)
    # A key is easily written where its tracker is only switched on.
    shown = "***" if key.metadata.get("secret") or key.path.startswith("tracking.") else repr(value)
    try:
        result = convert(value, key.hint)
    except (ValueError, TypeError, OverflowError, RecursionError, yaml.YAMLError):
        options = get_args(key.hint) if get_origin(key.hint) is Literal else ()
        raise UserError(
            f"{key.path} (from {source}) is {shown}, but must be {describe(key.hint)}"
            f"{nearest(str(value), map(str, options))}"
        ) from None
    low, high, pattern = (key.metadata.get(name) for name in ("min", "max", "pattern"))
    for number in _numbers(result):
        if (low is not None and number < low) or (high is not None and number > high):
            limits = " and ".join(
                f"{word} {limit}" for word, limit in (("at least", low), ("at most", high)) if limit is not None
            )
            raise UserError(f"{key.path} (from {source}) is {shown}, but must be {limits}")
    if pattern and not re.fullmatch(pattern, result):
        raise UserError(f"{key.path} (from {source}) is {shown}, which does not match {pattern}")
    return result


# ---------------------------------------------------------------- layers: files and flags


@dataclass
class Value:
    """A raw value with where it was said, and the folder that relative paths in it count from."""

    raw: Any
    source: str
    folder: Path


MOST_VALUES = 100_000  # of one file


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML (no tag can build an object), but a key written twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A YAML mapping; a `UserError` names the file and line of a mistake."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not a configuration: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter for dates, numbers and characters that cannot be
        # Not the offending line itself: it may hold a key.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{path} is not valid YAML{f', line {mark.line + 1}' if mark else ''}: {problem}") from None
    if loaded is None:
        return {}
    if count_values(loaded, MOST_VALUES) > MOST_VALUES:
        raise UserError(f"{path} is not a configuration: anchors make more of it than {MOST_VALUES} values")
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {type(loaded).__name__}")
    return loaded


def count_values(value: Any, most: int) -> int:
    """How many values nested lists and mappings hold, or `most` and more. What stands in several places counts each
    time, as whoever walks through it meets it; what holds itself has no end."""
    waiting, count = [value], 0
    while waiting:
        each = waiting.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, (list, tuple, set)) else ()
        count += len(inner)
        if count > most:
            break
        waiting += inner
    return count


def file_layer(path: Path, known: dict[str, Key]) -> dict[str, Value]:
    """The keys that one YAML file sets."""
    return mapping_layer(read_yaml(path), str(path), path.resolve().parent, known)


def mapping_layer(mapping: dict, source: str, folder: Path, known: dict[str, Key]) -> dict[str, Value]:
    """The keys that nested mappings set."""
    layer: dict[str, Value] = {}

    def walk(mapping: dict, prefix: str) -> None:
        for name, raw in mapping.items():
            key = resolve_name(prefix + str(name), known, source)
            if isinstance(key, Key):
                if key.path in layer:
                    raise UserError(f"{prefix}{name} (from {source}) sets {key.path}, which stands there already")
                layer[key.path] = Value(raw, source, folder)
            elif key == "section":
                if not isinstance(raw, dict | None):
                    raise UserError(f"{prefix}{name} (from {source}) is a section and must hold a mapping of its keys")
                walk(raw or {}, f"{prefix}{name}.")

    walk(mapping, "")
    return layer


def resolve_name(name: str, known: dict[str, Key], source: str) -> Key | Literal["section", "launch"]:
    """The key that a name or alias means; an unknown one is an error that offers the nearest."""
    plain = name.replace("-", "_")
    if plain in LAUNCH_FLAGS:
        return "launch"
    path = plain if plain in known else ALIASES.get(plain, plain)
    if (key := find_key(path, known)) is not None:
        return key
    if any(name.startswith(path + ".") for name in known):
        return "section"
    sections = {key.rpartition(".")[0] for key in known} - {""}
    names = [*known, *sorted(sections), *(alias for alias, target in ALIASES.items() if target in known)]
    raise UserError(f"unknown key {name} (from {source}){nearest(plain, names)}")


def find_key(path: str, known: dict[str, Key]) -> Key | None:
    """A key by its path; an entry of a mapping counts as one: `loss.weights.iou`."""
    parent = known.get(path.rpartition(".")[0])
    if path not in known and parent is not None and get_origin(parent.hint) is dict:
        return Key(path, get_args(parent.hint)[1], parent.metadata, None)
    return known.get(path)


def flag_layer(arguments: list[str], known: dict[str, Key]) -> dict[str, Value]:
    """The keys that flags set: `--key value`, `--key=value`, `--switch`, `--no-switch`, `--list 1 2`."""
    layer: dict[str, Value] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}: settings are given as --key value; see --help")
        name, _, inline = argument[2:].partition("=")
        values = [inline] if "=" in argument else []
        while "=" not in argument and position < len(arguments) and not _is_flag(arguments[position]):
            values.append(arguments[position])
            position += 1
        negated = name.replace("-", "_").startswith("no_") and not values
        key = resolve_name(name[3:] if negated else name, known, f"flag --{name}")
        if key == "launch":
            continue
        if key == "section":
            raise UserError(f"--{name} is a section of settings: name one of its keys, e.g. --{name}.…; see --help")
        is_switch = key.hint in (bool, bool | None) or key.path == "resume"
        if not values and not is_switch:
            raise UserError(f"--{name} needs a value: {describe(key.hint)}")
        raw: Any = (not negated) if not values else values[0] if len(values) == 1 else values
        if values and key.metadata.get("verbatim"):
            raw = [*(layer[key.path].raw if key.path in layer else []), *values]
        if len(values) > 1 and not takes_list(key.hint):
            shown = "" if key.metadata.get("secret") else f": {' '.join(values)}"
            raise UserError(f"--{name} takes one value, not {len(values)}{shown}")
        layer[key.path] = Value(raw, f"flag --{name}", Path.cwd())
    return layer


def takes_list(hint: Any) -> bool:
    """Whether a flag of this type may be followed by several values."""
    return get_origin(hint) is list or any(get_origin(arg) is list for arg in get_args(hint))


def launcher_layer() -> dict[str, Value]:
    """What `accelerate launch --mixed_precision X` says; its other variables are those of torchrun."""
    name = "ACCELERATE_MIXED_PRECISION"
    said = os.environ.get(name)
    # Without the flag it says "no", which is its default and nobody's wish.
    if said in (None, "no"):
        return {}
    return {"train.mixed_precision": Value(said, f"environment variable {name}", Path.cwd())}


def _is_flag(text: str) -> bool:
    return text.startswith("--")


# ---------------------------------------------------------------- layers become a Config


def preset_path(name: str) -> Path:
    """A `--config` argument: a file, or the name of a preset in configs/."""
    path = Path(name)
    if path.is_file():
        return path
    preset = ROOT / "configs" / (name if name.endswith((".yml", ".yaml")) else f"{name}.yml")
    if preset.is_file():
        return preset
    known = sorted(p.stem for p in (ROOT / "configs").glob("*.yml"))
    raise UserError(
        f"no configuration {name}: neither a file nor a preset{nearest(path.stem, known)}; presets: {', '.join(known)}"
    )


def config_vars_path() -> Path:
    """The user's own machine: `config_vars.yml` in the working folder, or else beside the program."""
    named = os.environ.get("MASKWRIGHT_CONFIG_VARS")
    if named is not None:
        return Path(named)
    local = Path("config_vars.yml")
    return local if local.is_file() else ROOT / "config_vars.yml"


def load(flags: list[str], presets: list[str] | None = None, saved: dict | None = None) -> Config:
    """The configuration of a run from preset names or files and flags; raises `UserError` for anything wrong.

    `flags` may also name presets with `--config A B`. `saved` is the configuration of an earlier run to start from; a
    run that is resumed finds its own, so `--experiment_name X --resume` says enough.
    """
    named, flags = take_values(flags, "config")
    paths = [preset_path(name) for name in [*(presets or []), *named]]
    config = merge(paths, flags, saved)
    snapshot = Path(config.output_dir) / config.experiment_name / "config.yml"
    if saved is None and config.resume in ("true", "auto") and config.experiment_name and snapshot.is_file():
        place = config.output_dir, config.experiment_name
        config = merge(paths, flags, read_yaml(snapshot))
        config.output_dir, config.experiment_name = place
    cross_check(config)
    return config


def merge(paths: list[Path], flags: list[str], saved: dict | None = None) -> Config:
    """The layers in their order of precedence, made one."""
    own = [config_vars_path()] if config_vars_path().is_file() else []
    kind = chosen_kind([*paths, *own], flags, saved)
    known = known_keys(*kind)
    layers = [mapping_layer(saved or {}, "the run's own configuration", Path.cwd(), known)]
    layers += [file_layer(path, known) for path in paths]
    layers += [launcher_layer(), *(file_layer(path, known) for path in own), flag_layer(flags, known)]
    values = {key: value for layer in layers for key, value in layer.items()}
    names_data = any(values[key].raw for key in ("data.root", "data.train", "data.val", "data.test") if key in values)
    demo = ROOT / "configs" / f"{kind.family}_demo.yml"
    if not (paths or saved or names_data) and demo.is_file():
        values = file_layer(demo, known) | values
    return build(values, kind)


class Kind(NamedTuple):
    """What decides which keys there are: `model` holds the settings of the family, `loss` those of the task."""

    family: str
    task: str


def chosen_kind(paths: list[Path], flags: list[str], saved: dict | None) -> Kind:
    """Family and task, which must be known before anything else can be read: the last one to name them wins."""
    named = {"model.family": "birefnet"}
    for mapping in (saved or {}, *map(read_yaml, paths)):
        model = mapping.get("model")
        if isinstance(model, dict) and "family" in model:
            named["model.family"] = str(model["family"])
        if "task" in mapping:
            named["task"] = str(mapping["task"])
    for position, flag in enumerate(flags):
        name, _, inline = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and name in ("model.family", "task"):
            named[name] = inline or (flags[position + 1] if position + 1 < len(flags) else "")
    family = named["model.family"]
    if family not in FAMILY_SETTINGS:
        raise UserError(
            f"model.family is {family!r}{nearest(family, FAMILY_SETTINGS)}; families: {', '.join(FAMILY_SETTINGS)}"
        )
    task = named.get("task") or default_task(family)
    if task not in TASK_SETTINGS:
        raise UserError(f"task is {task!r}{nearest(task, TASK_SETTINGS)}; tasks: {', '.join(TASK_SETTINGS)}")
    return Kind(family, task)


def default_task(family: str) -> str:
    """What a family does where nothing else is said."""
    return FAMILY_DEFAULTS.get(family, {}).get("task", "binary")


def known_keys(family: str, task: str = "") -> dict[str, Key]:
    """Every key by its dotted path, with the model section of one family and the loss section of one task."""
    sections = {"model": FAMILY_SETTINGS[family], "loss": TASK_SETTINGS[task or default_task(family)]}
    return {key.path: key for key in keys_of(Config, families=sections)}


def default_config(kind: Kind) -> Config:
    """The defaults, with what the family changes of them."""
    config = Config(model=FAMILY_SETTINGS[kind.family](), loss=TASK_SETTINGS[kind.task]())
    set_value(config, "task", kind.task)
    for path, value in FAMILY_DEFAULTS.get(kind.family, {}).items():
        if path != "task":
            set_value(config, path, copy.deepcopy(value))
    return config


def kind_of(config: Config) -> Kind:
    return Kind(config.model.family, config.task)


def build(values: dict[str, Value], kind: Kind) -> Config:
    """A `Config` of checked values over the defaults."""
    config = default_config(kind)
    apply(config, values, known_keys(*kind))
    if "data.size" not in values:
        config.data.size = list(getattr(config.model, "input_size", None) or config.data.size)
    hide(secret_values(config))
    return config


def apply(config: Any, values: dict[str, Value], known: dict[str, Key]) -> None:
    """Check raw values and write them into `config`."""
    for path, value in values.items():
        key = find_key(path, known)
        assert key is not None, path
        result = check_value(key, value.raw, value.source)
        set_value(config, path, resolve_paths(result, key.metadata.get("path"), value.folder))


def resolve_paths(value: Any, kind: str | None, folder: Path) -> Any:
    """Relative paths count from the file that names them; names that are no path there stay names."""
    if kind is None or not value:
        return value
    if kind == "spec":
        parts = [resolve_paths(name, "file?", folder) for name in value.split("+")]
        return "+".join(parts)
    name, colon, weight = (
        value.rpartition(":") if kind == "file?" and re.search(r":[\d.]+$", value) else (value, "", "")
    )
    path = Path(name).expanduser()
    if kind == "file" and (value in ("none", "backbone", "official") or value.startswith(("hf-hub:", "https://"))):
        return value
    if path.is_absolute():
        return f"{path}{colon}{weight}"
    if kind == "file?" and not (folder / path).exists():
        return value
    return f"{(folder / path).resolve()}{colon}{weight}"


def set_value(config: Any, path: str, value: Any) -> None:
    """Set a leaf by its dotted path."""
    *sections, leaf = path.split(".")
    for section in sections:
        config = getattr(config, section)
    if isinstance(config, dict):
        config[leaf] = value
    else:
        setattr(config, leaf, value)


def get_value(config: Any, path: str) -> Any:
    """Read a leaf by its dotted path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def cross_check(config: Config) -> None:
    """What no single key can know; mends what has one meaning only."""
    size = config.data.size
    config.data.size = size * 2 if len(size) == 1 else size
    if len(config.data.size) != 2:
        raise UserError(f"data.size is {size}, but must be [width, height]")
    ranges = config.data.dynamic_size
    if ranges is not None and (len(ranges) not in (1, 2) or any(len(r) != 2 or r[0] > r[1] for r in ranges)):
        raise UserError(
            f"data.dynamic_size is {ranges}, but must be [[min width, max width], [min height, max height]], or "
            "[[min, max]] for squares"
        )
    if config.data.fold not in ("", "all"):
        fold, folds = config.data.fold.split("/")
        if int(folds) < 2 or (fold != "all" and int(fold) >= int(folds)):
            raise UserError(f"data.fold is {config.data.fold}, but must be K/N with K below N, e.g. 0/5, or all/N")
    if config.data.fold and config.data.val:
        raise UserError("data.fold and data.val are both set: a fold already says what validates; drop one of them")
    if len(config.optimizer.betas) != 2:
        raise UserError(f"optimizer.betas is {config.optimizer.betas}, but must be two numbers")
    if (
        not re.fullmatch(r"[\w.+@=-]*", config.experiment_name)
        or config.experiment_name.strip(".") != config.experiment_name
    ):
        raise UserError(
            f"experiment_name is {config.experiment_name!r}, but is a folder name: letters, digits and . _ - + = @ only"
        )


# ---------------------------------------------------------------- the configuration, written down


def is_passing(item: dataclasses.Field | Key) -> bool:
    """Whether a setting belongs to the run's owner or to one start of it, and not to the run: such are not saved."""
    return bool(item.metadata.get("secret") or item.metadata.get("transient"))


def as_dict(config: Any) -> dict:
    """Nested plain values of what is saved: no secrets."""
    result = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            result[item.name] = as_dict(value)
        elif not is_passing(item):
            result[item.name] = value
    return result


def secret_values(config: Config) -> list[str]:
    """The secrets in force, so that they can be kept out of everything that is written."""
    known = known_keys(*kind_of(config))
    values = [get_value(config, key.path) for key in known.values() if key.metadata.get("secret")]
    values += [os.environ.get(name, "") for name in ("COMET_API_KEY", "WANDB_API_KEY")]
    return [value for value in values if value]


def to_yaml(config: Config, documented: bool = False) -> str:
    """The configuration as YAML, without secrets; `documented` adds each key's line of documentation."""
    if not documented:
        return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    lines: list[str] = []

    def write(section: Any, indent: str) -> None:
        for item in dataclasses.fields(section):
            value = getattr(section, item.name)
            if dataclasses.is_dataclass(value):
                lines.append(f"{indent}{item.name}:")
                write(value, indent + "  ")
            elif not is_passing(item):
                text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
                lines.append(f"{indent}{item.name}: {text}  # {item.metadata['doc']}")

    write(config, "")
    return "\n".join(lines) + "\n"


def from_dict(values: dict, source: str) -> Config:
    """A `Config` from a saved snapshot; raises `UserError` when the snapshot is of another version."""
    try:
        kind = chosen_kind([], [], values)
    except UserError as error:
        raise UserError(f"{source} was made by another version: {error}") from None
    return build(mapping_layer(values, source, Path.cwd(), known_keys(*kind)), kind)


def differences(old: Config, new: Config, frozen_only: bool = False) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of each key that differs; `frozen_only` leaves out what may change when a run resumes."""
    if kind_of(old) != kind_of(new):  # the rest has other keys
        kinds = (("model.family", old.model.family, new.model.family), ("task", old.task, new.task))
        return [(name, before, after) for name, before, after in kinds if before != after]
    keys = [key for key in known_keys(*kind_of(new)).values()
            if not is_passing(key) and not (frozen_only and key.metadata.get("volatile"))]  # fmt: skip
    pairs = ((key.path, get_value(old, key.path), get_value(new, key.path)) for key in keys)
    return [(path, before, after) for path, before, after in pairs if before != after]


def changed(config: Config) -> list[tuple[str, Any, Any]]:
    """(key, default, value) of each setting that is not at its default."""
    return differences(default_config(kind_of(config)), config)


def help_text(usage: str, actions: dict[str, str], *options: type) -> str:
    """The page that `--help` prints: usage, the command's own switches and options, every setting with its default."""
    lines = [usage, ""]
    lines += [f"  --{name:<28} {doc}" for name, doc in actions.items()]
    for section in options or (Config,):
        lines += settings_page() if section is Config else option_lines(section)
    return "\n".join(lines)


def option_lines(options: type) -> list[str]:
    """A line for each option of a command's own."""
    lines = []
    for key in keys_of(options):
        default = "" if key.default in ("", []) else f" [{key.default}]"
        lines.append(f"  --{key.path:<28} {key.metadata['doc']}{default}")
    return lines


def settings_page() -> list[str]:
    """A line for each setting of a run."""
    lines = [f"  --{'config A B':<28} YAML files, or names of presets in configs/", ""]
    lines.append("Settings, each a YAML key and a flag (default in brackets):")
    shorts: dict[str, list[str]] = {}
    for alias, path in ALIASES.items():
        shorts.setdefault(path, []).append(alias)
    sections: dict[str, list[Key]] = {}
    for key in known_keys("birefnet").values():
        head = key.path.rpartition(".")[0]
        if head not in ("model", "loss"):
            sections.setdefault(head, []).append(key)
    for family, settings in FAMILY_SETTINGS.items():
        sections[f"model, of the family {family}"] = list(keys_of(settings, "model."))
    for task, settings in TASK_SETTINGS.items():
        sections[f"loss, of the task {task}"] = list(keys_of(settings, "loss."))
    for head, keys in sections.items():
        lines += ["", f"{head}:"] if head else []
        for key in keys:
            default = "" if key.metadata.get("secret") else f" [{key.default}]"
            also = f" (also --{', --'.join(shorts[key.path])})" if key.path in shorts else ""
            lines.append(f"  --{key.path:<36} {key.metadata['doc']}{default}{also}")
    return lines


def answer_at_once(usage: str, actions: dict[str, str], *options: type) -> None:
    """Print `--help` and leave, before anything heavy is imported."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(f"usage: python {usage}", actions, *options))
        sys.exit(0)


def take_values(arguments: list[str], *names: str) -> tuple[list[str], list[str]]:
    """(the values of `--name A B` or `--name=A`, the other arguments)."""
    values: list[str] = []
    rest: list[str] = []
    taking = False
    for argument in arguments:
        if _is_flag(argument):
            name, _, inline = argument[2:].partition("=")
            taking = name.replace("-", "_") in names
            if not taking:
                rest.append(argument)
            elif inline:
                values.append(inline)
        else:
            (values if taking else rest).append(argument)
    return values, rest


def parse_options(options: type[T], arguments: list[str]) -> T:
    """The options of a command that takes no configuration: a documented dataclass, filled from flags and checked."""
    known = {key.path: key for key in keys_of(options)}
    result = options()
    apply(result, flag_layer(arguments, known), known)
    return result


def split_options(options: type[T], arguments: list[str]) -> tuple[T, list[str]]:
    """(a command's own options, the arguments that are settings of a run), for a command that takes both."""
    known = {key.path for key in keys_of(options)}
    own: list[str] = []
    rest: list[str] = []
    chosen = rest
    for argument in arguments:
        if _is_flag(argument):
            name = argument[2:].partition("=")[0].replace("-", "_")
            chosen = own if name in known or name.removeprefix("no_") in known else rest
        chosen.append(argument)
    return parse_options(options, own), rest

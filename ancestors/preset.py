"""What becomes of another program's settings: a preset with comments, and a list of what has no place in it."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ancestors.python_values import UNKNOWN
from config import Kind, Value, build, check_value, cross_check, find_key, known_keys
from errors import UserError

UNDERSTOOD = (
    "BiRefNet's config.py or config_vars.yml, a .py or config.json of SegFormer, a training .yaml of SAM 2, or a "
    "checkpoint of RF-DETR"
)
SHOWN = reprlib.Repr()  # short, however deep a value is nested
SHOWN.maxstring = SHOWN.maxother = 120

# {name there: key here, or the key and what makes its value}
Table = Mapping[str, "str | tuple[str, Callable[[Any], Any]]"]


@dataclass
class Preset:
    """Settings of a run here: values by key with what they were called, and what could not be taken over."""

    kind: Kind
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.known = known_keys(*self.kind)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Take a value over if its key can hold it."""
        known = find_key(key, self.known)
        if known is None:
            raise KeyError(key)
        try:
            self.values[key] = check_value(known, as_plain(value), origin), origin
        except UserError as error:
            self.left_out.append(one_line(str(error)))

    def leave(self, name: str, value: Any, why: str = "") -> None:
        self.left_out.append(one_line(f"{name}: {SHOWN.repr(value)}{f' ({why})' if why else ''}"))

    def get(self, key: str) -> Any:
        return self.values.get(key, (None, ""))[0]

    def check(self) -> None:
        """Raise `UserError` unless all values together are a configuration."""
        layer = {key: Value(value, origin, Path.cwd()) for key, (value, origin) in self.values.items()}
        cross_check(build(layer, self.kind))

    def text(self, source: Path) -> str:
        """The preset as a YAML file with comments."""
        lines = [f"# Made from {one_line(str(source))}; each value with what it was called there.",
                 f"task: {self.kind.task}"]  # fmt: skip
        order = ["model.family", *self.known]
        rows = {"model.family": (self.kind.family, ""), **self.values}
        rows = {
            key: rows[key] for key in sorted(rows, key=lambda key: order.index(key if key in order else parent(key)))
        }
        for section in dict.fromkeys(key.partition(".")[0] for key in rows):
            inner = {key.partition(".")[2]: row for key, row in rows.items() if key.partition(".")[0] == section}
            lines += section_lines(section, inner, "")
        if self.left_out:
            lines += ["", "# Without an equivalent here:", *(f"# - {line}" for line in self.left_out)]
        return "\n".join(lines) + "\n"


def section_lines(name: str, rows: dict[str, tuple[Any, str]], indent: str) -> Iterator[str]:
    """The YAML lines of a leaf (`rows` has the one key "") or of a section."""
    if "" in rows:
        value, origin = rows[""]
        shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
        says_more = origin and origin != name
        yield f"{indent}{name}: {shown}{f'  # {one_line(origin)}' if says_more else ''}"
        return
    yield f"{indent}{name}:"
    for part in dict.fromkeys(key.partition(".")[0] for key in rows):
        inner = {key.partition(".")[2]: row for key, row in rows.items() if key.partition(".")[0] == part}
        yield from section_lines(part, inner, indent + "  ")


def parent(key: str) -> str:
    """The mapping that an entry belongs to: `loss.weights` of `loss.weights.iou`."""
    return key.rpartition(".")[0]


def one_line(text: str) -> str:
    """Text for a comment: without line breaks and what YAML does not take."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:300]


def as_plain(value: Any) -> Any:
    """Lists for tuples, and numbers without the digits that arithmetic adds."""
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Source:
    """An ancestor's settings by dotted name, which remembers what nobody asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(leaves(values))
        self.asked: set[str] = set()

    def name_of(self, ending: str) -> str:
        """The first name that is, or ends with, these words; empty without one."""
        return next((name for name in self.values if name == ending or name.endswith(f".{ending}")), "")

    def take(self, ending: str, default: Any = None) -> Any:
        """A value by the end of its name; the default also for what only running a file would tell."""
        name = self.name_of(ending)
        self.asked.add(name)
        value = self.values.get(name, UNKNOWN)
        return default if value is UNKNOWN else value

    def number(self, ending: str, default: float = 0.0) -> float:
        """A finite number by the end of its name, the default for anything else."""
        try:
            number = float(self.take(ending, default))
        except (TypeError, ValueError, OverflowError):
            return default
        return number if math.isfinite(number) else default

    def listed(self, ending: str, kind: type | tuple[type, ...]) -> list[Any]:
        """The items of this kind in a list by the end of its name; none for anything else."""
        value = self.take(ending)
        return [item for item in value if isinstance(item, kind)] if isinstance(value, (list, tuple)) else []

    def carry(self, preset: Preset, table: Table) -> None:
        """Put what a table has keys for into a preset."""
        for ending, target in table.items():
            name = self.name_of(ending)
            if not name:
                continue
            key, make = target if isinstance(target, tuple) else (target, as_plain)
            value = self.values[name]
            self.asked.add(name)
            if value is UNKNOWN:
                preset.leave(name, value)
                continue
            try:
                preset.put(key, make(value), name)
            except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
                preset.leave(name, value)

    def leave_rest(self, preset: Preset, *known: str) -> None:
        """List what is still there, without what matches one of the known patterns, and without what says nothing."""
        pattern = re.compile("|".join(known) or r"(?!)")
        for name, value in self.values.items():
            says_nothing = value is None or value is False or value in ("", [], {}, ())
            if name not in self.asked and not says_nothing and not pattern.search(name):
                preset.leave(name, value)


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested mappings and of lists that hold some."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in pairs:
        nests = isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value)
        if value and (isinstance(value, Mapping) or nests):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def beside(path: str, source: Path) -> str:
    """An absolute path to a file that is named from the source's folder or one above it; empty where none is."""
    try:
        for folder in source.resolve().parents:
            if path and (found := folder / Path(path).expanduser()).is_file():
                return str(found)
    except (OSError, RuntimeError, ValueError):  # a name that is too long, a home that nobody has, no text
        return ""
    return ""

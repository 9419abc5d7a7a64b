"""Print the tables of docs/configuration.md: `python reference.py`; `--write` puts them there.

They are made of the settings' own documentation, so the page cannot say anything else than `--help`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import yaml

from config import ALIASES, ROOT, Key, describe, keys_of, known_keys
from errors import run_command
from generated import Generated, markdown
from settings import (
    FAMILY_DEFAULTS,
    FAMILY_SETTINGS,
    TASK_SETTINGS,
    EvaluateSettings,
    ExportSettings,
    InferenceSettings,
)

PAGE = Generated("reference.py", ROOT / "docs" / "configuration.md")
COMMANDS = {
    "evaluate.py": ("Flags of its own, beside the settings above.", EvaluateSettings),
    "inference.py": ("Its flags.", InferenceSettings),
    "export.py": ("Its flags.", ExportSettings),
}


def tables() -> str:
    """All tables in Markdown, each under its heading."""
    parts = ["## Presets\n", presets()]
    for section, keys in sections().items():
        parts += [f"## {section}\n", table(keys)]
    parts += ["## What a family changes of these defaults\n", family_defaults()]
    for name, (what, options) in COMMANDS.items():
        parts += [f"## {name}\n", f"{what}\n", table(keys_of(options))]
    return "\n".join(parts)


def sections() -> dict[str, list[Key]]:
    """The settings of a run under a heading for each section of the file."""
    found: dict[str, list[Key]] = {}
    for key in known_keys("birefnet").values():
        head = key.path.rpartition(".")[0]
        if head not in ("model", "loss"):
            found.setdefault(head or "The run", []).append(key)
    for family, settings in FAMILY_SETTINGS.items():
        found[f"model, of {family}"] = list(keys_of(settings, "model."))
    for task, settings in TASK_SETTINGS.items():
        found[f"loss, of the task {task}"] = list(keys_of(settings, "loss."))
    return found


def table(keys: Iterable[Key]) -> str:
    """A row for each setting: its key, what it may be, its default, what it does."""
    rows = [[f"`{key.path}`{star(key)}", allowed(key), default(key), doc(key)] for key in keys]
    return markdown(["key", "values", "default", "meaning"], rows)


def star(key: Key) -> str:
    """Marks what may change when a run resumes."""
    return " \\*" if key.metadata.get("volatile") else ""


def allowed(key: Key) -> str:
    """The type and its limits."""
    if get_origin(key.hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(key.hint))
    low, high = key.metadata.get("min"), key.metadata.get("max")
    limits = f", {low} to {high}" if None not in (low, high) else f", at least {low}" if low is not None else ""
    return re.sub(r"of a? ?(list|whole number|number|mapping|text)\b", r"of \1s", describe(key.hint)) + limits


def default(key: Key) -> str:
    """The default as YAML."""
    if key.default in ("", [], {}):
        return ""
    return f"`{flow(key.default)}`"


def doc(key: Key) -> str:
    """The setting's documentation and the other names of its flag."""
    others = [f"`--{name}`" for name, path in ALIASES.items() if path == key.path]
    said = key.metadata["doc"].replace("|", "\\|").replace("<", "&lt;")
    return f"{said}; also {', '.join(others)}" if others else said


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def presets() -> str:
    """What each file of configs/ is for, by the first sentence of its comment."""
    rows = [[f"`{path.stem}`", purpose(path.read_text(encoding="utf-8"))]
            for path in sorted((ROOT / "configs").glob("*.yml"))]  # fmt: skip
    return markdown(["preset", "for"], rows)


def purpose(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    comment = re.match(r"(?:#.*\n)+", text)
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"\.(?:\s|$)|[:,]? --config ", words, maxsplit=1)[0]


def family_defaults() -> str:
    """The defaults of each family that differ from those of the tables."""
    rows = [[f"`{family}`", ", ".join(f"`{key}: {flow(value)}`" for key, value in changes.items())]
            for family, changes in sorted(FAMILY_DEFAULTS.items())]  # fmt: skip
    return markdown(["family", "its defaults"], rows)


if __name__ == "__main__":
    run_command(lambda: PAGE.command(tables))

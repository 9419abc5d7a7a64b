"""The pages: what is generated is up to date, links lead somewhere, commands are accepted, quoted messages exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import reference
from config import ROOT, load, parse_options, split_options
from settings import EvaluateSettings, ExportSettings, InferenceSettings
from train import ACTIONS

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SWITCHES = {name.split()[0] for name in ACTIONS} | {"write"}


def test_the_page_of_settings_is_what_the_command_prints() -> None:
    assert reference.PAGE.shown() == reference.tables(), "write it again: python reference.py --write"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", text):
        if target.startswith("http"):
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), target
        if anchor:
            assert anchor[1:] in headings(file.read_text(encoding="utf-8")), f"{target}{anchor}"


def headings(text: str) -> list[str]:
    """The anchors of a page, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_settings_that_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yml").touch()  # what a reader has written with --create_config
    for program, arguments in commands(page.read_text(encoding="utf-8")):
        if program == "train.py":
            load(without_actions(arguments))
        elif program == "evaluate.py":
            load(split_options(EvaluateSettings, arguments)[1])
        elif program in ("inference.py", "export.py"):
            parse_options(InferenceSettings if program == "inference.py" else ExportSettings, arguments)
        else:
            assert (ROOT / program).exists(), program


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, arguments) of each command in the blocks of a page."""
    for block in re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(re.sub(r"\$\w+", "name", line), comments=True) if ".py" in line else []
            place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if place is not None and not line.startswith("python -"):
                arguments = words[place + 1 :]
                ends = [i for i, word in enumerate(arguments) if word in ("&&", "|", ">", ";")]
                yield words[place], arguments[: ends[0]] if ends else arguments


def without_actions(arguments: list[str]) -> list[str]:
    """The arguments that are settings."""
    kept: list[str] = []
    skipping = False
    for word in arguments:
        if word.startswith("--"):
            skipping = word[2:] in SWITCHES
        if not skipping:
            kept.append(word)
    return kept


def test_messages_that_troubleshooting_quotes_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    texts = messages()
    assert len(quoted) > 20
    for message in quoted:
        parts = [re.escape(part) for part in message.split("…")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def messages() -> list[str]:
    """Every text in the program, what is filled in as a space."""
    found = []
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[mrt]*/**/*.py")]:
        if "tests" not in file.parts:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else " "
                                         for part in node.values))  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found

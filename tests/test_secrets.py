"""A key, wherever it was given, is found nowhere afterwards: not in the run folder, the output or a process title."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, Zygote, draw_set, flags_for, wait_for, zygote_in

COMET_KEY, WANDB_KEY = "canaryComet0123456789ABCD", "canaryWandb" + "0123456789abcdef" * 2
CANARY = b"canary"
OFFLINE = [
    "--tensorboard", "--comet_ml_enable", "--comet_ml_offline", "--wandb", "--tracking.wandb.offline",
    "--tracking.log_best_weights",
]  # fmt: skip
FLAT = f"comet_ml_api_key: {COMET_KEY}\nwandb_api_key: {WANDB_KEY}\n"
NESTED = f"tracking:\n  comet:\n    api_key: {COMET_KEY}\n  wandb:\n    api_key: {WANDB_KEY}\n"


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with zygote_in(tmp_path_factory.mktemp("zygote")) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "train", 4)
    draw_set(folder / "val", 2, seed=1)
    return folder


def leaks(content: bytes, name: str) -> list[str]:
    """Where the canary is: `name`, or a member of the archive that `content` is."""
    found = [name] if CANARY in content else []
    if content[:2] == b"\x1f\x8b":
        found += leaks(gzip.decompress(content), f"{name}!gz")
    if zipfile.is_zipfile(io.BytesIO(content)):  # checkpoints too
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                found += leaks(member.encode(), f"{name}!{member} (its name)")
                found += leaks(archive.read(member), f"{name}!{member}")
    return found


def leaks_in(folder: Path) -> list[str]:
    """The files below a folder that hold the canary, in their names or content."""
    found = []
    for path in folder.rglob("*"):
        found += leaks(str(path.relative_to(folder)).encode(), f"{path} (its name)")
        if path.is_file():
            found += leaks(path.read_bytes(), str(path))
    return found


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"x" * 1000 + CANARY)
    (tmp_path / "a.pth").write_bytes(inner.getvalue() + b"trailer")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x" * 1000 + CANARY))
    (tmp_path / "c.txt").write_bytes(b"plain")
    assert [Path(name).name for name in sorted(leaks_in(tmp_path))] == ["a.pth!data.pkl", "b.gz!gz"]


def given(where: str, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """(flags, environment) that give both keys in one of the places where they may stand."""
    file = folder / "keys.yml"
    file.write_text(NESTED if "nested" in where else FLAT)
    return {
        "environment": ([], {"COMET_API_KEY": COMET_KEY, "WANDB_API_KEY": WANDB_KEY}),
        "config_vars, flat": ([], {"MASKWRIGHT_CONFIG_VARS": str(file)}),
        "config_vars, nested": ([], {"MASKWRIGHT_CONFIG_VARS": str(file)}),
        "preset": (["--config", str(file)], {}),
        "flags": (["--tracking.comet.api_key", COMET_KEY, f"--tracking.wandb.api_key={WANDB_KEY}"], {}),
        "short flags": ([f"--comet_ml_api_key={COMET_KEY}", "--wandb-api-key", WANDB_KEY], {}),
    }[where]


# A crash in the midst of a run whose message quotes both keys, through an exception that another one caused.
CRASH = f"""
import run
def evaluate(*arguments, **options):
    try:
        raise ValueError("400 for key {COMET_KEY}")
    except ValueError as error:
        raise RuntimeError("the server refused {WANDB_KEY}") from error
import evaluate as module
module.evaluate = evaluate
"""


@pytest.mark.parametrize(
    "where", ["environment", "config_vars, flat", "config_vars, nested", "preset", "flags", "short flags"]
)
def test_a_key_is_in_no_file_of_a_run(where: str, zygote: Zygote, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    flags, environment = given(where, tmp_path)
    runs = tmp_path / "runs"
    home = tmp_path / "home"
    home.mkdir()
    command = flags_for(data, runs, "bright", "--epochs", "1", "--log_frequency", "1", *OFFLINE, *flags)
    job = zygote.run(command, HOME=str(home), **environment)
    assert leaks(job.text().encode(), "output") == []
    names = {path.name for path in (runs / "bright").iterdir()}
    assert {"config.yml", "run.json", "train.log", "events.jsonl", "last.pth", "best.pth"} <= names
    assert {"tensorboard", "comet", "wandb"} <= names
    assert leaks_in(runs) == []
    assert leaks_in(home) == []  # as wandb.login would leave in ~/.netrc


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("where", ["environment", "flags"])
def test_a_key_is_in_no_traceback(where: str, debug: bool, zygote: Zygote, data: Path, tmp_path: Path) -> None:
    flags, environment = given(where, tmp_path)
    command = flags_for(data, tmp_path / "runs", "bright", "--epochs", "1", *flags, *(["--debug"] if debug else []))
    job = zygote.start(command, before=CRASH, **environment)
    assert job.wait() == [1]
    said = job.text()
    assert "RuntimeError: the server refused ***" in said
    assert "ValueError: 400 for key ***" in said  # with the cause, and the lines that led there
    assert "in train" in said
    assert leaks(said.encode(), "output") == []
    assert leaks_in(tmp_path / "runs") == []
    assert "the run ended with RuntimeError: the server refused ***" in (tmp_path / "runs/bright/train.log").read_text()


@pytest.mark.parametrize("command", [["--print_config"], ["--create_config", "made.yml"], ["--dry_run"]])
@pytest.mark.parametrize("where", ["config_vars, flat", "flags"])
def test_a_key_is_in_nothing_that_a_command_prints_or_writes(
    command: list[str], where: str, zygote: Zygote, data: Path, tmp_path: Path
) -> None:
    flags, environment = given(where, tmp_path)
    made = tmp_path / "made" / "made.yml"
    made.parent.mkdir()
    command = [str(made) if word == "made.yml" else word for word in command]
    job = zygote.run([*flags_for(data, tmp_path / "runs", "bright"), *flags, *command], **environment)
    assert job.text()
    assert leaks(job.text().encode(), "output") == []
    assert leaks_in(made.parent) == []
    assert made.exists() == ("--create_config" in command)


@pytest.mark.parametrize(
    "flags",
    [
        ["--comet_ml_api_key", COMET_KEY, WANDB_KEY],  # two values
        ["--comet_ml_api_keys", COMET_KEY],  # misspelt
        [f"--comet_ml_api_keys={COMET_KEY}"],
        ["--tracking.comet.api_key", f"[{COMET_KEY}", "--optimizer.lr", "fast"],
        ["--tracking.comet", COMET_KEY],  # a section
        ["--wandb", WANDB_KEY],  # what is switched on, for its key
        ["--comet_ml_api_key", COMET_KEY, "--resume", "nowhere.pth"],
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_key_is_in_no_message_about_the_command_line(
    flags: list[str], debug: bool, zygote: Zygote, data: Path, tmp_path: Path
) -> None:
    more = [*flags, "--debug"] if debug else flags
    job = zygote.start(flags_for(data, tmp_path / "runs", "bright", *more))
    assert job.wait() == [1 if debug else 2]
    assert leaks(job.text().encode(), "output") == []


@pytest.mark.parametrize(
    "content",
    [
        f"comet_ml_api_key: [{COMET_KEY}]\n",
        f"comet_ml_api_key: {COMET_KEY}\ncomet_ml_api_key: {COMET_KEY}\n",
        f"comet_ml_api_key: {COMET_KEY}\n{WANDB_KEY}\n",
        f"comet_ml_api_key: '{COMET_KEY}\n",
        f"comet_ml_api_kee: {COMET_KEY}\n",
        f"tracking: {COMET_KEY}\n",
        f"wandb: {WANDB_KEY}\n",
    ],
)
def test_a_key_is_in_no_message_about_a_file(content: str, zygote: Zygote, data: Path, tmp_path: Path) -> None:
    (tmp_path / "vars.yml").write_text(content)
    job = zygote.start(flags_for(data, tmp_path / "runs", "bright"), MASKWRIGHT_CONFIG_VARS=str(tmp_path / "vars.yml"))
    assert job.wait() == [2]
    assert str(tmp_path / "vars.yml") in job.text()
    assert leaks(job.text().encode(), "output") == []


def test_a_key_is_in_no_title_of_a_process_that_the_run_starts(data: Path, tmp_path: Path) -> None:
    """The run's own title is what the user typed; trackers and what they start carry no key."""
    pytest.importorskip("wandb")
    command = flags_for(
        data, tmp_path / "runs", "bright", "--max_steps", "100000", "--epochs", "1000", *OFFLINE,
        "--comet_ml_api_key", COMET_KEY, "--wandb_api_key", WANDB_KEY,
    )  # fmt: skip
    with subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_for(lambda: sum("tracker_process" in title for title in titles(process.pid)) == 3)
            assert wait_for(lambda: any("wandb-core" in title for title in titles(process.pid)))
            assert leaks("\n".join(titles(process.pid)).encode(), "titles") == []
        finally:
            process.terminate()
            process.wait(90)


def titles(parent: int) -> list[str]:
    """The command lines of all descendants of a process."""
    rows = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], text=True, capture_output=True, check=True).stdout
    children: dict[int, list[tuple[int, str]]] = {}
    for row in rows.splitlines()[1:]:
        pid, above, title = row.split(maxsplit=2)
        children.setdefault(int(above), []).append((int(pid), title))

    def below(pid: int) -> Iterator[str]:
        for child, title in children.get(pid, []):
            yield title
            yield from below(child)

    return list(below(parent))

"""What a user can get wrong ends in one sentence, exit code 2 and no traceback, through the real entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from errors import nearest, run_command
from tests.helpers import TINY, draw_set, python, run_script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "good", 3)
    draw_set(folder / "other_size", 2)
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder / "other_size" / "gt" / "01.png")
    draw_set(folder / "truncated", 2)
    whole = (folder / "truncated" / "im" / "00.png").read_bytes()
    (folder / "truncated" / "im" / "00.png").write_bytes(whole[: len(whole) // 2])
    (folder / "unpaired" / "im").mkdir(parents=True)
    (folder / "unpaired" / "gt").mkdir()
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(folder / "unpaired" / "im" / "a.png")
    (folder / "file").write_text("a regular file")
    torch.save({"foreign.weight": torch.ones(3), "foreign.bias": torch.ones(3)}, folder / "foreign.pth")
    torch.save({"bb.conv1.0.weight": torch.ones(2, 2)}, folder / "other_shape.pth")
    (folder / "junk.pth").write_bytes(b"no checkpoint at all")
    (folder / "runs" / "there").mkdir(parents=True)
    (folder / "runs" / "there" / "config.yml").write_text("seed: 1\n")
    return folder


CASES = {
    "missing folder": (["--data.train", "{d}/absent"], ["absent", "is no folder"]),
    "truncated image": (["--data.train", "{d}/truncated"], ["truncated/im/00.png", "cannot be read as an image"]),
    "mask of another size": (["--data.train", "{d}/other_size"], ["other_size/gt/01.png", "is 9x8"]),
    "image without mask": (["--data.train", "{d}/unpaired"], ["a.png", "has no mask"]),
    "missing validation set": (["--data.train", "{d}/good", "--data.val", "{d}/no_val"], ["no_val", "is no folder"]),
    "validation alone": (["--data.val", "{d}/good"], ["no training data", "--data.train"]),
    "unknown key": (["--trian.epochs", "1"], ["unknown key trian.epochs", "did you mean train.epochs?"]),
    "wrong type": (["--epochs", "ten"], ["train.epochs", "'ten'", "a whole number"]),
    "unknown backbone": (["--model.backbone", "resnet51"], ["model.backbone", "did you mean resnet50?"]),
    "foreign weights": (["--data.train", "{d}/good", "--pretrained", "{d}/foreign.pth"], ["nothing in", "foreign.pth"]),
    "weights of another shape": (
        ["--data.train", "{d}/good", "--pretrained", "{d}/other_shape.pth"], ["nothing in", "other_shape.pth"],
    ),
    "no checkpoint": (["--data.train", "{d}/good", "--pretrained", "{d}/junk.pth"], ["junk.pth", "cannot be read"]),
    "missing weights": (["--data.train", "{d}/good", "--pretrained", "{d}/none.pth"], ["no weights file", "none.pth"]),
    "missing checkpoint to resume": (["--data.train", "{d}/good", "--resume", "{d}/none.pth"], ["none.pth"]),
    "existing run": (["--experiment_name", "there"], ["exists already", "--resume", "--overwrite"]),
    "nothing to resume": (["--experiment_name", "new", "--resume"], ["no run to resume", "--resume auto"]),
    "no permission": (["--output_dir", "{d}/file/runs"], ["cannot write into the run folder", "output_dir"]),
    "unknown metric": (["--data.train", "{d}/good", "--checkpoint.monitor", "val/f1"], ["val/jaccard"]),
    "unknown optimizer": (["--data.train", "{d}/good", "--optimizer.name", "adamv"], ["optimizer.name", "adam"]),
    "unknown loss": (["--data.train", "{d}/good", "--loss.weights", "{{bcf: 1}}"], ["bcf", "did you mean"]),
    "unknown transform": (["--data.train", "{d}/good", "--data.augment", "[{{name: Fliq}}]"], ["Fliq"]),
    "frozen nothing": (["--data.train", "{d}/good", "--optimizer.freeze", "decoderr"], ["decoderr", "did you mean"]),
    "fp8": (["--data.train", "{d}/good", "--mixed_precision", "fp8"], ["fp8", "bf16"]),
    "no such device": (["--device", "cuda:77"], ["cuda:77", "--device cpu"]),
}  # fmt: skip


def untouched(data: Path) -> list[Path]:
    """What no failing run may add to or take from."""
    return sorted(path for path in data.rglob("*") if path.name not in (".lock", "new"))


@pytest.mark.parametrize("case", CASES)
def test_training(case: str, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags, said = CASES[case]
    flags = [flag.format(d=data) for flag in flags]
    before = untouched(data)
    common = [*TINY, "--output_dir", str(data / "runs" if "--experiment_name" in flags else tmp_path)]
    code, out, err = run_script(monkeypatch, "train", *common, *flags)
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert all(text in err for text in said), err
    assert "Traceback" not in err
    assert err.count("\n") == 1 or "the data" in err  # faults of the data are a list, one a line
    assert untouched(data) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "{d}/absent"], "absent"),
        (["--checkpoint", "{d}/junk.pth"], "junk.pth"),
        (["--checkpoint", "{d}/foreign.pth"], "belong to none of the families"),
        (["--checkpoint", "{d}/good"], "no best.pth or last.pth"),
    ],
)
def test_evaluation(flags: list[str], said: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run_script(monkeypatch, "evaluate", *[flag.format(d=data) for flag in flags])
    assert code == 2
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_all_faults_of_the_data_are_listed_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = "+".join(str(data / name) for name in ("truncated", "good", "other_size", "unpaired"))
    code, _, err = run_script(monkeypatch, "train", *TINY, "--check-data", "--data.train", sets)
    assert code == 2
    assert "3 faults in the data" in err
    assert all(name in err for name in ("truncated/im/00.png", "other_size/gt/01.png", "unpaired/im/a.png"))


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, flags in (("train", ["--epochs", "ten", "--debug"]), ("evaluate", ["--debug"])):
        code, _, err = run_script(monkeypatch, name, *flags)
        assert code == 1
        assert "Traceback" in err
        assert "errors.UserError: " in err


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_no_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> None:
        raise ZeroDivisionError

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as raised:
        run_command(bug)
    assert raised.value.code == 1
    said = capsys.readouterr().err
    assert "in bug" in said
    assert said.endswith("ZeroDivisionError\n")
    with pytest.raises(SystemExit) as raised:
        run_command(interrupt)
    assert raised.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_command(lambda: 5) == 5


def test_the_nearest_word_is_offered_and_no_far_one() -> None:
    assert nearest("epochz", ["epochs", "lr"]) == " (did you mean epochs?)"
    assert nearest("zzz", ["epochs", "lr"]) == ""


def test_the_real_commands(data: Path, tmp_path: Path) -> None:
    done = python("train.py", "--epochs", "ten")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: train.epochs (from flag --epochs) is 'ten', but must be a whole number\n"
    done = python("train.py", "--epochs", "ten", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr

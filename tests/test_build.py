"""Building from a configuration: published weights, input statistics, runs that start from their own settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import config
import downloads
from build import build_model
from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from errors import UserError
from models import create_model
from run import clear_run
from tests.helpers import TINY, draw_set, flags_for, in_process
from tracking import Log
from utils import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def test_statistics_of_each_image_make_brightness_irrelevant() -> None:
    dark = np.random.default_rng(0).integers(0, 60, (1, 8, 9, 3)).astype(np.uint8)
    both = normalize(np.concatenate([dark, dark * 4]), "image")
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=0)
    assert both.mean((1, 2, 3)).abs().max() < 1e-6
    flat = normalize(np.full((1, 4, 4, 3), 200, np.uint8), "image")
    assert flat.abs().max() < 1e-4  # and not infinite
    pixel = normalize(dark)[0, :, 3, 5]
    expected = [(dark[0, 3, 5, c] / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)]
    np.testing.assert_allclose(pixel.numpy(), expected, atol=1e-6)


def test_backbone_weights_come_from_their_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = create_model("birefnet", backbone="pvt_v2_b0", decoder_attention="none")
    official = {k.removeprefix("bb."): v for k, v in source.official_state_dict().items() if k.startswith("bb.")}
    asked: list[str] = []

    def download(address: str, file: str, hash_prefix: str | None = None) -> None:
        asked.append(address)
        torch.save(official, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    settings = config.load([*TINY, "--data.train", "x", "--pretrained", "backbone"])
    for _ in range(2):  # the second time it is there already
        model = build_model(settings, None, ALONE, Log([], quiet=True))  # type: ignore[arg-type]
    assert len(asked) == 1
    assert asked[0].endswith("pvt_v2_b0.pth")
    own = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    theirs = source.state_dict()
    assert own
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())

    (tmp_path / "checkpoints" / "pvt_v2_b0.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="no longer what was downloaded"):
        downloads.fetch(asked[0])


def test_offline_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"cannot download https://example\.invalid/w\.pth.*model\.pretrained"):
        downloads.fetch("https://example.invalid/w.pth")


def test_settings_without_official_weights_say_so() -> None:
    settings = config.load([*TINY, "--data.train", "x", "--pretrained", "official"])
    with pytest.raises(UserError, match="no official weights are published"):
        build_model(settings, None, ALONE, Log([], quiet=True))  # type: ignore[arg-type]


def test_an_overwritten_run_is_kept_until_the_new_one_stands(tmp_path: Path) -> None:
    draw_set(tmp_path / "train", 2)
    draw_set(tmp_path / "val", 1)
    flags = flags_for(tmp_path, tmp_path / "runs", "x", "--epochs", "1", "--num_workers", "0", "--batch_size", "2")
    in_process(*flags)
    run = tmp_path / "runs" / "x"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match="misspelt"):
        in_process(*flags, "--overwrite", "--data.train", str(tmp_path / "misspelt"))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    (run / "old").mkdir()
    in_process(*flags, "--overwrite")
    assert not (run / "old").exists()
    assert (run / "train.log").read_text().count("resumed") == 0

    # Its name is all that a resume needs: the other settings are in the run's own configuration.
    in_process("--output_dir", str(tmp_path / "runs"), "--experiment_name", "x", "--resume", "--epochs", "2")
    assert "resumed from last.pth at epoch 2, step 1" in (run / "train.log").read_text()


def test_clearing_keeps_the_lock_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "last.pth"):
        (run / name).touch()
    (run / "link").symlink_to(tmp_path / "elsewhere")
    clear_run(run)
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert (tmp_path / "elsewhere" / "file").exists()

"""Building from a configuration: published weights, input statistics, runs that start from their own settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import build
import config
import downloads
from build import build_model
from checkpoint import RunFolder
from dataset import IMAGENET_MEAN, IMAGENET_STD, normalize
from errors import UserError
from models import create_model
from readers import pixel_counts, semantic_reader
from tasks import get_task
from tests.helpers import TINY, draw_set, flags_for, in_process
from tests.sets import save
from tracking import Log
from utils import World, is_better

ALONE = World.alone()


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
        model = build_model(settings, ALONE, Log([], quiet=True))
    assert len(asked) == 1
    assert asked[0].endswith("/pvt_v2_b0.pth")
    own = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    theirs = source.state_dict()
    assert own
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())

    (file,) = (tmp_path / "checkpoints").glob("*-pvt_v2_b0.pth")
    file.write_bytes(b"something else")
    with pytest.raises(UserError, match="no longer what was downloaded"):
        downloads.fetch(asked[0])


def test_offline_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"cannot download https://example\.invalid/w\.pth.*model\.pretrained"):
        downloads.fetch("https://example.invalid/w.pth")


def test_a_repository_out_of_reach_is_told_from_one_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"model.safetensors": LocalEntryNotFoundError("offline"), "pytorch_model.bin": EntryNotFoundError("none")}

    def refuse(repository: str, name: str) -> str:
        raise errors[name]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="cannot download hf-hub:a/b"):
        downloads.fetch("hf-hub:a/b")
    errors["model.safetensors"] = EntryNotFoundError("none")
    with pytest.raises(UserError, match=r"a/b holds neither model\.safetensors nor pytorch_model\.bin"):
        downloads.fetch("hf-hub:a/b")


def test_settings_without_official_weights_say_so() -> None:
    settings = config.load([*TINY, "--data.train", "x", "--pretrained", "official"])
    with pytest.raises(UserError, match="no official weights are published"):
        build_model(settings, ALONE, Log([], quiet=True))


def test_an_overwritten_run_is_kept_until_the_new_one_stands(tmp_path: Path) -> None:
    draw_set(tmp_path / "train", 2)
    draw_set(tmp_path / "val", 1)
    flags = flags_for(tmp_path, tmp_path / "runs", "x", "--epochs", "1", "--num_workers", "0", "--batch_size", "2")
    in_process(*flags)
    run = tmp_path / "runs" / "x"

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(UserError, match="misspelt"):
        in_process(*flags, "--overwrite", "--data.train", str(tmp_path / "misspelt"))
    assert contents() == before

    (run / "old_epoch_7.pth").touch()
    (run / "notes.txt").write_text("the user's own")
    in_process(*flags, "--overwrite")
    assert not (run / "old_epoch_7.pth").exists()
    assert (run / "notes.txt").exists()
    assert (run / "train.log").read_text().count("resumed") == 0

    # Its name is all that a resume needs: the other settings are in the run's own configuration.
    in_process("--output_dir", str(tmp_path / "runs"), "--experiment_name", "x", "--resume", "--epochs", "2")
    assert "resumed from last.pth at epoch 2, step 1" in (run / "train.log").read_text()


def test_clearing_a_run_removes_what_runs_write_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    for name in (".lock", "last.pth", "metrics.csv", "mine.txt"):
        (run / name).touch()
    (run / "comet").symlink_to(tmp_path / "elsewhere")
    RunFolder(run).clear()
    assert sorted(path.name for path in run.iterdir()) == [".lock", "comet", "mine.txt"]
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    draw_set(tmp_path / "train", 2)
    mine = tmp_path / "runs" / "x" / "photos" / "a.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="holds files that are no run"):
            in_process(*flags_for(tmp_path, tmp_path / "runs", "x"), *overwrite)
    assert mine.read_text() == "mine"


def test_resume_needs_only_the_name_in_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_set(tmp_path / "train", 2)
    draw_set(tmp_path / "val", 1)
    monkeypatch.chdir(tmp_path)
    flags = ["--data.train", "train", "--data.val", "val", "--experiment_name", "x", "--num_workers", "0"]
    in_process(*TINY, *flags, "--epochs", "1", "--overwrite")
    saved = (tmp_path / "runs" / "x" / "config.yml").read_text()
    assert "overwrite" not in saved
    in_process("--experiment_name", "x", "--resume", "--epochs", "2")
    assert "finished after" in (tmp_path / "runs" / "x" / "train.log").read_text()
    assert not (tmp_path / "runs" / "x" / "runs").exists()


def test_one_entry_of_a_mapping_is_a_flag() -> None:
    weights = config.load(["--data.train", "x", "--loss.weights.mae", "7"]).loss.weights
    assert weights == {**config.load(["--data.train", "x"]).loss.weights, "mae": 7.0}
    with pytest.raises(UserError, match=r"loss\.weights\.mae .* at least 0"):
        config.load(["--loss.weights.mae", "-1"])


def test_a_broken_line_of_yaml_is_named_but_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "vars.yml"
    file.write_text("seed: 1\ncomet_ml_api_key: CANARY: x\n")
    with pytest.raises(UserError, match=r"line 2") as error:
        config.load(["--config", str(file)])
    assert "CANARY" not in str(error.value)


def test_sizes_and_auxiliary_classes_must_fit() -> None:
    with pytest.raises(UserError, match="multiples of 32"):
        build.check_size(config.load(["--data.train", "x", "--size", "100"]), 32)
    settings = config.load(["--data.train", "x", "--model.auxiliary_classes", "1"])
    with pytest.raises(UserError, match=r"loss\.weights\.class"):
        build.check_classes(settings, ["a"])
    settings.loss.weights["class"] = 5.0
    build.check_classes(settings, ["a"])
    with pytest.raises(UserError, match="2 classes"):
        build.check_classes(settings, ["a", "b"])


def test_what_is_no_number_beats_nothing() -> None:
    assert not is_better(float("nan"), None, True)
    assert is_better(0.1, float("nan"), True)
    assert is_better(0.1, 0.2, False)
    assert not is_better(0.1, 0.2, True)


def test_a_list_that_takes_originals_is_given_them_from_the_cache_too(tmp_path: Path) -> None:
    draw_set(tmp_path / "train", 3)
    (tmp_path / "own.yml").write_text("data: {augment: [{name: ScaleCrop, p: 1.0, scale: [0.5, 2.0]}]}")
    words = [*TINY, "--config", str(tmp_path / "own.yml"), "--data.train", str(tmp_path / "train"), "--data.val="]
    batches = []
    for more in ([], ["--data.load_all"]):
        settings = config.load([*words, "--data.val_fraction", "0", "--train.batch_size", "3", *more])
        task = get_task(settings.task)
        readers = build.build_readers(settings, task, ALONE, Log([]))
        loader, _ = build.build_loaders(settings, task, ALONE, readers, 32)
        batches.append(next(iter(loader)))
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].targets.masks, batches[1].targets.masks)


def test_all_ranks_know_what_the_check_of_one_learned(tmp_path: Path) -> None:
    for sub, picture in (("images", np.zeros((4, 6, 3), np.uint8)), ("masks", np.ones((4, 6), np.uint8))):
        save(tmp_path / sub / "x.png", picture)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    first, other = (semantic_reader(str(tmp_path)) for _ in range(2))

    class Rank(World):
        """A second rank, to which the first has sent what it found."""

        def agree(self, value: object) -> object:
            return [[]], [first.findings()]

    assert build.find_faults([first], ALONE, False) == [[]]
    assert build.find_faults([other], Rank(**{**vars(ALONE), "rank": 1}), False) == [[]]
    (tmp_path / "masks/x.png").unlink()
    assert pixel_counts(other).tolist() == [0, 24, 0]

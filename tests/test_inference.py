"""inference.py from the command line to the files, and what is said when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inference
import writers
from checkpoint import load_model
from errors import UserError, run_command
from foreground import estimate_foreground
from inference import Frame, Predictor
from loss import resize
from readers import Fault, ImageList
from samples import Batch, SampleInfo
from tasks import TASKS, get_task
from tests.conftest import ROOT, SHARED, needs_shared
from tests.test_golden_birefnet import golden
from tests.test_video import difference, film, write_film
from tests.tiny import expected_probabilities, files_below, photo, save, tiny_model, write_run
from video import VideoReader

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", model)


@pytest.fixture
def infer(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> Command:
    """The command in this process, on the CPU without workers unless told otherwise; returns its exit code."""
    monkeypatch.setenv("MASKWRIGHT_CONFIG_VARS", str(tmp_path / "absent.yml"))

    def call(*arguments: object, checkpoint: Path = run, output: str = "out") -> int:
        words = [str(word) for word in arguments]
        always = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / output), "--device", "cpu"]
        workers = [] if "--num_workers" in words else ["--num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["inference.py", *always, *workers, *words])
        try:
            run_command(inference.command)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def in_bytes(probabilities: np.ndarray) -> np.ndarray:
    return (probabilities * 255).astype(np.uint8)


def off_by(mask: np.ndarray, expected: np.ndarray) -> int:
    return int(np.abs(mask.astype(int) - expected).max())


# ---------------------------------------------------------------- images in, files out


def test_every_kind_of_output_keeps_names_folders_and_sizes(infer: Command, model: Any, tmp_path: Path) -> None:
    images = {"a": photo(0, 50, 70), "sub/b.c": photo(1, 33, 90), "sub/deep/d": photo(2, 80, 40)}
    photos = tmp_path / "photos"
    save(photos / "a.png", images["a"])
    save(photos / "sub/b.c.bmp", images["sub/b.c"])
    with_alpha = np.dstack([images["sub/deep/d"], np.full((80, 40), 128, np.uint8)])
    save(photos / "sub/deep/d.png", with_alpha)
    grey = np.arange(60 * 41, dtype=np.uint16).reshape(60, 41) * 26
    save(photos / "grey.png", grey)
    images["grey"] = np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=2)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown turned a quarter clockwise
    save(photos / "turned.jpg", photo(3, 48, 64), exif=rotated, quality=95)
    images["turned"] = np.rot90(read(photos / "turned.jpg"), -1).copy()
    (photos / "notes.txt").write_text("no image")
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}

    assert infer("--input", photos, "--cutout", "--side_by_side") == 0
    suffixes = {"masks": "png", "cutouts": "png", "overlays": "jpg", "side_by_side": "jpg"}
    made = {f"{kind}/{name}.{suffix}" for name in images for kind, suffix in suffixes.items()}
    assert files_below(tmp_path / "out") == made
    for name, image in images.items():
        mask, cut, overlay, beside = (
            read(tmp_path / f"out/{kind}/{name}.{suffix}") for kind, suffix in suffixes.items()
        )
        height, width = image.shape[:2]
        assert mask.dtype == np.uint8
        assert mask.shape == (height, width), name
        assert off_by(mask, in_bytes(expected_probabilities(model, image))) <= 1, name
        assert mask.max() - mask.min() > 100, name  # else all of this would say little
        assert (cut == np.dstack([estimate_foreground(image, mask), mask])).all(), name
        assert difference(overlay, get_task("binary").draw(image, mask, [])) < 8, name
        assert beside.shape == (height, 3 * width, 3), name
        assert difference(beside[:, :width], image) < 8, name
        assert difference(beside[:, width : 2 * width], mask[..., None]) < 8, name
        assert difference(beside[:, 2 * width :], inference.on_checkers(cut)) < 8, name
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_overlay_shows_the_object_and_darkens_the_ground() -> None:
    image, alpha = np.full((6, 8, 3), 200, np.uint8), np.zeros((6, 8), np.uint8)
    alpha[:, 4:], alpha[:, 3] = 255, 128
    drawn = get_task("binary").draw(image, alpha, []).astype(int)
    assert (drawn[:, 4:] == 200).all()
    assert drawn[:, :3].max() < 140
    assert np.abs(drawn[:, 3] - (drawn[:, 0] + 200) / 2).max() <= 1


def test_checkers_show_where_a_cut_out_is_transparent() -> None:
    cutout = np.dstack([photo(0, 64, 48), np.full((64, 48), 255, np.uint8)])
    cutout[:, 16:32, 3], cutout[:, 32:, 3] = 0, 51
    shown = inference.on_checkers(cutout)
    assert (shown[:, :16] == cutout[:, :16, :3]).all()
    squares = shown[::16, 16].ravel().tolist()
    assert squares == [255] * 3 + [204] * 3 + [255] * 3 + [204] * 3
    assert np.abs(shown[:16, 32:] - (0.2 * cutout[:16, 32:, :3] + 0.8 * 204)).max() <= 1


def test_side_by_side_without_cut_outs_ends_with_the_overlay(infer: Command, tmp_path: Path) -> None:
    image = photo(0, 50, 70)
    save(tmp_path / "a.png", image)
    assert infer("--input", tmp_path / "a.png", "--side_by_side", "--no-overlay") == 0
    assert files_below(tmp_path / "out") == {"masks/a.png", "side_by_side/a.jpg"}
    overlay = get_task("binary").draw(image, read(tmp_path / "out/masks/a.png"), [])
    assert difference(read(tmp_path / "out/side_by_side/a.jpg")[:, 140:], overlay) < 8


def test_cut_outs_need_masks_that_are_alpha(
    infer: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "binary", replace(TASKS["binary"], cut_out=None))
    save(tmp_path / "a.png", photo(0, 40, 40))
    assert infer("--input", tmp_path / "a.png", "--cutout") == 2
    assert "--cutout needs masks that are alpha" in capsys.readouterr().err
    assert infer("--input", tmp_path / "a.png") == 0


def test_batch_size_and_workers_change_nothing(infer: Command, tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"photos/{number}.png", photo(number, 40 + 9 * number, 75))
    assert infer("--input", tmp_path / "photos", "--batch_size", 1, "--no-overlay", output="one") == 0
    assert infer("--input", tmp_path / "photos", "--batch_size", 3, "--num_workers", 2, output="three") == 0
    assert infer("--input", tmp_path / "photos", "--batch_size", 3, output="again") == 0
    assert not (tmp_path / "one/overlays").exists()
    assert len(files_below(tmp_path / "three")) == 10
    for name in files_below(tmp_path / "three"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in files_below(tmp_path / "one"):
        assert off_by(read(tmp_path / "one" / name), read(tmp_path / "three" / name)) <= 1


def test_running_twice_leaves_the_same_bytes_and_no_temporaries(infer: Command, tmp_path: Path) -> None:
    save(tmp_path / "photos/a.png", photo(0, 50, 70))
    assert infer("--input", tmp_path / "photos") == 0
    first = {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")}
    assert infer("--input", tmp_path / "photos") == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")} == first
    assert set(first) == {"masks/a.png", "overlays/a.jpg"}


def test_tta_is_the_mean_over_the_image_and_its_mirror(infer: Command, model: Any, tmp_path: Path) -> None:
    image = photo(4, 64, 64)  # the model's own size: mirroring and resizing commute
    save(tmp_path / "a.png", image)
    assert infer("--input", tmp_path / "a.png", "--tta", "--tta_scales", 1) == 0
    plain = expected_probabilities(model, image)
    mirrored = expected_probabilities(model, image[:, ::-1].copy())[:, ::-1]
    assert np.abs(plain - mirrored).max() > 0.02
    assert off_by(read(tmp_path / "out/masks/a.png"), in_bytes((plain + mirrored) / 2)) <= 1


def test_tta_is_the_mean_over_its_scales(infer: Command, tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(4, 128, 128))
    masks = []
    for number, scales in enumerate([[0.75, 1, 1.25], [0.75], [1], [1.25]]):
        chosen = ["--tta_scales", *scales] if number else []
        assert infer("--input", tmp_path / "a.png", "--size", 128, "--tta", *chosen, output=str(number)) == 0
        masks.append(read(tmp_path / f"{number}/masks/a.png").astype(float))
    assert np.abs(masks[0] - np.mean(masks[1:], axis=0)).max() <= 1
    assert np.abs(masks[0] - masks[2]).max() > 10  # the scales matter


def test_size_is_the_models_input_and_averaged_weights_are_used(infer: Command, tmp_path: Path) -> None:
    weights, average = tiny_model(1), tiny_model(2)
    run = write_run(tmp_path / "runs/averaged", weights, ema=average)
    image = photo(5, 60, 90)
    save(tmp_path / "a.png", image)
    assert infer("--input", tmp_path / "a.png", "--size", 96, 64, checkpoint=run / "best.pth") == 0
    mask = read(tmp_path / "out/masks/a.png")
    assert off_by(mask, in_bytes(expected_probabilities(average, image, (96, 64)))) <= 1
    assert off_by(mask, in_bytes(expected_probabilities(weights, image, (96, 64)))) > 20
    assert off_by(mask, in_bytes(expected_probabilities(average, image, (64, 64)))) > 1


def test_several_inputs_patterns_and_odd_names(infer: Command, tmp_path: Path) -> None:
    for name in ("in/a.png", "in/b.jpg", "in/deep/c.png", "x, y [1].png"):
        save(tmp_path / name, photo(0, 40, 40))
    assert infer("--input", tmp_path / "in/**/*.png", tmp_path / "x, y [1].png") == 0
    assert files_below(tmp_path / "out/masks") == {"a.png", "deep/c.png", "x, y [1].png"}
    assert infer("--input", tmp_path / "x, y [1].png", output="single") == 0
    assert files_below(tmp_path / "single/masks") == {"x, y [1].png"}


def test_from_python(run: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(0, 50, 70))
    ((frame, mask),) = Predictor(*load_model(run)).stills(ImageList([tmp_path / "a.png"]))
    assert (frame.info.sample_id, frame.info.size, frame.picture.shape) == ("a", (50, 70), (50, 70, 3))
    assert isinstance(mask, np.ndarray)
    assert mask.shape == (50, 70)


# ---------------------------------------------------------------- tiles


class Brightness(torch.nn.Module):
    """A model that knows a pixel's own value and nothing of its place."""

    stride = 32

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"logits": batch.images.mean(1, keepdim=True)}


@pytest.mark.parametrize("normalize", ["imagenet", "image"])
@pytest.mark.parametrize("size", [(64, 96), (65, 96), (64, 97), (150, 331), (64, 400)])
def test_tiles_of_pixelwise_predictions_leave_no_seam(size: tuple[int, int], normalize: str, tmp_path: Path) -> None:
    image = photo(6, *size)
    image[:, : size[1] // 3] //= 4  # so that no tile is as bright as the whole
    save(tmp_path / "a.png", image)
    if normalize == "imagenet":
        normal = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    else:
        normal = (image - image.mean()) / image.std()
    expected = 1 / (1 + np.exp(-normal.mean(2)))
    meta = {"task": "binary", "size": [96, 64], "normalize": normalize}
    for options in ({}, {"batch_size": 1, "overlap": 0.6}, {"tta": [1.0]}):
        ((_, mask),) = Predictor(Brightness(), meta, tile=True, **options).stills(ImageList([tmp_path / "a.png"]))
        assert isinstance(mask, np.ndarray)
        assert off_by(mask, in_bytes(expected)) <= 1
        assert (mask != in_bytes(expected)).mean() < 0.01


def test_what_fits_into_a_tile_is_predicted_as_without_tiling(infer: Command, tmp_path: Path) -> None:
    for name, sides in (("small", (30, 50)), ("tile", (64, 64)), ("thin", (64, 20))):
        save(tmp_path / f"in/{name}.png", photo(7, *sides))
    assert infer("--input", tmp_path / "in", output="plain") == 0
    assert infer("--input", tmp_path / "in", "--tile", output="tiled") == 0
    for name in ("small", "tile", "thin"):
        masks = [read(tmp_path / output / f"masks/{name}.png") for output in ("plain", "tiled")]
        assert off_by(*masks) <= 1


def test_a_large_picture_is_seen_at_its_own_resolution(infer: Command, model: Any, tmp_path: Path) -> None:
    image = photo(8, 200, 300)
    save(tmp_path / "a.png", image)
    assert infer("--input", tmp_path / "a.png", "--tile", "--overlap", 0, "--batch_size", 3) == 0
    mask = read(tmp_path / "out/masks/a.png")
    assert mask.shape == (200, 300)
    corner = in_bytes(expected_probabilities(model, image[:64, :64].copy()))
    assert off_by(mask[:40, :50], corner[:40, :50]) <= 1  # 45 and 59 pixels on the next tiles begin
    assert off_by(mask, in_bytes(expected_probabilities(model, image))) > 20


# ---------------------------------------------------------------- official weights


@needs_shared
def test_official_weights_file_to_mask_as_the_official_code(infer: Command, tmp_path: Path) -> None:
    folder = SHARED / "golden" / "birefnet"
    case, expected = json.loads((folder / "pipeline.json").read_text()), np.load(folder / "pipeline.npz")
    weights = golden().make_state_dict(json.loads((folder / case["keys"]).read_text()))
    torch.save({"module." + key: value for key, value in weights.items()}, tmp_path / "official.pth")
    for sample in case["samples"]:
        shape = (1, 3, sample["height"], sample["width"])
        noise = golden().make_image(f"birefnet/visible/pipeline/{sample['name']}", shape) * 56 + 120
        save(tmp_path / f"photos/{sample['name']}.png", noise.clamp(0, 255).byte()[0].permute(1, 2, 0).numpy())
    official = tmp_path / "official.pth"
    assert infer("--input", tmp_path / "photos", "--size", 128, 96, checkpoint=official) == 0

    predictor, images = Predictor(*load_model(official), size=[128, 96]), ImageList([tmp_path / "photos"])
    for frame, _ in predictor.stills(images):
        name, size = frame.info.sample_id, frame.info.size
        mask = read(tmp_path / f"out/masks/{name}.png")
        wanted = expected[f"{name}_png"]
        assert mask.shape == wanted.shape == size
        assert off_by(mask, wanted) <= 1
        assert (mask != wanted).mean() < 0.002
        probabilities = predictor.model.predict(Batch.from_images(frame.inputs[None]))["logits"].sigmoid()
        for key, values in (
            ("input", frame.inputs),
            ("prob", probabilities),
            ("resized", resize(probabilities, size)),
        ):
            sampled = golden().sample(values)
            assert np.abs(sampled - expected[f"{name}_{key}"]).max() <= (1e-6 if key == "input" else 1e-5), key


# ---------------------------------------------------------------- what goes wrong


def test_a_broken_file_is_reported_and_the_others_go_on(
    infer: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"photos/{name}.jpg", photo(0, 60, 60))
    whole = (tmp_path / "photos/b.jpg").read_bytes()
    (tmp_path / "photos/b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/e.png").write_bytes(b"")
    assert infer("--input", tmp_path / "photos", "--batch_size", 2) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "photos/b.jpg") in said
    assert str(tmp_path / "photos/e.png") in said
    assert "2 of" in said
    assert "Traceback" not in said
    assert files_below(tmp_path / "out") == {"masks/a.png", "masks/c.png", "overlays/a.jpg", "overlays/c.jpg"}


def test_two_inputs_for_one_output_are_an_error_before_work_begins(
    infer: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one/a.png", "two/a.jpg"):
        save(tmp_path / name, photo(0, 40, 40))
    assert infer("--input", tmp_path / "one", tmp_path / "two") == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "one/a.png") in said
    assert str(tmp_path / "two/a.jpg") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "missing/*.png"], ["missing/*.png", "no pattern"]),
        (["--inptu", "photos"], ["unknown key inptu", "did you mean input"]),
        (["--input", "photos", "--batch_size", "0"], ["batch_size", "at least 1"]),
        (["--input", "photos", "--batch_size", "many"], ["batch_size", "whole number"]),
        (["--input", "photos", "--size", "100"], ["--size is 100", "multiple of 32"]),
        (["--input", "photos", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--input", "photos", "--device", "toaster"], ["device", "toaster"]),
        (["--input", "photos", "--mixed_precision", "fp8"], ["fp8", "bf16"]),
        (["--input", "photos", "--checkpoint", "nothing"], ["no checkpoint nothing"]),
        (["--input", "photos", "--checkpoint", "photos/a.png"], ["photos/a.png"]),
        ([], ["--input is missing"]),
        (["--input", "photos", "--output", "photos/results"], ["would write into the input"]),
        (["--input", "photos/a.png", "--output", "photos/a.png"], ["cannot write", "photos/a.png"]),
        (["--input", "done/masks/a.png", "--output", "done"], ["would write into the input"]),
    ],
)
def test_mistakes_end_in_a_sentence(
    infer: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "photos/a.png", photo(0, 40, 40))
    save(tmp_path / "done/masks/a.png", photo(0, 40, 40))
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    assert infer(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before


def prediction(name: str, height: int = 4, width: int = 4) -> inference.Prediction:
    frame = Frame(SampleInfo(name, f"{name}.png", "", (height, width)), np.zeros((height, width, 3), np.uint8))
    return frame, np.zeros((height, width), np.uint8)


def draw(*kinds: str) -> inference.Draw:
    return partial(inference.draw_outputs, task=get_task("binary"), kinds=list(kinds))


def test_a_full_disk_ends_in_a_sentence_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.os, "replace", refuse)
    with pytest.raises(UserError, match=r"a\.png: No space left"):
        inference.write_stills([prediction("a")], tmp_path, draw("masks"))
    assert files_below(tmp_path) == set()


def test_what_a_format_cannot_hold_is_a_fault(tmp_path: Path) -> None:
    faults = inference.write_stills([prediction("wide", 1, 66_000)], tmp_path, draw("masks", "overlays"))
    assert [fault.path for fault in faults] == ["wide.png"]
    assert "too large for a .jpg" in faults[0].problem


def test_a_model_that_fails_is_a_fault_and_no_black_mask(run: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(0, 40, 40))
    model, meta = load_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for options in ({}, {"tile": True}, {"tta": [1.0, 1.5]}):
        ((_, result),) = Predictor(model, meta, **options).stills(ImageList([tmp_path / "a.png"]))
        assert isinstance(result, Fault)
        assert "not a number" in result.problem


def test_few_results_wait_however_slow_the_disk_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, written, most = 0, 0, 0
    lock = threading.Lock()

    def write(*arguments: Any) -> None:
        nonlocal written
        time.sleep(0.005)
        with lock:
            written += 1

    def predictions() -> Iterator[inference.Prediction]:
        nonlocal made, most
        for number in range(60):
            made += 1
            most = max(most, made - written)
            yield prediction(str(number))

    monkeypatch.setattr(inference, "write_image", write)
    assert inference.write_stills(predictions(), tmp_path, draw("masks")) == []
    assert made == written == 60
    assert most <= 3 * inference.WRITERS + 2


def test_threads_keep_order_work_at_once_and_pass_errors_on() -> None:
    together = threading.Barrier(3)

    def work(number: int) -> int:
        together.wait(10)  # breaks unless three are at work
        time.sleep(0.01 * (number % 3))
        return number

    assert list(inference.ahead(work, range(12), 3, 3)) == list(range(12))
    assert list(inference.ahead(lambda number: number, range(12), 0, 3)) == list(range(12))
    with pytest.raises(ZeroDivisionError):
        list(inference.ahead(lambda number: 1 // number, [2, 1, 0, 3], 2, 2))


# ---------------------------------------------------------------- videos


def test_a_video_becomes_a_video_of_each_kind(infer: Command, run: Path, tmp_path: Path) -> None:
    path = write_film(tmp_path / "in/sub/clip.mov", film(11), rate=24)
    assert infer("--input", tmp_path / "in", "--cutout", "--side_by_side", "--batch_size", 4) == 0
    numbers = [f"{number:06d}" for number in range(1, 12)]
    kinds = ("masks", "overlays", "side_by_side")
    assert files_below(tmp_path / "out") == {
        *(f"{kind}/sub/clip.mp4" for kind in kinds), *(f"cutouts/sub/clip/{number}.png" for number in numbers)
    }  # fmt: skip
    pictures = list(VideoReader(path))
    masks = [mask for _, mask in Predictor(*load_model(run)).frames(VideoReader(path), "clip")]
    for kind in kinds:
        video = VideoReader(tmp_path / "out" / kind / "sub/clip.mp4")
        assert (video.rate, video.count) == (24, 11)
        for frame, picture, mask in zip(video, pictures, masks, strict=True):
            assert frame.shape == (48, 240 if kind == "side_by_side" else 80, 3)
            if kind != "overlays":
                shown = frame[:, 80:160] if kind == "side_by_side" else frame
                assert difference(shown, mask[..., None]) < 8
            if kind == "side_by_side":
                assert difference(frame[:, :80], picture) < 8
    for number, picture, mask in zip(numbers, pictures, masks, strict=True):
        cut = read(tmp_path / f"out/cutouts/sub/clip/{number}.png")
        assert isinstance(mask, np.ndarray)
        assert (cut == np.dstack([estimate_foreground(picture, mask), mask])).all()
        assert mask.max() - mask.min() > 100


def test_images_and_videos_mix_and_may_share_a_name(infer: Command, tmp_path: Path) -> None:
    save(tmp_path / "in/a.jpg", photo(0, 40, 60))
    write_film(tmp_path / "in/a.mp4", film(3))
    write_film(tmp_path / "in/b.AVI", film(3), "MJPG")
    write_film(tmp_path / "more/c.mkv", film(3))
    assert infer("--input", tmp_path / "in", tmp_path / "more/*.mkv", "--no-overlay", "--tta", "--tile") == 0
    assert files_below(tmp_path / "out") == {"masks/a.png", "masks/a.mp4", "masks/b.mp4", "masks/c.mp4"}


def test_a_damaged_video_leaves_nothing_and_the_others_go_on(
    infer: Command,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("a", "b", "c"):
        path = write_film(tmp_path / f"in/{name}.mkv", film(20))
    (tmp_path / "in/a.mkv").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "in/b.mkv").write_bytes(b"no video")
    save(tmp_path / "in/d.png", photo(0, 40, 60))
    assert infer("--input", tmp_path / "in", "--cutout") == 2
    said = capfd.readouterr().err
    assert said.startswith("error: 2 of the inputs have no result")
    assert f"{tmp_path}/in/a.mkv: is damaged or cut off" in said
    assert f"{tmp_path}/in/b.mkv: cannot be read as a video" in said
    assert len(said.splitlines()) == 3  # and nothing that OpenCV or FFmpeg have to say
    made = {path.split(".")[0] for path in files_below(tmp_path / "out") if not path.startswith("cutouts/c/")}
    assert made == {"masks/c", "overlays/c", "masks/d", "overlays/d", "cutouts/d"}
    assert len(list((tmp_path / "out/cutouts/c").iterdir())) == 20


def test_side_by_side_of_a_wide_video_is_a_fault(
    infer: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "wide.mp4", film(2, 32, 3000))
    assert infer("--input", tmp_path / "wide.mp4", "--side_by_side") == 2
    assert "wide.mp4: cannot become an .mp4 file of 9000x32" in capfd.readouterr().err
    assert files_below(tmp_path / "out") == set()


def test_videos_that_would_share_outputs_are_refused(infer: Command, tmp_path: Path, capsys: Any) -> None:
    write_film(tmp_path / "in/a.mp4", film(2))
    write_film(tmp_path / "in/a.mkv", film(2))
    assert infer("--input", tmp_path / "in") == 2
    assert "would write the same outputs" in capsys.readouterr().err
    (tmp_path / "in/a.mkv").unlink()
    save(tmp_path / "in/a/000001.jpg", photo(0, 40, 40))
    assert infer("--input", tmp_path / "in", "--cutout") == 2
    assert f"{tmp_path}/in/a.mp4: would write its cut-outs into the folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert infer("--input", tmp_path / "in") == 0


def test_few_frames_wait_however_long_the_video_and_slow_the_disk(tmp_path: Path) -> None:
    made, most = 0, 0

    def predictions() -> Iterator[inference.Prediction]:
        nonlocal made, most
        for _ in range(80):
            made += 1
            most = max(most, made - written)
            picture = np.zeros((32, 32, 3), np.uint8)
            yield Frame(SampleInfo("a", "a.mp4", "", (32, 32)), picture), picture[..., 0]

    written = 0

    def slow(prediction: inference.Prediction) -> inference.Drawn:
        nonlocal written
        time.sleep(0.005)
        written += 1
        return draw("masks")(prediction)

    inference.write_video(predictions(), tmp_path, "a", 25, slow)
    assert VideoReader(tmp_path / "masks/a.mp4").count == 80
    assert most <= 3 * inference.WRITERS + 2


def test_frames_are_decoded_a_few_ahead(run: Path) -> None:
    decoded = 0

    class Endless:
        path = "endless.mp4"

        def __iter__(self) -> Iterator[np.ndarray]:
            nonlocal decoded
            while True:
                decoded += 1
                yield np.zeros((8, 8, 3), np.uint8)

    predictor = Predictor(*load_model(run), batch_size=2)
    predictions = predictor.frames(Endless(), "endless")  # type: ignore[arg-type]
    for number in range(1, 10):
        _, mask = next(predictions)
        assert isinstance(mask, np.ndarray)
        assert decoded <= number + 6
    predictions.close()


# ---------------------------------------------------------------- the command itself


@pytest.mark.parametrize("script", ["inference.py", "evaluate.py", "train.py"])
def test_help_comes_before_anything_heavy(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'cv2'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "--mixed_precision" in shown.stdout or "--train.mixed_precision" in shown.stdout


def test_the_command_as_a_program(run: Path, tmp_path: Path) -> None:
    save(tmp_path / "photos/a.png", photo(0, 40, 40))
    (tmp_path / "photos/b.png").write_bytes(b"broken")
    arguments = ["--checkpoint", run, "--input", "photos", "--output", "out", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "inference.py"), *map(str, arguments)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 1 of")
    assert "photos/b.png" in ended.stderr
    assert files_below(tmp_path / "out") == {"masks/a.png", "overlays/a.jpg"}

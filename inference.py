"""Run a model on images: `python inference.py --checkpoint runs/my_run --input photos/ --output out/`.

Inputs are images, folders (all below them, structure kept) and quoted patterns. Each image gets a mask and an overlay
of its own size: `out/masks/<name>.png` and `out/overlays/<name>.jpg`. A file that cannot be read is reported at the
end, and the others go on. From Python:

    model, meta = load_model(Path("runs/my_run"))
    for info, mask in predict_images(model, meta, ImageList(["photos"])):
        ...  # mask: (H, W) uint8 at the image's own size, or a Fault
"""

from __future__ import annotations

import os
import sys

from config import answer_at_once, parse_options
from errors import UserError, run_command
from settings import InferenceSettings

ACTIONS = {"debug": "show the traceback of a user error", "help": "this page"}

if __name__ == "__main__":
    usage = "inference.py --checkpoint RUN --input PATH [PATH ...] --output FOLDER [options]"
    answer_at_once(usage, ACTIONS, InferenceSettings)

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import TEMPORARY, load_model
from dataset import Dataset, EvalSampler, Item, build_loader
from predict import predict
from readers import DataError, Fault, ImageList, Reader, read_image
from samples import Batch, SampleInfo, SampleKey
from tasks import Task, get_task
from utils import Precision, choose_precision, loading_workers, pick_device

WRITERS = 4
DEFAULT_SIZE = [1024, 1024]  # of official weights, which do not say what they were trained on

Prediction = tuple[SampleInfo, np.ndarray | Fault]


def run(settings: InferenceSettings) -> list[Fault]:
    """Predict and write everything; returns what could not be done, by input file. `UserError` before that."""
    images, output = list_images(settings.input), Path(settings.output)
    prepare_output(output, settings, images)
    model, meta = load_model(Path(settings.checkpoint))
    predictions = predict_images(
        model,
        meta,
        images,
        size=settings.size,
        batch_size=settings.batch_size,
        device=settings.device,
        mixed_precision=settings.mixed_precision,
        tta=settings.tta,
        num_workers=settings.num_workers,
    )
    bar = tqdm(predictions, total=len(images), desc="inference", unit="image", disable=not sys.stderr.isatty())
    return write_all(bar, output, get_task(meta["task"]), overlay=settings.overlay)


# ---------------------------------------------------------------- what to read, where to write


def list_images(paths: list[str]) -> ImageList:
    """The images that the inputs mean; an input without any, and two that would write one file, are `UserError`s."""
    images = ImageList(paths)
    if images.faults:
        raise UserError("\n".join(["the inputs cannot be used as they are:", *(f"  {f}" for f in images.faults)]))
    return images


def prepare_output(output: Path, settings: InferenceSettings, images: ImageList) -> None:
    """Make the output folders, unless that would put outputs among the inputs."""
    sources = {os.path.realpath(os.path.dirname(images.files(index)[0])) for index in range(len(images))}
    searched = [os.path.realpath(path) for path in settings.input if os.path.isdir(path)]
    for folder in [output / "masks", *([output / "overlays"] if settings.overlay else [])]:
        place = Path(os.path.realpath(folder))
        if any(place.is_relative_to(path) for path in searched) or any(Path(s).is_relative_to(place) for s in sources):
            raise UserError(f"--output {output} would write into the input; name a folder apart from it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into --output {output}: {error.strerror}; name another folder") from None
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write into --output {output}: no permission for {folder}; name another folder")


# ---------------------------------------------------------------- images in, masks out


def predict_images(
    model: Any,
    meta: dict[str, Any],
    images: Reader,
    *,
    size: list[int] | None = None,
    batch_size: int = 4,
    device: str = "auto",
    mixed_precision: str = "auto",
    tta: bool = False,
    num_workers: int = 0,
) -> Iterator[Prediction]:
    """(info, mask at the image's own size) of every image in order; a `Fault` in place of a mask that cannot be had.

    `model` and `meta` are what `load_model` returns. `size` is the model's input as [width, height], by default that of
    the checkpoint. Raises `UserError` for a size or device that cannot be, and when the device runs out of memory.
    """
    width, height = input_size(size or meta.get("size") or DEFAULT_SIZE, model.stride)
    place = pick_device(device)
    precision = choose_precision(mixed_precision, place)
    model = model.to(place).eval()
    sampler = EvalSampler(len(images), batch_size=batch_size, size=(height, width))
    workers = loading_workers(num_workers)
    loader = build_loader(
        Pictures(images, make_target=lambda sample, original: None),
        sampler,
        collate_targets=Problems,
        statistics=meta.get("normalize", "imagenet"),
        workers=workers if len(sampler) > 1 else 0,
        pin=place.type == "cuda",
    )
    task = get_task(meta["task"])
    for batch in loader:
        try:
            yield from predict_batch(model, batch.to(place), task, precision, tta)
        except torch.OutOfMemoryError:
            raise UserError(f"{place} has no room for {batch_size} images of {width}x{height}; lower --batch_size or "
                            "--size") from None  # fmt: skip


def predict_batch(model: Any, batch: Batch, task: Task, precision: Precision, tta: bool) -> Iterator[Prediction]:
    """The results of one batch, each brought to its image's own size when it is asked for."""
    with precision.autocast():
        predictions = predict(model, batch, tta)
    failed = failures(predictions)
    masks = task.masks(predictions, [info.size for info in batch.samples])
    for info, problem, mask, is_broken in zip(batch.samples, batch.targets, masks, failed, strict=True):
        if is_broken:
            problem = problem or "the model's output is not a number; try --mixed_precision no"
        yield info, Fault(info.path, problem) if problem else mask


def failures(predictions: dict[str, Tensor]) -> list[bool]:
    """Which samples of a batch have a NaN in their predictions: half precision can overflow."""
    return torch.isnan(predictions["logits"]).flatten(1).any(1).tolist()


def input_size(size: list[int], stride: int) -> list[int]:
    """[width, height] from one or two numbers; both must suit the model."""
    both = list(size) * 2 if len(size) == 1 else list(size)
    if len(both) != 2 or any(side < 1 or side % stride for side in both):
        raise UserError(f"--size is {' '.join(map(str, size))}, but must be WIDTH HEIGHT, each a multiple of {stride}")
    return both


class Problems(list[str]):
    """Why an image of the batch could not be read, or nothing: what rides where targets do in training."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Problems:
        return self

    def pin_memory(self) -> Problems:
        return self


class Pictures(Dataset):
    """Images alone. In place of one that cannot be read comes a black one with the reason, so that the others go on."""

    def __getitem__(self, key: SampleKey) -> Item:
        try:
            return replace(super().__getitem__(key), target="")
        except DataError as error:
            path, name = self.reader.files(key.index)[0], self.reader.sample_id(key.index)
            return Item(np.zeros((*key.size, 3), np.uint8), error.fault.problem, SampleInfo(name, path, "", key.size))


# ---------------------------------------------------------------- masks and overlays to disk


def write_all(predictions: Iterable[Prediction], output: Path, task: Task, *, overlay: bool = True) -> list[Fault]:
    """Write on a few threads while the model works on; returns the faults of those that could not be predicted.

    At most a few results wait to be written, so the memory does not grow with the number of images.
    """
    faults: list[Fault] = []
    waiting: deque[Future[Fault | None]] = deque()

    def finish_one() -> None:
        if fault := waiting.popleft().result():
            faults.append(fault)

    with ThreadPoolExecutor(WRITERS) as pool:
        for info, mask in predictions:
            if isinstance(mask, Fault):
                faults.append(mask)
                continue
            waiting.append(pool.submit(write_outputs, info, mask, output, task, overlay))
            if len(waiting) > 2 * WRITERS:
                finish_one()
        while waiting:
            finish_one()
    return faults


def write_outputs(info: SampleInfo, mask: np.ndarray, output: Path, task: Task, overlay: bool) -> Fault | None:
    """Write one mask and its overlay; the picture is decoded again here, so that none waits in memory until then."""
    try:
        write_image(output / "masks" / f"{info.sample_id}.png", mask)
        if overlay:
            picture = task.draw(read_image(info.path), mask)
            write_image(output / "overlays" / f"{info.sample_id}.jpg", picture[..., ::-1])
    except DataError as error:
        return error.fault
    except ValueError as error:
        return Fault(info.path, str(error))
    return None


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Encode (H, W) grey or (H, W, 3) BGR by the path's suffix and write it atomically.

    Raises ValueError for what the format cannot hold, `UserError` where nothing can be written.
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix == ".jpg" else []
    is_encoded, encoded = cv2.imencode(path.suffix, pixels, options)
    if not is_encoded:  # JPEG ends at 65500 pixels a side
        raise ValueError(f"is too large for a {path.suffix} file: {pixels.shape[1]}x{pixels.shape[0]}")
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(encoded.tobytes())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before is whole") from None


# ---------------------------------------------------------------- the command


def command() -> None:
    """Read the command line, run, and say what was not done."""
    settings = parse_options(InferenceSettings, [word for word in sys.argv[1:] if word != "--debug"])
    for name in ("checkpoint", "input", "output"):
        if not getattr(settings, name):
            raise UserError(f"--{name} is missing; see --help")
    faults = run(settings)
    if faults:
        lines = [f"  {fault}" for fault in faults]
        raise UserError("\n".join([f"{len(faults)} of the images have no result; the others are in {settings.output}",
                                   *lines]))  # fmt: skip
    print(f"wrote the results to {settings.output}")


if __name__ == "__main__":
    run_command(command)

"""Run a model on pictures and videos: `python inference.py --checkpoint runs/my_run --input photos/ --output out/`.

Inputs are images, videos, folders (all below them, structure kept) and quoted patterns. Each image gets a mask of its
own size, `out/masks/<name>.png`, and what else is asked for; a video gets a video of each; objects of all of them are
listed in `out/results_bbox.json` and `out/results_segm.json`, as COCO results. A file that cannot be read is reported
at the end, and the others go on. From Python:

    predictor = Predictor(*load_model(Path("runs/my_run")), tta=[1.0])
    for frame, result in predictor.stills(ImageList(["photos"])):
        ...  # result: (H, W) uint8 at the picture's own size, or instances.Detections, or a Fault

SAM 2 follows objects through videos and folders of frames from prompts (prompting.py says how they are given), and
finds everything in pictures without prompts.
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

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from tqdm import tqdm

from automatic import segment_everything
from checkpoint import load_model
from clip_inference import DRAWN, Follower, follow_inputs, image_id
from dataset import normalize
from predict import predict, predict_tiled
from prompting import Prompts, read_prompts
from readers import DataError, Fault, ImageList, Reader
from readers.films import silence_opencv
from samples import Batch, Sample, SampleInfo, Size
from streams import ahead, resized
from tasks import Task, get_task
from transforms import content_share, resize
from utils import choose_precision, loading_workers, pick_device
from video import VideoReader
from writers import FormatError, FrameFolder, JsonList, VideoWriter, write_image

WRITERS = 4
DEFAULT_SIZE = [1024, 1024]  # of official weights, which do not say what they were trained on
SUFFIXES = {
    "masks": ".png",
    "colors": ".png",
    "cutouts": ".png",
    "overlays": ".jpg",
    "side_by_side": ".jpg",
    "crops": ".png",
}  # of what images become


def run(settings: InferenceSettings) -> list[Fault]:
    """Predict and write everything; returns what could not be done, by input file. `UserError` before that."""
    silence_opencv()
    prompts = read_prompts(settings.prompts, points=settings.point, boxes=settings.box, frame=settings.frame)
    images, output = list_inputs(settings), Path(settings.output)
    predictor = make_predictor(settings, prompts)
    if isinstance(predictor, EverythingPredictor) and images.videos:
        path = next(iter(images.videos.values()))
        raise UserError(f"{path} needs prompts for what is to be followed: --point, --box or --prompts")
    task = predictor.task
    if settings.crops and not task.objects:
        raise UserError(f"--crops are of objects, and the task {task.name} finds none; leave it out")
    if settings.cutout and not task.cut_out:
        raise UserError(f"--cutout needs masks that are alpha, but those of the task {task.name} are not; leave it out")
    kinds = kinds_of(settings, task)
    prepare_output(output, kinds, settings, images)
    if task.has_clips:
        follower = Follower(
            predictor.model, size=predictor.size, device=predictor.device, precision=predictor.precision
        )
        return follow_inputs(settings, follower, images, prompts, [kind for kind in kinds if kind in DRAWN])
    draw = partial(draw_outputs, task=task, kinds=kinds, class_names=predictor.class_names)
    with ExitStack() as files:
        note = partial(noted, predictor=predictor, output=output, lists={}, files=files)
        stills = note(predictor.stills(images, loading_workers(settings.num_workers)))
        faults = write_stills(with_bar(stills, "images", len(images)), output, draw) if len(images) else []
        for name, path in images.videos.items():
            try:
                video = VideoReader(path)
                frames = note(predictor.frames(video, name), is_video=True)
                write_video(with_bar(frames, name, video.count), output, name, video.rate, draw)
            except DataError as error:
                faults.append(error.fault)
            except FormatError as error:
                faults.append(Fault(path, str(error)))
    return faults


def make_predictor(settings: InferenceSettings, prompts: Prompts) -> Predictor:
    """The model and how it is to be asked; a `UserError` for what it cannot do."""
    model, meta = load_model(Path(settings.checkpoint))
    options: dict[str, Any] = {
        "size": settings.size,
        "batch_size": settings.batch_size,
        "device": settings.device,
        "mixed_precision": settings.mixed_precision,
        "threshold": settings.threshold,
        "top_k": settings.top_k,
    }
    follows = get_task(meta["task"]).has_clips
    if (prompts and not follows) or (settings.annotate != "none" and not prompts):
        raise UserError("--prompts, --point and --box are for models of the task video, and --annotate needs them: "
                        f"this is one of the task {meta['task']}")  # fmt: skip
    if follows and (settings.tta or settings.tile):
        raise UserError("--tta and --tile are not for models of the task video; leave them out")
    if follows and not prompts:
        return EverythingPredictor(
            model,
            meta,
            points_per_side=settings.points_per_side,
            predicted_iou=settings.predicted_iou,
            stability=settings.stability,
            **options,
        )
    return Predictor(model, meta, tta=settings.scales, tile=settings.tile, overlap=settings.overlap, **options)


def noted(
    predictions: Iterator[Prediction],
    *,
    predictor: Predictor,
    output: Path,
    lists: dict[str, JsonList],
    files: ExitStack,
    is_video: bool = False,
) -> Iterator[Prediction]:
    """The same, with the objects of each picture written into `lists` of COCO results, one for each kind.

    The image id is the number that the file is called by, as COCO's are, else its name; a frame's has its number.
    """
    objects = predictor.task.objects
    for number, (frame, result) in enumerate(predictions, 1):
        if objects and not isinstance(result, Fault):
            name = f"{frame.info.sample_id}/{number:06d}" if is_video else frame.info.sample_id
            for kind, records in objects.records(result, image_id(name), predictor.file_ids).items():
                if kind not in lists:
                    lists[kind] = files.enter_context(JsonList(output / f"results_{kind}.json"))
                lists[kind].extend(records)
        yield frame, result


def with_bar(predictions: Iterator[Prediction], name: str, count: int) -> Iterable[Prediction]:
    """The same, counted on a terminal."""
    return tqdm(predictions, desc=name, total=count or None, unit="picture", disable=None)


# ---------------------------------------------------------------- what to read, where to write


def list_inputs(settings: InferenceSettings) -> ImageList:
    """The files that the inputs mean; an input without any, and two that would write one file, are `UserError`s."""
    images = ImageList(settings.input)
    faults = list(images.faults)
    if settings.cutout:  # a video's are a folder of its name
        ids = [images.sample_id(index) for index in range(len(images))]
        faults += [
            Fault(path, f"would write its cut-outs into the folder of those of {name}/…; move one of them")
            for name, path in images.videos.items()
            if any(sample_id.startswith(f"{name}/") for sample_id in ids)
        ]
    if faults:
        raise UserError("\n".join(["the inputs cannot be used as they are:", *(f"  {fault}" for fault in faults)]))
    return images


def kinds_of(settings: InferenceSettings, task: Task) -> list[str]:
    """What is written of each picture, by the names of the folders."""
    asked = {"colors": settings.colors and task.has_colors, "cutouts": settings.cutout, "overlays": settings.overlay,
             "side_by_side": settings.side_by_side, "crops": settings.crops}  # fmt: skip
    return [*(["masks"] if task.mask else []), *(kind for kind, is_asked in asked.items() if is_asked)]


def prepare_output(output: Path, kinds: list[str], settings: InferenceSettings, images: ImageList) -> None:
    """Make the output folders, unless that would put outputs among the inputs."""
    files = [*(images.files(index)[0] for index in range(len(images))), *images.videos.values()]
    sources = {os.path.realpath(os.path.dirname(file)) for file in files}
    searched = [os.path.realpath(path) for path in settings.input if os.path.isdir(path)]
    for folder in [output / kind for kind in kinds or ["."]]:
        place = Path(os.path.realpath(folder))
        if any(place.is_relative_to(path) for path in searched) or any(Path(s).is_relative_to(place) for s in sources):
            raise UserError(f"--output {output} would write into the input; name a folder apart from it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into --output {output}: {error.strerror}; name another folder") from None
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write into --output {output}: no permission for {folder}; name another folder")


# ---------------------------------------------------------------- pictures in, results out


@dataclass
class Frame:
    """A picture to predict: a still image, or one of a video's."""

    info: SampleInfo
    picture: np.ndarray  # (H, W, 3) uint8 RGB, or empty
    fault: Fault | None = None  # why it could not be read
    inputs: Tensor | None = None  # (3, h, w) normalised, at the model's size


NOT_A_NUMBER = "the model's output is not a number; try --mixed_precision no"
Result = Any  # what the task's `results` yield
Prediction = tuple[Frame, Result | Fault]


class Predictor:
    """A model, and how it is to be asked. `model` and `meta` are what `load_model` returns.

    Args:
        size: the model's input as [width, height], or one number for both; by default that of the checkpoint.
        batch_size: pictures, or tiles, in a forward pass.
        tta: the scales to average over, each with its mirror image; none: the plain prediction.
        tile: predict pictures at their own resolution, in tiles of the model's input size that share at least
            `overlap` of their sides. A side that is shorter than a tile is stretched to it, so a small picture is one
            tile, as it would be without tiling.
        threshold, top_k: of objects, the least score (by default where F1 was best when the checkpoint was validated)
            and how many of a picture.

    Raises:
        UserError: a size, device or precision that cannot be; later, when the device runs out of memory.
    """

    def __init__(
        self,
        model: Any,
        meta: dict[str, Any],
        *,
        size: Sequence[int] = (),
        batch_size: int = 4,
        device: str = "auto",
        mixed_precision: str = "auto",
        tta: Sequence[float] = (),
        tile: bool = False,
        overlap: float = 0.25,
        threshold: float | None = None,
        top_k: int = 100,
    ):
        self.size = input_size(size or meta.get("size") or DEFAULT_SIZE, model.stride)
        self.task: Task = get_task(meta["task"])
        self.class_names: list[str] = meta.get("class_names") or []
        self.file_ids: list[Any] = meta.get("file_ids") or []
        self.results = self.task.results
        if self.task.objects:
            if tile:
                raise UserError(
                    f"--tile is for tasks with a class in each pixel, not for {self.task.name}; leave it out"
                )
            self.results = partial(self.results, **self.task.objects.options(meta, threshold, top_k))
        self.statistics: str = meta.get("normalize", "imagenet")
        self.pads = meta.get("resize") == "pad"
        self.device = pick_device(device)
        self.precision = choose_precision(mixed_precision, self.device)
        self.model = model.to(self.device).eval()
        self.batch_size, self.tta, self.tile, self.overlap = batch_size, tta, tile, overlap
        self.per_pass = 1 if tile else batch_size  # pictures

    def stills(self, images: Reader, workers: int = 0) -> Iterator[Prediction]:
        """(frame, result at its own size) of every image in order; a `Fault` in place of one that cannot be had.

        The next images are decoded on `workers` threads meanwhile.
        """

        def load(index: int) -> Frame:
            try:
                return self.prepared(images.read(index))
            except DataError as error:
                info = SampleInfo(images.sample_id(index), error.fault.path, images.dataset_of(index), (0, 0))
                return Frame(info, np.empty((0, 0, 3), np.uint8), error.fault)

        return self.predictions(ahead(load, range(len(images)), workers, max(workers, self.per_pass)))

    def frames(self, video: VideoReader, name: str) -> Iterator[Prediction]:
        """The same of every frame of a video, decoded on another thread. Raises `DataError` when it is damaged."""
        pictures = iter(video)

        def load(number: int) -> Frame | None:
            picture = next(pictures, None)
            return None if picture is None else self.prepared(Sample([picture], sample_id=name, path=video.path))

        loaded = ahead(load, itertools.count(), 1, self.per_pass)
        return self.predictions(iter(partial(next, loaded), None))

    def prepared(self, sample: Sample) -> Frame:
        """A frame with all that can be done to it before its turn: work for other threads."""
        picture = sample.frames[0]
        info = SampleInfo(sample.sample_id, sample.path, sample.dataset, (picture.shape[0], picture.shape[1]))
        if self.tile:
            return Frame(info, picture)
        if self.pads:
            info.content = content_share(info.size, self.size)
        resized = resize(sample, self.size, pad=self.pads).frames[0]
        return Frame(info, picture, inputs=normalize(resized[None], self.statistics)[0])

    def predictions(self, frames: Iterable[Frame]) -> Iterator[Prediction]:
        """The results, each brought to its picture's own size when it is asked for."""
        frames = iter(frames)
        while chunk := list(itertools.islice(frames, self.per_pass)):
            results = self.results_of([frame for frame in chunk if not frame.fault])
            for frame in chunk:
                yield frame, frame.fault or next(results)

    def results_of(self, frames: list[Frame]) -> Iterator[Result | Fault]:
        """The results of a few frames. Raises `UserError` when the device has no room for them."""
        try:
            yield from self.found_in(frames)
        except torch.OutOfMemoryError:
            sides = f"{self.size[1]}x{self.size[0]}"
            raise UserError(f"{self.device} has no room for {self.batch_size} inputs of {sides}; lower --batch_size or "
                            "--size") from None  # fmt: skip

    def found_in(self, frames: list[Frame]) -> Iterator[Result | Fault]:
        """The same, in one forward pass unless they are tiled."""
        with self.precision.autocast():
            predictions = self.tiled(frames[0]) if self.tile else self.whole(frames)
        failed = torch.isnan(predictions["logits"]).flatten(1).any(1).tolist()  # half precision can overflow
        results = self.results(predictions, [frame.info for frame in frames])
        for frame, result, is_broken in zip(frames, results, failed, strict=True):
            yield Fault(frame.info.path, NOT_A_NUMBER) if is_broken else result

    def whole(self, frames: list[Frame]) -> dict[str, Tensor]:
        """Predictions of whole pictures at the model's size."""
        images = torch.stack([frame.inputs for frame in frames if frame.inputs is not None])
        return self.forward(Batch(images, None, [frame.info for frame in frames]))

    def tiled(self, frame: Frame) -> dict[str, Tensor]:
        """Predictions of one picture at its own resolution."""
        height, width = map(max, frame.info.size, self.size)
        picture = resize(Sample([frame.picture]), (height, width)).frames[0]
        statistics = whole_statistics(picture) if self.statistics == "image" else self.statistics

        def predict_tiles(tiles: np.ndarray) -> Tensor:
            return self.forward(Batch.from_images(normalize(tiles, statistics)))["logits"]

        logits = predict_tiled(predict_tiles, picture, tile=self.size, overlap=self.overlap, batch_size=self.batch_size)
        return {"logits": logits}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """One forward pass, or as many as TTA takes."""
        batch = batch.pin_memory() if self.device.type == "cuda" else batch
        return predict(self.model, batch.to(self.device), self.tta)


class EverythingPredictor(Predictor):
    """A SAM 2 without prompts, which finds all objects in a picture as an instance model does, of one class.

    Args:
        points_per_side, predicted_iou, stability: see `segment_everything`.
    """

    def __init__(
        self,
        model: Any,
        meta: dict[str, Any],
        *,
        points_per_side: int = 32,
        predicted_iou: float = 0.8,
        stability: float = 0.95,
        **options: Any,
    ):
        super().__init__(model, {**meta, "task": "instance", "class_names": ["object"], "file_ids": [1]}, **options)
        self.find = partial(
            segment_everything, points_per_side=points_per_side, predicted_iou=predicted_iou, stability=stability
        )

    def prepared(self, sample: Sample) -> Frame:
        """As the official image predictor reads a picture: antialiased."""
        picture = sample.frames[0]
        info = SampleInfo(sample.sample_id, sample.path, sample.dataset, (picture.shape[0], picture.shape[1]))
        small = resized(picture, self.size, InterpolationMode.BILINEAR)
        return Frame(info, picture, inputs=normalize(small[None], self.statistics)[0])

    def found_in(self, frames: list[Frame]) -> Iterator[Result | Fault]:
        for frame in frames:
            assert frame.inputs is not None
            try:
                with self.precision.autocast():
                    found = self.find(self.model, frame.inputs.to(self.device), frame.info.size)
            except FloatingPointError:
                yield Fault(frame.info.path, NOT_A_NUMBER)
            else:
                yield found


def input_size(size: Sequence[int], stride: int) -> Size:
    """(height, width) from [width, height] or one number; both must suit the model."""
    both = list(size) * 2 if len(size) == 1 else list(size)
    if len(both) != 2 or any(side < 1 or side % stride for side in both):
        raise UserError(f"--size is {' '.join(map(str, size))}, but must be WIDTH HEIGHT, each a multiple of {stride}")
    return both[1], both[0]


def whole_statistics(picture: np.ndarray) -> tuple[float, float]:
    """Mean and deviation over all channels, in 0..1, without a copy of the picture as floats."""
    means, deviations = cv2.meanStdDev(picture)
    mean = means.mean()
    variance = (deviations**2 + means**2).mean() - mean**2
    return mean / 255, max(0.0, variance) ** 0.5 / 255


# ---------------------------------------------------------------- pictures of masks to disk

# {kind: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA, uint8; or several of them by name}
Drawn = dict[str, np.ndarray | dict[str, np.ndarray]]
Draw = Callable[[Prediction], Drawn]


def draw_outputs(prediction: Prediction, *, task: Task, kinds: list[str], class_names: Sequence[str] = ()) -> Drawn:
    """The pictures of one prediction, by kind; the `DataError` of a fault.

    `side_by_side` shows picture, mask, and cut-out on checkers, or the overlay where no cut-outs are asked for.
    """
    frame, result = prediction
    if isinstance(result, Fault):
        raise DataError(result)
    drawn: Drawn = {"masks": task.mask(result)} if task.mask else {}
    if "colors" in kinds:
        drawn["colors"] = task.colorize(result)
    if "overlays" in kinds or "cutouts" not in kinds:
        last = drawn["overlays"] = task.draw(frame.picture, result, class_names)
    if "cutouts" in kinds and task.cut_out:
        drawn["cutouts"] = cutout = task.cut_out(frame.picture, result)
        last = on_checkers(cutout)
    if "side_by_side" in kinds:
        drawn["side_by_side"] = np.hstack([frame.picture, task.colorize(result), last])
    if "crops" in kinds and task.objects:
        drawn["crops"] = dict(task.objects.crops(frame.picture, result, class_names))
    return {kind: drawn[kind] for kind in kinds}


def on_checkers(cutout: np.ndarray) -> np.ndarray:
    """(H, W, 4) RGBA on the light checkers that stand for transparency, (H, W, 3) RGB."""
    y, x = (np.arange(side) // 16 for side in cutout.shape[:2])
    ground = np.where((y[:, None] + x) % 2, 255, 204).astype(np.uint8)
    weight = cutout[..., 3].astype(np.float32) / 255
    return cv2.blendLinear(cutout[..., :3].copy(), cv2.cvtColor(ground, cv2.COLOR_GRAY2RGB), weight, 1 - weight)


def write_stills(predictions: Iterable[Prediction], output: Path, draw: Draw) -> list[Fault]:
    """Draw and write on a few threads while the model works on; returns the faults of those that have no result."""

    def write(prediction: Prediction) -> Fault | None:
        info = prediction[0].info
        try:
            for kind, drawn in draw(prediction).items():
                if isinstance(drawn, dict):
                    for name, pixels in drawn.items():
                        write_image(output / kind / info.sample_id / f"{name}{SUFFIXES[kind]}", pixels)
                else:
                    write_image(output / kind / f"{info.sample_id}{SUFFIXES[kind]}", drawn)
        except DataError as error:
            return error.fault
        except FormatError as error:
            return Fault(info.path, str(error))
        return None

    return [fault for fault in ahead(write, predictions, WRITERS, WRITERS) if fault]


def write_video(predictions: Iterable[Prediction], output: Path, name: str, rate: float, draw: Draw) -> None:
    """Draw on a few threads, and write in order on another: an .mp4 of each kind, and cut-outs as a folder of pictures,
    since an .mp4 has no transparency; no crops. An exception (`DataError`, `FormatError`) leaves nothing of any.
    """
    writers: dict[str, VideoWriter | FrameFolder] = {}

    def open_writer(kind: str, size: Size) -> VideoWriter | FrameFolder:
        if kind == "cutouts":
            return files.enter_context(FrameFolder(output / kind / name))
        return files.enter_context(VideoWriter(output / kind / f"{name}.mp4", rate, size))

    def append(drawn: Drawn) -> None:
        for kind, pixels in drawn.items():
            if isinstance(pixels, dict):
                continue
            if kind not in writers:
                writers[kind] = open_writer(kind, (pixels.shape[0], pixels.shape[1]))
            writers[kind].append(pixels)

    with ExitStack() as files:
        for _ in ahead(append, ahead(draw, predictions, WRITERS, WRITERS), 1, 1):
            pass


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
        raise UserError("\n".join([f"{len(faults)} of the inputs have no result; the others are in {settings.output}",
                                   *lines]))  # fmt: skip
    print(f"wrote the results to {settings.output}")


if __name__ == "__main__":
    run_command(command)

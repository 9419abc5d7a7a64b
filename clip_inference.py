"""Prompted objects followed through videos, folders of frames and pictures, and written as they are found.

    follower = Follower(model, size=(1024, 1024), device=device, precision=precision)
    for found in follower.follow(clip, prompts):
        ...  # found.number of the frame, found.labels (H, W) uint8: the object at each pixel, 0 where there is none

However long a clip is, a few of its frames are in memory: they are decoded once to be followed, once more backwards
where the first prompt is not in the first frame, and once to be drawn.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

from annotate import Annotate, Annotator
from clip_files import Clip, open_clips
from colors import palette
from dataset import normalize
from errors import UserError
from instance_pictures import object_colors, paint, write_caption
from instances import as_json, encode
from metrics.video import label_map
from models.sam2.tracker import Tracker
from prompting import MAX_OBJECT, Prompt, Prompts, fitted, refuse
from readers import DataError, Fault, ImageList
from samples import Size
from settings import InferenceSettings
from streams import AHEAD, ahead, resized
from utils import Precision
from writers import FormatError, JsonList, LabelFolder, VideoWriter, write_image, write_palette

WRITERS = 2
DRAWN = ("overlays", "side_by_side")  # what can be drawn of a clip
NO_CLASS = "object"  # the class of objects without one
COLORS = object_colors(MAX_OBJECT)

# ---------------------------------------------------------------- following


@dataclass(frozen=True)
class Found:
    """The objects of one frame."""

    number: int
    labels: np.ndarray  # (H, W) uint8 ids of objects, 0 where there is none
    scores: dict[int, float]  # how sure it is that each object is there, in [0, 1]


class Follower:
    """Follows the objects of one clip after the other with a SAM 2 in evaluation mode.

    Args:
        size: (height, width) of the model's input.
    """

    def __init__(self, model: Any, *, size: Size, device: torch.device, precision: Precision):
        self.model = model.to(device).eval()
        self.size, self.device, self.precision = size, device, precision

    def follow(self, clip: Clip, prompts: Sequence[Prompt]) -> Iterator[Found]:
        """The objects in each frame: from the first one with a prompt to the end, then from there back to the start.

        All prompts count in all frames, as if they had been given before. Points and boxes in a later frame of an
        object correct what was followed up to there. `prompts` are as `prompting.fitted` returns them.

        Raises:
            DataError: the clip is damaged, or ends before the last prompt.
            UserError: the device has no room for it.
        """
        by_frame: dict[int, list[Prompt]] = defaultdict(list)
        for prompt in prompts:
            by_frame[prompt.frame].append(prompt)
        tracker = Tracker(self.model, clip.size, clip.count or None)
        first = min(by_frame)
        try:
            self._prompt(tracker, clip, by_frame)
            yield from self._propagate(tracker, clip, from_frame(clip, first))
            before = zip(reversed(range(first)), clip.backwards(first), strict=True)
            yield from self._propagate(tracker, clip, before, reverse=True)
        except torch.OutOfMemoryError:
            sides = f"{self.size[1]}x{self.size[0]}"
            raise UserError(f"{self.device} has no room for {len(tracker.objects)} objects in frames of {sides}; lower "
                            "--size, or follow fewer at a time") from None  # fmt: skip

    def _prompt(self, tracker: Tracker, clip: Clip, by_frame: Mapping[int, Sequence[Prompt]]) -> None:
        """Show the tracker all prompts; what it follows up to the last correction is forgotten."""
        first, last, corrected = min(by_frame), max(by_frame), last_correction(by_frame)
        wanted = (
            (number, frame)
            for number, frame in itertools.islice(from_frame(clip, first), last - first + 1)
            if number <= corrected or number in by_frame
        )
        reached = first - 1
        for number, image in self._inputs(clip, wanted):
            reached = number
            with self.precision.autocast():
                if first < number <= corrected:
                    for _ in tracker.propagate([(number, image)]):
                        pass
                for prompt in by_frame.get(number, ()):
                    assert prompt.object_id is not None
                    if prompt.mask is not None:
                        tracker.add_mask(number, image, prompt.object_id, prompt.mask)
                    else:
                        tracker.add_points(number, image, prompt.object_id, prompt.points, prompt.labels, prompt.box)
        if reached < last:
            raise DataError(Fault(clip.path, f"ends before frame {last}, in which it has a prompt"))
        for followed in tracker.objects.values():
            followed.tracked.clear()

    def _propagate(
        self, tracker: Tracker, clip: Clip, frames: Iterator[tuple[int, np.ndarray]], reverse: bool = False
    ) -> Iterator[Found]:
        for number, image in self._inputs(clip, frames):
            with self.precision.autocast():
                ((_, ids, logits),) = tracker.propagate([(number, image)], reverse)
            if logits.isnan().any():
                problem = f"the model's output in frame {number} is not a number; try --mixed_precision no"
                raise DataError(Fault(clip.path, problem))
            scores = tracker.scores(number).float().sigmoid().tolist()
            labels = np.array([0, *ids], np.uint8)[label_map(logits[:, 0], clip.size)]
            yield Found(number, labels, dict(zip(ids, scores, strict=True)))

    def _inputs(self, clip: Clip, frames: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, Tensor]]:
        """The same as the model takes them; the next ones are decoded on another thread meanwhile."""
        how = InterpolationMode.BILINEAR if clip.is_still else InterpolationMode.BICUBIC  # as the official predictors

        def load(_: int) -> tuple[int, Tensor] | None:
            number, frame = next(frames, (-1, None))
            if frame is None:
                return None
            return number, normalize(resized(frame, self.size, how)[None])[0]

        return iter(partial(next, ahead(load, itertools.count(), 1, AHEAD)), None)


def from_frame(clip: Clip, first: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number, frame) from one frame on."""
    return itertools.islice(enumerate(clip.frames()), first, None)


def last_correction(by_frame: Mapping[int, Sequence[Prompt]]) -> int:
    """The last frame with points or a box of an object that has a prompt in an earlier one; -1 if there is none."""
    known: set[int | None] = set()
    last = -1
    for frame in sorted(by_frame):
        if any(prompt.mask is None and prompt.object_id in known for prompt in by_frame[frame]):
            last = frame
        known |= {prompt.object_id for prompt in by_frame[frame]}
    return last


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Outputs:
    """What is written of clips beside `masks`, and where."""

    folder: Path
    kinds: Sequence[str]  # of `draw`
    records: JsonList  # COCO results
    annotator: Annotator | None = None


@dataclass(frozen=True)
class Names:
    """What the objects of a clip are called."""

    captions: dict[int, str]
    categories: dict[int, int]  # of each object, counted from 1


def follow_inputs(
    settings: InferenceSettings, follower: Follower, images: ImageList, prompts: Prompts, kinds: Sequence[str]
) -> list[Fault]:
    """Follow and write the objects of all inputs; returns the faults of those that have no result.

    Raises:
        UserError: prompts that do not fit the inputs, or nothing can be written.
    """
    clips, faults = open_clips(settings.input, images)
    fitting = fit_all(clips, prompts, [fault.path for fault in faults])
    if not clips:
        return faults
    output = Path(settings.output)
    with ExitStack() as files:
        annotator = None
        if settings.annotate != "none":
            names, every = classes_of(fitting), settings.annotate_every
            annotator = files.enter_context(Annotator(output / "annotations", settings.annotate, names, every))
        records = files.enter_context(JsonList(output / "results_segm.json"))
        return faults + follow_all(follower, clips, fitting, Outputs(output, kinds, records, annotator))


def fit_all(clips: Sequence[Clip], prompts: Prompts, unreadable: Sequence[str] = ()) -> dict[str, list[Prompt]]:
    """The prompts of each clip by its name, proven by its pictures; the paths of unreadable ones may have some, too.
    Raises `UserError` with all that is wrong."""
    problems: list[str] = []
    by_clip = {}
    chosen = prompts.for_inputs({clip.name: clip.path for clip in clips} | {path: path for path in unreadable})
    for clip in clips:
        by_clip[clip.name], wrong = fitted(chosen[clip.name], clip.size, clip.count)
        problems += [f"{clip.path}: {each}" if len(clips) > 1 else each for each in wrong]
    refuse(problems)
    return by_clip


def classes_of(prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """The names of the classes in the order in which they come."""
    return list(dict.fromkeys(prompt.class_name or NO_CLASS for each in prompts.values() for prompt in each))


def follow_all(
    follower: Follower, clips: Sequence[Clip], prompts: Mapping[str, Sequence[Prompt]], outputs: Outputs
) -> list[Fault]:
    """Follow and write the objects of all clips, whose prompts `fit_all` returned; returns the faults of those that
    have no result, of which nothing is written."""
    classes = classes_of(prompts)
    faults = []
    for clip in clips:
        known = {prompt.object_id: prompt.class_name for prompt in prompts[clip.name] if prompt.object_id}
        names = Names({number: f"{number} {name}".strip() for number, name in known.items()},
                      {number: classes.index(name or NO_CLASS) + 1 for number, name in known.items()})  # fmt: skip
        found = tqdm(
            follower.follow(clip, prompts[clip.name]), clip.name, clip.count or None, unit="frame", disable=None
        )
        try:
            (write_still if clip.is_still else write_clip)(clip, found, names, outputs)
        except DataError as error:
            faults.append(error.fault)
        except FormatError as error:
            faults.append(Fault(clip.path, str(error)))
    return faults


def write_still(clip: Clip, found: Iterable[Found], names: Names, outputs: Outputs) -> None:
    """The mask of a picture as a palette PNG, and what is drawn as .jpg."""
    (only,) = found
    (picture,) = clip.frames()
    for kind, pixels in draw(picture, only.labels, names, outputs.kinds).items():
        write_image(outputs.folder / kind / f"{clip.name}.jpg", pixels)
    write_palette(outputs.folder / "masks" / f"{clip.name}.png", only.labels)
    with annotating(clip, names, outputs) as annotate:
        annotate(0, picture, only.labels)
    outputs.records.extend(records(only.labels, image_id(clip.name), only.scores, names))


def write_clip(clip: Clip, found: Iterable[Found], names: Names, outputs: Outputs) -> None:
    """The masks as a folder of palette PNGs, and what is drawn as .mp4: all of them, or nothing."""
    with ExitStack() as files:
        files.enter_context(outputs.records.whole())
        folder = files.enter_context(LabelFolder(outputs.folder / "masks" / clip.name))

        def keep(one: Found) -> list[dict[str, Any]]:
            frame = clip.frame_name(one.number)
            folder.put(frame, one.labels)
            return records(one.labels, f"{clip.name}/{frame}", one.scores, names)

        for each in ahead(keep, found, WRITERS, WRITERS):
            outputs.records.extend(each)
        videos = {
            kind: files.enter_context(VideoWriter(outputs.folder / kind / f"{clip.name}.mp4", clip.rate, size))
            for kind, size in drawn_sizes(clip.size, outputs.kinds).items()
        }
        annotate = files.enter_context(annotating(clip, names, outputs))

        def drawn(numbered: tuple[int, np.ndarray]) -> tuple[int, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
            number, picture = numbered
            labels = folder.get(clip.frame_name(number))
            return number, picture, labels, draw(picture, labels, names, outputs.kinds)

        for number, picture, labels, pictures in ahead(drawn, enumerate(clip.frames()), WRITERS, WRITERS):
            for kind, pixels in pictures.items():
                videos[kind].append(pixels)
            annotate(number, picture, labels)


@contextmanager
def annotating(clip: Clip, names: Names, outputs: Outputs) -> Iterator[Annotate]:
    """A function that takes (number, picture, labels) of frames for training, where that is asked for."""
    if outputs.annotator is None:
        yield lambda number, picture, labels: None
    else:
        with outputs.annotator.of(clip, names.categories) as annotate:
            yield annotate


def image_id(name: str) -> int | str:
    """The number that a file is called by, as COCO's are, else its name."""
    return int(name) if name.isascii() and name.isdigit() else name


def records(labels: np.ndarray, image: int | str, scores: Mapping[int, float], names: Names) -> list[dict[str, Any]]:
    """COCO results of the objects in a label map (H, W), each with its number as `object_id`."""
    return [
        {
            "image_id": image,
            "category_id": names.categories[number],
            "object_id": number,
            "segmentation": as_json(encode(labels == number)),
            "score": scores[number],
        }
        for number in np.unique(labels[labels > 0]).tolist()
    ]


# ---------------------------------------------------------------- drawing


def draw(picture: np.ndarray, labels: np.ndarray, names: Names, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """`overlays`, and `side_by_side` of picture, colours of the mask file and overlay, (H, ·, 3) uint8."""
    overlay = draw_objects(picture, labels, names.captions)
    drawn = {"overlays": overlay, "side_by_side": np.hstack([picture, palette()[labels], overlay])}
    return {kind: drawn[kind] for kind in kinds}


def drawn_sizes(size: Size, kinds: Sequence[str]) -> dict[str, Size]:
    sizes = {"overlays": size, "side_by_side": (size[0], 3 * size[1])}
    return {kind: sizes[kind] for kind in kinds}


def draw_objects(picture: np.ndarray, labels: np.ndarray, captions: Mapping[int, str]) -> np.ndarray:
    """Every object of a label map in the colour that is its own throughout a clip, with its caption; a new picture."""
    drawn = picture.copy()
    masks = {number: (labels == number).astype(np.uint8) for number in np.unique(labels[labels > 0]).tolist()}
    for number, mask in masks.items():
        paint(drawn, mask, color_of(number))
    for number, mask in masks.items():
        left, top, _, _ = cv2.boundingRect(mask)
        write_caption(drawn, captions[number], np.array([left, top]), color_of(number))
    return drawn


def color_of(number: int) -> tuple[int, int, int]:
    red, green, blue = COLORS[number - 1].tolist()
    return red, green, blue

"""`video`: prompted objects, followed through a clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from clips import collate_video, video_target
from demo import write_video_demo
from instance_pictures import object_colors, paint
from metrics.video import VideoMetric, label_map
from readers.video import video_reader, video_table
from samples import SampleInfo, Size
from tasks.base import Scored, Task
from transforms import OFFICIAL_VIDEO


@dataclass(frozen=True)
class Followed:
    """What was found in a few frames of a clip: where the first object was given, amid the rest, and in the last."""

    frames: list[int]
    labels: list[np.ndarray]  # of each, (H, W): 1 + the place of the object there, 0 where there is none


def video_results(predictions: dict[str, Any], samples: Sequence[SampleInfo]) -> Iterator[Followed]:
    """A few frames of each clip, at the size that its sample names."""
    for logits, prompted, sample in zip(predictions["logits"], predictions["prompted"], samples, strict=True):
        first, last = min((frame for frame in prompted if frame >= 0), default=0), logits.shape[1] - 1
        frames = [first, (first + last + 1) // 2, last]
        yield Followed(frames, [label_map(logits[:, frame], sample.size) for frame in frames])


def video_color(scores: dict[str, float], limits: Any) -> str:
    """Red while objects are not covered, cyan when they are covered well and known to be there, else blue."""
    if scores["mask_iou"] < limits.red_below_iou:
        return "red"
    return "cyan" if scores["mask_iou"] > limits.cyan_above_iou and scores["object_accuracy"] > 0.9 else "blue"


def draw_labels(image: np.ndarray, labels: np.ndarray, class_names: Sequence[str] = ()) -> np.ndarray:
    """Every object of a label map (H, W) in its own colour over the image; a new picture."""
    picture = image.copy()
    for number, color in enumerate(object_colors(int(labels.max(initial=0))).tolist(), 1):
        paint(picture, (labels == number).astype(np.uint8), tuple(color))
    return picture


def true_labels(scored: Scored, frame: int, size: Size) -> np.ndarray | None:
    """The annotation of a frame as a label map of a size, the first objects on top; None where there is none."""
    masklets = scored.sample.masks
    if not masklets.annotated[frame]:
        return None
    labels = np.zeros(scored.sample.frames[frame].shape[:2], np.uint16)
    numbers = masklets.visible(frame)[::-1]
    for number, mask in zip(numbers, masklets.masks(frame, numbers), strict=True):
        labels[mask] = number + 1
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


def video_panels(scored: Scored) -> dict[str, np.ndarray]:
    """What was given, and what was found amid the clip and in its last frame, with the truth outlined in white."""
    size = scored.image.shape[0], scored.image.shape[1]
    panels = {}
    for name, frame, labels in zip(
        ("given", "middle", "last"), scored.result.frames, scored.result.labels, strict=True
    ):
        image = cv2.resize(scored.sample.frames[frame], size[::-1], interpolation=cv2.INTER_AREA)
        truth = true_labels(scored, frame, size)
        drawn = draw_labels(image, truth if name == "given" and truth is not None else labels)
        for number in np.unique(truth)[1:] if name != "given" and truth is not None else ():
            outlines, _ = cv2.findContours((truth == number).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(drawn, outlines, -1, (255, 255, 255), 1)
        panels[name] = drawn
    return panels


def colorize_labels(labels: np.ndarray) -> np.ndarray:
    """(H, W) label map to (H, W, 3) uint8 RGB, on black."""
    colors = np.concatenate([np.zeros((1, 3), np.uint8), object_colors(int(labels.max(initial=0)))])
    return colors[labels]


VIDEO = Task(
    name="video",
    layout="a folder with JPEGImages/ and Annotations/, or a .txt of clips in it; SA-V or COCO .json; or still images",
    reader=video_reader,
    data_table=video_table,
    make_target=video_target,
    collate_targets=collate_video,
    num_classes=lambda reader: 0,
    loss_settings=lambda settings, reader, model: dict(settings),
    metric=lambda names, class_names, options: VideoMetric(names, convention=options.convention),
    batch_scores=VideoMetric.batch_scores,
    augment=OFFICIAL_VIDEO,
    mixes=(),
    console=[("MI", "mask_iou"), ("OA", "object_accuracy")],
    color=video_color,
    results=video_results,
    colorize=colorize_labels,
    has_colors=False,  # those of label maps are in their own palette
    draw=draw_labels,
    cut_out=None,
    panels=video_panels,
    panel_notes={
        "given": "the objects that were given",
        "middle": "colours are what was found, white outlines the truth",
        "last": "colours are what was found, white outlines the truth",
    },
    write_demo=write_video_demo,
    demo_specs=("ImageSets/train.txt", "ImageSets/val.txt"),
    has_clips=True,
)

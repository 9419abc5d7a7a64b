"""What a task is to the programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from readers import Reader
from samples import Sample


@dataclass(frozen=True)
class MetricOptions:
    """What else a metric may depend on."""

    has_masks: bool = True  # whether the model's objects have more than boxes
    max_detections: int = 100  # of an image, that are scored
    convention: str = "sav"  # which frames of a clip are scored


@dataclass(frozen=True)
class Scored:
    """A validated sample to draw."""

    sample: Sample  # as it was read
    image: np.ndarray  # (h, w, 3) uint8, its picture as small as the panels are to be
    result: Any  # what was found, at that size
    class_names: Sequence[str]
    metrics: Mapping[str, float]  # of the whole validation


@dataclass(frozen=True)
class ObjectOutputs:
    """What inference can do where a result is a list of objects with scores."""

    options: Callable[[Mapping[str, Any], float | None, int], dict[str, Any]]
    """(meta of a checkpoint, threshold or None for its own, top k) -> keyword arguments of the task's `results`"""
    crops: Callable[[np.ndarray, Any, Sequence[str]], Iterator[tuple[str, np.ndarray]]]
    """(image, result, class names) -> a name and a picture of each object"""
    records: Callable[[Any, int | str, Sequence[Any]], dict[str, list[dict[str, Any]]]]
    """(result, image id, ids of the classes in the data's files) -> COCO results by kind of evaluation: bbox, segm"""


@dataclass(frozen=True)
class Task:
    """Everything that the programs ask a task for."""

    name: str
    layout: str  # of a data set, in words
    reader: Callable[..., Reader]  # (spec, root=, class_names=, images=) -> Reader
    data_table: Callable[[Reader], str]  # what the data holds beside the counts, as a checked reader knows; or nothing
    make_target: Callable[[Sample, Sample | None], Any]
    collate_targets: Callable[[list[Any]], Any]
    num_classes: Callable[[Reader], int]  # of a model for the data, where it has such a setting
    loss_settings: Callable[..., dict[str, Any]]  # (loss settings, training data, model settings) -> arguments
    metric: Callable[[Sequence[str], Sequence[str], MetricOptions], Any]  # (names beside its own, class names, …)
    batch_scores: Callable[[Mapping[str, Any], Any], dict[str, Tensor]]  # (outputs, batch) -> 0-dim, on the device
    augment: list[dict[str, Any]]  # the official recipe
    mixes: tuple[str, ...]  # ways in which the samples of a batch may be mixed
    console: list[tuple[str, str]]  # (short name in the console line, metric)
    color: Callable[[dict[str, float], Any], str]  # (batch scores, logging settings) -> colour of the line
    results: Callable[..., Iterator[Any]]  # (predictions, samples) -> what is found in each, at the size it names
    colorize: Callable[[Any], np.ndarray]  # result -> what people see of it, (H, W, 3)
    has_colors: bool  # whether that says more than the mask itself
    draw: Callable[[np.ndarray, Any, Sequence[str]], np.ndarray]  # (image, result, class names) -> picture
    cut_out: Callable[[np.ndarray, Any], np.ndarray] | None  # (image, result) -> RGBA, where results are alpha
    panels: Callable[[Scored], dict[str, np.ndarray]]  # a validated sample -> pictures of one size by name
    panel_notes: dict[str, str]  # what the colours of a panel mean
    write_demo: Callable[[Path], Path]  # draws the demo data into a folder
    test_metrics: tuple[str, ...] = ()  # what evaluate.py measures beside the task's own where nothing is chosen
    demo_specs: tuple[str, str] = ("train", "val")  # the training and the validation set there
    mask: Callable[[Any], np.ndarray] | None = lambda result: result  # result -> (H, W), a grey picture, if it is one
    objects: ObjectOutputs | None = None  # where a result is a list of objects
    has_clips: bool = False  # whether a sample is a clip, of which training draws some frames

    def demo_root(self) -> str:
        """The folder of the demo data, drawn where it is not there yet."""
        return str(self.write_demo(Path("data") / f"demo_{self.name}"))

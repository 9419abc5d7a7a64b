"""Clips as inference takes them: videos, folders of frames, and pictures, which are clips of one frame."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from errors import UserError
from readers import DataError, Fault, ImageList, read_image
from readers.clip_folders import natural
from readers.films import DEFAULT_RATE
from samples import Size
from video import Backwards, VideoReader


class Clip(ABC):
    """Frames of one size in the order of time, (H, W, 3) uint8 RGB, decoded when they are asked for.

    Attributes:
        name: of what is written.
        path: of the input.
        size: (height, width) of the frames.
        count: of the frames, 0 where that is not known.
        rate: frames a second.
        is_still: a picture by itself.
    """

    name: str
    path: str
    size: Size
    count: int
    rate: float
    is_still = False

    @abstractmethod
    def frame_name(self, number: int) -> str: ...

    @abstractmethod
    def frame_path(self, number: int) -> str:
        """The picture that a frame is, or nothing where it is none."""

    @abstractmethod
    def frames(self) -> Iterator[np.ndarray]:
        """All of them, any number of times; `DataError` for what is damaged."""

    @abstractmethod
    def backwards(self, stop: int) -> Iterator[np.ndarray]:
        """Those before the one numbered `stop`, the last one first."""

    def _checked(self, frame: np.ndarray, path: str) -> np.ndarray:
        if frame.shape[:2] != self.size:
            sides = f"is {frame.shape[1]}x{frame.shape[0]}, but the clip begins with {self.size[1]}x{self.size[0]}"
            raise DataError(Fault(path, sides))
        return frame


class VideoClip(Clip):
    """A video file. Raises `DataError` for what is none."""

    def __init__(self, name: str, path: str):
        self.name, self.path = name, path
        video = VideoReader(path)
        self.count, self.rate = video.count, video.rate
        height, width = next(iter(video)).shape[:2]
        self.size = height, width

    def frame_name(self, number: int) -> str:
        return f"{number:05d}"

    def frame_path(self, number: int) -> str:
        return ""

    def frames(self) -> Iterator[np.ndarray]:
        return (self._checked(frame, self.path) for frame in VideoReader(self.path))

    def backwards(self, stop: int) -> Iterator[np.ndarray]:
        return iter(Backwards(self.path, stop))


class PictureClip(Clip):
    """Frames that are pictures of their own. Raises `DataError` where the first one cannot be read."""

    def __init__(self, name: str, path: str, files: Sequence[str], is_still: bool = False):
        self.name, self.path, self.files, self.is_still = name, path, files, is_still
        self.count, self.rate = len(files), DEFAULT_RATE
        height, width = read_image(files[0]).shape[:2]
        self.size = height, width

    def frame_name(self, number: int) -> str:
        return Path(self.files[number]).stem

    def frame_path(self, number: int) -> str:
        return self.files[number]

    def frames(self) -> Iterator[np.ndarray]:
        return (self._checked(read_image(file), file) for file in self.files)

    def backwards(self, stop: int) -> Iterator[np.ndarray]:
        return (self._checked(read_image(file), file) for file in reversed(self.files[:stop]))


def open_clips(inputs: Sequence[str], images: ImageList) -> tuple[list[Clip], list[Fault]]:
    """(what the inputs mean as clips, what cannot be opened).

    The images in a folder that is an input, or in one below it, are the frames of one clip, in the order of the numbers
    in their names; it is called as the folder. Other images, and all videos, are clips by themselves.

    Raises:
        UserError: two of them have one name.
    """
    openers: list[tuple[str, str, Callable[[], Clip]]] = []
    folders = [os.path.realpath(path) for path in inputs if os.path.isdir(path)]
    frames: dict[str, list[str]] = defaultdict(list)
    for index in range(len(images)):
        (file,), name = images.files(index), images.sample_id(index)
        folder = os.path.dirname(file)
        if any(Path(os.path.realpath(folder)).is_relative_to(path) for path in folders):
            frames[folder].append(file)
        else:
            openers.append((name, file, partial(PictureClip, name, file, [file], is_still=True)))
    for folder, files in frames.items():
        name = _folder_name(os.path.realpath(folder), folders)
        openers.append((name, folder, partial(PictureClip, name, folder, sorted(files, key=in_time))))
    openers += [(name, file, partial(VideoClip, name, file)) for name, file in images.videos.items()]
    refuse_same_names([(name, path) for name, path, _ in openers])
    clips, faults = [], []
    for _, _, opened in openers:
        try:
            clips.append(opened())
        except DataError as error:
            faults.append(error.fault)
    return clips, faults


def _folder_name(folder: str, inputs: Sequence[str]) -> str:
    """Its path from the input that it is in, or its own name where it is an input."""
    if folder in inputs:
        return os.path.basename(folder)
    above = max((path for path in inputs if Path(folder).is_relative_to(path)), key=len)
    return Path(os.path.relpath(folder, above)).as_posix()


def refuse_same_names(named: Sequence[tuple[str, str]]) -> None:
    known: dict[str, str] = {}
    for name, path in named:
        if known.setdefault(name, path) != path:
            raise UserError(f"{path} would write the same outputs as {known[name]}; run them one after the other")


def in_time(path: str) -> list[tuple[int, str, str]]:
    """A key that sorts files by the numbers in their names: 9 before 10."""
    return natural(os.path.basename(path))

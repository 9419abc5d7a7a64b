"""Pictures, videos and folders of frames to disk: under its own name everything is whole.

Pixels are uint8: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from checkpoint import TEMPORARY
from colors import palette
from errors import UserError

TO_OPENCV = {2: cv2.COLOR_GRAY2BGR, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}


class FormatError(Exception):
    """What a file format cannot hold."""


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Encode by the path's suffix and write it atomically.

    Raises `FormatError` for what the format cannot hold, `UserError` where nothing can be written.
    """
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, TO_OPENCV[pixels.shape[2]])
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if path.suffix == ".jpg" else []
    is_encoded, encoded = cv2.imencode(path.suffix, pixels, options)
    if not is_encoded:  # JPEG ends at 65500 pixels a side
        raise FormatError(f"is too large for a {path.suffix} file: {pixels.shape[1]}x{pixels.shape[0]}")
    write_whole(path, encoded.tobytes())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and the folders above it, atomically; `UserError` where nothing can be written."""
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_palette(path: Path, labels: np.ndarray) -> None:
    """A label map (H, W) uint8 as a PNG whose pixels are the labels and whose colours tell them apart, as those of
    DAVIS and PASCAL VOC; atomically. `UserError` where nothing can be written."""
    picture = Image.fromarray(labels, "L").convert("P")
    picture.putpalette(palette().ravel().tolist())
    content = BytesIO()
    picture.save(content, "PNG")
    write_whole(path, content.getvalue())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was written before is whole") from None


class JsonList:
    """A .json list written as it grows: `with JsonList(path) as records: records.extend([{...}])`.

    It gets its name at the end of the block, and an exception leaves nothing of it. `UserError` where nothing can be
    written.
    """

    def __init__(self, path: Path):
        self.path, self._separator = path, "[\n"
        self._temporary = path.with_name(path.name + TEMPORARY)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "w", encoding="utf-8")  # noqa: SIM115 — held until the block ends

    def extend(self, records: list[dict[str, Any]]) -> None:
        with writing(self.path):
            for record in records:
                self._file.write(self._separator + json.dumps(record))
                self._separator = ",\n"

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block of which all records stay, or none where it ends in an exception."""
        place, separator = self._file.tell(), self._separator
        try:
            yield
        except BaseException:
            self._file.seek(place)
            self._file.truncate()
            self._separator = separator
            raise

    def __enter__(self) -> JsonList:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            with writing(self.path), self._file:
                self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
            if kind is None:
                with writing(self.path):
                    os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


class VideoWriter:
    """An .mp4 of frames of one size: `with VideoWriter(path, rate, (height, width)) as video: video.append(frame)`.

    It gets its name at the end of the block, and an exception leaves nothing of it. OpenCV's wheels have no H.264
    encoder, so it is MPEG-4 Part 2 (mp4v): lossy, at most 8191 pixels a side, and an odd side loses its last row.

    Raises `FormatError` for a size or rate that the encoder refuses, `UserError` where nothing can be written.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        self.path, self.count, (height, width) = path, 0, size
        self._temporary = path.with_name(path.stem + TEMPORARY + path.suffix)  # the suffix tells OpenCV the format
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(os.fspath(self._temporary), cv2.CAP_FFMPEG, codec, rate, (width, height))
        if not self._writer.isOpened():
            raise FormatError(f"cannot become an .mp4 file of {width}x{height} pixels at {rate:g} frames a second")

    def append(self, frame: np.ndarray) -> None:
        self._writer.write(cv2.cvtColor(frame, TO_OPENCV[frame.ndim]))
        self.count += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._writer.release()
        try:
            if kind is None:
                self._check()
                with writing(self.path):
                    os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _check(self) -> None:
        """OpenCV does not say when a disk is full: the file must hold as many frames as were written."""
        written = cv2.VideoCapture(os.fspath(self._temporary), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != self.count:
            raise UserError(f"cannot write {self.path}: {written:.0f} of {self.count} frames arrived; is it full?")


class FrameFolder:
    """Frames as 000001.png and so on in a folder, like `VideoWriter`; those of an earlier video there are replaced."""

    pattern = "[0-9]" * 6 + ".png"  # of what is replaced

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._temporary = path.with_name(path.name + TEMPORARY)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, frame: np.ndarray) -> None:
        self.count += 1
        write_image(self._temporary / f"{self.count:06d}.png", frame)

    def __enter__(self) -> FrameFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                for earlier in self.path.glob(self.pattern):
                    earlier.unlink()
                for frame in self._temporary.iterdir():
                    os.replace(frame, self.path / frame.name)
        shutil.rmtree(self._temporary, ignore_errors=True)


class LabelFolder(FrameFolder):
    """Label maps (H, W) uint8 by the names of frames, in any order, as palette PNGs; to be read again meanwhile. It
    takes the place of all .png files there."""

    pattern = "*.png"

    def __enter__(self) -> LabelFolder:
        return self

    def put(self, name: str, labels: np.ndarray) -> None:
        write_palette(self._temporary / f"{name}.png", labels)

    def get(self, name: str) -> np.ndarray:
        return np.array(Image.open(self._temporary / f"{name}.png"))

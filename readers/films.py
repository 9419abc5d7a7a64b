"""Video files, by OpenCV's own FFmpeg (H.264, HEVC, VP9, AV1 and older ones)."""

from __future__ import annotations

import math
import os
import threading
from array import array
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from readers.base import DataError, Fault

DEFAULT_RATE = 25.0  # frames a second where a file does not say


def silence_opencv() -> None:
    """Keep OpenCV and its FFmpeg from printing what they think of a file: a fault says it, once, with the path.

    FFmpeg's part counts only before the first video of a process is opened.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def open_film(path: str) -> cv2.VideoCapture:
    """Raises `DataError` for what is no video."""
    silence_opencv()
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise DataError(Fault(path, "cannot be read as a video"))
    return capture


def rate_of(capture: cv2.VideoCapture) -> float:
    """Frames a second, the mean where it varies."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if math.isfinite(rate) and rate > 0 else DEFAULT_RATE


def count_of(capture: cv2.VideoCapture) -> int:
    """How many frames a file announces, 0 where it does not."""
    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def check_length(path: str, seconds: float, capture: cv2.VideoCapture) -> None:
    """Raise `DataError` where the frames end long before what was announced, or there are none."""
    announced = count_of(capture) / rate_of(capture)  # in time: where the rate varies, some containers guess the count
    if seconds == 0 or announced - seconds > min(1, announced / 10):
        problem = f"is damaged or cut off: it ends after {seconds:.2f} of {announced:.2f} seconds"
        raise DataError(Fault(path, problem))


class FilmFrames(Sequence[np.ndarray]):
    """The frames of a video file in any order, (H, W, 3) uint8 RGB each, upright.

    The times of all frames, which one pass over the file collects, tell whether a jump has met the frame that it was
    meant to; where it has not, the file is decoded from its beginning. Going forward costs no jumps. The file is open
    from the first frame on, until the object goes; copies open it anew.

    Raises:
        DataError: no video, one without a frame, or one that is cut off.
    """

    NEAR = 32  # frames that are rather skipped than jumped over

    def __init__(self, file: str):
        self.file = file
        self.times = self._scan()
        self._close()

    def _scan(self) -> array[float]:
        """The time of each frame in milliseconds."""
        capture = self._open()
        times = array("d")
        while capture.grab():
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC))
        check_length(self.file, times[-1] / 1000 + 1 / rate_of(capture) if times else 0.0, capture)
        return times

    def _open(self) -> cv2.VideoCapture:
        if not os.path.isfile(self.file):
            raise DataError(Fault(self.file, "does not exist"))
        return open_film(self.file)

    def _close(self) -> None:
        self._capture: cv2.VideoCapture | None = None
        self._next = 0  # the frame that would be decoded next
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[str, array[float]]:
        return self.file, self.times

    def __setstate__(self, state: tuple[str, array[float]]) -> None:
        self.file, self.times = state
        self._close()

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        with self._lock:
            if self._capture is None or not self._next <= number <= self._next + self.NEAR:
                self._jump(number)
            frame = self._decode(number)
            if frame is None:  # the jump went elsewhere
                self._capture, self._next = self._open(), 0
                frame = self._decode(number)
        if frame is None:
            problem = f"frame {number} cannot be decoded; the file has changed, or is damaged there"
            raise DataError(Fault(self.file, problem))
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def _jump(self, number: int) -> None:
        if self._capture is None:
            self._capture, self._next = self._open(), 0
        if not self._next <= number <= self._next + self.NEAR:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            self._next = number

    def _decode(self, number: int) -> np.ndarray | None:
        """The frame, from where the file stands on."""
        assert self._capture is not None
        while self._next < number:
            self._capture.grab()
            self._next += 1
        is_read, frame = self._capture.read()
        self._next += 1
        is_meant = abs(self._capture.get(cv2.CAP_PROP_POS_MSEC) - self.times[number]) < 0.5
        return frame if is_read and is_meant else None

    def path(self, number: int) -> str:
        return self.file

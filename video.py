"""The frames of a video file, decoded one at a time by OpenCV's own FFmpeg (H.264, HEVC, VP9, AV1 and older ones)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import cv2
import numpy as np

from readers import DataError, Fault

DEFAULT_RATE = 25.0  # frames a second where a file does not say


class VideoReader:
    """The frames of a video, upright by its rotation, (H, W, 3) uint8 RGB. To be iterated over once.

    Attributes:
        rate: frames a second, the mean where it varies.
        count: how many frames the file announces, 0 where it does not.

    Raises:
        DataError: it cannot be opened; or, at the end of the iteration, it held less than it announced.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._capture = cv2.VideoCapture(self.path, cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(Fault(self.path, "cannot be read as a video"))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else DEFAULT_RATE
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        seconds = 0.0
        while True:
            is_read, frame = self._capture.read()
            if not is_read:
                break
            seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 + 1 / self.rate
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self._capture.release()
        announced = self.count / self.rate  # in time: where the rate varies, some containers guess the count
        if seconds == 0 or announced - seconds > min(1, announced / 10):
            problem = f"is damaged or cut off: it ends after {seconds:.2f} of {announced:.2f} seconds"
            raise DataError(Fault(self.path, problem))


def silence_opencv() -> None:
    """Keep OpenCV and its FFmpeg from printing what they think of a file: a fault says it, once, with the path."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
